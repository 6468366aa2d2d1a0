"""One layer of a block that is guessed from a compressed copy, but for some of its neurons."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.encodings import Encoding, Stored, picked_products, picked_sums
from hire_rewrite.ops.ffn.block import Activation, ProductSpec, SiblingState, check_criterion
from hire_rewrite.ops.ffn.importance import importance
from hire_rewrite.ops.ffn.layer import down_matmul, up_matmul
from hire_rewrite.ops.gather import gather_rows
from hire_rewrite.ops.named_types import exportable

__all__ = ["GuessedLayer", "PredictedFFNSpec", "PredictedFFNState", "members"]


@dataclasses.dataclass(frozen=True)
class PredictedFFNSpec(ProductSpec):
    """What is to be computed at a block whose neurons outside the top k are guessed.

    Attributes:
      width: f, the number of neurons.
      group: neurons that are chosen together; divides the width.
      projections: P, first matrices: 1 in a plain block, 2 in a gated one.
      k_groups: how many of the G = f / group groups each token has exactly; 0 for none.
      criterion: what a neuron is ranked by, as in `FFNSpec`.
      encoding: how the compressed copy is stored.
      exact: how the exact rows are stored; None for none, with k_groups = 0.
      round_inputs: whether what the copy multiplies may be rounded to 8 bits (see
        `Encoding.product`). What is exact is not part of it, so that the greatest activations do
        not make the rounding of the others coarse.
    """

    width: int
    group: int
    projections: int
    k_groups: int
    criterion: str
    encoding: Encoding
    exact: Encoding | None
    round_inputs: bool = False

    def __post_init__(self) -> None:
        if self.group < 1 or self.width % self.group:
            raise HireRewriteError(
                f"PredictedFFNSpec: group={self.group} must divide the width {self.width}"
            )
        if not 0 <= self.k_groups <= self.groups:
            raise HireRewriteError(
                f"PredictedFFNSpec: k_groups={self.k_groups} must be between 0 and the number of "
                f"groups, {self.groups}"
            )
        if (self.exact is None) != (self.k_groups == 0):
            raise HireRewriteError(
                f"PredictedFFNSpec: exact={self.exact!r} with k_groups={self.k_groups}: give an "
                "encoding for exact rows where there are some, and None where there are none"
            )
        check_criterion("PredictedFFNSpec", self.criterion)

    @property
    def groups(self) -> int:
        """G."""
        return self.width // self.group

    def of_devices(self, count: int) -> PredictedFFNSpec:
        """What one of so many devices computes, each of neurons of its own and its share of k."""
        width, k = self.width // count, -(-self.k_groups // count)
        return dataclasses.replace(self, width=width, k_groups=k)

    def takes_all(self, tokens: int) -> bool:
        """Whether so many tokens may ask for all exact rows; then nothing has to be guessed."""
        return tokens * self.k_groups >= self.groups


@exportable
class PredictedFFNState(NamedTuple):
    """The arrays of a block, with a leading axis of layers.

    Attributes:
      up: the compressed copy of the first matrices [P · f, d_in], one after the other.
      down: that of the second [d_out, f].
      exact_up: the exact rows of the first matrices [f · P, d_in], neuron by neuron; empty where no
        neuron is exact, as is `exact_down`.
      exact_down: those of the second [f, d_out].
      vectors: of [L, f], numbers that the activation needs of each neuron, such as biases.
      norms: f32[L, f], norms of the second rows, for the criterion `"output"` alone.
      fused, joined: as in `FFNState`.
      dense: the rows of all first matrices [L, P · f, d_in] and of the second [L, f, d_out] as the
        model has them; None where only what is above is held.
    """

    up: Stored
    down: Stored
    exact_up: Stored
    exact_down: Stored
    vectors: tuple[Array, ...]
    norms: Array | None = None
    fused: tuple[SiblingState, ...] = ()
    joined: tuple[Array, ...] = ()
    dense: tuple[Array, Array] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class GuessedLayer:
    """A layer of a block's arrays, and what is to be computed with it."""

    state: PredictedFFNState
    layer: Array | int
    spec: PredictedFFNSpec
    activation: Activation

    def guesses(self, x: Array) -> Array:
        """ĥ: [tokens, f] of all neurons, for x: [tokens, d_in]."""
        spec = self.spec
        pre = self._product(x, self.state.up).astype(spec.up_dtype)
        return self.activation(tuple(jnp.split(pre, spec.projections, axis=1)), self._vectors())

    def guessed_down(self, h: Array) -> Array:
        """f32[tokens, d_out], Σ hᵢ ŵᵢ for h: [tokens, f]."""
        return self._product(h, self.state.down)

    def rank(self, h: Array) -> Array:
        """What ranks each group for h: [tokens, f]; f32[tokens, G] (see `importance`)."""
        norms = self.state.norms
        return importance(h, None if norms is None else self._here(norms), self.spec.group)

    def gathered(self, x: Array, neurons: Array, onto: Array) -> Array:
        """onto + Σ hᵢ wᵢ over some neurons of each token, for x: [tokens, d_in].

        Args:
          neurons: i32[tokens, n].
          onto: f32[tokens, d_out].
        """
        spec, state = self.spec, self.state
        assert spec.exact is not None
        tokens, n = neurons.shape
        places = members(neurons, spec.projections)
        pre = picked_products(spec.exact, x, state.exact_up, self.layer, places)
        pre = pre.astype(spec.up_dtype).reshape(tokens, n, spec.projections)
        h = self._of_each(tuple(pre[:, :, p] for p in range(spec.projections)), neurons)
        down = [state.exact_down]
        (y,) = picked_sums(spec.exact, [onto], h, down, self.layer, neurons)
        return y

    def masked(self, h: Array, chosen: Array) -> Array:
        """f32[tokens, d_out], Σ hᵢ wᵢ over the chosen neurons in dense arithmetic, for
        h: [tokens, f] and bool[tokens, f]."""
        exactly = jnp.where(chosen, h, jnp.zeros_like(h)).astype(jnp.float32)
        return jnp.matmul(exactly, self.down_rows(), precision=lax.Precision.HIGHEST)

    def _of_each(self, pre: tuple[Array, ...], neurons: Array) -> Array:
        """h: [tokens, n] where each token has neurons i32[tokens, n] of its own.

        The activation is one for all tokens, and its vectors have a number for each neuron. So all
        tokens get all lists, one after the other, and of the result each token's own is taken.
        """
        tokens, n = neurons.shape
        every = tuple(
            jnp.broadcast_to(array.reshape(1, tokens * n), (tokens, tokens * n)) for array in pre
        )
        vectors = (gather_rows(v, self.layer, neurons.reshape(-1)) for v in self.state.vectors)
        token = jnp.arange(tokens)
        return self.activation(every, tuple(vectors)).reshape(tokens, tokens, n)[token, token]

    def dense(self, x: Array) -> tuple[Array, Array]:
        """h: [tokens, f] and what comes out, by the best rows that are held."""
        spec, state = self.spec, self.state
        if state.dense is not None:
            up, rows = map(self._here, state.dense)
            h = self._hidden(up_matmul(x, up, spec), by_neuron=False)
            return h, down_matmul(h, rows, spec)
        h = self.hidden(x)
        if spec.exact is None:
            return h, spec.encoding.product(h, state.down, self.layer).astype(spec.down_dtype)
        return h, down_matmul(h, self.down_rows(), spec)

    def hidden(self, x: Array) -> Array:
        """h: [tokens, f] by the exact rows, or without such rows by the compressed copy."""
        exact, state = self.spec.exact, self.state
        if exact is None:
            pre = self.spec.encoding.product(x, state.up, self.layer)
        else:
            pre = exact.product(x, state.exact_up, self.layer)
        return self._hidden(pre.astype(self.spec.up_dtype), by_neuron=exact is not None)

    def down_rows(self) -> Array:
        """f32[f, d_out], the second matrix by the exact rows, or without such rows by the copy."""
        exact, state = self.spec.exact, self.state
        if exact is None:
            return self.spec.encoding.decode(state.down, self.layer).T
        return exact.decode(state.exact_down, self.layer)

    def _hidden(self, pre: Array, *, by_neuron: bool) -> Array:
        """h: [tokens, f] of all first products, [tokens, f · P] or [tokens, P · f]."""
        tokens, projections = pre.shape[0], self.spec.projections
        if by_neuron:
            split = jnp.moveaxis(pre.reshape(tokens, self.spec.width, projections), 2, 0)
            every = tuple(split[p] for p in range(projections))
        else:
            every = tuple(jnp.split(pre, projections, axis=1))
        return self.activation(every, self._vectors())

    def _product(self, x: Array, copy: Stored) -> Array:
        spec = self.spec
        return spec.encoding.product(x, copy, self.layer, round_inputs=spec.round_inputs)

    def _vectors(self) -> tuple[Array, ...]:
        return tuple(map(self._here, self.state.vectors))

    def _here(self, stacked: Array) -> Array:
        return lax.dynamic_index_in_dim(stacked, self.layer, keepdims=False)


def members(groups: Array, size: int) -> Array:
    """i32[tokens, n · size], the numbers of what is in groups i32[tokens, n] of one size."""
    numbers = jnp.arange(size, dtype=groups.dtype)[None, None]
    return (groups[..., None] * size + numbers).reshape(groups.shape[0], groups.shape[1] * size)
