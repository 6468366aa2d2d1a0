"""A kind of site and a predictor that are not in the package work like the built-in ones.

The kind: any linear layer from the model's width to another, computed from rows in 8 bits, with the
exact form where it is not rewritten. All that it takes is in this file.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hire_rewrite as hire
from hire_rewrite.ops.predictors import Predictor, Quantized, reads_of, register_predictor
from hire_rewrite.ops.quality import Comparison, Measured
from hire_rewrite.patterns.linear import Linear
from hire_rewrite.patterns.refusal import NoMatch, Refusal
from hire_rewrite.patterns.region import from_tokens, to_tokens
from hire_rewrite.rules import Rule
from hire_rewrite.sites import Match, Operation, SiteKind, registered
from hire_rewrite.sites.operation import reporting, silent
from hire_rewrite.sites.weight_rows import fit_predictor
from tests.cases import D, close, inputs, rand


@dataclasses.dataclass(frozen=True, repr=False)
class Narrow(Rule):
    """Compute linear layers from compressed rows."""

    predictor: Predictor = Quantized()
    max_tokens: int | None = None
    path: str | None = None
    force: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class NarrowMatch(Match):
    linear: Linear

    @property
    def linears(self):
        return (self.linear,)


class NarrowKind(SiteKind):
    name = "narrow"
    rule = Narrow

    def match(self, linear, context, rules):
        if not rules:
            raise NoMatch(Refusal.UNSUPPORTED, "no rule asks for narrow layers", linear.node)
        if linear.batch:
            raise NoMatch(Refusal.UNSUPPORTED, "a weight for each input", linear.node)
        return NarrowMatch(linear)

    def resolve(self, site, rule, statistics, functions):
        return NarrowOperation(site, rule)


class NarrowOperation(Operation):
    def __init__(self, site, rule):
        self.site, self.rule, self.linear = site, rule, site.match.linear

    @property
    def layout(self):
        return "narrow", self.scored, self.rule.predictor

    @property
    def scored(self):
        return self.linear.out_dim, self.linear.in_dim

    def describe(self):
        return f"rows by {self.rule.predictor}"

    def reads(self, tokens):
        return reads_of(self.rule.predictor, *self.scored, self.linear.weight.dtype, tokens)

    def pack(self, weights, calibration, advance):
        rows = weights.linear(self.linear)
        moments = None if calibration is None else calibration[0]
        return {"rows": rows, "narrow": fit_predictor(self.rule.predictor, rows, moments, advance)}

    def narrow(self, x, arrays, layer):
        return self.rule.predictor.score(arrays["narrow"], x, layer)

    def whole(self, x, arrays, layer):
        return x @ lax.dynamic_index_in_dim(arrays["rows"], layer, keepdims=False).T

    def rewritten(self, arrays):
        return [self._replacement(silent(self.narrow), arrays)]

    def exact(self, arrays):
        return [self._replacement(silent(self.whole), arrays)]

    dense = exact

    def measured(self, arrays, *, follow_exact):
        def both(x, arrays, layer):
            narrow, whole = self.narrow(x, arrays, layer), self.whole(x, arrays, layer)
            return Measured(whole, narrow, Comparison(whole, whole, narrow))

        return [self._replacement(reporting(both, follow_exact), arrays, reports=True)]

    def _replacement(self, function, arrays, *, reports=False):
        linear = self.linear

        def run(ins, layer, arrays):
            y, report = function(to_tokens(ins[0], linear.x_axes), arrays, layer)
            y = y.astype(linear.out.dtype)
            return [from_tokens(y, linear.out.shape, linear.out_axes)], report

        return self.replacement(run, arrays, reports=reports)


@register_predictor
@dataclasses.dataclass(frozen=True)
class Float16:
    """A predictor that stores rows in float16."""

    scale: float = 1.0
    wants_calibration = False

    def check(self, n, d, *, site="", tokens=None):
        pass

    def fit(self, rows, moments=None, top=None):
        return {"rows": (rows * self.scale).astype(jnp.float16)}

    def score(self, state, x, layer, choose=None):
        rows = lax.dynamic_index_in_dim(state["rows"], layer, keepdims=False)
        return x.astype(jnp.float32) @ rows.astype(jnp.float32).T / self.scale

    def bytes(self, n, d, dtype, tokens=1):
        return 2 * n * d


LAYERS, VOCABULARY = 3, 128
PARAMS = {
    "layers": {"q": rand(LAYERS, D, D), "o": rand(LAYERS, D, D, seed=1)},
    "embed": rand(VOCABULARY, D, seed=2),
}
X = inputs(4, D)
RULES = (
    Narrow(path="layers", predictor=Float16(), force=True),
    hire.Head(k=4, candidates=32, min_width=100, force=True),
)


def model(params, x):
    def layer(x, w):
        return x + jax.nn.softmax(x @ w["q"]) @ w["o"], None

    return lax.scan(layer, x, params["layers"])[0] @ params["embed"].T


@pytest.fixture(autouse=True)
def narrow_kind():
    with registered(NarrowKind()):
        yield


def test_it_is_planned_packed_and_run_beside_the_others():
    step = hire.transform(model, *RULES)
    packed = step.pack(PARAMS, X)
    plan = step.plan(packed, X)
    assert [(site.kind, site.status) for site in plan.sites] == [
        ("head", "rewritten"),
        ("narrow", "rewritten"),
        ("narrow", "rewritten"),
    ]
    narrow = plan.sites[1]
    assert (narrow.repeats, narrow.width, narrow.d_model) == (LAYERS, D, D)
    assert narrow.bytes_after == LAYERS * 2 * D * D == narrow.bytes_before // 2
    assert "Float16" in narrow.reason
    assert set(packed.weights) == set()
    want = model(PARAMS, X)
    close(jax.jit(step)(packed, X), step(packed, X), 1e-6)
    best = np.asarray(want).argsort(1)[:, -4:]
    got = np.take_along_axis(np.asarray(step(packed, X)), best, 1)
    np.testing.assert_allclose(got, np.take_along_axis(np.asarray(want), best, 1), atol=0.02)


def test_its_modes():
    step = hire.transform(model, *RULES)
    packed = step.pack(PARAMS, X)
    for mode in ("exact", "dense"):
        close(hire.transform(model, *RULES, mode=mode)(packed, X), model(PARAMS, X), 1e-5)
    close(hire.transform(model, *RULES, mode="exact")(PARAMS, X), model(PARAMS, X), 1e-5)


def test_it_is_estimated():
    plan = hire.inspect(model, PARAMS, X, rules=[dataclasses.replace(RULES[0], force=False)])
    asked = [site for site in plan.sites if site.rule is not None]
    assert [(site.kind, site.expected) for site in asked] == [("narrow", 2.0)] * 2


def test_it_is_calibrated_and_evaluated():
    rules = Narrow(path="layers", predictor=hire.LowRank(8), force=True), RULES[1]
    step, batches = hire.transform(model, *rules), [(inputs(64, D, seed=s),) for s in range(2)]
    plain = Narrow(path="layers", predictor=hire.LowRank(8), force=True)
    with pytest.warns(UserWarning, match="without calibration"):
        guessed = hire.transform(model, plain).pack(PARAMS, X)
    packed = step.pack(PARAMS, X, calibration=batches)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(packed.sites["params/layers/q"]),
            jax.tree.leaves(guessed.sites["params/layers/q"]),
            strict=True,
        )
    )
    report = step.evaluate(packed, batches)
    narrow = [site for site in report.sites if site.kind == "narrow"]
    assert len(narrow) == 2
    assert all(0 < site.error < 1 and site.recall == (1.0,) * LAYERS for site in narrow)
    assert report.model.tokens == 128
    assert "params/layers/" in str(report)


def test_it_is_tuned_saved_and_loaded(tmp_path):
    step, batches = hire.transform(model, *RULES), [(inputs(64, D, seed=s),) for s in range(4)]
    tuned = step.tune(PARAMS, batches, recall=0.9)
    assert any(isinstance(rule, Narrow) and rule.predictor == Float16() for rule in tuned)
    tuned.save(str(tmp_path / "rules.json"))
    loaded = hire.load_rules(str(tmp_path / "rules.json"))
    assert loaded == tuple(tuned)
    step = hire.transform(model, *loaded)
    packed = step.pack(PARAMS, X)
    restored = jax.tree.unflatten(jax.tree.structure(packed), jax.tree.leaves(packed))
    close(step(restored, X), step(packed, X), 1e-6)
    assert "hire_head" in str(step.diff(PARAMS, X))


def test_a_kind_that_is_not_registered_has_no_rules():
    fields = [(f.name, f.type, f) for f in dataclasses.fields(Narrow)]
    unknown = dataclasses.make_dataclass("Unknown", fields, bases=(Rule,), frozen=True)
    assert hire.transform(model, RULES[0])
    with pytest.raises(hire.HireRewriteError, match=r"is not a rule.*register_kind"):
        hire.transform(model, unknown())


def test_a_function_that_was_planned_sees_kinds_that_are_registered_later():
    class Later(NarrowKind):
        name = "later"

        def match(self, linear, context, rules):
            return NarrowMatch(linear)

    step = hire.transform(model)
    before = {site.kind for site in step.plan(PARAMS, X).sites}
    assert "later" not in before
    with registered(Later()):
        assert {site.kind for site in step.plan(PARAMS, X).sites} == {"later"}
    assert {site.kind for site in step.plan(PARAMS, X).sites} == before


@dataclasses.dataclass(frozen=True)
class Bare(Rule):
    path: str | None = None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (NarrowKind, "not an instance of SiteKind"),
        (type("Nameless", (NarrowKind,), {"name": None})(), "needs a `name`"),
        (type("Ruleless", (NarrowKind,), {"rule": int})(), "subclass of Rule"),
        (type("Bare", (NarrowKind,), {"rule": Bare})(), "lacks the field.s. force, max_tokens"),
    ],
)
def test_a_kind_that_the_passes_cannot_use_is_refused(kind, message):
    with pytest.raises(hire.HireRewriteError, match=message), registered(kind):
        raise AssertionError("it was registered")


def test_rules_check_the_settings_that_all_rules_have():
    with pytest.raises(hire.HireRewriteError, match=r"Narrow: path='.' is not a regular"):
        Narrow(path="(")
    with pytest.raises(hire.HireRewriteError, match="Narrow: predictor=3 is not a predictor"):
        Narrow(predictor=3)


def test_rules_of_a_kind_that_is_not_registered_are_not_loaded(tmp_path):
    file = tmp_path / "rules.json"
    file.write_text('[{"type": "Wide", "force": true}]')
    with pytest.raises(hire.HireRewriteError, match=r"there is no Wide.*register_kind"):
        hire.load_rules(str(file))


def test_tuning_keeps_the_predictor_of_a_kind_that_chooses_nothing(monkeypatch):
    predictors = [hire.LowRank(8), Float16()]
    monkeypatch.setattr(NarrowOperation, "predictors", lambda *_: predictors)
    step, batches = hire.transform(model, RULES[0]), [(inputs(64, D, seed=s),) for s in range(4)]
    tuned = step.tune(PARAMS, batches, recall=0.9)
    assert {str(trial.rule.predictor) for trial in tuned.trials} == {str(Float16())}


@pytest.mark.parametrize(
    ("method", "broken", "message"),
    [
        ("pack", lambda *_: {"rows": jnp.zeros((7, 2))}, "begin with its 3 layer"),
        ("measured", lambda self, arrays, *, follow_exact: [], "reports no Quality"),
    ],
)
def test_an_operation_that_breaks_its_word_is_named(monkeypatch, method, broken, message):
    monkeypatch.setattr(NarrowOperation, method, broken)
    step = hire.transform(model, RULES[0])
    with pytest.raises(hire.HireRewriteError, match=message):
        step.evaluate(step.pack(PARAMS, X), [(X,)])
