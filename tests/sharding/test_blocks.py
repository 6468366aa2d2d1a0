"""Blocks without their zeros, and with a compressed copy, on several devices: the dense model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hire_rewrite as hire
from benchmarks.collectives import collectives
from hire_rewrite import Blocks, Float, Nested, Quantized
from tests.cases import close
from tests.sharding.test_manual import FORMS, SPECS, laid_out, mesh_of, slice_of, whole
from tests.sharding.test_rows import (
    LAYERS,
    LAYOUTS,
    TOKEN,
    VOCABULARY,
    D,
    batches,
    typed_step,
    weights,
)
from tests.sharding.test_rows import step as one_device


def positive(**settings):
    return hire.FFN(k="positive", **{"force": True, "max_tokens": None} | settings)


def predicted(**settings):
    return hire.FFN(**{"k": 0.1, "tail": "predicted", "force": True, "max_tokens": None} | settings)


@functools.cache
def dense():
    return np.asarray(one_device(weights(), TOKEN))


@functools.cache
def on_grids():
    """Weights that 8 bits hold."""
    layers = dict(weights()["layers"])
    for name, step in (("gate", 128), ("up", 128), ("down", 512)):
        layers[name] = np.round(layers[name] * step) / np.float32(step)
    return weights() | {"layers": layers}


@pytest.mark.parametrize("name", ["whole, unchecked", "blocks"])
def test_in_a_manual_region_each_device_leaves_out_its_zeros(name):
    form, mesh, check_vma = FORMS[name]
    step = hire.transform(form(mesh, check_vma), positive(predictor=Quantized(), budget=0.5))
    packed = step.pack(laid_out(mesh), TOKEN)
    assert [site.kind for site in step.plan(packed, TOKEN).rewritten] == ["ffn"]
    close(jax.jit(step)(packed, TOKEN), dense(), 1e-5)
    assert "cond" in str(jax.make_jaxpr(step)(packed, TOKEN))


@pytest.mark.long
def test_in_a_manual_region_it_is_measured_and_calibrated_by_device():
    mesh = mesh_of(data=2, model=4)
    step = hire.transform(whole(mesh), positive(budget=0.5))
    packed = step.pack(laid_out(mesh), TOKEN, calibration=batches())
    (site,) = step.evaluate(packed, batches()).sites
    assert site.recall == (1.0,) * (4 * LAYERS)
    alone = hire.transform(one_device, positive(predictor=Quantized(), budget=0.5))
    own = slice_of(3)  # whose first layer sees the embeddings alone
    (one,) = alone.evaluate(alone.pack(own, TOKEN), batches()).sites
    assert site.read[LAYERS * 3] == pytest.approx(one.read[0], abs=1e-6)
    close(jax.jit(step)(packed, TOKEN), dense(), 1e-5)


def test_in_a_manual_region_it_has_the_models_gradient():
    def block(w, x):
        h = jax.nn.relu(x @ w["gate"][0]) * (x @ w["up"][0] + w["bias"][0])
        return x + lax.psum(h @ w["down"][0], "model")

    mesh, specs = mesh_of(data=2, model=4), (SPECS["layers"], P("data"))
    fn = jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=P("data"))
    w, x = laid_out(mesh)["layers"], jnp.asarray(weights()["embed"][TOKEN])
    step = hire.transform(fn, positive(predictor=Quantized(), budget=0.4))
    packed = step.pack(w, x)
    got = jax.jit(jax.grad(lambda x: jnp.sin(step(packed, x)).sum()))(x)
    close(got, jax.grad(lambda x: jnp.sin(fn(w, x)).sum())(x), 1e-4)


def check_little_is_sent(compiled):
    """Nothing of the size of a matrix goes between devices: hidden states alone, and (where the
    head is stored in shards) what all devices' logits are added up from."""
    logits = ("all-reduce", 4 * TOKEN.size * VOCABULARY)
    sent = [(one.kind, one.bytes) for one in collectives(compiled.as_text())]
    assert max(size for one, size in sent if (one, size) != logits) <= 4 * TOKEN.size * D


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "exact"),
    [("data and tensor", None), ("stored in shards", Nested()), ("a manual region", None)],
    ids=str,
)
def test_rows_are_stored_in_the_bits_that_hold_them_by_each_device(name, exact):
    region = name == "a manual region"
    mesh = mesh_of(data=2, model=4)
    fn, layout = whole(mesh) if region else one_device, LAYOUTS.get(name)
    if region:
        put = jax.tree.map(
            lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), on_grids(), SPECS
        )
    else:
        put = layout.put(on_grids())
    token = TOKEN if region else layout.token()
    step = hire.transform(fn, positive(exact=exact))
    packed = step.pack(put, token)
    (site,) = step.plan(packed, token).rewritten
    assert str(exact or "Blocks(bits=8") in site.reason
    parts = 4 if region else layout.parts
    for leaf in jax.tree.leaves(packed.sites):
        assert leaf.addressable_shards[0].data.nbytes == leaf.nbytes // parts
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(packed.sites))
    assert size < 0.35 * 4 * sum(on_grids()["layers"][n].size for n in ("gate", "up", "down"))
    compiled = jax.jit(step).lower(packed, token).compile()
    close(compiled(packed, token), one_device(on_grids(), TOKEN), 1e-5)
    check_little_is_sent(compiled)


def test_on_a_mesh_as_much_is_read_as_on_one_device():
    layout = LAYOUTS["data and tensor"]
    step = hire.transform(one_device, positive(predictor=Quantized(), budget=0.5))
    packed, one = step.pack(layout.put(weights()), layout.token()), step.pack(weights(), TOKEN)
    mine, theirs = (step.evaluate(p, [(TOKEN,)]).sites[0] for p in (packed, one))
    assert mine.read == pytest.approx(theirs.read)
    assert mine.recall == theirs.recall == (1.0,) * LAYERS
    assert mine.whole >= theirs.whole  # a device has a share of the budget alone


def test_the_gradient_of_several_gates_on_a_mesh():
    mesh, rng = mesh_of(data=2, model=4), np.random.default_rng(0)
    p = {n: rng.normal(size=(64, 128)).astype(np.float32) / 8 for n in ("gate", "up")}
    p["down"] = rng.normal(size=(128, 64)).astype(np.float32)

    def fn(p, x):
        g, h = x @ p["gate"], x @ p["up"]
        return jnp.where((g > 0.5) & (h > 0), g * h, 0) @ p["down"]

    x = jnp.asarray(rng.normal(size=(4, 64)), jnp.float32)
    specs = {"gate": P(None, "model"), "up": P(None, "model"), "down": P("model")}
    put = {n: jax.device_put(p[n], NamedSharding(mesh, specs[n])) for n in p}
    step = hire.transform(fn, positive(predictor=Quantized()))
    packed = step.pack(put, x)
    assert "sharded over model=4" in step.plan(packed, x).rewritten[0].reason
    with pytest.warns(hire.HireRewriteWarning, match="gradient"):  # as of one device
        got = jax.jit(jax.value_and_grad(lambda x: step(packed, x).sum()))(x)
    close(got, jax.value_and_grad(lambda x: fn(p, x).sum())(x))
    assert step.evaluate(packed, [(x,)]).sites[0].read[0] < 0.5


@pytest.mark.parametrize("region", [True, False])
def test_weights_that_are_no_numbers_stay_dense(region):
    mesh, layout = mesh_of(model=4), LAYOUTS["tensor"]
    down = weights()["layers"]["down"].copy()
    down[1, 3, 5] = np.inf
    params = weights() | {"layers": weights()["layers"] | {"down": down}}
    fn, put = (whole(mesh), params) if region else (one_device, layout.put(params))
    step = hire.transform(fn, positive())
    with pytest.warns(hire.HireRewriteWarning, match="NaN or an infinity"):
        packed = step.pack(put, TOKEN)
    (site,) = (site for site in step.plan(packed, TOKEN).sites if site.kind == "ffn")
    assert site.status == "dense"


@functools.cache
def in_parts():
    """The model on one device, a device's neurons a block of their own."""
    names = ("gate", "up", "bias", "down")
    every = weights()["layers"]
    parts = [
        [
            {n: np.split(every[n][i], 4, 0 if n in ("down", "bias") else 1)[j] for n in names}
            for j in range(4)
        ]
        for i in range(LAYERS)
    ]

    def fn(params, token):
        x = params["embed"][token]
        for layer in params["parts"]:
            hidden = (jax.nn.relu(x @ w["gate"]) * (x @ w["up"] + w["bias"]) for w in layer)
            x = x + sum(h @ w["down"] for h, w in zip(hidden, layer, strict=True))
        return x @ params["head"]

    params = {"embed": weights()["embed"], "parts": parts, "head": weights()["head"]}
    step = hire.transform(fn, predicted())
    packed = step.pack(params, TOKEN)
    assert len(step.plan(packed, TOKEN).rewritten) == 4 * LAYERS
    return np.asarray(step(packed, TOKEN))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("region", [False, True])
def test_a_copy_of_each_device_and_its_own_top_k(region):
    layout, mesh = LAYOUTS["data and tensor"], mesh_of(data=2, model=4)
    fn, put = (whole(mesh), laid_out(mesh)) if region else (one_device, layout.put(weights()))
    token = TOKEN if region else layout.token()
    step = hire.transform(fn, predicted())
    packed = step.pack(put, token)
    compiled = jax.jit(step).lower(packed, token).compile()
    got = compiled(packed, token)
    check_little_is_sent(compiled)
    assert np.abs(got - dense()).max() > 1e-4  # it does take a copy
    close(got, in_parts(), 1e-4)
    exactly = jax.jit(hire.transform(fn, predicted(), mode="exact"))
    close(exactly(packed, token), dense(), 1e-5)
    rounded = hire.transform(fn, predicted(exact=Blocks(8), encoding=Blocks(4)))
    report = rounded.evaluate(rounded.pack(put, token), [(token,)], weights=put)
    assert 1e-3 < report.sites[0].error < 0.3


def test_packs_of_shapes_lie_like_packs_of_arrays():
    layout = LAYOUTS["data and tensor"]
    params, token = layout.put(weights()), layout.token()
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), params
    )
    for rule in (positive(exact=Float(), predictor=Quantized()), predicted()):
        step = hire.transform(one_device, rule)
        pairs = zip(*(jax.tree.leaves(step.pack(p, token)) for p in (params, shapes)), strict=True)
        for a, b in pairs:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_types_that_say_how_weights_are_sharded():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    layout = LAYOUTS["data and tensor"]
    with jax.set_mesh(mesh):
        params, token = (
            jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, a.sharding.spec)), tree)
            for tree in (layout.put(weights()), layout.token())
        )
        step = hire.transform(typed_step, positive())
        packed = step.pack(params, token)
        assert len(step.plan(packed, token).rewritten) == 1
        logits = jax.jit(step)(packed, token)
        assert logits.sharding.spec == P("data", "model")
        close(logits, dense(), 1e-5)


E, F, T = 8, 128, 4
EXPERTS = {
    "experts": (P("model"), P("model")),
    "experts and neurons": (P("model", None, "data"), P("model", "data")),
    "one way and the other": (P("model"), P(None, "model")),
}


def experts(p, x):
    h = jax.nn.relu(jnp.einsum("etd,edh->eth", x, p["gate"])) * jnp.einsum(
        "etd,edh->eth", x, p["up"]
    )
    return jnp.einsum("eth,ehd->etd", h, p["down"])


def layers_of_experts(p, x):
    return lax.scan(lambda x, w: (x + experts(w, x), None), x, p)[0]


def weighted_experts(p, x, w):
    """All experts on all tokens, with the weights that a router gave them."""
    h = jax.nn.relu(jnp.einsum("td,edh->teh", x, p["up"])) * w[..., None]
    return jnp.einsum("teh,ehd->etd", h, p["down"])


@functools.cache
def experts_weights():
    rng = np.random.default_rng(0)
    shapes = {"gate": (2, E, D, F), "up": (2, E, D, F), "down": (2, E, F, D)}
    return {n: np.asarray(rng.normal(size=s) / 8, np.float32) for n, s in shapes.items()}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("experts", positive(predictor=Quantized())),
        ("experts and neurons", positive()),
        ("one way and the other", predicted(encoding=Float())),
    ],
    ids=str,
)
def test_experts_are_the_models(name, rule):
    """A copy in float32 loses nothing, so that what is guessed and what is exact make the whole."""
    mesh, (ups, downs) = mesh_of(data=2, model=4), EXPERTS[name]
    p = experts_weights()
    specs = {n: P(None, *(downs if n == "down" else ups)) for n in p}
    put = {n: jax.device_put(p[n], NamedSharding(mesh, specs[n])) for n in p}
    x = np.asarray(np.random.default_rng(1).normal(size=(E, T, D)), np.float32)
    step = hire.transform(layers_of_experts, rule)
    packed = step.pack(put, x)
    (site,) = step.plan(packed, x).rewritten
    assert site.experts == E
    for leaf in jax.tree.leaves(packed.sites):
        devices = 8 if name == "experts and neurons" else 4
        assert leaf.addressable_shards[0].data.nbytes == leaf.nbytes // devices
    compiled = jax.jit(step).lower(packed, x).compile()
    close(compiled(packed, x), layers_of_experts(p, x), 1e-5)
    sent = [one.bytes for one in collectives(compiled.as_text())]
    assert max(sent, default=0) <= 4 * E * T * D // (4 if name == "experts" else 1)
    if name == "experts":  # tokens stay where their experts are
        assert sent == []
    (report,) = step.evaluate(packed, [(x,)]).sites
    assert report.error < 1e-6
    told = jax.jit(hire.transform(layers_of_experts, rule, telemetry=True))(packed, x)[1]
    (used,), (counted,) = told.summary().values(), told.sites
    assert (used.whole, used.calls) == (0, 1)
    # One for each layer, expert, and device that has some of its neurons, or of its tokens.
    assert counted.rows == 2 * E * (8 if name == "one way and the other" else 2)
    if rule.k == "positive":
        assert used.read == pytest.approx(np.mean(report.read), abs=1e-6)
        assert len(report.read) == 2 * E
        assert 0.4 < min(report.read) <= max(report.read) < 0.7
        assert report.recall == (1.0,) * (2 * E)
    if name == "experts and neurons":
        got = jax.jit(jax.grad(lambda x: jnp.sin(step(packed, x)).sum()))(x)
        close(got, jax.grad(lambda x: jnp.sin(layers_of_experts(p, x)).sum())(x), 1e-4)


def test_all_experts_on_all_tokens():
    mesh, p = mesh_of(data=2, model=4), {n: experts_weights()[n][0] for n in ("up", "down")}
    put = {n: jax.device_put(w, NamedSharding(mesh, P("model"))) for n, w in p.items()}
    rng = np.random.default_rng(1)
    x, w = (np.asarray(rng.normal(size=s), np.float32) for s in ((T, D), (T, E)))
    step = hire.transform(weighted_experts, positive())
    packed = step.pack(put, x, w)
    assert len(step.plan(packed, x, w).rewritten) == 1
    close(jax.jit(step)(packed, x, w), weighted_experts(p, x, w), 1e-5)


def test_what_stays_dense_and_why():
    mesh = Mesh(np.array(jax.devices()[:3]), ("model",))
    p = {n: experts_weights()[n][0] for n in ("gate", "up", "down")}
    put = {n: jax.device_put(w[:6], NamedSharding(mesh, P("model"))) for n, w in p.items()}
    x = np.zeros((6, T, D), np.float32)
    (site,) = hire.inspect(experts, put, x, rules=(hire.FFN(k=0.1),)).sites
    assert "a top k is not supported" in site.reason

    def summed(p, x):
        return jax.nn.relu(lax.psum(x @ p["up"], "model")) @ p["down"]

    fn = jax.shard_map(
        summed, mesh=mesh_of(model=4), in_specs=({"up": P("model"), "down": P()}, P(None, "model")),
        out_specs=P(),
    )  # fmt: skip
    p = {"up": np.zeros((D, 2 * D), np.float32), "down": np.zeros((2 * D, D), np.float32)}
    plan = hire.inspect(fn, p, np.zeros((T, D), np.float32), rules=(positive(),))
    assert plan.sites == ()
    assert any("between devices" in rejection.reason for rejection in plan.rejected)
