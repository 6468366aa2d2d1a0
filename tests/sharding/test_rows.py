"""Models whose weights are sharded over a mesh: the same results, and little between devices."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hire_rewrite as hire
from benchmarks.collectives import collectives
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.sharding import rows as sharding_rows
from tests.cases import Oracle

QUANTIZED = hire.Quantized()
LAYERS, D, WIDTH, VOCABULARY, TOKENS = 3, 64, 512, 4104, 4


def step(params, token):
    """Logits of a gated model without attention, its layers under a scan."""

    def layer(x, w):
        h = jax.nn.relu(x @ w["gate"]) * (x @ w["up"] + w["bias"])
        return x + h @ w["down"], None

    x, _ = lax.scan(layer, params["embed"][token], params["layers"])
    return x @ params["head"]


@functools.cache
def weights(vocabulary: int = VOCABULARY):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return np.asarray(rng.normal(size=shape) / math.sqrt(shape[-2]), np.float32)

    layers = {
        "gate": normal(LAYERS, D, WIDTH),
        "up": normal(LAYERS, D, WIDTH),
        "bias": normal(LAYERS, 1, WIDTH)[:, 0] * 0.1,
        "down": normal(LAYERS, WIDTH, D),
    }
    embed = np.asarray(rng.normal(size=(vocabulary, D)), np.float32)
    return {"embed": embed, "layers": layers, "head": normal(D, vocabulary)}


TOKEN = np.arange(TOKENS, dtype=np.int32) * 7


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and which of its axes inputs, neurons, rows of the vocabulary and tokens are on."""

    mesh: dict[str, int]
    d: str | None = None
    f: str | None = None
    v: str | None = None
    d_of_head: str | None = None
    tokens: str | None = None
    parts: int = 8

    def put(self, params):
        up, down = P(None, self.d, self.f), P(None, self.f, self.d)
        layers = {"gate": up, "up": up, "bias": P(None, self.f), "down": down}
        embed, head = P(None, self.d_of_head), P(self.d_of_head, self.v)
        return self._put(params, {"embed": embed, "layers": layers, "head": head})

    def token(self):
        return self._put(TOKEN, P(self.tokens))

    def _put(self, tree, specs):
        count = math.prod(self.mesh.values())
        devices = np.array(jax.devices()[:count]).reshape(tuple(self.mesh.values()))
        mesh = Mesh(devices, tuple(self.mesh))
        return jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), tree, specs)


LAYOUTS = {
    "tensor": Layout({"model": 8}, f="model", v="model"),
    "data and tensor": Layout(
        {"data": 2, "model": 4}, f="model", v="model", tokens="data", parts=4
    ),
    "stored in shards": Layout({"data": 8}, d="data", d_of_head="data"),
    "stored in shards and tensor": Layout(
        {"data": 2, "model": 4}, d="data", f="model", v="model", d_of_head="data", tokens="data"
    ),
    "three axes": Layout(
        {"data": 2, "host": 2, "chip": 2},
        f=("host", "chip"),
        v=("host", "chip"),
        tokens="data",
        parts=4,
    ),
    "one device": Layout({"model": 1}, f="model", v="model", parts=1),
}


def rules(
    predictor: Predictor = QUANTIZED, parts: int | None = None, **settings
) -> tuple[hire.FFN, hire.Head]:
    settings = {"force": True, "predictor": predictor} | settings
    return (
        hire.FFN(k=0.25, candidates=0.5, parts=parts, **settings),
        hire.Head(k=16, candidates=64, **settings),
    )


def batches():
    rng = np.random.default_rng(1)
    return [(rng.integers(0, VOCABULARY, 64).astype(np.int32),) for _ in range(3)]


@functools.cache
def alone(rule: hire.FFN | hire.Head, mode: str = "hire"):
    """What one device computes."""
    run = hire.transform(step, rule, mode=mode)
    return np.asarray(run(_packed(run, weights(), TOKEN, rule), TOKEN))


def _packed(run, params, token, rule):
    calibration = batches() if rule.predictor.wants_calibration else None
    return run.pack(params, token, calibration=calibration)


def together(layout: Layout, rule: hire.FFN | hire.Head):
    """What the devices of a mesh compute, under one jit."""
    params, token = layout.put(weights()), layout.token()
    run = hire.transform(step, rule)
    return jax.jit(run)(_packed(run, params, token, rule), token)


@functools.cache
def packed_on(name: str):
    """Weights and tokens laid out, and packed by `rules()`."""
    layout = LAYOUTS[name]
    params, token = layout.put(weights()), layout.token()
    return params, token, hire.transform(step, *rules()).pack(params, token)


CASES = [
    *((name, hire.Quantized()) for name in LAYOUTS),
    ("data and tensor", hire.Quantized(4)),
    ("data and tensor", hire.LowRank(48)),
    ("stored in shards", hire.LowRank(48)),
]


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("name", "predictor"), CASES)
def test_a_block_computes_what_it_does_in_parts(name, predictor):
    layout = LAYOUTS[name]
    logits = together(layout, rules(predictor)[0])
    np.testing.assert_allclose(logits, alone(rules(predictor, layout.parts)[0]), atol=1e-5)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("name", "predictor"), CASES)
def test_a_head_knows_no_less_than_on_one_device(name, predictor):
    layout, rule = LAYOUTS[name], rules(predictor)[1]
    logits, one = np.asarray(together(layout, rule)), alone(rule)
    dense = np.asarray(jax.jit(step)(weights(), TOKEN))
    # Each device has as many candidates as the one had.
    computed, before = np.isclose(logits, dense, atol=1e-5), np.isclose(one, dense, atol=1e-5)
    assert (computed.sum(-1) >= np.minimum(before.sum(-1), 64 * layout.parts)).all()
    values, best = map(np.asarray, lax.top_k(logits, 16))
    np.testing.assert_allclose(values, np.take_along_axis(dense, best, -1), atol=1e-5)
    assert (values >= lax.top_k(one, 16)[0] - 1e-5).all()


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "exact") for name in LAYOUTS), ("data and tensor", "dense")]
)
def test_the_other_modes(name, mode):
    params, token, packed = packed_on(name)
    run = hire.transform(step, *rules(), mode=mode)
    one = hire.transform(step, *rules(parts=LAYOUTS[name].parts), mode=mode)
    wanted = jax.jit(one)(weights(), TOKEN)
    np.testing.assert_allclose(jax.jit(run)(packed, token), wanted, atol=1e-5)
    if mode == "exact":  # and on raw weights, of which a jit does not know where they are
        np.testing.assert_allclose(run(params, token), wanted, atol=1e-5)
        np.testing.assert_allclose(jax.jit(one)(params, token), wanted, atol=1e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one device"])
def test_little_goes_between_devices(name):
    layout, (_, token, packed) = LAYOUTS[name], packed_on(name)
    run = hire.transform(step, *rules())
    shard = LAYERS * D * WIDTH * 4 // 8 // LAYERS
    found = collectives(jax.jit(run).lower(packed, token).compile().as_text())
    assert found
    assert max(one.bytes for one in found) < shard / 2, found
    for leaf in jax.tree.leaves(packed.sites):
        assert leaf.addressable_shards[0].data.nbytes == leaf.nbytes // layout.parts


@pytest.mark.parametrize(
    ("mesh", "spec"),
    [
        ({"a": 8}, P(None, None, "a")),
        ({"a": 8}, P(None, "a")),
        ({"a": 2, "b": 4}, P(None, "b", "a")),
        ({"a": 2, "b": 4}, P(None, "a", "b")),
        ({"a": 2, "b": 4}, P(None, None, ("a", "b"))),
        ({"a": 2, "b": 4}, P("a", "b")),
    ],
)
def test_rows_are_exchanged_and_not_gathered(mesh, spec, monkeypatch):
    devices = np.array(jax.devices()).reshape(tuple(mesh.values()))
    sharding = sharding_rows.RowSharding(Mesh(devices, tuple(mesh)), tuple(mesh))
    array = np.random.default_rng(0).normal(size=(2, 128, 64)).astype(np.float32)
    seen = []
    put = sharding_rows.put
    monkeypatch.setattr(sharding_rows, "put", lambda *args: seen.append(args[0]) or put(*args))
    there = sharding.put_rows(jax.device_put(array, NamedSharding(sharding.mesh, spec)), axis=1)
    np.testing.assert_array_equal(there, array)
    assert there.sharding.spec == P(None, tuple(mesh))
    # What is left to the compiler moves whole pieces from one device to another.
    text = jax.jit(lambda x: x, out_shardings=there.sharding).lower(seen[0]).compile().as_text()
    assert {one.kind for one in collectives(text)} <= {"collective-permute"}


def test_an_uneven_vocabulary():
    params = weights(4105)
    layout = LAYOUTS["stored in shards"]
    run = hire.transform(step, *rules())
    packed = run.pack(layout.put(params), layout.token())
    assert packed.sites["params/head"].rows.shape == (1, 8 * 514, D)
    logits = jax.jit(run)(packed, layout.token())
    reference = hire.transform(step, *rules(parts=8))
    wanted = reference(reference.pack(params, TOKEN), TOKEN)
    assert logits.shape == (TOKENS, 4105)
    np.testing.assert_array_equal(logits.argmax(-1), wanted.argmax(-1))
    np.testing.assert_allclose(lax.top_k(logits, 8)[0], lax.top_k(wanted, 8)[0], atol=1e-5)

    report = run.evaluate(packed, [(layout.token(),)])
    assert min(report.sites[0].recall) > 0.9


def tied(params, token):
    return jnp.tanh(params["embed"][token]) @ params["embed"].T


@pytest.mark.sampled(4)
@pytest.mark.parametrize("exact", [hire.Blocks(8), hire.Nested()], ids=str)
@pytest.mark.parametrize(("rows", "spec"), [(VOCABULARY, P("model")), (4105, P(None, "model"))])
def test_rows_in_an_encoding_and_a_tied_embedding(exact, rows, spec):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    run = hire.transform(tied, hire.Head(k=8, candidates=64, force=True, exact=exact))
    params, token = {"embed": weights(rows)["embed"]}, np.array([0, rows - 1, -1, 7], np.int32)
    sharded = jax.device_put(params, NamedSharding(mesh, spec))
    packed = run.pack(sharded, token)
    assert packed.weights == {}
    for leaf in jax.tree.leaves(packed.sites):
        assert leaf.addressable_shards[0].data.nbytes == leaf.nbytes // 4
    one = run.pack(jax.tree.map(jnp.asarray, params), token)
    for mode in ("hire", "exact"):
        step = jax.jit(hire.transform(tied, *run.rules, mode=mode))
        got, want = (lax.top_k(step(some, token), 8) for some in (packed, one))
        np.testing.assert_array_equal(got[1], want[1])
        np.testing.assert_allclose(got[0], want[0], atol=1e-4)
    report = run.evaluate(packed, [(token,)], weights=sharded)
    assert report.sites[0].recall == (1.0,)


def test_the_plan_counts_one_device():
    layout = LAYOUTS["tensor"]
    plan = hire.transform(step, *rules()).plan(layout.put(weights()), layout.token())
    head, ffn = plan.sites
    assert head.bytes_before == D * VOCABULARY * 4 // 8
    assert ffn.bytes_before == LAYERS * 3 * D * WIDTH * 4 // 8
    assert all("model=8" in site.reason for site in plan.sites)


def test_shapes_say_how_they_are_spread():
    params, token, packed = packed_on("data and tensor")
    run = hire.transform(step, *rules())
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), params
    )
    assert str(run.plan(shapes, token)) == str(run.plan(params, token))
    ahead = run.pack(shapes, token)
    assert ahead.info.sites == packed.info.sites
    same = jax.tree.map(
        lambda a, b: (
            (a.shape, a.dtype) == (b.shape, b.dtype)
            and a.sharding.is_equivalent_to(b.sharding, a.ndim)
        ),
        *((one.weights, one.sites) for one in (packed, ahead)),
    )
    assert all(jax.tree.leaves(same))
    compiled = jax.jit(run).lower(ahead, token).compile()
    np.testing.assert_array_equal(compiled(packed, token), jax.jit(run)(packed, token))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ((hire.Head(certify=True),), "where proofs are not supported"),
        ((hire.Head(predictor=hire.Cascade(hire.LowRank(8), hire.Quantized(), 500)),), "Cascade"),
        ((hire.FFN(k=0.25, common=0.1),), "8 parts are not supported with common neurons"),
    ],
)
def test_what_cannot_be_spread_stays_dense(settings, reason):
    layout = LAYOUTS["tensor"]
    params, token = layout.put(weights()), layout.token()
    run = hire.transform(step, *settings)
    plan = run.plan(params, token)
    kind = "head" if isinstance(settings[0], hire.Head) else "ffn"
    (site,) = (site for site in plan.sites if site.kind == kind)
    assert site.status == "dense"
    assert reason in site.reason
    np.testing.assert_allclose(
        run(run.pack(params, token), token), step(weights(), TOKEN), atol=1e-5
    )


def test_parts_that_do_not_fit():
    layout = LAYOUTS["tensor"]
    run = hire.transform(step, hire.FFN(k=0.25, parts=3))
    with pytest.raises(hire.HireRewriteError, match="8 devices"):
        run.plan(layout.put(weights()), layout.token())
    with pytest.raises(hire.HireRewriteError, match="parts=3"):
        run.plan(weights(), TOKEN)
    with pytest.raises(hire.HireRewriteError, match="parts=0"):
        hire.FFN(k=0.25, parts=0)


def test_it_is_measured_as_on_one_device():
    layout = LAYOUTS["data and tensor"]
    params, token = layout.put(weights()), layout.token()
    run = hire.transform(step, *rules(hire.LowRank(48)))
    report = run.evaluate(run.pack(params, token, calibration=batches()), batches())
    one = hire.transform(step, *rules(hire.LowRank(48), layout.parts))
    wanted = one.evaluate(one.pack(weights(), TOKEN, calibration=batches()), batches())
    mine, theirs = (next(site for site in r.sites if site.kind == "ffn") for r in (report, wanted))
    assert mine.recall == pytest.approx(theirs.recall, abs=0.01)
    assert mine.error == pytest.approx(theirs.error, abs=0.01)


def test_a_loop_of_steps():
    """Greedy decoding under one scan, with the packed weights as arguments."""
    _, token, packed = packed_on("data and tensor")
    run = hire.transform(step, *rules())
    one = hire.transform(step, *rules(parts=4))

    def decode(step, packed, token):
        def body(token, _):
            token = step(packed, token).argmax(-1).astype(jnp.int32)
            return token, token

        return lax.scan(body, token, length=6)[1]

    mine = jax.jit(functools.partial(decode, run))(packed, token)
    theirs = jax.jit(functools.partial(decode, one))(one.pack(weights(), TOKEN), TOKEN)
    np.testing.assert_array_equal(mine, theirs)


def sampled(params, token):
    """The ten most probable tokens, and the first of them."""
    probability = jax.nn.softmax(step(params, token) / 0.7, axis=-1)
    values, indices = lax.top_k(probability, 10)
    return values, indices, jnp.argmax(probability, axis=-1), lax.approx_max_k(probability, 3)[1]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["tensor", "data and tensor", "stored in shards"])
@pytest.mark.parametrize("target", [1.0, 0.9])
def test_searches_for_the_greatest_gather_no_logits(name, target):
    layout = LAYOUTS[name]
    params, token = layout.put(weights()), layout.token()
    rule = dataclasses.replace(rules()[1], recall_target=target)
    run = hire.transform(sampled, rule)
    packed = run.pack(params, token)
    compiled = jax.jit(run).lower(packed, token).compile()
    found = collectives(compiled.as_text())
    assert max(one.bytes for one in found) <= 8 * 8 * TOKENS * 64, found
    one = hire.transform(sampled, rules()[1])
    wanted = one(one.pack(weights(), TOKEN), TOKEN)
    values, indices, best, few = compiled(packed, token)
    assert indices.dtype == wanted[1].dtype
    np.testing.assert_array_equal(best, wanted[2])
    np.testing.assert_array_equal(best, indices[:, 0])
    np.testing.assert_array_equal(few[:, 0], best)
    if target == 1.0:
        np.testing.assert_array_equal(indices, wanted[1])
        np.testing.assert_allclose(values, wanted[0], rtol=2e-3)  # of other guesses
        np.testing.assert_array_equal(few, wanted[3])
    else:
        pairs = zip(np.asarray(indices), np.asarray(wanted[1]), strict=True)
        assert min(len(set(a) & set(b)) for a, b in pairs) >= 9


def test_a_smaller_recall_target_takes_fewer_candidates():
    layout = LAYOUTS["tensor"]
    rows = []
    for target in (1.0, 0.99, 0.5):
        rule = dataclasses.replace(rules(Oracle())[1], recall_target=target)
        plan = hire.transform(step, rule).plan(layout.put(weights()), TOKEN[:1])
        rows.append(plan.sites[0].bytes_after // (4 * D))
    assert rows[0] == 64  # on each device as many as on one
    assert rows[0] > rows[1] >= rows[2]


def test_a_mesh_for_weights_that_lie_on_one_device():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    run = hire.transform(step, *rules(), mesh=mesh)
    one = hire.transform(step, *rules(parts=8))
    packed = run.pack(weights(), TOKEN)
    assert packed.sites["params/head"].rows.sharding.spec == P(None, ("a", "b"))
    assert packed.weights["params/embed"].sharding.is_fully_replicated
    mine, theirs = run(packed, TOKEN), one(one.pack(weights(), TOKEN), TOKEN)
    np.testing.assert_array_equal(mine.argmax(-1), theirs.argmax(-1))
    with pytest.raises(hire.HireRewriteError, match="mesh='x'"):
        hire.transform(step, mesh="x")


def typed_step(params, token):
    """`step`, for arrays whose types say how they are spread."""

    def layer(x, w):
        h = jax.nn.relu(x @ w["gate"]) * (x @ w["up"] + w["bias"])
        return x + jnp.einsum("tf,fd->td", h, w["down"], out_sharding=P("data", None)), None

    x = params["embed"].at[token].get(out_sharding=P("data", None))
    x, _ = lax.scan(layer, x, params["layers"])
    return x @ params["head"]


@pytest.mark.parametrize("mode", ["hire", "exact"])
def test_explicit_sharding(mode):
    kinds = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=kinds)
    layout = LAYOUTS["data and tensor"]
    with jax.set_mesh(mesh):
        params, token = (
            jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, a.sharding.spec)), tree)
            for tree in (layout.put(weights()), layout.token())
        )
        run = hire.transform(typed_step, *rules(), mode=mode)
        assert [site.status for site in run.plan(params, token).sites] == ["rewritten"] * 2
        packed = hire.transform(typed_step, *rules()).pack(params, token)
        assert packed.sites["params/head"].rows.sharding.spec == P(None, "model")
        logits = jax.jit(run)(packed, token)
        assert logits.sharding.spec == P("data", "model")
        text = jax.jit(run).lower(packed, token).compile().as_text()
    implicit = hire.transform(step, *rules(), mode=mode)
    _, token, packed = packed_on("data and tensor")
    wanted = jax.jit(implicit)(packed, token)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    if mode == "hire":
        assert max(one.bytes for one in collectives(text)) < D * WIDTH * 4 // 16


def capped_step(run):
    """A step with code behind its logits."""
    return lambda params, token: jnp.tanh(run(params, token) / 3 + 0.25) * jnp.float32(3)


@pytest.mark.long
def test_explicit_sharding_of_raw_weights():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    layout = LAYOUTS["data and tensor"]
    chosen = rules(hire.LowRank(48))
    implicit = hire.transform(capped_step(step), *chosen)
    calibrated = implicit.pack(layout.put(weights()), layout.token(), calibration=batches())
    plain = hire.transform(capped_step(step), *chosen, mode="exact")
    with jax.set_mesh(mesh):
        params, token = (
            jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, a.sharding.spec)), tree)
            for tree in (layout.put(weights()), layout.token())
        )
        shown = [
            (jax.device_put(tokens, NamedSharding(mesh, P("data"))),) for (tokens,) in batches()
        ]
        exact = hire.transform(capped_step(typed_step), *chosen, mode="exact")(params, token)
        run = hire.transform(capped_step(typed_step), *chosen)
        assert [site.status for site in run.plan(params, token).sites] == ["rewritten"] * 2
        packed = run.pack(params, token, calibration=shown)
        logits = jax.jit(run)(packed, token)
        assert len(run.evaluate(packed, shown).sites) == 2
        assert "hire_ffn" in str(run.diff(params, token))
        with pytest.raises(hire.HireRewriteError, match="outer trace"):
            jax.jit(run)(params, token)
        assert exact.sharding.spec == logits.sharding.spec == P("data", "model")
    wanted = plain(layout.put(weights()), layout.token())
    np.testing.assert_allclose(exact, wanted, atol=1e-5)
    wanted = jax.jit(implicit)(calibrated, layout.token())
    with pytest.warns(UserWarning, match="without calibration"):
        plain = jax.jit(implicit)(implicit.pack(layout.put(weights()), TOKEN), layout.token())
    off = np.abs(np.asarray(logits) - np.asarray(wanted)).mean()
    assert off < 0.01 * np.abs(plain - wanted).mean()


def test_what_cannot_be_spread_over_a_given_mesh_is_not():
    mesh = Mesh(np.array(jax.devices()), ("a",))
    head = hire.Head(k=16, candidates=64, certify=True, force=True)
    run = hire.transform(step, head, hire.FFN(k=0.25, force=True), mesh=mesh)
    plan = run.plan(weights(), TOKEN)
    assert [site.status for site in plan.sites] == ["rewritten"] * 2
    assert ["sharded over a=8" in site.reason for site in plan.sites] == [False, True]
    logits = jax.jit(run)(run.pack(weights(), TOKEN), TOKEN)
    one = hire.transform(step, head, hire.FFN(k=0.25, parts=8, force=True))
    wanted = one(one.pack(weights(), TOKEN), TOKEN)
    np.testing.assert_array_equal(logits.argmax(-1), wanted.argmax(-1))


def test_arrays_that_are_closed_over_are_spread_too():
    params, token, packed = packed_on("tensor")
    run = hire.transform(lambda token: step(params, token), *rules(), weights=())
    assert all("sharded over model=8" in site.reason for site in run.plan(token).sites)
    run.pack(token)
    by_argument = jax.jit(hire.transform(step, *rules()))(packed, token)
    np.testing.assert_allclose(run(token), by_argument, atol=1e-5)


def test_another_mesh_in_use():
    _, token, packed = packed_on("tensor")
    run = hire.transform(step, *rules())
    other = jax.make_mesh((8,), ("other",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(other), pytest.raises(hire.HireRewriteError, match="mesh in use"):
        run(packed, token)


def test_shapes_with_calibration_or_beside_arrays():
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weights())
    run = hire.transform(step, *rules())
    assert "MB" in repr(run.pack(shapes, TOKEN))
    with pytest.raises(hire.HireRewriteError, match="calibration"):
        run.pack(shapes, TOKEN, calibration=batches())
    with pytest.raises(hire.HireRewriteError, match="arrays"):
        run.pack(shapes | {"head": weights()["head"]}, TOKEN)


def test_a_last_device_with_too_few_rows():
    layout = LAYOUTS["stored in shards"]
    run = hire.transform(step, hire.Head(k=500, candidates=513, force=True))
    site = run.plan(layout.put(weights(4097)), layout.token()).sites[0]
    assert site.status == "dense"
    assert "506" in site.reason


def test_k_is_not_rounded_up_to_whole_groups_of_all_devices():
    layout = LAYOUTS["tensor"]
    run = hire.transform(step, hire.FFN(k=32, candidates=96, predictor=Oracle(), force=True))
    (site,) = (s for s in run.plan(layout.put(weights()), TOKEN[:1]).sites if s.kind == "ffn")
    assert site.bytes_after == LAYERS * (2 * 96 + 32) // 8 * D * 4
