"""FFN blocks are found however they are written, and near misses say what stopped them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hire_rewrite.graph.weights import narrow
from hire_rewrite.patterns.refusal import Refusal
from tests.cases import FULL, D, F, T, found_in, inputs, plan_of, rand
from tests.cases_ffn import (
    ACTIVATION_CASES,
    BIASED,
    DOWN,
    FFN_CASES,
    GATE,
    GATED,
    PLAIN,
    STACK,
    UP,
    plain,
)


@pytest.mark.parametrize("case", ACTIVATION_CASES + FFN_CASES, ids=str)
def test_found(case):
    plan = plan_of(case.fn, case.params, *case.args)
    (site,) = plan.sites
    assert {name: getattr(site, name) for name in case.expected} == case.expected
    assert site.rule == FULL[0]
    assert plan.rejected == ()
    assert plan.opaque == ()


def _normed(h):
    return (h - h.mean(-1, keepdims=True)) * lax.rsqrt(h.var(-1, keepdims=True) + 1e-5)


def _attention(p, x):
    q, k, v = (x @ p[name] for name in "qkv")
    weights = jax.nn.softmax(q @ k.T / 4)
    return (weights @ v) @ p["o"]


def _decode(p, x, keys, values):
    """One token of two heads with a cache."""
    q, k, v = ((x @ p[name]).reshape(2, D // 2) for name in "qkv")
    keys = lax.dynamic_update_slice(keys, k[None], (2, 0, 0))
    values = lax.dynamic_update_slice(values, v[None], (2, 0, 0))
    weights = jax.nn.softmax(jnp.einsum("hd,shd->hs", q, keys))
    return jnp.einsum("hs,shd->hd", weights, values).reshape(D) @ p["o"], keys, values


def _dropout(p, x, key):
    h = jax.nn.relu(x @ p["up"])
    return jnp.where(jax.random.bernoulli(key, 0.9, h.shape), h / 0.9, 0) @ p["down"]


def _hidden_twice(p, x):
    h = jax.nn.relu(x @ p["up"])
    return h @ p["down"], h.sum()


def _hidden_carried(p, x):
    def body(h, _):
        y = jax.nn.relu(h) @ p["down"]
        return y @ p["up"], y

    return lax.scan(body, x @ p["up"], length=2)[1]


def _two_inputs(p, x):
    return (jax.nn.silu(x @ p["gate"]) * (jnp.tanh(x) @ p["up"])) @ p["down"]


def _two_precisions(p, x):
    up = jnp.matmul(x, p["up"], precision="highest")
    return (jax.nn.silu(x @ p["gate"]) * up) @ p["down"]


def _gate_read_elsewhere(p, x):
    gate = jax.nn.silu(x @ p["gate"])
    return (gate * (x @ p["up"])) @ p["down"], gate.max()


def _by_tokens(fn):
    return lambda p, x: fn(jax.nn.relu(x @ p["up"])) @ p["down"]


def _while_layers(p, x):
    def body(state):
        i, x = state
        return i + 1, plain()({name: w[i] for name, w in p.items()}, x)

    return lax.while_loop(lambda s: s[0] < 4, body, (0, x))[1]


def _by_batch(p, x):
    h = jax.nn.relu(jnp.stack([x, 2 * x]) @ p["up"])
    return jnp.swapaxes(h, 0, 1) @ p["down"]


ATTENTION = {name: rand(D, D, seed=i) for i, name in enumerate("qkvo")}
FUSED = {"fused": jnp.concatenate([GATE, UP], 1), "down": DOWN}
CACHE = (inputs(4, 2, D // 2), inputs(4, 2, D // 2))
NEAR = {
    "low rank": (lambda p, x: x @ p["up"] @ p["down"], PLAIN, (), Refusal.LOW_RANK),
    "low rank with biases": (
        lambda p, x: (x @ p["up"] + p["b1"]) @ p["down"],
        BIASED,
        (),
        Refusal.LOW_RANK,
    ),
    "normed hidden": (_by_tokens(_normed), PLAIN, (), Refusal.MIXES_POSITIONS),
    "softmax hidden": (_by_tokens(jax.nn.softmax), PLAIN, (), Refusal.MIXES_POSITIONS),
    "normed, then relu": (
        lambda p, x: jax.nn.relu(_normed(x @ p["up"])) @ p["down"],
        PLAIN,
        (),
        Refusal.MIXES_POSITIONS,
    ),
    "above the mean": (
        lambda p, x: (lambda h: jnp.where(h > 5 * h.min(-1, keepdims=True), h, 0) @ p["down"])(
            x @ p["up"]
        ),
        PLAIN,
        (),
        Refusal.MIXES_POSITIONS,
    ),
    "cumulative hidden": (_by_tokens(lambda h: h.cumsum(-1)), PLAIN, (), Refusal.UNKNOWN_OPERATION),
    "reversed hidden": (_by_tokens(lambda h: h[:, ::-1]), PLAIN, (), Refusal.UNKNOWN_OPERATION),
    "a weight for each token": (
        lambda p, x, i: jnp.einsum(
            "tf,tfd->td", jax.nn.relu(jnp.einsum("td,tdf->tf", x, p["up"][i])), p["down"][i]
        ),
        STACK,
        (jnp.array([0, 2, 1]),),
        Refusal.CHOSEN_AT_RUN_TIME,
    ),
    "hidden rolled": (_by_tokens(lambda h: jnp.roll(h, 1, -1)), PLAIN, (), Refusal.MIXES_POSITIONS),
    "pooled tokens": (_by_tokens(lambda h: h.max(0)), PLAIN, (), Refusal.UNKNOWN_OPERATION),
    "hidden cast to heads": (
        _by_tokens(lambda h: jnp.tanh(h.reshape(T, 4, F // 4)).reshape(T, F)),
        PLAIN,
        (),
        Refusal.MIXES_POSITIONS,
    ),
    "hidden also summed": (_hidden_twice, PLAIN, (), Refusal.READ_ELSEWHERE),
    "hidden also returned": (
        lambda p, x: (lambda h: (h @ p["down"], h))(jax.nn.relu(x @ p["up"])),
        PLAIN,
        (),
        Refusal.READ_ELSEWHERE,
    ),
    "hidden's range also returned": (
        lambda p, x: (lambda h: (h @ p["down"], jnp.abs(h).max()))(jax.nn.relu(x @ p["up"])),
        PLAIN,
        (),
        Refusal.READ_ELSEWHERE,
    ),
    "hidden joined with itself": (
        lambda p, x: (lambda h: jnp.concatenate([h, h], -1) @ p["out"])(jax.nn.relu(x @ p["up"])),
        PLAIN | {"out": rand(2 * F, D)},
        (),
        Refusal.MIXES_POSITIONS,
    ),
    "gate also read": (_gate_read_elsewhere, GATED, (), Refusal.READ_ELSEWHERE),
    "dropout": (_dropout, PLAIN, (jax.random.key(0),), Refusal.UNKNOWN_OPERATION),
    "no first layer": (lambda p, x: jax.nn.relu(x) @ p["q"], ATTENTION, (), Refusal.FROM_OUTSIDE),
    "carried hidden": (_hidden_carried, PLAIN, (), Refusal.FROM_OUTSIDE),
    "two inputs": (_two_inputs, GATED, (), Refusal.DIFFERENT_PRODUCTS),
    "two precisions": (_two_precisions, GATED, (), Refusal.DIFFERENT_PRODUCTS),
    "one token of many": (
        _by_tokens(lambda h: h[-1:]),
        PLAIN,
        (),
        Refusal.MIXES_TOKENS,
    ),
    "last tokens": (_by_tokens(lambda h: h[1:]), PLAIN, (), Refusal.MIXES_TOKENS),
    "gated by the first token": (_by_tokens(lambda h: h * h[:1]), PLAIN, (), Refusal.MIXES_TOKENS),
    "tokens swapped": (_by_batch, PLAIN, (), Refusal.MIXES_TOKENS),
    "weight made of an activation": (
        lambda p, x: jax.nn.relu(x @ (p["up"] * x.mean())) @ p["down"],
        PLAIN,
        (),
        Refusal.MIXES_POSITIONS,
    ),
    "layers of a while_loop": (_while_layers, STACK, (), Refusal.CHOSEN_AT_RUN_TIME),
    "a cond for each token": (
        lambda p, x: jax.vmap(
            lambda x: lax.cond(x[0] > 0, lambda x: jax.nn.relu(x @ p["up"]) @ p["down"], jnp.sin, x)
        )(x),
        PLAIN,
        (),
        Refusal.CHOSEN_AT_RUN_TIME,
    ),
    "low-rank sum": (
        lambda p, x: jax.nn.relu(x @ p["up"] + x @ p["a"] @ p["b"]) @ p["down"],
        PLAIN | {"a": rand(D, 2), "b": rand(2, F)},
        (),
        Refusal.LOW_RANK,
    ),
    "halves of different sizes": (
        lambda p, x: (lambda h: jax.nn.relu(h[:, :F]).reshape(T, 2, -1).sum(1) @ p["out"])(
            x @ p["fused"]
        ),
        FUSED | {"out": rand(F // 2, D)},
        (),
        Refusal.UNKNOWN_OPERATION,
    ),
    "experts of groups": (
        lambda p, x: jnp.einsum(
            "gech,ehd->gecd",
            jax.nn.relu(jnp.einsum("gecd,edh->gech", jnp.stack([jnp.stack([x] * 4)] * 2), p["up"])),
            p["down"],
        ),
        {"up": jnp.stack([UP] * 4), "down": jnp.stack([DOWN] * 4)},
        (),
        Refusal.MIXES_TOKENS,
    ),
    "attention": (_attention, ATTENTION, (), Refusal.MIXES_POSITIONS),
    "decode attention": (_decode, ATTENTION, CACHE, Refusal.MIXES_POSITIONS),
}
LAST = {
    "halves of different sizes": "p/out",
    "hidden joined with itself": "p/out",
    "no first layer": "p/q",
    "attention": "p/o",
    "decode attention": "p/o",
}


@pytest.mark.parametrize("name", NEAR)
def test_near_miss(name):
    fn, params, rest, refusal = NEAR[name]
    x = inputs(D) if name == "decode attention" else inputs(T, D)
    plan = plan_of(fn, params, x, *rest)
    assert plan.sites == ()
    refusals = {rejection.name: rejection.refusal for rejection in plan.rejected}
    assert refusals[LAST.get(name, "p/down")] is refusal


def test_the_same_reason_each_time():
    """Also where several operations are to blame: nodes are in sets, whose order is by chance."""

    def fn(p, x):
        return jax.nn.softmax(jax.nn.log_softmax(x @ p["up"])) @ p["down"]

    assert len({plan_of(fn, PLAIN, inputs(T, D)).rejected for _ in range(12)}) == 1


def _dynamic(p, x):
    """int8 by int8: both inputs are rounded to the range of their greatest entry."""

    def linear(x, w, scale):
        reach = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-6) / 127
        x = jnp.clip(jnp.round(x / reach), -127, 127).astype(jnp.int8)
        y = lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
        return y.astype(jnp.float32) * reach * scale

    return linear(jax.nn.silu(linear(x, p["up"], p["s"])), p["down"], 0.05)


INT8 = {
    "up": jnp.asarray(np.round(20 * UP), jnp.int8),
    "down": jnp.asarray(np.round(20 * DOWN), jnp.int8),
}
UNSUPPORTED = {
    "dynamic int8": (_dynamic, INT8 | {"s": jnp.full(F, 0.05)}, "dynamic quantization"),
    "experts with biases": (
        lambda p, x: jnp.einsum(
            "eth,ehd->etd",
            jax.nn.relu(jnp.einsum("td,edh->eth", x, p["up"]) + p["b"][:, None]),
            p["down"],
        ),
        {"up": jnp.stack([UP] * 4), "b": inputs(4, F), "down": jnp.stack([DOWN] * 4)},
        "4 experts have biases",
    ),
    "experts, summed up": (
        lambda p, x: jnp.einsum(
            "teh,ehd->td", jax.nn.silu(jnp.einsum("td,edh->teh", x, p["up"])), p["down"]
        ),
        {"up": jnp.stack([UP] * 4), "down": jnp.stack([DOWN] * 4)},
        "4 experts compute is summed up",
    ),
    "experts of sorted tokens": (
        lambda p, x: lax.ragged_dot(
            jax.nn.relu(lax.ragged_dot(x, p["up"], p["sizes"])), p["down"], p["sizes"]
        ),
        {"up": jnp.stack([UP] * 2), "down": jnp.stack([DOWN] * 2), "sizes": jnp.array([1, 2])},
        "known at run time",
    ),
    "a weight for each token": (
        lambda p, x: jax.nn.relu(x @ p["up"] + p["table"]) @ p["down"],
        PLAIN | {"table": inputs(T, F)},
        "differs from token to token",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported(name):
    """A block of a form that is not rewritten is refused as such, by the layer that ends it."""
    fn, params, reason = UNSUPPORTED[name]
    plan = plan_of(fn, params, inputs(T, D))
    assert plan.sites == ()
    (down,) = (rejection for rejection in plan.rejected if rejection.name == "p/down")
    assert down.refusal is Refusal.UNSUPPORTED
    assert reason in down.reason


def test_code_that_does_not_run_by_itself(monkeypatch):
    """It is a near miss with the error's text, not an exception out of `inspect`."""

    def refuse(region):
        raise NotImplementedError("no rule\nfor this")

    monkeypatch.setattr("hire_rewrite.sites.ffn.match.classify", refuse)
    plan = plan_of(plain(), PLAIN, inputs(T, D))
    assert plan.sites == ()
    reasons = {rejection.name: rejection.reason for rejection in plan.rejected}
    assert reasons["p/down"].startswith("its code does not run by itself: no rule")


def _of_tokens(case, tokens):
    """The arguments of a case with another number of tokens, in place of its T."""
    return [
        jax.ShapeDtypeStruct(tuple(tokens if size == T else size for size in a.shape), a.dtype)
        for a in case.args
    ]


EDGES = [
    case
    for case in FFN_CASES
    if any(word in case.name for word in ("bias", "fused", "einsum", "scale", "expert", "mapped"))
    and "interleaved" not in case.name  # a strided index, which JAX gathers where sizes are symbols
    and "topk" not in case.expected["activation"]
]


@pytest.mark.parametrize("tokens", ["none", "symbolic"])
@pytest.mark.parametrize("case", EDGES, ids=str)
def test_any_number_of_tokens(case, tokens):
    """Without tokens, and where their number is a symbol of `jax.export`."""
    number = 0 if tokens == "none" else jax.export.symbolic_shape("tokens")[0]
    _, (found,) = found_in(case.fn, case.params, *_of_tokens(case, number))
    assert found.match.activation.name == case.expected["activation"]
    assert found.match.region.size == case.expected["width"]
    assert (found.tokens == number) or case.expected["tokens"] != T


def test_a_selection_is_tried_on_tokens():
    """Whether few are selected is found out by running it; without tokens it is left alone."""
    rows = jax.export.symbolic_shape("tokens")[0]
    fn = plain(lambda h: jnp.where(h >= lax.top_k(h, 8)[0][..., -1:], h, 0))
    _, found = found_in(fn, PLAIN, jax.ShapeDtypeStruct((rows, D), jnp.float32))
    assert found == ()


SMALL_FLOATS = [name for name in dir(jnp) if name.startswith(("float8_", "float4_"))]


@pytest.mark.parametrize("dtype", SMALL_FLOATS)
def test_small_floats_with_their_bare_cast(dtype):
    shapes = {name: jax.ShapeDtypeStruct(w.shape, dtype) for name, w in PLAIN.items()}
    fn = lambda p, x: plain()({name: w.astype(x.dtype) for name, w in p.items()}, x)  # noqa: E731
    _, (found,) = found_in(fn, shapes, inputs(T, D))
    assert found.match.activation.name == "relu"
    # Rows are stored as they are, and cast after reading.
    assert [narrow(linear.weight).dtype for linear in found.match.linears] == [dtype, dtype]
