"""Activations are named by what they compute, in float32 and bfloat16."""

import jax
import jax.numpy as jnp
import pytest

from tests.cases import F, T, found_in, inputs
from tests.cases_activation import ACTIVATIONS
from tests.cases_ffn import BF16, BIASED, GATED, PLAIN, SCALE, gated, plain, up_first

SPARSE = {"relu", "relu2", "relu6"}


def activation(fn, params, x=None):
    _, (found,) = found_in(fn, params, inputs(T, 16) if x is None else x)
    return found.match.activation


@pytest.mark.parametrize("form", [plain, gated, up_first])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_bfloat16(name, form):
    x = inputs(T, 16, dtype=jnp.bfloat16)
    found = activation(form(ACTIVATIONS[name]), BF16, x)
    # Eight bits tell neither of these apart.
    alike = {"gelu": "gelu_tanh", "gelu_tanh": "gelu"}
    assert found.name in (name, alike.get(name))
    assert found.sparse == (name in SPARSE)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_sparse_and_gate(name):
    """The gate is the projection that goes through the activation, in the order traced."""
    one = activation(plain(ACTIVATIONS[name]), PLAIN)
    assert (one.name, one.gate, one.sparse) == (name, 0, name in SPARSE)
    first = activation(gated(ACTIVATIONS[name]), GATED)
    assert (first.name, first.gate, first.sparse) == (name, 0, name in SPARSE)
    second = activation(up_first(ACTIVATIONS[name]), GATED)
    assert (second.name, second.gate, second.sparse) == (name, 1, name in SPARSE)


@pytest.mark.parametrize("tokens", [1, T])
def test_gate_bias(tokens):
    x = inputs(tokens, 16)
    fn = lambda p, x: jax.nn.relu(x @ p["up"] + p["b1"]) @ p["down"]  # noqa: E731
    assert activation(fn, BIASED, x).gate_bias == 0
    fn = lambda p, x: (jax.nn.relu(x @ p["up"]) + p["b1"]) @ p["down"]  # noqa: E731
    found = activation(fn, BIASED, x)
    assert found.gate_bias is None
    assert found.name == "relu"


def test_gate_bias_among_other_vectors():
    params = GATED | {"b": inputs(F), "c": inputs(F, seed=1), "s": SCALE}

    def fn(p, x):
        up = x @ p["up"] + p["c"]
        return (jax.nn.relu(x @ p["gate"] + p["b"]) * up * p["s"]) @ p["down"]

    _, (found,) = found_in(fn, params, inputs(T, 16))
    match = found.match
    assert (match.activation.name, match.activation.sparse) == ("relu", True)
    bias = match.region.vectors[match.activation.gate_bias].value
    (x, y) = (value.scope.inputs.index(value.node.ins[0]) for value in (bias, bias))
    assert x == y == sorted(params).index("b")


def test_a_scale_that_may_be_negative_is_not_sparse():
    params = PLAIN | {"s": SCALE}
    before = activation(lambda p, x: jax.nn.relu(x @ p["up"] * p["s"]) @ p["down"], params)
    assert (before.name, before.sparse) == ("relu", False)
    after = activation(lambda p, x: (jax.nn.relu(x @ p["up"]) * p["s"]) @ p["down"], params)
    assert (after.name, after.sparse) == ("relu", True)


def test_three_projections():
    params = GATED | {"third": GATED["up"] * 2}

    def fn(p, x):
        return (jax.nn.relu(x @ p["gate"]) * (x @ p["up"]) * (x @ p["third"])) @ p["down"]

    found = activation(fn, params)
    assert (found.name, found.sparse) == ("custom", False)


def test_both_projections_activated():
    fn = lambda p, x: (jnp.tanh(x @ p["gate"]) * jax.nn.sigmoid(x @ p["up"])) @ p["down"]  # noqa: E731
    assert activation(fn, GATED).name == "custom"
    # Positive factors pass through relu, so it looks linear in both unless signs are tried.
    fn = lambda p, x: (jax.nn.relu(x @ p["gate"]) * jax.nn.relu(x @ p["up"])) @ p["down"]  # noqa: E731
    assert activation(fn, GATED).name == "custom"


def test_numbers_that_are_computed_are_no_weights():
    """`jnp.where(h > 0, h, 0)` casts its zero to the dtype of h."""
    for tokens in (1, T):
        fn = plain(lambda h: jnp.where(h > 0, h, 0))
        _, (found,) = found_in(fn, PLAIN, inputs(tokens, 16))
        match = found.match
        assert (match.activation.name, match.activation.sparse) == ("relu", True)
        assert match.region.vectors == ()
