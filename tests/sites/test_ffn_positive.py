"""FFN blocks without the neurons that their activation makes zero: nothing is lost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hire_rewrite as hire
from hire_rewrite import Blocks, Quantized
from hire_rewrite.cost import machine as machines
from hire_rewrite.ops.ffn import positive as ops
from tests.cases import close, packed, run
from tests.cases_ffn import FFN_CASES

NAMED = {case.name: case for case in FFN_CASES}
SOME = [
    *("plain relu", "up first relu", "custom_jvp", "both bias 3 tokens", "vector"),
    *("einsum hidden first", "tied", "vmap over tokens", "nested scan", "while_loop", "cond"),
    *("up from two axes", "joined with another input", "layers of experts", "scaled hidden"),
    *("casts of bfloat16 weights", "float32 accumulation", "scale and bias after the product"),
]
TOLD = ["gated relu", "scan", "experts in a batch"]
D, F = 64, 256
TPU = dataclasses.replace(machines.current(), name="tpu")


def positive(**settings):
    return hire.FFN(k="positive", **{"force": True, "max_tokens": None} | settings)


def tolerance(case):
    return 2e-2 if "bf16" in str(jax.make_jaxpr(case.fn)(case.params, *case.args)) else 1e-4


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("name", "predictor"),
    [*((name, Quantized()) for name in SOME), *((name, None) for name in TOLD)],
)
def test_the_result_is_the_models(name, predictor):
    """However the block is written, whether the first product tells or a guess."""
    case = NAMED[name]
    step = hire.transform(case.fn, positive(predictor=predictor))
    assert any(site.status == "rewritten" for site in step.plan(case.params, *case.args).sites)
    weights = packed(step, case.params, *case.args)
    got, want = run(step, weights, *case.args), run(case.fn, case.params, *case.args)
    close(got, want, tolerance(case))


def weights(share=0.2, dtype=jnp.float32, seed=0, gated=False):
    """Of a block of which about such a share of neurons is positive."""
    rng = np.random.default_rng(seed)
    shapes = {"up": (D, F), "down": (F, D)} | ({"gate": (D, F)} if gated else {})
    p = {name: rng.normal(size=shape) / np.sqrt(D) for name, shape in shapes.items()}
    p["b"] = np.full(F, -np.quantile(rng.normal(size=9999), 1 - share))
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), p)


def tokens(n, seed=1, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, D)), dtype)


def block(p, x):
    return jax.nn.relu(x @ p["up"] + p["b"]) @ p["down"]


ACTIVATIONS = {
    "relu": (False, lambda p, h, _: jax.nn.relu(h + p["b"])),
    "squared": (False, lambda p, h, _: jnp.square(jnp.maximum(h + p["b"], 0))),
    "clipped": (False, lambda p, h, _: jnp.clip(h + p["b"], 0, 0.5)),
    "threshold": (False, lambda p, h, _: jnp.where(h + p["b"] > 0.1, h, 0)),
    "gated": (True, lambda p, h, g: jax.nn.relu(g + p["b"]) * h),
    "either": (True, lambda p, h, g: jnp.where((g + p["b"] > 0) & (h > 0), g * h, 0)),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_that_makes_zeros(name):
    gated, activation = ACTIVATIONS[name]

    def fn(p, x):
        return activation(p, x @ p["up"], x @ p["gate"] if gated else None) @ p["down"]

    p, x = weights(gated=gated), tokens(4)
    step = hire.transform(fn, positive(predictor=Quantized()))
    got = step.pack(p, x)
    close(step(got, x), fn(p, x), 1e-5)
    (site,) = step.evaluate(got, [(tokens(64, 2),)]).sites
    assert site.read[0] < 0.7
    assert site.recall == (1.0,)


def test_others_are_refused_with_a_reason():
    for activation in (jax.nn.gelu, jax.nn.silu, jnp.tanh):
        step = hire.transform(lambda p, x, f=activation: f(x @ p["up"]) @ p["down"], positive())
        with pytest.warns(hire.HireRewriteWarning, match="not seen to make a neuron zero"):
            (site,) = step.plan(weights(), tokens(1)).sites
        assert site.status == "dense"


def test_a_margin_misses_few_and_reads_less():
    p, x, many = weights(), tokens(1), tokens(512, 2)

    def report(**settings):
        step = hire.transform(block, positive(**settings))
        return step.evaluate(step.pack(p, x), [(many,)]).sites[0]

    told, proved = report(), report(predictor=Quantized())
    wide, narrow = (report(predictor=Quantized(4), margin=m) for m in (4.0, 0.1))
    share = float((block(p | {"down": jnp.eye(F)}, many) > 0).mean())
    assert told.read[0] == pytest.approx(share, abs=1e-3)
    assert share < narrow.read[0] < wide.read[0] < 0.4
    assert share < proved.read[0] < wide.read[0]
    assert told.recall == proved.recall == (1.0,)
    assert 0.9 < narrow.recall[0] < wide.recall[0]
    assert wide.recall[0] > 0.999
    assert told.error < 1e-6 < narrow.error < 0.1


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("seed", range(2))
def test_what_is_proved_is_zero_in_double_precision(dtype, seed):
    """Also where weights are as bad as they can be: huge and tiny rows, sums that cancel, numbers
    below the normal range, and pre-activations near zero."""
    rng = np.random.default_rng(seed)
    up = rng.normal(size=(D, F)) * 10.0 ** rng.integers(-6, 6, size=F)
    up[:, ::7] *= 1e-38 / np.abs(up[:, ::7]).max(0)
    up[:, 1::7] += 1e4 * np.where(np.arange(D) % 2, 1, -1)[:, None] / np.abs(up).max()
    x = rng.normal(size=(32, D)) * 10.0 ** rng.integers(-3, 3, size=(32, 1))
    x[1] = x[0]
    x, up = jnp.asarray(x, dtype), jnp.asarray(up, dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(up, np.float64)
    # Half of the biases make a token's own pre-activation nearly zero.
    bias = jnp.asarray(np.where(np.arange(F) % 2, -exact[0], rng.normal(size=F)), dtype)
    p = {"up": up, "b": bias, "down": jnp.eye(F, D, dtype=dtype)}
    step = hire.transform(block, positive(predictor=Quantized()))
    # A guess may only take for zero what is zero, so of those that are not none is missed.
    (site,) = step.evaluate(step.pack(p, x), [(x,)]).sites
    assert site.recall == (1.0,)
    assert site.read[0] < 0.95
    skipped = ~unsettled_of(step.pack(p, x), x)
    assert skipped.mean() > 0.05
    assert (exact + np.asarray(bias, np.float64))[skipped].max() <= 0


def unsettled_of(got, x):
    """Which neurons the first layer of the only site reads."""
    (state,) = got.sites.values()
    names = {
        "up_dtype": x.dtype,
        "down_dtype": x.dtype,
        "precision": None,
        "compute_dtype": x.dtype,
    }
    encoding = hire.Float("bfloat16" if x.dtype == jnp.bfloat16 else "float32")
    spec = ops.PositiveFFNSpec(
        **names, width=F, d_out=D, projections=1, gates=(0,), budget=F,
        up=encoding, down=encoding, predictor=Quantized(),
    )  # fmt: skip

    def activation(pre, vectors):
        return jax.nn.relu(pre[0] + vectors[0])

    return np.asarray(ops.unsettled(x, state, 0, spec=spec, activation=activation))


def test_a_skipped_neuron_is_never_positive():
    """By the weights of the neurons that are skipped: infinitely great, if they were used."""
    p, x = weights(0.3, seed=5), tokens(200, 6)
    step = hire.transform(block, positive(predictor=Quantized()))
    got = step.pack(p, x)
    exact = np.asarray(x, np.float64) @ np.asarray(p["up"], np.float64) + np.asarray(p["b"])
    for i in range(0, 200, 20):
        huge = jnp.where(jnp.asarray(exact[i] <= 0)[:, None], 1e30, p["down"])
        again = step.pack(p | {"down": huge}, x)
        close(step(again, x[i][None]), step(got, x[i][None]), 1e-5)


def test_a_token_does_not_depend_on_its_neighbors():
    p, x = weights(), tokens(5)
    for rule in (positive(), positive(predictor=Quantized(4), margin=0.05, budget=0.3)):
        step = hire.transform(block, rule)
        got = step.pack(p, x)
        together = np.asarray(step(got, x))
        alone = np.concatenate([step(got, row[None]) for row in x])
        close(together, alone, 1e-5)


@pytest.mark.parametrize("predictor", [None, Quantized()])
@pytest.mark.parametrize("n", [1, 3])
def test_tokens_with_more_than_the_budget_read_all(predictor, n):
    p, x = weights(0.5), tokens(n)
    step = hire.transform(block, positive(predictor=predictor, budget=0.1))
    got = step.pack(p, x)
    close(step(got, x), block(p, x), 1e-5)
    assert "cond" in str(jax.make_jaxpr(step)(got, x))
    (site,) = step.evaluate(got, [(x,)]).sites
    assert site.whole == 1.0


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("predictor", [None, Quantized()])
def test_values_that_are_no_numbers(predictor, value):
    p, x = weights(), tokens(3)
    step = hire.transform(block, positive(predictor=predictor))
    bad = x.at[1, 0].set(value)
    got, want = np.asarray(step(step.pack(p, x), bad)), np.asarray(block(p, bad))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    close(got[[0, 2]], want[[0, 2]], 1e-5)
    for name in ("up", "down"):  # zero times infinity is no zero
        q = p | {name: p[name].at[3, 5].set(value)}
        held = step.pack(q, x)
        assert "hold a NaN or an infinity" in step.plan(held, x).sites[0].reason
        np.testing.assert_array_equal(step(held, x), block(q, x))


@pytest.mark.parametrize("n", [0, 2])
def test_any_number_of_tokens(n):
    p = weights()
    step = hire.transform(block, positive(predictor=Quantized()))
    x = tokens(n)
    close(step(step.pack(p, x), x), block(p, x), 1e-5)


def test_rows_in_the_fewest_bits_that_hold_them():
    """What was rounded to a grid before is stored as it: also in this form nothing is lost."""
    rng = np.random.default_rng(0)
    p = weights() | {
        name: jnp.asarray(rng.integers(-127, 128, shape) * np.float32(0.01))
        for name, shape in (("up", (D, F)), ("down", (F, D)))
    }
    p |= {"b": jnp.full(F, -5.0)}
    step, x = hire.transform(block, positive()), tokens(2)
    got = step.pack(p, x)
    assert sum(array.nbytes for array in jax.tree.leaves(got)) < 0.4 * 4 * 2 * D * F
    assert "Blocks(bits=8" in step.plan(got, x).sites[0].reason
    close(step(got, x), block(p, x), 1e-4)
    asked = hire.transform(block, positive(exact=Blocks(8, None, scale="float32")))
    close(asked(asked.pack(p, x), x), block(p, x), 1e-4)


def layers(p, x):
    def layer(x, w):
        h = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True))
        return x + block(w, h), None

    return lax.scan(layer, x, p)[0]


def test_without_rules_and_with_calibration(monkeypatch):
    monkeypatch.setenv("HIRE_REWRITE_MACHINE", "bytes")
    p, x = jax.tree.map(lambda *a: jnp.stack(a), *(weights(seed=i) for i in range(2))), tokens(1)
    step = hire.transform(layers)
    plain, seen = step.pack(p, x), step.pack(p, x, calibration=[(tokens(64, 3),)])
    (first,), (second,) = (step.plan(got, x).rewritten for got in (plain, seen))
    assert "told by the first product" in first.reason
    assert "proved from Quantized" in second.reason
    assert second.bytes_after < first.bytes_after < first.bytes_before
    for got in (plain, seen):
        close(step(got, x), layers(p, x), 1e-5)
        (site,) = step.evaluate(got, [(tokens(64, 4),)]).sites
        assert len(site.read) == 2


@pytest.mark.parametrize(("activation", "predictor"), [("relu", Quantized()), ("gated", None)])
def test_for_tpu_single_rows_of_bfloat16_lie_in_words_of_their_own(
    monkeypatch, activation, predictor
):
    gated, function = ACTIVATIONS[activation]

    def fn(p, x):
        return function(p, x @ p["up"], x @ p["gate"] if gated else None) @ p["down"]

    p, x = weights(gated=gated, dtype=jnp.bfloat16), tokens(2, dtype=jnp.bfloat16)
    step = hire.transform(fn, positive(predictor=predictor))
    elsewhere = step.pack(p, x)
    with monkeypatch.context() as here:
        here.setattr(machines, "current", lambda: TPU)
        got = step.pack(p, x)
        (state,) = got.sites.values()
        single = [state.down, state.up] if gated or predictor else [state.down]
        assert all(stored["words"].dtype == jnp.uint32 for stored in single)
        assert all(array.dtype == jnp.bfloat16 for array in jax.tree.leaves(state.gates))
        for packs in (got, elsewhere):
            close(step(packs, x), fn(p, x), 2e-2)
        (site,) = step.evaluate(got, [(tokens(64, 2, jnp.bfloat16),)]).sites
        assert site.recall == (1.0,)
    close(step(got, x), fn(p, x), 2e-2)


def test_for_tpu_lists_that_no_kernel_takes_count_with_the_whole_budget(monkeypatch):
    monkeypatch.setattr(machines, "current", lambda: TPU)

    def after(d, n, **settings):
        shape = jax.ShapeDtypeStruct
        p = {"up": shape((d, F), jnp.bfloat16), "down": shape((F, d), jnp.bfloat16)}
        p["b"] = shape((F,), jnp.bfloat16)
        step = hire.transform(block, positive(budget=0.75, **settings))
        (site,) = step.plan(p, shape((n, d), jnp.bfloat16)).sites
        return (site.bytes_after - d * F * 2) / (n * d * F * 2)

    assert after(256, 2) == 0.5  # those that are expected where nobody has looked
    assert after(256, 64) == after(192, 2) == 0.75


@pytest.mark.parametrize("mode", ["exact", "dense"])
def test_other_modes_are_the_model(mode):
    p, x = weights(), tokens(2)
    step = hire.transform(block, positive(predictor=Quantized(4), margin=0.01), mode=mode)
    close(step(step.pack(p, x), x), block(p, x), 1e-5)
    close(step(p, x), block(p, x), 1e-5)


def test_under_vmap_and_in_a_loop():
    p, x = weights(), tokens(6).reshape(3, 2, D)
    step = hire.transform(block, positive(predictor=Quantized(), budget=0.4))
    got = step.pack(p, x[0])
    close(jax.vmap(functools.partial(step, got))(x), block(p, x), 1e-5)
    close(lax.map(functools.partial(step, got), x), block(p, x), 1e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("predictor", [None, Quantized()])
@pytest.mark.parametrize("activation", ["relu", "gated"])
def test_on_a_mesh_each_device_has_neurons_of_its_own(activation, predictor):
    gated, function = ACTIVATIONS[activation]

    def fn(p, x):
        return function(p, x @ p["up"], x @ p["gate"] if gated else None) @ p["down"]

    mesh, p, x = Mesh(np.array(jax.devices()[:2]), ("m",)), weights(gated=gated), tokens(4)
    specs = {"up": P(None, "m"), "gate": P(None, "m"), "down": P("m"), "b": P("m")}
    placed = {name: jax.device_put(p[name], NamedSharding(mesh, specs[name])) for name in p}
    step = hire.transform(fn, positive(predictor=predictor))
    got = step.pack(placed, x)
    assert "sharded over m=2" in step.plan(got, x).rewritten[0].reason
    (state,) = got.sites.values()
    assert all(len(array.sharding.device_set) == 2 for array in jax.tree.leaves(state))
    assert state.down["rows"].addressable_shards[0].data.shape == (1, F // 2, D)
    close(jax.jit(step)(got, x), fn(p, x), 1e-5)
    (site,) = step.evaluate(got, [(x,)]).sites
    assert site.recall == (1.0,)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"margin": 0.0, "predictor": Quantized()}, "margin=0.0"),
        ({"margin": "sure"}, "'sure'"),
        ({"margin": 3.0}, "predictor=Quantized"),
        ({"candidates": 0.5}, "candidates=0.5"),
        ({"group": 8}, "group=8"),
        ({"tail": "predicted"}, "k='positive'"),
        ({"encoding": Blocks(8)}, "encoding="),
        ({"keep": 0.5}, "keep=0.5"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, names):
    with pytest.raises(hire.HireRewriteError, match=names):
        hire.FFN(k="positive", **settings)
    if "margin" in settings:
        with pytest.raises(hire.HireRewriteError, match="margin="):
            hire.FFN(k=0.1, margin=2.0)


def test_a_predictor_without_a_bound_is_refused():
    step = hire.transform(block, positive(predictor=hire.LowRank(8)))
    with pytest.warns(hire.HireRewriteWarning, match="no bound of its errors"):
        assert step.plan(weights(), tokens(1)).sites[0].status == "dense"


def test_rules_are_saved_and_loaded(tmp_path):
    rules = positive(predictor=Quantized(4), margin=3.0), hire.FFN(k="positive")
    hire.save_rules(rules, str(tmp_path / "rules.json"))
    assert hire.load_rules(str(tmp_path / "rules.json")) == rules
