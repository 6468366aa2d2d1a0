"""Which positions of an array are meant: some of one axis, one of a few others, all of the rest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """The positions `start, start + stride, ...` of `axis`, `size` of them.

    `picks` are pairs (axis, position) of axes of which one position alone is meant. `axis` is None
    for an array that is the same for all positions. An array *in* a window has `n` positions on
    `axis` (some or all of the window's) and one on each picked axis.
    """

    axis: int | None
    size: int = 1
    start: int = 0
    stride: int = 1
    picks: tuple[tuple[int, int], ...] = ()

    def with_axis(self, axis: int | None) -> Window:
        return dataclasses.replace(self, axis=axis)

    def with_picks(self, picks: Sequence[tuple[int, int]]) -> Window:
        return dataclasses.replace(self, picks=tuple(sorted(picks)))

    @property
    def picked(self) -> dict[int, int]:
        return dict(self.picks)

    def shape(self, full: Sequence[int], n: int) -> tuple[int, ...]:
        """The shape of an array in the window that is `full` outside it."""
        picked = self.picked
        return tuple(
            n if i == self.axis else 1 if i in picked else size for i, size in enumerate(full)
        )

    def others(self, full: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the axes that are neither `axis` nor picked."""
        picked = self.picked
        return tuple(s for i, s in enumerate(full) if i != self.axis and i not in picked)

    def tokens(self, full: Sequence[int]) -> int:
        return math.prod(self.others(full))

    def cut(self, axis: int) -> tuple[int, int, int]:
        """(start, stop, stride) of a slice of one of its axes."""
        if axis == self.axis:
            return self.start, self.start + (self.size - 1) * self.stride + 1, self.stride
        position = self.picked[axis]
        return position, position + 1, 1
