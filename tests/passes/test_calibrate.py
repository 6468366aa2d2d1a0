"""What calibration sees of a site's inputs equals a plain computation in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hire_rewrite as hire
from tests.cases import D, Oracle, T, inputs
from tests.cases_ffn import LAYERS, NEST, PLAIN, STACK, gated, plain
from tests.cases_head import EMBED

X = inputs(T, D)


@dataclasses.dataclass(frozen=True)
class Recorder(Oracle):
    """A predictor that keeps what it is fitted to."""

    wants_calibration = True

    def fit(self, rows, moments=None, top=None):
        seen = {"count": moments.count, "mean": moments.mean, "covariance": moments.covariance()}
        return super().fit(rows, moments, top) | seen


RULES = (
    hire.FFN(k=0.5, group=1, predictor=Recorder(), force=True),
    hire.Head(k=2, candidates=4, min_width=2, predictor=Recorder(), force=True),
)


def seen(fn, params, *args, batches=None):
    """What the predictor of each site was fitted to, by the site's name."""
    batches = [args] if batches is None else batches
    packed = hire.transform(fn, *RULES).pack(params, *args, calibration=batches)
    return {name: state.predictor for name, state in packed.sites.items()}


def check(recorded, tokens):
    """`tokens`: [layers, n, d]."""
    tokens = np.asarray(tokens, np.float64)
    np.testing.assert_array_equal(recorded["count"], [tokens.shape[1]] * len(tokens))
    np.testing.assert_allclose(recorded["mean"], tokens.mean(1), rtol=1e-4, atol=1e-5)
    covariance = [np.cov(layer.T, bias=True) for layer in tokens]
    np.testing.assert_allclose(recorded["covariance"], covariance, rtol=1e-3, atol=1e-4)


def numpy_layer(p, x):
    """One layer in numpy."""
    return np.maximum(x @ np.asarray(p["up"]), 0) @ np.asarray(p["down"])


def layer(stack, i):
    return {name: np.asarray(w)[i] for name, w in stack.items()}


def passed(params, x, count):
    """The inputs of so many layers that follow one another, with the same weights."""
    seen = []
    for _ in range(count):
        seen.append(x)
        x = numpy_layer(params, x)
    return seen


def test_one_site():
    check(seen(plain(), PLAIN, X)["p"], X[None])
    check(seen(gated(), PLAIN | {"gate": PLAIN["up"]}, X)["p"], X[None])
    batch = inputs(2, T, D)
    check(seen(plain(), PLAIN, batch)["p"], batch.reshape(1, -1, D))


def test_transposed_input():
    fn = lambda p, x: (p["down"].T @ jax.nn.relu(p["up"].T @ x)).T  # noqa: E731
    check(seen(fn, PLAIN, X.T)["p"], X[None])


@pytest.mark.parametrize("reverse", [False, True])
def test_layers_of_a_scan_apart(reverse):
    def fn(p, x):
        return lax.scan(lambda c, w: (plain()(w, c), None), x, p, reverse=reverse)[0]

    tokens, x = [None] * LAYERS, np.asarray(X)
    for i in reversed(range(LAYERS)) if reverse else range(LAYERS):
        tokens[i] = x
        x = numpy_layer(layer(STACK, i), x)
    check(seen(fn, STACK, X)["p"], np.stack(tokens))


def test_one_layer_in_a_scan_together():
    def fn(p, x):
        return lax.scan(lambda c, _: (plain()(p, c), None), x, length=3)[0]

    check(seen(fn, PLAIN, X)["p"], np.concatenate(passed(PLAIN, np.asarray(X), 3))[None])


def test_layers_in_a_generation_loop():
    """Apart for each layer, together for all tokens."""

    def fn(p, x):
        def token(c, _):
            c = lax.scan(lambda c, w: (plain()(w, c), None), c, p["layers"])[0]
            return c, (c @ p["embed"].T).argmax(-1)

        return lax.scan(token, x, length=2)

    found = seen(fn, {"layers": STACK, "embed": EMBED}, X)
    assert set(found) == {"p/layers", "p/embed"}
    tokens, last, x = [[] for _ in range(LAYERS)], [], np.asarray(X)
    for _ in range(2):
        for i in range(LAYERS):
            tokens[i].append(x)
            x = numpy_layer(layer(STACK, i), x)
        last.append(x)
    check(found["p/layers"], np.stack([np.concatenate(one) for one in tokens]))
    check(found["p/embed"], np.concatenate(last)[None])


def test_nested_layers():
    def fn(p, x):
        def outer(c, w):
            return lax.scan(lambda c, v: (plain()(v, c), None), c, w)[0], None

        return lax.scan(outer, x, p)[0]

    tokens, x = [], np.asarray(X)
    for i in range(2):
        for j in range(2):
            tokens.append(x)
            x = numpy_layer(layer(NEST, (i, j)), x)
    check(seen(fn, NEST, X)["p"], np.stack(tokens))


def test_while_loop():
    def fn(p, x):
        return lax.while_loop(lambda s: s[0] > 0, lambda s: (s[0] - 1, plain()(p, s[1])), (3, x))[1]

    check(seen(fn, PLAIN, X)["p"], np.concatenate(passed(PLAIN, np.asarray(X), 3))[None])


def test_branches():
    def fn(p, x):
        def token(c, row):
            return c, lax.cond(row[0] > 0, lambda row: plain()(p, row), lambda row: row, row)

        return lax.scan(token, 0, x)[1]

    x = inputs(8, D)
    taken = x[x[:, 0] > 0]
    assert 1 < len(taken) < len(x)
    check(seen(fn, PLAIN, x)["p"], taken[None])


def test_inside_calls():
    def fn(p, x):
        return jax.jit(lambda x: jax.checkpoint(lambda x: plain()(p, x))(x))(x)

    check(seen(fn, PLAIN, X)["p"], X[None])


# Over batches


def test_batches_of_several_sizes_add_up():
    batches = [inputs(n, D, seed=n) for n in (1, 4, 2, 4)]
    found = seen(plain(), PLAIN, X, batches=((batch,) for batch in batches))
    check(found["p"], np.concatenate(batches)[None])


def test_sites_with_one_packed_copy_add_up():
    def fn(p, x):
        return plain()(p, x), plain()(p, 2 * x)

    check(seen(fn, PLAIN, X)["p#1"], np.concatenate([X, 2 * X])[None])


def test_what_several_tokens_share():
    """Each neuron is a candidate with its frequency, independently for each token."""
    rule = hire.FFN(k=4, candidates=8, group=1, predictor=Oracle(), max_tokens=None, force=True)
    step, samples = hire.transform(plain(), rule), inputs(40, D)
    packed = step.pack(PLAIN, X, calibration=[(samples,)])
    scores = np.asarray(samples) @ np.asarray(PLAIN["up"])
    chosen = np.argsort(-scores, axis=1)[:, :8]
    chance = np.bincount(chosen.ravel(), minlength=scores.shape[1]) / len(samples)
    for tokens in (2, 4):
        union = round((1 - (1 - chance) ** tokens).sum())
        assert 8 < union < 8 * tokens
        (site,) = step.plan(packed, X[:1].repeat(tokens, 0)).sites
        assert site.bytes_after == (union + min(union, 4 * tokens)) * D * 4


BAD = {
    "no tuple": ([X], "tuple"),
    "the weights too": ([(X,), (PLAIN, X)], "batch 1 has 2 argument"),
    "another structure": ([([X],)], "structure"),
    "another size": ([(X,), (X[:, :-1],)], "calibration batch 1"),
    "another dtype": ([(X.astype(jnp.bfloat16),)], "bfloat16"),
    "another rank": ([(X[0],)], "leading sizes"),
    "none": ([], "no calibration batch"),
    "NaN": ([(X,), (X.at[0, 0].set(jnp.nan),)], "NaN"),
    "infinity": ([(X.at[0, 0].set(jnp.inf),)], "infinity"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_batches(name):
    batches, word = BAD[name]
    with pytest.raises((hire.HireRewriteError, TypeError)) as caught:
        seen(plain(), PLAIN, X, batches=batches)
    assert word in "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])


def test_batches_of_a_generator_that_has_run():
    batches = (batch for batch in [(X,), (X,)])
    step = hire.transform(plain(), hire.FFN(k=8, predictor=hire.LowRank(4), force=True))
    step.pack(PLAIN, X, calibration=batches)
    with pytest.raises(hire.HireRewriteError, match="generator"):
        step.pack(PLAIN, X, calibration=batches)


def test_a_site_that_no_batch_reaches():
    """A branch that was never taken has seen nothing to fit a predictor to."""

    def fn(p, x):
        return lax.cond(x.sum() > 1e9, lambda x: plain()(p, x), lambda x: x, x)

    with pytest.raises(hire.HireRewriteError, match="p: no calibration batch"):
        seen(fn, PLAIN, X)
