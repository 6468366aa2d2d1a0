"""One layer of a block of which the neurons that may not be zero are read."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.certify import rounding
from hire_rewrite.ops.certify.dense import dense_error
from hire_rewrite.ops.certify.interval import Interval, enclosure
from hire_rewrite.ops.encodings import Encoding, Stored, out_of_words, picked_products, picked_sums
from hire_rewrite.ops.ffn.block import Activation, ProductSpec, SiblingState
from hire_rewrite.ops.ffn.guessed import members
from hire_rewrite.ops.gather import gather_rows
from hire_rewrite.ops.named_types import exportable
from hire_rewrite.ops.predictors import Certifying, State

__all__ = ["PositiveFFNSpec", "PositiveFFNState", "PositiveLayer"]

_AROUND = 2.0**-64
"""A small number whose products with what activations hold are not flushed to zero."""


@dataclasses.dataclass(frozen=True)
class PositiveFFNSpec(ProductSpec):
    """What is to be computed at a block whose zeros are left out.

    Attributes:
      width: f, the number of neurons.
      d_out: the size of the result.
      projections: P, first matrices: 1 in a plain block, 2 in a gated one.
      gates: the projections that say which neurons are zero, whatever the others are.
      budget: neurons of a token that are read one by one at most; where a token has more, the call
        reads all.
      up, down: how the rows of the first matrices and of the second are stored.
      predictor: how the gates are guessed; None where they are computed whole.
      margin: how far a guess is taken to be off: in standard deviations of its error, or
        `"proved"` for a bound that nothing exceeds, the rounding of the dense model included.
    """

    width: int
    d_out: int
    projections: int
    gates: tuple[int, ...]
    budget: int
    up: Encoding
    down: Encoding
    predictor: Certifying | None = None
    margin: float | str = "proved"

    def __post_init__(self) -> None:
        if not 1 <= self.budget <= self.width:
            raise HireRewriteError(
                f"PositiveFFNSpec: budget={self.budget} must be between 1 and the width "
                f"{self.width}"
            )
        if not self.gates or not set(self.gates) <= set(range(self.projections)):
            raise HireRewriteError(
                f"PositiveFFNSpec: gates={self.gates} are not among {self.projections} projections"
            )

    def of_devices(self, count: int) -> PositiveFFNSpec:
        """What one of so many devices computes, each of neurons of its own."""
        width, budget = self.width // count, -(-self.budget // count)
        return dataclasses.replace(self, width=width, budget=budget)

    @property
    def picked(self) -> tuple[int, ...]:
        """The projections of which rows are read one by one."""
        every = range(self.projections)
        return tuple(p for p in every if self.predictor is not None or p not in self.gates)

    @property
    def whole(self) -> Encoding:
        """How gates are stored that are computed whole: of these no row is fetched alone."""
        return out_of_words(self.up)


@exportable
class PositiveFFNState(NamedTuple):
    """The arrays of a block, with a leading axis of layers.

    Attributes:
      gates: the rows of the gates [gates · f, d_in], one gate after the other; empty where they are
        guessed.
      up: the rows of the projections that are read one by one [f · picked, d_in], neuron by neuron.
      down: those of the second matrix [f, d_out].
      vectors: of [L, f], numbers that the activation needs of each neuron, such as biases.
      predictor: of the gates, as `gates` has them.
      bound: what bounds the error of its scores (`Certifying.fit_bound`).
      norms: f32[L, P, f], no less than the norms of the rows of each projection.
      fused, joined: as in `FFNState`.
    """

    gates: Stored
    up: Stored
    down: Stored
    vectors: tuple[Array, ...]
    predictor: State
    bound: State
    norms: Array
    fused: tuple[SiblingState, ...] = ()
    joined: tuple[Array, ...] = ()


def _at(numbers: Array, places: Array) -> Array:
    """[tokens, n], numbers [tokens, f] at places i32[tokens, n]; any where a list has ended."""
    real = jnp.maximum(places, 0)
    return jnp.take_along_axis(numbers, real, axis=1, mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True, eq=False)
class PositiveLayer:
    """A layer of a block's arrays, and what is to be computed with it."""

    state: PositiveFFNState
    layer: Array | int
    spec: PositiveFFNSpec
    activation: Activation

    def gates(self, x: Array) -> Array | None:
        """The pre-activations of the gates, up_dtype[tokens, gates · f], for x: [tokens, d_in];
        None where they are guessed."""
        spec = self.spec
        if spec.predictor is not None:
            return None
        return spec.whole.product(x, self.state.gates, self.layer).astype(spec.up_dtype)

    def unsettled(self, x: Array, gates: Array | None) -> Array:
        """bool[tokens, f], which neurons may not be zero.

        Args:
          x: [tokens, d_in].
          gates: what `gates` returned for it.
        """
        spec, state = self.spec, self.state
        if gates is not None:
            middles = self._split(gates.astype(jnp.float32))
            off = (jnp.float32(0.0),) * len(middles)
        else:
            assert spec.predictor is not None
            scores = lax.stop_gradient(spec.predictor.score(state.predictor, x, self.layer))
            middles, off = self._split(scores), self._split(self._off(x))
        ends = {
            p: Interval(middle - error, middle + error)
            for p, middle, error in zip(spec.gates, middles, off, strict=True)
        }
        if len(ends) < spec.projections:
            reach = self._reach(x)
            ends |= {
                p: Interval(-reach[:, p], reach[:, p])
                for p in range(spec.projections)
                if p not in ends
            }
        vectors = self._vectors()
        within = enclosure(
            lambda *pre: self.activation(pre, vectors),
            [ends[p] for p in range(spec.projections)],
            spec.up_dtype,
        )
        return ~within.is_zero

    def gathered(self, x: Array, gates: Array | None, neurons: Array) -> Array:
        """[tokens, d_out] from some neurons of each token, i32[tokens, n], for x: [tokens, d_in].

        Args:
          gates: what `gates` returned for it.
        """
        spec, state = self.spec, self.state
        tokens, n = neurons.shape
        pre: dict[int, Array] = {}
        if spec.picked:
            places = members(neurons, len(spec.picked))
            ended = jnp.repeat(neurons < 0, len(spec.picked), axis=1)
            places = jnp.where(ended, -1, places)
            products = picked_products(spec.up, x, state.up, self.layer, places)
            products = products.astype(spec.up_dtype).reshape(tokens, n, len(spec.picked))
            pre |= {p: products[:, :, i] for i, p in enumerate(spec.picked)}
        if gates is not None:
            split = self._split(gates)
            pre |= {p: _at(split[i], neurons) for i, p in enumerate(spec.gates)}
        h = self._of_each(tuple(pre[p] for p in range(spec.projections)), neurons)
        h = jnp.where(neurons < 0, jnp.zeros_like(h), h)
        empty = jnp.zeros((tokens, spec.d_out), jnp.float32)
        (y,) = picked_sums(spec.down, [empty], h, [state.down], self.layer, neurons)
        return y.astype(spec.down_dtype)

    def hidden(self, x: Array, gates: Array | None) -> Array:
        """h: [tokens, f] of all neurons, from all rows; the arguments are those of `gathered`."""
        spec, tokens, pre = self.spec, x.shape[0], dict[int, Array]()
        if spec.picked:
            every = spec.up.product(x, self.state.up, self.layer)
            split = every.astype(spec.up_dtype).reshape(tokens, spec.width, len(spec.picked))
            pre |= {p: split[:, :, i] for i, p in enumerate(spec.picked)}
        if gates is not None:
            pre |= dict(zip(spec.gates, self._split(gates), strict=True))
        return self.activation(tuple(pre[p] for p in range(spec.projections)), self._vectors())

    def down(self, h: Array) -> Array:
        """[tokens, d_out] of h: [tokens, f], from all rows."""
        rows = self.spec.down.decode(self.state.down, self.layer)
        y = jnp.matmul(h.astype(jnp.float32), rows, precision=lax.Precision.HIGHEST)
        return y.astype(self.spec.down_dtype)

    def _of_each(self, pre: tuple[Array, ...], neurons: Array) -> Array:
        """h: [tokens, n] where each token has neurons i32[tokens, n] of its own.

        The activation is one for all tokens, and its vectors have a number for each neuron. So
        several tokens' numbers are put in the places of their neurons, and it runs on all.
        """
        tokens, width = neurons.shape[0], self.spec.width
        if tokens == 1:
            real = jnp.maximum(neurons[0], 0)
            vectors = (gather_rows(v, self.layer, real) for v in self.state.vectors)
            return self.activation(pre, tuple(vectors))
        token = lax.broadcasted_iota(jnp.int32, neurons.shape, 0)
        places = jnp.where(neurons < 0, width, neurons)  # beyond the end, where it is dropped
        full = tuple(
            jnp.zeros((tokens, width), array.dtype).at[token, places].set(array, mode="drop")
            for array in pre
        )
        return _at(self.activation(full, self._vectors()), neurons)

    def _off(self, x: Array) -> Array:
        """f32[tokens, gates · f], how far scores may be from the dense model's pre-activations."""
        spec, state, layer = self.spec, self.state, self.layer
        assert spec.predictor is not None
        length = rounding.norms(x)[:, None]
        if spec.margin != "proved":
            # An error that has nothing to do with x points anywhere: of its size a part 1 / √d
            # lies along x.
            residual = lax.dynamic_index_in_dim(state.bound["residual"], layer)
            return float(spec.margin) / math.sqrt(x.shape[1]) * length * residual
        norms = self._here(state.norms)[spec.gates, :].reshape(1, -1)
        dense = dense_error(x.shape[1], x.dtype, spec.precision, length, norms)
        bound = spec.predictor.bound(state.predictor, state.bound, x, layer)
        return rounding.at_least(bound + dense.below(length, norms))

    def _reach(self, x: Array) -> Array:
        """f32[tokens, P, f], what no pre-activation exceeds, here and around x: where x is zero,
        a neuron whose gate is open is zero too, but its derivative is not."""
        length = rounding.norms(x)[:, None, None]
        return _AROUND + 1.01 * length * lax.dynamic_index_in_dim(self.state.norms, self.layer)

    def _split(self, gates: Array) -> tuple[Array, ...]:
        return tuple(jnp.split(gates, len(self.spec.gates), axis=1))

    def _vectors(self) -> tuple[Array, ...]:
        return tuple(map(self._here, self.state.vectors))

    def _here(self, stacked: Array) -> Array:
        return lax.dynamic_index_in_dim(stacked, self.layer, keepdims=False)
