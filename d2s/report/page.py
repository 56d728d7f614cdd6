"""The report's page: one HTML file with everything in it. Every text that is not ours is escaped."""

import html
import math
from collections.abc import Sequence

from d2s.evaluate.metrics import KS
from d2s.evaluate.tables import CAPACITY
from d2s.report.charts import SERIES_COLOURS, Series, histogram, legend, line_chart, short
from d2s.report.gallery import Direction, Gallery, Pairs, Query
from d2s.report.runs import RecallRow, Run
from d2s.report.style import SCRIPT, STYLE

OUTCOME_WORDS = {"hit": "hit, first", "near": "second to fifth", "miss": "miss, further down"}


def page(
    runs: Sequence[Run],
    rows: Sequence[RecallRow],
    *,
    gallery: Gallery | None,
    gallery_of: str,
    capacity: dict[str, float],
    why_no_gallery: str,
) -> str:
    """The whole page. The first run is the one that the report is about; the others are for comparison.

    Args:
        rows: of the recall table.
        gallery_of: name of the split and of the model that the pictures come from.
        why_no_gallery: said in place of the pictures where `gallery` is None.
    """
    run = runs[0]
    if gallery is None:
        seen = [_section("Pictures and captions", f'<p class="note">{_esc(why_no_gallery)}</p>')]
        thumbs = ""
    else:
        seen = [
            _section("Text to image", _direction(gallery.t2i, gallery_of)),
            _section("Image to text", _direction(gallery.i2t, gallery_of)),
            _section("Similarities", _similarities(gallery)),
        ]
        # Each picture once, however often it is shown.
        thumbs = "".join(
            f".p{number}{{background-image:url(data:image/jpeg;base64,{data})}}"
            for number, data in gallery.thumbs.items()
        )
    parts = [
        _section("Recall", _recall(rows)),
        _section("Curves", _curves(runs)),
        *seen,
        *([_section("Information capacity", _capacity(capacity))] if capacity else []),
        _section("Settings", "".join(_settings(r, opened=r is run) for r in runs)),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{_esc(run.name)} - D2S report</title>
<style>{STYLE}{thumbs}</style>
</head>
<body>
<main>
<header><h1>{_esc(run.name)}</h1><p>{_esc(run.what)}</p>{_tiles(run, rows)}</header>
{"".join(parts)}
<footer>Written by D2S. This file needs no network and nothing beside it.</footer>
</main>
<div id="tip" hidden></div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _esc(text: object) -> str:
    return html.escape(str(text), quote=True)


def _breaking(text: str, mark: str) -> str:
    """The text, escaped, which may go on in another line after each mark."""
    return f"{mark}<wbr>".join(map(_esc, text.split(mark)))


def _one(value: float, form: str = ".1f") -> str:
    return "-" if math.isnan(value) else format(value, form)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_esc(title)}</h2>{body}</section>"


def _tiles(run: Run, rows: Sequence[RecallRow]) -> str:
    tiles = [
        (
            f"{row.retrieval.rsum:.1f}",
            f"rSum, {row.split}, {row.captions}",
            f"chance {_one(row.retrieval.chance_rsum)}",
        )
        for row in rows
        if row.run == run.name and row.captions == run.aligned
    ][:2]
    tiles += run.facts()
    body = "".join(
        f'<div class="tile"><b>{_esc(value)}</b><span>{_esc(name)}</span><small>{_esc(more)}</small></div>'
        for value, name, more in tiles
    )
    return f'<div class="tiles">{body}</div>'


def _recall(rows: Sequence[RecallRow]) -> str:
    if not rows:
        return '<p class="note">Nothing has been evaluated yet.</p>'
    head = "".join(f"<th>R@{k}</th>" for k in KS) + "<th>median rank</th>"
    body = []
    several = len({row.run for row in rows}) > 1
    for row in rows:
        found = row.retrieval
        cells = []
        for way in (found.i2t, found.t2i):
            cells += [f"<td>{_one(value)}</td>" for value in way.hits]
            cells.append(f'<td class="edge">{_one(way.median_rank, "g")}</td>')
        width = max(0.0, min(found.rsum / 6, 100))
        name = f'<th class="name">{_esc(row.run)}</th>' if several else ""
        body.append(
            f'<tr>{name}<th class="name">{_esc(row.split)}</th><td class="kind">{_esc(row.captions)}</td>'
            f'{"".join(cells)}<td class="sum"><b>{found.rsum:.1f}</b>'
            f'<i style="width:{width:.1f}%"></i></td></tr>'
        )
        chance = [f"<td>{_one(value)}</td>" for value in found.i2t.chance] + ['<td class="edge"></td>']
        chance += [f"<td>{_one(value)}</td>" for value in found.t2i.chance] + ['<td class="edge"></td>']
        body.append(
            f'<tr class="chance">{"<th></th>" if several else ""}<th></th><td class="kind">chance</td>'
            f'{"".join(chance)}<td class="sum">{_one(found.chance_rsum)}</td></tr>'
        )
    first = '<th class="l">run</th>' if several else ""
    return f"""<div class="wide"><table class="recall"><thead>
<tr>{"<th></th>" if several else ""}<th></th><th></th><th colspan="4">image to text</th>
<th colspan="4">text to image</th><th></th></tr>
<tr>{first}<th class="l">split</th><th class="l">captions</th>{head}{head}<th>rSum</th></tr></thead>
<tbody>{"".join(body)}</tbody></table></div>
<p class="note">R@K: percent of queries with a right answer among the first K; ties count against the model.
rSum is the sum of the six recalls, 600 at most (the bar). Chance is the expectation for a random order.</p>"""


def _curves(runs: Sequence[Run]) -> str:
    names = legend([(run.name, _colour(n)) for n, run in enumerate(runs)])
    charts = []
    reach = max(
        (float(row["epoch"]) for run in runs for row in run.rows if "epoch" in row),
        default=0.0,
    )
    for title, note, series, x_label, zero in (
        (
            "Loss",
            "total of a step; faint: as logged, line: mean over a window",
            _train(runs, "loss", True),
            "epoch",
            False,
        ),
        ("Learning rate", "of the heads", _train(runs, "lr", False), "epoch", True),
        ("Validation rSum", "of the captions that the stage aligns", _val(runs), "epoch", True),
        ("Speed", "training samples a second", _train(runs, "samples_per_s", True), "epoch", True),
        ("Gradient norm", "before clipping", _train(runs, "grad_norm", True), "epoch", True),
        (
            "Distillation loss",
            "mean over the batch",
            _train(runs, "distill", True, skip_zero=True),
            "epoch",
            False,
        ),
    ):
        drawn = line_chart(series, x_label=x_label, x_max=reach, from_zero=zero, label=title)
        if drawn:
            charts.append(
                f"<figure><figcaption><b>{title}</b> <span>{note}</span></figcaption>{drawn}</figure>"
            )
    if not charts:
        return '<p class="note">metrics.jsonl has no rows yet.</p>'
    return f'{names}<div class="charts">{"".join(charts)}</div>'


def _colour(number: int) -> int:
    return number % SERIES_COLOURS + 1


def _train(runs: Sequence[Run], field: str, smooth: bool, skip_zero: bool = False) -> list[Series]:
    found = []
    for number, run in enumerate(runs):
        rows = [row for row in run.train if isinstance(row.get(field), int | float)]
        if skip_zero and not any(row[field] for row in rows):
            continue
        x, y = [row["epoch"] for row in rows], [row[field] for row in rows]
        found.append(Series(name=run.name, x=x, y=y, colour=_colour(number), smooth=smooth))
    return found


def _val(runs: Sequence[Run]) -> list[Series]:
    found = []
    for number, run in enumerate(runs):
        points = run.validations()
        x, y = [epoch for epoch, _ in points], [score for _, score in points]
        found.append(Series(name=run.name, x=x, y=y, colour=_colour(number), marks=True))
    return found


def _direction(direction: Direction, gallery_of: str) -> str:
    shares = ", ".join(f"{OUTCOME_WORDS[name]} {share:.1f} %" for name, share in direction.shares.items())
    note = (
        f'<p class="note">{_esc(gallery_of)}. Of all queries: {_esc(shares)}. Shown are up to four of each, spread'
        " evenly over the split; nobody picked them.</p>"
    )
    return note + "".join(_query(query) for query in direction.queries)


def _query(query: Query) -> str:
    badge = f'<span class="badge {query.outcome}">rank {query.rank:,}</span>'
    beyond = [] if any(answer.right for answer in query.answers) else [query.best]
    if query.text is None:
        answers = "".join(
            f'<li class="{"right" if a.right else "wrong"}"><span class="place">{a.rank:,}</span>'
            f'<span class="said" title="{_esc(a.text)}">{_esc(a.text)}</span>'
            f'<span class="sim">{a.similarity:.3f}</span></li>'
            for a in [*query.answers, *beyond]
        )
        asked = _picture(query.image, "query")
        return f'<article class="q i2t">{asked}<div>{badge}<ol class="texts">{answers}</ol></div></article>'
    shown = "".join(
        f'<figure class="{"right" if a.right else "wrong"}">{_picture(a.image, "answer")}'
        f"<figcaption>{a.rank:,} <span>{a.similarity:.3f}</span></figcaption></figure>"
        for a in query.answers
    )
    if beyond:
        a = beyond[0]
        shown += (
            f'<figure class="right beyond">{_picture(a.image, "the right image")}'
            f"<figcaption>{a.rank:,} <span>{a.similarity:.3f}</span></figcaption></figure>"
        )
    return f'<article class="q t2i"><p>{badge}<q>{_esc(query.text)}</q></p><div class="strip">{shown}</div></article>'


def _picture(number: int, role: str) -> str:
    return f'<div class="pic p{number}" role="img" aria-label="{role}, number {number} of the split"></div>'


def _similarities(gallery: Gallery) -> str:
    names = legend([("best right answer", 1), ("best wrong answer (hardest negative)", 2)])
    charts = "".join(
        f"<figure><figcaption><b>{title}</b> <span>the right answer wins in {pairs.won:.1f} %"
        f" of {len(pairs.positive):,} queries</span></figcaption>{_pairs(pairs, title)}</figure>"
        for title, pairs in (("Image to text", gallery.i2t_pairs), ("Text to image", gallery.t2i_pairs))
    )
    return (
        f'{names}<div class="charts">{charts}</div><p class="note">For each query the similarity of its best right'
        " answer and of its best wrong one, in percent of the queries; dashed: means.</p>"
    )


def _pairs(pairs: Pairs, title: str) -> str:
    return histogram(
        [("right", pairs.positive, 1), ("wrong", pairs.hardest, 2)],
        label=f"{title}: similarities of the best right and the best wrong answers",
    )


def _capacity(measures: dict[str, float]) -> str:
    body = []
    for key, (name, meaning) in CAPACITY.items():
        names = [f"{key}_{kind}" for kind in ("images", "sparse", "dense")]
        if key == "cosine":
            names = ["", "cosine_sparse_dense", ""]
        cells = "".join(f"<td>{short(measures[n]) if n in measures else ''}</td>" for n in names)
        if any(n in measures for n in names):
            body.append(f'<tr><th class="name">{name}</th>{cells}<td class="kind">{meaning}</td></tr>')
    return (
        '<div class="wide"><table><thead><tr><th></th><th>images</th><th>sparse</th><th>dense</th><th></th></tr>'
        f"</thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _settings(run: Run, opened: bool) -> str:
    groups = "".join(
        f'<div class="group"><h3>{_esc(title)}</h3><dl>'
        + "".join(
            f"<dt>{_breaking(name, '.')}</dt><dd>{_breaking(value, '/')}</dd>" for name, value in values
        )
        + "</dl></div>"
        for title, values in run.settings()
    )
    return (
        f"<details{' open' if opened else ''}><summary>{_esc(run.name)}</summary>"
        f'<div class="groups">{groups}</div></details>'
    )
