"""Ways to write a vocabulary head, and to use its logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.cases import Case, D, T, V, inputs, rand
from tests.cases_ffn import LAYOUT, linear

EMBED, HEAD = rand(V, D, seed=11), rand(D, V, seed=12)
TIED, UNTIED = {"embed": EMBED}, {"head": HEAD}
BIAS = inputs(V, seed=13)
MASK = jnp.asarray(np.random.default_rng(14).random(V) < 0.7)


def _head_case(title, fn, params=None, args=None, epilogue=(), outputs=1, **expected):
    common = {"kind": "head", "d_model": D, "width": V, "gated": False, "activation": ""}
    common |= {"repeats": 1, "tokens": T, "epilogue": epilogue, "outputs": outputs}
    args = (inputs(T, D),) if args is None else args
    return Case(title, fn, UNTIED if params is None else params, args, common | expected)


def _of_logits(consume):
    return lambda p, x, *rest: consume(x @ p["head"], *rest)


def _soft_cap(z):
    return 30 * jnp.tanh(z / 30)


def _cross_entropy(z, labels):
    picked = jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], 1)
    return -picked.mean()


def _one_hot_loss(z, labels):
    return -(jax.nn.log_softmax(z) * jax.nn.one_hot(labels, V)).sum(-1).mean()


def _top_k_sample(z, key):
    values, tokens = lax.top_k(z, 8)
    return jnp.take_along_axis(tokens, jax.random.categorical(key, values)[:, None], 1)


def _top_p(z):
    probabilities = jax.nn.softmax(z)
    ordered = jnp.sort(probabilities)[:, ::-1]
    cut = jnp.where(jnp.cumsum(ordered, -1) < 0.9, ordered, 1.0).min(-1, keepdims=True)
    return jnp.where(probabilities >= cut, z, -jnp.inf).argmax(-1)


def _generate(p, x):
    def body(c, _):
        logits = c @ p["embed"].T
        token = logits.argmax(-1)
        return c + p["embed"][token], token

    return lax.scan(body, x, length=3)[1]


def _generate_logits_carry(p, x):
    """The carry hands the last logits out; no iteration reads them."""

    def body(state, _):
        c, _ = state
        logits = c @ p["embed"].T
        return (c + p["embed"][logits.argmax(-1)], logits), None

    return lax.scan(body, (x, jnp.zeros((T, V))), length=3)[0]


def _generate_while(p, x):
    def body(state):
        c, _, n = state
        logits = c @ p["embed"].T
        return c + p["embed"][logits.argmax(-1)], logits, n - 1

    return lax.while_loop(lambda s: s[2] > 0, body, (x, jnp.zeros((T, V)), 3))[:2]


def _generate_stack(p, x):
    def body(c, _):
        logits = c @ p["embed"].T
        return c + p["embed"][logits.argmax(-1)], logits

    return lax.scan(body, x, length=2)


def _sampled_next_time(p, x):
    """Logits are carried, and the next iteration samples from them."""

    def body(state, _):
        c, logits = state
        c = c + p["embed"][logits.argmax(-1)]
        return (c, c @ p["embed"].T), None

    return lax.scan(body, (x, jnp.zeros((T, V))), length=3)[0][0]


def _between(p, x, t):
    """A jitted function reads the logits and makes what the logits are scaled by later."""
    logits = x @ p["head"]
    best, scale = jax.jit(lambda z, t: (z.argmax(-1), t * t))(logits, t)
    return best, (logits * scale).argmax(-1)


def _guarded(p, x):
    logits = x @ p["head"]
    return lax.cond(x[0, 0] > 100, lambda z: z[:, ::-1].argmax(-1), lambda z: z.argmax(-1), logits)


KEY = jax.random.key(3)

HEAD_CASES = [
    _head_case("d, V", _of_logits(lambda z: z), name="p/head"),
    _head_case("V, d", lambda p, x: x @ p["w"].T, {"w": EMBED}, name="p/w"),
    _head_case("tied", lambda p, t: p["embed"][t] @ p["embed"].T, TIED, (jnp.arange(T),),
               name="p/embed"),
    _head_case("weight on the left", lambda p, x: p["w"] @ x, {"w": EMBED}, (inputs(D),),
               tokens=1, name="p/w"),
    _head_case("vector", _of_logits(lambda z: z), args=(inputs(D),), tokens=1),
    _head_case("batch", _of_logits(lambda z: z), args=(LAYOUT,), tokens=2 * T),
    _head_case("padding cut off", _of_logits(lambda z: z[..., :100].argmax(-1)),
               epilogue=("slice",)),
    _head_case("biased, capped, padding cut off", lambda p, x: _soft_cap(
        x @ p["head"] + p["bias"])[:, :100], UNTIED | {"bias": BIAS},
        epilogue=("add", "div", "tanh", "mul", "slice"), name="p/head"),
    _head_case("written to a buffer", _of_logits(
        lambda z, b: lax.dynamic_update_slice(b, z[None], (1, 0, 0))),
        args=(inputs(T, D), jnp.zeros((2, T, V))), epilogue=("broadcast_in_dim",)),
    _head_case("scattered to a buffer", _of_logits(lambda z, b: b.at[:, 1].set(z)),
               args=(inputs(T, D), jnp.zeros((T, 2, V)))),
    _head_case("extended", lambda p, x: jnp.concatenate([x @ p["head"], x], -1)),
    _head_case("padded", _of_logits(
        lambda z: jnp.pad(z, ((0, 0), (0, 3)), constant_values=-jnp.inf).argmax(-1))),
    _head_case("beams reordered", _of_logits(lambda z, i: jax.nn.log_softmax(z)[i].max()),
               args=(inputs(T, D), jnp.array([2, 0, 0]))),
    _head_case("split by tokens", _of_logits(lambda z: [a.argmax() for a in jnp.split(z, T)])),
    _head_case("one-hot einsum", _of_logits(lambda z, t: -jnp.einsum(
        "tv,tv->t", jax.nn.log_softmax(z), jax.nn.one_hot(t, V))),
        args=(inputs(T, D), jnp.arange(T))),
    _head_case("one token forbidden", _of_logits(
        lambda z, n: z.at[:, 3].set(jnp.where(n < 5, -jnp.inf, z[:, 3])).argmax(-1)),
        args=(inputs(T, D), 2), epilogue=("slice",), outputs=2),
    _head_case("one token's probability", _of_logits(lambda z: jax.nn.softmax(z)[:, 3])),
    _head_case("token chosen by one-hot rows", _of_logits(lambda z, i: jnp.einsum(
        "tv,bt->bv", z, jax.nn.one_hot(i, T)).argmax(-1)), args=(inputs(T, D), jnp.array([1]))),
    _head_case("last token", _of_logits(lambda z: z[:, -1]), args=(LAYOUT,), tokens=2 * T),
    _head_case("some token", _of_logits(lambda z, i: lax.dynamic_index_in_dim(z, i, 0)),
               args=(inputs(T, D), 1)),
    _head_case("tokens penalized", _of_logits(
        lambda z, t: z.at[jnp.arange(T)[:, None], t].add(-1.0).argmax(-1)),
        args=(inputs(T, D), jnp.ones((T, 2), jnp.int32))),
    _head_case("signs penalized", _of_logits(
        lambda z: jnp.where(MASK, jnp.where(z > 0, z / 1.2, z * 1.2), z).argmax(-1)),
        epilogue=("gt", "div", "mul", "select_n", "select_n")),
    _head_case("cast", _of_logits(lambda z: z.astype(jnp.bfloat16)),
               epilogue=("convert_element_type",)),
    _head_case("soft-cap", _of_logits(_soft_cap), epilogue=("div", "tanh", "mul")),
    _head_case("bias", lambda p, x: x @ p["head"] + p["bias"], UNTIED | {"bias": BIAS},
               epilogue=("add",), name="p/head"),
    _head_case("temperature", _of_logits(lambda z, t: z / t), args=(inputs(T, D), 0.7),
               epilogue=("div",)),
    _head_case("temperatures", _of_logits(lambda z, t: z / t[:, None]),
               args=(inputs(T, D), jnp.array([0.5, 1.0, 2.0])), epilogue=("div",)),
    _head_case("fixed mask", _of_logits(lambda z: jnp.where(MASK, z, -jnp.inf)),
               epilogue=("select_n",)),
    _head_case("mask", _of_logits(lambda z, m: jnp.where(m, z, -jnp.inf)),
               args=(inputs(T, D), MASK), epilogue=("select_n",)),
    _head_case("padding masked", _of_logits(
        lambda z: jnp.where(jnp.arange(V) < V - 5, z, -jnp.inf)), epilogue=("select_n",)),
    _head_case("arg max", _of_logits(lambda z: z.argmax(-1))),
    _head_case("logits and arg max", _of_logits(lambda z: (z, z.argmax(-1)))),
    _head_case("top-k", _of_logits(lambda z: lax.top_k(z, 5))),
    _head_case("softmax", _of_logits(jax.nn.softmax)),
    _head_case("log_softmax", _of_logits(jax.nn.log_softmax)),
    _head_case("categorical", _of_logits(lambda z, key: jax.random.categorical(key, z)),
               args=(inputs(T, D), KEY), epilogue=("add",)),
    _head_case("capped, scaled, sampled", lambda p, x, key: jax.random.categorical(
        key, _soft_cap(x @ p["head"] + p["bias"]) / 0.7), UNTIED | {"bias": BIAS},
        (inputs(T, D), KEY), epilogue=("add", "div", "tanh", "mul", "div", "add"), name="p/head"),
    _head_case("raw and capped", _of_logits(lambda z: (z, _soft_cap(z).argmax(-1))),
               epilogue=("div", "tanh", "mul"), outputs=2),
    _head_case("top-k, then sampled", _of_logits(_top_k_sample), args=(inputs(T, D), KEY)),
    _head_case("top-p", _of_logits(_top_p)),
    _head_case("cross entropy", _of_logits(_cross_entropy), args=(inputs(T, D), jnp.arange(T))),
    _head_case("one-hot cross entropy", _of_logits(_one_hot_loss),
               args=(inputs(T, D), jnp.arange(T))),
    _head_case("jit", jax.jit(_of_logits(lambda z: z))),
    _head_case("jit around the product", lambda p, x: linear(x, p["head"]).argmax(-1)),
    _head_case("checkpoint", jax.checkpoint(_of_logits(_soft_cap)),
               epilogue=("div", "tanh", "mul")),
    _head_case("generation", _generate, TIED, repeats=3, name="p/embed"),
    _head_case("generation, logits carried out", _generate_logits_carry, TIED, repeats=3),
    _head_case("generation, logits stacked", _generate_stack, TIED, repeats=2),
    _head_case("generation in while_loop", _generate_while, TIED),
    _head_case("carried logits sampled", _sampled_next_time, TIED, repeats=3),
    _head_case("cond", lambda p, x: lax.cond(x[0, 0] > 100, lambda: jnp.zeros(T, jnp.int32),
                                             lambda: (x @ p["head"]).argmax(-1))),
    _head_case("cond on logits", _guarded),
    _head_case("bfloat16 head, float32 logits", lambda p, x: (x @ p["head"]).astype(jnp.float32),
               {"head": HEAD.astype(jnp.bfloat16)}, (inputs(T, D, dtype=jnp.bfloat16),)),
    _head_case("consumed before the chain ends", _between, UNTIED, (inputs(T, D), 1.5),
               epilogue=("mul",), outputs=2),
]  # fmt: skip
