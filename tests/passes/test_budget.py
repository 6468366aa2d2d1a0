"""Tuning within a budget of divergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hire_rewrite as hire
from hire_rewrite import HireRewriteError, Linear
from hire_rewrite.passes import budget
from hire_rewrite.passes.budget import Option, choose
from hire_rewrite.tuned import Trial
from tests.cases import inputs, rand

LAYERS, D, V = 2, 64, 128


def option(nodes, gain, kl):
    return Option(frozenset(nodes), Trial("", Linear(), 0, kl=kl, gain=gain))


def test_the_best_time_for_the_least_divergence():
    cheap, dear = option("a", 10.0, 1e-4), option("b", 10.0, 1e-2)
    assert choose([cheap, dear], 1e-3) == [cheap]
    assert set(choose([cheap, dear], 2e-2)) == {cheap, dear}
    assert choose([cheap, dear], 1e-5) == []


def test_one_option_for_each_product():
    small, large = option("a", 5.0, 1e-4), option("a", 8.0, 5e-4)
    assert choose([small, large], 1e-3) == [large]
    assert choose([small, large], 2e-4) == [small]


def test_one_option_in_place_of_several():
    parts = [option(name, 3.0, 1e-4) for name in "abc"]
    whole = option("abc", 12.0, 4e-4)
    assert choose([*parts, whole], 1e-3) == [whole]
    assert set(choose([*parts, whole], 3.5e-4)) == set(parts)


def test_what_loses_nothing_is_free():
    assert len(choose([option(name, 1.0, 0.0) for name in "abcdef"], 1e-8)) == 6


def model(params, x):
    def layer(x, w):
        return x + jax.nn.silu(x @ w["q"]) @ w["o"], None

    return lax.scan(layer, x, params["layers"])[0] @ params["embed"].T


PARAMS = {
    "layers": {name: rand(LAYERS, D, D, seed=i) / D**0.5 for i, name in enumerate("qo")},
    "embed": rand(V, D, seed=2),
}
BATCHES = [(inputs(16, D, seed=seed),) for seed in range(4)]
RULES = Linear(), hire.Head(min_width=100)
ALONE = Linear(path="q"), hire.Head(min_width=100, path="says what a vocabulary is")


def divergence(rules, batches):
    step = hire.transform(model, *rules)
    packed = step.pack(PARAMS, BATCHES[0][0])
    total = []
    for (x,) in batches:
        p, q = (jax.nn.log_softmax(z) for z in (model(PARAMS, x), step(packed, x)))
        total.append(np.asarray((jnp.exp(p) * (p - q)).sum(-1)))
    return float(np.mean(total))


def test_a_step_within_its_budget(tmp_path):
    step = hire.transform(model, *RULES)
    read = []
    for kl in (1e-4, 1.0):
        tuned = step.tune(PARAMS, BATCHES, kl=kl)
        assert 0 < tuned.kl <= kl
        assert divergence(tuned, BATCHES[:3]) == pytest.approx(tuned.kl, rel=1e-2)
        assert all(trial.gain > 0 for trial in tuned.chosen)
        read.append(sum(trial.bytes for trial in tuned.chosen))
        assert "KL" in str(tuned)
    assert read[1] < read[0]
    tuned.save(str(tmp_path / "rules.json"))
    assert hire.load_rules(str(tmp_path / "rules.json")) == tuple(tuned)


def test_trials_are_measured_alone():
    tuned = hire.transform(model, *ALONE).tune(PARAMS, BATCHES, kl=1.0)
    assert {trial.name for trial in tuned.trials} == {"params/layers/q"}
    trial = tuned.trials[0]
    assert divergence([trial.rule], BATCHES[3:]) == pytest.approx(trial.kl, rel=1e-2)


def on_a_grid():
    """Weights of 4 bits with a scale for each row of 64 inputs: nothing is lost where they fit."""
    rng = np.random.default_rng(5)

    def matrix(*shape):
        integers = rng.integers(-8, 8, shape)
        integers[..., 0, :], integers[..., 1, :] = -8, 7
        return jnp.asarray(integers * np.float32(0.01))

    layers = {"q": matrix(LAYERS, D, D), "o": matrix(LAYERS, D, D)}
    return {"layers": layers, "embed": matrix(D, V).T}


def test_time_that_is_up():
    """After one trial, which may be all: what loses nothing is tried first."""
    params, step = on_a_grid(), hire.transform(model, Linear(path="[qo]$"), ALONE[1])
    whole = step.tune(params, BATCHES, kl=1e-3, seconds=1e6)
    assert set(whole) == set(step.tune(params, BATCHES, kl=1e-3))
    assert whole.untried == 0
    with pytest.warns(hire.HireRewriteWarning, match="seconds=1e-09"):
        short = step.tune(params, BATCHES, kl=1e-3, seconds=1e-9)
    (trial,) = short.trials
    assert short.untried > 1
    assert short.kl <= 1e-3
    assert tuple(short) == (trial.rule,)
    assert "Time was up" in str(short)
    assert "Time was up" not in str(whole)


def test_time_that_is_up_before_anything_was_found():
    step = hire.transform(model, *ALONE)
    with pytest.raises(HireRewriteError, match="seconds=1e-09"):
        step.tune(PARAMS, BATCHES, kl=1e-12, seconds=1e-9)


class Seconds:
    """A clock on which trials take what they are said to take."""

    def __init__(self, first, others):
        self.now, self.takes = 0.0, iter([first, *[others] * 1000])

    def monotonic(self):
        return self.now


def test_time_is_spent_though_the_first_trial_takes_long(monkeypatch):
    """It compiles what the others find compiled: 8 s of 21, 1 s each after that."""
    clock = Seconds(8.0, 1.0)
    estimate = budget.estimate  # which each trial asks for once

    def timed(*args):
        clock.now += next(clock.takes)
        return estimate(*args)

    monkeypatch.setattr(budget.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(budget, "estimate", timed)
    step = hire.transform(model, Linear(path="[qo]$"), ALONE[1])
    with pytest.warns(hire.HireRewriteWarning, match="seconds=21"):
        tuned = step.tune(PARAMS, BATCHES, kl=1.0, seconds=21.0)
    assert len(tuned.trials) > 2
    assert tuned.untried
    assert clock.now < 21.0


def unrolled(params, x):
    for w in params["layers"]:
        x = x + jax.nn.silu(x @ w["q"]) @ w["o"]
    return x @ params["embed"].T


def test_layers_that_are_alike_are_tried_together():
    """As in a scan, with about as many trials, and rules that fit the layers alone."""
    layers = [{n: w[i] for n, w in PARAMS["layers"].items()} for i in range(LAYERS)]
    params = {**PARAMS, "layers": layers}
    rules = Linear(path="[qo]$"), ALONE[1]
    tuned = hire.transform(unrolled, *rules).tune(params, BATCHES, kl=1.0)
    scanned = hire.transform(model, *rules).tune(PARAMS, BATCHES, kl=1.0)
    assert len(tuned.trials) == len(scanned.trials)
    for one, other in zip(tuned.trials, scanned.trials, strict=True):
        assert (one.bytes, one.kl) == (other.bytes, pytest.approx(other.kl, rel=0.05))
    assert {t.name for t in tuned.trials} == {"params/layers/{0..1}/q", "params/layers/{0..1}/o"}
    plan = hire.inspect(unrolled, params, inputs(1, D), rules=tuned)
    assert {site.name for site in plan.sites if site.rule is not None} >= {
        f"params/layers/{i}/{n}" for i in range(LAYERS) for n in "qo"
    }


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kl": 0.0}, "kl=0"),
        ({"kl": 1e-3, "seconds": 0}, "seconds=0"),
        ({"recall": 0.9, "seconds": 60}, "seconds= without kl="),
        ({"kl": 1e-3, "recall": 0.9}, "one of them"),
        ({"kl": 1e-12}, "least divergence"),
    ],
)
def test_budgets_that_cannot_be_kept(settings, reason):
    step = hire.transform(model, *ALONE)
    with pytest.raises(HireRewriteError, match=reason):
        step.tune(PARAMS, BATCHES, **settings)


def test_without_logits_there_is_nothing_to_compare():
    with pytest.raises(HireRewriteError, match="no vocabulary head"):
        hire.transform(lambda w, x: jnp.tanh(x @ w), Linear()).tune(rand(D, D), BATCHES, kl=1e-3)
