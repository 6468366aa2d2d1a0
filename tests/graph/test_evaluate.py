"""One equation at a time, with all that JAX attached to it."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.compute_on import compute_on
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import primitives as p
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hire_rewrite.graph.evaluate import evaluate, evaluate_inside, evaluate_part, run_node
from hire_rewrite.graph.flatten import flatten
from tests.cases import inputs

X = inputs(3, 4)
IS_CALL = "out_memory_spaces" in inspect.signature(compute_on).parameters


def nodes(fn, *args):
    return flatten(jax.make_jaxpr(fn)(*args)).nodes


def annotated(x):
    with jax.named_scope("layer"), set_xla_metadata(mark="here"):
        return jnp.sin(x)


@pytest.mark.parametrize(("run", "names"), [(evaluate, "layer"), (evaluate_inside, "")])
def test_names_and_annotations(run, names):
    (sin,) = nodes(annotated, X)
    (eqn,) = jax.make_jaxpr(lambda x: run(sin, [x]))(X).eqns
    assert eqn.primitive is p.sin_p
    assert str(eqn.source_info.name_stack) == names
    assert eqn.ctx.xla_metadata == {"mark": "here"}


def test_names_are_added_to_those_around():
    (sin,) = nodes(annotated, X)

    def fn(x):
        with jax.named_scope("model"):
            return evaluate(sin, [x])

    (eqn,) = jax.make_jaxpr(fn)(X).eqns
    assert str(eqn.source_info.name_stack) == "model/layer"


@pytest.mark.skipif(IS_CALL, reason="there, compute_on is a call")
def test_compute_type():
    def fn(x):
        with compute_on("device_host"):
            return jnp.sin(x)

    (sin,) = nodes(fn, X)
    for run in (evaluate, evaluate_inside):
        (eqn,) = jax.make_jaxpr(lambda x, run=run: run(sin, [x]))(X).eqns
        assert eqn.ctx.compute_type == "device_host"


def test_numbers_keep_their_weak_type():
    def fn(x):
        return x * 2

    (mul,) = nodes(fn, X.astype(jnp.bfloat16))
    env = {mul.ins[0]: X.astype(jnp.bfloat16)}
    run_node(mul, env)
    assert env[mul.outs[0]].dtype == jnp.bfloat16
    np.testing.assert_array_equal(env[mul.outs[0]], fn(X.astype(jnp.bfloat16)))


def test_several_results():
    (top,) = nodes(lambda x: lax.top_k(x, 2), X)
    for got, want in zip(evaluate(top, [X]), lax.top_k(X, 2), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_part_has_parameters_of_its_own():
    broadcast = nodes(lambda x: jnp.broadcast_to(x[:, None], (3, 4)), X[:, 0])[-1]
    (got,) = evaluate_part(broadcast, [X[:, :1]], shape=(3, 2))
    np.testing.assert_array_equal(got, jnp.broadcast_to(X[:, :1], (3, 2)))


def test_a_part_of_a_sharded_array():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
    constraint, sin = nodes(lambda x: jnp.sin(lax.with_sharding_constraint(x, sharding)), X)
    (part,) = evaluate_part(constraint, [X[:, :3]])
    np.testing.assert_array_equal(evaluate_part(sin, [part])[0], jnp.sin(X[:, :3]))
    (whole,) = jax.jit(lambda x: evaluate_inside(constraint, [x]))(X)
    assert whole.sharding.is_equivalent_to(sharding, 2)


def test_types_that_shard_are_left_to_the_compiler_inside_a_site():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((4, 8)), NamedSharding(mesh, PartitionSpec("x")))
        scope = flatten(jax.make_jaxpr(lambda x: jax.nn.relu(jnp.broadcast_to(x, (2, 4, 8))))(x))
    (call,) = (entry for entry in scope.root.entries if not hasattr(entry, "index"))
    values = -jnp.ones(call.ins[0].shape)
    np.testing.assert_array_equal(evaluate_inside(call, [values])[0], 0 * values)
