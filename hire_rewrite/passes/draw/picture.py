"""Boxes drawn with matplotlib. Lengths are points; y grows downward."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path as MatplotlibPath

from hire_rewrite.passes.diff.value import megabytes
from hire_rewrite.passes.draw.boxes import Box, frames_of, rows_of, shorter
from hire_rewrite.passes.draw.theme import LIGHT, for_both

_COLUMNS = 5
_WIDTH, _HEIGHT = 196.0, 66.0
_GAP, _DROP = 22.0, 34.0
_EDGE = 30.0
"""Between the sides of the page and the boxes."""
_TOP = 104.0
_BAR = 9.0
_PAD = 10.0
_PIXELS = 160
"""Of a PNG, an inch."""


def picture(boxes: Sequence[Box], form: str) -> bytes:
    """A drawing as `"svg"` or `"png"`."""
    settings: Any = {"svg.hashsalt": "hire_rewrite", "font.family": "DejaVu Sans"}
    written = io.BytesIO()
    with mpl.rc_context(settings):
        figure = _Drawing(boxes).drawn()
        metadata = {"Date": None} if form == "svg" else {}
        figure.savefig(written, format=form, dpi=_PIXELS, metadata=metadata)
    if form == "png":
        return written.getvalue()
    return for_both(written.getvalue().decode()).encode()


@dataclasses.dataclass
class _Drawing:
    boxes: Sequence[Box]

    def __post_init__(self) -> None:
        self.rows = rows_of(self.boxes, _COLUMNS)
        self.frames = frames_of(self.boxes, self.rows)
        self.columns = max([2, *map(len, self.rows)])
        self.width = 2 * _EDGE + self.columns * (_WIDTH + _GAP) - _GAP
        self.height = _TOP + len(self.rows) * (_HEIGHT + _DROP) + 4
        self.corners: dict[int, tuple[float, float]] = {}
        for number, row in enumerate(self.rows):
            left = (self.width - len(row) * (_WIDTH + _GAP) + _GAP) / 2
            for column, place in enumerate(row):
                y = _TOP + number * (_HEIGHT + _DROP)
                self.corners[place] = left + column * (_WIDTH + _GAP), y

    def drawn(self) -> Any:
        figure = Figure(figsize=(self.width / 72, self.height / 72), facecolor=LIGHT.page)
        self.axes = figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.axes.set_xlim(0, self.width)
        self.axes.set_ylim(self.height, 0)
        self.renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
        self._head()
        for first, last, times in self.frames:
            self._frame(first, last, times)
        for place, box in enumerate(self.boxes):
            for before in box.reads:
                self._arrow(before, place)
        framed = {
            place
            for first, last, _ in self.frames
            for row in self.rows[first : last + 1]
            for place in row
        }
        greatest = max((max(b.bytes_before, b.bytes_after) for b in self.boxes), default=0)
        for place, box in enumerate(self.boxes):
            self._box(box, *self.corners[place], greatest, numbered=place not in framed)
        return figure

    def _head(self) -> None:
        """What is read altogether, as one bar, and what its colors mean."""
        before = sum(box.bytes_before for box in self.boxes)
        after = sum(box.bytes_after for box in self.boxes)
        said = megabytes(before)
        if after != before:
            said += f" → {megabytes(after)}  ({after / before:.0%})"
        self._text(_EDGE, 27, f"weights read in one call:  {said}", 11.5, bold=True)
        kinds = {"rewritten": 0, "dense": 0, "in no site": 0}
        for box in self.boxes:
            kinds[box.layer.status] += box.bytes_after
        parts = [
            ("read now", LIGHT.after, kinds["rewritten"]),
            ("no longer", LIGHT.saved, max(before - after, 0)),
            ("dense", LIGHT.dense, kinds["dense"]),
            ("in no site", LIGHT.other, kinds["in no site"]),
        ]
        x, whole, left = _EDGE, self.width - 2 * _EDGE, _EDGE
        for name, color, size in parts:
            if not size:
                continue
            width = whole * size / max(before, after)
            self._bar(x, 40, width, 12, color)
            x += width
            self._bar(left, 63, 8, 8, color)
            left = 18 + self._text(left + 13, 70.5, f"{name} {megabytes(size)}", 8, LIGHT.faint)

    def _frame(self, first: int, last: int, times: int) -> None:
        widest = max(len(row) for row in self.rows[first : last + 1])
        width = widest * (_WIDTH + _GAP) - _GAP + 28
        x, top = (self.width - width) / 2, _TOP + first * (_HEIGHT + _DROP) - 13
        height = (last - first) * (_HEIGHT + _DROP) + _HEIGHT + 26
        self._rounded(x, top, width, height, LIGHT.frame, LIGHT.pale_line, 0.8, 8)
        corner = x + width - 9, top + height - 3.5
        self._text(*corner, f"× {times}", 9, LIGHT.faint, right=True, bold=True)

    def _arrow(self, before: int, place: int) -> None:
        (x0, y0), (x1, y1) = self.corners[before], self.corners[place]
        start, end = (x0 + _WIDTH / 2, y0 + _HEIGHT), (x1 + _WIDTH / 2, y1 - 1)
        bend = 0.7 * _DROP  # leaves downward, and arrives so
        points = [start, (start[0], start[1] + bend), (end[0], end[1] - bend), end]
        arrow = FancyArrowPatch(
            path=MatplotlibPath(points, [1, 4, 4, 4]), arrowstyle="-|>", mutation_scale=7,
            linewidth=0.9, edgecolor=LIGHT.edge, facecolor=LIGHT.edge, zorder=2,
        )  # fmt: skip
        self.axes.add_patch(arrow)

    def _box(self, box: Box, x: float, y: float, greatest: int, *, numbered: bool) -> None:
        rewritten = box.layer.status == "rewritten"
        colors = (LIGHT.box, LIGHT.line) if rewritten else (LIGHT.pale, LIGHT.pale_line)
        dashed = "--" if box.layer.status == "in no site" else "-"
        self._rounded(x, y, _WIDTH, _HEIGHT, *colors, 1.1 if rewritten else 0.8, 5, dashed)
        ink = LIGHT.ink if rewritten else LIGHT.faint
        right, room = x + _WIDTH - _PAD, _WIDTH - 2 * _PAD
        if numbered and box.count > 1:
            room -= 6 + right - self._text(right, y + 17, f"× {box.count}", 8, ink, right=True)
        short = box.short
        self._text(x + _PAD, y + 17, box.name, 8.5, ink, bold=rewritten, room=room, short=short)
        what = box.layer.kind or box.layer.status
        said = what if rewritten or not box.layer.kind else f"{what}, dense"
        end = self._text(right, y + 31, said, 7.5, LIGHT.faint, right=True)
        self._text(x + _PAD, y + 31, box.layer.about, 7.5, LIGHT.faint, room=end - x - _PAD - 6)
        full = (_WIDTH - 2 * _PAD) / max(greatest, 1)
        plain = LIGHT.dense if box.layer.kind else LIGHT.other
        before = LIGHT.saved if rewritten else plain
        self._bar(x + _PAD, y + 38, full * box.bytes_before, _BAR, before)
        size = megabytes(box.bytes_before)
        if rewritten:
            self._bar(x + _PAD, y + 38, full * box.bytes_after, _BAR, LIGHT.after)
            size += f" → {megabytes(box.bytes_after)}"
        self._text(x + _PAD, y + 59, size, 8, ink)
        if rewritten and box.layer.expected is not None:
            fast = f"expected {box.layer.expected:.2f} ×"
            self._text(right, y + 59, fast, 7.5, LIGHT.faint, right=True)

    def _bar(self, x: float, y: float, width: float, height: float, color: str) -> None:
        self.axes.add_patch(Rectangle((x, y), width, height, color=color, linewidth=0, zorder=4))

    def _rounded(
        self, x: float, y: float, width: float, height: float, fill: str, line: str,
        thick: float, radius: float, style: str = "-",
    ) -> None:  # fmt: skip
        patch = FancyBboxPatch(
            (x, y), width, height, boxstyle=f"round,pad=0,rounding_size={radius}",
            facecolor=fill, edgecolor=line, linewidth=thick, linestyle=style,
            zorder=1 if fill == LIGHT.frame else 3,
        )  # fmt: skip
        self.axes.add_patch(patch)

    def _text(
        self, x: float, y: float, text: str, size: float, color: str = LIGHT.ink, *,
        right: bool = False, bold: bool = False, room: float | None = None,
        short: str | None = None,
    ) -> float:  # fmt: skip
        """Write a line that ends or begins at x; if there is no room `short`, and if there is none
        for that either it without a part of its middle.

        Returns:
          The x of its other end.
        """
        written = self.axes.text(
            x, y, text, fontsize=size, color=color, ha="right" if right else "left", va="baseline",
            fontweight="bold" if bold else "normal", zorder=5, parse_math=False,
        )  # fmt: skip
        for part in itertools.chain([text], shorter(short or text)):
            written.set_text(part)
            # The renderer counts in pixels of the figure.
            width = written.get_window_extent(self.renderer).width * 72 / written.figure.dpi
            if room is None or width <= room:
                break
        return x - width if right else x + width
