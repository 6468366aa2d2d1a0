"""What several encodings ask of their settings and of the size of rows."""

from __future__ import annotations

from hire_rewrite.errors import HireRewriteError

__all__ = ["OR_NONE", "check_block", "check_columns", "check_pairs", "check_scale"]

OR_NONE = "a positive int, or None for the whole row"
"""What a number of columns is expected to be where there need be none."""

_SCALES = ("float16", "bfloat16", "float32")


def check_block(encoding: str, block: object, expected: str = "a positive int") -> None:
    """Raise HireRewriteError if a number of columns is not a positive int."""
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise HireRewriteError(f"{encoding}: block={block!r} must be {expected}")


def check_scale(encoding: str, scale: object) -> None:
    """Raise HireRewriteError if scales cannot be of a dtype."""
    if scale not in _SCALES:
        raise HireRewriteError(
            f"{encoding}: scale={scale!r} is not supported: give one of {', '.join(_SCALES)}"
        )


def check_columns(encoding: str, d: int, block: int, site: str) -> None:
    """Raise HireRewriteError if blocks do not divide rows of length d."""
    if d % block:
        fitting = max(b for b in range(1, min(block, d) + 1) if d % b == 0)
        raise HireRewriteError(
            f"{site + ': ' if site else ''}{encoding}: block={block} does not divide the rows' "
            f"length {d}: give a divisor of it, such as block={fitting}"
        )


def check_pairs(encoding: str, d: int, site: str, remedy: str) -> None:
    """Raise HireRewriteError if rows of length d do not fill bytes with two numbers each."""
    if d % 2:
        raise HireRewriteError(
            f"{site + ': ' if site else ''}{encoding}: two numbers share a byte, and the rows' "
            f"length {d} is odd: {remedy}"
        )
