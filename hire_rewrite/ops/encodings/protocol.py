"""What an encoding of weights has to offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jax import Array

from hire_rewrite.ops.named_types import register_type
from hire_rewrite.ops.predictors.protocol import Read, State

__all__ = [
    "BoundedEncoding",
    "CoarseEncoding",
    "Encoding",
    "JointEncoding",
    "PickedEncoding",
    "Stored",
    "encoding_types",
    "register_encoding",
]

Stored = dict[str, Any]
"""The arrays of one matrix; in use each has a leading axis of layers. They are NumPy arrays where
the host made them, otherwise JAX arrays."""


@runtime_checkable
class Encoding(Protocol):
    """How a matrix of weight rows [n, d] is stored, for products y = x @ rows.T.

    Implementations are frozen dataclasses: they are compared, hashed and printed as the user wrote
    them.
    """

    def check(self, n: int, d: int, *, site: str = "") -> None:
        """Check the settings against the size of the rows.

        Args:
          site: named in the message.

        Raises:
          HireRewriteError: rows of this size cannot be stored so.
        """
        ...

    def store(self, rows: Array) -> Stored:
        """The arrays of one layer that come nearest to rows: [n, d].

        Traceable. Their shapes and dtypes depend on nothing but the shape of `rows`. NaN or
        infinity among the rows makes the decoded numbers around it NaN or infinite.
        """
        ...

    def store_exactly(self, rows: np.ndarray) -> Stored | None:
        """NumPy arrays whose decoded numbers equal all of rows: [L, n, d], or None.

        The numbers are compared as float32, with ==: −0.0 may become 0.0. Rows that hold NaN or
        infinity are never stored exactly.

        Returns:
          The arrays of all layers, stacked on a leading axis.
        """
        ...

    def decode(self, stored: Stored, layer: Array | int) -> Array:
        """f32[n, d], the numbers of a layer.

        Args:
          stored: arrays with a leading axis of layers, as for all methods below.
          layer: i32[].
        """
        ...

    def decode_rows(self, stored: Stored, layer: Array | int, rows: Array) -> Array:
        """f32[*rows.shape, d], the rows with these numbers; the others are not read."""
        ...

    def product(
        self, x: Array, stored: Stored, layer: Array | int, *, round_inputs: bool = False
    ) -> Array:
        """x @ decode(stored, layer).T.

        Args:
          x: [tokens, d].
          round_inputs: whether x may be rounded first, where products are faster so. Otherwise the
            results are those of the decoded rows, up to the rounding of sums.

        Returns:
          f32[tokens, n].
        """
        ...

    def bytes(self, n: int, d: int) -> int:
        """Bytes of the arrays of one layer."""
        ...

    def reads(self, n: int, d: int, tokens: int = 1) -> tuple[Read, ...]:
        """What one product of so many tokens reads: `bytes`, by the kind of read."""
        ...


@runtime_checkable
class JointEncoding(Encoding, Protocol):
    """An encoding of which several matrices are read in one call, where that is faster."""

    def products(
        self, x: Array, several: Sequence[Stored], layer: Array | int, *, round_inputs: bool = False
    ) -> Sequence[Array]:
        """`product` with each of several matrices, whose rows are equally long."""
        ...


@runtime_checkable
class PickedEncoding(Encoding, Protocol):
    """An encoding of which some rows are multiplied as they are stored (see
    `ops.encodings.picked`), where that is faster than with decoded ones."""

    def picked_products(self, x: Array, stored: Stored, layer: Array | int, picked: Array) -> Array:
        """f32[tokens, k], the products of x: [tokens, d] with rows i32[tokens, k] of each token."""
        ...

    def picked_sums(
        self,
        ontos: Sequence[Array],
        h: Array,
        several: Sequence[Stored],
        layer: Array | int,
        picked: Array,
    ) -> Sequence[Array]:
        """Of several matrices f32[tokens, d], its onto: f32[tokens, d] and rows i32[tokens, k],
        times h: [tokens, k]."""
        ...


@runtime_checkable
class CoarseEncoding(Encoding, Protocol):
    """An encoding of which a part, read alone, tells about what its rows are.

    A head whose rows are stored so guesses its logits with that part, and needs no predictor.
    """

    def coarse(
        self, x: Array, stored: Stored, layer: Array | int, *, round_inputs: bool = False
    ) -> Array:
        """f32[tokens, n], about `product`, for a part of what that reads."""
        ...

    def coarse_reads(self, n: int, d: int, tokens: int = 1) -> tuple[Read, ...]:
        """What `coarse` reads, as `reads` says it of `product`."""
        ...


@runtime_checkable
class BoundedEncoding(CoarseEncoding, Protocol):
    """A `CoarseEncoding` that knows how far off its guesses can be (see `docs/certify.md`)."""

    def fit_coarse_bound(self, rows: Array, stored: Stored) -> State:
        """The arrays that `coarse_bound` reads, for the rows [n, d] of one layer and what was
        stored of them. Among them `norm`: f32[n], no less than the rows' Euclidean norms."""
        ...

    def coarse_bound(self, stored: Stored, extra: State, x: Array, layer: Array | int) -> Array:
        """f32[tokens, n], no less than |x · row − coarse(x, ..., round_inputs=True)|.

        Args:
          extra: what `fit_coarse_bound` returned for each layer, stacked.
        """
        ...


_TYPES: dict[str, type] = {}

EncodingType = TypeVar("EncodingType", bound=type)


def register_encoding(cls: EncodingType) -> EncodingType:
    """Let rules that hold such an encoding be saved and loaded: a decorator of a dataclass.

    Examples:
      ```python
      @register_encoding
      @dataclasses.dataclass(frozen=True)
      class Ternary:
          block: int = 32
          ...
      ```

    Raises:
      HireRewriteError: another class of this name is registered.
    """
    return register_type(_TYPES, cls, "register_encoding")


def encoding_types() -> Mapping[str, type]:
    """The registered encodings by the names of their classes."""
    return dict(_TYPES)
