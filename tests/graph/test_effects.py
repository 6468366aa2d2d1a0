"""Which effects have an order among each other."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import io_callback

from hire_rewrite.graph.effects import effect_edges, touches
from hire_rewrite.graph.flatten import flatten
from tests.cases import inputs

X = inputs(3)


def say(x, ordered=True):
    io_callback(lambda x: None, None, x, ordered=ordered)


def callbacks(x):
    say(x)
    say(jnp.sin(x), ordered=False)
    jax.debug.print("{}", x)
    say(jnp.cos(x))
    jax.debug.print("{}", x, ordered=True)


def refs(x):
    a, b = jax.new_ref(x), jax.new_ref(x)
    one, two = a[...], a[...]  # two reads
    b[...] = one
    a[...] = two
    return a[...], jax.freeze(b)


def loops(x):
    a = jax.new_ref(x)

    def add(carry, row):
        a[...] += row
        say(carry)
        return carry, None

    lax.scan(add, 0.0, x)
    say(x)
    return a[...]


@pytest.mark.parametrize(
    ("fn", "want"),
    [
        (callbacks, [("io_callback", "io_callback"), ("io_callback", "debug_print")]),
        (
            refs,
            [("get", "swap"), ("get", "swap"), ("swap", "freeze"), ("swap", "get")],
        ),
        (loops, [("scan", "io_callback"), ("scan", "get")]),
        (lambda x: jnp.sin(x), []),
    ],
    ids=["callbacks", "refs", "loops", "none"],
)
def test_edges(fn, want):
    nodes = flatten(jax.make_jaxpr(fn)(X)).nodes
    edges = effect_edges([(node,) for node in nodes])
    assert sorted((str(nodes[i].primitive), str(nodes[j].primitive)) for i, j in edges) == sorted(
        want
    )


def test_a_closed_over_ref_is_one_ref():
    ref = jax.new_ref(X)

    def fn(x):
        ref[...] = x
        return jax.jit(lambda: ref[...])()

    write, read = (node for node in flatten(jax.make_jaxpr(fn)(X)).nodes if node.eqn.effects)
    assert touches(write).keys() == touches(read).keys()
    assert list(touches(write).values()) == [True]
    assert list(touches(read).values()) == [False]
