"""`transform` from the front door: calls, compositions, packing, and bad input."""

import copy
import functools
import pickle
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from tests.cases import optimized, run

D, F, V, LAYERS = 32, 64, 256, 3
FULL = (
    hire.FFN(k=1.0, candidates=1.0, force=True),
    hire.Head(k=1.0, candidates=1.0, min_width=128, force=True),
)
SMALL = (
    hire.FFN(k=0.5, candidates=0.75, force=True),
    hire.Head(k=8, candidates=32, min_width=128, predictor=hire.LowRank(8), force=True),
)


def init(seed=0, scale=1.0):
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def normal(*shape):
        return scale * jax.random.normal(next(keys), shape) / np.sqrt(shape[-2])

    return {
        "embed": normal(V, D) * np.sqrt(V / D),
        "layers": {
            "gate": normal(LAYERS, D, F),
            "up": normal(LAYERS, D, F),
            "down": normal(LAYERS, F, D),
        },
    }


def step(params, token, cache):
    """token: i32[batch] → logits f32[batch, V], cache f32[batch, D]."""

    def layer(x, w):
        n = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
        return x + (jax.nn.silu(n @ w["gate"]) * (n @ w["up"])) @ w["down"], None

    x = params["embed"][token] + cache
    x, _ = jax.lax.scan(layer, x, params["layers"])
    return {"logits": x @ params["embed"].T, "cache": x}


@pytest.fixture(scope="module")
def params():
    return init()


@pytest.fixture(scope="module")
def call():
    token = jnp.array([3, 5], jnp.int32)
    return token, jax.random.normal(jax.random.key(9), (2, D))


@pytest.fixture(scope="module")
def want(params, call):
    """What the original returns."""
    return run(step, params, *call)


@pytest.fixture(scope="module")
def full():
    """The function with everything among the candidates."""
    return hire.transform(step, *FULL)


@pytest.fixture(scope="module")
def packed(full, params, call):
    return pack(full, params, call)


def pack(fn, params, call, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fn.pack(params, *call, **kwargs)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), a, b)


# Identity at full budget, in every composition.


@pytest.mark.parametrize("mode", ["hire", "exact", "dense"])
@pytest.mark.parametrize("packs", [True, False])
def test_full_budget_is_the_original(params, call, want, mode, packs):
    fn = hire.transform(step, *FULL, mode=mode)
    assert [s.status for s in fn.plan(params, *call).sites] == ["rewritten"] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = fn.pack(params, *call) if packs else params
        close(fn(weights, *call), want)


def test_compiled_as_users_compile(params, call, want):
    """With all that XLA does to programs, which other tests spare it."""
    for rules, mode in ((FULL, "hire"), (SMALL, "hire"), (SMALL, "exact")):
        fn = hire.transform(step, *rules, mode=mode)
        weights = pack(fn, params, call)
        got = optimized(fn)(weights, *call)
        close(got, want if rules is FULL else run(fn, weights, *call))


def test_under_jit_with_donation(full, packed, params, call):
    token, cache = call
    want = step(params, token, cache)
    jitted = jax.jit(full, donate_argnums=2)
    given = jnp.array(cache)
    close(jitted(packed, token, given), want)
    assert given.is_deleted()


def test_under_vmap(params, call):
    fn = hire.transform(step, *FULL)
    token, cache = call
    packed = pack(fn, params, (token[0], cache[0]))
    mapped = jax.vmap(fn, in_axes=(None, 0, 0))(packed, token, cache)
    close(mapped, jax.vmap(step, in_axes=(None, 0, 0))(params, token, cache))


def test_under_an_outer_scan(full, packed, params, call):
    token, cache = call

    def generate(step, weights):
        def body(state, _):
            out = step(weights, *state)
            token = jnp.argmax(out["logits"], -1).astype(jnp.int32)
            return (token, out["cache"]), out["logits"]

        return jax.jit(lambda: jax.lax.scan(body, (token, cache), length=4))()

    close(generate(full, packed), generate(step, params))


def test_a_generation_loop_inside(params, call):
    def generate(params, token, cache):
        def body(state, _):
            out = step(params, *state)
            return (jnp.argmax(out["logits"], -1).astype(jnp.int32), out["cache"]), state[0]

        return jax.lax.scan(body, (token, cache), length=5)

    fn = hire.transform(generate, *FULL)
    sites = {s.kind: s for s in fn.plan(params, *call).sites}
    assert (sites["ffn"].repeats, sites["head"].repeats) == (5 * LAYERS, 5)
    packed = pack(fn, params, call)
    close(fn(packed, *call), generate(params, *call))


def test_gradient_in_mode_exact(params, call):
    fn = hire.transform(step, *FULL, mode="exact")

    def loss(step):
        return lambda params: jax.nn.logsumexp(step(params, *call)["logits"], -1).sum()

    close(*(run(jax.grad(loss(f)), params) for f in (fn, step)))


def test_lowering_ahead_of_time(full, packed, params, call, want):
    compiled = jax.jit(full).lower(packed, *call).compile()
    close(compiled(packed, *call), want)


def test_names_in_the_lowered_text(full, packed, call):
    text = jax.jit(full).lower(packed, *call).as_text()
    assert "hire_ffn" in text
    assert "hire_head" in text


def test_keyword_arguments(params, call):
    fn = hire.transform(step, *FULL)
    token, cache = call
    packed = fn.pack(params, token, cache=cache, calibration=[(token,)])
    close(fn(packed, token, cache=cache), step(params, token, cache))


# At a real budget.


def test_hire_agrees_with_exact_where_recall_is_one(params, call):
    rules = (
        hire.FFN(k=0.5, candidates=1.0, force=True),
        hire.Head(k=8, candidates=32, min_width=128, force=True),
    )
    fn, exact = (hire.transform(step, *rules, mode=mode) for mode in ("hire", "exact"))
    packed = pack(fn, params, call)
    got, want = fn(packed, *call), exact(params, *call)
    close(got["cache"], want["cache"])  # all neurons are candidates, so the FFN's recall is 1
    assert not np.allclose(got["cache"], step(params, *call)["cache"], atol=1e-2)
    top = np.argsort(-np.asarray(want["logits"]), -1)[:, :8]
    found = np.take_along_axis(np.asarray(got["logits"]), top, -1)
    exactly = np.isclose(found, np.take_along_axis(np.asarray(want["logits"]), top, -1), atol=1e-4)
    assert exactly[:, 0].all()


def test_a_token_does_not_depend_on_its_neighbors(params):
    fn = hire.transform(step, hire.FFN(k=0.1, candidates=0.2, group=1, force=True), SMALL[1])
    token = jnp.arange(4, dtype=jnp.int32)
    cache = jax.random.normal(jax.random.key(1), (4, D))
    packed = pack(fn, params, (token, cache))
    together = fn(packed, token, cache)
    for i in range(4):
        alone = fn(packed, token[i : i + 1], cache[i : i + 1])
        close(alone, jax.tree.map(lambda x, i=i: x[i : i + 1], together))
    broken = fn(packed, token, cache.at[1].set(jnp.nan))
    assert np.isnan(broken["logits"][1]).all()
    for i in (0, 2, 3):
        close(broken["logits"][i], together["logits"][i])


def test_prefill_keeps_the_same_top_k(params):
    """More tokens than max_tokens: dense arithmetic, but the model stays the same."""
    fn = hire.transform(step, hire.FFN(k=0.5, candidates=1.0, max_tokens=2, force=True))
    token = jnp.arange(5, dtype=jnp.int32)
    cache = jnp.zeros((5, D))
    packed = pack(fn, params, (token[:1], cache[:1]))
    site = next(s for s in fn.plan(packed, token, cache).sites if s.kind == "ffn")
    assert site.status == "dense"
    assert "max_tokens" in site.reason
    many = fn(packed, token, cache)
    one = fn(packed, token[:1], cache[:1])
    close(one["cache"][0], many["cache"][0])


def test_fitted_predictor_recalls_better(params):
    rule = hire.Head(k=1, candidates=8, min_width=128, predictor=hire.LowRank(4), force=True)
    fn = hire.transform(step, rule)
    narrow = jax.random.normal(jax.random.key(2), (4, D))

    def batch(seed, n=64):
        key = jax.random.key(seed)
        token = jax.random.randint(key, (n,), 0, V)
        return token, jax.random.normal(key, (n, 4)) @ narrow * 3

    test = batch(7, 256)
    dense = np.argmax(step(params, *test)["logits"], -1)
    fitted = fn.pack(params, *test, calibration=[batch(s) for s in range(4)])
    plain = pack(fn, params, test)

    def recall(packed):
        return float(np.mean(np.argmax(fn(packed, *test)["logits"], -1) == dense))

    assert recall(fitted) > recall(plain) + 0.1


# Raw weights.


def test_raw_weights_warn_once_and_pack_once(params, call):
    fn = hire.transform(step, *SMALL)
    with pytest.warns(UserWarning, match="without calibration"):
        first = fn(params, *call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(fn(params, *call), first)


def test_raw_weights_that_change_are_packed_again(params, call, want):
    fn = hire.transform(step, *FULL)
    other = init(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(fn(params, *call), want)
        close(fn(other, *call), step(other, *call))


def test_numpy_weights_that_change_in_place(params, call):
    fn = hire.transform(step, *FULL)
    own = jax.tree.map(np.array, params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(fn(own, *call), step(own, *call))
        own["embed"] *= 2
        close(fn(own, *call), step(own, *call))


def test_raw_weights_inside_a_trace(params, call, want):
    fn = hire.transform(step, *FULL)
    with pytest.warns(UserWarning, match="outer trace"):
        close(jax.jit(fn)(params, *call), want)


def test_closed_over_weights(params, call, want):
    fn = hire.transform(functools.partial(step, params), *FULL, weights=())
    packed = fn.pack(*call, calibration=[call])
    assert set(packed.sites) == {s.name for s in fn.plan(*call).sites}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(fn(*call), want)


def test_two_weight_arguments(params, call, want):
    def split(layers, embed, token, cache):
        return step({"layers": layers, "embed": embed}, token, cache)

    fn = hire.transform(split, *FULL, weights=(0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = fn.pack(params["layers"], params["embed"], *call)
    close(fn(packed, None, *call), want)


def test_as_a_decorator(params, call, want):
    @hire.transform
    def plain(params, token, cache):
        """Documented."""
        return step(params, token, cache)

    @hire.transform(*FULL, mode="exact")
    def ruled(params, token, cache):
        return step(params, token, cache)

    assert plain.__doc__ == "Documented."
    assert plain.plan(params, *call).sites[0].status == "dense"
    close(ruled(params, *call), want)


# Packed.


def test_packed_is_a_pytree_of_arrays(full, packed, params, call, want):
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(packed))
    assert set(packed.weights) == {"params/embed"}  # tied: the lookup still reads it
    moved = jax.device_put(jax.tree.map(jnp.copy, packed), jax.devices()[1])
    token, cache = jax.device_put(call, jax.devices()[1])
    close(full(moved, token, cache), want)
    abstract = jax.eval_shape(lambda p: p, packed)
    assert abstract.info == packed.info
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = jax.eval_shape(lambda p: full.pack(p, *call), params)
    mapped = [jax.tree.map(lambda x: (x.shape, x.dtype), each) for each in (shapes, packed)]
    assert jax.tree.flatten(mapped[0]) == jax.tree.flatten(mapped[1])


# Functions without sites.


def test_without_sites_the_jaxpr_is_the_same(call):
    def attention(params, x):
        q, k, v = (x @ params[name] for name in "qkv")
        return jax.nn.softmax(q @ k.T) @ v

    params = {name: jnp.ones((D, D)) for name in "qkv"}
    x = jnp.ones((4, D))
    fn = hire.transform(attention)
    assert fn.plan(params, x).rewritten == ()
    assert str(jax.make_jaxpr(fn)(params, x)) == str(jax.make_jaxpr(attention)(params, x))
    assert not fn.diff(params, x).changed
    packed = fn.pack(params, x)
    close(fn(packed, x), attention(params, x))


# Bad input.


def test_a_rule_that_matches_nothing(params, call):
    rule = hire.Head(path="no such site")
    hire.transform(step, rule, on_miss="ignore").plan(params, *call)
    with pytest.warns(hire.HireRewriteWarning, match="no such site"):
        hire.transform(step, rule).plan(params, *call)
    with pytest.raises(hire.HireRewriteError, match="no such site"):
        hire.transform(step, rule, on_miss="raise").plan(params, *call)
    assert hire.inspect(step, params, *call, rules=[rule]).unused_rules == (rule,)


def test_more_rows_than_the_site_has(params, call):
    rule = hire.Head(k=V + 1, candidates=V + 2, min_width=128)
    with pytest.raises(hire.HireRewriteError, match="params/embed: k=257"):
        hire.inspect(step, params, *call, rules=[rule])
    rule = hire.FFN(k=0.5, candidates=8)
    with pytest.raises(hire.HireRewriteError, match="candidates=8"):
        hire.inspect(step, params, *call, rules=[rule])


def test_packed_for_another_plan(packed, call):
    with pytest.raises(hire.HireRewriteError, match="Packed"):
        hire.transform(step, *SMALL)(packed, *call)


def test_packed_for_other_shapes(full, packed, call):
    broken = jax.tree.map(lambda x: x[..., :-1], packed)
    with pytest.raises(hire.HireRewriteError, match="packed"):
        full(broken, *call)
    with pytest.raises(hire.HireRewriteError, match="packed"):
        full(jax.tree.map(lambda x: x.astype(jnp.float16), packed), *call)


def test_packed_for_a_model_of_another_size(params, call):
    def narrow(params, token, cache):
        return step(params, token, cache[:, : D // 2])

    halved = jax.tree.map(lambda x: x[..., : D // 2] if x.shape[-1] == D else x, params)
    halved["layers"] = {
        "gate": params["layers"]["gate"][:, : D // 2],
        "up": params["layers"]["up"][:, : D // 2],
        "down": halved["layers"]["down"],
    }
    packed = pack(hire.transform(narrow, *FULL), halved, call)
    with pytest.raises(hire.HireRewriteError, match="shapes"):
        hire.transform(step, *FULL)(packed, *call)


def test_one_weight_in_two_sites_is_packed_once(params, call):
    def twice(params, token, cache):
        first = step(params, token, cache)
        second = step(params, token, first["cache"])
        return first["logits"], second["logits"]

    fn = hire.transform(twice, *FULL)
    packed = fn.pack(params, *call, calibration=[call])
    assert len(fn.plan(params, *call).sites) == 4
    assert len(packed.sites) == 2
    close(fn(packed, *call), twice(params, *call))


def test_a_packed_serves_tokens_of_any_number_of_axes():
    """Prompts beside decoding: `[batch, time]` and `[batch]`; biases, parts of a fused product and
    experts have places of their own in what a product returns."""
    rng = np.random.default_rng(0)
    shapes = {"up": (D, F), "b": (F,), "down": (F, D), "fused": (D, 2 * F), "ups": (2, D, F)}
    p = {k: jnp.asarray(rng.normal(size=n), jnp.float32) for k, n in shapes.items()}
    p["downs"] = p["ups"].mT

    def fn(p, x):
        x = x + jax.nn.relu(x @ p["up"] + p["b"]) @ p["down"]
        gate, up = jnp.split(x @ p["fused"], 2, -1)
        x = x + (jax.nn.silu(gate) * up) @ p["down"]
        each = jax.nn.relu(jnp.einsum("...d,edf->...ef", x, p["ups"]))
        return x + jnp.einsum("...ef,efd->...ed", each, p["downs"]).sum(-2)

    every = {"force": True, "max_tokens": None}
    positive = hire.FFN(k="positive", path="ups", **every)
    step = hire.transform(fn, positive, hire.FFN(k=1.0, candidates=1.0, **every))
    x = jnp.asarray(rng.normal(size=(2, 3, D)), jnp.float32)
    packed = step.pack(p, x[0])
    for tokens in (x, x[:, None], x[0, 0]):
        assert len(step.plan(packed, tokens).rewritten) == 3
        close(step(packed, tokens), fn(p, tokens))
    assert step.evaluate(packed, [(x,), (x[:1],)]).sites


def test_what_a_packed_lacks_is_told_where_it_is_measured_too(full, params, call):
    def without(params, *call):
        return step(params, *call)["logits"]

    def other(params, *call):
        return without(params, *call) @ params["embed"] @ params["layers"]["up"][0]

    packed = pack(hire.transform(without, *FULL), params, call)
    again = hire.transform(other, *FULL, on_miss="ignore")
    for measure in (lambda: again(packed, *call), lambda: again.evaluate(packed, [call])):
        with pytest.raises(hire.HireRewriteError, match="Packed lacks"):
            measure()


@pytest.mark.parametrize("weights", [-1, "params", 1.5, True])
def test_weights_are_positions(weights):
    with pytest.raises(hire.HireRewriteError, match="weights="):
        hire.transform(step, weights=weights)


def test_weights_out_of_range(params, call):
    with pytest.raises(hire.HireRewriteError, match="weights=7"):
        hire.transform(step, weights=7).plan(params, *call)


def test_results_that_are_no_arrays(params, call):
    fn = hire.transform(lambda params, x: {"y": x, "note": "text"})
    with pytest.raises(hire.HireRewriteError, match="array"):
        fn.plan(params, call[1])


def test_arguments_that_are_no_arrays(params, call):
    fn = hire.transform(lambda params, x, act: act(x))
    with pytest.raises(hire.HireRewriteError, match="act"):
        fn.plan(params, call[1], jnp.tanh)


@pytest.mark.parametrize(
    "arguments", [{"mode": "fast"}, {"on_miss": "shrug"}, {"rules": ("Head",)}, {"fn": 3}]
)
def test_transform_arguments(arguments):
    rules = arguments.pop("rules", ())
    fn = arguments.pop("fn", step)
    with pytest.raises(hire.HireRewriteError, match="transform: "):
        hire.transform(fn, *rules, **arguments)


def test_exact_mode_selects_whether_it_pays_or_not():
    """What is trained must not depend on what predicting would cost."""
    random = np.random.default_rng(0)
    shapes = {"up": (16, 64), "gate": (16, 64), "down": (64, 16)}
    params = {name: jnp.asarray(random.normal(size=s), jnp.float32) for name, s in shapes.items()}

    def block(p, x):
        return (jax.nn.relu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]

    rule, x = hire.FFN(k=0.5), jnp.asarray(random.normal(size=(3, 16)), jnp.float32)
    (site,) = hire.inspect(block, params, x, rules=[rule]).sites
    assert site.status == "dense"
    step = hire.transform(block, rule, mode="exact")
    forced = hire.transform(block, hire.FFN(k=0.5, force=True), mode="exact")
    np.testing.assert_allclose(step(params, x), forced(params, x), rtol=1e-5)
    assert not np.allclose(step(params, x), block(params, x))
    np.testing.assert_array_equal(hire.transform(block, rule)(params, x), jax.jit(block)(params, x))


class Model:
    """A model with a transformed method, which is given its weights."""

    def __init__(self, cap):
        self.cap = cap

    @hire.transform(*FULL)
    def step(self, params, x):
        """One step."""
        return jnp.tanh(x @ params["embed"].T / self.cap) * self.cap


def test_a_method():
    small, large = Model(0.1), Model(1000.0)
    params, x = {"embed": init()["embed"]}, jnp.ones((1, D))
    for model in (small, large, small):
        weights = model.step.pack(params, x)
        want = jnp.tanh(x @ params["embed"].T / model.cap) * model.cap
        np.testing.assert_allclose(model.step(weights, x), want, rtol=1e-5)
        assert model.step is model.step
        assert [site.status for site in model.step.plan(weights, x).sites] == ["rewritten"]
    assert Model.step.__doc__ == "One step."


def test_an_error_of_jax_names_the_function_and_is_short():
    params, x = {"embed": init()["embed"]}, jnp.ones((1, D))
    step = hire.transform(lambda params, x: x @ params["embed"].T, *FULL, on_miss="ignore")
    packed = jax.device_put(step.pack(params, x), jax.devices()[0])
    with pytest.raises(ValueError, match="of <lambda>") as caught:
        step(packed, jax.device_put(x, jax.devices()[1]))
    assert len(str(caught.value)) < 1000
    assert copy.deepcopy([step]) == [copy.copy(step)] == [step]


@hire.transform
def decorated(params, x):
    return x @ params["embed"].T


def test_it_is_pickled_as_functions_are(full, packed, call):
    """By name, or with its function."""
    assert pickle.loads(pickle.dumps(decorated)) is decorated
    there, sent = pickle.loads(pickle.dumps((full, packed)))
    assert (there.name, there.rules, there.weights) == ("step", full.rules, (0,))
    jax.tree.map(np.testing.assert_array_equal, there(sent, *call), full(packed, *call))
    partial = hire.transform(functools.partial(step, cache=call[1]), *FULL)
    assert pickle.loads(pickle.dumps(partial)).rules == partial.rules


class Library:
    """Functions in a class that are no methods, or are bound by another library."""

    head = hire.transform(staticmethod(lambda params, x: x @ params["embed"].T), *FULL)
    part = hire.transform(
        functools.partial(lambda scale, params, x: x * scale, 2.0), on_miss="ignore"
    )
    filtered = hire.transform(eqx.filter_jit(lambda self, params, x: x @ params["embed"].T), *FULL)


@pytest.mark.filterwarnings("ignore:functools.partial:FutureWarning")  # of Python 3.13's own
def test_what_stands_in_a_class_and_is_no_method():
    params, x = {"embed": init()["embed"]}, jnp.ones((1, D))
    library = Library()
    for _ in range(2):
        for fn in (library.head, Library.head, library.filtered):
            packed = fn.pack(params, x)
            np.testing.assert_allclose(fn(packed, x), x @ params["embed"].T, rtol=1e-5)
        np.testing.assert_allclose(library.part(params, x), 2 * x)


def test_what_is_transformed_is_not_transformed_again():
    with pytest.raises(hire.HireRewriteError, match="transformed"):
        hire.transform(hire.transform(step, *FULL))
