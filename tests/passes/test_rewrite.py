"""Emitting a function again: every loop, branch and call keeps its meaning and its numbers.

The replacement here is the equation itself, so that everything around it is written again but
nothing is computed differently.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import primitives as p

from hire_rewrite.passes.rewrite import rewrite
from hire_rewrite.passes.trace import trace
from hire_rewrite.passes.view import evaluate
from hire_rewrite.patterns.graph import Node, Scope, Value
from tests.zoo import inputs
from tests.zoo_ffn import FFN_CASES
from tests.zoo_head import HEAD_CASES

X = inputs(3, 4)


@dataclasses.dataclass(eq=False)
class Same:
    """Replaces one node, or several in a row, by themselves; reports the sum of their results."""

    name: str
    parts: tuple[Node, ...]
    loops: tuple[Scope, ...] = ()
    reports: bool = False

    @property
    def nodes(self):
        return frozenset(self.parts)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return tuple(value for node in self.parts for value in node.outs)

    @property
    def inputs(self) -> tuple[Value, ...]:
        read = (value for node in self.parts for value in node.ins)
        fixed = [v for v in read if v.literal is None and v.const is None]
        return tuple(dict.fromkeys(v for v in fixed if v not in self.outputs))

    def emit(self, ins, index):
        env = dict(zip(self.inputs, ins, strict=True))
        for node in self.parts:
            operands = [env.get(v, v.const if v.literal is None else None) for v in node.ins]
            env.update(zip(node.outs, evaluate(node, operands), strict=True))
        results = [env[value] for value in self.outputs]
        total = sum(jnp.sum(r.astype(jnp.float32)) for r in results) if self.reports else None
        return results, total


def nodes_of(traced, *names):
    nodes = [node for scope in traced.scope.walk() for node in scope.nodes]
    return [node for node in nodes if node in traced.live.nodes and str(node.primitive) in names]


def replaced(fn, *args, names=("sin",), **kwargs):
    """Results of `fn` with every equation of `names` replaced by itself; how many there were."""
    traced = trace(fn, args, {}, ())
    nodes = nodes_of(traced, *names)
    swaps = [Same(f"{i}", (node,), **kwargs) for i, node in enumerate(nodes)]
    rewritten = rewrite(traced, swaps)
    leaves = jax.tree.leaves(args)
    run = jax.jit(lambda leaves: rewritten({i: leaves[i] for i in rewritten.needs}))
    results, reports = run(leaves)
    return jax.tree.unflatten(traced.out_tree, results), reports, rewritten, nodes


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.asarray(a).dtype == jnp.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


def chain(x):
    return jnp.sin(x) * 0.5 + x


relu_like = jax.custom_jvp(lambda x: jnp.sin(x) * (x > 0))
relu_like.defjvp(lambda p, t: (relu_like(*p), t[0]))
vjp_like = jax.custom_vjp(chain)
vjp_like.defvjp(lambda x: (chain(x), x), lambda x, g: (g,))


def generate(x):
    """Dead and live carries, a carry that only comes out, stacked results, a random key."""

    def body(state, row):
        c, key, dead, _ = state
        key, now = jax.random.split(key)
        c = chain(c) + row + 0.01 * jax.random.normal(now, c.shape)
        return (c, key, dead + jnp.sin(c), jnp.sin(c) * 2), (c.sum(), jnp.cos(dead))

    start = (x[0], jax.random.key(1), x[0], jnp.zeros(4))
    (c, _, _, last), (sums, _) = lax.scan(body, start, jnp.concatenate([x, x]))
    return c, last, sums


FUNCTIONS = {
    "plain": chain,
    "jit": jax.jit(chain),
    "jit twice": lambda x: (lambda f: f(f(x)))(jax.jit(chain)),
    "nested jit": jax.jit(lambda x: jax.jit(lambda x: jax.jit(chain)(x) + 1)(x) * 2),
    "jit that hands through": lambda x: jax.jit(lambda x, y: (y, chain(x), x, 2.0))(x, x + 1),
    "jit with dead parts": lambda x: jax.jit(lambda x: (chain(x), jnp.cos(x)))(x)[0],
    "checkpoint": jax.checkpoint(chain),
    "checkpoint with a policy": jax.checkpoint(
        chain, policy=jax.checkpoint_policies.everything_saveable
    ),
    "custom_jvp": lambda x: relu_like(x) + 1,
    "custom_vjp": lambda x: vjp_like(x) + 1,
    "closed array": lambda x: chain(x * np.arange(4.0, dtype=np.float32)),
    "vmap": jax.vmap(chain),
    "vmapped scan": jax.vmap(lambda x: lax.scan(lambda c, r: (jnp.sin(c) + r, c), 0.0, x)),
    "scan": lambda x: lax.scan(lambda c, r: (chain(c) + r, c.sum()), x[0], x),
    "scan without slices": lambda x: lax.scan(lambda c, _: (chain(c), c), x, length=3),
    "scan without carry": lambda x: lax.scan(lambda c, r: (None, chain(r)), None, x),
    "empty scan": lambda x: lax.scan(lambda c, r: (chain(c) + r, c), x[0], x[:0]),
    "reverse scan": lambda x: lax.scan(lambda c, r: (chain(c) + r, c), x[0], x, reverse=True),
    "unrolled scan": lambda x: lax.scan(lambda c, r: (chain(c) + r, c), x[0], x, unroll=2),
    "weak carry": lambda x: lax.scan(lambda c, r: (c + chain(r).sum(), c), 0.0, x),
    "map": lambda x: lax.map(chain, x),
    "generation": generate,
    "nested scan": lambda x: lax.scan(
        lambda c, r: (lax.scan(lambda d, s: (chain(d) + s, d), c, x)[0] + r, c.sum()), x[0], x
    ),
    "fori_loop": lambda x: lax.fori_loop(0, 3, lambda i, c: chain(c) + i, x),
    "fori_loop to a traced end": lambda x: lax.fori_loop(
        0, x[0].astype(int).sum() + 5, lambda i, c: chain(c) + i, x
    ),
    "while": lambda x: lax.while_loop(
        lambda s: s[0] < 4, lambda s: (s[0] + 1, chain(s[1])), (0, x)
    ),
    "while, changed condition": lambda x: lax.while_loop(
        lambda s: jnp.sin(s[0]) < 0.9, lambda s: (s[0] + 0.1, s[1] * 2), (0.0, x)
    ),
    "while, value only out": lambda x: lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.sin(x + s[0])), (0, x)
    )[1],
    "while that never runs": lambda x: lax.while_loop(
        lambda s: s[0] < 0, lambda s: (s[0] + 1, jnp.sin(x + s[0])), (0, x)
    )[1],
    "cond": lambda x: lax.cond(x[0, 0] > 0, chain, lambda x: x * 2, x),
    "cond, other way": lambda x: lax.cond(x[0, 0] < 0, chain, lambda x: x * 2, x),
    "cond by a bool": lambda x: lax.cond((x > 0).all(), chain, lambda x: x * 2, x),
    "switch": lambda x: [
        lax.switch(i, [chain, jnp.cos, lambda x: jnp.sin(x + 1)], x) for i in (0, 1, 2, 5)
    ],
    "cond without operands": lambda x: lax.cond(x[0, 0] > 0, lambda: chain(x), lambda: x),
    "cond with a weak result": lambda x: lax.cond(
        x[0, 0] > 0, lambda x: jnp.sin(x).sum(), lambda x: 0.0, x
    ),
    "cond with dead results": lambda x: lax.cond(
        x[0, 0] > 0, lambda x: (chain(x), jnp.sin(x)), lambda x: (x, x), x
    )[0],
    "cond in scan in while": lambda x: lax.while_loop(
        lambda s: s[0] < 2,
        lambda s: (
            s[0] + 1,
            lax.scan(
                lambda c, r: (lax.cond(c.sum() > 0, chain, lambda c: c - 1, c) + r, None), s[1], x
            )[0],
        ),
        (0, x[0]),
    ),
    "scan in cond in jit": jax.jit(
        lambda x: lax.cond(
            x[0, 0] > 0,
            lambda x: lax.scan(lambda c, r: (jax.checkpoint(chain)(c) + r, c), x[0], x),
            lambda x: (x[0], x),
            x,
        )
    ),
    "associative_scan": lambda x: lax.associative_scan(lambda a, b: jnp.sin(a) + b, x),
    "value and grad": jax.value_and_grad(lambda x: jnp.sum(jax.checkpoint(chain)(x))),
    "grad of a scan": jax.grad(
        lambda x: lax.scan(lambda c, r: (chain(c) + r, None), x[0], x)[0].sum()
    ),
    "integers and bools": lambda x: lax.scan(
        lambda c, r: ((c[0] + 1, c[1] ^ (jnp.sin(r).sum() > 0)), c[0]), (0, False), x
    ),
    "debug print": lambda x: jax.debug.print("{}", jnp.sin(x).sum()) or chain(x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replacing_by_the_same(name):
    fn = FUNCTIONS[name]
    got, _, _, nodes = replaced(fn, X)
    assert nodes or name in ("empty scan", "cond by a bool")
    same(got, jax.jit(fn)(X))


@pytest.mark.parametrize("name", ["generation", "jit with dead parts", "cond with dead results"])
def test_replacing_nothing(name):
    fn = FUNCTIONS[name]
    got, reports, _, _ = replaced(fn, X, names=())
    assert reports == {}
    same(got, jax.jit(fn)(X))


@pytest.mark.parametrize("case", FFN_CASES[::10] + HEAD_CASES[::10], ids=str)
def test_replacing_the_products_of_the_zoo(case):
    got, _, _, nodes = replaced(case.fn, case.params, *case.args, names=("dot_general",))
    assert nodes
    same(got, jax.jit(case.fn)(case.params, *case.args))


def test_no_replacement_gives_the_same_jaxpr():
    """What did not change goes through as it was."""
    for name in ("scan in cond in jit", "nested scan", "custom_jvp", "checkpoint", "while"):
        traced = trace(FUNCTIONS[name], (X,), {}, ())
        again = jax.make_jaxpr(lambda x, t=traced: rewrite(t, [])({0: x})[0])(X)
        want = jax.make_jaxpr(FUNCTIONS[name])(X)
        assert [str(e.primitive) for e in again.eqns] == [str(e.primitive) for e in want.eqns]


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
        jaxpr = eqn.params["jaxpr"]
    assert [eqn.primitive for eqn in found] == [p.jit_p, p.remat_p, p.jit_p]
    assert [found[i].params["name"] for i in (0, 2)] == ["fn", "named"]


def test_derivatives_of_what_was_written_again():
    fn = FUNCTIONS["scan in cond in jit"]
    traced = trace(fn, (X,), {}, ())
    rewritten = rewrite(traced, [Same("s", (node,)) for node in nodes_of(traced, "sin")])
    loss = lambda x: sum(jnp.sum(r * r) for r in rewritten({0: x})[0])  # noqa: E731
    want = jax.grad(lambda x: sum(jnp.sum(r * r) for r in jax.tree.leaves(fn(x))))(X)
    np.testing.assert_allclose(jax.grad(loss)(X), want, rtol=1e-6)
    batch = jnp.stack([X, -X])
    np.testing.assert_allclose(
        jax.vmap(lambda x: rewritten({0: x})[0][0])(batch), jax.vmap(fn)(batch)[0], rtol=1e-6
    )


def test_needs_are_the_inputs_that_are_still_read():
    def fn(w, v, x):
        return lax.scan(lambda c, w: (jnp.sin(c * w), c * v), x, w)[0]

    got, _, rewritten, _ = replaced(fn, X, X[0], X[0])
    assert rewritten.needs == {0, 2}
    same(got, jax.jit(fn)(X, X[0], X[0]))


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
    results, _ = jax.jit(lambda x: rewritten({0: x}))(X)
    same(jax.tree.unflatten(traced.out_tree, results), jax.jit(fn)(X))


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
    results, reports = jax.jit(lambda x: rewrite(traced, [swap])({0: x}))(X)
    same(jax.tree.unflatten(traced.out_tree, results), jax.jit(fn)(X))
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
    np.testing.assert_allclose(got, jax.jit(fn)(X), rtol=1e-5, atol=1e-5)
