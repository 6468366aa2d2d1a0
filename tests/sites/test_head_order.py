"""What is ranked behind a head: the order of its logits, or another one, which it guesses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hire_rewrite as hire
from tests.cases import inputs, rand

D, V = 32, 4096
KEY = jax.random.key(0)
PARAMS = {"head": rand(D, V), "other": rand(D, V, seed=1)}
X = inputs(2, D)
SOME = np.arange(0, V, 7)
TOKENS = jnp.array([17, 900])
SIEVE = jnp.arange(V) % 777 == 5


def _top_k(z):
    return jnp.where(z < lax.top_k(z, 40)[0][:, -1:], -jnp.inf, z)


def _top_p(z):
    order = jnp.argsort(-z, -1)
    ranked = jax.nn.softmax(jnp.take_along_axis(z, order, -1))
    far = jnp.cumsum(ranked, -1) - ranked > 0.9
    far = jnp.zeros_like(far).at[jnp.arange(len(z))[:, None], order].set(far)
    return jnp.where(far, -jnp.inf, z)


def _penalized(z):
    return jnp.where(z > 0, z / 1.3, z * 1.3)


def _decoded(p, x):
    """A loop over tokens."""

    def body(x, _):
        z = x @ p["head"]
        return x + z.max(-1, keepdims=True), jax.nn.softmax(z).argmax(-1)

    return lax.scan(body, x, None, length=3)[1]


def _turned_in_a_loop(p, x):
    def body(carry, _):
        x, z = carry
        return (x, -z), None

    return lax.scan(body, (x, x @ p["head"]), None, length=3)[0][1].argmax(-1)


def _summed(loop):
    """The logits of several passes."""
    return lambda p, x: loop(lambda c: c + x @ p["head"], jnp.zeros((2, V))).argmax(-1)


def _timestamps(z, begin=3000):
    """Whisper: a timestamp, if all of them together are likelier than any word."""
    log = jax.nn.log_softmax(z)
    likelier = jax.nn.logsumexp(log[:, begin:], -1) > log[:, :begin].max(-1)
    return jnp.where(likelier[:, None] & (jnp.arange(V) < begin), -jnp.inf, z).argmax(-1)


def _at(z, token):
    return jnp.take_along_axis(z, token[:, None], -1)[:, 0]


def _drawn(z, order):
    """A token by its place in an order."""
    return _at(order, jax.random.categorical(KEY, jnp.take_along_axis(z, order, -1)))


def _likelier(p, x):
    """Scores of two texts, token after token."""

    def step(score, token):
        return score + jax.nn.log_softmax(x @ p["head"])[jnp.arange(2), token], None

    return lax.scan(step, jnp.zeros(2), jnp.ones((3, 2), int))[0].argmax()


def _scanned(p, x):
    """Logits of one token after the other."""
    return lax.scan(lambda c, each: (c, each @ p["head"]), 0, x)[1]


def _kept_in_a_ref(p, x):
    z = x @ p["head"]
    kept = jax.new_ref(jnp.zeros(2))
    kept[...] = jax.nn.log_softmax(z)[jnp.arange(2), TOKENS]
    return z.argmax(-1), kept[...] > -10.0


def _rank(z):
    return jnp.argsort(jnp.argsort(-z, -1), -1)


def _drawn_of(z, logits):
    return _at(jnp.argsort(-logits), jax.random.categorical(KEY, z))


def _in_order(z):
    """Tokens from the greatest on, their logits, and which of them top p leaves out."""
    order = jnp.argsort(-z, -1)
    ranked = jnp.take_along_axis(z, order, -1)
    sums = jnp.cumsum(jax.nn.softmax(ranked), -1)
    return order, ranked, jnp.pad(sums[:, :-1], ((0, 0), (1, 0))) > 0.9


def _drawn_in_order(z):
    order, ranked, far = _in_order(z)
    return _at(order, jax.random.categorical(KEY, jnp.where(far, -jnp.inf, ranked)))


def _put_back(z):
    order, ranked, far = _in_order(z)
    kept = jnp.where(far, -jnp.inf, ranked)
    return jnp.zeros_like(z).at[jnp.arange(2)[:, None], order].set(kept)


def _turned(z):
    order = jnp.argsort(jax.nn.softmax(z), -1)[..., ::-1]
    ranked = jnp.take_along_axis(jax.nn.softmax(z), order, -1)
    kept = jnp.where(jnp.cumsum(ranked, -1) - ranked > 0.9, 0.0, ranked)
    kept = kept / kept.sum(-1, keepdims=True)
    return _at(order, jax.random.categorical(KEY, jnp.log(kept)))


def _entropy(z):
    return -(jax.nn.softmax(z) * jax.nn.log_softmax(z)).sum(-1, keepdims=True)


def _above_the_least(q):
    ranked = jnp.sort(q)[:, ::-1]
    far = jnp.cumsum(ranked, -1) - ranked > 0.9
    least = jnp.min(jnp.where(far, jnp.inf, ranked), -1, keepdims=True)
    return jax.random.categorical(KEY, jnp.where(q < least, -jnp.inf, jnp.log(q)))


def _above_the_last(z):
    ranked = jnp.sort(z)[:, ::-1]
    count = (jnp.cumsum(jax.nn.softmax(ranked), -1) < 0.9).sum(-1)
    return jax.random.categorical(KEY, jnp.where(z < _at(ranked, count)[:, None], -jnp.inf, z))


def of_logits(fn):
    return lambda p, x: fn(x @ p["head"])


KEPT = {
    "greedy": of_logits(lambda z: z.argmax(-1)),
    "probabilities": of_logits(lambda z: jnp.argmax(jax.nn.softmax(z / 0.7), -1)),
    "log": of_logits(lambda z: jnp.log(jax.nn.softmax(z)).argmax(-1)),
    "power": of_logits(lambda z: (jax.nn.softmax(z) ** 0.7).argmax(-1)),
    "returned": of_logits(jax.nn.log_softmax),
    "beams": of_logits(lambda z: lax.top_k((jax.nn.log_softmax(z) + X[:, :1]).reshape(-1), 8)),
    "loss": of_logits(lambda z: -jax.nn.log_softmax(z)[:, 5]),
    "loss by one-hot rows": of_logits(
        lambda z: -(jax.nn.log_softmax(z) * jax.nn.one_hot(5, V)).sum()
    ),
    "entropy": of_logits(lambda z: -(jax.nn.softmax(z) * jax.nn.log_softmax(z)).sum(-1)),
    "sorted downwards": of_logits(lambda z: jnp.argsort(-z)[:, :5]),
    "top-k, drawn": of_logits(lambda z: jax.random.categorical(KEY, _top_k(z))),
    "top-p, drawn": of_logits(lambda z: jax.random.categorical(KEY, _top_p(z))),
    "approximately": of_logits(lambda z: lax.approx_max_k(z, 4)),
    "a mask": of_logits(lambda z: jnp.where(jnp.arange(V) < 300, z, -jnp.inf).argmax(-1)),
    "a penalty by a mask": of_logits(
        lambda z: jnp.where(jnp.arange(V) % 7 == 0, _penalized(z), z).argmax(-1)
    ),
    "a bias": lambda p, x: (x @ p["head"] + jnp.zeros(V).at[SOME].add(5.0)).argmax(-1),
    "a dense head beside it": lambda p, x: (x @ p["head"] - x @ p["other"]).argmax(-1),
    "one token forbidden": of_logits(lambda z: z.at[:, 3].set(-jnp.inf).argmax(-1)),
    "a few tokens less": of_logits(lambda z: z.at[:, SOME[:9]].add(-5.0).argmax(-1)),
    "one looked up": of_logits(lambda z: jnp.take_along_axis(z, z.argmax(-1)[:, None], -1).max()),
    "two of its greatest compared": of_logits(
        lambda z: _at(z, lax.top_k(z, 2)[1][:, 0]) - _at(z, lax.top_k(z, 2)[1][:, 1]) > 1.0
    ),
    "one compared with chance": of_logits(
        lambda z: jax.random.uniform(KEY, (2,)) * 0.1 < jax.nn.softmax(z)[:, 5]
    ),
    "the chosen one compared": of_logits(lambda z: _at(jax.nn.log_softmax(z), z.argmax(-1)) > -3.0),
    "loss of what is not padding": of_logits(
        lambda z: jnp.where(TOKENS > 0, -_at(jax.nn.log_softmax(z), TOKENS), 0.0).sum()
    ),
    "drawn in order": of_logits(lambda z: _drawn(z, jnp.argsort(-z, -1))),
    "drawn from the top k": of_logits(lambda z: _drawn(z, lax.top_k(z, 40)[1])),
    "k as an argument, by ranks": of_logits(
        lambda z: jax.random.categorical(
            KEY, jnp.where(jnp.argsort(jnp.argsort(-z, -1), -1) < TOKENS[:, None], z, -jnp.inf)
        )
    ),
    "k as an argument, by the k-th": of_logits(
        lambda z: jax.random.categorical(
            KEY, jnp.where(z < _at(jnp.sort(z)[:, ::-1], TOKENS)[:, None], -jnp.inf, z)
        )
    ),
    "chosen behind a scan": lambda p, x: (
        lambda z: _at(jax.nn.log_softmax(z), z.argmax(-1)) > -3.0
    )(_scanned(p, x)),
    "a branch says which": of_logits(
        lambda z: (
            _at(
                jax.nn.log_softmax(z),
                lax.cond(
                    X[0, 0] > 0,
                    lambda: z.argmax(-1),
                    lambda: jax.random.categorical(KEY, z),
                ),
            )
            > -3.0
        )
    ),
    "drawn in a branch, of what is in order": of_logits(
        lambda z: lax.cond(
            X[0, 0] > 0,
            lambda best: jax.random.categorical(KEY, jnp.where(z < best[:, 40:41], -jnp.inf, z)),
            lambda best: z.argmax(-1),
            jnp.sort(z)[:, ::-1],
        )
    ),
    "noise for some tokens": of_logits(
        lambda z: (jax.nn.log_softmax(z) + jax.random.gumbel(KEY, z.shape) * (X[:, :1] > 0)).argmax(
            -1
        )
    ),
    "a race of exponential numbers": of_logits(
        lambda z: (jax.nn.softmax(z) / jax.random.exponential(KEY, z.shape)).argmax(-1)
    ),
    "normalized otherwise": of_logits(
        lambda z: ((z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True)).argmax(-1)
    ),
    "the order of one token": of_logits(lambda z: jnp.argsort(-z, -1)[0][:5]),
    "at a place in the program": of_logits(lambda z: jnp.argsort(-z, -1)[:, np.int32(4)]),
    "a penalty for what is positive": of_logits(
        lambda z: jnp.where((jnp.arange(V) % 7 == 0) & (z > 0), z / 1.3, z).argmax(-1)
    ),
    "a penalty after a bias": of_logits(
        lambda z: _penalized(z + jnp.zeros(V).at[SOME].add(5.0)).argmax(-1)
    ),
    "limits that none meets": of_logits(lambda z: jnp.clip(z, -1e4, 1e4).argmax(-1)),
    "no number": of_logits(
        lambda z: jnp.where(jnp.isnan(z), -jnp.inf, jnp.nan_to_num(z)).argmax(-1)
    ),
    "above a number": of_logits(lambda z: jnp.where(z < 1.0, -jnp.inf, z).argmax(-1)),
    "leaky": of_logits(lambda z: jax.nn.leaky_relu(z).argmax(-1)),
    "a soft cap, masked": of_logits(
        lambda z: jnp.where(jnp.arange(V) < 4000, 30 * jnp.tanh(z / 30), -jnp.inf).argmax(-1)
    ),
    "a loop over all logits": of_logits(
        lambda z: lax.scan(lambda c, _: (jax.nn.softmax(c), None), z, None, length=2)[0].argmax(-1)
    ),
    "greatest of all tokens": of_logits(lambda z: z.max(0).argmax(-1)),
    "chances that are never zero": of_logits(
        lambda z: jnp.log(jnp.clip(jax.nn.softmax(z), 1e-9, 1.0)).argmax(-1)
    ),
    "over their norm": of_logits(
        lambda z: (z / jnp.linalg.norm(z, axis=-1, keepdims=True)).argmax(-1)
    ),
    "over their root mean square": of_logits(
        lambda z: (z * lax.rsqrt((z * z).mean(-1, keepdims=True) + 1e-6)).argmax(-1)
    ),
    "a temperature of their entropy": of_logits(
        lambda z: (z / (0.5 + 0.1 * _entropy(z))).argmax(-1)
    ),
    "a least temperature": of_logits(lambda z: (z / jnp.maximum(_entropy(z) - 2, 1e-3)).argmax(-1)),
    "over the greatest chance": of_logits(
        lambda z: (lambda q: (q / q.max(-1, keepdims=True)).argmax(-1))(jax.nn.softmax(z))
    ),
    "logarithms of chances between": of_logits(
        lambda z: jnp.clip(jax.nn.log_softmax(z), -30.0, 0.0).argmax(-1)
    ),
    "a normalizer of one's own, and a floor": of_logits(
        lambda z: jnp.maximum(z - jnp.log(jnp.exp(z).sum(-1, keepdims=True)), -9.0).argmax(-1)
    ),
    "logsumexp, and a floor": of_logits(
        lambda z: jnp.maximum(-20.0, z - jax.nn.logsumexp(z, -1)[:, None]).argmax(-1)
    ),
    "some chances, normalized and capped": of_logits(
        lambda z: (lambda q: jnp.clip(q / q.sum(-1, keepdims=True), 1e-6, 0.9).argmax(-1))(
            jax.nn.softmax(jnp.where(z < lax.top_k(z, 9)[0][:, -1:], -jnp.inf, z))
        )
    ),
    "if all are numbers": of_logits(
        lambda z: jnp.where((jnp.isfinite(z) & ~jnp.isnan(z)).all(-1), z.argmax(-1), 0)
    ),
    "how many make nine tenths": of_logits(
        lambda z: (jnp.cumsum(jnp.sort(jax.nn.softmax(z))[:, ::-1], -1) < 0.9).sum(-1)
    ),
    "the logits of one token": lambda p, x: (lambda z: (z.argmax(), z[z.argmax()] > 4.0))(
        x[0] @ p["head"]
    ),
    "top-p, in order": of_logits(_drawn_in_order),
    "top-p, put back": of_logits(lambda z: jax.random.categorical(KEY, _put_back(z))),
    "top-p, by the last that is kept": of_logits(_above_the_last),
    "the first of an order": of_logits(
        lambda z: _drawn_of(jnp.where(jnp.arange(V) < 40, -jnp.sort(-z), -jnp.inf), z)
    ),
    "top-p, sorted downwards": of_logits(
        lambda z: (
            lambda o: _at(o, jax.random.categorical(KEY, jnp.take_along_axis(_top_k(z), o, -1)))
        )(jnp.argsort(z, -1, descending=True))
    ),
    "top-p, turned round": of_logits(_turned),
    "top-p, by the least that is kept": of_logits(
        lambda z: _above_the_least(jax.nn.softmax(z)),
    ),
    "numbers put back by their ranks": of_logits(
        lambda z: (lambda o, kept: jnp.take_along_axis(kept, jnp.argsort(o, -1), -1).argmax(-1))(
            _in_order(z)[0], jnp.where(_in_order(z)[2], -jnp.inf, _in_order(z)[1])
        )
    ),
    "written over all of them": of_logits(
        lambda z: (
            lambda o, s, far: z.at[jnp.arange(2)[:, None], o].set(jnp.where(far, -jnp.inf, s))
        )(*_in_order(z)).argmax(-1)
    ),
    "a mean weighted with chances": of_logits(
        lambda z: (jax.nn.softmax(z) * jnp.square(jax.nn.log_softmax(z))).sum(-1) > 60.0
    ),
    "chances squared": of_logits(lambda z: jnp.sqrt(jax.nn.softmax(z) ** 2).argmax(-1)),
    "loop": _decoded,
}
LOST = {
    "negative": of_logits(lambda z: jnp.argmax(-z, -1)),
    "negative, returned": of_logits(lambda z: -z),
    "negative, normalized": of_logits(lambda z: jax.nn.softmax(-z)),
    "divided by a negative number": of_logits(lambda z: z / -2),
    "least": of_logits(lambda z: z.min(-1)),
    "a few that are least": of_logits(lambda z: lax.approx_min_k(z, 4)),
    "an inverse": of_logits(lambda z: (jax.nn.softmax(z) ** -0.5).argmax(-1)),
    "rounded": of_logits(lambda z: jnp.round(z).argmax(-1)),
    "absolute": of_logits(lambda z: jnp.abs(z).argmax(-1)),
    "square": of_logits(lambda z: lax.top_k(z**2, 1)),
    "guidance": of_logits(lambda z: (z[1] + 3.0 * (z[0] - z[1])).argmax(-1)),
    "contrast": lambda p, x: jnp.argmax(
        jax.nn.log_softmax(x @ p["head"]) - 0.5 * jax.nn.log_softmax(x @ p["other"]), -1
    ),
    "mean of tokens": of_logits(lambda z: jax.nn.softmax(z).mean(0).argmax(-1)),
    "some made greater": of_logits(lambda z: z.at[:, SOME].add(5.0).argmax(-1)),
    "one made greater": of_logits(lambda z: z.at[:, 3].add(5.0).argmax(-1)),
    "many forbidden": of_logits(lambda z: z.at[:, jnp.arange(V - 9)].set(-jnp.inf).argmax(-1)),
    "a penalty for some": of_logits(lambda z: z.at[:, SOME].set(_penalized(z[:, SOME])).argmax(-1)),
    "a choice of four": of_logits(lambda z: z[:, SOME[:4]].argmax(-1)),
    "a choice of four, one by one": of_logits(
        lambda z: jnp.stack([jax.nn.log_softmax(z)[:, i] for i in (4, 9, 11, 300)], -1).argmax(-1)
    ),
    "one or the other": of_logits(lambda z: z[:, 4] > z[:, 9]),
    "one less the other": of_logits(lambda z: jnp.exp(z[:, 4]) - jnp.exp(z[:, 9]) > 0.5),
    "one compared": of_logits(lambda z: jax.nn.softmax(z)[:, 5] > 0.5),
    "the likelier of two tokens": of_logits(
        lambda z: _at(jax.nn.log_softmax(z), TOKENS).reshape(2, 1).sum(-1).argmax()
    ),
    "the less likely of two": of_logits(lambda z: (-_at(jax.nn.log_softmax(z), TOKENS)).argmin()),
    "those looked up, in order": of_logits(
        lambda z: jnp.argsort(-_at(jax.nn.log_softmax(z), TOKENS))
    ),
    "one or the other, by one-hot rows": of_logits(
        lambda z: (
            jnp.einsum("bv,bv->b", z, jax.nn.one_hot(TOKENS, V))
            > jnp.einsum("bv,bv->b", z, jax.nn.one_hot(TOKENS + 1, V))
        )
    ),
    "one or the other, by sums": of_logits(lambda z: (z * jax.nn.one_hot(TOKENS, V)).sum(-1) > 1.0),
    "a branch": of_logits(lambda z: lax.cond(_at(z, TOKENS).sum() > 0, lambda: 1, lambda: 2)),
    "the likelier of two texts": _likelier,
    "these or those": of_logits(
        lambda z: (
            jnp.where(jnp.arange(V) % 7 == 0, jax.nn.softmax(z), 0).sum(-1)
            > jnp.where(jnp.arange(V) % 5 == 0, jax.nn.softmax(z), 0).sum(-1)
        )
    ),
    "looked up behind a scan": lambda p, x: _at(_scanned(p, x), TOKENS).argmax(),
    "looked up behind a branch": lambda p, x: (
        _at(lax.cond(x[0, 0] > 0, lambda: x @ p["head"], lambda: jnp.zeros((2, V))), TOKENS) > 0.5
    ),
    "looked up by a loop's condition": lambda p, x: lax.while_loop(
        lambda c: (c[1][0, 17] < 0.6) & (c[0] < 9),
        lambda c: (c[0] + 1, x * (1.0 + c[0]) @ p["head"]),
        (0, jnp.zeros((2, V))),
    )[0],
    "looked up by a table": of_logits(lambda z: _at(z, jnp.arange(V)[::-1][z.argmax(-1)]) > 0.2),
    "the next to the greatest": of_logits(lambda z: _at(z, z.argmax(-1) + 1) > 0.2),
    "in whole numbers": of_logits(
        lambda z: (-20 * _at(jax.nn.log_softmax(z), TOKENS)).astype(jnp.int32)
    ),
    "rounded marks": of_logits(lambda z: jnp.round(5 * _at(jax.nn.softmax(z), TOKENS))),
    "the order of medians": of_logits(lambda z: jnp.argsort(jnp.median(z, -1))),
    "a quantile compared": of_logits(lambda z: z.max(-1) - jnp.quantile(z, 0.5, axis=-1) > 3.9),
    "the greatest of a middle rank": of_logits(
        lambda z: jnp.argmax(jnp.sort(z, -1)[:, V // 2 - 300])
    ),
    "compared at a rank that is given": of_logits(lambda z: _at(jnp.sort(z), TOKENS) > 0.5),
    "searched in order": of_logits(
        lambda z: jax.vmap(lambda a: jnp.searchsorted(jnp.sort(a), 0.0))(z)
    ),
    "by groups first": of_logits(
        lambda z: jnp.lexsort((-z, jnp.broadcast_to(jnp.arange(V) % 7, z.shape)))[:, :20]
    ),
    "drawn by shares in order": of_logits(
        lambda z: _at(
            jnp.argsort(-z, -1),
            (jnp.cumsum(-jnp.sort(-jax.nn.softmax(z)), -1) < jax.random.uniform(KEY, (2, 1))).sum(
                -1
            ),
        )
    ),
    "a mask that is drawn": of_logits(
        lambda z: (jax.nn.softmax(z) * jax.random.bernoulli(KEY, 0.01, (V,))).argmax(-1)
    ),
    "signs that are drawn": of_logits(
        lambda z: (jax.nn.log_softmax(z) * jax.random.rademacher(KEY, (V,), jnp.float32)).argmax(-1)
    ),
    "capped, centered": of_logits(
        lambda z: jnp.minimum((z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True), 2).argmax(
            -1
        )
    ),
    "the order of deviations": of_logits(lambda z: (z.argmax(-1), jnp.argsort(z.std(-1)))),
    "the whole order": of_logits(lambda z: jnp.argsort(-z, -1)),
    "the rank of one, by two sorts": of_logits(
        lambda z: jnp.argsort(jnp.argsort(-z, -1), -1)[jnp.arange(2), TOKENS]
    ),
    "the rank of a certain one": of_logits(lambda z: jnp.argsort(jnp.argsort(-z, -1), -1)[:, 17]),
    "the rank of one, by a scatter": of_logits(
        lambda z: (
            jnp.zeros((2, V), int)
            .at[jnp.arange(2)[:, None], jnp.argsort(-z, -1)]
            .set(jnp.arange(V))[:, 17]
        )
    ),
    "where one is in the order": of_logits(
        lambda z: jnp.argmax(jnp.argsort(z, -1, descending=True) == TOKENS[:, None], -1)
    ),
    "one of a rank that is given": of_logits(lambda z: _at(jnp.argsort(-z, -1), TOKENS)),
    "without those above a number": of_logits(lambda z: jnp.where(z > 3.0, -jnp.inf, z).argmax(-1)),
    "less above a number": of_logits(lambda z: jnp.where(z > 3.0, z - 5, z).argmax(-1)),
    "shifted by the sign": of_logits(lambda z: jnp.where(z > 0, z + 1, z - 1).argmax(-1)),
    "logits capped": of_logits(lambda z: jnp.minimum(z, 2.0).argmax(-1)),
    "logits capped by what is given": lambda p, x: jnp.minimum(x @ p["head"], x[0, 0]).argmax(-1),
    "logits between": of_logits(lambda z: jnp.clip(z, -1, 1).argmax(-1)),
    "logits above a number": of_logits(lambda z: jax.nn.relu(z - 4.5).argmax(-1)),
    "a part of the probabilities": of_logits(lambda z: jax.nn.softmax(z)[:, 1000:].argmax(-1)),
    "its halves": of_logits(
        lambda z: [part.argmax(-1) for part in jnp.split(jax.nn.softmax(z), 2, -1)]
    ),
    "the first are forbidden": of_logits(
        lambda z: jnp.where(X[:, :1] > 0, z.at[:, :300].set(-jnp.inf), z).argmax(-1)
    ),
    "timestamps": of_logits(_timestamps),
    "added up in a loop": _summed(
        lambda add, z: lax.scan(lambda c, _: (add(c), None), z, None, 3)[0]
    ),
    "added up so many times": _summed(lambda add, z: lax.fori_loop(0, 3, lambda _, c: add(c), z)),
    "added up while it is small": _summed(
        lambda add, z: lax.while_loop(lambda c: c.max() < 9.0, add, z)
    ),
    "those that are allowed": of_logits(
        lambda z: jnp.full(z.shape, -jnp.inf).at[:, SOME].set(z[:, SOME]).argmax(-1)
    ),
    "a mask of probabilities": of_logits(
        lambda z: jnp.where(jnp.arange(V) < 300, jax.nn.softmax(z), 0.0).argmax(-1)
    ),
    "a prior of probabilities": of_logits(
        lambda z: (jax.nn.log_softmax(z) - jnp.arange(V) / V).argmax(-1)
    ),
    "loop": _turned_in_a_loop,
    "drawn by shares of a sum": of_logits(
        lambda z: jax.vmap(lambda q: jax.random.choice(KEY, V, p=q))(jax.nn.softmax(z))
    ),
    "the first beyond a sum": of_logits(
        lambda z: (jnp.cumsum(jax.nn.softmax(z), -1) > 0.3).argmax(-1)
    ),
    "how many are below a sum": of_logits(
        lambda z: (jnp.cumsum(jax.nn.softmax(z), -1) < 0.3).sum(-1)
    ),
    "the rank of one": of_logits(lambda z: (z > z[:, 17:18]).sum(-1)),
    "the first above a number": of_logits(lambda z: (z > 3.0).argmax(-1)),
    "the first above a chance": of_logits(lambda z: (jax.nn.softmax(z) > 1e-3).argmax(-1)),
    "marks for those above": of_logits(
        lambda z: jnp.where(jax.nn.softmax(z) > 1e-3, jnp.arange(V), V).min(-1)
    ),
    "any of some": of_logits(lambda z: ((z > 2.0) & (jnp.arange(V) % 7 == 0)).any(-1)),
    "those above a chance are returned": of_logits(lambda z: (z, jax.nn.softmax(z) > 1e-3)),
    "whether some are above a number": of_logits(lambda z: (z.argmax(-1), (z > 1.5)[:, SOME])),
    "whole numbers are returned": of_logits(lambda z: (z.argmax(-1), (4 * z).astype(jnp.int32))),
    "whose token is the greatest": of_logits(lambda z: (z.argmax(-1), z.argmax(0))),
    "times a condition": of_logits(lambda z: (z * (z < 3.0)).argmax(-1)),
    "whole numbers, and back": of_logits(
        lambda z: ((2 * z).astype(jnp.int32) + jax.random.gumbel(KEY, z.shape)).argmax(-1)
    ),
    "a product": of_logits(lambda z: jnp.prod(1 + 1e-3 * z, -1) > 1.0),
    "a sum of squares, in a reduction of its own": of_logits(
        lambda z: lax.reduce(z, 0.0, lambda a, b: a + b * b, (1,)) > V
    ),
    "how many are so likely, as a float": of_logits(
        lambda z: (jax.nn.softmax(z) > 5e-4).astype(jnp.float32).sum(-1).astype(jnp.int32)
    ),
    "signs added up": of_logits(lambda z: jnp.sign(jax.nn.log_softmax(z) + 8).sum(-1) > 0),
    "whole numbers added up": of_logits(lambda z: jnp.floor(jax.nn.log_softmax(z)).sum(-1) > 0),
    "a chance, weighted otherwise": of_logits(
        lambda z: (jax.nn.softmax(z) * jnp.arange(V) / V).sum(-1) > 0.5
    ),
    "a part that the greatest tells": of_logits(
        lambda z: (
            jnp.where(((jnp.arange(V) + z.argmax(-1)[:, None]) % 7 == 0), jax.nn.softmax(z), 0).sum(
                -1
            )
            > 0.2
        )
    ),
    "above a number, in order": of_logits(lambda z: (jnp.sort(z) > 1.0).sum(-1)),
    "above a share of the greatest, in order": of_logits(
        lambda z: (lambda s: (s > 0.05 * s[:, -1:]).sum(-1))(jnp.sort(jax.nn.softmax(z)))
    ),
    "above a number, looked up in order": of_logits(
        lambda z: (jnp.take_along_axis(z, jnp.argsort(z), -1) > 1.0).sum(-1)
    ),
    "the least, in order": of_logits(lambda z: jnp.sort(z).min(-1)),
    "the mean, in order": of_logits(lambda z: jnp.sort(z).mean(-1) > 0),
    "differences, in order": of_logits(
        lambda z: (
            jnp.cumsum(jnp.abs(jnp.diff(jnp.diff(jax.nn.softmax(jnp.sort(z))))), -1) < 1e-3
        ).sum(-1)
    ),
    "far down, in order": of_logits(
        lambda z: jnp.take_along_axis(z, jnp.argsort(z), -1)[:, 300] > -2
    ),
    "one more, in order": of_logits(lambda z: jnp.pad(jnp.sort(z), ((0, 0), (1, 0)))[:, 300] > -2),
    "a table, in order": of_logits(lambda z: SIEVE[jnp.argsort(-z)].argmax(-1)),
    "the first that is allowed": of_logits(
        lambda z: _at(jnp.argsort(-z), SIEVE[jnp.argsort(-z)].argmax(-1))
    ),
    "costs added up in order": of_logits(
        lambda z: (jnp.cumsum(jnp.sqrt(jnp.arange(V))[jnp.argsort(-z)], -1) < 2e3).sum(-1)
    ),
    "tokens compared in order": of_logits(lambda z: (jnp.argsort(-z) < 10).argmax(-1)),
    "those of lesser ranks": of_logits(
        lambda z: jnp.where(jnp.argsort(jnp.argsort(-z)) >= 1000, z, -jnp.inf).argmax(-1)
    ),
    "a band of ranks": of_logits(
        lambda z: (
            lambda r: jax.random.categorical(KEY, jnp.where((r >= 1000) & (r < 2000), z, -jnp.inf))
        )(jnp.argsort(jnp.argsort(-z)))
    ),
    "whether some have such ranks": of_logits(lambda z: (z.argmax(-1), _rank(z)[:, :512] < 1000)),
    "whether a given one has such a rank": of_logits(
        lambda z: (z.argmax(-1), jnp.take_along_axis(_rank(z) < 1000, TOKENS[:, None], -1))
    ),
    "how many of a list have such ranks": of_logits(
        lambda z: (z.argmax(-1), ((_rank(z) < 1000) & SIEVE).sum(-1))
    ),
    "how many ranks two tokens share": of_logits(
        lambda z: (lambda m: (z.argmax(-1), (m[0] & m[1]).sum()))(_rank(z) < 1000)
    ),
    "ranks in a loop": of_logits(
        lambda z: (
            z.argmax(-1),
            lax.scan(
                lambda c, i: (c + (_rank(z) < 500)[:, i], 0), jnp.zeros(2, int), jnp.arange(9)
            )[0],
        )
    ),
    "places of the first, counted": of_logits(
        lambda z: (
            jnp.zeros((2, V), bool)
            .at[jnp.arange(2)[:, None], jnp.argsort(-z)]
            .set(jnp.arange(V) < 500)[:, : V // 2]
            .sum(-1)
        )
    ),
    "where another search is": lambda p, x: (
        lambda z: _at(z, (p["other"].T[z.argmax(-1)] @ p["other"][:, :8]).argmax(-1)) > 0.0
    )(x @ p["head"]),
    "where another token's greatest are": of_logits(
        lambda z: _at(z, jnp.broadcast_to(z.argmax(0)[5], 2)) > 0.0
    ),
    "out of a loop, in order": lambda p, x: (
        lax.map(lambda row: jnp.sort(row @ p["head"]), x)[:, V // 2] > 0.0
    ),
    "out of a branch, in order": lambda p, x: (
        lax.cond(x[0, 0] > 0, lambda z: jnp.sort(z), lambda z: jnp.sort(2 * z), x @ p["head"])[
            :, 1000
        ]
        > -2.0
    ),
    "the greater of two that are in order": of_logits(lambda z: jnp.sort(z).max(0)[V - 1000] > 2.0),
    "the least, times a token": of_logits(
        lambda z: (jnp.sort(z) / (1.0 + z.argmax(-1)[:, None])).min(-1) > -1.0
    ),
    "tokens above a number, in order": of_logits(
        lambda z: jnp.where(
            jnp.argsort(-z) - 16 < 0, jnp.take_along_axis(z, jnp.argsort(-z), -1), -jnp.inf
        ).argmax(-1)
    ),
    "even tokens, in order": of_logits(
        lambda z: jnp.where(jnp.argsort(-z) % 64 == 0, -jnp.sort(-z), -jnp.inf).argmax(-1)
    ),
    "all but the first, in order": of_logits(
        lambda z: jnp.where(jnp.arange(V) >= 2000, -jnp.sort(-z), -jnp.inf).max(-1)
    ),
    "a choice of conditions about ranks": of_logits(
        lambda z: (z.argmax(-1), jnp.where(_rank(z) < 500, z > lax.top_k(z, 3)[0][:, 2:], False))
    ),
    "written to more places": of_logits(
        lambda z: (
            jnp.zeros((2, 2 * V))
            .at[jnp.arange(2)[:, None], jnp.argsort(-z)]
            .set(-jnp.sort(-z))[:, 17]
            > 0.0
        )
    ),
    "finite after a choice": of_logits(
        lambda z: (z.argmax(-1), jnp.isfinite(jnp.where(z > 0.3, z, -jnp.inf)) & SIEVE)
    ),
    "those of top p are returned": of_logits(lambda z: (z.argmax(-1), _top_p(z) == -jnp.inf)),
    "above the greatest less two": of_logits(lambda z: (z > lax.top_k(z, 1)[0] - 2.0).sum(-1)),
    "above one of those that are sorted": of_logits(
        lambda z: (z > _at(z, jnp.sort(TOKENS))[:, None]).sum(-1)
    ),
    "counted behind a router": lambda p, x: (
        (x * lax.top_k(x, 2)[0].sum(-1, keepdims=True)) @ p["head"] > 1.0
    ).sum(-1),
    "bits": of_logits(lambda z: lax.bitcast_convert_type(z, jnp.uint32).argmax(-1)),
    "the least, by a reduction of two": of_logits(
        lambda z: lax.reduce(
            (z, lax.broadcasted_iota(jnp.int32, z.shape, 1)),
            (jnp.float32(jnp.inf), jnp.int32(0)),
            lambda a, b: tuple(jnp.where(a[0] < b[0], *each) for each in zip(a, b, strict=True)),
            (1,),
        )[1]
    ),
    "rows added up": of_logits(
        lambda z: jax.ops.segment_sum(jax.nn.log_softmax(z), jnp.array([0, 0]), 1)[0].argmax()
    ),
    "rows added up by those that are alike": of_logits(
        lambda z: (
            (TOKENS[:, None] % 3 == TOKENS % 3).astype(jnp.float32) @ jax.nn.log_softmax(z)
        ).argmax(-1)
    ),
    "all but ten overwritten": of_logits(
        lambda z: lax.dynamic_update_slice(z, jnp.full((2, V - 10), -jnp.inf), (0, 10)).argmax(-1)
    ),
    "cut off by padding": of_logits(
        lambda z: (z.argmax(-1), lax.pad(z, -jnp.inf, ((0, 0, 0), (10 - V, 0, 0))).argmax(-1))
    ),
    "filled with what is greater": of_logits(
        lambda z: jnp.where(jax.nn.log_softmax(z) > -13, jax.nn.log_softmax(z), 0.0).argmax(-1)
    ),
    "the greatest, or what is given": of_logits(
        lambda z: _at(jax.nn.log_softmax(z), jnp.where(TOKENS > 20, TOKENS, z.argmax(-1))) > -10
    ),
    "the greatest, and what is given": of_logits(
        lambda z: jnp.take_along_axis(z, jnp.stack([z.argmax(-1), TOKENS], -1), -1).std(-1) > 2.0
    ),
    "the greatest below a number": of_logits(lambda z: _at(z, jnp.minimum(z.argmax(-1), 50)) > 0.0),
    "less what is looked up": of_logits(lambda z: (z - _at(z, TOKENS)[:, None]).max(-1) > 4.0),
    "less what is looked up, at the greatest": of_logits(
        lambda z: _at(z - _at(z, TOKENS)[:, None], z.argmax(-1)) > 4.0
    ),
    "kept in a Ref": _kept_in_a_ref,
    "times normal numbers": of_logits(
        lambda z: (jax.nn.log_softmax(z) * jax.random.normal(KEY, (V,))).argmax(-1)
    ),
    "less whole numbers that are drawn": of_logits(
        lambda z: (jax.nn.log_softmax(z) - 1e9 * jax.random.randint(KEY, (V,), 0, 9)).argmax(-1)
    ),
    "places that are drawn": of_logits(
        lambda z: (
            jax.nn.log_softmax(z)
            + jnp.full(V, -jnp.inf).at[jax.random.permutation(KEY, V)[:100]].set(0.0)
        ).argmax(-1)
    ),
    "the root of some": of_logits(lambda z: jnp.sqrt(z + 2).argmax(-1)),
    "a power that is given": lambda p, x: jnp.power(x @ p["head"], x[0, 0]).argmax(-1),
    "a cap in another place": of_logits(
        lambda z: lax.clamp(jnp.full_like(z, -1e9), jnp.ones_like(z), z).argmax(-1)
    ),
    "whether one is, in a branch": of_logits(
        lambda z: lax.cond((z > 0)[0, 5], lambda: 1, lambda: 2)
    ),
    "as often as one is": lambda p, x: lax.while_loop(
        lambda c: (c[0] < 6) & ~c[2],
        lambda c: (c[0] + 1, c[1] * 0.9, (c[1] @ p["head"] > 0)[0, 5]),
        (0, x, False),
    )[0],
    "integers": of_logits(lambda z: (0.2 * z).astype(jnp.int32).argmax(-1)),
    "capped": of_logits(lambda z: jnp.minimum(jax.nn.log_softmax(z), -8.0).argmax(-1)),
    "capped by what is given": lambda p, x: jnp.minimum(
        jax.nn.softmax(x @ p["head"]), jnp.abs(x[:, :1])
    ).argmax(-1),
    "neighbors compared, where ranks say": of_logits(
        lambda z: (lambda some: some > jnp.roll(some, 1, -1))(z * ~_in_order(z)[2])
    ),
    "kept by neighbors, where ranks say": of_logits(
        lambda z: (lambda some: jnp.where(some > jnp.roll(some, 1, -1), z, -jnp.inf))(
            z * ~_in_order(z)[2]
        ).argmax(-1)
    ),
    "sums of sorted ones times others": of_logits(
        lambda z: (jnp.cumsum(jnp.sort(jax.nn.softmax(z)) * jax.nn.softmax(z), -1) < 1e-6).sum(-1)
    ),
    "times one of them": of_logits(lambda z: (z * z[:, 5:6]).argmax(-1)),
    "over one of them": of_logits(lambda z: (z / z[:, 5:6]).argmax(-1)),
    "over a logarithm of more than chances": of_logits(
        lambda z: (-z / jnp.log(jnp.maximum(jax.nn.softmax(z), 1.5))[:, :1]).argmax(-1)
    ),
    "signs of the tokens": of_logits(
        lambda z: (jax.nn.softmax(z) * jnp.array([[1.0], [-1.0]])).argmax(-1)
    ),
    "times their mean": of_logits(lambda z: (z * z.mean(-1, keepdims=True)).argmax(-1)),
    "times the greatest, less a number": of_logits(
        lambda z: (z * (z.max(-1, keepdims=True) - 2.5)).argmax(-1)
    ),
    "times what is above zero, if a guess is": of_logits(
        lambda z: (z * jax.nn.relu(z[:, 5:6])).argmax(-1)
    ),
    "to the power of one of them": of_logits(lambda z: (jax.nn.softmax(z) ** z[:, 5:6]).argmax(-1)),
    "chances times a number, capped": of_logits(
        lambda z: jnp.minimum(1000 * jax.nn.softmax(z), 0.6).argmax(-1)
    ),
    "logarithms and a number, capped": of_logits(
        lambda z: jnp.minimum(jax.nn.log_softmax(z) + 8, -0.1).argmax(-1)
    ),
    "chances, capped below zero": of_logits(
        lambda z: jnp.minimum(jax.nn.softmax(z), -0.1).argmax(-1)
    ),
    "capped, beside a normalizer": of_logits(
        lambda z: jnp.minimum(0 * jax.nn.logsumexp(z, -1, keepdims=True) + z, 0.5).argmax(-1)
    ),
    "not below a number": of_logits(lambda z: jnp.maximum(jax.nn.softmax(z), 0.1).argmax(-1)),
}


def plan_of(fn, *rules):
    return hire.transform(fn, *rules, on_miss="ignore").plan(PARAMS, X)


@pytest.mark.parametrize("name", KEPT)
def test_the_order_is_the_logits(name):
    plan = plan_of(KEPT[name])
    assert [site.name for site in plan.rewritten][:1] == ["p/head"], plan


@pytest.mark.parametrize("name", LOST)
def test_the_order_is_another(name):
    for rules in ((), (hire.Head(),), (hire.Head(certify=True, min_width=V),)):
        plan = plan_of(LOST[name], *rules)
        assert not plan.rewritten
        heads = [site.reason for site in plan.sites if site.kind == "head"]
        told = ("exact where they are greatest", "looked up", "put in order")
        assert all(any(word in reason for word in told) for reason in heads), plan
        assert len(heads) == 1 + (name == "contrast")


@pytest.mark.parametrize("behind", ["a factor", "a condition"])
def test_as_many_operations_in_a_row_as_there_are(behind):
    """Python's stack is no limit."""

    def fn(p, x):
        z = x @ p["head"]
        factor, condition = z.max(-1, keepdims=True), z > 1.0
        for _ in range(700):
            factor, condition = factor * 0.999, ~condition
        if behind == "a factor":
            return (z * factor).argmax(-1)
        return jnp.where(condition, z, -jnp.inf).argmax(-1)

    assert not plan_of(fn).rewritten


def test_a_condition_that_is_read_twice_is_looked_at_once():
    """Each of these doubles the ways back to the first."""

    def fn(p, x):
        q = jax.nn.softmax(x @ p["head"])
        kept = q > 0.1 * q.max(-1, keepdims=True)
        for i in range(40):
            kept = (kept & (q > 1e-3 * i)) | (kept & (q > 2e-3 * i))
        return jnp.where(kept, q, 0.0).argmax(-1)

    assert plan_of(fn).sites


def test_no_more_are_exact_than_there_are():
    """What is forbidden besides all that are asked for."""

    def fn(p, x):
        z = (x @ p["head"]).at[:, 2].set(-jnp.inf)
        return lax.top_k(z, V)[1][:, :5]

    (site,) = plan_of(fn).sites
    assert site.status == "dense"


def test_a_factor_of_a_jit_around():
    """A closed-over array that is traced is no constant."""

    @jax.jit
    def around(p, x, t):
        step = hire.transform(lambda p, x: ((x @ p["head"]) / t).argmax(-1), on_miss="ignore")
        return step(p, x)

    expected = (X @ PARAMS["head"]).argmax(-1)
    np.testing.assert_array_equal(around(PARAMS, X, jnp.float32(2)), expected)


def test_a_rule_that_says_so_rewrites_it():
    fn, rule = LOST["negative"], hire.Head(k=V, candidates=V, min_width=V, force=True)
    step = hire.transform(fn, rule)
    packed = step.pack(PARAMS, X)
    assert len(step.plan(packed, X).rewritten) == 1
    np.testing.assert_array_equal(step(packed, X), fn(PARAMS, X))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_logits_that_are_no_real_numbers_stay_dense(dtype):
    """They have no order, or none that guesses in floating point keep."""

    def model(w, x):
        logits = lax.dot(x, w, preferred_element_type=dtype)
        return logits if dtype == jnp.complex64 else jnp.argmax(logits, -1)

    kind = jnp.int8 if dtype == jnp.int32 else dtype
    w, x = jnp.arange(16 * 64).reshape(16, 64).astype(kind), jnp.ones((1, 16), kind)
    step = hire.transform(model, hire.Head(k=8, min_width=8, force=True), on_miss="ignore")
    packed = step.pack(w, x)
    (site,) = [site for site in step.plan(packed, x).sites if site.kind == "head"]
    assert (site.status, "floating-point" in site.reason) == ("dense", True)
    np.testing.assert_array_equal(step(packed, x), model(w, x))


def _again_and_again(z, k):
    """The greatest, and then the greatest of the others."""

    def body(z, _):
        token = z.argmax(-1)
        return jnp.where(jnp.arange(V) == token[:, None], -jnp.inf, z), token

    return [lax.scan(body, z, None, length=k)[1]]


@pytest.mark.parametrize(
    "search",
    [
        lax.top_k,
        lax.approx_max_k,
        lambda z, k: [jnp.sort(z, -1)[:, -k:]],
        lambda z, k: [jnp.flip(jnp.argsort(z, -1), -1)[:, :k]],
        lambda z, k: [jnp.argsort(-z, -1)[:, :k], jnp.argsort(-z, -1)[:, k - 1]],
        lambda z, k: _again_and_again(z, k - 1),
    ],
)
def test_as_many_are_exact_as_the_program_asks_for(search):
    """Without rules; a rule says how many itself."""
    for asked, exact in ((3, 64), (300, 300)):
        step = hire.transform(lambda p, x, k=asked: search(x @ p["head"], k))
        packed = step.pack(PARAMS, X)
        (site,) = step.plan(packed, X).rewritten
        assert f"top {exact} " in site.reason
        for got, want in zip(step(packed, X), step.fn(PARAMS, X), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5)
    asks = hire.transform(step.fn, hire.Head(force=True))
    assert "the program reads 300: give k=300" in asks.plan(PARAMS, X).rewritten[0].reason


def test_so_many_are_taken_out_as_nobody_knows():
    def model(p, x):
        def again(carry):
            z, count = carry
            return jnp.where(jnp.arange(V) == z.argmax(-1)[:, None], -jnp.inf, z), count + x[0, 0]

        return lax.while_loop(lambda c: c[1] < 9.0, again, (x @ p["head"], 0.0))[0].argmax(-1)

    plan = plan_of(model)
    assert not plan.rewritten
    assert "as many of its greatest logits as it likes" in plan.sites[0].reason


def near_rows(count):
    """Weights of which one row is far ahead, and so many are nearly alike behind it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, D)).astype(np.float32)
    rows = 0.1 * rng.normal(size=(512, D)).astype(np.float32)
    rows[7] = 3 * x.sum(0)
    rows[100 : 100 + count] = x.sum(0) + 1e-4 * rng.normal(size=(count, D))
    return jnp.asarray(rows), jnp.asarray(x)


def test_what_is_forbidden_is_proved_besides():
    """A token that is taken out behind the head may be the only one that was proved."""

    def greedy(rows, x):
        return jnp.argmax((x @ rows.T).at[:, 7].set(-jnp.inf), -1)

    def chosen(rows, x):
        logits = x @ rows.T
        taken = jnp.arange(512) == logits.argmax(-1, keepdims=True)
        return jnp.argmax(jnp.where(taken, -jnp.inf, logits), -1)

    rows, x = near_rows(40)
    for fn in (greedy, chosen):
        for k, status in ((1, "dense"), (8, "rewritten")):
            rule = hire.Head(k=k, candidates=8, certify=True, min_width=512, force=True)
            step = hire.transform(fn, rule, on_miss="ignore")
            packed = step.pack(rows, x)
            np.testing.assert_array_equal(step(packed, x), fn(rows, x))
            (site,) = step.plan(packed, x).sites
            assert (site.status, "may be taken out" in site.reason) == (status, k == 1)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("scale", [1e-4, 1.0])
@pytest.mark.parametrize(
    "last",
    [
        lambda z: jax.nn.softmax(z).astype(jnp.bfloat16),
        jax.nn.log_softmax,
        lambda z: (z / 0.7).astype(jnp.bfloat16) * 1,
    ],
)
def test_logits_that_rounding_makes_one_are_not_proved(last, scale):
    """Of equal ones the first counts, which the head may only have guessed."""

    def greedy(rows, x):
        return jnp.argmax(last(x @ rows.T), -1)

    rng = np.random.default_rng(1)
    rows = jnp.asarray(scale * rng.normal(size=(512, D)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(512, D)), jnp.float32)
    rule = hire.Head(k=1, candidates=8, certify=True, min_width=512, force=True)
    step = hire.transform(greedy, rule)
    np.testing.assert_array_equal(step(step.pack(rows, x), x), jax.jit(greedy)(rows, x))


def _chosen(q, asked, kept):
    return (jnp.where(asked(q), q, -1.0) if kept else jnp.where(asked(q), -1.0, q)).argmax(-1)


def _typical(z, x):
    log = jax.nn.log_softmax(z)
    entropy = -(jnp.exp(log) * log).sum(-1, keepdims=True)
    return jnp.where(jnp.abs(log + entropy) < 2.0, z, -jnp.inf).argmax(-1)


AWRY = {
    "the great ones are dropped": lambda z, x: _chosen(
        jax.nn.softmax(z), lambda q: q > 1e-3, False
    ),
    "the greatest is dropped": lambda z, x: jnp.where(
        z == z.max(-1, keepdims=True), -jnp.inf, z
    ).argmax(-1),
    "not those below": lambda z, x: _chosen(jax.nn.softmax(z), lambda q: ~(q < 1e-3), False),
    "all but the greatest, by their chance": lambda z, x: jnp.where(
        jax.nn.softmax(z) > 0.1, -jnp.inf, z
    ).argmax(-1),
    "allowed, and likely": lambda z, x: _chosen(
        jax.nn.softmax(z), lambda q: (jnp.arange(V) % 7 == 0) & (q > 1e-9), True
    ),
    "allowed, or unlikely": lambda z, x: _chosen(
        jax.nn.softmax(z), lambda q: (jnp.arange(V) % 7 == 0) | (q < 1e-9), False
    ),
    "the greatest tells who is allowed": lambda z, x: jnp.where(
        (z.argmax(-1) < 3000)[:, None] & (jnp.arange(V) % 7 == 0), -jnp.inf, z
    ).argmax(-1),
    "allowed, if all are finite": lambda z, x: jnp.where(
        (jnp.arange(V) % 7 == 0) & jnp.isfinite(jax.nn.logsumexp(z, -1, keepdims=True)), z, -jnp.inf
    ).argmax(-1),
    "two taken out": lambda z, x: jnp.where(
        (jnp.arange(V) != z.argmax(-1)[:, None]) & (jnp.arange(V) != 7), z, -jnp.inf
    ).argmax(-1),
    "a band": lambda z, x: jnp.where(
        (z < 0.5 * z.max(-1, keepdims=True)) & (z > 0), z, -jnp.inf
    ).argmax(-1),
    "typical": _typical,
    "one alone": lambda z, x: jnp.where(
        jnp.arange(V) == z.argmin(-1)[:, None], jax.nn.softmax(z), 0.0
    ).argmax(-1),
    "times a negative": lambda z, x: (jax.nn.log_softmax(z) * -jnp.exp(x[:, :1])).argmax(-1),
    "times a constant": lambda z, x: (jax.nn.log_softmax(z) * np.float32([-1.0])).argmax(-1),
    "the first of a sort": lambda z, x: jnp.argsort(z, -1)[:, 0],
    "another head": lambda z, x: (
        jax.nn.log_softmax(z) - jax.nn.log_softmax((x + jax.random.normal(KEY, x.shape)) @ OTHER)
    ).argmax(-1),
}
STRAIGHT = {
    "top k": lambda z, x: jnp.where(
        z < lax.top_k(z, 9)[0][:, -1:], -jnp.inf, jax.nn.softmax(z)
    ).argmax(-1),
    "likely, and in the top k": lambda z, x: _chosen(
        jax.nn.softmax(z),
        lambda q: (q > 1e-9) & ~(z < lax.top_k(z, 9)[0][:, -1:]) & jnp.isfinite(z),
        True,
    ),
    "top p, and likely": lambda z, x: jnp.where(
        (_top_p(z) == -jnp.inf) | (jax.nn.softmax(z) < 1e-9), -jnp.inf, z
    ).argmax(-1),
    "without what has no chance": lambda z, x: jnp.where(
        jax.nn.softmax(z) == 0, -jnp.inf, z
    ).argmax(-1),
    "another for some tokens": lambda z, x: jnp.where(
        x[:, :1] > 0, jax.nn.softmax(z), jax.nn.softmax(2 * z)
    ).argmax(-1),
    "all but the greatest": lambda z, x: jnp.where(
        jnp.arange(V) == z.argmax(-1)[:, None], -jnp.inf, z
    ).argmax(-1),
    "not below": lambda z, x: _chosen(jax.nn.softmax(z), lambda q: ~(q < 1e-3), True),
    "noise": lambda z, x: (z / 0.7 + jax.random.gumbel(KEY, z.shape)).argmax(-1),
    "the last of a sort": lambda z, x: jnp.argsort(z, -1)[:, -9:],
    "the first of the negated": lambda z, x: jnp.argsort(-z, -1)[:, :9],
}
OTHER = PARAMS["other"]


@pytest.mark.parametrize(("name", "behind"), [*AWRY.items(), *STRAIGHT.items()])
def test_what_is_chosen_may_be_what_was_guessed(name, behind):
    def model(params, x):
        return behind(x @ params["head"], x)

    for rules in ((), (hire.Head(certify=True),)):
        plan = hire.transform(model, *rules, on_miss="ignore").plan(PARAMS, X)
        heads = [site for site in plan.sites if site.kind == "head" and "head" in site.name]
        asked = [site.rule is not None for site in heads]
        assert asked == ([True] if name in STRAIGHT else [False] * len(heads)), heads
