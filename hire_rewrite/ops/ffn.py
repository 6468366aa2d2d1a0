"""The feed-forward block: guess all neurons, compute and use only the greatest.

A neuron is a row of the first matrix (of two in a gated block) and a row of the second. `hire_ffn`
guesses every neuron's activation with a predictor, fetches the first rows of the best candidates,
computes them exactly, keeps the k greatest and fetches the second rows of those alone. Neurons are
chosen and fetched in groups, whose rows lie together in memory.

The top k is part of what the block computes: `exact_ffn` has the same meaning in dense arithmetic,
and is what `hire_ffn` arrives at when the candidates include all of the true top k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.predictors import Predictor, State
from hire_rewrite.ops.select import top_k

Activation = Callable[[tuple[Array, ...], tuple[Array, ...]], Array]
"""(pre: P arrays [tokens, n], vectors: arrays [n]) to h: [tokens, n], pointwise along n."""


@dataclasses.dataclass(frozen=True)
class FFNSpec:
    """What is to be computed at a block.

    Attributes:
      width: f, the number of neurons.
      group: neurons that are chosen and fetched together; divides the width.
      projections: P, first matrices: 1 in a plain block, 2 in a gated one.
      k_groups: how many of the G = f / group groups count.
      candidate_groups: how many a token computes exactly, at least k_groups.
      gate: the projection whose non-positive values make h exactly zero (ReLU family), or None.
      gate_bias: the vector that is added to the gate first, or None.
      selects: whether the activation itself looks at all neurons together and zeroes most; then it
        is given the guesses of those that were not fetched.
      up_dtype, down_dtype: results of the two products.
      precision: of both, as in `lax.dot_general`.
      compute_dtype: to which rows are cast after they were fetched.
    """

    width: int
    group: int
    projections: int
    k_groups: int
    candidate_groups: int
    gate: int | None
    gate_bias: int | None
    up_dtype: Any
    down_dtype: Any
    precision: Any
    compute_dtype: Any
    selects: bool = False

    def __post_init__(self) -> None:
        if self.group < 1 or self.width % self.group:
            raise HireRewriteError(
                f"FFNSpec: group={self.group} must divide the width {self.width}"
            )
        if not 1 <= self.k_groups <= self.candidate_groups <= self.groups:
            raise HireRewriteError(
                f"FFNSpec: k_groups={self.k_groups}, candidate_groups={self.candidate_groups}, "
                f"{self.groups} groups: they must be in that order, and k_groups at least 1"
            )
        if self.gate is not None and not 0 <= self.gate < self.projections:
            raise HireRewriteError(
                f"FFNSpec: gate={self.gate} is none of {self.projections} projections"
            )

    @property
    def groups(self) -> int:
        """G."""
        return self.width // self.group


class PartState(NamedTuple):
    """A part of a product that is fused with the block's, but is read elsewhere.

    Attributes:
      rows: for each product [L, n, d_in], those of the part.
      vectors: of [L, n], numbers that belong to them.
    """

    rows: tuple[Array, ...]
    vectors: tuple[Array, ...]


class FFNState(NamedTuple):
    """The arrays of a block; neuron j is number j % group of group j // group.

    Attributes:
      up: [L, G, P, group, d_in], the rows of the first matrices.
      down: [L, G, group, d_out], those of the second.
      vectors: of [L, G, group], numbers that the activation needs of each neuron, such as biases.
      predictor: for the P · f rows of the first matrices, all of the first projection, then all
        of the next; with the same leading axis.
      fused: parts of a product that the block shares with others, which are computed whole.
      joined: of [L, n, d_out], rows of the last matrix that other inputs than h are for.
    """

    up: Array
    down: Array
    vectors: tuple[Array, ...]
    predictor: State
    fused: tuple[PartState, ...] = ()
    joined: tuple[Array, ...] = ()


def hire_ffn(
    x: Array,
    state: FFNState,
    layer: Array | int,
    *,
    spec: FFNSpec,
    activation: Activation,
    predictor: Predictor,
) -> Array:
    """The block on its top k groups, found among predicted candidates.

    Each token has candidates of its own, and what is not among them is zero for it, so that its
    result does not depend on the tokens beside it. Where all of the tokens' candidates together
    may be all of the groups, everything is computed and the top k are the exact ones.

    Args:
      x: [tokens, d_in].
      state: see `FFNState`.
      layer: i32[], the index into the leading axis of the arrays.

    Returns:
      spec.down_dtype[tokens, d_out]. NaN where x is.
    """
    tokens = x.shape[0]
    if tokens * spec.candidate_groups >= spec.groups:
        return exact_ffn(x, state, layer, spec=spec, activation=activation)
    scores = lax.stop_gradient(predictor.score(state.predictor, x, layer))
    candidates = _candidates(scores, state, layer, spec, activation)
    h = _own_hidden(x, state, layer, candidates, scores, spec, activation)
    _, places = top_k(_energy(h), spec.k_groups)
    kept = jnp.take_along_axis(candidates, places, axis=1, mode="promise_in_bounds")
    h = jnp.take_along_axis(h, places[:, :, None], axis=1, mode="promise_in_bounds")
    rows = _gather(state.down, layer, kept)
    return lax.dot_general(
        rows.reshape(tokens, spec.k_groups * spec.group, -1).astype(h.dtype),
        h.reshape(tokens, spec.k_groups * spec.group),
        (((1,), (1,)), ((0,), (0,))),
        precision=spec.precision,
        preferred_element_type=spec.down_dtype,
    )


def dense_ffn(
    x: Array, state: FFNState, layer: Array | int, *, spec: FFNSpec, activation: Activation
) -> Array:
    """The block as the model has it, without any top k, for x: [tokens, d_in]."""
    return _down(_all_hidden(x, state, layer, spec, activation), state, layer, spec)


def exact_ffn(
    x: Array, state: FFNState, layer: Array | int, *, spec: FFNSpec, activation: Activation
) -> Array:
    """The block on its true top k groups, in dense arithmetic, for x: [tokens, d_in].

    Differentiable: which groups are kept counts as constant.
    """
    h = _all_hidden(x, state, layer, spec, activation)
    h = jnp.where(topk_mask(h, spec), h, jnp.zeros_like(h))
    return _down(h, state, layer, spec)


def add_joined(
    y: Array, others: Sequence[Array], state: FFNState, layer: Array | int, *, spec: FFNSpec
) -> Array:
    """`y` with what other inputs [tokens, n] of the last product add to it, computed whole."""
    for x, rows in zip(others, state.joined, strict=True):
        y = y + _down_product(x, lax.dynamic_index_in_dim(rows, layer, keepdims=False), spec)
    return y


def part_inputs(
    x: Array, state: PartState, layer: Array | int, *, spec: FFNSpec
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The products of another part [tokens, n], and its vectors [n], for x: [tokens, d_in]."""
    products = tuple(
        _up_product(x, lax.dynamic_index_in_dim(rows, layer, keepdims=False), spec)
        for rows in state.rows
    )
    vectors = (lax.dynamic_index_in_dim(v, layer, keepdims=False) for v in state.vectors)
    return products, tuple(vectors)


def topk_mask(h: Array, spec: FFNSpec) -> Array:
    """bool[tokens, f]: the neurons of each token's k_groups groups of greatest energy.

    Args:
      h: [tokens, f], exact activations.
    """
    tokens = h.shape[0]
    if spec.k_groups == spec.groups:
        return jnp.ones(h.shape, bool)
    energy = _energy(lax.stop_gradient(h).reshape(tokens, spec.groups, spec.group))
    _, kept = top_k(energy, spec.k_groups)
    mask = jnp.zeros((tokens, spec.groups), bool)
    mask = mask.at[jnp.arange(tokens)[:, None], kept].set(True, mode="promise_in_bounds")
    return jnp.repeat(mask, spec.group, axis=1)


def _candidates(
    scores: Array, state: FFNState, layer: Array | int, spec: FFNSpec, activation: Activation
) -> Array:
    """i32[tokens, candidate_groups], ascending, from predicted products [tokens, P · f]."""
    tokens = scores.shape[0]
    scores = scores.astype(spec.up_dtype)
    pre = tuple(jnp.split(scores, spec.projections, axis=1))
    vectors = _vectors(state, layer)
    rank = _energy(activation(pre, vectors).reshape(tokens, spec.groups, spec.group))
    if spec.gate is not None:
        # Groups that the predictor takes for zero: those that it nearly took for more come first.
        gate = pre[spec.gate].astype(jnp.float32)
        if spec.gate_bias is not None:
            gate = gate + vectors[spec.gate_bias].astype(jnp.float32)
        gate = gate.reshape(tokens, spec.groups, spec.group).max(-1)
        below = gate / (1 + jnp.abs(gate)) - 1 if spec.selects else jnp.minimum(gate, 0.0)
        rank = jnp.where(rank == 0, below, rank)
    # In the order of their places, so that equal energies are decided as `exact_ffn` does.
    return jnp.sort(top_k(rank, spec.candidate_groups)[1], axis=1)


def _own_hidden(
    x: Array,
    state: FFNState,
    layer: Array | int,
    groups: Array,
    scores: Array,
    spec: FFNSpec,
    activation: Activation,
) -> Array:
    """Exact h: [tokens, c, group] of each token's own groups i32[tokens, c]."""
    tokens, c = groups.shape
    rows = _gather(state.up, layer, groups).astype(spec.compute_dtype)
    # Plain matrices and vectors: an einsum over the groups was 19 times slower on CPU.
    pre = lax.dot_general(
        rows.reshape(tokens, -1, rows.shape[-1]),
        x,
        (((2,), (1,)), ((0,), (0,))),
        precision=spec.precision,
        preferred_element_type=spec.up_dtype,
    )
    if spec.selects:
        return _selected(pre, groups, scores, state, layer, spec, activation)
    if not state.vectors:  # nothing says which neuron is which
        own = jnp.moveaxis(pre.reshape(tokens, c, spec.projections, spec.group), 2, 0)
        h = activation(tuple(own.reshape(spec.projections, tokens, -1)), ())
        return h.reshape(tokens, c, spec.group)
    # The activation takes the same neurons for all tokens, so every token is given everyone's,
    # with everyone's products, and keeps what it asked for itself.
    pre = jnp.moveaxis(pre.reshape(tokens, c, spec.projections, spec.group), 2, 0)
    pre = jnp.broadcast_to(
        pre.reshape(spec.projections, 1, -1), (spec.projections, tokens, tokens * c * spec.group)
    )
    vectors = tuple(_gather(vector, layer, groups).reshape(-1) for vector in state.vectors)
    h = activation(tuple(pre), vectors).reshape(tokens, tokens, c, spec.group)
    return jnp.stack([h[token, token] for token in range(tokens)])


def _selected(
    pre: Array,
    groups: Array,
    scores: Array,
    state: FFNState,
    layer: Array | int,
    spec: FFNSpec,
    activation: Activation,
) -> Array:
    """h of each token's own groups where the activation looks at all neurons together."""
    tokens, c = groups.shape
    own = pre.reshape(tokens, c, spec.projections, spec.group)
    guessed = scores.astype(spec.up_dtype).reshape(
        tokens, spec.projections, spec.groups, spec.group
    )
    token = jnp.arange(tokens)[:, None]
    full = jnp.moveaxis(guessed, 1, 2).at[token, groups].set(own, mode="promise_in_bounds")
    every = jnp.moveaxis(full, 2, 0).reshape(spec.projections, tokens, spec.width)
    h = activation(tuple(every), _vectors(state, layer))
    h = h.reshape(tokens, spec.groups, spec.group)
    return jnp.take_along_axis(h, groups[:, :, None], axis=1, mode="promise_in_bounds")


def _all_hidden(
    x: Array, state: FFNState, layer: Array | int, spec: FFNSpec, activation: Activation
) -> Array:
    """Exact h: [tokens, f]."""
    rows = lax.dynamic_index_in_dim(state.up, layer, keepdims=False)
    pre = _up_product(x, rows.reshape(-1, rows.shape[-1]), spec)
    pre = pre.reshape(-1, spec.groups, spec.projections, spec.group)
    return activation(
        tuple(pre[:, :, p].reshape(-1, spec.width) for p in range(spec.projections)),
        _vectors(state, layer),
    )


def _vectors(state: FFNState, layer: Array | int) -> tuple[Array, ...]:
    """Each vector of a layer: [f]."""
    return tuple(
        lax.dynamic_index_in_dim(vector, layer, keepdims=False).reshape(-1)
        for vector in state.vectors
    )


def _down(h: Array, state: FFNState, layer: Array | int, spec: FFNSpec) -> Array:
    rows = lax.dynamic_index_in_dim(state.down, layer, keepdims=False)
    return _down_product(h, rows.reshape(spec.width, -1), spec)


def _up_product(x: Array, rows: Array, spec: FFNSpec) -> Array:
    """[tokens, n] of x: [tokens, d_in] and rows: [n, d_in]."""
    return lax.dot_general(
        x,
        rows.astype(spec.compute_dtype),
        (((1,), (1,)), ((), ())),
        precision=spec.precision,
        preferred_element_type=spec.up_dtype,
    )


def _down_product(h: Array, rows: Array, spec: FFNSpec) -> Array:
    """[tokens, d_out] of h: [tokens, n] and rows: [n, d_out]."""
    return lax.dot_general(
        h,
        rows.astype(h.dtype),
        (((1,), (0,)), ((), ())),
        precision=spec.precision,
        preferred_element_type=spec.down_dtype,
    )


def _energy(h: Array) -> Array:
    """f32[..., groups] of h: [..., groups, group]: Σ h², which ranks as its square root does."""
    energy = jnp.square(h.astype(jnp.float32)).sum(-1)
    # A NaN must be kept, to come out of the block; with its sign bit set it would rank last.
    return jnp.where(jnp.isnan(energy), jnp.inf, energy)


def _gather(stacked: Array, layer: Array | int, groups: Array) -> Array:
    """stacked[layer, groups]: [..., ...] of stacked: [L, G, ...] and groups: i32[...]."""
    layers, count = stacked.shape[:2]
    # One flat index: slicing the layer first would copy it.
    flat = stacked.reshape(layers * count, *stacked.shape[2:])
    return flat.at[groups + layer * count].get(mode="promise_in_bounds")
