"""What a rewritten operation loses, measured beside the dense one.

An operation is compared through one value, a `Comparison`: three results of the same input and, if
it chooses among units (groups of neurons, rows of a vocabulary), what was chosen. Everything is a
sum over tokens, so that reports of several batches can be added.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.top_k.select import top_k

__all__ = [
    "Choice",
    "Comparison",
    "Measured",
    "Quality",
    "Reading",
    "lengths",
    "quality",
    "relative_error",
]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which of U units a predictor chose for each token, and what ranks them.

    Attributes:
      rank, guessed: f32[tokens, U], by which units are ranked exactly and by guess.
      candidates: bool[tokens, U].
      k: how many of the greatest are wanted.
      mass: f32[tokens, U], what a unit weighs among those wanted, not negative.
      nothing: a unit of this rank holds nothing, and cannot be missed.
    """

    rank: Array
    guessed: Array
    candidates: Array
    k: int
    mass: Array
    nothing: float


@dataclasses.dataclass(frozen=True)
class Reading:
    """Which units each token read, where their number is up to the data.

    Attributes:
      wanted, read: bool[tokens, U], the units that are not zero, and those that were read.
      whole: bool[tokens], tokens that ask for more units than are read one by one.
    """

    wanted: Array
    read: Array
    whole: Array


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Results of one operation on the same tokens.

    Attributes:
      dense, exact, rewritten: [tokens, n], of the dense operation, of the one on its exact top k,
        and of the rewritten one.
      choice: what was chosen; None where nothing is.
      proved: bool[tokens], tokens whose result was proved; None where there is no proof.
      reading: what was read; None where how much is no question.
    """

    dense: Array
    exact: Array
    rewritten: Array
    choice: Choice | None = None
    proved: Array | None = None
    reading: Reading | None = None


class Measured(NamedTuple):
    """What an operation returns on its exact top k and rewritten, and how both compare."""

    exact: Any
    rewritten: Any
    comparison: Comparison


class Quality(NamedTuple):
    """Sums over tokens.

    Attributes:
      tokens: f32[], how many.
      places: f32[U], how often a unit of the true top k was the predictor's first, second, ...
      hits: f32[k + 1], how many tokens had 0, 1, ... of their true top k among the candidates.
        Without a choice both are f32[0].
      best: f32[], how many tokens had their greatest unit among the candidates.
      mass: f32[], what the candidates hold of the true top k's mass.
      error, error_exact: f32[], relative error of the rewritten result against the dense one, and
        against the one on the exact top k.
      proved: f32[], tokens whose result was proved.
      read, kept, whole: f32[], of a `Reading` the shares of units that were read, and of those
        wanted that were read; and how many tokens read all.
      undefined: f32[], tokens whose dense result holds a NaN, with which nothing can be compared.
    """

    tokens: Array
    places: Array
    hits: Array
    best: Array
    mass: Array
    error: Array
    error_exact: Array
    proved: Array
    read: Array
    kept: Array
    whole: Array
    undefined: Array


def quality(comparison: Comparison) -> Quality:
    """The sums of a comparison."""
    rewritten, choice, proved = comparison.rewritten, comparison.choice, comparison.proved
    reading = comparison.reading
    zero, empty = jnp.zeros((), jnp.float32), jnp.zeros(0, jnp.float32)
    return Quality(
        jnp.float32(rewritten.shape[0]),
        *((empty, empty, zero, zero) if choice is None else _chosen(choice)),
        error=relative_error(rewritten, comparison.dense).sum(),
        error_exact=relative_error(rewritten, comparison.exact).sum(),
        proved=zero if proved is None else proved.sum(dtype=jnp.float32),
        **({"read": zero, "kept": zero, "whole": zero} if reading is None else _read(reading)),
        undefined=jnp.isnan(comparison.dense).any(-1).sum(dtype=jnp.float32),
    )


def _read(reading: Reading) -> dict[str, Array]:
    """`read`, `kept` and `whole` of a reading."""
    wanted = reading.wanted.sum(1, dtype=jnp.float32)
    kept = (reading.wanted & reading.read).sum(1, dtype=jnp.float32)
    return {
        "read": reading.read.mean(1, dtype=jnp.float32).sum(),
        "kept": jnp.where(wanted > 0, kept / jnp.maximum(wanted, 1), 1.0).sum(),
        "whole": reading.whole.sum(dtype=jnp.float32),
    }


def _chosen(choice: Choice) -> tuple[Array, Array, Array, Array]:
    """`places`, `hits`, `best` and `mass` of a choice."""
    values, best = top_k(choice.rank, choice.k)
    real = values > choice.nothing
    hit = jnp.take_along_axis(choice.candidates, best, axis=1) | ~real
    hit &= ~jnp.isnan(choice.rank).any(1, keepdims=True)  # nothing is the greatest of these
    held = jnp.where(real, jnp.take_along_axis(choice.mass, best, axis=1), 0.0)
    held = held / jnp.maximum(held.max(1, keepdims=True), 1e-30)

    def place(row: tuple[Array, Array]) -> Array:
        guesses, units = row
        return (guesses[None] > guesses[units][:, None]).sum(1)

    places = lax.map(place, (choice.guessed, best))
    units = choice.rank.shape[1]
    share = jnp.where(hit, held, 0.0).sum(1) / jnp.maximum(held.sum(1), 1e-30)
    return (
        jnp.zeros(units, jnp.float32).at[places].add(real.astype(jnp.float32)),
        jnp.zeros(choice.k + 1, jnp.float32).at[hit.sum(1)].add(1.0),
        hit[:, 0].sum(dtype=jnp.float32),
        share.sum(),
    )


def relative_error(got: Array, wanted: Array) -> Array:
    """f32[tokens], ‖got − wanted‖ / ‖wanted‖ of vectors: [tokens, n]."""
    size = lengths(wanted)
    off = got.astype(jnp.float32) - wanted.astype(jnp.float32)
    return lengths(off) / jnp.where(size == 0, 1.0, size)


def lengths(vectors: Array) -> Array:
    """f32[...], the Euclidean norms of vectors: [..., n], of however small or great numbers."""
    sizes = jnp.abs(vectors.astype(jnp.float32))
    # Squares of numbers below 1e-19 would all be zero, and of those above 1e19 infinite.
    greatest = sizes.max(-1, initial=0.0)
    unit = jnp.where((greatest > 0) & (greatest < jnp.inf), greatest, 1.0)
    return unit * jnp.sqrt(jnp.square(sizes / unit[..., None]).sum(-1))
