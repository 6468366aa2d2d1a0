"""Two predictors in a row: a small one scores all rows, a better one looks again at the best.

A low-rank guess orders the rows well enough to find a few thousand that hold all that matter, and
not well enough to order those. 8-bit rows do, and only the kept ones are read.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.gather import by_tokens
from hire_rewrite.ops.moments import Moments
from hire_rewrite.ops.predictors.protocol import (
    Choose,
    Predictor,
    Read,
    ScoresRows,
    State,
    optimistic,
    reads_of,
    register_predictor,
)
from hire_rewrite.ops.top_k.select import scatter, top_k

_BATCH = 8
"""Tokens whose rows are scored again at a time."""


@register_predictor
@dataclasses.dataclass(frozen=True)
class Cascade:
    """Score all rows with `first`, and the best of them again with `second`.

    Args:
      first: any predictor.
      second: one that can score rows it is told, as `Quantized` can.
      keep: how many rows a token scores again, a number (int) or a fraction (float) of all.

    Raises:
      HireRewriteError: one of the predictors cannot do its part, or `keep` is out of range.

    Examples:
      >>> import hire_rewrite as hire
      >>> predictor = hire.Cascade(hire.LowRank(16), hire.Quantized(), keep=64)
      >>> predictor.bytes(4096, 64, "float32") < hire.Quantized().bytes(4096, 64, "float32")
      True
    """

    first: Predictor
    second: Predictor
    keep: int | float = 2048

    def __post_init__(self) -> None:
        for name, predictor in (("first", self.first), ("second", self.second)):
            if not isinstance(predictor, Predictor) or isinstance(predictor, type):
                raise HireRewriteError(
                    f"Cascade: {name}={predictor!r} is not a predictor: give LowRank(...) or "
                    "Quantized(...)"
                )
        if not isinstance(self.second, ScoresRows):
            raise HireRewriteError(
                f"Cascade: second={self.second!r} cannot score chosen rows alone: give "
                "Quantized(...), or any predictor with score_rows"
            )
        keep = self.keep
        if isinstance(keep, bool) or not (
            (isinstance(keep, int) and keep >= 1) or (isinstance(keep, float) and 0 < keep <= 1)
        ):
            raise HireRewriteError(
                f"Cascade: keep={keep!r} must be a number of rows (an int of at least 1) or a "
                "fraction (a float in (0, 1])"
            )

    @property
    def wants_calibration(self) -> bool:
        """That of `first`, which decides what `second` sees."""
        return self.first.wants_calibration

    def check(self, n: int, d: int, *, site: str = "", tokens: int | None = None) -> None:
        """Raise HireRewriteError if a part does not fit, or more rows are kept than there are."""
        self.first.check(n, d, site=site, tokens=tokens)
        self.second.check(n, d, site=site, tokens=tokens)
        if self._kept(n) > n:
            raise HireRewriteError(
                f"{site + ': ' if site else ''}Cascade: keep={self.keep} is more than the {n} rows "
                f"that there are: give at most {n}, or a fraction (a float in (0, 1])"
            )

    def fit(self, rows: Array, moments: Moments | None = None, top: int | None = None) -> State:
        """The arrays of both, named `first_...` and `second_...`."""
        self.check(*rows.shape)
        return {
            f"{name}_{key}": array
            for name, predictor in (("first", self.first), ("second", self.second))
            for key, array in predictor.fit(rows, moments, top if name == "first" else None).items()
        }

    def score(
        self, state: State, x: Array, layer: Array | int, choose: Choose | None = None
    ) -> Array:
        """f32[tokens, n] for x: [tokens, d] (see `Predictor.score`).

        `second`'s scores for the rows that `choose` names, `first`'s for the others.
        """
        first = _part(state, "first")
        scores = self.first.score(first, x, layer, choose)
        kept, better = self._kept(scores.shape[-1]), optimistic(scores, first, layer)
        rows = _greatest(better, kept) if choose is None else choose(better, kept)
        second, state = self.second, _part(state, "second")
        assert isinstance(second, ScoresRows)

        def again(x: Array, rows: Array) -> Array:
            return second.score_rows(state, x, layer, rows)

        return scatter(scores, rows, by_tokens(again, (x, rows), _BATCH))

    def bytes(self, n: int, d: int, dtype: Any, tokens: int = 1) -> int:
        """All of the first predictor, and of the second the kept rows of each token."""
        again = min(n, tokens * self._kept(n))
        return self.first.bytes(n, d, dtype, tokens) + self.second.bytes(again, d, dtype, tokens)

    def reads(self, n: int, d: int, dtype: Any, tokens: int = 1) -> tuple[Read, ...]:
        """See `Timed`; rows that several tokens keep count as often, for each fetches its own."""
        again = tokens * self._kept(n)
        fetched = self.second.bytes(again, d, dtype)
        second = Read("fetched_int8", fetched, pieces=again, scores=tokens * n)
        return *reads_of(self.first, n, d, dtype, tokens), second

    def _kept(self, n: int) -> int:
        if isinstance(self.keep, int):
            return self.keep
        return max(1, math.ceil(round(self.keep * n, 6)))


def _greatest(scores: Array, count: int) -> Array:
    return top_k(jnp.abs(scores), count)[1]


def _part(state: State, name: str) -> State:
    prefix = f"{name}_"
    return {key.removeprefix(prefix): a for key, a in state.items() if key.startswith(prefix)}
