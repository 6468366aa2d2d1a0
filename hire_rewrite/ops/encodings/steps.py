"""Points of a grid by its step, for blocks of numbers that do not use the grid from end to end.

The step divides the smallest difference of two numbers, and the integers are few, so there are few
divisors to try. Numbers were rounded to float32, and so say between which two the step or the
minimum is; it is the only number of its dtype there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hire_rewrite.ops.encodings.grids import Grid, Points

__all__ = ["from_steps", "may_be_on_a_grid"]

_DIGITS = 11
"""As many as float16 has, and more than bfloat16: float32 scales are widened ones most often."""

_TRIALS = 16
"""How many minimums that seem to fit a block are tried."""


def from_steps(blocks: np.ndarray, grid: Grid) -> Points | None:
    """The points of a grid that equal all of blocks: f32[m, B], which are finite and have no block
    of zeros, or None.

    Examples:
      >>> found = from_steps(np.float32([[0.5, 1.5, -2.0]]), Grid(8, False, "float16"))
      >>> found.scale.tolist(), found.integers.tolist()
      ([0.5], [[1.0, 3.0, -4.0]])
    """
    return (_with_minimum if grid.minimum else _symmetric)(blocks, grid)


def may_be_on_a_grid(blocks: np.ndarray) -> bool:
    """Whether blocks f32[m, B] may have so few different distances as grids of 8 bits have.

    Of other numbers two in a block are soon closer to each other than a step.
    """
    with np.errstate(all="ignore"):
        least, span = _least_difference(np.sort(blocks, axis=1))
        return bool((span <= 256 * least).all())


def _least_difference(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f64[m] of f32[m, B] in order: the least difference that is not 0, and the greatest."""
    wide = ordered.astype(np.float64)
    gaps = np.diff(wide, axis=1)
    return np.where(gaps > 0, gaps, np.inf).min(1, initial=np.inf), wide[:, -1] - wide[:, 0]


def _symmetric(blocks: np.ndarray, grid: Grid) -> Points | None:
    """See `from_steps`, for a grid without minimum."""
    size = np.abs(blocks)
    least, greatest = _least_difference(np.sort(np.pad(size, ((0, 0), (1, 0))), axis=1))
    none, high = np.zeros(len(blocks), np.float32), blocks.max(1)

    def nearest(left: np.ndarray, steps: np.ndarray) -> Points:
        scale = greatest[left] / steps
        if grid.scale == "float32":
            scale = _refined(size[left], scale)
        scale = grid.rounded(scale)
        # There is one integer more on the negative side, and scales have a sign.
        scale = np.where(np.rint(high[left] / scale) > grid.highest, -scale, scale)
        return Points.nearest(blocks[left], scale, none[left], grid)

    return _search(blocks, least, greatest, -grid.lowest, nearest)


def _refined(size: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """f64[m], scales for which scale · integer rounds to size: f32[m, B], if there are any."""
    integers = np.rint(size / scale[:, None])
    below, above = _bounds(size)
    below, above = below / integers, above / integers
    counts = integers > 0
    return (np.where(counts, below, 0).max(1) + np.where(counts, above, np.inf).min(1)) / 2


def _bounds(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f64, between which numbers are rounded to these, f32."""
    wide = numbers.astype(np.float64)
    below, above = (np.nextafter(numbers, np.float32(end)) for end in (-np.inf, np.inf))
    return (wide + below) / 2, (wide + above) / 2


def _with_minimum(blocks: np.ndarray, grid: Grid) -> Points | None:
    """See `from_steps`, for a grid with a minimum."""
    least, span = _least_difference(np.sort(blocks, axis=1))

    def nearest(left: np.ndarray, steps: np.ndarray) -> Points:
        some = blocks[left]
        scale = grid.rounded_scale(span[left] / steps, _DIGITS)
        found = _with_scale(some, scale, grid)
        if grid.scale == "float32":
            missed = ~found.exact
            scale = grid.rounded_scale(span[left[missed]] / steps[missed])
            found.overwrite(missed, _with_scale(some[missed], scale, grid))
        return found

    return _search(blocks, least, span, grid.highest - grid.lowest, nearest)


def _with_scale(blocks: np.ndarray, scale: np.ndarray, grid: Grid) -> Points:
    """The points with a scale f32[m] or its opposite that equal blocks, where there are some.

    The numbers of a block less scale · integer say between which two the minimum is. They do not
    say which integer the least number has: those are tried for which a minimum of the right dtype
    is in between.
    """
    step, low = scale.astype(np.float64), blocks.min(1)[:, None]
    integers = np.rint((blocks - low) / scale[:, None])
    below, above = _bounds(blocks)
    lower = (below - step[:, None] * integers).max(1)
    upper = (above - step[:, None] * integers).min(1)
    steps = integers.max(1)

    first = np.arange(grid.lowest, grid.highest + 1)
    # Of the least number with this scale, of the greatest with the opposite.
    shift = np.stack([-step[:, None] * first, step[:, None] * (first + steps[:, None])], 1)
    lower, upper = lower[:, None, None] + shift, upper[:, None, None] + shift
    minimum = grid.rounded((lower + upper) / 2)
    within = first + steps[:, None] <= grid.highest
    fits = (lower <= minimum) & (minimum <= upper) & within[:, None]
    return _first_exact(blocks, np.stack([scale, -scale], 1), minimum, fits, grid)


def _first_exact(
    blocks: np.ndarray, scale: np.ndarray, minimum: np.ndarray, fits: np.ndarray, grid: Grid
) -> Points:
    """The points that equal blocks: f32[m, B], if a scale and minimum that fit have such.

    Args:
      scale: f32[m, 2].
      minimum, fits: f32[m, 2, S] and bool[m, 2, S].
    """
    count = minimum.shape[2]
    left, fits = np.arange(len(blocks)), fits.reshape(len(blocks), 2 * count)
    found = Points.none(blocks)
    for _ in range(_TRIALS):
        place = fits[left].argmax(1)
        sign, start = np.divmod(place, count)
        some = Points.nearest(blocks[left], scale[left, sign], minimum[left, sign, start], grid)
        found.overwrite(left, some)
        fits[left, place] = False
        left = left[~some.exact & fits[left].any(1)]
        if not left.size:
            break
    return found


def _search(
    blocks: np.ndarray,
    least: np.ndarray,
    span: np.ndarray,
    limit: int,
    nearest: Callable[[np.ndarray, np.ndarray], Points],
) -> Points | None:
    """The points that equal blocks: f32[m, B], or None if one block has none.

    Args:
      least, span: f64[m], the least difference of two numbers, and the difference that has most
        steps.
      limit: how many steps that may be.
      nearest: gives points for some of the blocks, i64[l], and numbers of steps, f64[l].
    """
    found = Points.none(blocks)
    left = np.arange(len(blocks))
    for divisor in range(1, limit + 1):
        steps = span[left] / least[left] * divisor
        if not (steps < limit + 0.5).all():
            return None
        some = nearest(left, np.maximum(np.rint(steps), 1))
        found.overwrite(left, some)
        left = left[~some.exact]
        if not left.size:
            return found
    return None
