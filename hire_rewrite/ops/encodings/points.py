"""The points of a grid that equal given numbers, found from the numbers alone.

Weights that were quantized and widened again lie on a grid. What made them is not asked. Most grids
are used from end to end, so that the greatest and the least number of a block say all. For other
blocks the step is looked for (`ops.encodings.steps`). Whatever is found is decoded and compared.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hire_rewrite.ops.encodings.grids import Grid, Points
from hire_rewrite.ops.encodings.steps import from_steps

__all__ = ["points"]


def points(blocks: np.ndarray, grid: Grid) -> Points | None:
    """The points of a grid that equal all numbers of blocks: f32[m, B], which are finite, or None.

    Examples:
      >>> blocks = np.float32([[0.5, -1.5, 3.5, 0.0], [7.0, -1.0, 2.0, 2.0]])
      >>> found = points(blocks, Grid(4, False, "float16"))
      >>> found.scale.tolist(), found.integers[0].tolist()
      ([0.5, 1.0], [1.0, -3.0, 7.0, 0.0])
      >>> points(np.float32([[0.1, 1.0, 1.2345]]), Grid(4, False, "float16")) is None
      True
    """
    with np.errstate(all="ignore"):
        guesses = _from_ends(blocks.min(1), blocks.max(1), grid)
        found = Points.nearest(blocks, *next(guesses), grid)
        for scale, minimum in guesses:
            if found.exact.all():
                return found
            missed = ~found.exact
            some = Points.nearest(blocks[missed], scale[missed], minimum[missed], grid)
            found.overwrite(missed, some)
        missed = ~found.exact
        rest = from_steps(blocks[missed], grid)
        if rest is None:
            return None
        found.overwrite(missed, rest)
        return found


def _from_ends(
    low: np.ndarray, high: np.ndarray, grid: Grid
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scale and minimum f32[m] if the ends of a grid are in use: those that formats have."""
    if grid.minimum:
        lowest, steps = np.float32(grid.lowest), np.float32(grid.highest - grid.lowest)
        scale = grid.rounded_scale((high - low) / steps)
        yield scale, grid.rounded(low - lowest * scale)
        yield -scale, grid.rounded(high + lowest * scale)
        # Blocks of one number; the scale takes what the minimum cannot hold of it.
        minimum = grid.rounded(low)
        yield grid.rounded(low - minimum), minimum
        return
    none = np.zeros_like(low)
    extreme = np.where(high > -low, high, low)
    yield grid.rounded_scale(np.abs(extreme) / np.float32(grid.highest)), none
    yield grid.rounded_scale(extreme / np.float32(grid.lowest)), none
