"""The order of emission, and what stays whole, is written again, or is spread out."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from hire_rewrite.graph.flatten import flatten
from hire_rewrite.graph.liveness import liveness
from hire_rewrite.graph.nodes import Frame
from hire_rewrite.passes.schedule import Call, Keep, Loop, Swap, schedule
from tests.cases import inputs

X = inputs(3, 4)


@dataclasses.dataclass(eq=False)
class Unit:
    nodes: frozenset
    inputs: tuple
    outputs: tuple
    name: str = "unit"
    loops: tuple = ()
    reports: bool = False


def items_of(fn, *names, args=(X,)):
    """The items of `fn` with all equations of `names` replaced by one unit."""
    scope = flatten(jax.make_jaxpr(fn)(*args))
    units = {}
    for inner in scope.walk():
        nodes = [node for node in inner.nodes if str(node.primitive) in names]
        if nodes:
            made = [value for node in nodes for value in node.outs]
            read = [v for node in nodes for v in node.ins if v not in made and v.literal is None]
            unit = Unit(frozenset(nodes), tuple(dict.fromkeys(read)), tuple(made))
            units |= dict.fromkeys(nodes, unit)
    return schedule(scope, units, liveness(scope, units))


def shape(items):
    """The kinds of items, those of calls in brackets."""
    found = []
    for item in items:
        if isinstance(item, Call):
            found.append(shape(item.items))
        elif isinstance(item, Keep):
            found.append("call" if isinstance(item.entry, Frame) else str(item.entry.primitive))
        else:
            found.append("loop" if isinstance(item, Loop) else "swap")
    return found


call = jax.jit(lambda x: jnp.exp(x) + 1)
CASES = {
    "nothing replaced": (lambda x: call(x) * 2, (), ["call", "mul"]),
    "one equation": (lambda x: jnp.sin(x) * 2, ("sin",), ["swap", "mul"]),
    "a call beside it": (lambda x: call(jnp.sin(call(x))), ("sin",), ["call", "swap", "call"]),
    "in a call": (lambda x: jax.jit(lambda x: jnp.sin(x) * 2)(call(x)), ("sin",),
                  ["call", ["swap", "mul"]]),
    "in nested calls": (lambda x: jax.jit(lambda x: call(jax.checkpoint(jnp.sin)(x)))(x),
                        ("sin",), [[["swap"], "call"]]),
    "in a custom_jvp": (lambda x: jax.nn.relu(x) * 2, ("max",), [["swap"], "mul"]),
    "over two calls": (lambda x: jax.jit(lambda x: jnp.cos(x) * 2)(
        jax.jit(lambda x: jnp.sin(x + 1))(x)), ("sin", "cos"), ["add", "swap", "mul"]),
    "a part of a call": (lambda x: jax.jit(lambda x: call(jnp.cos(x)))(jnp.sin(x)),
                         ("sin", "cos"), ["swap", "call"]),
    "in a loop": (lambda x: lax.scan(lambda c, _: (jnp.sin(c), None), x, length=2)[0] * 2,
                  ("sin",), ["loop", "mul"]),
    "beside a loop": (lambda x: lax.fori_loop(0, 2, lambda i, c: c * 2, jnp.sin(x)), ("sin",),
                      ["swap", "scan"]),
    "in a loop in a call": (jax.jit(lambda x: lax.fori_loop(0, 2, lambda i, c: jnp.sin(c), x)),
                            ("sin",), [["loop"]]),
    "dead parts of a call": (lambda x: jax.jit(lambda x: (jnp.exp(x), jnp.cos(x)))(x)[0] * 2, (),
                             ["call", "mul"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_items(name):
    fn, names, want = CASES[name]
    assert shape(items_of(fn, *names)) == want


def test_a_call_that_reads_what_is_gone_is_spread_out():
    """It hands a value of the unit through to nobody; the value is not computed any more."""

    def fn(x):
        y = jnp.sin(x)
        z = jax.jit(lambda y, x: (y * 2, x + 1))(y, x)[1]
        return jnp.cos(y), z

    scope = flatten(jax.make_jaxpr(fn)(X))
    nodes = [node for node in scope.nodes if str(node.primitive) in ("sin", "cos")]
    unit = Unit(frozenset(nodes), (scope.inputs[0],), nodes[-1].outs)
    units = dict.fromkeys(nodes, unit)
    items = schedule(scope, units, liveness(scope, units))
    assert sorted(shape(items)) == ["add", "swap"]


def test_readers_of_early_results_come_after_the_unit():
    """As where logits are read before the last equation of a head's chain."""

    def fn(x):
        y = jnp.sin(x)
        total = call(y)
        return total, jnp.cos(y - 1)

    items = items_of(fn, "sin", "cos", "sub")
    assert shape(items) == ["swap", "call"]


def test_what_a_unit_reads_comes_before_it():
    def fn(x):
        y = jnp.sin(x)
        side = call(x)
        return jnp.cos(y * side)

    assert shape(items_of(fn, "sin", "mul", "cos")) == ["call", "swap"]


def test_a_call_on_both_sides_of_a_unit_is_spread_out():
    def fn(x, t):
        y = jnp.sin(x)
        total, scale = jax.jit(lambda y, t: (jnp.tan(y), jnp.exp(t)))(y, t)
        return total, jnp.cos(y * scale)

    items = items_of(fn, "sin", "mul", "cos", args=(X, X))
    assert shape(items) == ["exp", "swap", "tan"]


def test_traced_order_is_kept():
    def fn(x):
        return call(x), jnp.sin(x), jnp.tan(x), call(x + 1), jnp.sin(x + 2)

    items = items_of(fn, "tan")
    assert shape(items) == ["call", "sin", "swap", "add", "call", "add", "sin"]


def test_reads_of_a_call_are_what_its_items_read():
    items = items_of(lambda x, y: jax.jit(lambda x, y: jnp.sin(x) + jnp.exp(x))(x, y), "sin",
                     args=(X, X))  # fmt: skip
    (written,) = items
    assert isinstance(written, Call)
    assert len(written.reads) == 1
    assert len(written.writes) == 1
    (swap,) = (item for item in written.items if isinstance(item, Swap))
    assert swap.writes[0] not in written.writes
