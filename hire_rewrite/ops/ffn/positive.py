"""The feed-forward block without the neurons that its own activation makes zero: nothing is lost.

Behind a ReLU a neuron that is not positive is exactly zero, and its rows need not be read. Which
ones are, is told by the first product itself, or by a guess of it in few bits with a bound of its
error: a neuron is left out if, whatever lies within the bound, its activation is zero. There is no
k: how many neurons are read the data say, token by token.

`dense_positive_ffn` is what this computes, up to the rounding of sums. With a bound that is not
proved, but a multiple of the error's standard deviation, few positive neurons are missed.

Which neurons are left out is a constant to a derivative: where a ReLU is zero it does not rise, so
that the derivative is the dense one too (but where a pre-activation is zero itself, and a ReLU has
none: jax takes 0 in `jax.nn.relu` and 1/2 in `jnp.maximum`).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from hire_rewrite.ops.ffn.block import Activation
from hire_rewrite.ops.ffn.positive_layer import PositiveFFNSpec, PositiveFFNState, PositiveLayer
from hire_rewrite.ops.quality import Comparison, Measured, Reading
from hire_rewrite.ops.top_k.listed import listed
from hire_rewrite.ops.usage import Usage

__all__ = [
    "PositiveFFNSpec",
    "PositiveFFNState",
    "counted_positive_ffn",
    "dense_positive_ffn",
    "measured_positive_ffn",
    "positive_ffn",
    "unsettled",
]


def positive_ffn(
    x: Array,
    state: PositiveFFNState,
    layer: Array | int,
    *,
    spec: PositiveFFNSpec,
    activation: Activation,
) -> Array:
    """The block on the neurons that may not be zero.

    Each token has a list of its own, so that its result does not depend (but for rounding) on the
    tokens beside it.

    Args:
      x: [tokens, d_in].
      state: see `PositiveFFNState`.
      layer: i32[], the index into the leading axis of the arrays.

    Returns:
      spec.down_dtype[tokens, d_out]. NaN where x is.

    Examples:
      >>> import jax
      >>> from hire_rewrite.ops.encodings import Float
      >>> up, down = jax.random.normal(jax.random.key(0), (2, 64, 32))  # a row for each neuron
      >>> f32, rows = jnp.dtype("float32"), Float("float32")
      >>> spec = PositiveFFNSpec(
      ...     up_dtype=f32, down_dtype=f32, precision=None, compute_dtype=f32, width=64,
      ...     d_out=32, projections=1, gates=(0,), budget=64, up=rows, down=rows,
      ... )
      >>> state = PositiveFFNState(
      ...     {"rows": up[None]}, {}, {"rows": down[None]}, (), {}, {},
      ...     norms=jnp.linalg.norm(up, axis=1)[None, None],
      ... )
      >>> def relu(pre, vectors):
      ...     return jax.nn.relu(pre[0])
      >>> x = jnp.ones((1, 32))
      >>> y = positive_ffn(x, state, 0, spec=spec, activation=relu)
      >>> bool(jnp.allclose(y, jax.nn.relu(x @ up.T) @ down, atol=1e-4))
      True
    """
    return counted_positive_ffn(x, state, layer, spec=spec, activation=activation)[0]


def counted_positive_ffn(
    x: Array,
    state: PositiveFFNState,
    layer: Array | int,
    *,
    spec: PositiveFFNSpec,
    activation: Activation,
) -> tuple[Array, Usage]:
    """`positive_ffn`, and what it read: neurons of each token."""
    block = PositiveLayer(state, layer, spec, activation)
    gates = block.gates(x)
    mask = block.unsettled(x, gates)

    def whole() -> Array:
        return block.down(_masked(block.hidden(x, gates), mask))

    if not isinstance(x.shape[0], int):  # a symbol
        return whole(), Usage(whole=True)
    neurons, counts = listed(mask, k=spec.budget)

    def gathered() -> Array:
        return block.gathered(x, gates, neurons)

    if spec.budget == spec.width:
        return gathered(), Usage(counts)
    over = (counts > spec.budget).any()
    return lax.cond(over, whole, gathered), Usage(counts, whole=over)


def dense_positive_ffn(
    x: Array,
    state: PositiveFFNState,
    layer: Array | int,
    *,
    spec: PositiveFFNSpec,
    activation: Activation,
) -> Array:
    """The block on all of its neurons in dense arithmetic, for x: [tokens, d_in]."""
    block = PositiveLayer(state, layer, spec, activation)
    return block.down(block.hidden(x, block.gates(x)))


def measured_positive_ffn(
    x: Array,
    state: PositiveFFNState,
    layer: Array | int,
    *,
    spec: PositiveFFNSpec,
    activation: Activation,
) -> Measured:
    """Results [tokens, d_out] for x: [tokens, d_in]; the exact one is the dense one."""
    block = PositiveLayer(state, layer, spec, activation)
    gates = block.gates(x)
    h, mask = block.hidden(x, gates), block.unsettled(x, gates)
    dense, rewritten = block.down(h), block.down(_masked(h, mask))
    reading = Reading(h != 0, mask, mask.sum(1) > spec.budget)
    return Measured(dense, rewritten, Comparison(dense, dense, rewritten, reading=reading))


def unsettled(
    x: Array,
    state: PositiveFFNState,
    layer: Array | int,
    *,
    spec: PositiveFFNSpec,
    activation: Activation,
) -> Array:
    """bool[tokens, f], the neurons that may not be zero, for x: [tokens, d_in]."""
    block = PositiveLayer(state, layer, spec, activation)
    return block.unsettled(x, block.gates(x))


def _masked(h: Array, mask: Array) -> Array:
    """h where the mask is true, and zero elsewhere; [tokens, f] both."""
    return jnp.where(mask, h, jnp.zeros_like(h))
