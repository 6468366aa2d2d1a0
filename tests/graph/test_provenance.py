"""Which values depend on weights alone, where they come from, and over which loops they vary."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

from hire_rewrite.graph.provenance import carried_unchanged, counter
from hire_rewrite.graph.sources import body_of
from hire_rewrite.graph.trace import trace
from tests.cases import inputs, rand

W, STACK, X = rand(4, 4), rand(3, 4, 4), inputs(2, 4)
LITERAL = np.arange(16, dtype=np.float32).reshape(4, 4)


def traced(fn, *args):
    return trace(fn, args, {}, (0,))


def outputs_are_weights(fn, *args):
    t = traced(fn, *args)
    return [t.provenance.is_weight(value) for value in t.scope.outputs]


def right_of_dots(t):
    """The second operands of all products, outermost scopes first."""
    nodes = [node for scope in t.scope.walk() for node in scope.nodes]
    return [node.ins[1] for node in nodes if str(node.primitive) == "dot_general"]


def test_what_depends_on_weights_alone():
    def fn(w, x):
        y = jax.jit(lambda w: w.T.astype(jnp.bfloat16) * 2)(w)
        closed = jnp.asarray(LITERAL) + 1
        return w, y, w @ closed, jnp.zeros(3), w * x[0], x, x @ closed

    assert outputs_are_weights(fn, W, X) == [True] * 4 + [False] * 3


def test_checkpoint_custom_derivatives_and_cond_are_looked_through():
    def fn(w, x):
        a = jax.checkpoint(jnp.sin)(w)
        b = jax.nn.relu(w)
        c = lax.cond(w[0, 0] > 0, lambda w: w, lambda w: -w, w)
        d = lax.cond(x[0, 0] > 0, lambda w: w + 0, lambda w: -w, w)
        e = lax.scan(lambda s, w: (s + w, w), jnp.zeros(4), w)[0]
        return a, b, c, d, e

    assert outputs_are_weights(fn, W, X) == [True, True, True, False, True]


def test_effects_make_no_weight():
    def fn(w):
        shape = jax.ShapeDtypeStruct(w.shape, w.dtype)
        return io_callback(lambda w: w, shape, w)

    assert outputs_are_weights(fn, W) == [False]


def test_slices_of_a_scan():
    def fn(stack, x):
        return lax.scan(lambda c, w: (c @ w.T, None), x, stack)[0]

    t = traced(fn, STACK, X)
    (weight,) = right_of_dots(t)
    assert t.provenance.is_weight(weight)
    assert t.provenance.varies_over(weight) == {weight.scope}
    assert [t.path(root) for root in t.provenance.roots(weight)] == ["stack"]


def test_slices_of_an_activation_are_none():
    def fn(w, x):
        return lax.scan(lambda c, row: (c @ w + row, row), x[0], x)

    t = traced(fn, W, X)
    inner = t.scope.nodes[-1].bodies[0].scope.inputs
    assert sorted(map(t.provenance.is_weight, inner)) == [False, False, True]


def test_nested_scans():
    def fn(stack, x):
        def outer(c, w):
            return lax.scan(lambda c, v: (c @ (v + w[0]), None), c, w)[0], None

        return lax.scan(outer, x, stack.reshape(3, 2, 2, 4, 4)[:, 0])[0]

    t = traced(fn, rand(3, 4, 4, 4), X)
    (weight,) = right_of_dots(t)
    outer, inner = weight.scope.parent.scope, weight.scope
    assert t.provenance.varies_over(weight) == {outer, inner}


def counters(fn, *args):
    t = traced(fn, *args)
    (node,) = (n for n in t.scope.nodes if n.bodies)
    body = node.bodies[-1]
    return [counter(body, i) for i, link in enumerate(body.inputs) if link.role == "carry"]


def test_counters():
    def fn(w, x):
        def body(state, _):
            i, j, k, f, v, n, c = state
            step = (i + 1, 2 + j, k + c[0, 0].astype(int), f + 1.0, v + 1, -n)
            return (*step, c @ w), None

        start = (0, 5, 0, 0.0, jnp.arange(3), 1, x)
        return lax.scan(body, start, length=3)[0]

    assert counters(fn, W, X) == [1, 2, None, None, None, None, None]


def test_counters_of_a_while_loop_have_no_length():
    def fn(w, x):
        return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] @ w), (0, x))

    assert counters(fn, W, X) == [None, None]


def test_counter_from_a_weight_or_an_activation():
    def fn(starts, stack, x):
        def layers(start):
            def body(state, _):
                i, c = state
                return (i + 1, c @ stack[i]), None

            return lax.scan(body, (start, x), length=2)[0][1]

        return layers(starts[0]), layers(x[0, 0].astype(jnp.int32))

    t = trace(fn, (jnp.array([1, 0]), STACK, X), {}, (0, 1))
    assert [t.provenance.is_weight(w) for w in right_of_dots(t)] == [True, False]


def test_index_by_an_activation():
    def fn(stack, x):
        return x @ stack[x[0, 0].astype(int)]

    t = traced(fn, STACK, X)
    assert [t.provenance.is_weight(w) for w in right_of_dots(t)] == [False]


def test_carried_unchanged():
    def fn(w, x):
        def body(state):
            n, w, v, c = state
            return n - 1, w, v * 2, c @ w + (c @ v)

        return lax.while_loop(lambda s: s[0] > 0, body, (3, w, w, x))

    t = traced(fn, W, X)
    (node,) = (n for n in t.scope.nodes if n.bodies)
    body = node.bodies[1]
    assert [t.provenance.is_weight(w) for w in right_of_dots(t)] == [True, False]
    for value in right_of_dots(t):
        found, i = body_of(value)
        assert found is body
        if body.inputs[i].role == "carry":
            assert carried_unchanged(body, i) == t.provenance.is_weight(value)


def test_swapped_carries_change():
    def fn(w, x):
        def body(state, _):
            a, b, c = state
            return (b, a, c @ a), None

        return lax.scan(body, (w, w + 1, x), length=3)[0][2]

    t = traced(fn, W, X)
    assert [t.provenance.is_weight(w) for w in right_of_dots(t)] == [False]


def test_roots():
    def fn(w, b, x):
        return x @ (w[0] + w[1] * b + jnp.asarray(LITERAL))

    t = trace(fn, (STACK, inputs(4), X), {}, (0, 1))
    (weight,) = right_of_dots(t)
    names = {t.path(root) for root in t.provenance.roots(weight)}
    assert names == {"w", "b", "closure[4×4]"}


def identities(fn, *args):
    t = traced(fn, *args)
    return [t.provenance.identity(w) for w in right_of_dots(t)]


def loop(stack, x, step=1, start=0, reverse=False, length=2):
    def body(state, _):
        i, c = state
        return (i + step, c @ stack[i]), None

    return lax.scan(body, (start, x), length=length, reverse=reverse)[0][1]


SAME = {
    "used twice": lambda s, x: (x @ s[0].T, x @ s[0].T),
    "in a loop and outside": lambda s, x: (
        x @ s[0],
        lax.scan(lambda c, _: (c @ s[0], None), x, length=2),
    ),
    "in a branch and outside": lambda s, x: (
        x @ s[0],
        lax.cond(x[0, 0] > 0, lambda x: x @ s[0], lambda x: x, x),
    ),
    "two loops": lambda s, x: [lax.scan(lambda c, w: (c @ w, None), x, s) for _ in range(2)],
    "forward and backward": lambda s, x: [
        lax.scan(lambda c, w: (c @ w, None), x, s, reverse=r) for r in (True, False)
    ],
    "two counters": lambda s, x: (loop(s, x), loop(s, x)),
}
OTHER = {
    "transposed": lambda s, x: (x @ s[0], x @ s[0].T),
    "another layer": lambda s, x: (x @ s[0], x @ s[1]),
    "another number": lambda s, x: (x @ (s[0] * 2), x @ (s[0] * 3)),
    "another step": lambda s, x: (loop(s, x, 1), loop(s, x, 2)),
    "another start": lambda s, x: (loop(s, x), loop(s, x, start=1)),
    "another length": lambda s, x: (loop(s, x), loop(s, x, length=3)),
    "counted backward": lambda s, x: (loop(s, x), loop(s, x, reverse=True)),
    "another constant": lambda s, x: (x @ jnp.asarray(LITERAL), x @ jnp.asarray(LITERAL + 1)),
}


@pytest.mark.parametrize("name", SAME)
def test_same_weights(name):
    first, second = identities(SAME[name], STACK, X)
    assert first == second


@pytest.mark.parametrize("name", OTHER)
def test_other_weights(name):
    first, second = identities(OTHER[name], STACK, X)
    assert first != second


def test_weights_that_are_made_of_the_same_again_and_again():
    """The identity of a value is as long whatever it is computed from: its text would double."""

    def fn(w, x):
        for _ in range(200):
            w = w + w.T @ w
        return x @ w, x @ w

    first, second = (identity for identity in identities(fn, W, X)[-2:])
    assert first == second
    assert len(repr(first)) < 100


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from hire_rewrite.graph.trace import trace

def fn(w, x):
    half = jax.shard_map(lambda w: w / 2, mesh=mesh, in_specs=P("a", "b"), out_specs=P("a", "b"))
    return half(w) @ w

mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("a", "b"))
t = trace(fn, (jnp.ones((4, 4)), jnp.ones(2)), {}, (0,))
print(t.provenance.identity(t.scope.outputs[0]))
"""


def test_identities_are_the_same_in_other_processes():
    """They are part of what a checkpoint says: no order of a set is in them."""
    told = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
    assert len(told.pop().strip()) == 32
