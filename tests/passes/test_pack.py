"""What is packed: rows laid out for gathering, once for each weight, and what is still read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hire_rewrite as hire
from hire_rewrite.cost import machine as machines
from tests.cases import FULL, D, F, Oracle, T, inputs, packed, rand, run
from tests.cases_ffn import BIASED, DOWN, GATE, GATED, LAYERS, PLAIN, STACK, UP, gated, plain
from tests.cases_head import EMBED, TIED, UNTIED

X = inputs(T, D)


def pack(fn, params, *args, rules=FULL):
    return packed(hire.transform(fn, *rules), params, *args)


def site_of(*args, **kwargs):
    """The arrays of the only site."""
    (site,) = pack(*args, **kwargs).sites.values()
    return site


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_rows_are_what_the_predictor_is_fitted_to():
    result = pack(lambda p, x: jax.nn.relu(x @ p["up"] + p["b1"]) @ p["down"], BIASED, X)
    (site,) = result.sites.values()
    np.testing.assert_array_equal(site.predictor["rows"], UP.T[None])
    assert result.weights == {}


def test_rows_are_the_same_however_the_weights_lie():
    plain_turned = lambda p, x: jax.nn.relu(x @ p["up"].T) @ p["down"].T  # noqa: E731
    turned = jax.tree.map(jnp.transpose, PLAIN)
    same(site_of(plain_turned, turned, X), site_of(plain(), PLAIN, X))

    def fused(p, x):
        h = x @ p["fused"]
        return (h[:, F:] * jax.nn.silu(h[:, :F])) @ p["down"]

    params = {"fused": jnp.concatenate([GATE, UP], 1), "down": DOWN}
    same(site_of(fused, params, X), site_of(gated(), GATED, X))


def test_layers_of_a_scan():
    fn = lambda p, x: lax.scan(lambda c, w: (plain()(w, c), None), x, p)[0]  # noqa: E731
    layers = [site_of(plain(), jax.tree.map(lambda w, i=i: w[i], STACK), X) for i in range(LAYERS)]
    same(site_of(fn, STACK, X), jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *layers))


def test_what_depends_on_weights_is_computed_once():
    def fn(p, x):
        up = p["q"].astype(jnp.float32) * p["scale"] + p["a"] @ p["b"]
        return jax.nn.relu(x @ up) @ p["down"]

    params = {"q": jnp.asarray(20 * UP, jnp.int8), "scale": jnp.full(F, 0.05)}
    params |= {"a": rand(D, 2), "b": rand(2, F), "down": DOWN}
    result = pack(fn, params, X)
    (site,) = result.sites.values()
    want = params["q"] * 0.05 + params["a"] @ params["b"]
    np.testing.assert_allclose(site.predictor["rows"][0], want.T, rtol=1e-6)
    assert result.weights == {}


def test_narrow_weights_stay_narrow():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PLAIN)
    fn = lambda p, x: plain()(jax.tree.map(lambda w: w.astype(jnp.float32), p), x)  # noqa: E731
    site = site_of(fn, params, X, rules=[hire.FFN(k=8, force=True)])
    matrices = [leaf for leaf in jax.tree.leaves(site) if leaf.size >= D * F]
    assert {leaf.dtype.name for leaf in matrices} == {"bfloat16", "int8"}


def test_a_tied_embedding_stays():
    fn = lambda p, t: p["embed"][t] @ p["embed"].T  # noqa: E731
    result = pack(fn, TIED, jnp.arange(T))
    (site,) = result.sites.values()
    np.testing.assert_array_equal(site.predictor["rows"][0], EMBED)
    np.testing.assert_array_equal(result.weights["p/embed"], EMBED)


def test_an_untied_head_does_not():
    result = pack(lambda p, x: x @ p["head"], UNTIED, X)
    (site,) = result.sites.values()
    np.testing.assert_array_equal(site.predictor["rows"][0], UNTIED["head"].T)
    assert result.weights == {}


def test_other_weights_stay():
    params = GATED | {"norm": inputs(D), "b": inputs(D, seed=1), "unused": UP}
    fn = lambda p, x: gated()(p, x * p["norm"]) + p["b"]  # noqa: E731
    assert set(pack(fn, params, X).weights) == {"p/norm", "p/b"}


def test_second_uses_of_packed_weights_stay():
    """Another reader of the same weight still reads it."""
    fn = lambda p, x: plain()(p, x) + p["up"].sum() + x[:, :1] * p["down"][0]  # noqa: E731
    assert set(pack(fn, PLAIN, X).weights) == {"p/up", "p/down"}


def test_the_same_weights_are_packed_once():
    def fn(p, x):
        x = plain()(p, plain()(p, x))
        return lax.scan(lambda c, _: (plain()(p, c), None), x, length=2)[0]

    step = hire.transform(fn, *FULL)
    assert len(step.plan(PLAIN, X).sites) == 3
    assert len(packed(step, PLAIN, X).sites) == 1


def test_a_head_before_and_inside_a_loop_is_packed_once():
    def fn(p, x):
        def step(x, _):
            token = (x @ p["embed"].T).argmax(-1)
            return p["embed"][token], token

        first = (x @ p["embed"].T).argmax(-1)
        return lax.scan(step, p["embed"][first], length=3)[1]

    step = hire.transform(fn, *FULL)
    result = packed(step, TIED, X)
    assert [site.repeats for site in step.plan(TIED, X).sites] == [1, 3]
    assert len(result.sites) == 1
    np.testing.assert_array_equal(run(step, result, X), run(fn, TIED, X))


def test_sites_that_stay_dense_are_not_packed():
    rules = hire.FFN(k=8, path="none", force=True), FULL[1]
    fn = lambda p, x: plain()(p, x) @ p["embed"].T  # noqa: E731
    result = pack(fn, PLAIN | TIED, X, rules=rules)
    assert set(result.sites) == {"p/embed"}
    assert set(result.weights) == {"p/up", "p/down"}


def test_a_packed_serves_rules_that_leave_its_arrays_as_they_are():
    rule = hire.FFN(k=8, predictor=Oracle(), force=True)
    result = pack(plain(), PLAIN, X, rules=(rule,))
    others = ({"k": 16}, {"candidates": 32}, {"path": "p"}, {"budget": 0.5}, {"max_tokens": 4})
    for other in others:
        step = hire.transform(plain(), rule.replace(**other))
        fresh = pack(plain(), PLAIN, X, rules=(rule.replace(**other),))
        np.testing.assert_array_equal(run(step, result, X), run(step, fresh, X))
    for other in ({"group": 4}, {"predictor": hire.Quantized()}, {"criterion": "output"}):
        with pytest.raises(hire.HireRewriteError, match=next(iter(other))):
            hire.transform(plain(), rule.replace(**other)).plan(result, X)
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), result)
    with pytest.raises(hire.HireRewriteError, match="pack again"):
        hire.transform(plain(), rule).plan(narrow, X)


def test_a_packed_of_a_decode_step_serves_a_prefill_with_fewer_sites():
    def decode(p, x):
        return plain()(p, x) @ p["embed"].T

    def prefill(p, x):  # fills caches, and has no use for logits
        return plain()(p, x)

    rules = hire.FFN(k=8, max_tokens=None, predictor=Oracle(), force=True), FULL[1]
    result = pack(decode, PLAIN | TIED, X, rules=rules)
    step = hire.transform(prefill, *rules)
    assert [site.status for site in step.plan(result, X).sites] == ["rewritten"]
    fresh = pack(prefill, PLAIN | TIED, X, rules=rules)
    np.testing.assert_array_equal(run(step, result, X), run(step, fresh, X))


def test_a_packed_that_lacks_what_rules_ask_for(tmp_path):
    """Said in a call, and refused where it is loaded; without rules such sites are dense."""

    def model(p, x):
        return plain()(p, x) @ p["embed"].T

    ffn, head = hire.FFN(k=8, force=True), hire.Head(k=4, min_width=1, force=True)
    result = pack(model, PLAIN | TIED, X, rules=(head,))
    asked = hire.transform(model, ffn, head)
    with pytest.warns(UserWarning, match=r"does not hold p/down, which FFN\(k=8.*pack with this"):
        got = run(asked, result, X)
    np.testing.assert_array_equal(got, run(hire.transform(model, head), result, X))
    with pytest.raises(hire.HireRewriteError, match="does not hold p/down"):
        run(hire.transform(model, ffn, head, on_miss="raise"), result, X)
    result.save(tmp_path / "packed.safetensors")
    with pytest.raises(hire.HireRewriteError, match="does not hold p/down"):
        hire.Packed.load(
            tmp_path / "packed.safetensors", hire.transform(model, ffn, head, on_miss="ignore")
        )


def test_a_packed_goes_to_another_machine(monkeypatch):
    """What was packed where it pays is run where it does not: in dense arithmetic."""
    rule = hire.FFN(k=8, predictor=Oracle())
    result = pack(plain(), PLAIN, X[:1], rules=(rule,))
    slow = dataclasses.replace(machines.current(), name="slow", site=1e12)
    monkeypatch.setattr(machines, "current", lambda: slow)
    step = hire.transform(plain(), rule)
    assert not step.pack(PLAIN, X[:1]).sites
    assert [site.status for site in step.plan(result, X[:1]).sites] == ["dense"]
    want = run(hire.transform(plain(), rule, mode="exact"), PLAIN, X[:1])
    np.testing.assert_allclose(run(step, result, X[:1]), want, atol=1e-5)


def test_packing_traces():
    """Under `jit` and `eval_shape`, weights in, the same arrays out."""
    step = hire.transform(plain(), *FULL)
    want = packed(step, PLAIN, X)
    jitted = jax.jit(lambda p: packed(step, p, X))(PLAIN)
    jax.tree.map(np.testing.assert_array_equal, jitted, want)
    shapes = jax.eval_shape(lambda p: packed(step, p, X), PLAIN)
    mapped = [jax.tree.map(jnp.shape, each) for each in (shapes, want)]
    assert jax.tree.flatten(mapped[0]) == jax.tree.flatten(mapped[1])


def test_a_checkpoint_is_restored_by_the_rules_of_its_packed(tmp_path):
    """Also where calibration found k, and on a machine where the site would not pay."""
    rule = hire.FFN(k="auto", keep=0.5, group=4, predictor=hire.LowRank(4), force=True)
    step = hire.transform(plain(), rule)
    result = step.pack(PLAIN, X, calibration=[(inputs(64, D),)])
    hire.save_rules(result.rules, str(tmp_path / "rules.json"))
    again = hire.transform(plain(), *hire.load_rules(str(tmp_path / "rules.json")))
    shapes = again.pack(jax.eval_shape(lambda: PLAIN), X)
    restored = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(result))
    np.testing.assert_array_equal(run(again, restored, X), run(step, result, X))
    assert "top" in again.plan(restored, X).sites[0].reason


def test_a_packed_is_mapped_to_anything():
    result = pack(plain(), PLAIN, X)
    for value in (None, "spec", object(), 3):
        mapped = jax.tree.map(lambda _, value=value: value, result)
        assert "Packed(" in repr(mapped)
