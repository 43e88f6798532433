"""The account of a dataset as one HTML page without scripts or links: tables, histograms, a contact sheet.

Captions and names come from strangers: everything is escaped, and the page's policy allows no script and no request.
"""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmdiff.data.report import Row

SHOWN = 48  # pictures of the contact sheet
LISTED = 200  # lines of a list; the JSON has all
_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1b1b1b;background:#fff}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}
td,th{padding:.15rem .7rem .15rem 0;text-align:left;vertical-align:top}td.n{text-align:right}
.bad{color:#a40000}.good{color:#1a6b1a}.sheet{display:flex;flex-wrap:wrap;gap:.6rem}
figure{margin:0;width:128px}figure img{width:128px;image-rendering:pixelated}
figcaption{font-size:11px;max-height:4.4em;overflow:hidden;overflow-wrap:anywhere}
.plots{display:flex;flex-wrap:wrap;gap:1.2rem}svg text{font:11px system-ui,sans-serif}
"""


def page(report: Mapping[str, Any], rows: Sequence[Row], title: str) -> str:
    """The whole page. report: of `mmdiff.data.report.account` of these rows."""
    status = report["status"]
    verdict = (
        "".join(f'<p class="bad">fails: {_text(line)}</p>' for line in report["failures"])
        or '<p class="good">passes: nothing is changed or lost that the config does not say</p>'
    )
    kept = [row for row in rows if row.status == "kept"]
    parts = [
        f"<h1>{_text(title)}</h1><p>{_text(report['path'])}</p>{verdict}",
        f"<h2>Account: {report['accounted_percent']:.1f} % of {report['entries']:,} entries</h2>",
        _table(status),
        "<h2>By split</h2>",
        _table(
            {split: ", ".join(f"{n} {name}" for name, n in found.items()) for split, found in report["splits"].items()}
        ),
        *_section("Dropped, by kind", report["dropped"]),
        *_section("Not used", report["not_used"]),
        *_section("Changed by the config, of the kept", report["changes"]),
        *_section("Faults, of the kept", report["faults"]),
        *_section("Near copies, of the kept", report["duplicates"]),
        "<h2>What the items are</h2>",
        _numbers({**report["facts"], **report["measures"]}),
        '<div class="plots">',
        *[_histogram(name, values) for name, values in _plotted(kept).items()],
        "</div><h2>Captions</h2>",
        _table({name.replace("_", " "): report["captions"][name] for name in _CAPTION_ROWS}),
        _numbers({name: report["captions"][name] for name in ("characters", "words")}),
        f"<p>most used: {_text(', '.join(f'{word} {count}' for word, count in report['captions']['most_used']))}</p>",
        "<h2>Contact sheet</h2>",
        _sheet(kept),
        *_list("Dropped", [f"{row.split}: {row.kind}: {row.reason}" for row in rows if row.status == "dropped"]),
        *_list("Near copies", [f"{row.split} {row.where} is as {row.copy_of}" for row in kept if row.copy_of]),
        *_list(
            "Faults", [f"{row.split} {row.where}: {', '.join(row.faults)} {row.reason}" for row in kept if row.faults]
        ),
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


_CAPTION_ROWS = ("captions", "distinct", "items_without", "items_sharing_the_first", "vocabulary", "not_ascii")


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _table(found: Mapping[str, Any]) -> str:
    lines = [f'<tr><td>{_text(name)}</td><td class="n">{_text(value)}</td></tr>' for name, value in found.items()]
    return f"<table>{''.join(lines)}</table>"


def _section(title: str, found: Mapping[str, Any]) -> list[str]:
    return [f"<h2>{_text(title)}</h2>", _table(found)] if found else []


def _numbers(found: Mapping[str, Mapping[str, Any]]) -> str:
    head = "<tr><th></th><th>least</th><th>median</th><th>mean</th><th>most</th></tr>"
    lines = []
    for name, values in found.items():
        if set(values) == {"least", "median", "mean", "most"}:
            cells = "".join(f'<td class="n">{values[part]:.6g}</td>' for part in ("least", "median", "mean", "most"))
        else:
            cells = f'<td colspan="4">{_text(", ".join(f"{value}: {count}" for value, count in values.items()))}</td>'
        lines.append(f"<tr><td>{_text(name)}</td>{cells}</tr>")
    return f"<table>{head}{''.join(lines)}</table>"


def _plotted(kept: Sequence[Row]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in kept:
        for name, value in {**(row.facts or {}), **(row.measures or {})}.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                found.setdefault(name, []).append(float(value))
    found["words of a caption"] = [float(len(text.split())) for row in kept for text in row.captions if text]
    return {name: values for name, values in found.items() if values and min(values) < max(values)}


def _histogram(name: str, values: Sequence[float], bars: int = 24, width: int = 264, height: int = 90) -> str:
    """An SVG picture: how many values lie in each of `bars` equal steps."""
    low, high = min(values), max(values)
    counts = [0] * bars
    for value in values:
        counts[min(bars - 1, int((value - low) / (high - low) * bars))] += 1
    step, top = width / bars, max(counts)
    drawn = "".join(
        f'<rect x="{i * step:.1f}" y="{18 + height - height * n / top:.1f}" width="{step - 1:.1f}" '
        f'height="{height * n / top:.1f}" fill="#4a6fa5"><title>{n}</title></rect>'
        for i, n in enumerate(counts)
    )
    base = height + 32
    return (
        f'<svg width="{width}" height="{height + 36}" role="img"><text x="0" y="11">{_text(name)} (n = {len(values):,})'
        f'</text>{drawn}<text x="0" y="{base}">{low:.4g}</text>'
        f'<text x="{width}" y="{base}" text-anchor="end">{high:.4g}</text></svg>'
    )


def _sheet(kept: Sequence[Row]) -> str:
    """Pictures of items spread evenly over the kept ones."""
    seen = [row for row in kept if row.picture]
    chosen = [seen[i * len(seen) // min(SHOWN, len(seen))] for i in range(min(SHOWN, len(seen)))]
    figures = []
    for row in chosen:
        kind = "png" if row.picture.startswith(b"\x89PNG") else "jpeg"
        data = base64.b64encode(row.picture).decode()
        caption = _text(row.captions[0][:120])
        figures.append(
            f'<figure><img alt="{_text(row.where)}" src="data:image/{kind};base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f'<div class="sheet">{"".join(figures)}</div>'


def _list(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    more = f"<li>and {len(lines) - LISTED} more, in the JSON</li>" if len(lines) > LISTED else ""
    shown = "".join(f"<li>{_text(line[:400])}</li>" for line in lines[:LISTED])
    return [f"<h2>{_text(title)} ({len(lines):,})</h2><ul>{shown}{more}</ul>"]
