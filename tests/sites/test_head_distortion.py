"""Without `min_width` only what surely is a vocabulary is taken for one."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import hire_rewrite as hire
from hire_rewrite.patterns.refusal import Refusal

D, V = 64, 4096


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


WEIGHTS = {"encode": shape(V, D), "decode": shape(D, V), "bias": shape(V)}
HIDDEN, WIDE, LABELS = shape(2, D), shape(2, V), shape(2, dtype=jnp.int32)


def heads_of(plan):
    return [site for site in plan.sites if site.kind == "head"]


def output(make):
    """A function of an output with a bias, and of what the output is compared with."""
    return lambda p, h, y: make(h @ p["decode"] + p["bias"], y)


def _huber(r):
    return jnp.where(jnp.abs(r) < 1, 0.5 * r * r, jnp.abs(r) - 0.5)


def _cross_entropy_of_labels(z, y):
    return jnp.maximum(z, 0) - z * y + jnp.log1p(jnp.exp(-jnp.abs(z)))


def _log_loss(q, y):
    return -(y * jnp.log(q) + (1 - y) * jnp.log1p(-q)).mean()


def _cosine(a, b):
    return (a * b).sum(-1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))


def _in_a_scan(p, h, y):
    def body(h, _):
        return h, jnp.square(h @ p["decode"] - y).mean()

    return lax.scan(body, h, length=2)[1]


SQUASHED = {
    "sigmoid": lambda z, y: jax.nn.sigmoid(z),
    "relu": lambda z, y: jax.nn.relu(z),
    "relu by where": lambda z, y: jnp.where(z > 0, z, 0),
    "relu by a mask": lambda z, y: z * (z > 0),
    "tanh": lambda z, y: jnp.tanh(z),
    "tanh between 0 and 1": lambda z, y: 0.5 * jnp.tanh(z) + 0.5,
    "softplus": lambda z, y: jax.nn.softplus(z),
    "silu": lambda z, y: jax.nn.silu(z),
    "clipped to pixels": lambda z, y: jnp.clip(z, 0, 1),
    "hard tanh": lambda z, y: jax.nn.hard_tanh(z),
    "bytes": lambda z, y: jnp.round(255 * jax.nn.sigmoid(z)).astype(jnp.uint8),
    "narrow sigmoid": lambda z, y: jax.nn.sigmoid(z.astype(jnp.bfloat16)).astype(jnp.float32),
    "rates": lambda z, y: jnp.exp(z),
    "decisions": lambda z, y: z > 0,
    "unit length": lambda z, y: z / jnp.linalg.norm(z, axis=-1, keepdims=True),
}
LOSSES = {
    "squares": lambda z, y: jnp.mean((z - y) ** 2),
    "square": lambda z, y: jnp.square(z - y).sum(),
    "product with itself": lambda z, y: ((z - y) * (z - y)).mean(),
    "squares, not summed": lambda z, y: (z - y) ** 2,
    "distance": lambda z, y: jnp.linalg.norm(z - y, axis=-1),
    "absolute": lambda z, y: jnp.abs(z - y).mean(),
    "huber": lambda z, y: _huber(z - y).mean(),
    "log cosh": lambda z, y: jnp.log(jnp.cosh(z - y)).mean(),
    "quantiles": lambda z, y: jnp.maximum(0.9 * (y - z), -0.1 * (y - z)).mean(),
    "labels": lambda z, y: _cross_entropy_of_labels(z, y).mean(),
    "labels, sigmoid": lambda z, y: _log_loss(jax.nn.sigmoid(z), y),
    "squares of a sigmoid": lambda z, y: jnp.square(jax.nn.sigmoid(z) - y).mean(),
    "hinge": lambda z, y: jnp.maximum(0, 1 - z * y).mean(),
    "poisson": lambda z, y: (jnp.exp(z) - y * z).mean(),
    "cosine": lambda z, y: _cosine(z, y).mean(),
}
DECODERS = {
    "tied": lambda p, h, x: jax.nn.relu(x @ p["encode"]) @ p["encode"].T,
    "untied": lambda p, h, x: jax.nn.relu(x @ p["encode"]) @ p["decode"],
    "loss in a scan": _in_a_scan,
}
OTHERS = DECODERS | {name: output(make) for name, make in (SQUASHED | LOSSES).items()}


@pytest.mark.parametrize("name", OTHERS)
def test_not_a_vocabulary(name):
    plan = hire.inspect(OTHERS[name], WEIGHTS, HIDDEN, WIDE)
    assert heads_of(plan) == []
    refusals = {rejection.refusal for rejection in plan.rejected if rejection.shape == (D, V)}
    assert refusals == {Refusal.NOT_LOGITS}


@pytest.mark.parametrize("name", ["sigmoid", "squares", "tied"])
def test_min_width_decides(name):
    rules = (hire.Head(), hire.Head(min_width=1000, force=True))
    (head,) = heads_of(hire.inspect(OTHERS[name], WEIGHTS, HIDDEN, WIDE, rules=rules))
    assert (head.rule, head.status) == (rules[1], "rewritten")
    assert heads_of(hire.inspect(OTHERS[name], WEIGHTS, HIDDEN, WIDE, rules=rules[:1])) == []


def _squares_beside(z, labels):
    """A loss on logits, and regularizers that alone would be a regression's."""
    log_p = jax.nn.log_softmax(z)
    picked = jnp.take_along_axis(log_p, labels[:, None], 1)
    return (1e-6 * z**2).mean() + 1e-4 * (jax.nn.logsumexp(z, -1) ** 2).mean() - picked.mean()


def _penalized(z, labels):
    seen = jnp.arange(V) % 3 == 0
    return jnp.where(seen, jnp.where(z > 0, z / 1.2, z * 1.2), z)


def _sums_of_exponentials(z, labels):
    weights = jnp.exp(z)
    return weights / weights.sum(-1, keepdims=True)


VOCABULARIES = {
    "raw": lambda z, y: z,
    "summed": lambda z, y: z.sum(),
    "soft cap": lambda z, y: 30 * jnp.tanh(z / 30),
    "soft cap, cast between": lambda z, y: (
        30 * jnp.tanh((z / 30).astype(jnp.bfloat16)).astype(jnp.float32)
    ),
    "sigmoid as a cap": lambda z, y: (30 * jax.nn.sigmoid(z / 7)).argmax(-1),
    "best of sigmoids": lambda z, y: lax.top_k(jax.nn.sigmoid(z), 5),
    "softmax": lambda z, y: jax.nn.softmax(z),
    "softmax by hand": _sums_of_exponentials,
    "log softmax": lambda z, y: jax.nn.log_softmax(z),
    "cross entropy and squares": _squares_beside,
    "clipped": lambda z, y: jnp.clip(z, -50, 50),
    "masked": lambda z, y: jnp.where(jnp.arange(V) < 4000, z, -jnp.inf),
    "NaN guarded": lambda z, y: jnp.nan_to_num(z),
    "negative": lambda z, y: -z,
    "repetitions penalized": _penalized,
    "one label's": lambda z, y: jnp.take_along_axis(jax.nn.log_sigmoid(z), y[:, None], -1),
}
EMBEDDED = {
    "looked up": lambda p, h, t: jnp.take(p["encode"], t, axis=0) @ p["encode"].T,
    "one-hot": lambda p, h, t: jax.nn.one_hot(t, V) @ p["encode"] @ p["encode"].T,
}
HEADS = EMBEDDED | {name: output(make) for name, make in VOCABULARIES.items()}


@pytest.mark.parametrize("name", HEADS)
def test_a_vocabulary(name):
    (head,) = heads_of(hire.inspect(HEADS[name], WEIGHTS, HIDDEN, LABELS))
    assert head.width == V


@pytest.mark.parametrize("width", [D + 1, 2 * D, 4095])
def test_narrow_vocabularies_are_asked_for(width):
    """Bytes, codecs, proteins: a rule decides how wide one has to be."""
    weights = {"head": shape(D, width)}
    fn = lambda p, h: (h @ p["head"]).argmax(-1)  # noqa: E731
    assert hire.inspect(fn, weights, HIDDEN).sites == ()
    rule = hire.Head(k=8, candidates=16, min_width=width)
    assert len(hire.inspect(fn, weights, HIDDEN, rules=[rule]).sites) == 1
    wider = hire.Head(k=8, candidates=16, min_width=width + 1)
    plan = hire.inspect(fn, weights, HIDDEN, rules=[wider])
    assert [rejection.refusal for rejection in plan.rejected] == [Refusal.TOO_NARROW]


def test_less_than_twice_its_input():
    fn = lambda p, h: (h @ p["head"]).argmax(-1)  # noqa: E731
    weights, hidden = {"head": shape(V // 2 + 8, V)}, shape(2, V // 2 + 8)
    (rejection,) = hire.inspect(fn, weights, hidden).rejected
    assert rejection.refusal is Refusal.TOO_NARROW
    assert len(hire.inspect(fn, weights, hidden, rules=[hire.Head(min_width=V)]).sites) == 1
