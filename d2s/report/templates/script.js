const tip = document.getElementById('tip');
for (const chart of document.querySelectorAll('svg[data-lines]')) {
  const lines = JSON.parse(chart.dataset.lines), cursor = chart.querySelector('.cursor');
  chart.addEventListener('pointermove', event => {
    const box = chart.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
    const near = lines.map(line => line.at.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    const best = near.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    cursor.setAttribute('x1', best[0]); cursor.setAttribute('x2', best[0]);
    cursor.style.visibility = 'visible';
    tip.textContent = lines.map((line, i) => (lines.length > 1 ? line.name + ': ' : '') + near[i][3]
      + ' at ' + near[i][2]).join('\n');
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + 'px';
    tip.style.top = event.clientY + 14 + 'px';
  });
  chart.addEventListener('pointerleave', () => { tip.hidden = true; cursor.style.visibility = 'hidden'; });
}
