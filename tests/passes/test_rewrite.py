"""Emitting a function again with some of its nodes replaced, by themselves in these tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import primitives as p
from jax.sharding import AxisType, PartitionSpec

from hire_rewrite._compat import call_params
from hire_rewrite.graph.trace import trace
from hire_rewrite.passes.rewrite import rewrite
from tests.cases import inputs, run
from tests.cases_ffn import FFN_CASES
from tests.cases_head import HEAD_CASES
from tests.fuzz.evaluate import structure
from tests.same import Same, chain, nodes_of, replaced, same

X = inputs(3, 4)


def model(x):
    """A scan of checkpoints in a branch of a cond in a call."""

    def taken(x):
        return lax.scan(lambda c, r: (jax.checkpoint(chain)(c) + r, c), x[0], x)

    return jax.jit(lambda x: lax.cond(x[0, 0] > 0, taken, lambda x: (x[0], x), x))(x)


@pytest.mark.parametrize("case", FFN_CASES[::10] + HEAD_CASES[::10], ids=str)
def test_replacing_the_products(case):
    got, _, _, nodes = replaced(case.fn, case.params, *case.args, names=("dot_general",))
    assert nodes
    same(got, run(case.fn, case.params, *case.args))


def test_no_replacement_gives_the_same_jaxpr():
    """What did not change goes through as it was."""
    for fn in (model, jax.jit(chain), jax.nn.relu, jax.vmap(jax.nn.gelu)):
        traced = trace(fn, (X,), {}, ())
        again = jax.make_jaxpr(lambda x, t=traced: rewrite(t, [])({0: x})[0])(X)
        want = jax.make_jaxpr(fn)(X)
        assert [str(e.primitive) for e in again.eqns] == [str(e.primitive) for e in want.eqns]


UNREAD = {
    "scan": lambda w, x: lax.scan(lambda c, r: (c + r[1], None), x[0], (w, x))[0],
    "scan, carried": lambda w, x: lax.scan(lambda c, r: ((c[0], c[1] + r), None), (w, x[0]), x)[0][
        1
    ],
    "while": lambda w, x: lax.while_loop(
        lambda s: s[2] < 2, lambda s: (s[0], s[1] * 2, s[2] + 1), (w, x, 0)
    )[1],
    "jit": lambda w, x: jax.jit(lambda w, x: x * 2)(w, x),
    "jit in checkpoint": jax.checkpoint(lambda w, x: jax.jit(lambda w, x: x * 2)(w * 2, x)),
    "cond": lambda w, x: lax.cond(x[0, 0] > 0, lambda w, x: x, lambda w, x: -x, w, x),
    "shard_map": lambda w, x: jax.shard_map(
        lambda w, x: x * 2,
        mesh=jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]),
        in_specs=(PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
    )(w, x),
}


@pytest.mark.parametrize("name", UNREAD)
def test_no_replacement_keeps_operands_that_nobody_reads(name):
    """Such a loop or call is not written again: that is not what was asked for."""
    fn = UNREAD[name]
    traced = trace(fn, (X, X), {}, (0,))
    rewritten = rewrite(traced, [])
    again = jax.make_jaxpr(lambda w, x: rewritten({0: w, 1: x})[0])(X, X)
    assert structure(again) == structure(jax.make_jaxpr(fn)(X, X))


def test_calls_keep_their_form_around_a_replacement():
    def fn(x):
        @jax.jit
        def named(x):
            return jnp.sin(x) + 1

        return jax.checkpoint(named)(x)

    traced = trace(jax.jit(fn), (X,), {}, ())
    (node,) = nodes_of(traced, "sin")
    jaxpr = jax.make_jaxpr(lambda x: rewrite(traced, [Same("sin", (node,))])({0: x})[0])(X)
    found = []
    while len(jaxpr.eqns) == 1:
        (eqn,) = jaxpr.eqns
        found.append(eqn)
        jaxpr = call_params(eqn)["jaxpr"]
    assert ["policy" in call_params(eqn) for eqn in found] == [False, True, False]
    assert [found[i].primitive for i in (0, 2)] == [p.jit_p, p.jit_p]
    assert [found[i].params["name"] for i in (0, 2)] == ["fn", "named"]


def test_derivatives_of_what_was_written_again():
    traced = trace(model, (X,), {}, ())
    rewritten = rewrite(traced, [Same("s", (node,)) for node in nodes_of(traced, "sin")])
    loss = lambda x: sum(jnp.sum(r * r) for r in rewritten({0: x})[0])  # noqa: E731
    want = jax.grad(lambda x: sum(jnp.sum(r * r) for r in jax.tree.leaves(model(x))))(X)
    np.testing.assert_allclose(jax.grad(loss)(X), want, rtol=1e-6)
    batch = jnp.stack([X, -X])
    np.testing.assert_allclose(
        jax.vmap(lambda x: rewritten({0: x})[0][0])(batch), jax.vmap(model)(batch)[0], rtol=1e-6
    )


def test_needs_are_the_inputs_that_are_still_read():
    def fn(w, v, x):
        return lax.scan(lambda c, w: (jnp.sin(c * w), c * v), x, w)[0]

    got, _, rewritten, _ = replaced(fn, X, X[0], X[0])
    assert rewritten.needs == {0, 2}
    same(got, run(fn, X, X[0], X[0]))


# Units of several nodes


def unit(traced, first, last):
    """The nodes between two primitives of one scope, in order."""
    for scope in traced.scope.walk():
        names = [str(node.primitive) for node in scope.nodes]
        if first in names and last in names:
            return Same("unit", tuple(scope.nodes[names.index(first) : names.index(last) + 1]))
    raise AssertionError("no such nodes")


UNITS = {
    "over two calls": lambda x: jax.jit(lambda x: jnp.cos(x) + 1)(
        jax.jit(lambda x: jnp.sin(x) * 2)(x)
    ),
    "into a call": lambda x: jax.jit(lambda x: (jnp.cos(x) + 1, x))(jnp.sin(x)),
    "out of a call": lambda x: jnp.cos(jax.jit(lambda x: (jnp.sin(x) - 1, x + 2))(x)[0]),
    "inside a call": lambda x: jax.jit(lambda x: jnp.tan(jnp.cos(jnp.sin(x) + 1)))(x),
    "into a custom_jvp": lambda x: jax.nn.relu(jnp.cos(jnp.sin(x))) + jax.nn.relu(x),
    "two levels": lambda x: jax.jit(lambda x: jax.jit(jnp.cos)(jnp.sin(x)) * jax.jit(jnp.tan)(x))(
        x
    ),
    "in a loop": lambda x: lax.scan(
        lambda c, r: (jax.jit(jnp.cos)(jax.checkpoint(jnp.sin)(c)) + r, None), x[0], x
    ),
    "results on the way": lambda x: (lambda y: (y, jnp.cos(y), y + 1))(jnp.sin(x)),
    "readers on the way": lambda x: (lambda y: (jax.jit(lambda y: y.sum())(y), jnp.cos(y * 2)))(
        jnp.sin(x)
    ),
}


@pytest.mark.parametrize("name", UNITS)
def test_units(name):
    fn = UNITS[name]
    traced = trace(fn, (X,), {}, ())
    rewritten = rewrite(traced, [unit(traced, "sin", "cos")])
    results, _ = run(lambda x: rewritten({0: x}), X)
    same(jax.tree.unflatten(traced.out_tree, results), run(fn, X))


def test_a_call_that_reads_a_unit_and_is_read_by_it():
    """It cannot stay one call: a part of it comes before the unit's end, and a part after."""

    def fn(x, t):
        y = jnp.sin(x)
        total, scale = jax.jit(lambda y, t: (y.sum(), jnp.exp(t)))(y, t)
        return total, jnp.cos(y * scale)

    traced = trace(fn, (X, 0.5), {}, ())
    sin, *_, mul, cos = traced.scope.nodes
    swap = Same("unit", (sin, mul, cos))
    results, _ = rewrite(traced, [swap])({0: X, 1: jnp.float32(0.5)})
    same(tuple(results), fn(X, jnp.float32(0.5)))


def test_two_units_in_one_call():
    fn = jax.jit(lambda x: jnp.sin(jnp.cos(x)) + jnp.cos(jnp.sin(x)))
    traced = trace(fn, (X,), {}, ())
    swaps = [Same(f"{i}", (node,)) for i, node in enumerate(nodes_of(traced, "sin", "cos"))]
    assert len(swaps) == 4
    same(rewrite(traced, swaps)({0: X})[0], [fn(X)])


# Reports


def report_of(fn, over=lambda node: ()):
    """The report of the only `sin` of a function."""
    traced = trace(fn, (X,), {}, ())
    (node,) = nodes_of(traced, "sin")
    swap = Same("sin", (node,), loops=over(node), reports=True)
    results, reports = run(lambda x: rewrite(traced, [swap])({0: x}), X)
    same(jax.tree.unflatten(traced.out_tree, results), run(fn, X))
    return np.asarray(reports["sin"])


def loops(*depths):
    """The loops at those depths around a node, 0 the outermost."""

    def over(node):
        around = [scope for scope in node.scope.ancestors() if scope.parent is not None][::-1]
        return tuple(around[depth] for depth in depths)

    return over


def rows(x):
    return lax.scan(lambda c, r: (c, jnp.sin(r)), 0.0, x)


ROWS = np.sin(np.asarray(X)).sum(-1)


def test_reports_of_one_loop():
    np.testing.assert_allclose(report_of(rows), ROWS.sum(), rtol=1e-5)
    np.testing.assert_allclose(report_of(rows, loops(0)), ROWS, rtol=1e-5)
    back = lambda x: lax.scan(lambda c, r: (c, jnp.sin(r)), 0.0, x, reverse=True)  # noqa: E731
    np.testing.assert_allclose(report_of(back, loops(0)), ROWS, rtol=1e-5)


def grid(x):
    scales = jnp.arange(1.0, 3.0)
    return lax.scan(
        lambda c, s: (c, lax.scan(lambda d, r: (d, jnp.sin(r * s)), 0.0, x)[1]), 0.0, scales
    )


GRID = np.stack([np.sin(s * np.asarray(X)).sum(-1) for s in (1, 2)])


@pytest.mark.parametrize(
    ("over", "want"),
    [((), GRID.sum()), ((0,), GRID.sum(1)), ((1,), GRID.sum(0)), ((0, 1), GRID)],
)
def test_reports_of_nested_loops(over, want):
    np.testing.assert_allclose(report_of(grid, loops(*over)), want, rtol=1e-5)


def test_reports_of_a_while_loop():
    def fn(x):
        return lax.while_loop(
            lambda s: s[0] < 4, lambda s: (s[0] + 1, s[1] + jnp.sin(x * s[0])), (0, x)
        )

    want = sum(np.sin(np.asarray(X) * i).sum() for i in range(4))
    np.testing.assert_allclose(report_of(fn), want, rtol=1e-5)


def test_reports_of_a_scan_in_a_while_loop():
    def fn(x):
        def body(state):
            n, s = state
            return n + 1, s + lax.scan(lambda c, r: (c, jnp.sin(r + n)), 0.0, x)[1]

        return lax.while_loop(lambda s: s[0] < 2, body, (0, x))

    want = sum(np.sin(np.asarray(X) + n).sum(-1) for n in range(2))
    np.testing.assert_allclose(report_of(fn, lambda n: (n.scope,)), want, rtol=1e-5)


def test_reports_of_branches():
    """A branch that is not taken reports zeros."""

    def fn(x):
        return lax.scan(lambda c, r: (c, lax.cond(r[0] > 0, jnp.sin, lambda r: r * 2, r)), 0.0, x)

    want = np.where(np.asarray(X)[:, 0] > 0, ROWS, 0)
    np.testing.assert_allclose(report_of(fn), want.sum(), rtol=1e-5)
    np.testing.assert_allclose(report_of(fn, loops(0)), want, rtol=1e-5)


def test_reports_through_calls():
    fn = lambda x: jax.jit(lambda x: jax.checkpoint(rows)(x))(x)  # noqa: E731
    np.testing.assert_allclose(report_of(fn, loops(0)), ROWS, rtol=1e-5)


# Random functions


def _scan(f):
    return lambda x: lax.scan(lambda c, r: (f(c) + r, c), x, jnp.stack([x, x * 2]))[0]


def _scan_ys(f):
    return lambda x: lax.scan(lambda c, r: (c + 1, f(r)), 0, jnp.stack([x, x * 2]))[1].sum(0)


def _while(f):
    return lambda x: lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, f(s[1])), (0, x))[1]


def _cond(f):
    return lambda x: lax.cond(x.sum() > 0, f, lambda x: x - 1, x)


def _shared(f):
    def fn(x):
        g = jax.jit(lambda x, y: (y, f(x), x))
        y, z, x = g(x, x + 1)
        return g(z, x)[1] + y

    return fn


WRAPPERS = [jax.jit, jax.checkpoint, _scan, _scan_ys, _while, _cond, _shared]
functions = st.recursive(
    st.sampled_from([jnp.sin, jnp.cos, jax.nn.silu, jax.nn.relu, chain]),
    lambda inner: st.one_of(
        st.builds(lambda wrap, f: wrap(f), st.sampled_from(WRAPPERS), inner),
        st.builds(lambda f, g: lambda x: f(g(x)), inner, inner),
        st.builds(lambda f, g: lambda x: f(x) + g(x), inner, inner),
    ),
    max_leaves=4,
)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(functions)
def test_random_functions(fn):
    got, _, _, _ = replaced(fn, X, names=("sin", "cos", "max", "logistic"))
    np.testing.assert_allclose(got, run(fn, X), rtol=1e-5, atol=1e-5)
