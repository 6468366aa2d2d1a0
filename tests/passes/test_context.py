"""A replacement stands under the names and the annotations of what it replaces."""

import inspect
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.compute_on import compute_on
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hire_rewrite as hire
from tests.cases import FEW, FULL, D, F, close, inputs, packed, rand, run

LAYERS = 4
PARAMS = [{"up": rand(D, F, seed=i), "down": rand(F, D, seed=i)} for i in range(LAYERS)]
X = inputs(1, D)
IS_CALL = "out_memory_spaces" in inspect.signature(compute_on).parameters


def block(layer, x):
    return jax.nn.relu(x @ layer["up"]) @ layer["down"]


def named(fn, name):
    fn.__name__ = name
    return fn


def scopes(params, x):
    for i, layer in enumerate(params):
        with jax.named_scope(f"layer_{i}"):
            x = x + block(layer, x)
    return x


def jits(params, x):
    for i, layer in enumerate(params):
        x = jax.jit(named(lambda layer, x: x + block(layer, x), f"layer_{i}"))(layer, x)
    return x


def halves(params, x):
    """Each layer in a scope, with its matrices in calls of their own."""
    for i, layer in enumerate(params):
        with jax.named_scope(f"layer_{i}"):
            hidden = jax.jit(named(lambda x, w: jax.nn.relu(x @ w), "up"))(x, layer["up"])
            x = x + jax.jit(named(lambda h, w: h @ w, "down"))(hidden, layer["down"])
    return x


def names_in(step, *args):
    """The names of the operations of a compiled program."""
    options = {"xla_backend_optimization_level": 0}
    text = jax.jit(step).lower(*args).compile(options).as_text()
    return set(re.findall(r'op_name="([^"]*)"', text))


@pytest.mark.parametrize(
    ("fn", "stack"),
    [(scopes, "layer_{}"), (jits, "jit(layer_{})"), (halves, "layer_{}")],
)
def test_each_layer_is_named(fn, stack):
    step = hire.transform(fn, *FEW)
    found = names_in(step, packed(step, PARAMS, X), X)
    for i in range(LAYERS):
        assert any(f"/{stack.format(i)}/jit(hire_ffn)/" in name for name in found)
    assert not any(f"jit({fn.__name__})/jit(hire_ffn)" in name for name in found)


def test_a_loop_and_a_branch_are_named():
    def fn(params, x):
        with jax.named_scope("model"):
            loop = lambda x, layer: (x + block(layer, x), None)  # noqa: E731
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
            return lax.cond(x[0, 0] < 9, lambda x: lax.scan(loop, x, stacked)[0], jnp.sin, x)

    step = hire.transform(fn, *FEW)
    found = names_in(step, packed(step, PARAMS, X), X)
    assert any(re.search(r"/model/.*cond.*while.*hire_ffn", name) for name in found)


def test_what_is_left_of_a_call_keeps_its_name():
    def fn(params, x):
        half = lambda x, w: (jnp.exp(x), jax.nn.relu(x @ w))  # noqa: E731
        y, hidden = jax.jit(named(half, "half"))(x, params[0]["up"])
        return y + hidden @ params[0]["down"]

    step = hire.transform(fn, *FEW)
    found = names_in(step, packed(step, PARAMS, X), X)
    assert any("jit(half)/exp" in name for name in found)


def test_shardings_of_a_nested_jit():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    columns = NamedSharding(mesh, PartitionSpec(None, "x"))

    def fn(params, x):
        call = jax.jit(named(block, "layer_0"), out_shardings=columns, keep_unused=True)
        return call(params[0], x) * 2

    step = hire.transform(fn, *FULL)
    weights = packed(step, PARAMS, X)
    close(run(step, weights, X), run(fn, PARAMS, X))
    text = jax.jit(step).lower(weights, X).as_text()
    assert "sharding_constraint" in text
    assert "hire_ffn" in text


def annotated(params, x):
    with set_xla_metadata(mark="all_of_it"):
        return block(params[0], x)


def annotated_loop(params, x):
    def step(x, _):
        with set_xla_metadata(mark="all_of_it"):
            return block(params[0], x), None

    return lax.scan(step, x, None, length=2)[0]


@pytest.mark.parametrize("fn", [annotated, annotated_loop])
def test_metadata(fn):
    step = hire.transform(fn, *FULL)
    weights = packed(step, PARAMS, X)
    (site,) = step.plan(PARAMS, X).sites
    assert site.status == "rewritten"
    text = jax.jit(step).lower(weights, X).as_text()
    assert re.search(r"call @hire_ffn.*all_of_it", text)
    close(run(step, weights, X), run(fn, PARAMS, X))


@pytest.mark.skipif(IS_CALL, reason="there, compute_on is a call")
def test_compute_type():
    def fn(params, x):
        def step(x, _):
            with compute_on("device_host"):
                return block(params[0], x), None

        return lax.scan(step, x, None, length=2)[0]

    step = hire.transform(fn, *FULL)
    text = jax.jit(step).lower(packed(step, PARAMS, X), X).as_text()
    assert re.search(r'call @hire_ffn.*_xla_compute_type = "host"', text)


def test_metadata_on_a_part_of_a_site():
    def fn(params, x):
        with set_xla_metadata(mark="one_product"):
            hidden = x @ params[0]["up"]
        return jax.nn.relu(hidden) @ params[0]["down"]

    step = hire.transform(fn, *FULL)
    (site,) = step.plan(PARAMS, X).sites
    assert site.status == "dense"
    weights = packed(step, PARAMS, X)
    assert "one_product" in jax.jit(step).lower(weights, X).as_text()
    close(run(step, weights, X), run(fn, PARAMS, X))
