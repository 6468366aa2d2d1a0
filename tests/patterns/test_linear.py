"""Products with a weight, whichever side it stands on."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from hire_rewrite.graph.trace import trace
from hire_rewrite.patterns.axes import Window
from hire_rewrite.patterns.linear import as_linear
from hire_rewrite.patterns.refusal import NoMatch, Refusal
from tests.cases import inputs, rand

W, X, BATCH = rand(4, 7), inputs(3, 4), inputs(2, 3, 4)


def linear_of(fn, w, *xs):
    traced = trace(fn, (w, *xs), {}, (0,))
    (node,) = (n for n in traced.scope.nodes if str(n.primitive) == "dot_general")
    return as_linear(node, traced.provenance)


FORMS = {
    "x w": (lambda w, x: x @ w, W, X, (1, 0, 1, 1)),
    "x w.T": (lambda w, x: lax.dot_general(x, w, (((1,), (1,)), ((), ()))), W.T, X, (1, 1, 0, 1)),
    "w x": (lambda w, x: w @ x.T, W.T, X, (0, 1, 0, 0)),
    "w.T x": (lambda w, x: lax.dot_general(w, x, (((0,), (1,)), ((), ()))), W, X, (1, 0, 1, 0)),
    "vector": (lambda w, x: x @ w, W, X[0], (0, 0, 1, 0)),
    "batch": (lambda w, x: x @ w, W, BATCH, (2, 0, 1, 2)),
    "middle axis": (
        lambda w, x: lax.dot_general(x, w, (((1,), (0,)), ((), ()))),
        W,
        BATCH.swapaxes(1, 2),
        (1, 0, 1, 2),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_axes(name):
    fn, w, x, (x_axis, weight_in, weight_out, out_axis) = FORMS[name]
    if name == "w x":
        fn = lambda w, x: lax.dot_general(w, x, (((1,), (0,)), ((), ())))  # noqa: E731
        x = x.T
    linear = linear_of(fn, w, x)
    assert (linear.x_axes, linear.weight_in) == ((x_axis,), (weight_in,))
    assert linear.free == ((weight_out, out_axis),)
    assert (linear.in_dim, linear.out_dim, linear.experts()) == (4, 7, 1)
    assert linear.out.shape[out_axis] == 7
    assert linear.tokens == x.size // 4


def test_not_linear():
    assert linear_of(lambda w, x: x @ x.T + w[0, 0], W, X) is None  # no weight
    assert linear_of(lambda w, x: (w.T @ w).sum() + x, W, X) is None  # no activation


def test_several_axes():
    fused = linear_of(lambda w, x: jnp.einsum("td,dgh->tgh", x, w), rand(4, 2, 7), X)
    assert fused.free == ((1, 1), (2, 2))
    assert fused.experts(Window(2, 7)) == 2
    assert fused.experts(Window(2, 7, picks=((1, 0),))) == 1
    heads = linear_of(lambda w, x: jnp.einsum("btd,tdh->bh", x, w), rand(3, 4, 7), BATCH)
    assert (heads.x_axes, heads.weight_in, heads.in_dim) == ((2, 1), (1, 0), 12)
    assert linear_of(lambda w, x: x @ w, rand(4), X).out_dim == 1


def test_experts_side_by_side():
    experts = linear_of(lambda w, x: jnp.einsum("etd,edh->eth", x, w), rand(2, 4, 7), BATCH)
    assert experts.batch == ((0, 0, 0),)
    assert (experts.experts(), experts.tokens) == (2, 3)


def test_ragged_dot():
    traced = trace(lax.ragged_dot, (X, rand(2, 4, 7), jnp.array([1, 2])), {}, (1,))
    with pytest.raises(NoMatch, match="which of its 2 experts") as refused:
        as_linear(traced.scope.nodes[-1], traced.provenance)
    assert refused.value.refusal is Refusal.UNSUPPORTED


def convolution(width, **kwargs):
    def fn(w, x):
        kind = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(x, w, (1,), "VALID", dimension_numbers=kind, **kwargs)

    traced = trace(fn, (rand(width, 4, 7), BATCH), {}, (0,))
    return as_linear(traced.scope.nodes[-1], traced.provenance)


def test_convolution():
    linear = convolution(1)
    assert (linear.x_axes, linear.weight_in, linear.free) == ((2,), (1,), ((2, 2),))
    with pytest.raises(NoMatch, match=r"a convolution over \[3\] positions"):
        convolution(3)
    with pytest.raises(NoMatch, match="strides, padding, groups"):
        convolution(1, rhs_dilation=(2,))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_chosen_by_an_activation(transposed):
    def fn(w, x):
        chosen = w[x[0, 0].astype(int)]
        return jnp.einsum("hd,td->th", chosen.T, x) if transposed else x @ chosen

    with pytest.raises(NoMatch, match="cut out at a place that is not a weight"):
        linear_of(fn, rand(3, 4, 7), X)


def test_rows_chosen_by_an_activation_are_no_weight():
    """An embedding."""
    assert linear_of(lambda w, x: w.T[x.argmax(-1)] @ x.T, W, X) is None


def test_weight_is_what_depends_on_weights_alone():
    linear = linear_of(lambda w, x: x @ jax.nn.softmax(w.astype(jnp.bfloat16) * 2), W, X)
    assert linear.weight.node is not None
    assert linear.weight.dtype == jnp.bfloat16
