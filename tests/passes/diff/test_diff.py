"""What changed between two functions: regions, what they hold, and what they read."""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import hire_rewrite as hire
from hire_rewrite.passes.diff.value import Call
from tests.cases import packed

X = jnp.ones((2, 4))


def primitives(equations):
    return [equation.primitive for equation in equations]


def changes(f, g, *args):
    """For each region the primitives before and after."""
    regions = hire.diff(f, g, *args).regions
    return [(primitives(r.before), primitives(r.after)) for r in regions]


# Two functions.


def test_one_equation_in_the_place_of_another():
    assert changes(
        lambda x: jnp.exp(jnp.sin(x)), lambda x: jnp.exp(jnp.cos(x)), X
    ) == [(["sin"], ["cos"])]  # fmt: skip


def test_one_in_the_place_of_many():
    def many(x):
        return jnp.tanh(jnp.sin(x) * 2 + 1) + x

    assert changes(many, lambda x: jnp.cos(x) + x, X) == [(["sin", "mul", "add", "tanh"], ["cos"])]


def test_many_results_of_one_in_the_place_of_several():
    """Three products against one whose result is cut in three, as fused projections are."""
    w = jnp.ones((3, 4, 4))

    def apart(w, x):
        return [jnp.sin(x @ w[i]) for i in range(3)]

    def fused(w, x):
        return [jnp.sin(y) for y in jnp.split(x @ w.transpose(1, 0, 2).reshape(4, 12), 3, axis=1)]

    (region,) = hire.diff(apart, fused, w, X).regions
    assert primitives(region.before).count("dot_general") == 3
    assert primitives(region.after).count("dot_general") == 1
    assert "sin" not in primitives((*region.before, *region.after))


def test_what_is_only_computed_in_another_order_is_the_same():
    def first(x):
        a = jnp.sin(x)
        b = jnp.cos(x)
        return a + b

    def second(x):
        b = jnp.cos(x)
        a = jnp.sin(x)
        return a + b

    assert not hire.diff(first, second, X).changed


def test_effects_in_another_order_are_a_change():
    def printing(*words):
        def fn(x):
            for word in words:
                jax.debug.print(word, ordered=True)
            return x * 2

        return fn

    assert not hire.diff(printing("a", "b"), printing("a", "b"), X).changed
    assert hire.diff(printing("a", "b"), printing("b", "a"), X).changed


def test_reading_another_value_is_a_change():
    def fn(a, b):
        return jnp.sin(a), jnp.cos(b)

    def crossed(a, b):
        return jnp.sin(b), jnp.cos(a)

    assert hire.diff(fn, crossed, X, X + 1).changed
    assert hire.diff(lambda a, b: (a, b), lambda a, b: (b, a), X, X).changed


def test_another_parameter_literal_or_constant_is_a_change():
    assert changes(lambda x: x.sum(0), lambda x: x.sum(1)[:2].repeat(2), X)
    assert changes(lambda x: x * 2, lambda x: x * 3, X) == [(["mul"], ["mul"])]
    table, again, other = jnp.arange(4.0), jnp.arange(4.0), jnp.arange(4.0) + 1
    assert not hire.diff(lambda x: x + table, lambda x: x + again, X).changed
    assert hire.diff(lambda x: x + table, lambda x: x + other, X).changed


def test_whole_functions_may_be_jitted_under_any_name():
    @jax.jit
    def fn(x):
        return jnp.sin(x) * 2

    assert not hire.diff(fn, lambda x: jnp.sin(x) * 2, X).changed


def test_unlike_trees_of_results():
    difference = hire.diff(lambda x: {"a": x, "b": x + 1}, lambda x: x + 1, X)
    assert difference.changed
    assert str(difference)


def random(*shape):
    """Numbers that are stored in no fewer bits."""
    return jax.random.normal(jax.random.key(0), shape)


class Pair(NamedTuple):
    second: Any
    first: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    weight: Any
    bias: Any


@pytest.mark.parametrize(
    "weights",
    [
        Pair(random(4, 5), random(4, 6)),
        Layer(random(4, 5), random(4, 6)),
        {"z": random(4, 5), "a": [random(4, 6) * i for i in range(1, 13)]},
    ],
    ids=["named tuple", "dataclass", "dict"],
)
def test_leaves_in_any_order_are_paired_by_path(weights):
    def fn(weights, x):
        leaves = jax.tree.leaves(weights)
        return [jnp.sin(x @ leaf) for leaf in leaves]

    step = hire.transform(fn)
    assert not hire.diff(fn, fn, weights, X).changed
    assert not step.diff(weights, X).changed
    assert not step.diff(step.pack(weights, X), X).changed


def test_a_second_function_is_known_from_a_pytree_that_is_callable():
    rules_and_function = pytest.raises(hire.HireRewriteError, match="rules")
    with rules_and_function:
        hire.diff(jnp.sin, jnp.cos, X, rules=[hire.Head()])
    partial = jax.tree_util.Partial(lambda w, x: w * x, X)  # an argument, not a function
    assert not hire.diff(lambda fn, x: fn(x), partial, X).changed


# Nested jaxprs.


def looped(inside, length=3):
    def fn(x, w):
        def step(carry, row):
            return inside(carry, row, w), carry.sum()

        return lax.scan(step, x, jnp.ones((length, 4)))

    return fn


def test_a_change_inside_of_a_loop():
    f, g = (looped(lambda c, r, w, op=op: op(c) + r @ w) for op in (jnp.sin, jnp.cos))
    (region,) = hire.diff(f, g, X, jnp.ones((4, 4))).regions
    assert (primitives(region.before), primitives(region.after)) == (["sin"], ["cos"])
    assert region.runs == 3
    assert len(region.inside) == 1
    assert region.bytes == (3 * X.nbytes, 3 * X.nbytes)


def test_a_loop_with_more_carries_is_the_same_loop():
    def more(x, w):
        def step(carry, row):
            c, count = carry
            return (jnp.sin(c) + row @ w, count + 1), c.sum()

        (c, _), sums = lax.scan(step, (x, 0), jnp.ones((3, 4)))
        return c, sums

    f = looped(lambda c, r, w: jnp.sin(c) + r @ w)
    for region in hire.diff(f, more, X, jnp.ones((4, 4))).regions:
        assert not region.before
        assert set(primitives(region.after)) <= {"add"}


def test_a_loop_that_begins_with_another_value():
    def fn(op, swapped):
        def run(x, y):
            a, b = (y, x) if swapped else (x, y)
            return lax.scan(lambda c, _: (op(c), None), a, None, length=3)[0] + b

        return run

    for op in (jnp.sin, jnp.cos):
        regions = hire.diff(fn(jnp.sin, False), fn(op, True), X, X).regions
        sides = [(primitives(r.before), primitives(r.after)) for r in regions]
        assert any("scan" in before and "scan" in after for before, after in sides)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_a_change_inside_of_a_call(wrap):
    def fn(op):
        inner = wrap(lambda x: jnp.tanh(op(x)) * 2 + 1)
        return lambda x: inner(inner(x)) + 1

    found = changes(fn(jnp.sin), fn(jnp.cos), X)
    assert found
    assert all(pair == (["sin"], ["cos"]) for pair in found)


def test_branches_and_while_loops():
    def fn(op):
        def run(x):
            y = lax.cond(x.sum() > 0, lambda x: op(x) + 1, lambda x: x * 2, x)
            return lax.while_loop(lambda c: c.sum() < 9, lambda c: op(c) + 2, y)

        return run

    assert changes(fn(jnp.sin), fn(jnp.cos), X) == [(["sin"], ["cos"])] * 2
    assert not hire.diff(fn(jnp.sin), fn(jnp.sin), X).changed


def test_custom_derivatives():
    @jax.custom_jvp
    def twice(x):
        return x * 2

    twice.defjvp(lambda primals, tangents: (twice(*primals), tangents[0] * 2))
    difference = hire.diff(lambda x: twice(jnp.sin(x)), lambda x: twice(jnp.cos(x)), X)
    assert [(primitives(r.before), primitives(r.after)) for r in difference.regions] == [
        (["sin"], ["cos"])
    ]
    assert "0x" not in difference.to_json()


def test_a_layer_less():
    """What stands before and after it is as it was, but for what reads its result."""

    def fn(skipped):
        def run(weights, x):
            for i, w in enumerate(weights):
                if i != skipped:
                    x = x + jnp.tanh(x @ w) @ w.T
            return x

        return run

    weights = [jnp.ones((4, 4))] * 8
    (region,) = hire.diff(fn(None), fn(3), weights, X).regions
    assert len(region.before) - len(region.after) == 5
    assert len(region.after) == 2  # the product and the sum of the next layer


# A transformed function.

RULE = hire.Linear(k=0.25, encoding=hire.Blocks(8), force=True)
LAYERS = 6


def layered(params, x):
    for layer in params["layers"]:
        x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return x


def layers(count=LAYERS):
    up, down = (jax.random.normal(jax.random.key(i), (32, 32)) for i in range(2))
    return {"layers": [{"up": up + i, "down": down - i} for i in range(count)]}


def test_regions_have_sites_rules_and_what_the_plan_says_that_they_read():
    params, x = layers(), jnp.ones((1, 32))
    step = hire.transform(layered, RULE)
    plan, difference = step.plan(params, x), step.diff(params, x)
    sites = [site for site in plan.sites if site.status == "rewritten"]
    assert len(sites) == 2 * LAYERS
    assert {s for r in difference.regions for s in r.sites} == set(sites)
    assert all(region.rules == (RULE,) for region in difference.regions)
    assert difference.bytes == (
        sum(site.bytes_before for site in sites),
        sum(site.bytes_after for site in sites),
    )
    by_site = {r.sites[0].name: r for r in difference.regions}
    for site in sites:
        region = by_site[site.name]
        assert primitives(region.before) == ["dot_general"]
        assert region.bytes == (site.bytes_before, site.bytes_after)
        assert [e.bytes for e in region.after if e.name.startswith("hire_")] == [site.bytes_after]


def test_weights_are_read_by_their_paths():
    params, x = layers(1), jnp.ones((1, 32))
    difference = hire.transform(layered, RULE).diff(params, x)
    reads = [
        set(r.before[0].reads) & {a.path for a in difference.arguments} for r in difference.regions
    ]
    assert {"params/layers/0/up"} in [read & {"params/layers/0/up"} for read in reads]
    gone = {argument.path for argument in difference.arguments if argument.after is None}
    assert gone == {"params/layers/0/up", "params/layers/0/down"}


def test_sites_that_stay_and_near_misses_say_so_where_they_are():
    def fn(params, x):
        return (x @ params["a"]) @ params["b"]

    params = {"a": jnp.ones((32, 32)), "b": jnp.ones((32, 32))}
    step = hire.transform(fn, RULE.replace(path="a$"))
    plan, difference = step.plan(params, jnp.ones((1, 32))), step.diff(params, jnp.ones((1, 32)))
    said = {r.name: r.reason for r in plan.rejected}
    said |= {s.name: s.reason for s in plan.sites if s.status == "dense"}
    assert "params/b" in said
    assert said["params/b"] in str(difference) or said["params/b"][:40] in str(difference)
    assert said["params/b"] in difference.to_html().replace("&#x27;", "'").replace("&quot;", '"')


def test_rules_may_stand_before_the_arguments():
    params, x = layers(1), jnp.ones((1, 32))
    assert repr(hire.diff(layered, RULE, params, x)) == repr(
        hire.diff(layered, params, x, rules=[RULE])
    )


def test_it_is_the_same_every_time():
    params, x = layers(), jnp.ones((1, 32))
    first, second = (hire.transform(layered, RULE).diff(params, x) for _ in range(2))
    assert first.to_json() == second.to_json()
    assert first.to_html() == second.to_html()


def test_packed_and_raw_weights_give_one_diff():
    params, x = layers(2), jnp.ones((1, 32))
    step = hire.transform(layered, RULE)
    raw, given = step.diff(params, x), step.diff(packed(step, params, x), x)
    assert raw.to_json() == given.to_json()


# Any two functions.

OPS = (
    jnp.sin,
    jnp.tanh,
    lambda x: x * 2,
    lambda x: x @ jnp.ones((4, 4)),
    lambda x: x.sum(axis=1, keepdims=True) + x,
    jax.jit(lambda x: jnp.exp(x) - 1),
    jax.nn.silu,
    lambda x: lax.fori_loop(0, 3, lambda i, c: jnp.cos(c) + i, x),
    lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
)
PROGRAM = st.lists(st.tuples(st.integers(0, len(OPS) - 1), st.integers(0, 20)), max_size=8)


def program(steps):
    """A function that applies each operation to one of the values before, and adds the last two."""

    def fn(x, y):
        values = [x, y]
        for number, place in steps:
            values.append(OPS[number](values[place % len(values)]))
        return values[-1] + values[-2], values[-1]

    return fn


def count(fn):
    return collections.Counter(str(e.primitive) for e in jax.make_jaxpr(fn)(X, X).jaxpr.eqns)


@settings(max_examples=60, deadline=None)
@given(PROGRAM, PROGRAM)
def test_two_programs(first, second):
    """It never fails, is empty for one program, and what it says makes the one of the other."""
    f, g = program(first), program(second)
    assert not hire.diff(f, f, X, X).changed
    difference = hire.diff(f, g, X, X)
    assert difference.changed or count(f) == count(g)
    whole = count(f)
    for region in difference.regions:
        if not region.inside:
            whole.subtract(e.primitive for e in region.before if e.primitive != "return")
            whole.update(e.primitive for e in region.after if e.primitive != "return")
    assert +whole == count(g)
    for form in (str(difference), difference.to_html(), difference.to_json(), difference.to_dot()):
        assert form or not difference.changed


@settings(max_examples=30, deadline=None)
@given(PROGRAM.filter(bool), st.data())
def test_one_operation_more_is_the_least(steps, data):
    """A program and the same with one more operation on its result differ by that alone."""
    number = data.draw(st.integers(0, len(OPS) - 1))

    def more(x, y):
        total, last = program(steps)(x, y)
        return OPS[number](total), last

    regions = hire.diff(program(steps), more, X, X).regions
    assert not [e for r in regions for e in r.before if e.primitive != "return"]


def test_long_functions_that_have_nothing_in_common():
    def chain(ops, length):
        def fn(x):
            for i in range(length):
                x = ops[i % len(ops)](x)
            return x

        return fn

    f = chain([jnp.sin, jnp.tanh, lambda x: x * 2], 900)
    g = chain([jnp.tanh, jnp.cos, lambda x: x * 2, jnp.exp], 1000)
    found = hire.diff(f, g, X)
    assert found.changed
    gone = sum(len(region.before) for region in found.regions)
    new = sum(len(region.after) for region in found.regions)
    assert found.sizes[0] - gone == found.sizes[1] - new


@jax.custom_vjp
def thrice(x):
    return x * 3


thrice.defvjp(lambda x: (x * 3, None), lambda _, g: (g * 3,))


def mutating(x):
    ref = jax.new_ref(x)
    ref[0] = jnp.ones(4)
    return ref[...] * 2


def calling_back(x):
    return jax.pure_callback(lambda a: a, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


ODD = {
    "mutates": mutating,
    "calls back": calling_back,
    "has a derivative": thrice,
    "is a gradient": lambda x: jax.grad(lambda a: jax.checkpoint(jnp.sin)(thrice(a)).sum())(x),
    "draws": lambda x: x + jax.random.normal(jax.random.key(0), x.shape),
    "is batched": jax.vmap(lambda a: lax.cond(a.sum() > 0, jnp.sin, jnp.cos, a)),
    "sorts": jnp.sort,
    "returns nothing": lambda x: (),
    "returns its argument": lambda x: x,
    "returns a number": lambda x: 1.0,
}


@pytest.mark.parametrize("first", ODD)
def test_odd_functions(first):
    for second, g in ODD.items():
        found = hire.diff(ODD[first], g, X)
        assert found.changed == (first != second)
        assert not re.search(r"0x[0-9a-f]{6}", found.to_json())
        assert found.to_html()


def test_a_loop_reads_what_its_sites_read():
    """They are given the packed rows of all layers, and read one layer in each iteration."""
    layers, d = 12, 64

    def step(params, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0]

    weights = jax.ShapeDtypeStruct((layers, d, d), jnp.float32)
    rule = hire.Linear(encoding=hire.Blocks(8), force=True)
    changes = hire.transform(step, rule).diff(weights, jax.ShapeDtypeStruct((1, d), jnp.float32))
    (loop,) = (row for row in changes.block.rows if isinstance(row, Call))
    (site,) = changes.plan.sites
    assert site.bytes_before <= loop.before.bytes < site.bytes_before + layers * 20 * d
    assert site.bytes_after <= loop.after.bytes < site.bytes_after + layers * 20 * d


@pytest.mark.parametrize(
    "rule",
    [
        hire.Linear(encoding=hire.Blocks(8), force=True),
        hire.FFN(k=0.25, tail="predicted", encoding=hire.Blocks(8), force=True),
    ],
)
def test_equations_inside_a_site_of_a_loop_read_one_layer_each_time(rule):
    layers, d = 12, 64

    def step(params, x):
        def block(x, w):
            return x + jax.nn.silu(x @ w["up"]) @ w["down"], None

        return lax.scan(block, x, params)[0]

    weights = {
        "up": jax.ShapeDtypeStruct((layers, d, 4 * d), jnp.float32),
        "down": jax.ShapeDtypeStruct((layers, 4 * d, d), jnp.float32),
    }
    changes = hire.transform(step, rule).diff(weights, jax.ShapeDtypeStruct((1, d), jnp.float32))
    calls = [e for region in changes.regions for e in region.after if e.is_site]
    assert calls
    packed = {
        argument.path: argument.bytes for argument in changes.arguments if not argument.before
    }

    def inside(equations):
        for equation in equations:
            parts = [each for listing in equation.inner for each in listing.equations]
            yield from inside(parts) if parts else [equation]

    read = sum(e.bytes for e in inside(calls) if not packed.keys().isdisjoint(e.reads))
    # Without kernels two branches read the copies; of exact rows few are read. Values of a token
    # count too.
    assert sum(packed.values()) / 8 < read < 2 * sum(packed.values()) + layers * 400 * d


def test_a_closed_over_ref_is_itself_alone():
    refs = jax.new_ref(jnp.zeros(3)), jax.new_ref(jnp.zeros(3))

    def adds_to(ref):
        def fn(x):
            ref[...] += x
            return x * 2

        return fn

    x = jnp.ones(3)
    assert not hire.diff(adds_to(refs[0]), adds_to(refs[0]), x).changed
    assert hire.diff(adds_to(refs[0]), adds_to(refs[1]), x).changed
