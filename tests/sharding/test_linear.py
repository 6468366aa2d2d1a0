"""Linear layers whose weights are sharded over a mesh, or lie in a `shard_map` of the function."""

import dataclasses
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
from hire_rewrite import Blocks, Float, Linear

LAYERS, D, H, V, TOKENS = 2, 128, 256, 160, 4
FLOAT = Linear(encoding=Float("float32"), force=True)


def step(params, token):
    """Layers of three products without biases, under a scan, and logits of a tied embedding."""

    def layer(x, w):
        h = jnp.tanh(x @ w["q"]) + jnp.tanh(x @ w["k"])
        return x + jnp.tanh(jnp.einsum("th,hd->td", h, w["o"])), None

    x, _ = lax.scan(layer, params["embed"][token], params["layers"])
    return x @ params["embed"].T


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def on_grid(*shape, seed=0):
    """Numbers of 4 bits in blocks along the inputs, few of which use all of the grid."""
    rng = np.random.default_rng([seed, *shape])
    *layers, n, d = shape
    integers = rng.integers(1, 14, (*layers, n, d // 32, 32)).astype(np.float32)
    scale = rng.uniform(0.2, 0.4, (*layers, n, d // 32, 1)).astype(np.float16)
    numbers = integers * scale.astype(np.float32) - 8 * scale.astype(np.float32)
    return numbers.astype(np.float32).reshape(shape)


@functools.cache
def weights(make=normal):
    layers = {
        "q": np.swapaxes(make(LAYERS, H, D), 1, 2) / 16,
        "k": np.swapaxes(make(LAYERS, H, D, seed=1), 1, 2) / 16,
        "o": np.swapaxes(make(LAYERS, D, H), 1, 2) / 16,
    }
    return {"embed": make(V, D), "layers": layers}


TOKEN = np.arange(TOKENS, dtype=np.int32) * 7


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and which of its axes inputs, heads, rows of the vocabulary and tokens are on."""

    mesh: dict
    d: str | None = None
    h: str | None = None
    v: str | None = None
    tokens: str | None = None
    shards: int = 8

    def specs(self):
        into = P(None, self.d, self.h)
        layers = {"q": into, "k": into, "o": P(None, self.h, self.d)}
        return {"embed": P(self.v, self.d), "layers": layers}

    def meshed(self, **settings):
        count = int(np.prod(list(self.mesh.values())))
        devices = np.array(jax.devices()[:count]).reshape(tuple(self.mesh.values()))
        return Mesh(devices, tuple(self.mesh), **settings)

    def put(self, params, mesh=None):
        mesh = mesh or self.meshed()
        return jax.tree.map(
            lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), params, self.specs()
        )


LAYOUTS = {
    "tensor": Layout({"data": 2, "model": 4}, h="model", v="model", tokens="data", shards=4),
    "stored in shards": Layout({"data": 4}, d="data", tokens="data", shards=4),
    "both": Layout({"data": 2, "model": 4}, d="data", h="model", v="model"),
}
MANUAL = Layout({"data": 2, "model": 4}, h="model", tokens="data", shards=4)


def alone(rule, params, token=TOKEN, **settings):
    run = hire.transform(step, rule, **settings)
    return run(run.pack(params, token), token)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("encoding", [Float("float32"), Blocks(8), Blocks(4)], ids=str)
def test_it_computes_what_one_device_does(name, encoding):
    layout, rule = LAYOUTS[name], Linear(encoding=encoding, force=True)
    params, run = layout.put(weights()), hire.transform(step, rule)
    assert [s.status for s in run.plan(params, TOKEN).sites if s.kind == "linear"] == [
        "rewritten"
    ] * 4
    packed = run.pack(params, TOKEN)
    token = jax.device_put(TOKEN, NamedSharding(layout.meshed(), P(layout.tokens)))
    compiled = jax.jit(run).lower(packed, token).compile()
    got = compiled(packed, token)
    np.testing.assert_allclose(got, alone(rule, weights()), atol=2e-4)
    dense = np.abs(got - step(weights(), TOKEN)).max()
    assert dense < 2e-4 if encoding == Float("float32") else dense > 1e-2
    # Each device has its own part, and nothing of the size of one goes between them.
    for leaf in jax.tree.leaves(packed.sites):
        assert leaf.addressable_shards[0].data.nbytes == leaf.nbytes // layout.shards
    sent = collectives(compiled.as_text())
    assert sent
    assert max(one.bytes for one in sent) <= 2 * 4 * TOKENS * H, sent


def test_all_inputs_exactly_is_the_model():
    layout, rule = LAYOUTS["both"], Linear(k=1.0, encoding=Blocks(4), force=True)
    got = alone(rule, layout.put(weights()))
    np.testing.assert_allclose(got, step(weights(), TOKEN), atol=2e-4)


def test_each_device_takes_its_share_of_the_greatest_inputs():
    def product(w, x):
        return x @ w

    w, x = normal(D, H), normal(TOKENS, D)
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))
    run = hire.transform(product, Linear(k=8, encoding=Blocks(4), force=True))
    packed = run.pack(jax.device_put(w, NamedSharding(mesh, P("model"))), x)
    own = hire.transform(product, Linear(k=2, encoding=Blocks(4), force=True))
    parts = zip(np.split(w, 4), np.split(x, 4, axis=1), strict=True)
    want = sum(np.asarray(own(own.pack(w, x), x)) for w, x in parts)
    np.testing.assert_allclose(run(packed, x), want, atol=1e-4)
    assert np.abs(want - x @ w).max() > 1e-2


@pytest.mark.parametrize("rules", [[Linear(encoding=Blocks(8), force=True)], []], ids=str)
def test_rows_stay_whole_where_blocks_do_not_fit_a_part(rules):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    w, x = on_grid(64, 96).T, normal(TOKENS, 96)  # 12 inputs on each device
    there = jax.device_put(w, NamedSharding(mesh, P("data")))
    run = hire.transform(lambda w, x: x @ w, *rules)
    packed = run.pack(there, x)
    (state,) = packed.sites.values()
    assert state.rows["integers"].shape == (8, 8, 96 if rules else 48)
    want = run(run.pack(w, x), x)
    np.testing.assert_allclose(run(packed, x), want, atol=1e-4)


@pytest.mark.parametrize("rules", [[Linear(encoding=Blocks(8), force=True)], []], ids=str)
def test_outputs_that_devices_do_not_divide(rules):
    mesh = Mesh(np.array(jax.devices()), ("a",))
    w, x = on_grid(60, 96).T, normal(TOKENS, 96)
    run = hire.transform(lambda w, x: x @ w, *rules, mesh=mesh)  # on all devices then
    np.testing.assert_allclose(run(run.pack(w, x), x), x @ w, atol=0.1 if rules else 1e-4)
    apart = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    there = jax.device_put(on_grid(66, 64).T, NamedSharding(apart, P("a", "b")))
    run = hire.transform(lambda w, x: x @ w, Linear(encoding=Blocks(8, 64), force=True))
    (site,) = run.plan(there, normal(TOKENS, 64)).sites  # 32 of 64 inputs, 33 of 66 outputs
    assert site.status == "dense"
    assert "66 outputs" in site.reason


@pytest.mark.parametrize("name", ["tensor", "both"])
def test_without_rules_nothing_is_lost(name):
    params = weights(on_grid)
    step_, there = hire.transform(step), LAYOUTS[name].put(params)
    packed = step_.pack(there, TOKEN)
    assert set(packed.weights) == set()  # the lookups of the embedding too
    sites = step_.plan(packed, TOKEN).sites
    assert [site.status for site in sites if site.kind == "linear"] == ["rewritten"] * 4
    assert sum(a.nbytes for a in jax.tree.leaves(packed)) < 0.2 * sum(
        a.nbytes for a in jax.tree.leaves(params)
    )
    want = step(params, TOKEN)
    for mode in ("hire", "exact", "dense"):
        run = hire.transform(step, mode=mode)
        np.testing.assert_allclose(jax.jit(run)(packed, TOKEN), want, rtol=1e-4, atol=1e-4)
    ends = np.array([-1, V - 1, 0, -V], np.int32)
    np.testing.assert_allclose(step_(packed, ends), step(params, ends), rtol=1e-4, atol=1e-4)


def test_shapes_lie_as_arrays_do():
    layout, rule = LAYOUTS["both"], Linear(k=0.1, encoding=Blocks(8), force=True)
    params, run = layout.put(weights()), hire.transform(step, rule)
    packed = run.pack(params, TOKEN)
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), params
    )
    ahead = run.pack(shapes, TOKEN)
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype, a.sharding.is_equivalent_to(b.sharding, a.ndim)),
        packed.sites,
        ahead.sites,
    )
    assert jax.tree.all(jax.tree.map(lambda x: x is not False, same))
    compiled = jax.jit(run).lower(ahead, TOKEN).compile()
    np.testing.assert_array_equal(compiled(packed, TOKEN), jax.jit(run)(packed, TOKEN))


def test_it_is_measured_as_on_one_device():
    rule, batches = Linear(encoding=Blocks(4), force=True), [(TOKEN,), (TOKEN + 1,)]
    run, params = hire.transform(step, rule), weights()
    there = LAYOUTS["both"].put(params)
    mine, theirs = (
        run.evaluate(run.pack(w, TOKEN), batches, weights=w).sites for w in (there, params)
    )
    for one, other in zip(mine, theirs, strict=True):
        assert (one.name, one.tokens) == (other.name, other.tokens)
        assert one.error == pytest.approx(other.error, rel=1e-3)
        assert one.error > 1e-2


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", LAYOUTS)
def test_many_tokens_are_measured_as_each_alone(name):
    """Though together they ask for all inputs of every device."""
    params = weights()
    rule = Linear(0.02, encoding=Blocks(4), exact=Blocks(8), round_inputs=True, force=True)
    run, there = hire.transform(step, rule), LAYOUTS[name].put(params)
    packed, tokens = run.pack(there, TOKEN), np.arange(64, dtype=np.int32)
    together = run.evaluate(packed, [(tokens,)], weights=there).sites
    apart = run.evaluate(packed, [(tokens[i : i + 1],) for i in range(64)], weights=there).sites
    for one, other in zip(together, apart, strict=True):
        assert one.error == pytest.approx(other.error, rel=1e-3)
        assert one.error > 1e-2


def test_explicit_sharding():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    rule = Linear(encoding=Blocks(8), force=True)

    def product(w, x):
        h = jnp.tanh(x @ w["q"])
        return jnp.einsum("th,hd->td", h, w["o"], out_sharding=P("data", None))

    params = {"q": normal(D, H), "o": normal(H, D)}
    x = normal(TOKENS, D)
    one = hire.transform(lambda w, x: jnp.tanh(x @ w["q"]) @ w["o"], rule)
    want = one(one.pack(params, x), x)
    with jax.set_mesh(mesh):
        specs = {"q": P(None, "model"), "o": P("model", None)}
        there = jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), params, specs)
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        run = hire.transform(product, rule)
        packed = run.pack(there, x)
        for leaf in jax.tree.leaves(packed.sites):
            assert leaf.addressable_shards[0].data.nbytes == leaf.nbytes // 4
        got = jax.jit(run)(packed, x)
        assert got.sharding.spec == P("data", None)
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_a_mesh_for_weights_that_lie_on_one_device():
    mesh = Mesh(np.array(jax.devices()), ("a",))
    run = hire.transform(step, Linear(encoding=Blocks(8), force=True), mesh=mesh)
    packed = run.pack(weights(), TOKEN)
    for leaf in jax.tree.leaves(packed.sites):
        assert leaf.addressable_shards[0].data.nbytes == leaf.nbytes // 8
    want = alone(Linear(encoding=Blocks(8), force=True), weights())
    np.testing.assert_allclose(run(packed, TOKEN), want, atol=2e-4)


def manual(layout, check_vma):
    """`step` with a `shard_map` of its own, whose sums it writes out."""

    def body(params, token):
        def layer(x, w):
            h = jnp.tanh(x @ w["q"]) + jnp.tanh(x @ w["k"])
            return x + jnp.tanh(lax.psum(h @ w["o"], "model")), None

        x, _ = lax.scan(layer, params["rows"][token], params["layers"])
        return x @ params["head"].T

    layers = layout.specs()["layers"]
    specs = {"rows": P(), "head": P("model"), "layers": layers}
    mapped = jax.shard_map(
        body,
        mesh=layout.meshed(),
        in_specs=(specs, P("data")),
        out_specs=P("data", "model"),
        check_vma=check_vma,
    )

    def run(params, token):
        params = {"rows": params["embed"], "head": params["embed"], "layers": params["layers"]}
        return mapped(params, token)

    return run


@pytest.mark.sampled(2)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("rule", [FLOAT, Linear(encoding=Blocks(4), force=True), Linear()], ids=str)
def test_in_a_shard_map_of_the_function(rule, check_vma):
    layout, params = MANUAL, weights(on_grid if rule == Linear() else normal)
    run, there = hire.transform(manual(layout, check_vma), rule), layout.put(params)
    packed = run.pack(there, TOKEN)
    sites = [site for site in run.plan(packed, TOKEN).sites if site.kind == "linear"]
    assert [site.status for site in sites] == ["rewritten"] * 4
    compiled = jax.jit(run).lower(packed, TOKEN).compile()
    got = compiled(packed, TOKEN)
    np.testing.assert_allclose(got, alone(rule, params), atol=2e-4)
    for leaf in jax.tree.leaves(packed.sites):
        assert leaf.addressable_shards[0].data.nbytes == leaf.nbytes // 4
    assert max(one.bytes for one in collectives(compiled.as_text())) <= 4 * TOKENS * D
    assert "hire_linears" in str(run.diff(packed, TOKEN))  # q and k in one call
    if rule == Linear():  # to the last bit of what is stored
        np.testing.assert_allclose(got, step(params, TOKEN), rtol=1e-4, atol=1e-4)


def test_a_shard_map_is_measured_by_device():
    layout, rule = MANUAL, Linear(encoding=Blocks(4), force=True)
    run, there = hire.transform(manual(layout, True), rule), layout.put(weights())
    sites = run.evaluate(run.pack(there, TOKEN), [(TOKEN,)], weights=there).sites
    assert len(sites) == 4
    assert all(0.01 < site.error < 0.3 for site in sites)


def test_weights_cut_by_the_number_of_the_device():
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))

    def own(w, x):
        start = lax.axis_index("model") * (H // 4)
        return x @ lax.dynamic_slice_in_dim(w, start, H // 4, 1)

    fn = jax.shard_map(own, mesh=mesh, in_specs=(P(), P()), out_specs=P(None, "model"))
    w, x = on_grid(H, D).T, normal(TOKENS, D)
    run = hire.transform(fn)
    packed = run.pack(w, x)
    assert [site.status for site in run.plan(packed, x).sites] == ["rewritten"]
    np.testing.assert_allclose(run(packed, x), x @ w, atol=1e-4)


def test_experts_over_a_mesh_stay_dense_and_in_a_shard_map_do_not():
    mesh, rule = LAYOUTS["tensor"].meshed(), Linear(encoding=Blocks(8), force=True)
    w, x = normal(8, D, H), normal(8, TOKENS, D)

    def mixture(w, x):
        return jnp.einsum("etd,edh->eth", x, w)

    spec = P("model", None, "data")
    there, run = jax.device_put(w, NamedSharding(mesh, spec)), hire.transform(mixture, rule)
    (site,) = run.plan(there, x).sites
    assert site.status == "dense"
    assert "experts are sharded over data=2 × model=4" in site.reason
    np.testing.assert_allclose(run(there, x), mixture(w, x), atol=1e-3)
    each = jax.shard_map(mixture, mesh=mesh, in_specs=(spec, P("model")), out_specs=spec)
    own = hire.transform(each, rule)
    packed = own.pack(there, x)
    for leaf in jax.tree.leaves(packed.sites):
        assert leaf.addressable_shards[0].data.nbytes == leaf.nbytes // 8
    np.testing.assert_allclose(own(packed, x), run(run.pack(w, x), x), atol=1e-3)
