"""Weights inside loops, computed outside for all iterations at once, equal a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hire_rewrite as hire
from hire_rewrite.graph.trace import trace
from hire_rewrite.graph.weights import Stacked, Stacker, loops_of, narrow
from tests.cases import D, F, T, found_in, inputs, rand
from tests.cases_ffn import NEST, PLAIN, STACK, plain

L, N = 3, 4
STACKED, NESTED, X = rand(L, N, N), rand(L, 2, N, N), inputs(2, N)


def stacked(fn, *weights):
    """The weight of the innermost product: for each iteration of the loops over which it varies."""
    traced = trace(fn, (*weights, X), {}, tuple(range(len(weights))))
    dots = [n for s in traced.scope.walk() for n in s.nodes if str(n.primitive) == "dot_general"]
    weight = next(v for v in dots[-1].ins if traced.provenance.is_weight(v))
    leaves = jax.tree.leaves(weights)
    inputs = zip(traced.scope.inputs, leaves, strict=False)
    stacker = Stacker({value: Stacked(leaf, ()) for value, leaf in inputs})
    varying = traced.provenance.varies_over(weight)
    loops = loops_of(weight.scope, varying)
    return np.asarray(stacker.stack(weight, loops)), stacker, weight


def scan(body, xs=None, length=None, **kwargs):
    return lax.scan(lambda c, x: (body(c, x), None), X, xs, length=length, **kwargs)[0]


def counted(body, start=0, step=1, length=L, **kwargs):
    def both(state, _):
        i, c = state
        return (i + step, body(c, i)), None

    return lax.scan(both, (start, X), length=length, **kwargs)[0][1]


def at(w, i):
    return lax.dynamic_index_in_dim(w, i, keepdims=False)


# What the body multiplies by in each iteration, in the order of the slices.
CASES = {
    "no loop": (lambda w, x: x @ w[0].T, lambda w: [w[0].T]),
    "sliced": (lambda w, x: scan(lambda c, v: c @ v, w), list),
    "reverse": (lambda w, x: scan(lambda c, v: c @ v, w, reverse=True), list),
    "transposed inside": (
        lambda w, x: scan(lambda c, v: jnp.einsum("td,hd->th", c, v.T * 2), w),
        lambda w: [v.T * 2 for v in w],
    ),
    "cast inside": (
        lambda w, x: scan(lambda c, v: c @ v.astype(jnp.bfloat16).astype(jnp.float32), w),
        lambda w: [np.asarray(v, jnp.bfloat16).astype(np.float32) for v in w],
    ),
    "the same in all": (lambda w, x: scan(lambda c, _: c @ w[1], length=5), lambda w: [w[1]]),
    "mixed with one of all": (
        lambda w, x: scan(lambda c, v: c @ (v + w[0]), w),
        lambda w: [v + w[0] for v in w],
    ),
    "counter": (lambda w, x: counted(lambda c, i: c @ at(w, i)), list),
    "counter, indexed as arrays are": (lambda w, x: counted(lambda c, i: c @ w[i]), list),
    "counter with a step": (
        lambda w, x: counted(lambda c, i: c @ w[i], start=2, step=-2, length=2),
        lambda w: [w[2], w[0]],
    ),
    "counter and slice": (
        lambda w, x: lax.scan(lambda s, v: ((s[0] + 1, s[1] @ (v @ at(w, s[0]))), None), (0, X), w)[
            0
        ][1],
        lambda w: [v @ v for v in w],
    ),
    "reverse counter and slice": (
        # The counter counts up while the slices come last to first.
        lambda w, x: lax.scan(
            lambda s, v: ((s[0] + 1, s[1] @ (v @ at(w, s[0]))), None), (0, X), w, reverse=True
        )[0][1],
        lambda w: [w[i] @ w[L - 1 - i] for i in range(L)],
    ),
    "fori_loop": (lambda w, x: lax.fori_loop(0, L, lambda i, c: c @ w[i], X), list),
    "layer numbers": (lambda w, x: scan(lambda c, i: c @ w[i], jnp.array([2, 0])), None),
    "in a call": (
        lambda w, x: scan(jax.checkpoint(lambda c, v: jax.jit(lambda a, b: a @ b)(c, v)), w),
        list,
    ),
    "in a branch": (
        lambda w, x: scan(lambda c, v: lax.cond(c[0, 0] > 0, lambda c: c @ v, jnp.sin, c), w),
        list,
    ),
    "chosen by a weight": (
        lambda w, x: scan(
            lambda c, v: c @ lax.cond(v[0, 0] > 0, lambda v: v, lambda v: v * 10, v), w
        ),
        lambda w: [v if v[0, 0] > 0 else v * 10 for v in w],
    ),
    "made by a loop over weights": (
        lambda w, x: scan(lambda c, v: c @ lax.scan(lambda s, u: (s + u, s), v, w)[0], w),
        lambda w: [v + np.sum(w, 0) for v in w],
    ),
}
CASES["layer numbers"] = (CASES["layer numbers"][0], lambda w: [w[2], w[0]])


@pytest.mark.parametrize("name", CASES)
def test_one_loop(name):
    fn, loop = CASES[name]
    got, _, _ = stacked(fn, STACKED)
    np.testing.assert_allclose(got, np.stack(loop(np.asarray(STACKED))), rtol=1e-6)


def nested(outer, inner, **kwargs):
    return lambda w, x: scan(
        lambda c, v: lax.scan(lambda c, u: (inner(c, u, v, w), None), c, outer(v))[0], w, **kwargs
    )


NESTS = {
    "both": (nested(lambda v: v, lambda c, u, v, w: c @ u), lambda w, i, j: w[i, j]),
    "both, outer reverse": (
        nested(lambda v: v, lambda c, u, v, w: c @ u, reverse=True),
        lambda w, i, j: w[i, j],
    ),
    "both and their neighbours": (
        nested(lambda v: v, lambda c, u, v, w: c @ (u + v[0] + 2 * w[0, 0])),
        lambda w, i, j: w[i, j] + w[i, 0] + 2 * w[0, 0],
    ),
    "two counters": (
        lambda w, x: lax.fori_loop(
            0, L, lambda i, c: lax.fori_loop(0, 2, lambda j, c: c @ w[i, j], c), X
        ),
        lambda w, i, j: w[i, j],
    ),
    "inner counter begins at the outer one": (
        lambda w, x: counted(
            lambda c, i: lax.scan(
                lambda s, _: ((s[0] + 1, s[1] @ w[s[0], 0]), None), (i, c), length=2
            )[0][1],
            length=2,
        ),
        lambda w, i, j: w[i + j, 0],
    ),
}


@pytest.mark.parametrize("name", NESTS)
def test_nested_loops(name):
    fn, entry = NESTS[name]
    got, _, _ = stacked(fn, NESTED)
    w = np.asarray(NESTED)
    count = 2 if name.startswith("inner") else L
    want = [entry(w, i, j) for i in range(count) for j in range(2)]
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-6)


def test_only_the_inner_or_the_outer_loop():
    inner = nested(lambda v: NESTED[0], lambda c, u, v, w: c @ u)
    got, _, _ = stacked(inner, NESTED)
    np.testing.assert_array_equal(got, NESTED[0])
    outer = nested(lambda v: v, lambda c, u, v, w: c @ v[1])
    got, _, _ = stacked(outer, NESTED)
    np.testing.assert_array_equal(got, NESTED[:, 1])


def test_stack_repeats_what_does_not_vary():
    """A site's weights are stacked over the same loops, even one that stays the same."""
    _, stacker, weight = stacked(nested(lambda v: v, lambda c, u, v, w: c @ u), NESTED)
    inner, outer, root = weight.scope.ancestors()
    (stack,) = (v for v in outer.inputs if v.shape == NESTED.shape[1:])
    np.testing.assert_array_equal(stacker.stack(stack, [outer]), NESTED)
    both = stacker.stack(stack, [outer, inner]).reshape(L, 2, 2, N, N)
    np.testing.assert_array_equal(both, jnp.stack([NESTED, NESTED], 1))
    whole = stacker.stack(root.inputs[0], [inner])
    np.testing.assert_array_equal(whole, jnp.stack([NESTED, NESTED]))
    assert stacker.stack(root.inputs[0], []).shape == (1, *NESTED.shape)


def test_layers_and_site_loops():
    _, (found,) = found_in(
        lambda p, x: lax.scan(
            lambda c, w: (lax.scan(lambda c, v: (plain()(v, c), None), c, w)[0], None), x, p
        )[0],
        NEST,
        inputs(T, D),
    )
    _, (one,) = found_in(
        lambda p, x: lax.scan(lambda c, _: (plain()(p, c), None), x, length=7)[0],
        PLAIN,
        inputs(T, D),
    )
    assert one.layers == 1
    _, (both,) = found_in(
        lambda p, x: lax.scan(lambda c, u: (jax.nn.relu(c @ u) @ p["down"], None), x, STACK["up"])[
            0
        ],
        PLAIN,
        inputs(T, D),
    )
    # One of its weights varies, so the site does.
    assert both.layers == len(STACK["up"])
    assert found.repeats == 4


@pytest.mark.parametrize(
    ("dtype", "cast", "kept"),
    [
        (jnp.bfloat16, lambda w: w.astype(jnp.float32), jnp.bfloat16),
        (jnp.float16, lambda w: w.astype(jnp.float32), jnp.float16),
        (jnp.float32, lambda w: w.astype(jnp.bfloat16), jnp.bfloat16),
        (jnp.bfloat16, lambda w: w.astype(jnp.float16), jnp.float16),
        (jnp.int8, lambda w: w.astype(jnp.float32), jnp.float32),
        (jnp.bfloat16, lambda w: w.astype(jnp.float32) * 2, jnp.float32),
    ],
)
def test_narrow(dtype, cast, kept):
    """Casts that lose nothing are repeated after reading; others are done once."""
    params = {"up": rand(D, F).astype(dtype), "down": rand(F, D)}
    fn = lambda p, x: jax.nn.relu(x @ cast(p["up"]).astype(jnp.float32)) @ p["down"]  # noqa: E731
    _, (found,) = found_in(fn, params, inputs(T, D))
    assert narrow(found.match.linears[0].weight).dtype == kept


def test_as_many_operations_in_a_row_as_there_are():
    def fn(w, x):
        for _ in range(5000):
            w = w * jnp.float32(0.9999)
        return x @ w

    found, _, _ = stacked(fn, STACKED[0])
    np.testing.assert_allclose(found[0], STACKED[0] * 0.9999**5000, rtol=1e-3)
    step = hire.transform(fn, hire.Linear(encoding=hire.Float("float32"), force=True))
    packed = step.pack(STACKED[0], X)
    assert len(packed.sites) == 1
    np.testing.assert_allclose(step(packed, X), fn(STACKED[0], X), rtol=1e-4)


def test_indices_that_many_operations_make():
    """Each of them may be as wide as 64 bits, for what is known of it."""

    def fn(w, x):
        i = jnp.argmax(w[0, 0]) % 2
        for _ in range(2000):
            i = jnp.reshape(lax.max(lax.min(i, 1), 0), ())
        return x @ w[i]

    found, _, _ = stacked(fn, STACKED)
    assert any((found[0] == layer).all() for layer in STACKED[:2])
    assert len(hire.transform(fn, hire.Linear(force=True)).plan(STACKED, X).sites) == 1


def test_what_nobody_reads_any_more_is_not_held():
    def fn(w, x):
        shared = w * 2
        for _ in range(30):
            w = w + shared @ w
        return x @ (w + shared)

    before = len(jax.live_arrays())
    found, stacker, _ = stacked(fn, STACKED[0])
    assert len(jax.live_arrays()) - before < 5
    want, shared = np.float64(STACKED[0]), 2 * np.float64(STACKED[0])
    for _ in range(30):
        want = want + shared @ want
    np.testing.assert_allclose(found[0], want + shared, rtol=1e-3)
    del stacker
