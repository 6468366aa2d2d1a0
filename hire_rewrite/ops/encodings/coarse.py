"""Guesses from the rows themselves, where their encoding tells about what they are."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import Array

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.encodings.protocol import BoundedEncoding, CoarseEncoding, Stored
from hire_rewrite.ops.moments import Moments
from hire_rewrite.ops.predictors.protocol import Choose, Read, State

__all__ = ["Coarse"]


@dataclasses.dataclass(frozen=True)
class Coarse:
    """A predictor that holds nothing: it reads a part of what an encoding stores of the rows.

    What is stored takes the place of a fitted predictor's arrays, in `score` and `bound` alike.

    Examples:
      >>> import jax
      >>> from hire_rewrite.ops.encodings import Nested
      >>> rows = jax.random.normal(jax.random.key(0), (64, 96))
      >>> stored = jax.tree.map(lambda array: array[None], Nested().store(rows))  # one layer
      >>> Coarse(Nested()).score(stored, rows[5:6], 0).argmax().item()
      5
    """

    encoding: CoarseEncoding

    def __str__(self) -> str:
        return f"a part of {self.encoding}"

    @property
    def wants_calibration(self) -> bool:
        """False: nothing is fitted."""
        return False

    @property
    def proportional(self) -> bool:
        """True."""
        return True

    @property
    def certifies(self) -> bool:
        """Whether the encoding has bounds of its errors."""
        return isinstance(self.encoding, BoundedEncoding)

    def check(self, n: int, d: int, *, site: str = "", tokens: int | None = None) -> None:
        """Raise HireRewriteError if rows of this size cannot be stored so."""
        self.encoding.check(n, d, site=site)

    def fit(self, rows: Array, moments: Moments | None = None, top: int | None = None) -> State:
        """Nothing."""
        return {}

    def score(
        self, state: Stored, x: Array, layer: Array | int, choose: Choose | None = None
    ) -> Array:
        """f32[tokens, n] for x: [tokens, d] (see `Predictor.score`)."""
        return self.encoding.coarse(x, state, layer, round_inputs=True)

    def bytes(self, n: int, d: int, dtype: Any, tokens: int = 1) -> int:
        """Those of the part."""
        return sum(read.bytes for read in self.reads(n, d, dtype, tokens))

    def reads(self, n: int, d: int, dtype: Any, tokens: int = 1) -> tuple[Read, ...]:
        """See `Timed`."""
        return self.encoding.coarse_reads(n, d, tokens)

    def fit_bound(self, rows: Array, state: Stored) -> State:
        """See `Certifying.fit_bound`."""
        return self._bounded.fit_coarse_bound(rows, state)

    def bound(self, state: Stored, extra: State, x: Array, layer: Array | int) -> Array:
        """f32[tokens, n] (see `Certifying.bound`)."""
        return self._bounded.coarse_bound(state, extra, x, layer)

    @property
    def _bounded(self) -> BoundedEncoding:
        if not isinstance(self.encoding, BoundedEncoding):
            raise HireRewriteError(f"{self.encoding} has no bound of its errors")
        return self.encoding
