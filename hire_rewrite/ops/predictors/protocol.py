"""What a predictor has to offer."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jax import Array

from hire_rewrite.ops.moments import Moments

State = dict[str, Array]
"""The arrays of a fitted predictor; in use all of them have a leading axis of layers."""


@runtime_checkable
class Predictor(Protocol):
    """Guesses x @ rows.T for fixed rows: [n, d].

    Implementations are frozen dataclasses: they are compared, hashed and printed as the user wrote
    them.
    """

    @property
    def wants_calibration(self) -> bool:
        """Whether moments of the activations make the fit much better."""
        ...

    def check(self, n: int, d: int, *, site: str = "") -> None:
        """Check the settings against the size of the rows.

        Args:
          site: named in the message.

        Raises:
          HireRewriteError: they do not fit.
        """
        ...

    def fit(self, rows: Array, moments: Moments | None = None) -> State:
        """The arrays that `score` reads, for the rows [n, d] of one layer.

        Their shapes and dtypes depend on nothing but n and d. Traceable, with or without moments
        of the vectors x that are to be scored.
        """
        ...

    def score(self, state: State, x: Array, layer: Array | int) -> Array:
        """Approximately x @ rows[layer].T.

        Args:
          state: what `fit` returned for each layer, stacked on a leading axis.
          x: [tokens, d].
          layer: i32[].

        Returns:
          f32[tokens, n]. NaN where x is.
        """
        ...

    def bytes(self, n: int, d: int, dtype: Any) -> int:
        """Bytes that one scoring reads, where the rows themselves are of `dtype`."""
        ...
