"""Linear layers that are in no other site, from a compressed copy of their weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hire_rewrite as hire
from hire_rewrite import Blocks, Float, HireRewriteError, Linear
from hire_rewrite.cost import machine as machines
from tests.cases import close, inputs, rand, run

LAYERS, D, F = 3, 64, 128


def on_grid(*shape, seed=0):
    """Weights as a file of 4 bits widens them: blocks of 32 along the inputs with a minimum."""
    rng = np.random.default_rng(seed)
    *layers, d, n = shape
    scale = rng.uniform(0.01, 0.02, (*layers, d // 32, 1, n)).astype(np.float16)
    minimum = -scale * np.float16(7.5)
    integers = rng.integers(0, 16, (*layers, d // 32, 32, n))
    integers[..., 0, :], integers[..., 1, :] = 0, 15
    numbers = integers.astype(np.float32) * scale.astype(np.float32) + minimum.astype(np.float32)
    return jnp.asarray(numbers.reshape(shape))


def weights(make):
    sizes = {"q": (LAYERS, D, D), "gate": (LAYERS, D, F), "up": (LAYERS, D, F),
             "down": (LAYERS, F, D)}  # fmt: skip
    return {"layers": {name: make(*size, seed=i) for i, (name, size) in enumerate(sizes.items())}}


def model(params, x):
    def layer(x, w):
        x = x + jnp.tanh(x @ w["q"])
        return x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"], None

    return lax.scan(layer, x, params["layers"])[0]


PARAMS = weights(lambda *shape, seed: rand(*shape, seed=seed) / shape[-2] ** 0.5)
EXACT = weights(on_grid)
X = inputs(2, D)
FULL = Linear(k=1.0, encoding=Blocks(4), force=True)


def names(plan, status="rewritten"):
    return {site.name for site in plan.sites if site.kind == "linear" and site.status == status}


ALL = {f"params/layers/{name}" for name in PARAMS["layers"]}


def test_every_layer_is_found_packed_and_run():
    step = hire.transform(model, Linear(encoding=Blocks(8), force=True))
    assert names(step.plan(PARAMS, X)) == ALL
    packed = step.pack(PARAMS, X)
    assert set(packed.weights) == set()
    want = model(PARAMS, X)
    assert 0 < np.abs(step(packed, X) - want).max() < 0.02 * np.abs(want).max()
    assert sum(array.nbytes for array in jax.tree.leaves(packed)) < 0.27 * sum(
        array.nbytes for array in jax.tree.leaves(PARAMS)
    )


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_with_all_inputs_exact_it_is_the_model(tokens):
    x = inputs(tokens, D)
    step = hire.transform(model, FULL)
    close(step(step.pack(PARAMS, X), x), model(PARAMS, x), 1e-5)


def test_tokens_that_may_ask_for_all_columns_read_these_alone():
    step, x = hire.transform(model, Linear(k=0.1, encoding=Blocks(4), force=True)), inputs(40, D)
    packed = step.pack(PARAMS, X)
    close(step(packed, x), model(PARAMS, x), 1e-5)
    for tokens, share in ((x, 1), (X, 0.37)):
        sites = [s for s in step.plan(packed, tokens).sites if s.kind == "linear"]
        assert len(sites) == 4
        assert all(share - 0.05 < s.bytes_after / s.bytes_before <= share for s in sites)


def test_a_symbolic_number_of_tokens_has_the_columns_of_each():
    def layer(params, x):
        return x @ params["w"]

    params = {"w": rand(D, F, seed=1)}
    step = hire.transform(layer, Linear(k=0.1, encoding=Blocks(4), force=True))
    leaves, tree = jax.tree.flatten(step.pack(params, X))

    def run(leaves, x):
        return step(jax.tree.unflatten(tree, leaves), x)

    tokens = jax.export.symbolic_shape("tokens")[0]
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), leaves)
    exported = jax.export.export(jax.jit(run))(
        shapes, jax.ShapeDtypeStruct((tokens, D), jnp.float32)
    )
    x = inputs(7, D)
    close(exported.call(leaves, x), run(leaves, x), 1e-5)


@pytest.mark.parametrize("mode", ["hire", "exact", "dense"])
def test_modes_agree_where_nothing_is_lost(mode):
    step = hire.transform(model, mode=mode)
    close(step(hire.transform(model).pack(EXACT, X), X), model(EXACT, X), 1e-5)


def test_without_rules_the_same_numbers_take_fewer_bytes():
    step = hire.transform(model)
    assert names(step.plan(EXACT, X)) == set()
    packed = step.pack(EXACT, X)
    plan = step.plan(packed, X)
    assert names(plan) == ALL
    for site in plan.sites:
        if site.kind == "linear":  # 4 bits and two float16 for 32 numbers, instead of 32 float32
            assert site.bytes_after * 32 * 32 == site.bytes_before * (32 * 4 + 2 * 16)
    close(step(packed, X), model(EXACT, X), 1e-5)


def test_without_rules_a_head_is_read_without_loss_where_that_is_as_fast():
    """On a machine where bytes count: 8 bits and their scales, of which nothing is looked at again,
    are fewer than the guesses in 8 bits and the rows of candidates."""

    def head(w, x):
        return x @ w

    rng = np.random.default_rng(3)
    rows = rng.integers(-127, 128, (D, 4096)).astype(np.float32)
    rows[::2] = np.where(rng.random((D // 2, 4096)) < 0.5, 127, -127)  # both ends in use
    w = jnp.asarray(rows * rng.uniform(0.5, 1.0, (1, 4096)).astype(np.float16).astype(np.float32))
    step = hire.transform(head)
    packed = step.pack(w, X)
    plan = step.plan(packed, X)
    assert [(site.kind, site.status) for site in plan.sites] == [("linear", "rewritten")]
    close(step(packed, X), head(w, X), 1e-5)
    other = rand(D, 4096)
    plan = step.plan(step.pack(other, X), X)
    assert [(site.kind, site.status) for site in plan.sites] == [("head", "rewritten")]


def test_without_rules_other_numbers_stay_as_they_are():
    step = hire.transform(model)
    packed = step.pack(PARAMS, X)
    assert names(step.plan(packed, X)) == set()
    assert len(packed.weights) == 4
    np.testing.assert_array_equal(step(packed, X), jax.jit(model)(PARAMS, X))


@pytest.mark.parametrize("make", [lambda: EXACT, lambda: PARAMS])
@pytest.mark.parametrize(
    "rules", [(), (Linear(encoding=Blocks(8)),), (hire.FFN(k=4, force=True),), (hire.Head(),)]
)
def test_each_product_is_in_one_row_and_the_same_one_when_it_is_packed(make, rules):
    """What was found in the numbers may make sites of the layers of a block, nothing else does."""
    params = make()
    step = hire.transform(model, *rules, on_miss="ignore")
    plans = [step.plan(params, X), step.plan(step.pack(params, X), X)]
    for plan in plans:
        rows = [site.name for site in plan.sites] + [r.name for r in plan.rejected]
        blocks = [site.name for site in plan.sites if site.kind == "ffn"]
        assert sorted(rows) == sorted([*blocks, "params/layers/q"] if blocks else ALL)
    if rules or make() is PARAMS:
        rows = [[(site.name, site.kind, site.status) for site in plan.sites] for plan in plans]
        assert rows[0] == rows[1]
        assert [r.reason for r in plans[0].rejected] == [r.reason for r in plans[1].rejected]


def mixed():
    """Weights of which q and up are on a grid, and the others not."""
    layers = {
        name: (EXACT if name in ("q", "up") else PARAMS)["layers"][name]
        for name in PARAMS["layers"]
    }
    return {"layers": layers}


def test_what_fits_no_grid_is_a_site_that_says_so():
    step, params = hire.transform(model), mixed()
    packed = step.pack(params, X)
    fitting = {"params/layers/q", "params/layers/up"}
    for given in (packed, jax.tree.map(lambda array: array, packed)):
        plan = step.plan(given, X)
        assert names(plan) == fitting
        assert names(plan, "dense") == ALL - fitting
        assert plan.rejected == ()
    reasons = {site.reason for site in plan.sites if site.name in ALL and site.rule == Linear()}
    assert len(reasons) == 2
    (unfit,) = {site.reason for site in plan.sites if site.name == "params/layers/gate"}
    assert "grid" in unfit
    asked = hire.transform(model, Linear())  # also where a rule says it
    assert names(asked.plan(asked.pack(params, X), X), "dense") == ALL - fitting
    close(step(packed, X), model(params, X), 1e-5)


@pytest.mark.parametrize("make", [lambda: EXACT, lambda: PARAMS, mixed])
@pytest.mark.parametrize("rules", [(), (Linear(),), (Linear(path="gate"),)])
def test_each_weight_is_counted_in_one_site(make, rules):
    """Gate, up and down are layers of a block, and each may be a site of its own."""
    params = make()
    step = hire.transform(model, *rules)
    plan = step.plan(step.pack(params, X), X)
    block = sum(params["layers"][name].nbytes for name in ("gate", "up", "down"))
    beside = sum(s.bytes_before for s in plan.sites if s.name == "params/layers/q")
    assert sum(site.bytes_before for site in plan.sites) == block + beside
    dense = [site for site in plan.sites if site.status == "dense"]
    assert all(site.bytes_after == site.bytes_before for site in dense)


def test_what_would_fit_and_does_not_pay_is_a_site_too(monkeypatch):
    strict = dataclasses.replace(machines.current(), name="strict", margin=1e3)
    monkeypatch.setattr(machines, "current", lambda: strict)
    step = hire.transform(model)
    plan = step.plan(step.pack(mixed(), X), X)
    sites = {site.name: site for site in plan.sites if site.kind == "linear"}
    assert set(sites) == ALL
    assert {name for name, site in sites.items() if site.expected is not None} == {
        "params/layers/q",
        "params/layers/up",
    }
    assert all(site.status == "dense" for site in sites.values())


def test_shapes_and_traces_are_not_looked_at():
    step = hire.transform(model)
    packed = step.pack(jax.eval_shape(lambda: EXACT), X)
    assert [(site.kind, site.status) for site in step.plan(packed, X).sites] == [
        ("ffn", "dense"),
        ("linear", "dense"),
    ]


def test_bfloat16_numbers_that_are_held_in_float32():
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), PARAMS)
    step = hire.transform(model)
    packed = step.pack(half, X)
    assert names(step.plan(packed, X)) == ALL
    assert {array.dtype for array in jax.tree.leaves(packed)} == {jnp.dtype(jnp.bfloat16)}
    close(step(packed, X), model(half, X), 1e-5)


@pytest.mark.parametrize("tied", [lambda e, h: h @ e.T, lambda e, h: jnp.einsum("bd,vd->bv", h, e)])
def test_rows_that_are_looked_up_elsewhere_are_not_held_twice(tied):
    def step(params, token):
        return tied(params["embed"], jnp.tanh(params["embed"][token]))

    params = {"embed": jnp.asarray(on_grid(D, 256).T)}
    token = jnp.array([3, 0, 255, -1, -256])
    run = hire.transform(step)
    packed = run.pack(params, token)
    assert set(packed.weights) == set()
    close(run(packed, token), step(params, token), 1e-5)
    for other in ("exact", "dense"):
        close(hire.transform(step, mode=other)(packed, token), step(params, token), 1e-5)
    report = run.evaluate(packed, [(token,)])
    assert [site.error < 1e-5 for site in report.sites] == [True]


def test_out_of_range_rows_are_what_they_were():
    def step(params, token):
        rows = params["embed"].at[token].get(mode="fill", fill_value=2.0)
        clipped = params["embed"].at[token].get(mode="clip")
        return (rows + clipped) @ params["embed"].T

    params, token = {"embed": jnp.asarray(on_grid(D, 256).T)}, jnp.array([3, 256, 999])
    run = hire.transform(step)
    packed = run.pack(params, token)
    assert set(packed.weights) == set()
    close(run(packed, token), step(params, token), 1e-5)


def test_a_rounded_copy_is_no_embedding_unless_asked():
    def step(params, token):
        return params["embed"][token] @ params["embed"].T

    params, token = {"embed": rand(256, D)}, jnp.array([3, 5])
    rule = Linear(encoding=Blocks(8), force=True)
    assert set(hire.transform(step, rule).pack(params, token).weights) == {"params/embed"}
    both = hire.transform(step, rule.replace(lookups=True))
    packed = both.pack(params, token)
    assert set(packed.weights) == set()
    assert np.abs(both(packed, token) - step(params, token)).max() < 0.5
    report = both.evaluate(packed, [(token,)], weights=params)
    assert 0 < report.sites[0].error < 0.05


def test_raw_weights_are_looked_at_on_first_sight():
    step = hire.transform(model)
    with pytest.warns(UserWarning, match="packed on first sight"):
        close(step(EXACT, X), model(EXACT, X), 1e-5)
    looked = hire.transform(model)
    np.testing.assert_array_equal(looked(PARAMS, X), jax.jit(model)(PARAMS, X))


def test_a_packed_serves_prefill_and_decode_alike():
    step = hire.transform(model)
    packed = step.pack(EXACT, X)
    for tokens in (1, 5, 64):
        x = inputs(tokens, D)
        close(step(packed, x), model(EXACT, x), 1e-5)


def test_saved_rules_restore_what_was_found(tmp_path):
    packed = hire.transform(model).pack(EXACT, X)
    path = str(tmp_path / "rules.json")
    hire.save_rules(packed.rules, path)
    again = hire.transform(model, *hire.load_rules(path))
    shapes = again.pack(*jax.eval_shape(lambda *args: args, EXACT, X))
    restored = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(packed))
    close(again(restored, X), model(EXACT, X), 1e-5)


def test_the_greatest_inputs_are_exact():
    """An input that is large beside the others carries the error of its column."""
    w, x = rand(D, D), jnp.ones((1, D)).at[0, 7].set(100.0)

    def layer(w, x):
        return x @ w

    def error(rule):
        step = hire.transform(layer, rule)
        return np.abs(step(step.pack(w, x), x) - layer(w, x)).max()

    rounded = error(Linear(encoding=Blocks(4), force=True))
    assert error(Linear(k=1, encoding=Blocks(4), force=True)) < rounded / 5


def test_a_token_does_not_depend_on_its_neighbors():
    step = hire.transform(model, Linear(k=2, encoding=Blocks(4), force=True))
    packed, x = step.pack(PARAMS, X), inputs(6, D)
    together = step(packed, x)
    for i in range(6):
        close(step(packed, x[i : i + 1]), together[i : i + 1], 1e-5)


def test_nan_travels():
    step = hire.transform(model, Linear(k=2, encoding=Blocks(8), force=True))
    y = step(step.pack(PARAMS, X), X.at[1, 3].set(jnp.nan))
    assert np.isnan(y[1]).all()
    assert not np.isnan(y[0]).any()


def test_beside_other_kinds():
    """What a block takes is not a linear layer; one that stays dense leaves its own."""
    rules = Linear(encoding=Blocks(8), force=True), hire.FFN(k=0.5, force=True)
    assert names(hire.inspect(model, PARAMS, X, rules=rules)) == {"params/layers/q"}
    rules = Linear(encoding=Blocks(8), force=True), hire.FFN(k=0.5, path="other", force=True)
    assert names(hire.inspect(model, PARAMS, X, rules=rules)) == ALL


def test_evaluate_reports_it_and_tune_leaves_it():
    rules = Linear(encoding=Blocks(4), force=True), hire.FFN(k=0.5, force=True)
    step = hire.transform(model, *rules)
    batches = [(inputs(32, D, seed=s),) for s in range(4)]
    packed = step.pack(PARAMS, X)
    report = step.evaluate(packed, batches, weights=PARAMS)
    (linear,) = [site for site in report.sites if site.kind == "linear"]
    x = jnp.concatenate([batch[0] for batch in batches])
    error = (
        np.asarray(Blocks(4).decode(packed.sites[linear.name].rows, 0)).T - PARAMS["layers"]["q"][0]
    )
    assert 0.01 < linear.error < 0.2
    first = np.linalg.norm(x @ error, axis=1) / np.linalg.norm(x @ PARAMS["layers"]["q"][0], axis=1)
    assert first.mean() == pytest.approx(linear.error, rel=0.5)  # of one layer, and of all
    tuned = step.tune(PARAMS, batches, recall=0.9)
    assert rules[0] in tuned


def test_a_rounded_copy_is_compared_with_the_weights_alone():
    step = hire.transform(model, Linear(encoding=Blocks(4), force=True))
    with pytest.raises(HireRewriteError, match="weights="):
        step.evaluate(step.pack(PARAMS, X), [(X,)])


@pytest.mark.parametrize("transformation", ["vmap", "grad", "jit", "scan"])
def test_transformations(transformation):
    step = hire.transform(model, FULL)
    packed = step.pack(PARAMS, X)
    run = {
        "vmap": lambda f, w, x: jax.vmap(functools.partial(f, w))(x[None]),
        "grad": lambda f, w, x: jax.grad(lambda x: f(w, x).sum())(x),
        "jit": lambda f, w, x: jax.jit(f)(w, x),
        "scan": lambda f, w, x: lax.scan(lambda c, _: (f(w, c), None), x, None, 2)[0],
    }[transformation]
    close(run(step, packed, X), run(model, PARAMS, X), 1e-4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"k": 2}, "encoding"),
        ({"k": 1.5, "encoding": Blocks()}, r"k=1\.5"),
        ({"encoding": "int8"}, "not an encoding"),
        ({"exact": Float("float32"), "encoding": Blocks()}, "k=0"),
        ({"encoding": Blocks(), "round_inputs": 1}, "True or False"),
        ({"lookups": "all"}, "lookups"),
    ],
)
def test_settings_that_do_not_fit_each_other(settings, reason):
    with pytest.raises(HireRewriteError, match=reason):
        Linear(**settings)


def test_more_exact_inputs_than_there_are():
    with pytest.raises(HireRewriteError, match=r"k=65 .*64"):
        hire.inspect(model, PARAMS, X, rules=[Linear(k=65, encoding=Blocks())])


@pytest.mark.parametrize("layout", [("NWC", "WIO", "NWC"), ("NCW", "OIW", "NCW")])
def test_a_convolution_over_one_position(layout):
    def layer(w, x):
        return lax.conv_general_dilated(x, w, (1,), "VALID", dimension_numbers=layout)

    half = rand(D, F).astype(jnp.bfloat16).astype(jnp.float32)
    w = half[None] if layout[0] == "NWC" else half.T[..., None]
    x = inputs(2, 5, D) if layout[0] == "NWC" else inputs(2, D, 5)
    for rules in ((FULL,), (Linear(encoding=Blocks(4), k=1, force=True),), ()):
        step = hire.transform(layer, *rules)
        packed = step.pack(w, x)
        assert names(step.plan(packed, x)) == {"w"}
        close(run(step, packed, x), layer(w, x), 0.2 if rules and rules[0].k == 1 else 1e-5)


def test_products_in_float64_are_not_computed_in_float32_unasked():
    with jax.enable_x64(True):
        w, x = (jnp.asarray(a, jnp.float64) for a in (rand(D, F), inputs(2, D)))
        half = w.astype(jnp.bfloat16)
        asked = Linear(k=1.0, encoding=Blocks(8), force=True)
        for weight, rules in ((half.astype(w.dtype), ()), (half, (asked,)), (w, (asked,))):
            step = hire.transform(lambda w, x: x @ w.astype(jnp.float64), *rules)
            packed = step.pack(weight, x)
            assert names(step.plan(packed, x)) == set()
            np.testing.assert_allclose(step(packed, x), x @ weight.astype(w.dtype), rtol=1e-12)
        step = hire.transform(lambda w, x: x @ w, asked.replace(exact=Float("float32")))
        packed = step.pack(w, x)
        assert names(step.plan(packed, x)) == {"w"}
        close(step(packed, x), x @ w, 1e-5)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda w, x: lax.dot(x, jnp.rint(9 * w).astype(jnp.int8)), "int8"),
        (lambda w, x: x @ (w + 1j * w), "complex64"),
        (lambda w, x: x.astype(jnp.complex64) @ w, "complex64"),
    ],
)
def test_a_layer_that_is_not_a_site_says_why(fn, reason):
    w, x = rand(D, D), inputs(2, D)
    for rules in ((FULL,), ()):
        step = hire.transform(fn, *rules)
        packed = step.pack(w, x)
        plan = step.plan(packed, x)
        assert not plan.sites
        (rejection,) = plan.rejected
        assert reason in rejection.reason
        np.testing.assert_allclose(run(step, packed, x), run(fn, w, x), rtol=1e-5, atol=1e-5)


def test_an_encoding_that_does_not_fit_leaves_the_layer_dense():
    plan = hire.inspect(model, PARAMS, X, rules=[Linear(encoding=Blocks(8, 48), force=True)])
    assert names(plan) == set()
    assert all("48" in site.reason for site in plan.sites if site.kind == "linear")


EXPERTS = 4


def mixture(params, x):
    """Layers of experts that all see as many tokens: each its own, in several layouts of axes."""

    def layer(x, w):
        h = jnp.tanh(jnp.einsum("etd,edf->etf", x, w["in"]))
        h = h * jnp.tanh(jnp.einsum("edf,etd->eft", w["in"], x)).swapaxes(1, 2)
        return x + jnp.tanh(jnp.einsum("etf,efd->etd", h, w["out"])), None

    x, _ = lax.scan(layer, x, params["layers"])
    return jnp.einsum("etd,dev->tev", x, params["head"])


def mixture_weights(make):
    layers = {"in": make(LAYERS, EXPERTS, D, F, seed=0), "out": make(LAYERS, EXPERTS, F, D, seed=1)}
    return {"layers": layers, "head": make(EXPERTS, D, F, seed=2).swapaxes(0, 1)}


MIXTURE = mixture_weights(lambda *shape, seed: rand(*shape, seed=seed) / shape[-2] ** 0.5)
MIXED = inputs(EXPERTS, 2, D)


def test_weights_of_experts():
    step = hire.transform(mixture, Linear(encoding=Blocks(8), force=True))
    sites = [site for site in step.plan(MIXTURE, MIXED).sites if site.kind == "linear"]
    assert [(s.status, s.experts, s.tokens) for s in sites] == [("rewritten", EXPERTS, 2)] * 4
    packed = step.pack(MIXTURE, MIXED)
    assert set(packed.weights) == set()
    want = mixture(MIXTURE, MIXED)
    assert 0 < np.abs(step(packed, MIXED) - want).max() < 0.02 * np.abs(want).max()
    for site in sites:
        assert site.bytes_after / site.bytes_before == pytest.approx((32 + 2) / (32 * 4))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("k", [1.0, 0.1])
def test_experts_with_exact_inputs(k, tokens):
    x = inputs(EXPERTS, tokens, D)
    step = hire.transform(mixture, Linear(k=k, encoding=Blocks(4), force=True))
    got, want = step(step.pack(MIXTURE, MIXED), x), mixture(MIXTURE, x)
    if k == 1.0 or tokens == 40:
        close(got, want, 1e-5)
    else:  # each expert has the greatest inputs of its own tokens
        w, x = MIXTURE["layers"]["in"][0], inputs(EXPERTS, tokens, D)

        def product(w, x):
            return jnp.einsum("etd,edf->etf", x, w)

        one = hire.transform(lambda w, x: x @ w, Linear(k=k, encoding=Blocks(4), force=True))
        each = [one(one.pack(w[e], x[e]), x[e]) for e in range(EXPERTS)]
        step = hire.transform(product, Linear(k=k, encoding=Blocks(4), force=True))
        close(step(step.pack(w, x), x), jnp.stack(each), 1e-5)


@pytest.mark.parametrize("mode", ["hire", "exact", "dense"])
def test_experts_without_loss(mode):
    params = mixture_weights(on_grid)
    packed = hire.transform(mixture).pack(params, MIXED)
    assert set(packed.weights) == set()
    run = jax.jit(hire.transform(mixture, mode=mode))
    close(run(packed, MIXED), mixture(params, MIXED), 1e-4)


def test_experts_are_measured():
    step = hire.transform(mixture, Linear(encoding=Blocks(4), force=True))
    report = step.evaluate(step.pack(MIXTURE, MIXED), [(MIXED,)] * 2, weights=MIXTURE)
    assert len(report.sites) == 4
    assert all(0.01 < site.error < 0.2 and site.tokens == 4 for site in report.sites)
    dense = hire.transform(mixture, FULL)
    report = dense.evaluate(dense.pack(MIXTURE, MIXED), [(MIXED,)])
    assert all(site.error < 1e-5 for site in report.sites)


def test_weights_side_by_side_along_two_axes():
    w, x = rand(2, 3, D, F), inputs(2, 3, 1, D)
    step = hire.transform(lambda w, x: x @ w, Linear(encoding=Blocks(8), force=True))
    (site,) = step.plan(w, x).sites
    assert site.status == "dense"
    assert "several axes, of [2, 3]" in site.reason
    close(step(step.pack(w, x), x), x @ w)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_products_have_the_precision_of_those_whose_place_they_take(precision):
    """Where backends round operands, a model that asks for more gets it."""

    def model(params, x):
        x = jax.nn.relu(jnp.dot(x, params["up"], precision=precision))
        x = jnp.dot(x, params["down"], precision=precision)
        return jnp.dot(x, params["head"], precision=precision)

    params = {"up": rand(D, F), "down": rand(F, D), "head": rand(D, F)}
    rules = Linear(encoding=Float("bfloat16"), force=True), hire.FFN(k="positive", force=True)
    step = hire.transform(model, *rules)
    packed = step.pack(params, inputs(2, D))
    assert len(step.plan(packed, inputs(2, D)).rewritten) == 2
    traced = jax.jit(step).trace(packed, inputs(2, D))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) > 2
    assert not any("DEFAULT" in product or "precision" not in product for product in products)
