"""Ways to write an FFN block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.cases import Case, D, F, T, inputs, rand
from tests.cases_activation import ACTIVATIONS, SPELLINGS, custom_relu, custom_silu, gelu, gelu_tanh

UP, GATE, DOWN = rand(D, F, seed=1), rand(D, F, seed=2), rand(F, D, seed=3)
B1, B2, SCALE = inputs(F, seed=4), inputs(D, seed=5), jnp.abs(inputs(F, seed=6)) + 0.5
PLAIN = {"up": UP, "down": DOWN}
GATED = {"up": UP, "gate": GATE, "down": DOWN}
BIASED = {"up": UP, "b1": B1, "down": DOWN, "b2": B2}
LAYERS = 4
STACK = {"up": rand(LAYERS, D, F, seed=8), "down": rand(LAYERS, F, D, seed=9)}
NEST = jax.tree.map(lambda w: w.reshape(2, 2, *w.shape[1:]), STACK)


def plain(act: Callable[[Any], Any] = jax.nn.relu) -> Callable[..., Any]:
    return lambda p, x: act(x @ p["up"]) @ p["down"]


def gated(act: Callable[[Any], Any] = jax.nn.silu) -> Callable[..., Any]:
    return lambda p, x: (act(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def up_first(act: Callable[[Any], Any] = jax.nn.silu) -> Callable[..., Any]:
    def fn(p, x):
        up = x @ p["up"]
        return (up * act(x @ p["gate"])) @ p["down"]

    return fn


def _case(title, fn, params=None, args=None, **expected):
    common = {"kind": "ffn", "d_model": D, "width": F, "gated": False, "activation": "relu"}
    common |= {"repeats": 1, "experts": 1, "tokens": T}
    args = (inputs(T, D),) if args is None else args
    return Case(title, fn, PLAIN if params is None else params, args, common | expected)


def linear(x, w):
    return jax.jit(lambda a, b: a @ b)(x, w)


def _transposed(params):
    return {name: w.T for name, w in params.items()}


def _halves(act, first, split):
    def fn(p, x):
        a, b = split(x @ p["fused"])
        return (act(a) * b if first else a * act(b)) @ p["down"]

    return fn


SPLITS = {
    "slices": lambda h: (h[..., :F], h[..., F:]),
    "jnp.split": lambda h: jnp.split(h, 2, axis=-1),
    "lax.split": lambda h: lax.split(h, (F, F), h.ndim - 1),
}


def _scan(p, x):
    def body(c, w):
        return c + jax.nn.relu(c @ w["up"]) @ w["down"], None

    return lax.scan(body, x, p)[0]


def _scan_checkpoint(p, x):
    @jax.checkpoint
    def layer(c, w):
        return c + jax.nn.relu(c @ w["up"]) @ w["down"]

    return lax.scan(lambda c, w: (layer(c, w), None), x, p)[0]


def _nested_scan(p, x):
    return lax.scan(lambda c, w: (_scan(w, c), None), x, p)[0]


def _fori(p, x):
    def body(i, c):
        return c + jax.nn.relu(c @ p["up"][i]) @ p["down"][i]

    return lax.fori_loop(0, LAYERS, body, x)


def _fori_nested(p, x):
    def body(i, c):
        def inner(j, c):
            return c + jax.nn.relu(c @ p["up"][i, j]) @ p["down"][i, j]

        return lax.fori_loop(0, 2, inner, c)

    return lax.fori_loop(0, 2, body, x)


def _reverse_counter(p, x):
    def body(carry, _):
        c, i = carry
        return (c + jax.nn.relu(c @ p["up"][i]) @ p["down"][i], i + 1), None

    return lax.scan(body, (x, 0), length=LAYERS, reverse=True)[0][0]


def _dynamic_index(p, x):
    def body(c, i):
        up = lax.dynamic_index_in_dim(p["up"], i, keepdims=False)
        down = lax.dynamic_index_in_dim(p["down"], i, keepdims=False)
        return c + jax.nn.relu(c @ up) @ down, None

    return lax.scan(body, x, jnp.arange(LAYERS))[0]


def _tokens_scan(p, x):
    return lax.scan(lambda c, row: (c, plain()(p, row)), 0, x)[1]


def _while(p, x):
    def body(state):
        c, n = state
        return plain()(p, c), n - 1

    return lax.while_loop(lambda s: s[1] > 0, body, (x, 2))[0]


def _while_carried(p, x):
    def body(state):
        c, n, p = state
        return plain()(p, c), n - 1, p

    return lax.while_loop(lambda s: s[1] > 0, body, (x, 2, p))[0]


def _carried(p, x):
    def body(i, state):
        def inner(state, _):
            p, c = state
            return (p, plain()(p, c)), None

        return lax.scan(inner, state, length=2)[0]

    return lax.fori_loop(0, 3, body, (p, x))[1]


def _carried_in_while(p, x):
    def body(state):
        def inner(state):
            p, c, m = state
            return p, plain()(p, c), m - 1

        p, c, n = state
        p, c, _ = lax.while_loop(lambda s: s[2] > 0, inner, (p, c, 2))
        return p, c, n - 1

    return lax.while_loop(lambda s: s[2] > 0, body, (p, x, 2))[1]


def _after_carry(p, x):
    def body(i, state):
        p, c = state
        return p, jnp.tanh(c) + p["up"][0, 0]

    p, c = lax.fori_loop(0, 2, body, (p, x))
    return plain()(p, c)


def _cond(p, x):
    return lax.cond(x[0, 0] > 100, lambda x: x, lambda x: plain()(p, x), x)


def _closed(x):
    return plain()(PLAIN, x)


def _einsum(spec1, spec2):
    return lambda p, x: jnp.einsum(spec2, jax.nn.relu(jnp.einsum(spec1, x, p["up"])), p["down"])


def _left(p, x):
    return (p["down"] @ jax.nn.relu(p["up"] @ x.T)).T


def _upcast(p, x):
    up, down = p["up"].astype(jnp.float32), p["down"].astype(jnp.float32)
    return jax.nn.relu(x @ up) @ down


def _accumulate(p, x):
    h = jnp.matmul(x, p["up"], preferred_element_type=jnp.float32)
    h = jax.nn.relu(h).astype(jnp.bfloat16)
    return jnp.matmul(h, p["down"], preferred_element_type=jnp.float32)


def _cast_twice(p, x):
    gate = x.astype(jnp.float32) @ p["gate"]
    up = x.astype(jnp.float32) @ p["up"]
    return (jax.nn.silu(gate) * up) @ p["down"]


def _lora(p, x):
    return jax.nn.relu(x @ (p["up"] + p["a"] @ p["b"])) @ p["down"]


def _dequantized(p, x):
    return jax.nn.relu(x @ (p["q"].astype(jnp.float32) * p["s"])) @ p["down"]


def _scaled(p, x):
    return jax.nn.relu((x @ p["up"]) * p["scale"] + p["b1"]) @ p["down"]


def _scaled_gated(p, x):
    return (jax.nn.silu(x @ p["gate"] * p["s1"]) * (x @ p["up"] * p["s2"])) @ p["down"]


def _vmapped(p, x):
    return jax.vmap(plain(), in_axes=(None, 0))(p, x)


def _modules(p, x):
    """Each linear layer mapped over tokens by itself, as in libraries of modules for one token."""
    h = jax.vmap(lambda x: p["up"] @ x + p["b1"])(x)
    return jax.vmap(lambda h: p["down"] @ h + p["b2"])(jax.nn.relu(h))


def _normed_twice(p, x):
    def norm(x):
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)

    return (jax.nn.silu(norm(x) @ p["gate"]) * (norm(x) @ p["up"])) @ p["down"]


def _residual(p, x):
    n = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * p["norm"]
    return x + gated()(p, n)


def _threshold(h):
    """The eight greatest positions, by the least of them."""
    return jnp.where(h >= lax.top_k(h, 8)[0][..., -1:], h, 0)


def _scattered(h):
    values, places = lax.top_k(h, 8)
    return jnp.zeros_like(h).at[jnp.arange(h.shape[0])[:, None], places].set(values)


def _sorted(h):
    return jnp.where(h > jnp.sort(h, -1)[..., -9:-8], h, 0)


def _statistical(h):
    """Gemma 3n's and Spark Transformer's."""
    cutoff = h.mean(-1, keepdims=True) + 1.0 * h.std(-1, keepdims=True)
    return jax.nn.gelu(jax.nn.relu(h - cutoff))


SELECTIONS = {"top-k, threshold": _threshold, "top-k, scattered": _scattered, "sorted": _sorted}


def _experts(up, down, act=jax.nn.relu):
    return lambda p, x: jnp.einsum(down, act(jnp.einsum(up, x, p["up"])), p["down"])


def _gated_experts(p, x):
    hidden = jax.nn.silu(jnp.einsum("ecd,edh->ech", x, p["gate"]))
    hidden = hidden * jnp.einsum("ecd,edh->ech", x, p["up"])
    return jnp.einsum("ech,ehd->ecd", hidden, p["down"])


def _weighted_experts(p, x, w):
    """All experts on all tokens, weighted by a router between the products."""
    hidden = jax.nn.relu(jnp.einsum("td,edh->teh", x, p["up"])) * w[..., None]
    return jnp.einsum("teh,ehd->etd", hidden, p["down"])


EXPERTS = {
    "up": rand(4, D, F, seed=21), "gate": rand(4, D, F, seed=22), "down": rand(4, F, D, seed=23)
}  # fmt: skip


def _one_hot_mask(h):
    return h * jax.nn.one_hot(lax.top_k(h, 8)[1], F).sum(-2)


def _convolutions(p, x):
    def conv(x, w):
        kind = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=kind)

    return conv(jax.nn.relu(conv(x, p["up"])), p["down"])


def _parallel(p, x):
    """PaLM's block: one product for queries, keys, values and both halves of the FFN."""
    fused = x @ p["fused"] + p.get("b", 0)
    q, k, v, gate, up = jnp.split(fused, (D, 2 * D, 3 * D, 3 * D + F), axis=-1)
    attended = jax.nn.softmax(q @ k.T / 4) @ v
    return attended + (jax.nn.silu(gate) * up) @ p["down"]


def _joined(p, x):
    """One product for all inputs, and one for both outputs."""
    q, k, v, gate, up = jnp.split(x @ p["fused"], (D, 2 * D, 3 * D, 3 * D + F), axis=-1)
    attended = jax.nn.softmax(q @ k.T / 4) @ v
    return jnp.concatenate([attended, jax.nn.silu(gate) * up], -1) @ p["out"]


LAYOUT = inputs(2, T, D)
PAIR = jnp.stack([GATE, UP])
FUSED = [
    ("[2, d, f]", "td,gdh->gth", PAIR, lambda h: h),
    ("[2, d, f], axis of two last but one", "td,gdh->tgh", PAIR, lambda h: (h[:, 0], h[:, 1])),
    ("[2, f, d]", "td,ghd->tgh", PAIR.swapaxes(1, 2), lambda h: (h[:, 0], h[:, 1])),
    ("[d, 2, f]", "td,dgh->tgh", PAIR.swapaxes(0, 1), lambda h: jnp.split(h, 2, axis=1)),
    ("[d, 2, f], unstacked", "td,dgh->tgh", PAIR.swapaxes(0, 1),
     lambda h: jnp.unstack(h, axis=1)),
    ("[d, f, 2]", "td,dhg->thg", jnp.moveaxis(PAIR, 0, 2), lambda h: (h[..., 0], h[..., 1])),
    ("[d, 2 f], reshaped", "td,dh->th", jnp.concatenate([GATE, UP], 1),
     lambda h: jnp.moveaxis(h.reshape(-1, 2, F), 1, 0)),
    ("interleaved", "td,dh->th", jnp.stack([GATE, UP], 2).reshape(D, -1),
     lambda h: (h[:, ::2], h[:, 1::2])),
    ("interleaved, reshaped", "td,dh->th", jnp.stack([GATE, UP], 2).reshape(D, -1),
     lambda h: (h.reshape(-1, F, 2)[..., 0], h.reshape(-1, F, 2)[..., 1])),
]  # fmt: skip
BF16 = jax.tree.map(lambda w: w.astype(jnp.bfloat16), GATED)
Q = {"q": jnp.asarray(np.round(20 * UP), jnp.int8), "s": SCALE / 20, "down": DOWN}

ACTIVATION_CASES = [
    *(_case(f"plain {n}", plain(a), activation=n) for n, a in ACTIVATIONS.items()),
    *(
        _case(f"gated {n}", gated(ACTIVATIONS[n]), GATED, gated=True, activation=n)
        for n in ACTIVATIONS
    ),
    *(
        _case(f"up first {n}", up_first(ACTIVATIONS[n]), GATED, gated=True, activation=n)
        for n in ACTIVATIONS
    ),
    *(_case(f"spelled {n}", plain(a), activation=name) for n, (name, a) in SPELLINGS.items()),
]

FFN_CASES = [
    *(_case(f"{form} {n}", fn(ACTIVATIONS[n]), GATED, gated=form != "plain", activation=n)
      for form, fn in {"plain": plain, "gated": gated, "up first": up_first}.items()
      for n in ("relu", "silu")),
    _case("custom_jvp", plain(custom_relu)),
    _case("custom_vjp", plain(custom_silu), activation="silu"),
    _case("optimization_barrier", lambda p, x: (lambda g, u: (jax.nn.silu(g) * u) @ p["down"])(
        *lax.optimization_barrier((x @ p["gate"], x @ p["up"]))), GATED, gated=True,
        activation="silu"),
    _case("bilinear", gated(lambda h: h), GATED, gated=True, activation="bilinear"),
    *(
        _case(f"{h} bias {t} tokens", fn, BIASED, (inputs(t, D),), tokens=t)
        for t in (1, T)
        for h, fn in {
            "first": lambda p, x: jax.nn.relu(x @ p["up"] + p["b1"]) @ p["down"],
            "second": lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"] + p["b2"],
            "both": lambda p, x: jax.nn.relu(x @ p["up"] + p["b1"]) @ p["down"] + p["b2"],
        }.items()
    ),
    _case(
        "gated with biases",
        lambda p, x: (jax.nn.silu(x @ p["gate"] + p["b1"]) * (x @ p["up"] + p["b3"])) @ p["down"],
        GATED | {"b1": B1, "b3": B1 * 2},
        gated=True,
        activation="silu",
    ),
    _case(
        "biased vector",
        lambda p, x: jax.nn.relu(x @ p["up"] + p["b1"]) @ p["down"],
        BIASED,
        (inputs(D),),
        tokens=1,
    ),
    _case(
        "biased batch",
        lambda p, x: jax.nn.relu(x @ p["up"] + p["b1"]) @ p["down"],
        BIASED,
        (LAYOUT,),
        tokens=2 * T,
    ),
    # layouts
    _case("vector", plain(), args=(inputs(D),), tokens=1),
    _case("batch", plain(), args=(LAYOUT,), tokens=2 * T),
    _case("out, in", lambda p, x: plain()(_transposed(p), x), _transposed(PLAIN)),
    _case("einsum", _einsum("td,dh->th", "th,hd->td")),
    _case("einsum out, in", _einsum("td,hd->th", "th,dh->td"), _transposed(PLAIN)),
    _case("einsum hidden first", _einsum("td,dh->ht", "ht,hd->td")),
    _case("einsum mixed", _einsum("bsd,hd->bhs", "bhs,hd->sbd"), {"up": UP.T, "down": DOWN},
          (LAYOUT,), tokens=2 * T),
    _case("weights on the left", _left, _transposed(PLAIN)),
    _case("left of a vector", lambda p, x: p["down"] @ jax.nn.relu(p["up"] @ x),
          _transposed(PLAIN), (inputs(D),), tokens=1),
    _case("features first", lambda p, x: jnp.einsum("dt,dh->th", x, p["up"]).clip(0) @ p["down"],
          args=(inputs(T, D).T,)),
    _case("tokens merged", lambda p, x: plain()(p, x.reshape(-1, D)).reshape(x.shape),
          args=(LAYOUT,), tokens=2 * T),
    _case("tied", lambda p, x: jax.nn.relu(x @ p["up"]) @ p["up"].T, {"up": UP}, name="p/up"),
    # calls
    _case("jit", jax.jit(plain())),
    _case("jit around each linear", lambda p, x: linear(
        jax.nn.relu(linear(x, p["up"])), p["down"])),
    _case("jit around the first", lambda p, x: jax.jit(lambda p, x: jax.nn.relu(x @ p["up"]))(p, x)
          @ p["down"]),
    _case("jit around the second", lambda p, x: jax.jit(lambda h: h @ p["down"])(
        jax.nn.relu(x @ p["up"]))),
    _case("checkpoint", jax.checkpoint(plain())),
    _case("checkpoint, weights closed over", lambda p, x: jax.checkpoint(
        lambda x: plain()(p, x))(x)),
    _case("vmap over tokens", _vmapped, tokens=T),
    _case("named scope", jax.named_call(plain(), name="mlp"), name="mlp:p"),
    # loops
    _case("scan", _scan, STACK, repeats=LAYERS),
    _case("scan of checkpoint", _scan_checkpoint, STACK, repeats=LAYERS),
    _case("nested scan", _nested_scan, NEST, repeats=LAYERS),
    _case("reverse scan", lambda p, x: lax.scan(
        lambda c, w: (c + plain()(w, c), None), x, p, reverse=True)[0], STACK, repeats=LAYERS),
    _case("unrolled scan", lambda p, x: lax.scan(
        lambda c, w: (c + plain()(w, c), None), x, p, unroll=2)[0], STACK, repeats=LAYERS),
    _case("fori_loop", _fori, STACK, repeats=LAYERS),
    _case("nested fori_loop", _fori_nested, NEST, repeats=LAYERS),
    _case("reverse scan with a counter", _reverse_counter, STACK, repeats=LAYERS),
    _case("scan over layer numbers", _dynamic_index, STACK, repeats=LAYERS),
    _case("scan over tokens", _tokens_scan, repeats=T, tokens=1),
    _case("while_loop", _while),
    _case("while_loop with carried weights", _while_carried),
    _case("loops with carried weights", _carried, repeats=6),
    _case("while loops with carried weights", _carried_in_while),
    _case("after a loop that carried the weights", _after_carry),
    _case("cond", _cond),
    _case("jit, scan, checkpoint, cond", jax.jit(lambda p, x: lax.scan(
        jax.checkpoint(lambda c, w: (_cond(w, c), None)), x, p)[0]), STACK, repeats=LAYERS),
    # fused
    *(
        _case(f"fused by {n}, gate {'first' if first else 'second'}",
              _halves(jax.nn.silu, first, split),
              {"fused": jnp.concatenate([GATE, UP], 1), "down": DOWN},
              gated=True, activation="silu")
        for n, split in SPLITS.items()
        for first in (True, False)
    ),
    *(
        _case(f"fused, {n}", lambda p, x, cut=cut, spec=spec: (lambda h: (
            jax.nn.silu(cut(h)[0]) * cut(h)[1]) @ p["down"])(jnp.einsum(spec, x, p["fused"])),
            {"fused": weight, "down": DOWN}, gated=True, activation="silu")
        for n, spec, weight, cut in FUSED
    ),
    _case("fused over two axes with biases", lambda p, x: (lambda h: (
        jax.nn.silu(h[:, 0]) * h[:, 1]) @ p["down"])(jnp.einsum("td,gdh->tgh", x, p["fused"])
        + p["b"]), {"fused": PAIR, "b": inputs(2, F), "down": DOWN}, gated=True,
        activation="silu"),
    _case("fused over two axes in a scan", lambda p, x: lax.scan(lambda c, w: (c + (lambda h: (
        jax.nn.silu(h[:, 0]) * h[:, 1]) @ w["down"])(jnp.einsum("td,dgh->tgh", c, w["fused"])),
        None), x, p)[0], {"fused": rand(LAYERS, D, 2, F), "down": STACK["down"]}, gated=True,
        activation="silu", repeats=LAYERS),
    _case("down to two axes", lambda p, x: jnp.einsum("th,hij->tij", jax.nn.relu(x @ p["up"]),
          p["down"]), {"up": UP, "down": DOWN.reshape(F, 4, D // 4)}),
    _case("up from two axes", lambda p, x: jax.nn.relu(jnp.einsum("tij,ijh->th", x, p["up"]))
          @ p["down"], {"up": UP.reshape(4, D // 4, F), "down": DOWN}, (inputs(T, 4, D // 4),)),
    _case("convolutions over one position", _convolutions, {"up": UP[None], "down": DOWN[None]},
          (LAYOUT,), tokens=2 * T),
    _case("fused with queries, keys and values", _parallel, {"fused": rand(D, 3 * D + 2 * F),
          "down": DOWN}, gated=True, activation="silu"),
    _case("fused with queries, keys and values, biased", _parallel, {"fused": rand(D, 3 * D + 2
          * F), "b": inputs(3 * D + 2 * F), "down": DOWN}, gated=True,
          activation="silu"),
    _case("joined with another input", lambda p, x: jnp.concatenate(
        [jax.nn.relu(x @ p["up"]), x[:, :4]], -1) @ p["out"],
        {"up": UP, "out": rand(F + 4, D, seed=4)}),
    *(_case(n, plain(select), activation="topk") for n, select in SELECTIONS.items()),
    _case("top-k of a gated block", gated(_threshold), GATED, gated=True, activation="topk"),
    _case("top-k with a bias", lambda p, x: _threshold(x @ p["up"] + p["b1"]) @ p["down"],
          PLAIN | {"b1": B1}, activation="topk"),
    _case("statistical top-k", gated(_statistical), GATED, gated=True,
          activation="statistical_topk"),
    _case("statistical top-k of a fused product", _halves(_statistical, False, SPLITS["slices"]),
          {"fused": jnp.concatenate([GATE, UP], 1), "down": DOWN}, gated=True,
          activation="statistical_topk"),
    _case("top-k in a scan", lambda p, x: lax.scan(
        lambda c, w: (c + plain(_threshold)(w, c), None), x, p)[0], STACK, repeats=LAYERS,
        activation="topk"),
    _case("experts in a batch", _experts("etd,edh->eth", "eth,ehd->etd"), EXPERTS,
          (inputs(4, 2, D),), experts=4, tokens=2),
    _case("gated experts", _gated_experts, EXPERTS, (inputs(4, 3, D),), experts=4, tokens=3,
          gated=True, activation="silu"),
    _case("all experts on all tokens", _experts("td,edh->teh", "teh,ehd->ted"), EXPERTS,
          experts=4, tokens=T),
    _case("weighted experts", _weighted_experts, EXPERTS,
          args=(inputs(T, D), inputs(T, 4, seed=1)), experts=4, tokens=T),
    _case("layers of experts", lambda p, x: lax.scan(lambda c, w: (c + _experts(
        "etd,edh->eth", "eth,ehd->etd")(w, c), None), x, p)[0],
        jax.tree.map(lambda w: jnp.stack([w, 2 * w]), EXPERTS), (inputs(4, 2, D),), experts=4,
        tokens=2, repeats=2),
    _case("top-k by one-hot rows", plain(_one_hot_mask), activation="topk"),
    _case("fused with attention at both ends", _joined, {"fused": rand(D, 3 * D + 2 * F),
          "out": rand(D + F, D, seed=4)}, gated=True, activation="silu"),
    _case("fused in a scan", lambda p, x: lax.scan(
        lambda c, w: (c + _halves(jax.nn.relu, False, SPLITS["slices"])(w, c), None), x, p)[0],
        {"fused": rand(LAYERS, D, 2 * F), "down": STACK["down"]}, gated=True, repeats=LAYERS),
    _case("fused with a bias", lambda p, x: (lambda h: (jax.nn.gelu(h[:, :F], approximate=False)
          * h[:, F:]) @ p["down"])(x @ p["fused"] + p["b"]),
          {"fused": jnp.concatenate([GATE, UP], 1), "b": inputs(2 * F), "down": DOWN},
          gated=True, activation="gelu"),
    # weights of weights, vectors and scalars
    _case("casts of bfloat16 weights", _upcast, {k: BF16[k] for k in ("up", "down")}),
    _case("bfloat16", gated(), BF16, (inputs(T, D, dtype=jnp.bfloat16),), gated=True,
          activation="silu"),
    _case("float32 accumulation", _accumulate, {k: BF16[k] for k in ("up", "down")},
          (inputs(T, D, dtype=jnp.bfloat16),)),
    _case("input cast twice", _cast_twice, GATED, (inputs(T, D, dtype=jnp.bfloat16),), gated=True,
          activation="silu"),
    _case("low-rank update of a weight", _lora, PLAIN | {"a": rand(D, 2), "b": rand(2, F)}),
    _case("dequantized weight", _dequantized, Q),
    _case("scale and bias after the product", _scaled, PLAIN | {"scale": SCALE, "b1": B1}),
    _case("scales in a gated block", _scaled_gated, GATED | {"s1": SCALE, "s2": SCALE + 1},
          gated=True, activation="silu"),
    _case("scaled hidden", lambda p, x: (jax.nn.relu(x @ p["up"]) * p["scale"]) @ p["down"],
          PLAIN | {"scale": SCALE}),
    _case("token mask", lambda p, x, m: (jax.nn.relu(x @ p["up"]) * m[:, None]) @ p["down"],
          args=(inputs(T, D), jnp.array([1.0, 0.0, 2.0]))),
    _case("learned swish", lambda p, x: (lambda h: h * jax.nn.sigmoid(p["beta"] * h))(x @ p["up"])
          @ p["down"], PLAIN | {"beta": jnp.float32(1.3)}, activation="silu"),
    _case("bias reshaped to the rank", lambda p, x: gelu_tanh(
        x @ p["up"] + jnp.reshape(p["b1"], (1, -1))) @ p["down"], BIASED, activation="gelu_tanh"),
    _case("layers mapped one by one", _modules,
          {"up": UP.T, "b1": B1, "down": DOWN.T, "b2": B2}, name="p/down"),
    _case("gate and up stacked", lambda p, x: (gelu(x @ p["w"][0]) * (x @ p["w"][1])) @ p["down"],
          {"w": jnp.stack([GATE, UP]), "down": DOWN}, gated=True, activation="gelu"),
    _case("normed twice", _normed_twice, GATED, gated=True, activation="silu"),
    _case("normed residual", _residual, GATED | {"norm": inputs(D)}, gated=True,
          activation="silu"),
]  # fmt: skip
