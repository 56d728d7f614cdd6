"""The look of the report, and the few lines that read values off a chart. No address of anything outside."""

STYLE = """
:root{--bg:#f6f6f4;--card:#fff;--ink:#1c1e21;--soft:#5e646c;--rule:#e2e3e0;--good:#1a7f45;--bad:#b8402f;
--near:#96690a;--s1:#2468c8;--s2:#d9691e;--s3:#2c8c5a;--s4:#8a4fc0;--s5:#b3306f;--s6:#6b7280;
--goodbg:#e4f3e9;--badbg:#f9e7e3;--nearbg:#f8efd8}
@media (prefers-color-scheme:dark){:root{--bg:#15171a;--card:#1e2125;--ink:#e7e8ea;--soft:#a0a7b0;--rule:#343940;
--good:#5cc98a;--bad:#ef8b78;--near:#e0b252;--s1:#6ea8ff;--s2:#ff9d57;--s3:#5fd099;--s4:#c097f0;--s5:#f27fb1;
--s6:#a3abb6;--goodbg:#173325;--badbg:#3b211d;--nearbg:#38301a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 20px 60px}
h1{font-size:28px;line-height:1.2;margin:0;overflow-wrap:anywhere}
header p{margin:4px 0 20px;color:var(--soft);overflow-wrap:anywhere}
h2{font-size:19px;margin:0 0 14px}
h3{font-size:13px;margin:0 0 6px;color:var(--soft);text-transform:uppercase;letter-spacing:.05em}
section{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:20px 22px;margin:18px 0}
.note,footer{color:var(--soft);font-size:13px;margin:10px 0 0}
.tiles{display:flex;flex-wrap:wrap;gap:12px}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:12px 18px;min-width:150px}
.tile b{display:block;font-size:26px;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span,.tile small{display:block}.tile small{color:var(--soft)}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;min-width:60%}.recall{width:100%}
th,td{padding:5px 10px;text-align:right;white-space:nowrap}
thead th{color:var(--soft);font-weight:600;font-size:13px;border-bottom:1px solid var(--rule)}
thead tr:first-child th{border:0;text-align:center;padding-bottom:0}
.name,td.kind,.recall thead .l{text-align:left}th.name{font-weight:600}td.kind{color:var(--soft)}
tbody tr+tr:not(.chance)>*{border-top:1px solid var(--rule)}
tr.chance{color:var(--soft);font-size:13px}tr.chance td{padding-top:0}
.edge{border-right:1px solid var(--rule)}
td.sum{width:150px;min-width:110px}
td.sum i{display:block;height:3px;border-radius:2px;background:var(--s1);margin-left:auto}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:22px}
figure{margin:0;min-width:0}.charts figcaption span{color:var(--soft);font-size:13px}
.chart{display:block;width:100%;height:auto;overflow:visible}
.grid{stroke:var(--rule)}.axis{stroke:var(--soft)}.tick{fill:var(--soft);font-size:11.5px}
.line{fill:none;stroke-width:2;stroke-linejoin:round;vector-effect:non-scaling-stroke}
.faint{stroke-width:1;opacity:.35}.area{fill-opacity:.22;stroke-width:1.5;stroke-linejoin:round}
.mean{stroke-width:1.5;stroke-dasharray:4 4}.cursor{stroke:var(--soft);visibility:hidden}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 12px;font-size:13px}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
#tip{position:fixed;pointer-events:none;background:var(--ink);color:var(--bg);border-radius:6px;padding:4px 9px;
font-size:12.5px;white-space:pre;z-index:9}
.note+.q{margin-top:14px}
.q{border-top:1px solid var(--rule);padding:14px 0}.q p{margin:0 0 10px}
.q q{font-size:16px;quotes:none}
.badge{display:inline-block;border-radius:20px;padding:1px 10px;margin-right:10px;font-size:12.5px;font-weight:600}
.badge.hit{color:var(--good);background:var(--goodbg)}.badge.near{color:var(--near);background:var(--nearbg)}
.badge.miss{color:var(--bad);background:var(--badbg)}
.pic{background-size:contain;background-repeat:no-repeat;background-position:center;background-color:var(--bg);
width:100%;aspect-ratio:4/3;border-radius:6px}
.strip{display:grid;grid-template-columns:repeat(6,minmax(0,1fr));gap:10px}
.strip figure{border:2px solid transparent;border-radius:9px;padding:3px}
.strip figcaption{font-size:12.5px;padding:2px 4px 0;font-variant-numeric:tabular-nums}
.strip figcaption span{color:var(--soft);float:right}
.strip .right{border-color:var(--good)}.strip .right figcaption::before{content:"\\2713 ";color:var(--good)}
.beyond{border-style:dashed!important}
.i2t{display:grid;grid-template-columns:minmax(120px,200px) 1fr;gap:18px}
.texts{list-style:none;margin:8px 0 0;padding:0}
.texts li{display:grid;grid-template-columns:4.2em 1fr auto;gap:8px;padding:2px 8px;border-radius:5px}
.texts li.right{background:var(--goodbg)}.texts li.right .place::before{content:"\\2713 ";color:var(--good)}
.said{display:-webkit-box;-webkit-box-orient:vertical;-webkit-line-clamp:3;overflow:hidden}
.place,.sim{color:var(--soft);font-size:13px;font-variant-numeric:tabular-nums}.place{text-align:right}
summary{cursor:pointer;font-weight:600}
.groups{columns:3 300px;column-gap:28px;margin-top:12px}.group{break-inside:avoid;margin-bottom:18px}
dl{display:grid;grid-template-columns:fit-content(56%) minmax(0,1fr);gap:1px 14px;margin:0;font-size:13px}
dt{color:var(--soft);overflow-wrap:anywhere}dd{margin:0;text-align:right;overflow-wrap:anywhere}
@media (max-width:640px){.strip{grid-template-columns:repeat(3,minmax(0,1fr))}.i2t{grid-template-columns:1fr}
section{padding:16px 14px}.i2t .pic{max-width:220px}}
@media print{section{break-inside:avoid;border:0}}
"""

SCRIPT = """
const tip = document.getElementById('tip');
for (const chart of document.querySelectorAll('svg[data-points]')) {
  const lines = JSON.parse(chart.dataset.points), cursor = chart.querySelector('.cursor');
  chart.addEventListener('pointermove', event => {
    const box = chart.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
    const near = lines.map(line => line.at.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    const best = near.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    cursor.setAttribute('x1', best[0]); cursor.setAttribute('x2', best[0]);
    cursor.style.visibility = 'visible';
    tip.textContent = lines.map((line, i) => (lines.length > 1 ? line.name + ': ' : '') + near[i][3]
      + ' at ' + near[i][2]).join('\\n');
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + 'px';
    tip.style.top = event.clientY + 14 + 'px';
  });
  chart.addEventListener('pointerleave', () => { tip.hidden = true; cursor.style.visibility = 'hidden'; });
}
"""
