"""One layer of a block: its packed arrays where they lie, and the matmuls with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.ffn.block import (
    Activation,
    FFNSpec,
    FFNState,
    ProductSpec,
    SiblingState,
)
from hire_rewrite.ops.gather import gather_rows, gathered_matmul, gathered_sum

__all__ = ["BlockLayer", "add_joined", "down_matmul", "sibling_inputs", "up_matmul"]


@dataclasses.dataclass(frozen=True, eq=False)
class BlockLayer:
    """A layer of a block's packed arrays, and what is to be computed with it.

    Attributes:
      state: the arrays of all layers.
      index: i32[], which layer.
    """

    state: FFNState
    index: Array | int
    spec: FFNSpec
    activation: Activation

    def pre_activations(self, x: Array) -> tuple[Array, ...]:
        """Of all neurons, for each projection [tokens, f], for x: [tokens, d_in]."""
        rows = _at(self.state.up, self.index)
        return self._by_projection(up_matmul(x, rows.reshape(-1, rows.shape[-1]), self.spec))

    def gathered_pre_activations(self, x: Array, groups: Array) -> tuple[Array, ...]:
        """Of the common groups and of others: i32[n], all of their numbers in `groups`."""
        spec, common = self.spec, self.spec.common_groups
        pre = gathered_matmul(
            x,
            self.state.up,
            self.index,
            groups[common:],
            compute_dtype=spec.compute_dtype,
            out_dtype=spec.up_dtype,
            precision=spec.precision,
        )
        if common:  # read in one piece, without a copy
            first = _at(self.state.up, self.index)[:common].reshape(-1, x.shape[1])
            pre = jnp.concatenate([up_matmul(x, first, spec), pre], axis=1)
        return self._by_projection(pre)

    def hidden(self, pre: tuple[Array, ...]) -> Array:
        """h: [tokens, f] of all pre-activations."""
        return self.activation(pre, self.vectors())

    def vectors(self, first: int = 0) -> tuple[Array, ...]:
        """Each vector, of the neurons of the groups from `first` on: [n]."""
        return tuple(_at(v, self.index)[first:].reshape(-1) for v in self.state.vectors)

    def norms(self, first: int = 0) -> Array | None:
        """The norms of the second rows, of the same neurons: [n]."""
        norms = self.state.norms
        return None if norms is None else _at(norms, self.index)[first:].reshape(-1)

    def gathered_vectors(self, groups: Array) -> tuple[Array, ...]:
        """Each vector, of the neurons of some groups: [n]."""
        return tuple(gather_rows(v, self.index, groups).reshape(-1) for v in self.state.vectors)

    def gathered_norms(self, groups: Array) -> Array | None:
        """The norms of the second rows, of the same neurons: [n]."""
        norms = self.state.norms
        return None if norms is None else gather_rows(norms, self.index, groups).reshape(-1)

    def down(self, h: Array) -> Array:
        """[tokens, d_out] of h: [tokens, f]."""
        rows = _at(self.state.down, self.index)
        return down_matmul(h, rows.reshape(self.spec.width, rows.shape[-1]), self.spec)

    def gathered_down(self, h: Array, groups: Array) -> Array:
        """[tokens, d_out] of h: [tokens, n, group], the activations of n groups."""
        return gathered_sum(
            h,
            self.state.down,
            self.index,
            groups,
            out_dtype=self.spec.down_dtype,
            precision=self.spec.precision,
        )

    def _by_projection(self, pre: Array) -> tuple[Array, ...]:
        """[tokens, n · P · group] as P arrays [tokens, n · group]."""
        projections, group = self.spec.projections, self.spec.group
        tokens, n = pre.shape[0], pre.shape[1] // (projections * group)
        split = pre.reshape(tokens, n, projections, group)
        return tuple(split[:, :, p].reshape(tokens, n * group) for p in range(projections))


def add_joined(
    y: Array,
    others: Sequence[Array],
    joined: Sequence[Array],
    layer: Array | int,
    *,
    spec: ProductSpec,
) -> Array:
    """`y` with what other inputs [tokens, n] of the last matmul add to it, computed whole.

    Args:
      joined: the rows of each, [L, n, d_out].
    """
    for x, rows in zip(others, joined, strict=True):
        y = y + down_matmul(x, _at(rows, layer), spec)
    return y


def sibling_inputs(
    x: Array, state: SiblingState, layer: Array | int, *, spec: ProductSpec
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The pre-activations of a sibling [tokens, n], and its vectors [n], for x: [tokens, d_in]."""
    pre = tuple(up_matmul(x, _at(rows, layer), spec) for rows in state.rows)
    return pre, tuple(_at(vector, layer) for vector in state.vectors)


def up_matmul(x: Array, rows: Array, spec: ProductSpec) -> Array:
    """[tokens, n] of x: [tokens, d_in] and rows: [n, d_in]."""
    return lax.dot_general(
        x,
        rows.astype(spec.compute_dtype),
        (((1,), (1,)), ((), ())),
        precision=spec.precision,
        preferred_element_type=spec.up_dtype,
    )


def down_matmul(h: Array, rows: Array, spec: ProductSpec) -> Array:
    """[tokens, d_out] of h: [tokens, n] and rows: [n, d_out]."""
    return lax.dot_general(
        h,
        rows.astype(h.dtype),
        (((1,), (0,)), ((), ())),
        precision=spec.precision,
        preferred_element_type=spec.down_dtype,
    )


def _at(stacked: Array, layer: Array | int) -> Array:
    return lax.dynamic_index_in_dim(stacked, layer, keepdims=False)
