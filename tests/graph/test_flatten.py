"""A function flattened: calls inlined, loops and branches as scopes, each value once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hire_rewrite.graph.evaluate import evaluate, look_up
from hire_rewrite.graph.flatten import flatten, inner_jaxprs
from hire_rewrite.graph.nodes import Frame, Node
from tests.cases import inputs

X = inputs(3, 4)
LITERAL = np.arange(4, dtype=np.float32)


def flat(fn, *args):
    return flatten(jax.make_jaxpr(fn)(*args))


def names(scope):
    return [str(node.primitive) for node in scope.nodes]


def run(scope, *arrays):
    """The scope's results, one equation at a time."""
    env = dict(zip(scope.inputs, arrays, strict=True))
    for node in scope.nodes:
        results = evaluate(node, [look_up(value, env) for value in node.ins])
        env.update(zip(node.outs, results, strict=True))
    return [look_up(value, env) for value in scope.outputs]


@pytest.mark.parametrize(
    "call",
    [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.jit(f)), lambda f: jax.vmap(jax.jit(f))],
)
def test_calls_are_inlined(call):
    scope = flat(lambda x: call(lambda x: jnp.sin(jnp.cos(x)))(x + 1) * 2, X)
    assert names(scope) == ["add", "cos", "sin", "mul"]
    assert [node.index for node in scope.nodes] == [0, 1, 2, 3]
    add, cos, sin, mul = scope.nodes
    assert cos.ins == add.outs
    assert add.outs[0].users == [(cos, 0)]
    assert sin.outs[0].users == [(mul, 0)]


def test_custom_derivatives_are_inlined():
    assert names(flat(lambda x: jax.nn.relu(x) + 1, X)) == ["max", "add"]
    fn = jax.custom_vjp(lambda x: jnp.sin(x))
    fn.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    assert names(flat(lambda x: fn(x) + 1, X)) == ["sin", "add"]


def test_a_shared_call_is_inlined_each_time():
    f = jax.jit(lambda x: jnp.sin(x) + 1)
    scope = flat(lambda x: f(f(x)), X)
    assert names(scope) == ["sin", "add", "sin", "add"]
    first, second = (entry for entry in scope.root.entries)
    assert isinstance(first, Frame)
    assert first.eqn.params["jaxpr"] is second.eqn.params["jaxpr"]
    assert len({value for node in scope.nodes for value in node.outs}) == 4
    assert second.ins == first.outs


def test_frames_nest():
    scope = flat(lambda x: jax.jit(lambda x: jax.jit(jnp.sin)(x) + 1)(x), X)
    (outer,) = scope.root.entries
    inner, add = outer.entries
    assert (outer.parent, inner.parent) == (scope.root, outer)
    assert isinstance(inner, Frame)
    assert isinstance(add, Node)
    assert [str(n.primitive) for n in outer.nodes()] == ["sin", "add"]
    assert scope.nodes[0].frame is inner
    assert outer.outs == tuple(scope.outputs)


def test_a_call_that_hands_operands_through():
    scope = flat(lambda x: jax.jit(lambda x, y: (y, jnp.sin(x), x, 3.0))(x, x + 1), X)
    add, sin = scope.nodes
    through, sine, x, three = scope.outputs
    assert through is add.outs[0]
    assert sine is sin.outs[0]
    assert x is scope.inputs[0]
    assert float(three.literal) == 3.0


def test_literals_and_closed_arrays():
    scope = flat(lambda x: jax.jit(lambda x: x * LITERAL + 2.0)(x), X)
    mul, add = (node for node in scope.nodes if node.primitive.name in ("mul", "add"))
    number = add.ins[1]
    assert number.literal == 2.0
    assert not number.is_input
    (array,) = (
        value
        for node in scope.nodes
        for value in node.ins
        if value.const is not None and value.literal is None
    )
    np.testing.assert_array_equal(np.ravel(array.const), LITERAL)
    assert mul.ins[0] is scope.inputs[0]
    np.testing.assert_array_equal(run(scope, X)[0], X * LITERAL + 2)


def test_closed_arrays_in_a_loop():
    scope = flat(lambda x: lax.scan(lambda c, r: (c * LITERAL, r + LITERAL), x[0], x)[1], X)
    np.testing.assert_array_equal(run(scope, X)[0], X + LITERAL)


def test_scan():
    def fn(w, x):
        return lax.scan(lambda c, r: (c + r * w, c), x[0], x)

    scope = flat(fn, jnp.float32(2), X)
    node = next(node for node in scope.nodes if node.bodies)
    (body,) = node.bodies
    assert [link.role for link in body.inputs] == ["const", "carry", "slice"]
    assert (body.scope.length, body.scope.parent) == (3, node)
    assert [link.outer for link in body.inputs] == list(node.ins)
    carry, stacked = body.outputs
    assert (carry.outer, carry.feeds) == (0, ((0, 1),))
    assert (stacked.outer, stacked.feeds) == (1, ())
    assert list(scope.walk()) == [scope, body.scope]
    assert list(body.scope.ancestors()) == [body.scope, scope]


def test_while_loop():
    def fn(n, w, x):
        return lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] * w), (0, x))

    scope = flat(fn, 3, 2.0, X)
    (node,) = (node for node in scope.nodes if node.bodies)
    cond, body = node.bodies
    assert [link.role for link in cond.inputs] == ["const", "carry", "carry"]
    assert [link.role for link in body.inputs] == ["const", "carry", "carry"]
    assert cond.inputs[0].outer is scope.inputs[0]
    assert body.inputs[0].outer is scope.inputs[1]
    assert (cond.scope.length, body.scope.length) == (None, None)
    assert [output.outer for output in cond.outputs] == [None]
    assert [output.feeds for output in body.outputs] == [((0, 1), (1, 1)), ((0, 2), (1, 2))]


def test_cond():
    scope = flat(lambda i, x: lax.switch(i, [jnp.sin, lambda x: x * 2, jnp.cos], x), 1, X)
    (node,) = (node for node in scope.nodes if node.bodies)
    assert [names(body.scope) for body in node.bodies] == [["sin"], ["mul"], ["cos"]]
    assert node.controls == node.ins[:1]
    assert all(body.scope.length == 1 for body in node.bodies)
    assert all(body.inputs[0].outer is scope.inputs[1] for body in node.bodies)


FUNCTIONS = {
    "jit": lambda x: jax.jit(lambda x, y: (x - y, y))(x, x * 2),
    "same operand twice": lambda x: jax.jit(lambda x, y: x - 2 * y)(x, x),
    "scan": lambda x: lax.scan(lambda c, r: (c * 0.5 + r, c.sum()), x[0], x),
    "while": lambda x: lax.while_loop(lambda s: s.sum() < 50, lambda s: s * s + 1, x),
    "cond": lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x),
    "checkpoint": lambda x: jax.checkpoint(lambda x: jax.nn.silu(x) * 2)(x),
    "random": lambda x: x + jax.random.normal(jax.random.key(0), x.shape),
    "grad": jax.grad(lambda x: jax.nn.gelu(x).sum()),
    "weak": lambda x: (x * 2, 1.0, jnp.where(x > 0, 1.0, 0)),
    "identity": lambda x: x,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_evaluating_every_equation_is_running(name):
    fn = FUNCTIONS[name]
    got, want = run(flat(fn, X), X), jax.tree.leaves(fn(X))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_evaluate_a_whole_call():
    scope = flat(lambda x: jax.jit(lambda x: (jnp.sin(x), x))(x + 1), X)
    (call,) = (entry for entry in scope.root.entries if isinstance(entry, Frame))
    sine, x = evaluate(call, [X])
    np.testing.assert_array_equal(sine, jnp.sin(X))
    np.testing.assert_array_equal(x, X)


def test_inner_jaxprs():
    def count(fn):
        (eqn,) = (e for e in jax.make_jaxpr(fn)(X).eqns if e.params.keys() & PARAMS)
        return len(inner_jaxprs(eqn))

    PARAMS = {"jaxpr", "branches", "body_jaxpr"}
    assert count(jax.jit(jnp.sin)) == 1
    assert count(lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x)) == 2
    assert count(lambda x: lax.while_loop(lambda s: s.sum() < 0, jnp.sin, x)) == 2


def test_shardings_of_a_nested_jit_are_constraints():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    rows, columns = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), (None, "x")))
    call = jax.jit(
        lambda x, y: (jnp.sin(x), y), in_shardings=(rows, None), out_shardings=(None, columns)
    )
    scope = flat(lambda x: call(x, x + 1)[1] * 2, inputs(4, 4))
    add, before, sin, behind, mul = scope.nodes
    assert names(scope) == ["add", "sharding_constraint", "sin", "sharding_constraint", "mul"]
    assert [before.params["sharding"], behind.params["sharding"]] == [rows, columns]
    assert (sin.ins[0], behind.ins[0]) == (before.outs[0], add.outs[0])
    assert mul.ins[0] is behind.outs[0]  # though the call only hands it through
    assert before.frame is behind.frame is sin.frame


def test_a_call_with_a_derivative_that_hands_its_operand_through():
    clip = jax.custom_vjp(lambda x: x)
    clip.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))
    scope = flat(lambda x: jnp.sin(clip(x)), X)
    (call, sin) = scope.root.entries
    assert isinstance(call, Frame)
    assert sin.ins == call.outs
    assert sin.ins[0] is not scope.inputs[0]
