"""Products with a weight, whichever side it stands on."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from hire_rewrite.passes.trace import trace
from hire_rewrite.patterns.linear import as_linear
from hire_rewrite.patterns.miss import Miss
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
    assert (linear.x_axis, linear.weight_in, linear.weight_out) == (x_axis, weight_in, weight_out)
    assert linear.out_axis == out_axis
    assert (linear.in_dim, linear.out_dim) == (4, 7)
    assert linear.out.shape[out_axis] == 7
    rest = [size for i, size in enumerate(linear.out.shape) if i != out_axis]
    assert tuple(rest) == linear.token_shape


def test_not_linear():
    assert linear_of(lambda w, x: x @ x.T + w[0, 0], W, X) is None  # no weight
    assert linear_of(lambda w, x: (w.T @ w).sum() + x, W, X) is None  # no activation


MISSES = {
    "batch": ("td,tdh->th", rand(3, 4, 7), X, "batch axis"),
    "several kept": ("td,dgh->tgh", rand(4, 2, 7), X, "keeps 2 axes"),
    "several contracted": ("btd,tdh->bh", rand(3, 4, 7), BATCH, "contracts 2"),
    "none kept": ("td,d->t", rand(4), X, "keeps 0 axes"),
}


@pytest.mark.parametrize("name", MISSES)
def test_miss(name):
    spec, w, x, reason = MISSES[name]
    with pytest.raises(Miss, match=reason):
        linear_of(lambda w, x: jnp.einsum(spec, x, w), w, x)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_chosen_by_an_activation(transposed):
    def fn(w, x):
        chosen = w[x[0, 0].astype(int)]
        return jnp.einsum("hd,td->th", chosen.T, x) if transposed else x @ chosen

    with pytest.raises(Miss, match="cut out at a place that is no weight"):
        linear_of(fn, rand(3, 4, 7), X)


def test_rows_chosen_by_an_activation_are_no_weight():
    """An embedding."""
    assert linear_of(lambda w, x: w.T[x.argmax(-1)] @ x.T, W, X) is None


def test_weight_is_what_depends_on_weights_alone():
    linear = linear_of(lambda w, x: x @ jax.nn.softmax(w.astype(jnp.bfloat16) * 2), W, X)
    assert linear.weight.node is not None
    assert linear.weight.dtype == jnp.bfloat16
