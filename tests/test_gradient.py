"""A gradient of what is rewritten is not silently another one."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import hire_rewrite as hire

D, F = 32, 128
X = jax.random.normal(jax.random.key(0), (1, D))
UP, DOWN = jax.random.normal(jax.random.key(1), (2, D, F))
PARAMS = {"up": UP, "down": DOWN.T}
RULE = hire.FFN(k=0.25, force=True)


def block(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def said(run, word='mode="exact"'):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if word in str(w.message)]


def gated_relu(params, x):
    return (jax.nn.relu(x @ params["up"] + params["bias"]) * (x @ params["gate"])) @ params["down"]


def forward(fn):
    return lambda x: jax.jvp(fn, (x,), (x,))


@pytest.mark.parametrize("derivative", [jax.grad, forward])
@pytest.mark.parametrize("compiled", [True, False])
def test_hire_warns_once(derivative, compiled):
    step = hire.transform(block, RULE)
    packed = step.pack(PARAMS, X)
    run = jax.jit(step) if compiled else step

    def twice():
        for x in (X, 2 * X):
            derivative(lambda x: run(packed, x).sum())(x)

    assert len(said(twice)) == 1


def test_each_site_is_named_once():
    """One that stores the same numbers in fewer bits has the model's gradient, and is not named."""
    same = UP[:, :D].astype(jnp.bfloat16).astype(jnp.float32)
    params = {"first": PARAMS, "second": PARAMS, "same": same}

    def model(params, x, more):
        for name in ("first", *("second" for _ in more)):
            x = x + block(params[name], x)
        return jnp.tanh(x @ params["same"])

    step = hire.transform(model, RULE, hire.Linear(path="same", force=True))
    packed = step.pack(params, X, (X,))
    assert len(step.plan(packed, X, (X,)).rewritten) == 3

    def differentiate(more):
        return said(lambda: jax.grad(lambda x: step(packed, x, more).sum())(X))

    for more, named, others in ((), "first", ("second",)), ((X,), "second", ("first",)):
        (text,) = differentiate(more)
        assert f"params/{named}" in text
        assert not any(name in text for name in (*others, "same"))
    assert not differentiate((X,))


def test_raw_weights():
    step = hire.transform(block, RULE)
    assert len(said(lambda: jax.grad(lambda p: step(p, X).sum())(PARAMS))) == 1


def test_where_nothing_is_wrong_nothing_is_said():
    exact = hire.transform(block, RULE, mode="exact")
    assert not said(lambda: jax.grad(lambda p: exact(p, X).sum())(PARAMS))
    step = hire.transform(block, RULE)
    packed = step.pack(PARAMS, X)
    assert not said(lambda: jax.vmap(step, (None, 0))(packed, jnp.stack([X, X])))
    prompt = jnp.ones((64, D))
    want = jax.grad(lambda x: exact(PARAMS, x).sum())(prompt)
    assert not said(lambda: jax.grad(lambda x: step(packed, x).sum())(prompt))
    got = jax.grad(lambda x: step(packed, x).sum())(prompt)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


POSITIVE = {
    "told": hire.FFN(k="positive", force=True),
    "proved": hire.FFN(k="positive", predictor=hire.Quantized(), force=True),
    "few": hire.FFN(k="positive", predictor=hire.Quantized(), budget=0.1, force=True),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("rule", POSITIVE.values(), ids=POSITIVE)
@pytest.mark.parametrize("fn", [block, gated_relu])
def test_blocks_without_their_zeros_have_the_models_gradient(fn, rule):
    """Also where a token is zero, so that a gated neuron is zero and has a slope. (A pre-activation
    that is zero itself has no derivative.)"""
    params = PARAMS | {"gate": UP[:, ::-1], "bias": jnp.ones(F)}
    step = hire.transform(fn, rule)
    packed = step.pack(params, X)
    third = 0 * X if fn is gated_relu else -X
    xs = jnp.concatenate([X, 2 * X, third]).reshape(3, 1, D)

    def under(run):
        """The derivative alone, under `vmap`, in a loop, and forwards."""
        gradient = jax.grad(lambda x: jnp.sin(0.01 * run(x)).sum())
        ones = jnp.ones_like(X)
        looped = jax.grad(lambda x: jax.lax.scan(lambda c, _: (run(c), 0), x, length=2)[0].sum())
        return jax.jit(
            lambda: (
                gradient(X),
                jax.vmap(gradient)(xs),
                jax.lax.map(gradient, xs),
                looped(0.01 * X),
                jax.jvp(run, (X,), (ones,)),
            )
        )()

    with warnings.catch_warnings():
        warnings.simplefilter("error", hire.HireRewriteWarning)
        got = under(functools.partial(step, packed))
    for a, b in zip(
        jax.tree.leaves(got), jax.tree.leaves(under(lambda x: fn(params, x))), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_what_may_miss_a_neuron_or_round_is_named():
    guessed = hire.FFN(k="positive", predictor=hire.Quantized(4), margin=3.0, force=True)
    rounded = hire.FFN(k="positive", exact=hire.Blocks(8), force=True)
    for rule in (guessed, rounded):
        step = hire.transform(block, rule)
        packed = step.pack(PARAMS, X)
        assert len(said(lambda s=step, p=packed: jax.grad(lambda x: s(p, x).sum())(X))) == 1


def gated(params, x):
    return (jax.nn.silu(x @ params["up"]) * (x @ params["gate"])) @ params["down"]


def head(params, x):
    return x @ params["embed"].T


def linear(params, x):
    return jnp.tanh(x @ params["up"])


SITES = {  # a function, and a rule under which nothing is left out
    "ffn": (block, hire.FFN(k=F, candidates=F, force=True)),
    "predicted": (
        gated,
        hire.FFN(k=F, tail="predicted", encoding=hire.Blocks(8), force=True),
    ),
    "head": (head, hire.Head(k=F, candidates=F, min_width=1, force=True)),
    "linear": (linear, hire.Linear(k=D, encoding=hire.Blocks(8), force=True)),
}


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore::hire_rewrite.errors.HireRewriteWarning")
@pytest.mark.parametrize("mode", ["hire", "exact", "dense"])
@pytest.mark.parametrize("kind", SITES)
def test_every_way_to_differentiate(kind, mode):
    """All give what the dense function's derivative is, at a budget that leaves nothing out."""
    fn, rule = SITES[kind]
    params = PARAMS | {"gate": UP[:, ::-1], "embed": DOWN.T}
    step = hire.transform(fn, rule, mode=mode)
    given = step.pack(params, X) if mode == "hire" else params
    run, ones = jax.jit(lambda x: step(given, x)), jnp.ones_like(X)
    want = jax.jacrev(lambda x: fn(params, x))(X)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
    close(jax.jacfwd(run)(X), want)
    close(jax.jacrev(run)(X), want)
    along = jnp.tensordot(want, ones, 2)
    close(jax.jvp(run, (X,), (ones,))[1], along)
    close(jax.linearize(run, X)[1](ones), along)
    gradient = jax.grad(lambda x: run(x).sum())
    close(gradient(X), want.sum((0, 1)))
    close(jax.vmap(gradient)(jnp.stack([X, X])), jnp.stack([want.sum((0, 1))] * 2))


BUDGETS = {  # rules that leave something out, and run kernels where there are some
    "ffn": RULE,
    "predicted": hire.FFN(k=0.1, tail="predicted", encoding=hire.Blocks(8), force=True),
    "head": hire.Head(k=8, tail="-inf", min_width=1, force=True),
    "linear": hire.Linear(k=0.1, encoding=hire.Blocks(8), force=True),
}


@pytest.mark.sampled(4)
@pytest.mark.filterwarnings("ignore::hire_rewrite.errors.HireRewriteWarning")
@pytest.mark.parametrize("mode", ["hire", "exact"])
@pytest.mark.parametrize("kind", SITES)
def test_the_derivative_is_that_of_what_is_computed(kind, mode):
    params = PARAMS | {"gate": UP[:, ::-1], "embed": DOWN.T}
    step = hire.transform(SITES[kind][0], BUDGETS[kind], mode=mode)
    given = step.pack(params, X) if mode == "hire" else params
    run = jax.jit(lambda x: jnp.where(jnp.isfinite(step(given, x)), step(given, x), 0.0))
    forward, near = jax.jacfwd(run)(X), 1e-4 * jnp.sin(jnp.arange(D))
    np.testing.assert_allclose(forward, jax.jacrev(run)(X), rtol=1e-4, atol=1e-4)
    moved = run(X + near) - run(X - near)
    np.testing.assert_allclose(2 * jnp.tensordot(forward, near[None], 2), moved, atol=2e-4)


def test_arguments_are_handed_on_as_they_are():
    def with_cache(params, x, cache):
        return block(params, x), cache

    step = hire.transform(with_cache, RULE)
    packed = step.pack(PARAMS, X, jnp.ones(3))
    jaxpr = jax.make_jaxpr(step)(packed, X, jnp.ones(3)).jaxpr
    assert jaxpr.outvars[1] is jaxpr.invars[-1]


def test_a_derivative_from_a_rule():
    """It stays where nothing in it is rewritten, with what it closes over; else the user is told,
    at blocks too that have the gradient of their arithmetic, and on raw weights too."""
    scales = np.asarray([1.0, 0.5], np.float32)

    def layers(params, x):
        return jax.lax.scan(lambda x, s: (x + block(params, s * x), x), x, jnp.asarray(scales))[0]

    custom = jax.custom_vjp(layers)
    custom.defvjp(
        lambda params, x: jax.vjp(layers, params, x), lambda back, g: jax.tree.map(jnp.cos, back(g))
    )

    def model(params, x):
        return custom(params, x)

    def gradient(fn, weights=PARAMS):
        return jax.grad(lambda x: fn(weights, x).sum())(X)

    want, nowhere = gradient(model), hire.FFN(k=0.25, path="nowhere")
    step = hire.transform(model, nowhere, on_miss="ignore")
    exact = hire.transform(model, POSITIVE["told"], mode="exact")
    for fn, weights in ((step, PARAMS), (step, step.pack(PARAMS, X)), (exact, PARAMS)):
        np.testing.assert_allclose(gradient(fn, weights), want, rtol=1e-4, atol=1e-4)
    for mode in ("hire", "exact", "dense"):
        step = hire.transform(model, POSITIVE["told"], mode=mode)
        packed = step.pack(PARAMS, X)
        assert step.plan(packed, X).rewritten
        word = 'mode="exact"' if mode == "hire" else "custom_vjp"
        assert len(said(lambda: gradient(step, packed), word)) == 1  # noqa: B023 (called here)
        assert not said(lambda: step(packed, X), word)  # noqa: B023
    step = hire.transform(model, hire.FFN(k=0.25), mode="exact")
    assert len(said(lambda: gradient(step), "custom_vjp")) == 1
    assert not said(lambda: step(PARAMS, X), "custom_vjp")


@jax.custom_jvp
def straight_through(x):
    return jnp.maximum(x, 0)


straight_through.defjvp(lambda primals, tangents: (straight_through(*primals), tangents[0]))


@jax.custom_vjp
def leaky_backwards(x):
    return jnp.maximum(x, 0)


leaky_backwards.defvjp(lambda x: (jnp.maximum(x, 0), x), lambda x, g: (jnp.where(x > 0, g, g / 9),))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("mode", ["hire", "exact", "dense"])
@pytest.mark.parametrize("activation", [straight_through, leaky_backwards, jax.nn.relu])
def test_an_activation_with_a_derivative_of_its_own(activation, mode):
    """The user is told where it is not that of the code; rewritten, or dense in this call."""

    def model(params, x):
        return activation(x @ params["up"]) @ params["down"]

    step = hire.transform(model, POSITIVE["told"], mode=mode)
    packed = step.pack(PARAMS, X)
    for x in (X, jnp.tile(X, (20, 1))):
        told = said(lambda: jax.grad(lambda x: step(packed, x).sum())(x), "its arithmetic")  # noqa: B023
        assert len(told) == (activation is not jax.nn.relu and x is X)  # once
    other = hire.transform(model, POSITIVE["told"], mode=mode)
    dense = jnp.tile(X, (20, 1))
    assert other.plan(packed, dense).sites[0].status == "dense"
    told = said(lambda: jax.grad(lambda x: other(packed, x).sum())(dense), "its arithmetic")
    assert len(told) == (activation is not jax.nn.relu)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("activation", [straight_through, jax.nn.relu])
def test_it_is_told_inside_a_shard_map_too(activation, check_vma):
    step = hire.transform(lambda p, x: activation(x @ p["up"]) @ p["down"], POSITIVE["told"])
    packed, mesh = step.pack(PARAMS, X), jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P("data")), "out_specs": P("data"), "check_vma": check_vma}
    divided = jax.shard_map(step, mesh=mesh, **specs)
    x = jnp.tile(X, (4, 1))
    told = said(lambda: jax.jit(jax.grad(lambda x: divided(packed, x).sum()))(x), "its arithmetic")
    assert len(told) == (activation is not jax.nn.relu)
