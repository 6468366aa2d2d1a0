"""What a predictor has to offer, and what it may offer besides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.moments import Moments
from hire_rewrite.ops.named_types import register_type

State = dict[str, Array]
"""The arrays of a fitted predictor; in use all of them have a leading axis of layers."""

Choose = Callable[[Array, int], Array]
"""(scores: f32[tokens, n], count) to i32[tokens, m], the rows worth a closer look. What uses the
scores ranks them by what comes out of the model's own code: biases, masks, activations, groups.
m is at least 1 and about `count`."""


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

    def check(self, n: int, d: int, *, site: str = "", tokens: int | None = None) -> None:
        """Check the settings against the size of the rows.

        Args:
          site: named in the message.
          tokens: how many calibration tokens there are; None or 0 if none were given.

        Raises:
          HireRewriteError: they do not fit.
        """
        ...

    def fit(self, rows: Array, moments: Moments | None = None, top: int | None = None) -> State:
        """The arrays that `score` reads, for the rows [n, d] of one layer.

        Their shapes and dtypes depend on nothing but the shape and dtype of `rows` and whether
        there is a `top`. Traceable.

        Args:
          moments: of the vectors x that are to be scored, if they are known.
          top: how many of the greatest products are wanted; None where all matter alike. Then the
            state may have a `bonus`: f32[n], which is added to scores where rows are chosen (see
            `optimistic`), and which is not in what `score` returns.
        """
        ...

    def score(
        self, state: State, x: Array, layer: Array | int, choose: Choose | None = None
    ) -> Array:
        """Approximately x @ rows[layer].T.

        Args:
          state: what `fit` returned for each layer, stacked on a leading axis.
          x: [tokens, d].
          layer: i32[].
          choose: which rows compositions look at again; without it, those with the greatest
            |score|, the choice that fits whatever becomes of the scores.

        Returns:
          f32[tokens, n]. NaN where x is.
        """
        ...

    def bytes(self, n: int, d: int, dtype: Any, tokens: int = 1) -> int:
        """Bytes that one scoring of so many tokens reads at most.

        Args:
          dtype: of the rows themselves.
        """
        ...


_TYPES: dict[str, type] = {}

PredictorType = TypeVar("PredictorType", bound=type)


def register_predictor(cls: PredictorType) -> PredictorType:
    """Let rules that hold such a predictor be saved and loaded: a decorator of a dataclass.

    Examples:
      ```python
      @register_predictor
      @dataclasses.dataclass(frozen=True)
      class Signs:
          bits: int = 1
          ...
      ```

    Raises:
      HireRewriteError: another class of this name is registered.
    """
    return register_type(_TYPES, cls, "register_predictor")


def predictor_types() -> Mapping[str, type]:
    """The registered predictors by the names of their classes."""
    return dict(_TYPES)


class Read(NamedTuple):
    """Numbers that are read, each once, and multiplied with the vectors of some tokens.

    Attributes:
      kind: how they are stored and multiplied, a field of `hire_rewrite.cost.machine.Machine`.
      bytes: of all of them.
      tokens: how many vectors each number is multiplied with.
      pieces: into how many pieces that lie apart they are fetched; 0 for one.
      scores: how many scores are compared to choose the pieces.
      distinct: how many of the bytes come from memory, where several tokens read the same pieces;
        None for all.
    """

    kind: str
    bytes: int
    tokens: int = 1
    pieces: int = 0
    scores: int = 0
    distinct: int | None = None

    @property
    def memory(self) -> int:
        """Bytes that come from memory."""
        return self.bytes if self.distinct is None else self.distinct


@runtime_checkable
class Timed(Protocol):
    """A predictor that says how what it reads is stored, so that its time can be estimated.

    The bytes of one that does not are taken to be read as fast as a dense product's.
    """

    def reads(self, n: int, d: int, dtype: Any, tokens: int = 1) -> tuple[Read, ...]:
        """What `bytes` adds up."""
        ...


def reads_of(predictor: Predictor, n: int, d: int, dtype: Any, tokens: int = 1) -> tuple[Read, ...]:
    """What one scoring reads, for any predictor."""
    if isinstance(predictor, Timed):
        return predictor.reads(n, d, dtype, tokens)
    return (Read("dense_float32", predictor.bytes(n, d, dtype, tokens), tokens),)


@runtime_checkable
class ScoresRows(Protocol):
    """A predictor that can score a few rows without reading the others."""

    def score_rows(self, state: State, x: Array, layer: Array | int, rows: Array) -> Array:
        """f32[tokens, m], approximately x @ rows[layer].T at rows: i32[tokens, m]."""
        ...


@runtime_checkable
class Proportional(Protocol):
    """A predictor that knows whether its scores are proportional to the token, as products are.

    Tokens of huge numbers are given to those that are in a smaller unit.
    """

    @property
    def proportional(self) -> bool:
        """Whether a power of two times a token has that times its scores. It has not where a mean
        is taken off the token, or rows are chosen on the way."""
        ...


@runtime_checkable
class Certifying(Predictor, Protocol):
    """A predictor that knows how wrong it can be (see `docs/certify.md`)."""

    @property
    def certifies(self) -> bool:
        """Whether these settings have the bounds below."""
        ...

    def fit_bound(self, rows: Array, state: State) -> State:
        """The arrays that `bound` reads, for the rows [n, d] of one layer, as the product has them
        (after its cast), and what `fit` returned for them.

        Among them `norm`: f32[n], no less than the rows' Euclidean norms.
        """
        ...

    def bound(self, state: State, extra: State, x: Array, layer: Array | int) -> Array:
        """f32[tokens, n], no less than |x · row − score| for exact products.

        The score is what `score` returns, rounded as it is on the platform that runs it. NaN or
        infinity where x or the row is not finite.

        Args:
          state, extra: what `fit` and `fit_bound` returned for each layer, stacked.
          x: [tokens, d].
          layer: i32[].
        """
        ...


def optimistic(scores: Array, state: State, layer: Array | int) -> Array:
    """Scores f32[tokens, n] by which rows are chosen: higher where a guess may be too low. Of a NaN
    (infinity times zero) nothing is known: such rows come first."""
    scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    if "bonus" not in state:
        return scores
    bonus = lax.dynamic_index_in_dim(state["bonus"], layer, keepdims=False)
    return scores + bonus[None, : scores.shape[-1]]


def proportional(predictor: object) -> bool:
    """Whether a predictor's scores are known to be proportional to the token."""
    return isinstance(predictor, Proportional) and predictor.proportional


def certifies(predictor: object) -> bool:
    """Whether a predictor has bounds of its errors."""
    return isinstance(predictor, Certifying) and predictor.certifies


def written(value: Any) -> str:
    """A predictor or rule as a user writes it: the first field, and others not at their default."""
    first, *others = dataclasses.fields(value)
    shown = [first, *(f for f in others if getattr(value, f.name) != f.default)]
    arguments = ", ".join(f"{f.name}={getattr(value, f.name)!r}" for f in shown)
    return f"{type(value).__name__}({arguments})"
