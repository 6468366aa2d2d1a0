"""Counters beside the result: what was read, in every form that a function has."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hire_rewrite as hire
from hire_rewrite import HireRewriteError
from tests.cases import FEW, Oracle, close, packed, run
from tests.cases_ffn import FFN_CASES
from tests.cases_head import HEAD_CASES
from tests.sharding import test_manual as manual
from tests.sharding.test_rows import LAYERS, TOKEN, weights
from tests.sharding.test_rows import step as model

QUANTIZED = hire.Quantized()
FFN = hire.FFN(k=0.25, candidates=0.5, force=True, predictor=QUANTIZED)
HEAD = hire.Head(k=16, candidates=64, min_width=1024, force=True)
PROVED = hire.Head(k=16, candidates=64, min_width=1024, force=True, certify=True)
D, F = 16, 64
KINDS = ["calls", "tokens", "read", "whole", "whole_tokens", "proved"]


def both(fn, *rules, **settings):
    made = functools.partial(hire.transform, fn, *rules, on_miss="ignore", **settings)
    return made(), made(telemetry=True)


@functools.cache
def held_by(*rules):
    """The weights of `model`, packed once for all tests."""
    return hire.transform(model, *rules).pack(weights(), TOKEN)


def numbers(telemetry, name):
    return {kind: getattr(telemetry[name], kind).tolist() for kind in KINDS}


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                yield from equations(getattr(inner, "jaxpr", inner))


CASES = {case.name: case for case in [*FFN_CASES, *HEAD_CASES]}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["while_loop", "cond", "nested scan", "layers of experts"])
def test_the_result_is_the_same_beside_counters(name):
    case = CASES[name]
    off, on = both(case.fn, *FEW)
    weights = packed(off, case.params, *case.args)
    got, telemetry = run(on, weights, *case.args)
    close(got, run(off, weights, *case.args), 0)
    rewritten = {site.name for site in off.plan(weights, *case.args).rewritten}
    assert {site.name for site in telemetry.sites} == rewritten != set()
    for name, usage in telemetry.summary().items():
        assert usage.calls > 0, name
        assert usage.tokens > 0


def test_without_telemetry_nothing_is_counted():
    off, on = both(model, FFN, PROVED)
    held = held_by(FFN, PROVED)
    jaxprs = [jax.make_jaxpr(step)(held, TOKEN) for step in (off, on)]
    counted = [
        [v for eqn in equations(jaxpr.jaxpr) for v in eqn.outvars if v.aval.shape == (8,)]
        for jaxpr in jaxprs
    ]
    assert not counted[0]
    assert counted[1]
    assert len(jaxprs[0].out_avals) + 1 == len(jaxprs[1].out_avals)
    explicit = hire.transform(model, FFN, PROVED, telemetry=False)
    assert str(jax.make_jaxpr(explicit)(held, TOKEN)) == str(jaxprs[0])


def test_what_is_counted_is_what_is_read():
    """Layers of a scan by themselves; the figures of sites that choose for each token and of those
    that choose for all."""
    tokens = TOKEN[:2]
    _, on = both(model, FFN, PROVED)
    held = held_by(FFN, PROVED)
    _, telemetry = on(held, tokens)
    head, layers = telemetry["head"], telemetry["layers"]
    assert head.calls.tolist() == [1]
    assert head.tokens.tolist() == [2]
    assert head.read.tolist() == [2 * 64]
    assert head.proved.tolist() == [2]
    assert layers.calls.tolist() == [1] * LAYERS
    (site,) = [site for site in telemetry.sites if site.kind == "ffn"]
    assert layers.whole.tolist() == [1] * LAYERS  # two tokens may ask for all groups
    assert layers.whole_tokens.tolist() == [2] * LAYERS
    _, alone = on(held, tokens[:1])
    assert alone["layers"].read.tolist() == [site.units // 2] * LAYERS
    assert alone["layers"].whole.tolist() == [0] * LAYERS


def block(p, x):
    return jax.nn.relu(x @ p["up"] + p["b"]) @ p["down"]


def block_weights(share):
    rng = np.random.default_rng(0)
    p = {"up": rng.normal(size=(D, F)) / 4, "down": rng.normal(size=(F, D))}
    p["b"] = np.full(F, -np.quantile(rng.normal(size=9999), 1 - share))
    return jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), p)


def test_neurons_that_are_not_zero_are_counted():
    p, x = block_weights(0.2), jax.random.normal(jax.random.key(0), (5, D))
    _, on = both(block, hire.FFN(k="positive", force=True, max_tokens=None, budget=F))
    _, telemetry = on(on.pack(p, x), x)
    active = int((jax.nn.relu(x @ p["up"] + p["b"]) != 0).sum())
    (name,) = telemetry.summary()
    assert numbers(telemetry, name)["read"] == [active]
    assert telemetry.summary()[name].read == pytest.approx(active / (5 * F))


def test_calls_that_ask_for_too_much_are_counted_as_whole():
    p, x = block_weights(0.5), jax.random.normal(jax.random.key(0), (3, D))
    few = hire.FFN(k="positive", force=True, max_tokens=None, budget=4)
    _, on = both(block, few)
    _, telemetry = on(on.pack(p, x), x)
    (usage,) = telemetry.summary().values()
    assert (usage.calls, usage.tokens, usage.read, usage.whole) == (1, 3, 1.0, 1.0)
    together = hire.FFN(k=8, candidates=16, group=1, force=True, max_tokens=None, budget=17)
    _, on = both(block, together)
    held = on.pack(p, x)
    (usage,) = on(held, x)[1].summary().values()
    assert usage.whole == 1.0
    (usage,) = on(held, x[:1])[1].summary().values()
    assert (usage.whole, usage.read) == (0.0, 16 / F)
    twins = jnp.concatenate([x[:1], x[:1]])  # which ask for the same
    (usage,) = on(held, twins)[1].summary().values()
    assert (usage.whole, usage.read) == (0.0, 16 / F)


def test_calls_with_more_tokens_than_the_rule_takes_are_whole():
    p, x = block_weights(0.5), jax.random.normal(jax.random.key(0), (9, D))
    _, on = both(block, hire.FFN(k=8, candidates=16, group=1, force=True, max_tokens=8))
    held = on.pack(p, x[:1])
    total = on(held, x[:1])[1] + on(held, x)[1]
    (usage,) = total.summary().values()
    assert (usage.calls, usage.tokens, usage.whole) == (2, 10, 0.5)


def test_a_failed_proof_is_counted():
    def logits(params, x):
        return x @ params.T

    same = jnp.ones((2048, D)).at[0].mul(2)
    _, on = both(logits, hire.Head(k=8, candidates=24, certify=True, force=True, min_width=100))
    x = jnp.stack([jnp.ones(D), -jnp.ones(D)])  # the second has 2047 greatest logits
    held = on.pack(same, x)
    (usage,) = on(held, x)[1].summary().values()
    assert (usage.whole, usage.proved) == (1.0, 0.5)
    (usage,) = on(held, x[:1])[1].summary().values()
    assert (usage.whole, usage.proved) == (0.0, 1.0)


def test_sums_on_the_device_and_on_the_host():
    _, on = both(model, FFN, HEAD)
    held = held_by(FFN, HEAD)
    _, once = on(held, TOKEN)

    @jax.jit
    def add(held, token, total):
        return jax.tree.map(jnp.add, total, on(held, token)[1])

    total = add(held, TOKEN, add(held, TOKEN, once))
    np.testing.assert_array_equal(total.counts, 3 * once.counts)
    np.testing.assert_array_equal(sum([once, once, once]).counts, total.counts)

    def many(held, token):
        zero = jax.tree.map(jnp.zeros_like, on(held, token)[1])
        return lax.scan(lambda t, _: (t + on(held, token)[1], None), zero, length=3)[0]

    np.testing.assert_array_equal(jax.jit(many)(held, TOKEN).counts, total.counts)
    host = total.on_host()
    assert host.counts.dtype == np.int64
    many = hire.Telemetry(host.counts + 2**40, host.sites)
    for added in (many + total, total + many):
        assert (added.counts == 2**40 + 2 * host.counts).all()
    with pytest.raises(hire.HireRewriteError, match="outside of jit"):
        jax.jit(lambda one: many + one)(total)
    assert (host + host)["head"].calls.tolist() == [6]
    assert str(host).count("\n") == len(host.sites)


def test_sums_over_functions_of_other_sites():
    def head_alone(params, x):
        return x @ params["head"]

    _, on = both(model, FFN, HEAD)
    held = held_by(FFN, HEAD)
    other = hire.transform(head_alone, HEAD, telemetry=True)
    _, a = on(held, TOKEN)
    _, b = other(other.pack(weights(), jnp.ones((4, 64))), jnp.ones((4, 64)))
    assert (a + b)["head"].calls.tolist() == [2]
    assert (b + a)["layers"].calls.tolist() == [1] * LAYERS
    lone = hire.transform(head_alone, PROVED, telemetry=True)
    _, c = lone(lone.pack(weights(), jnp.ones((4, 64))), jnp.ones((4, 64)))
    with pytest.raises(HireRewriteError, match="differently"):
        b + c
    for index in (0, None):
        with pytest.raises(HireRewriteError, match="name of a site"):
            a[index]
    with pytest.raises(HireRewriteError, match="layers"):
        a["nothing"]


def test_mapped_calls():
    _, on = both(model, FFN, PROVED)
    held = held_by(FFN, PROVED)
    _, telemetry = jax.vmap(on, (None, 0))(held, jnp.stack([TOKEN, TOKEN, TOKEN]))
    _, once = on(held, TOKEN)
    assert telemetry["head"].calls.tolist() == [3]
    assert telemetry["layers"].read.tolist() == (3 * once["layers"].read).tolist()


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_mapped_calls_along_another_axis_are_refused(axis):
    """Also where there are as many of them as rows, or as columns."""
    _, on = both(model, FFN, PROVED)
    held = held_by(FFN, PROVED)
    (rows, columns) = on(held, TOKEN)[1].counts.shape
    for calls in (rows, 2 * rows, columns, rows * columns):
        tokens = jnp.stack([TOKEN] * calls)
        step = jax.vmap(on, (None, 0), out_axes=(0, axis))
        _, telemetry = step(held, tokens)
        _, moved = on(held, TOKEN)
        for sums in (telemetry, telemetry + telemetry):
            with pytest.raises(HireRewriteError, match="out_axes=0"):
                sums.on_host()
        with pytest.raises(HireRewriteError, match="out_axes=0"):
            (jax.tree.map(jnp.copy, telemetry) + moved).summary()


def test_mapped_calls_without_sites():
    on = hire.transform(lambda p, x: jnp.tanh(x * p), telemetry=True, on_miss="ignore")
    _, telemetry = jax.vmap(on, (None, 0))(jnp.ones(D), jnp.ones((3, 5, D)))
    assert telemetry.summary() == {}


def test_every_linear_layer_is_counted_once():
    """Those of one input run in one call, and each has its name."""

    def two(p, x):
        def layer(x, w):
            return jnp.tanh(x @ w["q"] + x @ w["k"]), None

        return lax.scan(layer, x, p)[0]

    p = {name: jax.random.normal(jax.random.key(i), (3, 64, 64)) for i, name in enumerate("qk")}
    x, rule = jnp.ones((1, 64)), hire.Linear(k=4, encoding=hire.Blocks(8), force=True)
    off, on = both(two, rule)
    held = on.pack(p, x)
    result, telemetry = on(held, x)
    np.testing.assert_array_equal(result, off(held, x))
    for name in ("/q", "/k"):
        assert numbers(telemetry, name)["calls"] == [1, 1, 1]
        assert numbers(telemetry, name)["read"] == [4, 4, 4]


def test_raw_weights_and_other_modes():
    w = weights()
    for mode in ("exact", "dense"):
        step = hire.transform(model, FFN, HEAD, mode=mode, telemetry=True, on_miss="ignore")
        _, telemetry = step(w, TOKEN)
        assert not telemetry.sites
        _, telemetry = step(held_by(FFN, HEAD), TOKEN)
        assert all(usage.whole == 1.0 for usage in telemetry.summary().values())
    for wrong in ("yes", 2, -0.5, 0):
        with pytest.raises(HireRewriteError, match="telemetry"):
            hire.transform(model, telemetry=wrong)


def test_methods_and_gradients():
    class Model:
        @hire.transform(HEAD, telemetry=True)
        def step(self, params, x):
            return x @ params

    params, x = weights()["head"], jnp.ones((1, 64))
    made = Model()
    held = made.step.pack(params, x)
    _, telemetry = made.step(held, x)
    assert next(iter(telemetry.summary().values())).tokens == 1
    p, x = block_weights(0.2), jax.random.normal(jax.random.key(0), (5, D))
    off, on = both(block, hire.FFN(k="positive", force=True, max_tokens=None))
    held = on.pack(p, x)
    got, _ = jax.grad(lambda x: (lambda y, t: (y.sum(), t))(*on(held, x)), has_aux=True)(x)
    np.testing.assert_allclose(got, jax.grad(lambda x: off(held, x).sum())(x), rtol=1e-6)


def drifting(noise):
    """A head whose predictor errs so much, and tokens."""
    rule = hire.Head(k=8, candidates=16, predictor=Oracle(noise), force=True, min_width=100)
    rows = jax.random.normal(jax.random.key(1), (512, D))
    return (lambda params, x: x @ params.T), rule, rows


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_recall_is_measured_in_a_share_of_runs(noise):
    fn, rule, rows = drifting(noise)
    steps = [hire.transform(fn, rule, telemetry=share) for share in (1.0, 0.25)]
    held = steps[0].pack(rows, jnp.ones((2, D)))
    xs = jax.random.normal(jax.random.key(2), (200, 2, D))
    (report,) = steps[0].evaluate(held, [(x,) for x in xs[:100]]).sites
    _, always = jax.jit(lambda xs: lax.map(lambda x: steps[0](held, x), xs))(xs[:100])
    always = always.on_host()
    (usage,) = always.summary().values()
    assert usage.recall == pytest.approx(report.recall[0], abs=1e-3)
    assert (usage.recall < 0.9) == (noise > 0)
    _, total = jax.jit(lambda xs: lax.map(lambda x: steps[1](held, x), xs))(xs)
    (name,) = total.summary()
    assert 20 <= total[name].sampled.sum() / 2 <= 90
    assert total[name].tokens.sum() == 400
    assert total.summary()[name].recall == pytest.approx(usage.recall, abs=0.1)


def test_recall_of_blocks_in_a_scan():
    on = hire.transform(model, FFN, HEAD, telemetry=1.0)
    held = held_by(FFN, HEAD)
    off = hire.transform(model, FFN, HEAD)
    result, telemetry = on(held, TOKEN[:1])
    np.testing.assert_array_equal(result, off(held, TOKEN[:1]))
    assert telemetry["layers"].sampled.tolist() == [1] * LAYERS
    report = off.evaluate(held, [(TOKEN[:1],)])
    for site in report.sites:
        recall = telemetry.summary()[site.name].recall
        assert recall == pytest.approx(np.mean(site.recall), abs=1e-3)


# On meshes


def mesh_of(axis_type=AxisType.Auto, **sizes):
    devices = np.array(jax.devices()[: int(np.prod(list(sizes.values())))])
    shape = tuple(sizes.values())
    return Mesh(devices.reshape(shape), tuple(sizes), axis_types=(axis_type,) * len(sizes))


def test_each_device_counts_its_rows():
    mesh = mesh_of(data=2, model=4)
    held = jax.tree.map(
        lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), weights(), manual.SPECS
    )
    off, on = both(model, FFN, HEAD)
    pack = on.pack(held, TOKEN)
    result, telemetry = on(pack, TOKEN)
    np.testing.assert_array_equal(result, off(pack, TOKEN))
    assert telemetry["layers"].calls.tolist() == [1] * (LAYERS * 8)
    assert telemetry["layers"].tokens.tolist() == [2] * (LAYERS * 8)
    summary = telemetry.summary()
    assert 0 < next(u.read for n, u in summary.items() if "layers" in n) <= 1
    assert telemetry["head"].read.sum() == 4 * 64 * 4  # tokens, candidates of each of 4 devices


@pytest.mark.parametrize("name", ["whole, data and model", "blocks"])
def test_a_functions_own_shard_map(name):
    form, mesh, check_vma = manual.FORMS[name]
    fn = form(mesh, check_vma)
    off, on = both(fn, FFN)
    held = off.pack(manual.laid_out(mesh), TOKEN)
    result, telemetry = jax.jit(on)(held, TOKEN)
    np.testing.assert_array_equal(result, jax.jit(off)(held, TOKEN))
    (site,) = telemetry.sites
    assert site.rows == LAYERS * 4
    assert set(telemetry[site.name].calls.tolist()) <= {1, 2}


def test_shardings_in_types():
    mesh = mesh_of(AxisType.Explicit, model=4)
    with jax.set_mesh(mesh):
        params = jax.device_put(weights()["head"], NamedSharding(mesh, P(None, "model")))
        x = jax.device_put(jnp.ones((2, 64)), NamedSharding(mesh, P()))
        off, on = both(lambda params, x: x @ params, HEAD)
        held = on.pack(params, x)
        result, telemetry = on(held, x)
        np.testing.assert_array_equal(result, off(held, x))
        assert next(iter(telemetry.summary().values())).tokens == 2


def test_where_no_site_is_counted():
    step = hire.transform(lambda p, x: jnp.sin(x) + p, telemetry=True, on_miss="ignore")
    rows = jnp.ones((3, 4))
    held = step.pack(rows[0], rows[0])
    _, one = step(held, rows[0])
    _, mapped = jax.vmap(step, (None, 0))(held, rows)
    for telemetry in (one, mapped, sum([one, one])):
        assert telemetry.summary() == {}
        assert str(telemetry) == "no site is counted"


def test_sums_of_mapped_and_other_calls():
    on = hire.transform(lambda p, x: x @ p, HEAD, telemetry=True)
    p, x = weights()["head"], jnp.ones((2, 64))
    held = on.pack(p, x)
    _, one = on(held, x)
    three, four = (jax.vmap(on, (None, 0))(held, jnp.stack([x] * n))[1] for n in (3, 4))
    name = one.sites[0].name
    for first, second, calls in ((three, one, 4), (one, three, 4), (three, four, 7)):
        assert (first + second)[name].calls == calls
        assert (first.on_host() + second)[name].calls == calls
        assert jax.jit(lambda a, b: a + b)(first, second)[name].calls == calls
    named = hire.transform(lambda p, x: x @ p["other"], HEAD, telemetry=True)
    _, other = jax.vmap(named, (None, 0))(named.pack({"other": p}, x), jnp.stack([x] * 3))
    assert {n: usage.calls for n, usage in (one + other).summary().items()} == {
        name: 1,
        other.sites[0].name: 3,
    }
    _, turned = jax.vmap(on, (None, 0), out_axes=-1)(held, jnp.stack([x] * 3))
    with pytest.raises(hire.HireRewriteError, match="mapped axes in front"):
        turned.summary()
    with pytest.raises(hire.HireRewriteError, match="of shapes"):
        jax.eval_shape(on, held, x)[1].summary()


def test_an_exported_function_returns_its_counts():
    on = hire.transform(lambda p, x: x @ p, HEAD, telemetry=True)
    p, x = weights()["head"], jnp.ones((2, 64))
    held = on.pack(p, x)
    exported = jax.export.export(jax.jit(lambda arrays, x: on(held.with_arrays(arrays), x)))
    with pytest.raises(HireRewriteError, match=r"telemetry\.counts"):
        exported(held.arrays, x).serialize()


def test_counters_of_devices_that_are_joined():
    on = hire.transform(lambda p, x: x @ p, HEAD, telemetry=True)
    p, x, mesh = weights()["head"], jnp.ones((8, 64)), mesh_of(AxisType.Auto, model=4)
    held = on.pack(p, x[:2])
    each = {"in_specs": (P(), P("model")), "out_specs": (P("model"), P("model"))}
    _, telemetry = jax.jit(jax.shard_map(on, mesh=mesh, **each))(held, x)
    (usage,) = telemetry.summary().values()
    assert (usage.calls, usage.tokens) == (4, 8)
