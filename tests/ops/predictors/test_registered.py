"""A predictor that is registered from outside of the package is like the package's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from hire_rewrite.ops.predictors import register_predictor
from tests.ops.cases import normal

V, D, F = 512, 32, 128


@register_predictor
@dataclasses.dataclass(frozen=True)
class Halves:
    """Every second column of the rows, in bfloat16; what calibration saw weighs them."""

    weighted: bool = False

    @property
    def wants_calibration(self):
        return self.weighted

    def check(self, n, d, *, site="", tokens=None):
        if d % 2:
            raise hire.HireRewriteError(f"{site}: Halves: rows of length {d}: give an even one")

    def fit(self, rows, moments=None, top=None):
        weights = jnp.ones(rows.shape[1] // 2)
        if moments is not None:
            weights = 1.0 + moments.covariance().diagonal()[::2] * 0.0
        return {"half": (rows[:, ::2] * weights).astype(jnp.bfloat16)}

    def score(self, state, x, layer, choose=None):
        return x[:, ::2].astype(jnp.float32) @ state["half"][layer].T.astype(jnp.float32)

    def bytes(self, n, d, dtype, tokens=1):
        return n * d


def step(params, x):
    h = jax.nn.relu(x @ params["up"]) @ params["down"]
    return (x + h) @ params["head"]


@pytest.mark.parametrize("predictor", [Halves(), Halves(weighted=True)])
def test_from_plan_to_saved_rules(predictor, tmp_path, monkeypatch):
    monkeypatch.setenv("HIRE_REWRITE_MACHINE", "bytes")
    params = {"up": normal(0, D, F), "down": normal(1, F, D), "head": normal(2, D, V)}
    rules = (
        hire.FFN(k=0.25, candidates=0.5, predictor=predictor, force=True),
        hire.Head(k=8, candidates=V // 2, min_width=64, predictor=predictor, force=True),
    )
    x, calibration = normal(3, 2, D), [(normal(4, 16, D),)]
    run = hire.transform(step, *rules)
    assert [site.status for site in run.plan(params, x).sites] == ["rewritten"] * 2
    packed = run.pack(params, x, calibration=calibration)
    got = np.asarray(run(packed, x))
    hidden = np.asarray(x + jax.nn.relu(x @ params["up"]) @ params["down"])
    assert got.shape == (2, V)
    assert np.isfinite(got).all()
    assert (hidden @ np.asarray(params["head"]) != got).any()
    report = run.evaluate(packed, [(x,)])
    assert all(0.3 < min(site.recall) <= 1.0 for site in report.sites)
    path = str(tmp_path / "rules.json")
    hire.save_rules(rules, path)
    assert hire.load_rules(path) == rules


def test_another_class_of_the_same_name():
    @dataclasses.dataclass(frozen=True)
    class LowRank:
        rank: int

    with pytest.raises(hire.HireRewriteError, match="LowRank is registered"):
        register_predictor(LowRank)
