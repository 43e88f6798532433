"""Pieces of the pages about runs: one HTML file without scripts or links, with its pictures, videos and sounds inside.

Names and captions may come from strangers: all text is escaped, and the page's policy allows no script and no request.
"""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:1.5rem auto;max-width:88rem;padding:0 1rem}
body{color:#1b1b1b;background:#fff}
h1{font-size:1.4rem;margin-bottom:.3rem}h2{font-size:1.15rem;margin-top:2rem}h3{font-size:1rem;margin-bottom:.3rem}
table{border-collapse:collapse}td,th{padding:.15rem .9rem .15rem 0;text-align:left;vertical-align:top}
td{overflow-wrap:anywhere}.bad{color:#a40000}.good{color:#1a6b1a}.row{display:flex;flex-wrap:wrap;gap:1rem}
figure{margin:0;max-width:280px}figcaption{font-size:12px;color:#444}
video,.row img{width:180px;image-rendering:pixelated;background:#000;display:block}audio{width:240px;display:block}
.row audio+img{width:240px}td img{width:360px}
pre{background:#f5f5f5;padding:.7rem;overflow:auto;max-height:40rem;font-size:12px}summary{cursor:pointer}
svg.chart{background:#fff}svg.chart text{font:11px system-ui,sans-serif;fill:#333}svg.chart .title{font-weight:600}
svg.chart .line{fill:none;stroke-width:1.6}svg.chart .faint{fill:none;stroke-width:1;opacity:.3}
svg.chart .grid{stroke:#eee}svg.chart .axis{stroke:#888;fill:none}
"""
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
_TYPES = {
    ".mp4": ("video", "video/mp4"),
    ".webm": ("video", "video/webm"),
    ".wav": ("audio", "audio/wav"),
    ".flac": ("audio", "audio/flac"),
    ".mp3": ("audio", "audio/mpeg"),
    ".ogg": ("audio", "audio/ogg"),
    ".png": ("img", "image/png"),
    ".gif": ("img", "image/gif"),
    ".jpg": ("img", "image/jpeg"),
}


def page(title: str, parts: Iterable[str]) -> str:
    """The whole file."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def text(value: object) -> str:
    """Escaped."""
    return html.escape(str(value), quote=True)


def table(rows: Iterable[Sequence[object]], head: Sequence[object] = ()) -> str:
    """Rows of cells, the first of each a heading."""
    top = f"<tr>{''.join(f'<th>{text(cell)}</th>' for cell in head)}</tr>" if head else ""
    lines = [f"<tr><th>{text(row[0])}</th>{''.join(f'<td>{text(cell)}</td>' for cell in row[1:])}</tr>" for row in rows]
    return f"<table>{top}{''.join(lines)}</table>"


def folded(title: str, content: str) -> str:
    """Text of many lines that opens on a click."""
    return f"<details><summary>{text(title)}</summary><pre>{text(content)}</pre></details>"


def row(figures: Iterable[str]) -> str:
    """Side by side."""
    return f'<div class="row">{"".join(figures)}</div>'


class Media:
    """Puts files into a page, up to `mib` MiB of them; after that they are only named."""

    def __init__(self, mib: float = 64) -> None:
        self.left = int(mib * 2**20)

    def __call__(self, path: Path) -> str:
        """An element that plays or shows the file, or its name where there is no room or no such file."""
        tag, kind = _TYPES.get(path.suffix.lower(), ("", ""))
        try:
            size = path.stat().st_size
            if not tag or size > self.left:
                return f"<p>{text(path)}</p>"
            data = base64.b64encode(path.read_bytes()).decode()
        except OSError as error:
            return f'<p class="bad">{text(path.name)}: {text(error.strerror)}</p>'
        self.left -= size
        source = f'src="data:{kind};base64,{data}"'
        if tag == "img":
            return f'<img alt="{text(path.name)}" {source}>'
        more = "autoplay loop muted playsinline " if tag == "video" else ""
        return f'<{tag} controls {more}preload="auto" title="{text(path.name)}" {source}></{tag}>'


def flat(tree: Any, name: str = "") -> dict[str, Any]:
    """The leaves of a config by their dotted places; an empty dict or list is a leaf."""
    if isinstance(tree, Mapping) and tree:
        parts = {f"{name}.{key}" if name else str(key): value for key, value in tree.items()}
    elif isinstance(tree, list) and tree and any(isinstance(value, (Mapping, list)) for value in tree):
        parts = {f"{name}[{place}]": value for place, value in enumerate(tree)}
    else:
        return {name: tree}
    return {leaf: value for place, part in parts.items() for leaf, value in flat(part, place).items()}
