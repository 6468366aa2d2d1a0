"""The narrowest encoding that holds given numbers exactly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from hire_rewrite.ops.encodings.blocks import Blocks
from hire_rewrite.ops.encodings.floats import Float
from hire_rewrite.ops.encodings.host import float32_of, sample
from hire_rewrite.ops.encodings.protocol import Encoding, Stored
from hire_rewrite.ops.encodings.steps import may_be_on_a_grid

__all__ = ["narrowest"]

_BLOCKS = (None, 128, 64, 32)
"""Columns that formats give a scale: all of a row, or so many."""


def narrowest(rows: np.ndarray) -> tuple[Encoding, Stored] | None:
    """The encoding of fewest bytes whose numbers equal all of rows: [L, n, d], and its arrays.

    Nothing is lost where weights are stored so, and products read less. Weights are not changed to
    fit: what is found are the grids that earlier quantization left in them, whatever the format
    (GGUF's Q4_0, Q4_1 and Q8_0, GPTQ's, qwix's), and bfloat16 numbers in float32.

    Not found are scales for rows of the other axis or for blocks of other sizes than 32, 64, 128
    and d; numbers that were rounded once more after scale · (integer − zero point), as formats in
    float16 do; and a minimum or zero point beside a scale that needs all digits of float32, unless
    the integers less the zero point fit 8 bits. `ops.encodings.grids` names two more, and a minimum
    that needs all digits of float32 may be missed.

    Args:
      rows: of a floating-point dtype; integers give None.

    Returns:
      The encoding and the arrays of all layers (`Encoding.store_exactly`), or None where none that
      is narrower than the dtype of `rows` holds the numbers. Equal is ==: −0.0 may become 0.0. Rows
      that hold NaN or infinity equal nothing.

    Examples:
      >>> rng = np.random.default_rng(0)
      >>> integers, scale = rng.integers(-8, 8, (2, 16, 3, 32)), np.float16(rng.random((2, 16, 3)))
      >>> rows = (integers * scale[..., None].astype(np.float32)).reshape(2, 16, 96)
      >>> encoding, stored = narrowest(rows.astype(np.float32))
      >>> encoding, stored["integers"].shape
      (Blocks(bits=4), (2, 16, 48))
      >>> narrowest(rng.standard_normal((2, 16, 96), np.float32)) is None
      True
    """
    _, n, d = rows.shape
    if rows.size == 0 or not jnp.issubdtype(rows.dtype, jnp.floating):
        return None
    bits = n * d * jnp.finfo(rows.dtype).bits  # of which NumPy may take more in memory
    candidates = [c for c in _candidates(d) if 8 * c.bytes(n, d) < bits]
    if not _may_be_blocks(rows):
        candidates = [c for c in candidates if not isinstance(c, Blocks)]
    for encoding in sorted(candidates, key=lambda encoding: encoding.bytes(n, d)):
        stored = encoding.store_exactly(rows)
        if stored is not None:
            return encoding, stored
    return None


def _candidates(d: int) -> Iterator[Encoding]:
    """Encodings for rows of length d. Of those of one size the earlier is preferred."""
    blocks = [block for block in _BLOCKS if block is None or (block < d and d % block == 0)]
    bits = (4, 8) if d % 2 == 0 else (8,)
    scales = ("float16", "bfloat16", "float32")
    for settings in itertools.product(bits, blocks, (False, True), scales):
        yield Blocks(*settings)
    yield Float("bfloat16")


def _may_be_blocks(rows: np.ndarray) -> bool:
    """Whether rows: [L, n, d] may be on any grid: then their least blocks are, alone."""
    some, least = float32_of(sample(rows)), _BLOCKS[-1]
    if some is None:
        return False
    return may_be_on_a_grid(some.reshape(-1, least) if rows.shape[2] % least == 0 else some)
