"""Moments collected by taps inside a function equal a plain computation in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hire_rewrite as hire
from hire_rewrite import FFN, Head, HireRewriteError, LowRank
from hire_rewrite.passes.calibrate import calibrate
from hire_rewrite.passes.rewrite import rewrite
from tests.cases import D, T, inputs, run
from tests.cases_ffn import LAYERS, NEST, PLAIN, STACK, gated, plain
from tests.cases_head import EMBED

X = inputs(T, D)


RULES = (
    FFN(k=0.5, group=1, predictor=LowRank(4), force=True),
    Head(k=2, candidates=4, min_width=2, force=True),
)


def moments(fn, params, *args):
    """The moments that each site reports in one run, by name."""
    return {name: report[0] for name, report in reports_of(fn, params, *args).items()}


def reports_of(fn, params, *args):
    analysis = hire.transform(fn, *RULES)._analyses.of(None, (params, *args), {})
    taps = rewrite(analysis.trace, [decision.op.observed() for decision in analysis.decisions])
    leaves = jax.tree.leaves((params, *args))
    return run(lambda leaves: taps({i: leaves[i] for i in taps.needs})[1], leaves)


def check(report, tokens):
    """`tokens`: [..., n, d], with the leading axes that the report must have."""
    tokens = np.asarray(tokens, np.float64)
    assert report.count.shape == tokens.shape[:-2]
    np.testing.assert_array_equal(report.count, tokens.shape[-2])
    np.testing.assert_allclose(report.mean, tokens.mean(-2), rtol=1e-4, atol=1e-4)
    rest = tokens - tokens.mean(-2, keepdims=True)
    scatter = np.swapaxes(rest, -1, -2) @ rest
    np.testing.assert_allclose(report.scatter, scatter, rtol=1e-4, atol=1e-4)


def numpy_layer(p, x):
    """One layer in numpy."""
    return np.maximum(x @ np.asarray(p["up"]), 0) @ np.asarray(p["down"])


def layer(stack, i):
    return {name: np.asarray(w)[i] for name, w in stack.items()}


def test_one_site():
    check(moments(plain(), PLAIN, X)["p"], X)
    check(moments(gated(), PLAIN | {"gate": PLAIN["up"]}, X)["p"], X)
    check(moments(plain(), PLAIN, X[0])["p"], X[:1])
    batch = inputs(2, T, D)
    check(moments(plain(), PLAIN, batch)["p"], batch.reshape(-1, D))


def test_transposed_input():
    fn = lambda p, x: (p["down"].T @ jax.nn.relu(p["up"].T @ x)).T  # noqa: E731
    check(moments(fn, PLAIN, X.T)["p"], X)


def test_layers_of_a_scan_apart():
    def fn(p, x):
        return lax.scan(lambda c, w: (plain()(w, c), None), x, p)[0]

    seen, x = [], np.asarray(X)
    for i in range(LAYERS):
        seen.append(x)
        x = numpy_layer(layer(STACK, i), x)
    check(moments(fn, STACK, X)["p"], np.stack(seen))

    def back(p, x):
        return lax.scan(lambda c, w: (plain()(w, c), None), x, p, reverse=True)[0]

    seen, x = [], np.asarray(X)
    for i in reversed(range(LAYERS)):
        seen.insert(0, x)
        x = numpy_layer(layer(STACK, i), x)
    check(moments(back, STACK, X)["p"], np.stack(seen))


def test_one_layer_in_a_scan_together():
    def fn(p, x):
        return lax.scan(lambda c, _: (plain()(p, c), None), x, length=3)[0]

    seen, x = [], np.asarray(X)
    for _ in range(3):
        seen.append(x)
        x = numpy_layer(PLAIN, x)
    check(moments(fn, PLAIN, X)["p"], np.concatenate(seen))


def test_layers_in_a_generation_loop():
    """Stacked over the layers, summed over the tokens."""

    def fn(p, x):
        def token(c, _):
            c = lax.scan(lambda c, w: (plain()(w, c), None), c, p["layers"])[0]
            return c, (c @ p["embed"].T).argmax(-1)

        return lax.scan(token, x, length=2)

    params = {"layers": STACK, "embed": EMBED}
    reports = moments(fn, params, X)
    assert set(reports) == {"p/layers", "p/embed"}
    seen, last, x = [[] for _ in range(LAYERS)], [], np.asarray(X)
    for _ in range(2):
        for i in range(LAYERS):
            seen[i].append(x)
            x = numpy_layer(layer(STACK, i), x)
        last.append(x)
    check(reports["p/layers"], np.stack([np.concatenate(tokens) for tokens in seen]))
    check(reports["p/embed"], np.concatenate(last))


def test_nested_layers():
    def fn(p, x):
        def outer(c, w):
            return lax.scan(lambda c, v: (plain()(v, c), None), c, w)[0], None

        return lax.scan(outer, x, p)[0]

    seen, x = [], np.asarray(X)
    for i in range(2):
        for j in range(2):
            seen.append(x)
            x = numpy_layer(layer(NEST, (i, j)), x)
    check(moments(fn, NEST, X)["p"], np.stack(seen).reshape(2, 2, T, D))


def test_while_loop():
    def fn(p, x):
        return lax.while_loop(lambda s: s[0] > 0, lambda s: (s[0] - 1, plain()(p, s[1])), (3, x))[1]

    seen, x = [], np.asarray(X)
    for _ in range(3):
        seen.append(x)
        x = numpy_layer(PLAIN, x)
    check(moments(fn, PLAIN, X)["p"], np.concatenate(seen))


def test_branches():
    def fn(p, x):
        def token(c, row):
            return c, lax.cond(row[0] > 0, lambda row: plain()(p, row), lambda row: row, row)

        return lax.scan(token, 0, x)[1]

    assert 0 < int((X[:, 0] > 0).sum()) < T
    check(moments(fn, PLAIN, X)["p"], X[X[:, 0] > 0])


def test_inside_calls():
    def fn(p, x):
        return jax.jit(lambda x: jax.checkpoint(lambda x: plain()(p, x))(x))(x)

    check(moments(fn, PLAIN, X)["p"], X)


# Over batches


def gather(fn, params, batches, example):
    """What several batches say about the sites of a function."""
    return calibrate(hire.transform(fn, *RULES)._analyses, (params, *example), {}, batches)[1]


def test_batches_of_several_sizes_add_up():
    batches = [(inputs(n, D, seed=n),) for n in (1, 4, 2, 4)]
    totals = gather(plain(), PLAIN, batches, (X,)).sites
    check(totals["p"][0], np.concatenate([batch[0] for batch in batches])[None])


def test_batches_may_come_from_a_generator():
    totals = gather(plain(), PLAIN, ((X * i,) for i in range(3)), (X,)).sites
    check(totals["p"][0], np.concatenate([X * i for i in range(3)])[None])


def test_sites_with_one_state_add_up():
    def fn(p, x):
        return plain()(p, x), plain()(p, 2 * x)

    totals = gather(fn, PLAIN, [(X,)], (X,))
    check(totals.sites["p#1"][0], np.concatenate([X, 2 * X])[None])
    assert totals.sites["p#1"][1].kept.sum() == 2 * T * (PLAIN["up"].shape[1] // 2)


def test_active_neurons_are_counted():
    (report,) = reports_of(plain(), PLAIN, X).values()
    active = report[1]
    h = np.maximum(np.asarray(X) @ np.asarray(PLAIN["up"]), 0)
    k = h.shape[1] // 2
    best = np.argsort(-(h**2), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(active.kept, np.bincount(best.ravel(), minlength=h.shape[1]))
    assert active.tokens == T


def test_what_several_tokens_share():
    """Each neuron is a candidate with its frequency, independently for each token."""
    learned = gather(plain(), PLAIN, [(X,)], (X,)).statistics["p"]
    (report,) = reports_of(plain(), PLAIN, X).values()
    chance = np.asarray(report[1].chosen) / T
    for i, tokens in enumerate((1, 2, 4, 8)):
        assert learned.union[i] == round((1 - (1 - chance) ** tokens).sum())
    assert learned.gathered(1) == learned.union[0]
    assert learned.union[1] <= learned.gathered(3) <= learned.union[2]
    assert learned.gathered(10**6) is None


BAD = {
    "no tuple": ([X], "is a ArrayImpl: give tuples"),
    "another structure": ([(X, X)], "has the structure"),
    "another dtype": ([(X.astype(jnp.bfloat16),)], "only leading sizes may differ"),
    "another rank": ([(X[0],)], "only leading sizes may differ"),
    "none": ([], "no calibration batch reached it"),
    "NaN": ([(X,), (X.at[0, 0].set(jnp.nan),)], "holds a NaN or an infinity"),
    "infinity": ([(X.at[0, 0].set(jnp.inf),)], "holds a NaN or an infinity"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_batches(name):
    batches, message = BAD[name]
    with pytest.raises(HireRewriteError, match=message):
        gather(plain(), PLAIN, batches, (X,))


def test_a_site_that_no_batch_reaches():
    """A branch that was never taken has seen nothing to fit a predictor to."""

    def fn(p, x):
        return lax.cond(x.sum() > 1e9, lambda x: plain()(p, x), lambda x: x, x)

    with pytest.raises(HireRewriteError, match="p: no calibration batch reached it"):
        gather(fn, PLAIN, [(X,)], (X,))
