"""Rows as floating-point numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.encodings.host import float32_of, pieces, sample
from hire_rewrite.ops.encodings.picked import picked_float_products, picked_float_sum
from hire_rewrite.ops.encodings.protocol import Encoding, Stored, register_encoding
from hire_rewrite.ops.gather import gather_rows
from hire_rewrite.ops.narrow import matmul, times
from hire_rewrite.ops.predictors.protocol import Read
from hire_rewrite.settings import check_settings

__all__ = ["Float", "fetched_kind"]

_DTYPES = ("float32", "bfloat16")


@register_encoding
@dataclasses.dataclass(frozen=True)
class Float:
    """Floating-point rows.

    Args:
      dtype: "float32" or "bfloat16".

    Raises:
      HireRewriteError: another dtype.

    Examples:
      >>> stored = Float("bfloat16").store_exactly(np.ones((2, 5, 3), np.float32))  # two layers
      >>> stored["rows"].dtype
      dtype(bfloat16)
      >>> Float("bfloat16").product(jnp.ones((1, 3)), stored, 1).tolist()
      [[3.0, 3.0, 3.0, 3.0, 3.0]]
      >>> Float("bfloat16").store_exactly(np.full((2, 5, 3), 1 / 3, np.float32)) is None
      True
    """

    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_settings(self)
        if self.dtype not in _DTYPES:
            raise HireRewriteError(
                f"Float: dtype={self.dtype!r} is not supported: give one of {', '.join(_DTYPES)}"
            )

    def check(self, n: int, d: int, *, site: str = "") -> None:
        """Rows of all sizes can be stored."""

    def store(self, rows: Array) -> Stored:
        """`rows`: [n, d]."""
        return {"rows": rows.astype(self.dtype)}

    def store_exactly(self, rows: np.ndarray) -> Stored | None:
        """`rows`: [L, n, d] (see `Encoding.store_exactly`)."""
        if self._exactly(sample(rows)) is None:
            return None
        stored = np.empty(rows.shape, jnp.dtype(self.dtype))
        for some, place in zip(pieces(rows), pieces(stored), strict=True):
            exact = self._exactly(some)
            if exact is None:
                return None
            place[...] = exact
        return {"rows": stored}

    def _exactly(self, rows: np.ndarray) -> np.ndarray | None:
        wide = float32_of(rows)
        if wide is None:
            return None
        with np.errstate(over="ignore"):  # to infinity, which is not equal
            stored = wide.astype(jnp.dtype(self.dtype))
        return stored if (stored.astype(np.float32) == wide).all() else None

    def decode(self, stored: Stored, layer: Array | int) -> Array:
        """f32[n, d] (see `Encoding.decode`)."""
        here = lax.dynamic_index_in_dim(stored["rows"], layer, keepdims=False)
        return here.astype(jnp.float32)

    def decode_rows(self, stored: Stored, layer: Array | int, rows: Array) -> Array:
        """f32[*rows.shape, d] (see `Encoding.decode_rows`)."""
        return gather_rows(stored["rows"], layer, rows).astype(jnp.float32)

    def product(
        self, x: Array, stored: Stored, layer: Array | int, *, round_inputs: bool = False
    ) -> Array:
        """f32[tokens, n] for x: [tokens, d] (see `Encoding.product`).

        Inputs that may be rounded become bfloat16 where rows are, and processors multiply that
        faster.
        """
        if round_inputs:
            return matmul(x, stored["rows"], layer)

        def widened(x: Array, rows: Array, layer: Array) -> Array:
            here = lax.dynamic_index_in_dim(rows, layer, keepdims=False)
            return times(x, here.astype(jnp.float32), None)

        # On CPU `matmul` rounds nothing, and widens no copy of the rows.
        operands: tuple[Any, ...] = (x.astype(jnp.float32), stored["rows"])
        return lax.platform_dependent(
            *operands, jnp.asarray(layer, jnp.int32), cpu=matmul, default=widened
        )

    def picked_products(self, x: Array, stored: Stored, layer: Array | int, picked: Array) -> Array:
        """See `PickedEncoding`."""
        return picked_float_products(x, stored["rows"], layer, picked)

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
            picked_float_sum(onto, h, stored["rows"], layer, picked)
            for onto, stored in zip(ontos, several, strict=True)
        ]

    def bytes(self, n: int, d: int) -> int:
        """Those of the rows."""
        return n * d * jnp.dtype(self.dtype).itemsize

    def reads(self, n: int, d: int, tokens: int = 1) -> tuple[Read, ...]:
        """See `Encoding.reads`."""
        return (Read(f"scored_{self.dtype}", self.bytes(n, d), tokens),)


def fetched_kind(encoding: Encoding) -> str:
    """The kind of a `Read` of rows in an encoding that are fetched by number: encodings of
    floating-point numbers have a `dtype`."""
    return f"fetched_{getattr(encoding, 'dtype', 'int8')}"
