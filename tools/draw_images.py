"""Draws the images of README and docs as SVG, each for a light and a dark page: the architecture, and one figure.

Run by `python -m tools.draw_images`. The figure shows benchmarks/results/layer.json. A test checks that the committed
files are fresh. No plotting library: the same input gives the same bytes everywhere.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
LAYER_RESULT = ROOT / "benchmarks" / "results" / "layer.json"

FONT = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colors of one kind of page."""

    name: str
    text: str
    muted: str
    line: str
    box: str
    frame: str
    first: str  # shared memory; the data path
    second: str  # inline
    control: str  # control messages


LIGHT = Theme(
    name="light", text="#1f2328", muted="#59636e", line="#8c959f", box="#ffffff", frame="#f6f8fa", first="#0969da",
    second="#80b3ff", control="#9a6700",
)  # fmt: skip
DARK = Theme(
    name="dark", text="#f0f6fc", muted="#9198a1", line="#6e7681", box="#161b22", frame="#0d1117", first="#58a6ff",
    second="#1f4b8e", control="#d29922",
)  # fmt: skip
THEMES = (LIGHT, DARK)


class Drawing:
    """Shapes in one theme, collected as SVG."""

    def __init__(self, theme: Theme, width: int, height: int, title: str) -> None:
        self.theme = theme
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" font-family="{FONT}">',
            f"<title>{escape(title)}</title>",
            "<defs>",
            *(self._arrow_head(name) for name in ("line", "first", "control")),
            "</defs>",
        ]

    def box(
        self, x: float, y: float, width: float, height: float, lines: Sequence[str] = (), *, accent: str = "line"
    ) -> None:
        """A rounded box; its first line is bold, the others are small, all centered."""
        self._rectangle(x, y, width, height, fill=self.theme.box, stroke=self._color(accent))
        top = y + height / 2 - 8.5 * (len(lines) - 1)
        for number, line in enumerate(lines):
            if number == 0:
                self.text(x + width / 2, top + 5, line, size=15, bold=True)
            else:
                self.text(x + width / 2, top + 5 + 17 * number, line, size=12, color="muted")

    def frame(self, x: float, y: float, width: float, height: float, label: str) -> None:
        """A dashed frame around boxes, with its label at the top left."""
        self._rectangle(x, y, width, height, fill=self.theme.frame, stroke=self.theme.line, dashes="6 5")
        self.text(x + 14, y + 21, label, size=12, color="muted", anchor="start")

    def bar(self, x: float, y: float, width: float, height: float, color: str) -> None:
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" fill="{self._color(color)}"/>'
        )

    def arrow(
        self, *points: tuple[float, float], color: str = "line", both: bool = False, dashed: bool = False
    ) -> None:
        """A line along the points with a head at its end, or at both ends."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        start = f' marker-start="url(#{color})"' if both else ""
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{self._color(color)}" stroke-width="1.8"{dashes}{start} '
            f'marker-end="url(#{color})"/>'
        )

    def rule(self, x: float, y1: float, y2: float) -> None:
        """A dashed vertical line."""
        self._parts.append(
            f'<line x1="{x:g}" y1="{y1:g}" x2="{x:g}" y2="{y2:g}" stroke="{self.theme.muted}" stroke-dasharray="4 4"/>'
        )

    def text(
        self, x: float, y: float, text: str, *, size: int = 13, color: str = "text", bold: bool = False,
        anchor: str = "middle",
    ) -> None:  # fmt: skip
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{self._color(color)}" text-anchor="{anchor}"{weight}>'
            f"{escape(text)}</text>"
        )

    def svg(self) -> str:
        return "\n".join([*self._parts, "</svg>", ""])

    def _rectangle(
        self, x: float, y: float, width: float, height: float, *, fill: str, stroke: str, dashes: str = ""
    ) -> None:
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{fill}" stroke="{stroke}" '
            f'stroke-width="1.4"{dashed}/>'
        )

    def _arrow_head(self, color: str) -> str:
        return (
            f'<marker id="{color}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0,0 L10,5 L0,10 z" fill="{self._color(color)}"/></marker>'
        )

    def _color(self, name: str) -> str:
        return str(getattr(self.theme, name))


def draw_architecture(theme: Theme) -> str:
    """Processes and what they send each other."""
    title = (
        "Architecture: clients reach routers through the HTTP gateway or by gRPC; routers exchange rows with expert "
        "actors; the controller places experts; Prometheus scrapes all processes"
    )
    out = Drawing(theme, 980, 470, title)
    out.frame(388, 14, 578, 326, "Ray cluster: starts actors, and restarts those that die")
    out.box(14, 78, 130, 62, ["HTTP client", "curl, openai"])
    out.box(14, 228, 130, 62, ["Python client", "moecluster.client"])
    out.box(214, 68, 132, 82, ["Gateway", "OpenAI API, limits,", "failover"])
    for shift in (12, 6):
        out.box(420 + shift, 68 + shift, 176, 106)
    out.box(420, 68, 176, 106, ["Router", "trunk, gate,", "generation engine,", "training loop"])
    for number, y in enumerate((52, 116, 180)):
        out.box(776, y, 170, 54, [f"Expert actor {number}", "replicas of experts"], accent="first")
    out.box(492, 262, 190, 60, ["Controller", "placement, operations"], accent="control")
    out.box(214, 386, 132, 62, ["Prometheus", "/metrics of all"])

    out.arrow((144, 109), (212, 109), color="first", both=True)
    out.text(179, 99, "HTTP", size=12, color="muted")
    out.arrow((346, 109), (418, 109), color="first", both=True)
    out.text(368, 99, "gRPC", size=12, color="muted")
    out.arrow((144, 259), (408, 259), (408, 150), (418, 150), color="first", both=True)
    out.text(250, 250, "gRPC", size=12, color="muted")
    for y in (79, 143, 207):
        out.arrow((610, 128), (774, y), color="first", both=True)
    for number, line in enumerate(("gRPC streams;", "on one host the rows", "in shared memory")):
        out.text(686, 52 + 15 * number, line, size=12, color="muted")
    out.text(700, 226, "rows, partial sums", size=12, color="muted")
    out.arrow((540, 260), (540, 188), color="control", both=True)
    out.text(532, 216, "placement,", size=12, color="muted", anchor="end")
    out.text(532, 231, "load", size=12, color="muted", anchor="end")
    out.arrow((684, 292), (861, 292), (861, 236), color="control")
    out.text(776, 311, "load, unload, copy experts", size=12, color="muted")
    out.arrow((450, 340), (450, 402), (348, 402), dashed=True)
    out.text(442, 394, "metrics", size=12, color="muted", anchor="end")
    out.arrow((346, 434), (587, 434), (587, 324), color="control", dashed=True)
    out.text(598, 400, "loads, with controller.load_source = prometheus", size=12, color="muted", anchor="start")
    out.arrow((280, 150), (280, 384), dashed=True)
    return out.svg()


def draw_layer_speed(theme: Theme) -> str:
    """Speed of one layer behind expert actors as a multiple of the same layer in one process, from layer.json."""
    ratios = dict(_layer_ratios(json.loads(LAYER_RESULT.read_text(encoding="utf-8"))))
    out = Drawing(theme, 820, 330, "Speed of one MoE layer behind two expert actors, relative to one process")
    left, scale, top, step = 240, 350, 78, 44
    out.text(20, 26, "One MoE layer behind two expert actors", size=16, bold=True, anchor="start")
    out.text(20, 46, "Speed relative to transformers in one process; right of the dashed line is faster", size=13,
             color="muted", anchor="start")  # fmt: skip
    for number, (case, values) in enumerate(ratios.items()):
        y = top + step * number
        out.text(left - 12, y + 21, case, anchor="end")
        for offset, (transport, color) in enumerate((("shm", "first"), ("inline", "second"))):
            width = scale * values[transport]
            out.bar(left, y + 16 * offset, width, 14, color)
            out.text(left + 1.5 * scale, y + 11.5 + 16 * offset, f"{values[transport]:.2f}", size=12, anchor="end")
    bottom = top + step * len(ratios) - 8
    out.rule(left + scale, top - 8, bottom)
    out.text(left + scale, bottom + 16, "1.0", size=12, color="muted")
    for y, color, label in ((15, "first", "shared memory"), (35, "second", "inline messages")):
        out.bar(650, y, 14, 12, color)
        out.text(670, y + 11, label, size=12, anchor="start")
    return out.svg()


def _layer_ratios(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """Case -> transport -> ratio, in the order of the file."""
    prefix = "speed of ours / in process: "
    cases: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        if row["name"].startswith(prefix):
            phase, _, tokens, transport = row["name"].removeprefix(prefix).split(", ")
            cases.setdefault(f"{phase}, {tokens}", {})[transport] = row["value"]
    yield from ((case.replace(", 1 tokens", ", 1 token"), ratios) for case, ratios in cases.items())


def images() -> Iterator[tuple[Path, str]]:
    """Path and content of every image."""
    for name, draw in (("architecture", draw_architecture), ("layer-speed", draw_layer_speed)):
        for theme in THEMES:
            yield IMAGES / f"{name}-{theme.name}.svg", draw(theme)


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    IMAGES.mkdir(exist_ok=True)
    for path, content in images():
        part = path.with_suffix(".part")
        part.write_text(content, encoding="utf-8")
        os.replace(part, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
