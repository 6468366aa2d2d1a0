"""Functions with a `shard_map` of their own: each device rewrites what it has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hire_rewrite as hire
from benchmarks.collectives import collectives
from hire_rewrite.ops import gather, narrow
from tests.sharding.test_rows import LAYERS, TOKEN, VOCABULARY, D, batches, weights
from tests.sharding.test_rows import step as one_device

FORCED = {"force": True, "predictor": hire.Quantized()}

SPECS = {
    "embed": P(),
    "layers": {
        "gate": P(None, None, "model"),
        "up": P(None, None, "model"),
        "bias": P(None, "model"),
        "down": P(None, "model", None),
    },
    "head": P(None, "model"),
}


def ffn(**settings):
    return hire.FFN(k=0.25, candidates=0.5, **FORCED | settings)


def head(**settings):
    return hire.Head(k=16, candidates=64, min_width=1024, **FORCED | settings)


HEAD = head()


def mesh_of(**sizes):
    count = int(np.prod(list(sizes.values())))
    devices = np.array(jax.devices()[:count]).reshape(tuple(sizes.values()))
    return Mesh(devices, tuple(sizes))


def block(x, w):
    h = jax.nn.relu(x @ w["gate"]) * (x @ w["up"] + w["bias"])
    return x + lax.psum(h @ w["down"], "model")


def forward(params, token):
    x, _ = lax.scan(lambda x, w: (block(x, w), None), params["embed"][token], params["layers"])
    return x @ params["head"]


def whole(mesh, check_vma=True):
    """All of the model in one `shard_map`."""
    data = "data" if "data" in mesh.axis_names else None
    return jax.shard_map(
        forward,
        mesh=mesh,
        in_specs=(SPECS, P(data)),
        out_specs=P(data, "model"),
        check_vma=check_vma,
    )


def blocks(mesh, check_vma=True):
    """A `shard_map` in each iteration of a scan."""
    specs = {name: P(*spec[1:]) for name, spec in SPECS["layers"].items()}
    each = jax.shard_map(
        block, mesh=mesh, in_specs=(P(), specs), out_specs=P(), check_vma=check_vma
    )

    def step(params, token):
        x, _ = lax.scan(lambda x, w: (each(x, w), None), params["embed"][token], params["layers"])
        return x @ params["head"]

    return step


def laid_out(mesh):
    return jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), weights(), SPECS)


FORMS = {
    "whole": (whole, mesh_of(model=4), True),
    "whole, unchecked": (whole, mesh_of(model=4), False),
    "whole, data and model": (whole, mesh_of(data=2, model=4), True),
    "blocks": (blocks, mesh_of(model=4), True),
    "blocks, unchecked": (blocks, mesh_of(data=2, model=4), False),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("name", "predictor"),
    [*((name, hire.Quantized()) for name in FORMS), ("blocks", hire.LowRank(48))],
    ids=str,
)
def test_blocks_take_the_top_k_of_each_device(name, predictor):
    form, mesh, check_vma = FORMS[name]
    calibration = batches() if predictor.wants_calibration else None
    run = hire.transform(form(mesh, check_vma), ffn(predictor=predictor))
    got = jax.jit(run)(run.pack(laid_out(mesh), TOKEN, calibration=calibration), TOKEN)
    alone = hire.transform(one_device, ffn(predictor=predictor, parts=4))
    want = alone(alone.pack(weights(), TOKEN, calibration=calibration), TOKEN)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)
    dense = one_device(weights(), TOKEN)
    assert np.abs(got - dense).max() > 0.05  # it does take a top k


def test_heads_take_the_top_k_of_each_device():
    mesh = mesh_of(data=2, model=4)
    run = hire.transform(whole(mesh), HEAD)
    got = jax.jit(run)(run.pack(laid_out(mesh), TOKEN), TOKEN)
    parts = []
    for part in np.split(weights()["head"], 4, axis=1):
        own = weights() | {"head": part}
        alone = hire.transform(one_device, HEAD)
        parts.append(alone(alone.pack(own, TOKEN), TOKEN))
    np.testing.assert_allclose(got, np.concatenate(parts, axis=1), rtol=2e-4, atol=2e-4)


def searching(mesh, find, check_vma=True):
    """The model in one `shard_map`, with the logits of all devices gathered for a search."""

    def body(params, token):
        return find(lax.all_gather(forward(params, token), "model", axis=1, tiled=True))

    # What an all_gather leaves alike on all devices is not known to be so by its type.
    return jax.shard_map(
        lambda params, token: jax.tree.map(lambda a: a[None], body(params, token)),
        mesh=mesh,
        in_specs=(SPECS, P("data")),
        out_specs=P("model", "data"),
        check_vma=check_vma,
    )


FINDS = {
    "top_k": lambda logits: tuple(lax.top_k(logits, 8)),
    "argmax": lambda logits: (jnp.argmax(logits, -1),),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", FINDS)
def test_searches_gather_no_logits(name):
    mesh = mesh_of(data=2, model=4)
    params = laid_out(mesh)
    fn = searching(mesh, FINDS[name])
    run = hire.transform(fn, HEAD)
    packed = run.pack(params, TOKEN)
    compiled = jax.jit(run).lower(packed, TOKEN).compile()
    got = compiled(packed, TOKEN)
    want = fn(params, TOKEN)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
    sizes = [one.bytes for one in collectives(compiled.as_text())]
    assert max(sizes) < 4 * len(TOKEN) * VOCABULARY / 16
    dense = collectives(jax.jit(fn).lower(params, TOKEN).compile().as_text())
    assert max(one.bytes for one in dense) >= 4 * (len(TOKEN) // 2) * VOCABULARY


def test_mode_exact_and_evaluation():
    mesh = mesh_of(data=2, model=4)
    params, fn = laid_out(mesh), whole(mesh)
    exact = jax.jit(hire.transform(fn, ffn(), mode="exact"))(params, TOKEN)
    alone = hire.transform(one_device, ffn(parts=4), mode="exact")(weights(), TOKEN)
    np.testing.assert_allclose(exact, alone, rtol=2e-4, atol=2e-4)
    run = hire.transform(fn, ffn(predictor=hire.Quantized(4)), HEAD)
    report = run.evaluate(run.pack(params, TOKEN), batches())
    head, block = sorted(report.sites, key=lambda site: site.name)
    assert len(head.recall) == 4
    assert block.tokens == head.tokens == sum(token.size for (token,) in batches())
    # Each device's layers follow each other; the first one sees the embeddings alone.
    first = np.asarray(block.recall).reshape(4, LAYERS)[:, 0]
    single = hire.transform(one_device, ffn(predictor=hire.Quantized(4)))
    for number, recall in enumerate(first):
        own = slice_of(number)
        alone = single.evaluate(single.pack(own, TOKEN), batches()).sites[0]
        assert recall == pytest.approx(alone.recall[0], abs=1e-6)


def slice_of(number):
    """What one of four devices has."""

    def cut(array, spec):
        axis = next((i for i, name in enumerate(spec) if name == "model"), None)
        return array if axis is None else np.split(array, 4, axis)[number]

    return jax.tree.map(cut, weights(), SPECS)


@pytest.mark.long
def test_reports_of_scanned_shard_maps():
    mesh = mesh_of(model=4)
    settings = {"predictor": hire.LowRank(24)}
    recalls = []
    for form in (whole, blocks):
        run = hire.transform(form(mesh), ffn(**settings))
        packed = run.pack(laid_out(mesh), TOKEN, calibration=batches())
        recalls.append(run.evaluate(packed, batches()).sites[0].recall)
    np.testing.assert_allclose(*recalls, atol=1e-3)


def test_packs_of_shapes_lie_like_packs_of_arrays():
    mesh = mesh_of(model=4)
    params = laid_out(mesh)
    run = hire.transform(whole(mesh), ffn(), HEAD)
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), params
    )
    packed, ahead = run.pack(params, TOKEN), run.pack(shapes, TOKEN)

    def alike(a, b):
        return (a.shape, a.dtype) == (b.shape, b.dtype) and a.sharding.is_equivalent_to(
            b.sharding, a.ndim
        )

    assert jax.tree.all(jax.tree.map(alike, packed, ahead))
    for leaf in jax.tree.leaves(packed.sites):
        assert leaf.addressable_shards[0].data.nbytes == leaf.nbytes // 4


def test_a_mesh_from_the_context():
    mesh = mesh_of(model=4)
    fn = jax.shard_map(forward, in_specs=(SPECS, P()), out_specs=P(None, "model"))
    run = hire.transform(fn, ffn())
    with jax.set_mesh(mesh):
        params = weights()
        got = jax.jit(run)(run.pack(params, TOKEN), TOKEN)
    known = hire.transform(whole(mesh), ffn())
    want = known(known.pack(laid_out(mesh), TOKEN), TOKEN)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_weights_cut_by_the_number_of_the_device():
    mesh = mesh_of(model=4)

    def own(params, token):
        start = lax.axis_index("model") * (VOCABULARY // 4)
        head = lax.dynamic_slice_in_dim(params["head"], start, VOCABULARY // 4, 1)
        return params["embed"][token] @ head

    fn = jax.shard_map(own, mesh=mesh, in_specs=(P(), P()), out_specs=P(None, "model"))
    params = {name: weights()[name] for name in ("embed", "head")}
    run = hire.transform(fn, hire.Head(k=1026, candidates=1026, min_width=1024, **FORCED))
    packed = run.pack(params, TOKEN)
    assert packed.sites["params/head"].rows.shape == (4, 1026, D)
    np.testing.assert_allclose(run(packed, TOKEN), fn(params, TOKEN), rtol=1e-5, atol=1e-5)


def test_proofs_and_cascades_of_each_device():
    mesh = mesh_of(data=2, model=4)
    params, fn = laid_out(mesh), searching(mesh, FINDS["argmax"])
    for settings in (
        {"certify": True},
        {"predictor": hire.Cascade(hire.LowRank(32), hire.Quantized(), 256)},
    ):
        run = hire.transform(
            fn, hire.Head(k=16, candidates=64, min_width=1024, **FORCED | settings)
        )
        packed = run.pack(params, TOKEN, calibration=batches())
        np.testing.assert_array_equal(jax.jit(run)(packed, TOKEN)[0], fn(params, TOKEN)[0])


def _sent(params, token):
    head = lax.all_gather(params["head"], "model", axis=1, tiled=True)
    return params["embed"][token] @ head


def _nested(mesh):
    own = jax.shard_map(
        lambda params, token: params["embed"][token] @ params["head"],
        in_specs=(SPECS, P()),
        out_specs=P(None, "model"),
        axis_names={"model"},
    )
    return jax.shard_map(
        own, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), axis_names={"data"}
    )


def test_partial_sums_are_no_logits():
    mesh = mesh_of(model=4)
    fn = jax.shard_map(
        lambda w, x: jnp.argmax(lax.psum(x @ w, "model"), -1),
        mesh=mesh,
        in_specs=(P("model", None), P(None, "model")),
        out_specs=P(),
    )
    rule = hire.Head(k=16, candidates=16, min_width=1024, tail="-inf", **FORCED | {"certify": True})
    plan = hire.inspect(fn, weights()["head"], weights()["embed"][TOKEN], rules=(rule,))
    assert plan.sites == ()
    assert "parts of sums" in plan.rejected[0].reason


@pytest.mark.sampled(2)
@pytest.mark.parametrize("check_vma", [True, False])
def test_loops_inside(check_vma):
    """A decode loop: sites that a loop runs several times with the same weights."""
    mesh = mesh_of(data=2, model=4)

    def decode(params, token):
        w = jax.tree.map(lambda a: a[0], params["layers"])
        x, _ = lax.scan(lambda x, _: (block(x, w), None), params["embed"][token], None, length=2)
        x = lax.fori_loop(0, 1, lambda _, x: block(x, w), x)
        return lax.cond(x.sum() > -jnp.inf, lambda x: block(x, w), lambda x: x, x)

    fn = jax.shard_map(
        decode, mesh=mesh, in_specs=(SPECS, P("data")), out_specs=P("data"), check_vma=check_vma
    )
    run = hire.transform(fn, ffn(predictor=hire.LowRank(24)))
    packed = run.pack(laid_out(mesh), TOKEN, calibration=batches())
    seen = sorted(site.tokens for site in run.evaluate(packed, batches()).sites)
    tokens = sum(token.size for (token,) in batches())
    assert seen == [tokens, tokens, 2 * tokens]


def _replicated(cut):
    def body(params, token):
        h = jax.nn.relu(params["embed"][cut(token)] @ params["up"])
        return lax.pmean((h @ params["down"]).sum(), ("data", "model"))

    specs = ({"embed": P(), "up": P(), "down": P()}, P("data"))
    return jax.shard_map(
        body, mesh=mesh_of(data=2, model=4), in_specs=specs, out_specs=P(), check_vma=False
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("cut", "share"),
    [
        (lambda token: token, 1),
        (lambda token: lax.all_gather(token, "data", axis=0, tiled=True), 1),
        (lambda token: lax.dynamic_slice_in_dim(token, lax.axis_index("model"), 1), 4 / 32),
    ],
    ids=["split", "gathered", "cut by the device's number"],
)
def test_tokens_are_counted_once(cut, share):
    params = {name: weights()["layers"][name][0] for name in ("up", "down")}
    params["embed"] = weights()["embed"]
    run = hire.transform(_replicated(cut), ffn())
    packed = run.pack(params, TOKEN)
    (site,) = run.evaluate(packed, batches()).sites
    assert site.tokens == share * sum(token.size for (token,) in batches())


def test_the_number_of_the_device_in_a_loop():
    mesh = mesh_of(model=4)

    def own(params, token):
        def cut(_, part):
            start = lax.axis_index("model") * (VOCABULARY // 4)
            return lax.dynamic_slice_in_dim(params["head"], start, VOCABULARY // 4, 1)

        head = lax.fori_loop(0, 1, cut, jnp.zeros((D, VOCABULARY // 4)))
        return params["embed"][token] @ head

    fn = jax.shard_map(
        own, mesh=mesh, in_specs=(P(), P()), out_specs=P(None, "model"), check_vma=False
    )
    params = {name: weights()[name] for name in ("embed", "head")}
    packed = hire.transform(fn, HEAD).pack(params, TOKEN)
    assert packed.sites["params/head"].rows.shape == (4, VOCABULARY // 4, D)


def test_raw_weights_and_diffs():
    mesh = mesh_of(model=4)
    run = hire.transform(whole(mesh), ffn(), HEAD)
    want = jax.jit(run)(run.pack(laid_out(mesh), TOKEN), TOKEN)
    with pytest.warns(UserWarning, match="packed"):
        np.testing.assert_allclose(run(laid_out(mesh), TOKEN), want, rtol=1e-5, atol=1e-5)
    assert "hire_head" in str(run.diff(laid_out(mesh), TOKEN))
    again = hire.transform(whole(mesh), ffn(), HEAD)
    with jax.set_mesh(mesh), pytest.warns(UserWarning, match="packed"):
        got = again(laid_out(mesh), TOKEN)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def _gathered_before(params, token):
    layers = jax.tree.map(
        lambda a: lax.all_gather(a, "data", axis=a.ndim - 1, tiled=True), params["layers"]
    )
    x, _ = lax.scan(lambda x, w: (block(x, w), None), params["embed"][token], layers)
    return x


def test_weights_gathered_before_a_scan_stay_dense():
    """Packed, each device would keep the whole of what it gathers for a moment now."""
    mesh = mesh_of(data=2, model=4)
    stored = dict.fromkeys(("gate", "up"), P(None, None, ("model", "data")))
    stored |= {"bias": P(None, ("model", "data")), "down": P(None, "model", "data")}
    specs = SPECS | {"layers": stored}
    fn = jax.shard_map(
        _gathered_before, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"),
        check_vma=False,
    )  # fmt: skip
    (site,) = hire.inspect(fn, weights(), TOKEN, rules=(ffn(),)).sites
    assert "between devices" in site.reason


def test_explicit_axes_beside_the_manual_ones():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    each = jax.shard_map(
        lambda x, head: x @ head,
        mesh=mesh,
        in_specs=(P(), P(None, "model")),
        out_specs=P(None, "model"),
        axis_names={"model"},
    )
    with jax.set_mesh(mesh):
        head = jax.device_put(weights()["head"], NamedSharding(mesh, P(None, "model")))
        x = jax.device_put(weights()["embed"][TOKEN], NamedSharding(mesh, P("data")))
        run = hire.transform(lambda head, x: each(x, head), HEAD)
        (site,) = run.plan(head, x).sites
        assert site.status == "dense"
        np.testing.assert_allclose(run(head, x), each(x, head), rtol=1e-5, atol=1e-5)


def test_rows_in_an_encoding_are_for_meshes_that_the_compiler_divides():
    mesh = mesh_of(model=8)
    for exact in (hire.Blocks(8), hire.Nested()):
        rule = head(exact=exact)
        plan = hire.inspect(whole(mesh), laid_out(mesh), TOKEN, rules=(rule,))
        (site,) = (site for site in plan.sites if site.kind == "head")
        assert site.status == "dense"
        assert "in a shard_map" in site.reason


def test_what_stays_dense_and_why():
    mesh = mesh_of(data=2, model=4)
    sent = jax.shard_map(
        _sent, mesh=mesh, in_specs=(SPECS, P("data")), out_specs=P("data"), check_vma=False
    )
    some = jax.shard_map(
        lambda params, token: params["embed"][token] @ params["head"],
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P("data"),
        axis_names={"data"},
    )
    for fn, reason in (
        (sent, "where its weights are sent between devices"),
        (_nested(mesh), "inside shard_map over model, inside another shard_map"),
        (some, "inside shard_map over data, and its weights are sharded over model"),
    ):
        run = hire.transform(fn, HEAD)
        params = laid_out(mesh)
        (site,) = run.plan(params, TOKEN).sites
        assert site.status == "dense"
        assert reason in site.reason
        got, want = run(params, TOKEN), jax.jit(fn)(params, TOKEN)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_nothing_says_where_the_devices_are():
    mesh = mesh_of(model=4)
    fn = jax.shard_map(forward, in_specs=(SPECS, P()), out_specs=P(None, "model"))
    run = hire.transform(fn, ffn())
    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        pytest.raises(hire.HireRewriteError, match="pack under"),
    ):
        run.pack(jax.tree.map(jnp.asarray, weights()), TOKEN)


def test_weights_that_are_no_numbers():
    mesh = mesh_of(model=4)
    params = weights() | {"head": weights()["head"] * np.nan}
    run = hire.transform(whole(mesh), HEAD)
    packed = run.pack(params, TOKEN)
    (site,) = [site for site in run.plan(packed, TOKEN).sites if site.kind == "head"]
    assert (site.status, "NaN" in site.reason) == ("dense", True)
    assert np.isnan(run(packed, TOKEN)).all()


def test_weights_inside_and_outside_are_packed_apart():
    mesh = mesh_of(model=4)
    each = jax.shard_map(
        lambda x, head: x @ head,
        mesh=mesh,
        in_specs=(P(), P(None, "model")),
        out_specs=P(None, "model"),
    )

    def fn(params, token):
        x = params["embed"][token]
        return each(x, params["head"]), x @ params["head"]

    run = hire.transform(fn, HEAD)
    packed = run.pack(weights(), TOKEN)
    assert sorted(state.rows.shape for state in packed.sites.values()) == [
        (1, VOCABULARY, D),
        (4, VOCABULARY // 4, D),
    ]
    for one, dense in zip(jax.jit(run)(packed, TOKEN), fn(weights(), TOKEN), strict=True):
        np.testing.assert_array_equal(one.argmax(-1), dense.argmax(-1))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("predictor", [hire.Quantized(), hire.Quantized(4)])
def test_tokens_apart_and_weights_in_common(monkeypatch, predictor):
    """The loops of CPU's forms carry what differs from device to device."""
    monkeypatch.setenv("HIRE_REWRITE_KERNELS", "0")
    monkeypatch.setattr(narrow, "_CHUNK", 1 << 10)
    monkeypatch.setattr(gather, "_PIECE", 1 << 12)
    rng = np.random.default_rng(0)
    w = {
        name: jnp.asarray(rng.standard_normal(shape) / 8, jnp.float32)
        for name, shape in (("gate", (64, 512)), ("up", (64, 512)), ("down", (512, 64)))
    }
    x = jnp.asarray(rng.standard_normal((16, 64)), jnp.float32)

    def run(w, x):
        return (jax.nn.relu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]

    step = hire.transform(run, hire.FFN(k=0.06, candidates=0.12, predictor=predictor, force=True))
    packed = step.pack(w, x[:2])
    apart = jax.shard_map(
        step, mesh=mesh_of(data=8), in_specs=(P(), P("data")), out_specs=P("data")
    )
    want = jnp.concatenate([step(packed, each) for each in jnp.split(x, 8)])
    np.testing.assert_allclose(apart(packed, x), want, rtol=1e-4, atol=1e-4)
