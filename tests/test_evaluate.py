"""Reports, calibrated sizes and tuning, from the outside."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from hire_rewrite import HireRewriteError
from hire_rewrite.report import Report, SiteReport
from tests.cases import Oracle, close, inputs

V, D, F, L, T = 96, 16, 64, 3, 24
PARAMS = {
    "embed": inputs(V, D, seed=1),
    "layers": {
        "up": inputs(L, D, F, seed=2) / 4,
        "gate": inputs(L, D, F, seed=3) / 4,
        "down": inputs(L, F, D, seed=4) / 8,
    },
}
FFN = hire.FFN(k=0.25, group=4, predictor=Oracle(), force=True)
HEAD = hire.Head(k=4, candidates=12, min_width=64, predictor=Oracle(), force=True)


def model(params, tokens):
    def layer(x, w):
        return x + (jax.nn.relu(x @ w["gate"]) * (x @ w["up"])) @ w["down"], None

    x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers"])
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True)) @ params["embed"].T / 4


def batches(count, seed=0, length=T):
    random = np.random.default_rng(seed)
    return [(jnp.asarray(random.integers(0, V, length), jnp.int32),) for _ in range(count)]


def itself(tokens):
    return tokens


@functools.cache
def report_of(*rules, targets=None, fn=model):
    step = hire.transform(fn, *rules)
    packed = step.pack(PARAMS, *batches(1)[0], calibration=batches(3))
    return step, packed, step.evaluate(packed, batches(2, seed=9), targets=targets)


def test_a_predictor_without_error_misses_nothing():
    _, _, report = report_of(FFN, HEAD, targets=itself)
    head, ffn = report.sites
    assert (head.kind, ffn.kind) == ("head", "ffn")
    assert (head.k, head.candidates, ffn.k, ffn.candidates) == (4, 12, 4, 8)
    assert len(ffn.recall) == L
    for site in report.sites:
        assert site.tokens == 2 * T
        assert min(site.recall) == min(site.recall_p1) == site.best == 1.0
        assert site.mass == pytest.approx(1.0)
        assert site.error_exact < 0.01
        assert site.proved is None
    assert ffn.error > 0.05
    assert report.model.tokens == 2 * T
    assert report.model.agreement_exact == 1.0
    assert 0 <= report.model.kl_exact < 1e-4 < report.model.kl


def test_everything_among_the_candidates_is_the_dense_model():
    full = hire.FFN(k=1.0, group=4, predictor=Oracle(), force=True)
    head = hire.Head(k=V, candidates=V, min_width=64, predictor=Oracle(), force=True)
    _, _, report = report_of(full, head, targets=itself)
    assert report.model.agreement == 1.0
    assert report.model.kl == pytest.approx(0.0, abs=1e-5)
    dense, exact, hire_ = report.model.perplexity
    assert dense == pytest.approx(exact, rel=1e-5) == pytest.approx(hire_, rel=1e-5)


def test_figures_equal_those_of_numpy():
    """A head alone, with a predictor that errs."""

    def head(params, x):
        return x @ params["embed"].T

    rule = hire.Head(k=4, candidates=8, min_width=64, predictor=Oracle(1.0), force=True)
    step, xs = hire.transform(head, rule), [(inputs(T, D, seed=s),) for s in (5, 6)]
    packed = step.pack(PARAMS, *xs[0])
    targets = np.arange(T) % 7 - 1
    report = step.evaluate(packed, xs, targets=lambda x: targets)
    rows = np.concatenate([np.asarray(x) for (x,) in xs])
    exact = rows @ np.asarray(PARAMS["embed"]).T
    guessed = exact + np.asarray(packed.sites["params/embed"].predictor["error"])
    top = np.argsort(-exact, 1)[:, :4]
    candidates = np.argsort(-guessed, 1)[:, :8]
    hits = (top[:, :, None] == candidates[:, None]).any(2)
    (site,) = report.sites
    assert hits.mean() < 0.99
    assert site.recall == pytest.approx((hits.mean(),))
    assert site.best == pytest.approx(hits[:, 0].mean())
    assert site.recall_p1 == pytest.approx((np.sort(hits.mean(1))[0],))
    place = (np.argsort(np.argsort(-guessed, 1), 1)[np.arange(2 * T)[:, None], top]).ravel()
    for count, _, (recall,) in site.curve:
        assert recall == pytest.approx((place < count).mean())
    got = np.concatenate([np.asarray(step(packed, x)) for (x,) in xs])
    log_p, log_q = (np.asarray(jax.nn.log_softmax(z)) for z in (exact, got))
    assert report.model.kl == pytest.approx(
        (np.exp(log_p) * (log_p - log_q)).sum(1).mean(), rel=1e-3
    )
    same = exact.argmax(1) == got.argmax(1)
    assert report.model.agreement == pytest.approx(same.mean())
    known = np.tile(targets, 2) >= 0
    nll = [-z[np.arange(2 * T), np.tile(targets, 2)][known].mean() for z in (log_p, log_p, log_q)]
    np.testing.assert_allclose(report.model.perplexity, np.exp(nll), rtol=1e-3)


def test_a_sequence_is_measured_as_its_tokens_alone():
    """Whatever `max_tokens` says, and though all tokens together would ask for all rows."""
    rules = (FFN, HEAD)
    noisy = [hire.FFN(**vars(FFN) | {"predictor": Oracle(0.3)}), HEAD]
    step, packed, report = report_of(*noisy)
    assert report.sites[1].recall[0] < 0.99
    tokens = jnp.concatenate([tokens for (tokens,) in batches(2, seed=9)])
    one = jax.jit(lambda token: step(packed, token[None])[0])
    exact = jax.jit(hire.transform(model, *rules, mode="exact"))(PARAMS, tokens)
    got = jnp.stack([one(token) for token in tokens])
    same = (got.argmax(-1) == exact.argmax(-1)).mean()
    assert report.model.agreement_exact == pytest.approx(float(same))


def test_head_in_a_loop_and_no_head():
    def generate(params, tokens):
        def one(token, _):
            logits = model(params, token)
            return logits.argmax(-1).astype(jnp.int32), logits.argmax(-1)

        return jax.lax.scan(one, tokens, length=2)[1]

    _, _, report = report_of(FFN, HEAD, fn=generate)
    assert report.model is None
    assert [site.tokens for site in report.sites] == [4 * T, 4 * T]

    _, _, report = report_of(FFN, fn=lambda p, t: model(p, t)[..., :8])
    assert [site.kind for site in report.sites] == ["ffn"]
    assert "recall" in str(report)


def test_a_head_that_stays_dense_is_compared_as_well():
    _, _, report = report_of(FFN, hire.Head(path="nowhere", min_width=64))
    assert [site.kind for site in report.sites] == ["ffn"]
    assert report.model.agreement_exact == 1.0


def test_experts_are_layers_of_their_own():
    def experts(params, x):
        h = jax.nn.relu(jnp.einsum("ecd,edf->ecf", x, params["up"]))
        return jnp.einsum("ecf,efd->ecd", h, params["down"])

    params = {"up": inputs(3, D, F), "down": inputs(3, F, D)}
    rule = hire.FFN(k=0.25, group=4, predictor=Oracle(5.0), force=True)
    step, x = hire.transform(experts, rule), inputs(3, 10, D)
    packed = step.pack(params, x, calibration=[(x,)])
    (site,) = step.evaluate(packed, [(x,)]).sites
    assert len(site.recall) == 3
    assert site.tokens == 10
    assert 0.5 < min(site.recall) < 1.0


def test_printed_and_saved(tmp_path):
    _, _, report = report_of(FFN, HEAD, targets=itself)
    assert "perplexity: dense" in str(report)
    path = tmp_path / "report.json"
    text = report.to_json(str(path))
    found = json.loads(path.read_text())
    assert json.loads(text) == found
    assert found["sites"][1]["recall"] == list(report.sites[1].recall)
    assert found["model"]["perplexity"] == list(report.model.perplexity)


def test_bad_input_of_evaluate():
    step, packed, _ = report_of(FFN)
    with pytest.raises(HireRewriteError, match="Packed"):
        step.evaluate(PARAMS, batches(1))
    with pytest.raises(HireRewriteError, match="no batches"):
        step.evaluate(packed, [])
    with pytest.raises(HireRewriteError, match="batch 0"):
        step.evaluate(packed, [[batches(1)[0][0]]])


# k="auto"


def hidden_of(params, tokens):
    """The activations of each layer in numpy, and the rows of its second matrix."""
    x = np.asarray(params["embed"])[np.asarray(tokens)]
    for i in range(L):
        gate, up, down = (np.asarray(params["layers"][n][i]) for n in ("gate", "up", "down"))
        h = np.maximum(x @ gate, 0) * (x @ up)
        yield h, down
        x = x + h @ down


def kept_share(h, k, group=4):
    """Of the non-zero neurons the share that the k best groups hold."""
    groups = h.reshape(len(h), -1, group)
    best = np.argsort(-np.square(groups).sum(2), axis=1, kind="stable")[:, : k // group]
    kept = np.take_along_axis(groups != 0, best[:, :, None], axis=1).sum()
    return kept / (h != 0).sum()


def test_auto_keeps_what_it_was_asked_to_and_not_much_more():
    rule = hire.FFN(k="auto", keep=0.8, group=4, predictor=Oracle(), force=True)
    step, calibration = hire.transform(model, rule), batches(3)
    packed = step.pack(PARAMS, *batches(1)[0], calibration=calibration)
    (learned,) = (site.statistics for site in packed.info.sites)
    tokens = np.concatenate([np.asarray(b) for (b,) in calibration])
    hidden = [h for h, _ in hidden_of(PARAMS, tokens)]
    assert min(kept_share(h, learned.k) for h in hidden) >= 0.8
    assert min(kept_share(h, learned.k - 8) for h in hidden) < 0.8
    (site,) = step.plan(packed, tokens[:1]).sites
    assert f"top {learned.k} of" in site.reason
    want = hire.transform(model, rule.replace(k=learned.k), mode="exact")
    close(step(packed, tokens[:2]), want(PARAMS, tokens[:2]))


def test_auto_of_a_smooth_activation_bounds_the_error():
    def smooth(params, tokens):
        x = params["embed"][tokens]
        w = jax.tree.map(lambda a: a[0], params["layers"])
        return x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]

    rule = hire.FFN(k="auto", keep=0.7, group=4, predictor=Oracle(), force=True)
    step, calibration = hire.transform(smooth, rule), batches(3)
    packed = step.pack(PARAMS, *batches(1)[0], calibration=calibration)
    _, _, report = None, None, step.evaluate(packed, calibration)
    assert report.sites[0].error <= 0.3
    (site,) = packed.info.sites
    smaller = hire.transform(smooth, rule.replace(k=site.statistics.k - 8))
    less = smaller.evaluate(smaller.pack(PARAMS, *batches(1)[0]), calibration)
    assert less.sites[0].error > 0.3


def test_auto_that_does_not_pay_stays_dense():
    rule = hire.FFN(k="auto", keep=0.99, group=4, predictor=hire.Quantized())
    step, (tokens,) = hire.transform(model, rule), batches(1)[0]
    packed = step.pack(PARAMS, tokens, calibration=batches(2))
    (site,) = step.plan(packed, tokens).sites
    assert site.status == "dense"
    close(step(packed, tokens), jax.jit(model)(PARAMS, tokens))


def test_auto_without_calibration_says_so():
    step = hire.transform(model, hire.FFN(k="auto", path="layers", force=True))
    tokens = batches(1)[0][0]
    (site,) = (site for site in step.plan(PARAMS, tokens).sites if site.kind == "ffn")
    assert site.status == "dense"
    assert "calibration" in site.reason
    for call in (step.pack, step, hire.transform(model, *step.rules, mode="exact")):
        with pytest.raises(HireRewriteError, match='params/layers: k="auto"'):
            call(PARAMS, tokens)


# Common neurons, unions


def test_common_neurons_need_no_prediction():
    """Neurons that are always active are computed though the predictor never ranks them."""
    loud = jax.tree.map(jnp.copy, PARAMS)
    loud["layers"]["up"] = loud["layers"]["up"].at[:, :, 20:28].multiply(30.0)
    rule = hire.FFN(k=0.25, group=4, predictor=Oracle(), common=12, force=True)
    step, (tokens,) = hire.transform(model, rule), batches(1)[0:1][0]
    packed = step.pack(loud, tokens, calibration=batches(3))
    assert packed.sites["params/layers"].predictor["rows"].shape == (L, 2 * (F - 12), D)
    want = hire.transform(model, rule, mode="exact")
    for size in (1, 2):
        close(step(packed, tokens[:size]), want(loud, tokens[:size]), tolerance=1e-3)
    report = step.evaluate(packed, batches(1, seed=3))
    assert min(report.sites[0].recall) == 1.0
    with pytest.raises(HireRewriteError, match="calibration"):
        step.pack(loud, tokens)


def test_a_calibrated_plan_estimates_what_tokens_share():
    step = hire.transform(model, hire.FFN(**vars(FFN) | {"k": 4}))
    (tokens,) = batches(1)[0]
    packed = step.pack(PARAMS, tokens, calibration=batches(3))
    (known,) = step.plan(packed, tokens[:4]).sites
    (unknown,) = step.plan(PARAMS, tokens[:4]).sites
    assert known.bytes_after < unknown.bytes_after
    assert "tokens on it is no faster than dense" in known.reason


def test_a_budget_changes_no_result():
    (tokens,) = batches(1)[0]
    rule = hire.FFN(**vars(FFN) | {"predictor": Oracle(0.3)})
    step = hire.transform(model, rule)
    packed = step.pack(PARAMS, tokens)
    want = jnp.concatenate([step(packed, tokens[i : i + 1]) for i in range(3)])
    for budget in (16, 40):
        tight = hire.transform(model, hire.FFN(**vars(rule) | {"budget": budget}))
        again = tight.pack(PARAMS, tokens)
        close(tight(again, tokens[:3]), want, tolerance=1e-3)


# What calibration and weights must not hold


def test_weights_of_nan_are_named():
    step = hire.transform(model, FFN)
    bad = jax.tree.map(jnp.copy, PARAMS)
    bad["layers"]["up"] = bad["layers"]["up"].at[1, 0, 0].set(jnp.nan)
    with pytest.raises(HireRewriteError, match=r"params/layers: .*NaN"):
        step.pack(bad, *batches(1)[0])


def test_too_few_tokens_for_a_rank():
    rule = hire.Head(k=4, candidates=12, min_width=64, predictor=hire.LowRank(12), force=True)
    step = hire.transform(model, rule)
    with pytest.raises(HireRewriteError, match=r"params/embed: .*12"):
        step.pack(PARAMS, *batches(1)[0], calibration=batches(1, length=10))
    step.pack(PARAMS, *batches(1)[0], calibration=batches(2, length=10))


def test_constant_and_dead_columns_of_the_input():
    """A covariance without full rank: the fit stays finite and recalls what there is."""

    def head(params, x):
        return x @ params["embed"].T

    x = inputs(200, D, seed=8).at[:, 3].set(0.0).at[:, 5].set(7.0)
    rule = hire.Head(k=1, candidates=8, min_width=64, predictor=hire.LowRank(8), force=True)
    step = hire.transform(head, rule)
    packed = step.pack(PARAMS, x, calibration=[(x,)])
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(packed.sites))
    report = step.evaluate(packed, [(x[:50],)])
    assert report.sites[0].best > 0.9


# Tuning


def test_tuning_reaches_its_target_on_other_batches_and_reads_less(tmp_path):
    rules = (hire.FFN(k=0.25, group=4, force=True), hire.Head(k=4, min_width=64, force=True))
    step = hire.transform(model, *rules)
    tuned = step.tune(PARAMS, batches(8, length=64), recall=0.9)
    assert [trial.name for trial in tuned.chosen] == ["params/embed", "params/layers"]
    assert "params/layers" in str(tuned)
    again = hire.transform(model, *tuned)
    (tokens,) = batches(1)[0]
    packed = again.pack(PARAMS, tokens, calibration=batches(8, length=64))
    report = again.evaluate(packed, batches(4, seed=77, length=64))
    for site, default in zip(report.sites, step.plan(PARAMS, tokens[:1]).sites, strict=True):
        assert min(site.recall) >= 0.9
        assert site.bytes_read < default.bytes_after
    path = str(tmp_path / "rules.json")
    tuned.save(path)
    assert hire.load_rules(path) == tuple(tuned)


def test_bad_input_of_tune(tmp_path):
    step = hire.transform(model, FFN)
    with pytest.raises(HireRewriteError, match="at least 2"):
        step.tune(PARAMS, batches(1))
    with pytest.raises(HireRewriteError, match=r"recall=1.5"):
        step.tune(PARAMS, batches(2), recall=1.5)
    nothing = hire.transform(model, hire.FFN(k=4, path="nowhere"))
    with pytest.raises(HireRewriteError, match="no rule"):
        nothing.tune(PARAMS, batches(2))
    with pytest.raises(HireRewriteError, match="register its class"):
        hire.save_rules((FFN,), str(tmp_path / "x.json"))
    (tmp_path / "bad.json").write_text('[{"type": "LowRank", "rank": 4}]')
    with pytest.raises(HireRewriteError, match="LowRank"):
        hire.load_rules(str(tmp_path / "bad.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(HireRewriteError, match=r"bad\.json"):
        hire.load_rules(str(tmp_path / "bad.json"))


def test_tuning_leaves_alone_what_default_rules_do():
    """A block that selects nothing by itself stays dense, though rules are written out."""

    def smooth(params, tokens):
        x = params["embed"][tokens]
        w = jax.tree.map(lambda a: a[0], params["layers"])
        x = x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]
        h = x @ w["up"]
        return x + jnp.where(h >= jax.lax.top_k(h, 4)[0][..., -1:], h, 0) @ w["down"]

    tuned = hire.transform(smooth).tune(PARAMS, batches(4), recall=0.9)
    sites = hire.inspect(smooth, PARAMS, batches(1)[0][0][:1], rules=tuned).sites
    assert [site.rule is None for site in sites] == [True, False]


def test_tuning_a_certified_head_and_an_odd_k():
    head = hire.Head(k=4, min_width=64, certify=True, force=True)
    step = hire.transform(model, hire.FFN(k=10, candidates=10, group=8, force=True), head)
    tuned = step.tune(PARAMS, batches(4, length=64), recall=0.9)
    rules = {trial.name: trial.rule for trial in tuned.chosen}
    assert isinstance(rules["params/embed"].predictor, hire.Quantized)
    assert rules["params/layers"].k == 16


def test_the_curve_at_the_own_candidates_is_the_recall():
    """With a bonus for badly guessed rows too, and with fewer positive neurons than k."""
    head = hire.Head(k=4, candidates=12, min_width=64, predictor=hire.LowRank(6), force=True)
    ffn = hire.FFN(k=0.75, candidates=0.8, group=1, predictor=hire.LowRank(8), force=True)
    step = hire.transform(model, ffn, head)
    packed = step.pack(PARAMS, *batches(1)[0], calibration=batches(3))
    for site in step.evaluate(packed, batches(3, seed=5)).sites:
        (own,) = (recall for count, _, recall in site.curve if count == site.candidates)
        assert max(site.recall) < 1.0
        assert own == pytest.approx(site.recall)


def test_no_bonus_without_calibration():
    """Its scale would not be known."""
    rows = np.random.default_rng(0).normal(size=(1000, 16)) * 0.7 ** np.arange(16)
    state = hire.LowRank(8).fit(jnp.asarray(rows, jnp.float32), top=8)
    assert not state["bonus"].any()


def test_a_vocabulary_cut_to_fewer_rows_than_candidates():
    def cut(params, x):
        return (x @ params["embed"].T)[:, :80]

    rule = hire.Head(k=90, candidates=1.0, min_width=64, predictor=Oracle(), force=True)
    step, x = hire.transform(cut, rule), inputs(5, D)
    packed = step.pack(PARAMS, x)
    (site,) = step.evaluate(packed, [(x,)]).sites
    assert site.recall == (1.0,)
    assert site.candidates == 80


def test_targets_that_do_not_fit():
    step, packed, _ = report_of(FFN, HEAD, targets=itself)
    with pytest.raises(HireRewriteError, match="24 rows"):
        step.evaluate(packed, batches(1), targets=lambda tokens: np.array([3]))
    step, packed, _ = report_of(FFN)
    with pytest.raises(HireRewriteError, match="head"):
        step.evaluate(packed, batches(1), targets=lambda tokens: tokens)


VOCABULARY = hire.Head(path="says what a vocabulary is, and asks for none", min_width=64)


def head_alone(params, x):
    return x @ params["embed"].T


@functools.cache
def head_packed(first=0, end=V):
    def fn(params, x):
        logits = head_alone(params, x)
        return logits if (first, end) == (0, V) else logits[:, first:end]

    step, x = hire.transform(fn, HEAD), inputs(3, D)
    return step, step.pack(PARAMS, x), x


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (lambda x: [0, 1, V], f"class {V}"),
        (lambda x: jnp.array([0, V + 1, -1]), f"class {V + 1}"),
        (lambda x: np.array([0, 1, 2**32 + 1]), f"class {2**32 + 1}"),
        (lambda x: [0.0, 1.5, 2.0], "float"),
        (lambda x: np.ones(3, bool), "bool"),
        (lambda x: jnp.ones(3, bool), "bool"),
        (lambda x: None, "NoneType"),
        (lambda x: ["a", "b", "c"], "integers"),
        (lambda x: [[1], [2, 3]], "no array"),
        (jnp.arange(3), "function"),
        ([1, 2, 3], "function"),
    ],
)
def test_targets_that_are_no_classes(targets, said):
    step, packed, x = head_packed()
    with pytest.raises(HireRewriteError, match=said):
        step.evaluate(packed, [(x,)], targets=targets)


def test_classes_of_any_integer_type():
    """Negative ones are none, however small."""
    step, packed, x = head_packed()
    want = step.evaluate(packed, [(x,)], targets=lambda x: np.array([5, -1, 7])).model.perplexity
    for classes in (np.array([5, -(2**40), 7]), [5, -1, 7], jnp.array([[5, -9, 7]], jnp.int8)):
        got = step.evaluate(packed, [(x,)], targets=lambda x, classes=classes: classes)
        assert got.model.perplexity == want
    unsigned = step.evaluate(packed, [(x,)], targets=lambda x: np.array([5, 6, 7], np.uint8))
    assert unsigned.model.perplexity is not None


def test_classes_outside_of_a_part_of_the_vocabulary_are_none():
    step, packed, x = head_packed(8, 90)
    alone = step.evaluate(packed, [(x,)], targets=lambda x: [8, -1, 89]).model.perplexity
    rest = step.evaluate(packed, [(x,)], targets=lambda x: [8, 7, 89]).model.perplexity
    assert rest == alone
    assert step.evaluate(packed, [(x,)], targets=lambda x: [90, 7, 95]).model.perplexity is None
    with pytest.raises(HireRewriteError, match=f"{V} rows"):
        step.evaluate(packed, [(x,)], targets=lambda x: [8, 7, V])


# What is not a number


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_batch_whose_dense_logits_are_no_numbers_is_named(bad):
    step, packed, x = head_packed()
    with pytest.raises(HireRewriteError, match=r"batch 1.* 1 of 3 token"):
        step.evaluate(packed, [(x,), (x.at[2].set(bad),), (x,)])


def test_masked_tokens_are_numbers():
    def masked(params, x):
        return jnp.where(jnp.arange(V) < 10, -jnp.inf, x @ params["embed"].T)

    full = hire.Head(k=V, candidates=V, min_width=64, predictor=Oracle(), force=True)
    step, x = hire.transform(masked, full), inputs(3, D)
    model = step.evaluate(step.pack(PARAMS, x), [(x,)]).model
    assert model.agreement == 1.0
    assert model.kl == pytest.approx(0.0, abs=1e-5)


def test_rewritten_logits_that_are_no_numbers_are_others():
    """Though the arg max of NaNs is the place 0, as that of the dense model is here."""
    rule = hire.Linear(encoding=hire.Blocks(8, block=16), force=True)
    step = hire.transform(head_alone, rule, VOCABULARY, on_miss="ignore")
    x = jnp.abs(inputs(3, D)) + 1
    params = {"embed": PARAMS["embed"].at[0].set(100.0)}
    packed = step.pack(params, x)
    assert step.evaluate(packed, [(x,)], weights=params).model.agreement == 1.0

    def nans(leaf):
        return jnp.full_like(leaf, jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    report = step.evaluate(jax.tree.map(nans, packed), [(x,)], weights=params)
    assert report.model.agreement == report.model.agreement_exact == 0.0
    assert not report.model.kl < np.inf
    assert not report.sites[0].error < np.inf


def test_a_site_without_logits_whose_result_is_no_number_is_named():
    def block(params, x):
        w = jax.tree.map(lambda a: a[0], params["layers"])
        return (jax.nn.relu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]

    step, x = hire.transform(block, FFN), inputs(3, D)
    packed = step.pack(PARAMS, x)
    with pytest.raises(HireRewriteError, match="batch 1: params/layers"):
        step.evaluate(packed, [(x,), (x.at[0].set(jnp.nan),)])


@pytest.mark.parametrize("budget", [{"recall": 0.9}, {"kl": 0.1}])
@pytest.mark.parametrize("number", [1, 3])
def test_tuning_names_a_batch_that_holds_no_numbers(budget, number):
    """By its place in what the user gave, of which every fourth is held out."""
    step, _, x = head_packed()
    given = [(x,)] * 4
    given[number] = (x.at[1].set(jnp.nan),)
    named = "calibration" if "recall" in budget and number == 1 else f"batch {number}"
    with pytest.raises(HireRewriteError, match=named):
        step.tune(PARAMS, given, **budget)


def test_keyword_arguments_of_the_call():
    def scaled(params, tokens, *, scale):
        return scale * model(params, tokens)

    step, scale = hire.transform(scaled, FFN, HEAD), jnp.float32(2.0)
    packed = step.pack(PARAMS, *batches(1)[0], calibration=batches(2), scale=scale)
    assert step.evaluate(packed, batches(1), scale=scale).sites[0].best == 1.0
    assert step.tune(PARAMS, batches(2), scale=scale)


def test_a_site_that_was_not_reached():
    def sometimes(params, x):
        w = jax.tree.map(lambda a: a[0], params["layers"])
        block = lambda x: jax.nn.relu(x @ w["up"]) @ w["down"]  # noqa: E731
        return jax.lax.cond(x.sum() > 1e9, block, lambda x: x, x)

    x = inputs(4, D)
    step = hire.transform(sometimes, FFN)
    packed = step.pack(PARAMS, x, calibration=[(x,)])  # needs no calibration
    with pytest.raises(HireRewriteError, match="no evaluation batch"):
        step.evaluate(packed, [(x,)])


def test_an_infinite_divergence_is_null_in_json():
    head = hire.Head(**vars(HEAD) | {"tail": "-inf"})
    _, _, report = report_of(FFN, head)
    assert report.model.kl == np.inf
    assert json.loads(report.to_json())["model"]["kl"] is None


def test_a_plan_counts_what_is_read():
    """Where the tokens may ask for everything, everything is read, whatever they share."""
    step = hire.transform(model, FFN)
    tokens = jnp.repeat(batches(1)[0][0][:1], 64)
    packed = step.pack(PARAMS, tokens[:1], calibration=[(tokens,)])
    rule = hire.FFN(**vars(FFN) | {"max_tokens": None, "budget": 20})
    (all_read,) = step.plan(packed, tokens[:8]).sites
    tight = hire.transform(model, rule)
    again = tight.pack(PARAMS, tokens[:1], calibration=[(tokens,)])
    (shared,) = tight.plan(again, tokens[:8]).sites
    assert shared.bytes_after < all_read.bytes_before <= all_read.bytes_after


def test_a_report_has_one_row_for_sites_that_are_alike():
    """With the least and the greatest of what was measured, and no column that is empty."""
    linear = SiteReport(
        "", "linear", tokens=4, k=0, candidates=0, recall=(1.0,), recall_p1=(1.0,), best=1.0,
        mass=1.0, error=0.0036, error_exact=0.0036, proved=None, bytes_dense=10**6,
        bytes_read=250_000, curve=(),
    )  # fmt: skip
    names = [f"p/{i}/{part}" for i in range(4) for part in "qkvo"]
    sites = [dataclasses.replace(linear, name=n, error=0.001 * i) for i, n in enumerate(names)]
    header, row, *_ = str(Report(tuple(sites), None)).splitlines()
    assert re.split("  +", header.strip()) == ["site", "tokens", "error", "from exact", "MB read"]
    assert re.split("  +", row.strip()) == [
        "p/{0..3}/{q,k,v,o} (16)", "4", "0.0000–0.0150", "0.0036", "16.0 → 4.0",
    ]  # fmt: skip
    head = dataclasses.replace(
        linear, name="p/head", kind="head", k=4, candidates=8, recall=(0.5,), recall_p1=(0.25,)
    )
    _, _, last, *_ = str(Report((*sites, head), None)).splitlines()
    assert re.split("  +", last.strip())[:5] == ["p/head", "4", "4", "8", "0.5000"]
