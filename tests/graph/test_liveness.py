"""What is needed for the results, through loops and branches, and when nodes are replaced."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from hire_rewrite.graph.flatten import flatten
from hire_rewrite.graph.liveness import liveness
from tests.cases import inputs

X = inputs(3, 4)


@dataclasses.dataclass(eq=False)
class Unit:
    nodes: frozenset
    inputs: tuple


def view(fn, *args):
    return flatten(jax.make_jaxpr(fn)(*args))


def live_names(scope, units=None):
    live = liveness(scope, units)
    return sorted(str(node.primitive) for node in live.nodes)


def live_inputs(scope, units=None):
    live = liveness(scope, units)
    return [value in live.values for value in scope.inputs]


def test_dead_code():
    def fn(x, y):
        jnp.cos(y) + 1
        return jnp.sin(x)

    scope = view(fn, X, X)
    assert live_names(scope) == ["sin"]
    assert live_inputs(scope) == [True, False]
    # An equation that nobody needs is no user.
    assert liveness(scope).users(scope.inputs[1]) == []


def test_dead_code_in_a_call():
    def fn(x, y):
        return jax.jit(lambda x, y: (jnp.sin(x), jnp.cos(y)))(x, y)[0]

    scope = view(fn, X, X)
    assert live_names(scope) == ["sin"]


def test_effects_are_needed():
    def fn(x, y):
        jax.debug.print("{}", jnp.cos(y))
        return jnp.sin(x)

    assert live_inputs(view(fn, X, X)) == [True, True]


def test_dead_outputs_and_carries_of_a_scan():
    def fn(x, y, z):
        def body(state, row):
            a, b, c = state
            return (a + row, b * 2, c - 1), (jnp.sin(a), jnp.cos(b), jnp.tan(c))

        (a, _, _), (_, cosines, _) = lax.scan(body, (x, y, z), jnp.stack([x, x]))
        return a, cosines

    scope = view(fn, X, X, X)
    assert live_inputs(scope) == [True, True, False]
    live = liveness(scope)
    body = next(node for node in scope.nodes if node.bodies).bodies[0].scope
    names = [str(node.primitive) for node in body.nodes if node in live.nodes]
    assert sorted(names) == ["add", "cos", "mul"]


def test_a_carry_that_feeds_another_later():
    """The last carry needs the one before, and that one the first."""

    def fn(x, y, z, dead):
        def body(state, _):
            a, b, c, d = state
            return (a * 2, a + b, b + c, d + a), None

        return lax.scan(body, (x, y, z, dead), length=5)[0][2]

    assert live_inputs(view(fn, X, X, X, X)) == [True, True, True, False]


def test_a_carry_that_only_feeds_itself_is_dead():
    def fn(x, y):
        return lax.while_loop(lambda s: s[0].sum() < 3, lambda s: (s[0] + 1, s[1] * s[0]), (x, y))[
            0
        ]

    assert live_inputs(view(fn, X, X)) == [True, False]


def test_a_condition_is_needed():
    def fn(x, y):
        return lax.while_loop(lambda s: s[1].sum() < 3, lambda s: (s[0] + 1, s[1] * 2), (x, y))[0]

    assert live_inputs(view(fn, X, X)) == [True, True]


def test_a_carry_that_no_iteration_reads():
    """It comes out of the loop, so the loop must be given where it begins."""

    def scan(x, y):
        return lax.scan(lambda s, _: ((s[0] + 1, jnp.sin(s[0])), None), (x, y), length=2)[0]

    def loop(x, y):
        return lax.while_loop(lambda s: s[0].sum() < 3, lambda s: (s[0] + 1, jnp.sin(s[0])), (x, y))

    assert live_inputs(view(scan, X, X)) == [True, True]
    assert live_inputs(view(loop, X, X)) == [True, True]


def test_branches():
    def fn(i, x, y, z):
        return lax.switch(i, [lambda x, y, z: (x, z), lambda x, y, z: (y, z)], x, y, z)[0]

    assert live_inputs(view(fn, 0, X, X, X)) == [True, True, True, False]


def test_results_of_a_scope():
    def fn(x):
        return lax.scan(lambda c, r: (c + r, (jnp.sin(r), jnp.cos(r))), x[0], x)[1][1]

    scope = view(fn, X)
    live = liveness(scope)
    body = next(node for node in scope.nodes if node.bodies).bodies[0].scope
    assert [value in live.results for value in body.outputs] == [False, False, True]


def test_replaced_nodes_need_what_their_unit_reads():
    def fn(x, y, z):
        return jnp.sin(x * y) + z

    scope = view(fn, X, X, X)
    mul, sin, _ = scope.nodes
    unit = Unit(frozenset({mul, sin}), (scope.inputs[0],))
    assert live_inputs(scope, {mul: unit, sin: unit}) == [True, False, True]


def test_replaced_nodes_in_a_loop():
    def fn(x, w):
        return lax.scan(lambda c, r: (jnp.sin(c * r), None), x, w)[0]

    scope = view(fn, X[0], X)
    (node,) = (node for node in scope.nodes if node.bodies)
    body = node.bodies[0].scope
    mul, sin = body.nodes
    unit = Unit(frozenset({mul, sin}), (body.inputs[0],))
    assert live_inputs(scope, {mul: unit, sin: unit}) == [True, False]
