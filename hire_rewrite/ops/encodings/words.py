"""Rows in bfloat16, two numbers to a word of 32 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hire_rewrite.ops.encodings.checks import check_pairs
from hire_rewrite.ops.encodings.floats import Float
from hire_rewrite.ops.encodings.picked import picked_float_products, picked_float_sum
from hire_rewrite.ops.encodings.protocol import Encoding, Stored, register_encoding
from hire_rewrite.ops.gather import gather_rows
from hire_rewrite.ops.narrow import times
from hire_rewrite.ops.predictors.protocol import Read
from hire_rewrite.ops.quantize import pack_words, unpack_words

__all__ = ["Words", "in_words", "out_of_words"]

_WHOLE = Float("bfloat16")


@register_encoding
@dataclasses.dataclass(frozen=True)
class Words:
    """Rows in bfloat16 of which each can be fetched alone on TPU.

    A TPU's memory holds narrow numbers of neighboring rows in one word, two of bfloat16: who copies
    a row copies both. Here the two numbers of a word are of one row, half a row apart, so that a
    row that is fetched by number costs its own bytes. For products with all rows `Float` is better.

    Examples:
      >>> stored = Words().store_exactly(np.arange(12.0, dtype=np.float32).reshape(1, 3, 4))
      >>> stored["words"].shape, stored["words"].dtype
      ((1, 3, 2), dtype('uint32'))
      >>> device = {"words": jnp.asarray(stored["words"])}
      >>> Words().decode_rows(device, 0, jnp.array([2, 0])).tolist()
      [[8.0, 9.0, 10.0, 11.0], [0.0, 1.0, 2.0, 3.0]]
    """

    dtype: ClassVar[str] = "bfloat16"

    def check(self, n: int, d: int, *, site: str = "") -> None:
        """Raise HireRewriteError if rows have an odd length."""
        check_pairs("Words", d, site, 'give Float("bfloat16")')

    def store(self, rows: Array) -> Stored:
        """`words`: u32[n, d/2] (see `ops.quantize.pack_words`)."""
        self.check(*rows.shape)
        return {"words": pack_words(_WHOLE.store(rows)["rows"])}

    def store_exactly(self, rows: np.ndarray) -> Stored | None:
        """See `Encoding.store_exactly`: where `Float("bfloat16")` does."""
        self.check(*rows.shape[1:])
        stored = _WHOLE.store_exactly(rows)
        return None if stored is None else {"words": pack_words(stored["rows"])}

    def decode(self, stored: Stored, layer: Array | int) -> Array:
        """f32[n, d] (see `Encoding.decode`)."""
        return unpack_words(lax.dynamic_index_in_dim(stored["words"], layer, keepdims=False))

    def decode_rows(self, stored: Stored, layer: Array | int, rows: Array) -> Array:
        """f32[*rows.shape, d] (see `Encoding.decode_rows`)."""
        return unpack_words(gather_rows(stored["words"], layer, rows))

    def product(
        self, x: Array, stored: Stored, layer: Array | int, *, round_inputs: bool = False
    ) -> Array:
        """f32[tokens, n] for x: [tokens, d] (see `Encoding.product`)."""
        return times(x.astype(jnp.float32), self.decode(stored, layer), None)

    def picked_products(self, x: Array, stored: Stored, layer: Array | int, picked: Array) -> Array:
        """See `PickedEncoding`."""
        return picked_float_products(x, stored["words"], layer, picked)

    def picked_sums(
        self,
        ontos: Sequence[Array],
        h: Array,
        several: Sequence[Stored],
        layer: Array | int,
        picked: Array,
    ) -> list[Array]:
        """See `PickedEncoding`."""
        return [
            picked_float_sum(onto, h, stored["words"], layer, picked)
            for onto, stored in zip(ontos, several, strict=True)
        ]

    def bytes(self, n: int, d: int) -> int:
        """Those of the rows in bfloat16."""
        return _WHOLE.bytes(n, d)

    def reads(self, n: int, d: int, tokens: int = 1) -> tuple[Read, ...]:
        """See `Encoding.reads`."""
        return _WHOLE.reads(n, d, tokens)


def in_words(encoding: Encoding, d: int) -> Encoding:
    """`Words()` for rows of length d in bfloat16, otherwise the encoding itself.

    Examples:
      >>> in_words(Float("bfloat16"), 64), in_words(Float("float32"), 64)
      (Words(), Float(dtype='float32'))
    """
    return Words() if encoding == _WHOLE and d % 2 == 0 else encoding


def out_of_words(encoding: Encoding) -> Encoding:
    """`Float("bfloat16")` for `Words()`, otherwise the encoding itself."""
    return _WHOLE if isinstance(encoding, Words) else encoding
