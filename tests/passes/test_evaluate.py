"""Batches of many tokens are measured as their tokens one by one, as decoding has them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from hire_rewrite import FFN, Blocks, Head, Linear
from hire_rewrite.ops.encodings import Float, Nested
from hire_rewrite.ops.predictors import Cascade, LowRank, Quantized
from hire_rewrite.ops.quality import Choice, Comparison, quality
from tests.cases import Oracle, inputs, rand

D, F, V, TOKENS, EXPERTS = 64, 128, 256, 64, 2
ROWS, FEW_BITS = Blocks(4), Quantized(4)
PARAMS = {
    "q": rand(D, D, seed=1),
    "gate": rand(D, F, seed=2),
    "up": rand(D, F, seed=3),
    "down": rand(F, D, seed=4),
    "embed": inputs(V, D, seed=5),
}
VOCABULARY = Head(min_width=100, path="says what a vocabulary is, and asks for none")
WORDS = np.random.default_rng(0).permutation(V)[:TOKENS]


def step(params, tokens):
    """Logits [tokens, V] of tokens that do not see each other."""
    x = params["embed"][tokens]
    x = x + jnp.tanh(x @ params["q"])
    x = x + (jax.nn.relu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]
    return x @ params["embed"].T / 8


def linear(k=0, encoding=ROWS, **settings):
    return Linear(k, encoding=encoding, path="q$", force=True, **settings)


def guessed(k, encoding=ROWS, **settings):
    return FFN(k, tail="predicted", encoding=encoding, force=True, **settings)


def zeros(k, **settings):
    return FFN(k, group=4, predictor=Oracle(0.3), force=True, **settings)


def head(predictor=FEW_BITS, **settings):
    return Head(4, min_width=100, predictor=predictor, force=True, **settings)


RULES = {
    "linear in 4 bits": linear(),
    "linear, inputs rounded": linear(round_inputs=True),
    "linear, some inputs exactly": linear(0.03),
    "linear, some inputs in 8 bits, the others rounded": linear(
        0.03, exact=Blocks(8), round_inputs=True
    ),
    "linear in halves": linear(2, Nested(), exact=Float("bfloat16"), round_inputs=True),
    "linear, all inputs in 8 bits": linear(1.0, exact=Blocks(8)),
    "linear head": Linear(
        0.03, encoding=Blocks(4, minimum=True), path="embed", lookups=False, force=True
    ),
    "FFN guessed": guessed(0),
    "FFN guessed, inputs rounded": guessed(0, round_inputs=True),
    "FFN guessed, some neurons exactly": guessed(0.05),
    "FFN guessed, any number of tokens": guessed(0.05, max_tokens=None),
    "FFN guessed, some neurons in 8 bits, inputs rounded": guessed(
        0.05, group=4, exact=Blocks(8), round_inputs=True, max_tokens=None
    ),
    "FFN guessed, all neurons in 8 bits": guessed(1.0, exact=Blocks(8)),
    "FFN": zeros(0.25),
    "FFN, any number of tokens": zeros(0.25, max_tokens=None),
    "FFN, more than the budget": zeros(0.25, budget=0.5, max_tokens=None),
    "FFN, some always": zeros(0.25, common=8),
    "head": head(candidates=8),
    "head, all rows": head(candidates=1.0),
    "head, proved": head(Quantized(), candidates=8, certify=True),
    "head in two steps": head(Cascade(LowRank(8), Quantized(4), 32), candidates=8),
}


@functools.cache
def dense_logits():
    return step(PARAMS, WORDS)


def divergences(got):
    p, q = (jax.nn.log_softmax(z) for z in (dense_logits(), got))
    return np.asarray((jnp.exp(p) * (p - q)).sum(-1))


def decoded(run, packed):
    """The logits of all tokens, each of a call of its own."""
    one = jax.jit(run)
    return jnp.concatenate([one(packed, jnp.asarray([word])) for word in WORDS])


def packed_by(run):
    return run.pack(PARAMS, WORDS[:1], calibration=[(WORDS,), (WORDS[::-1],)])


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", RULES)
def test_many_tokens_are_measured_as_each_alone(name):
    run = hire.transform(step, RULES[name], VOCABULARY, on_miss="ignore")
    packed = packed_by(run)
    together = run.evaluate(packed, [(WORDS,)], weights=PARAMS)
    apart = run.evaluate(packed, [(WORDS[i : i + 1],) for i in range(TOKENS)], weights=PARAMS)
    got = decoded(run, packed)
    for report in (together, apart):
        assert report.model.kl == pytest.approx(divergences(got).mean(), rel=1e-2, abs=1e-7)
        same = (got.argmax(-1) == dense_logits().argmax(-1)).mean()
        assert report.model.agreement == pytest.approx(float(same))
    (all_at_once,), (one_by_one,) = together.sites, apart.sites
    assert all_at_once.tokens == one_by_one.tokens == TOKENS
    for figure in ("recall", "best", "mass", "proved"):
        assert getattr(all_at_once, figure) == pytest.approx(getattr(one_by_one, figure))
    for figure in ("error", "error_exact"):
        want = getattr(one_by_one, figure)
        assert getattr(all_at_once, figure) == pytest.approx(want, rel=1e-3, abs=1e-6)
    assert apart.stay_dense == ()
    limited = RULES[name].max_tokens is not None
    assert together.stay_dense == ((all_at_once.name,) if limited else ())


def test_two_results_of_a_head_with_all_rows_between_them():
    """Where the candidates of both may be all rows, all are computed."""

    def both(params, x):
        logits = x @ params["embed"].T
        return logits + params["bias"], logits * 2

    params = {"embed": PARAMS["embed"], "bias": inputs(V, seed=9)}
    run, x = hire.transform(both, head(candidates=0.5)), inputs(TOKENS, D)
    packed = run.pack(params, x[:1])
    np.testing.assert_allclose(run(packed, x[:1])[1], both(params, x[:1])[1], rtol=1e-4, atol=1e-4)
    assert run.evaluate(packed, [(x,)]).model.kl == pytest.approx(0.0, abs=1e-6)


def mixture(params, x):
    """Of several experts [experts, tokens, D], each on tokens of its own."""
    x = jnp.tanh(jnp.einsum("etd,edh->eth", x, params["q"]))
    h = jax.nn.relu(jnp.einsum("etd,edf->etf", x, params["up"]))
    return jnp.einsum("etf,efd->etd", h, params["down"])


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "rule",
    [linear(0.05, exact=Blocks(8), round_inputs=True), guessed(0.05), zeros(0.25)],
    ids=["linear", "guessed", "zero"],
)
def test_tokens_of_experts(rule):
    params = {
        "q": rand(EXPERTS, D, D, seed=1),
        "up": rand(EXPERTS, D, F, seed=2),
        "down": rand(EXPERTS, F, D, seed=3),
    }
    run, x = hire.transform(mixture, rule), inputs(EXPERTS, TOKENS, D)
    packed = run.pack(params, x[:, :1])
    alone = [(x[:, i : i + 1],) for i in range(TOKENS)]
    (together,) = run.evaluate(packed, [(x,)], weights=params).sites
    (apart,) = run.evaluate(packed, alone, weights=params).sites
    assert apart.error > 1e-3
    assert together.error == pytest.approx(apart.error, rel=1e-3)
    assert together.recall == pytest.approx(apart.recall)


TRIED = {
    "linear": (Linear(path="q$"),),
    "FFN": (FFN(0.05, tail="predicted"),),
    "head": (Linear(path="embed", lookups=False),),
    "everything": (Linear(), FFN(0.05, tail="predicted"), Head(min_width=100)),
}


@pytest.mark.parametrize(
    ("name", "kl"),
    [
        ("linear", 3e-3),
        *(
            pytest.param(*some, marks=pytest.mark.long)
            for some in [("FFN", 3e-3), ("head", 3e-3), ("everything", 3e-3), ("everything", 0.1)]
        ),
    ],
)
def test_tuned_rules_are_within_their_budget_in_decoding(name, kl):
    """Many tokens in each batch, where an FFN that is asked for stays dense."""
    batches = [(jnp.asarray(np.roll(WORDS, 7 * i)[: TOKENS - i]),) for i in range(4)]
    asked = hire.transform(step, *TRIED[name], VOCABULARY, on_miss="ignore")
    tuned = asked.tune(PARAMS, batches, kl=kl)
    assert tuned.chosen
    run = hire.transform(step, *tuned, VOCABULARY, on_miss="ignore")
    packed = run.pack(PARAMS, WORDS[:1])
    report = run.evaluate(packed, batches[:3], weights=PARAMS)
    assert 0 <= tuned.kl <= kl
    assert report.model.kl == pytest.approx(tuned.kl, rel=1e-3, abs=1e-8)
    words = np.concatenate([np.asarray(tokens) for (tokens,) in batches[:3]])
    each = divergences(decoded(run, packed))[[list(WORDS).index(word) for word in words]]
    assert tuned.kl == pytest.approx(each.mean(), rel=1e-2, abs=1e-7)


def test_of_a_token_of_nan_nothing_is_found():
    """Though all units are candidates; telemetry, which goes on, counts it so too."""
    rank = inputs(3, 8).at[1, 5].set(jnp.nan)
    choice = Choice(rank, rank, jnp.ones((3, 8), bool), 2, jnp.ones((3, 8)), -jnp.inf)
    sums = quality(Comparison(rank, rank, rank, choice))
    assert sums.hits.tolist() == [1, 0, 2]
    assert (sums.tokens, sums.best, sums.undefined) == (3, 2, 1)
