"""`checkpoint` and custom derivatives as calls of JAX's new kind: flags that will be defaults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

import hire_rewrite as hire
from hire_rewrite.graph.flatten import flatten
from tests.cases import FULL, D, F, V, close, inputs, packed, rand, run
from tests.same import replaced, same

X = inputs(3, 4)
FLAGS = ("jax_remat3", "jax_custom_vjp3", "jax_custom_jvp3")


@pytest.fixture(autouse=True)
def flags():
    before = {flag: getattr(jax.config, flag) for flag in FLAGS if hasattr(jax.config, flag)}
    for flag in before:
        jax.config.update(flag, True)
    yield
    for flag, value in before.items():
        jax.config.update(flag, value)


def square():
    fn = jax.custom_vjp(lambda x: jnp.square(x))
    fn.defvjp(lambda x: (x * x, x), lambda x, g: (2 * x * g,))
    return fn


def twice():
    fn = jax.custom_jvp(lambda x: x * 2)
    fn.defjvp(lambda p, t: (fn(*p), t[0] * 2))
    return fn


def names(fn, *args):
    return [str(node.primitive) for node in flatten(jax.make_jaxpr(fn)(*args)).nodes]


def test_they_are_inlined():
    checkpoint = jax.checkpoint(lambda x: jnp.sin(x) * 3)
    assert names(lambda x: checkpoint(square()(x)), X) == ["square", "sin", "mul"]
    assert names(lambda x: jax.vmap(square())(twice()(x)), X) == ["mul", "square"]
    assert names(lambda x: checkpoint_name(jnp.sin(x), "kept") + 1, X) == ["sin", "copy", "add"]


def test_collectives_inside():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    fn = jax.checkpoint(lambda x: lax.psum(jnp.sin(x), "x"))
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec())
    (node,) = flatten(jax.make_jaxpr(mapped)(inputs(4))).nodes
    assert str(node.bodies[0].scope.nodes[0].primitive) == "sin"


@pytest.mark.parametrize(
    "fn",
    [
        jax.checkpoint(lambda x: jnp.sin(x) * 2),
        lambda x: square()(jnp.sin(x)),
        lambda x: twice()(jnp.sin(x)) + jax.nn.relu(x),
        lambda x: jnp.sin(checkpoint_name(x, "kept")),
    ],
)
def test_replacing_by_the_same(fn):
    same(replaced(fn, X)[0], run(fn, X))


def test_a_checkpoint_stays_one():
    saved = jax.checkpoint_policies.save_only_these_names("kept")
    fn = jax.checkpoint(lambda x: jnp.sin(checkpoint_name(jnp.cos(x), "kept")), policy=saved)
    rewritten = replaced(fn, X)[2]
    (eqn,) = jax.make_jaxpr(lambda x: rewritten({0: x})[0])(X).eqns
    assert "kept" in str(eqn)
    loss = lambda x: rewritten({0: x})[0][0].sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(X), jax.grad(lambda x: fn(x).sum())(X), rtol=1e-6)


def ffn(params, x, activation):
    return x + activation(x @ params["up"]) @ params["down"]


@pytest.mark.parametrize(
    "block",
    [
        lambda p, x: ffn(p, x, jax.nn.silu),
        jax.checkpoint(lambda p, x: ffn(p, x, jax.nn.relu)),
        lambda p, x: ffn(p, x, square()),
    ],
    ids=["jvp", "remat", "vjp"],
)
def test_sites_are_found(block):
    fn = lambda p, x: block(p, x) @ p["head"]  # noqa: E731
    params = {"up": rand(D, F), "down": rand(F, D), "head": rand(D, V)}
    x = inputs(1, D)
    step = hire.transform(fn, *FULL)
    plan = step.plan(params, x)
    assert sorted(site.kind for site in plan.sites) == ["ffn", "head"]
    close(run(step, packed(step, params, x), x), run(fn, params, x))
