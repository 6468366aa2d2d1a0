"""Nodes that cannot be replaced together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.experimental.xla_metadata import set_xla_metadata

from hire_rewrite.graph.effects import unsupported_reason
from hire_rewrite.graph.flatten import flatten
from tests.cases import inputs

X = inputs(3)


def reason_of(fn, *names):
    """Why the equations of `names` cannot be replaced together."""
    nodes = [n for n in flatten(jax.make_jaxpr(fn)(X)).nodes if str(n.primitive) in names]
    made = {value for node in nodes for value in node.outs}
    reads = [v for node in nodes for v in node.ins if v not in made and v.literal is None]
    return unsupported_reason(nodes, reads)


def put(x):
    io_callback(lambda x: None, None, x, ordered=True)


def fetch():
    return io_callback(lambda: np.float32(2), jax.ShapeDtypeStruct((), jnp.float32), ordered=True)


def callback_between(x):
    y = jnp.sin(x)
    put(y)
    return jnp.cos(y * fetch())


def callback_before_and_behind(x):
    scale = fetch()
    y = jnp.cos(jnp.sin(x) * scale)
    put(y)
    return y


def ref_between(x):
    ref = jax.new_ref(x)
    y = jnp.sin(x)
    ref[...] = y
    return jnp.cos(y * ref[...])


def other_ref_between(x):
    one, two = jax.new_ref(x), jax.new_ref(x)
    y = jnp.sin(x)
    one[...] = y
    return jnp.cos(y * two[...])


def in_a_call(x):
    y = jnp.sin(x)
    scale = jax.jit(lambda y: (put(y), fetch())[1])(y)
    return jnp.cos(y * scale)


def unordered_between(x):
    y = jnp.sin(x)
    jax.debug.print("{}", y)
    return jnp.cos(y * 2)


def one_annotated(x):
    with set_xla_metadata(mark="here"):
        y = jnp.sin(x)
    return jnp.cos(y * 2)


def all_annotated(x):
    with set_xla_metadata(mark="here"):
        return jnp.cos(jnp.sin(x) * 2)


@pytest.mark.parametrize(
    ("fn", "word"),
    [
        (callback_between, "io_callback at test_unsupported.py"),
        (in_a_call, "io_callback at test_unsupported.py"),
        (ref_between, "Ref at test_unsupported.py"),
        (one_annotated, "metadata"),
        (callback_before_and_behind, None),
        (other_ref_between, None),
        (unordered_between, None),
        (all_annotated, None),
    ],
)
def test_reasons(fn, word):
    reason = reason_of(fn, "sin", "mul", "cos")
    assert reason is None if word is None else word in reason


def test_an_effect_of_its_own():
    assert "io_callback" in reason_of(lambda x: put(jnp.sin(x)), "sin", "io_callback")
