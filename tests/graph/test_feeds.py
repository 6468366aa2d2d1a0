"""Which products read which."""

import jax
import jax.numpy as jnp

from hire_rewrite.graph.feeds import feeds
from hire_rewrite.graph.trace import trace

W, X = jnp.ones((4, 4)), jnp.ones((1, 4))


def read_by_place(fn, *args):
    """For each product in order, the places of those that it reads."""
    scope = trace(fn, args, {}, (0,)).scope
    nodes = [n for s in scope.walk() for n in s.nodes if str(n.primitive) == "dot_general"]
    found = feeds(scope, nodes)
    places = {node: place for place, node in enumerate(found)}
    assert len(found) == len(nodes)
    return [sorted(places[n] for n in before) for before in found.values()]


def test_a_residual_connection_is_not_named_beside_what_reads_it():
    def fn(w, x):
        a = x @ w  # 0
        b = jnp.tanh(a) @ w + a  # 1
        return b @ w  # 2

    assert read_by_place(fn, W, X) == [[], [0], [1]]


def test_side_by_side():
    def fn(w, x):
        q, k, v = x @ w, x @ w, x @ w
        y = (q * k + v) @ w  # 3
        return y @ w + x @ w  # 4, 5

    assert read_by_place(fn, W, X) == [[], [], [], [0, 1, 2], [3], []]


def test_through_calls_loops_and_branches():
    def fn(w, x):
        x = jax.jit(lambda x: x @ w)(x)  # 0
        x, _ = jax.lax.scan(lambda c, _: (jnp.sin(c @ w) @ w, None), x, length=3)  # 1, 2
        x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x @ w * 2, x)  # 3, 4
        x = jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ w, x)  # 5
        return x @ w  # 6

    reads = read_by_place(fn, W, X)
    assert reads[:3] == [[], [0], [1]]
    assert reads[3:5] == [[2], [2]]
    assert reads[5:] == [[3, 4], [5]]


def test_what_decides_is_read():
    def fn(w, x):
        a = x @ w  # 0
        b = jax.lax.cond(a[0, 0] > 0, lambda: x, lambda: -x)
        return b @ w  # 1

    assert read_by_place(fn, W, X) == [[], [0]]
