"""Code of several operations behind a head: samplers, penalties, metrics, loops and branches.

A table as `operations.OPERATIONS`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from tests.fuzz.operations import LISTED, TABLE, V

_KEY = jax.random.key(3)


def _rows(z):
    return jnp.arange(len(z))


def _nucleus(z):
    """Whether the chances of those before sum to less than nine tenths, of each in order."""
    chances = jax.nn.softmax(jnp.sort(z, -1)[:, ::-1])
    return jnp.cumsum(chances, -1) - chances < 0.9


def _top_p(z):
    keep = jnp.where(_nucleus(z), jnp.sort(z, -1)[:, ::-1], jnp.inf).min(-1)
    return jnp.where(z < keep[:, None], -jnp.inf, z)


def _top_p_put_back(z):
    order = jnp.argsort(-z, -1)
    keep = jnp.zeros(z.shape, bool).at[_rows(z)[:, None], order].set(_nucleus(z))
    return jnp.where(keep, z, -jnp.inf)


def _min_p(z):
    chances = jax.nn.softmax(z)
    return jnp.where(chances < 0.1 * chances.max(-1, keepdims=True), -jnp.inf, z)


def _without_the_greatest(z, times=3):
    def take_out(_, z):
        return z.at[_rows(z), z.argmax(-1)].set(-jnp.inf)

    return lax.fori_loop(0, times, take_out, z)


def _beams(z):
    """The likeliest pairs of a row and a token, in rows."""
    return lax.top_k(z.reshape(-1), len(z))[1]


def _greatest_in_parts(z):
    parts = jnp.moveaxis(z.reshape(len(z), 8, -1), 1, 0)

    def step(best, part):
        return jnp.maximum(best, part.max(-1)), None

    return lax.scan(step, jnp.full(len(z), -jnp.inf), parts)[0]


def _arg_max_in_parts(z):
    parts = jnp.moveaxis(z.reshape(len(z), 8, -1), 1, 0)

    def step(carry, each):
        best, token = carry
        part, first = each
        more = part.max(-1) > best
        here = first + part.argmax(-1)
        return (jnp.maximum(best, part.max(-1)), jnp.where(more, here, token)), None

    start = (jnp.full(len(z), -jnp.inf), jnp.zeros(len(z), int))
    firsts = jnp.arange(8) * (V // 8)
    return lax.scan(step, start, (parts, firsts))[0][1]


def _sums_over_tokens(z):
    return lax.scan(lambda before, row: (before + row,) * 2, jnp.zeros(V), z)[1]


def _drawn(z):
    return jax.random.uniform(_KEY, (len(z), 1))


def _ranks_by_search(z):
    return jax.vmap(jnp.searchsorted)(jnp.sort(z, -1), z)


PROCEDURES = {
    # numbers of numbers
    "in bfloat16": ("numbers", ("numbers",), lambda z: z.astype(jnp.bfloat16).astype(z.dtype)),
    "sigmoid": ("numbers", ("numbers",), lambda z: jax.nn.sigmoid(z / 16)),
    "powers": ("numbers", ("numbers",), lambda z: jnp.exp(z / 8)),
    "standardized": (
        "numbers", ("numbers",),
        lambda z: (z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True),
    ),
    "over the greatest": ("numbers", ("numbers",), lambda z: z / z.max(-1, keepdims=True)),
    "turned": ("numbers", ("numbers",), lambda z: z[:, ::-1]),
    "rolled": ("numbers", ("numbers",), lambda z: jnp.roll(z, 5, -1)),
    "plus neighbors": ("numbers", ("numbers",), lambda z: z + 0.1 * jnp.roll(z, 1, -1)),
    "less those of a group": (
        "numbers", ("numbers",),
        lambda z: z - z.reshape(len(z), 64, -1).max(-1).repeat(V // 64, -1),
    ),
    "the first half": ("numbers", ("numbers",), lambda z: z.at[:, V // 2 :].set(-jnp.inf)),
    "without the first": (
        "numbers", ("numbers",), lambda z: jnp.pad(z[:, 9:], ((0, 0), (9, 0)), constant_values=-9e9)
    ),
    "greatest so far": ("numbers", ("numbers",), lambda z: lax.cummax(z, 1)),
    "of the token before": ("numbers", ("numbers",), lambda z: jnp.maximum(z, jnp.roll(z, 1, 0))),
    "sums over tokens": ("numbers", ("numbers",), _sums_over_tokens),
    "in a map": ("numbers", ("numbers",), lambda z: lax.map(jax.nn.softmax, z)),
    "in a loop": ("numbers", ("numbers",), lambda z: lax.fori_loop(0, 3, lambda _, z: z * 0.9, z)),
    "until small": (
        "numbers", ("numbers",),
        lambda z: lax.while_loop(lambda z: jnp.abs(z).max() > 4, lambda z: z / 2, z),
    ),
    "in a branch": (
        "numbers", ("numbers", "flag"),
        lambda z, f: lax.cond(f[0], jax.nn.softmax, lambda z: 2 * z, z),
    ),
    "in a branch, negated": (
        "numbers", ("numbers", "flag"), lambda z, f: lax.cond(f[1], jnp.negative, lambda z: z, z)
    ),
    "derivative": ("numbers", ("numbers",), jax.grad(lambda z: jax.nn.logsumexp(z, -1).sum())),
    "added as powers": ("numbers", ("numbers", "numbers"), jnp.logaddexp),
    "in part others": (
        "numbers", ("numbers", "numbers"), lambda z, y: jnp.concatenate([z[:, :99], y[:, 99:]], -1)
    ),
    "with guidance": ("numbers", ("numbers", "numbers"), lambda z, y: y + 1.5 * (z - y)),
    "with noise": (
        "numbers", ("logits",), lambda z: 3 * z + jax.random.gumbel(_KEY, z.shape, z.dtype)
    ),
    "some dropped": (
        "numbers", ("numbers",),
        lambda z: jnp.where(jax.random.bernoulli(_KEY, 0.9, z.shape), z, -jnp.inf),
    ),
    "penalized": ("numbers", ("numbers",), lambda z: jnp.where(z > 0, z / 1.3, z * 1.3)),
    "one penalized": ("numbers", ("numbers", "token"), lambda z, t: z.at[_rows(z), t % V].add(-2)),
    "one forbidden": (
        "numbers", ("numbers", "token"), lambda z, t: z.at[_rows(z), t % V].set(-jnp.inf)
    ),
    "one kept": (
        "numbers", ("numbers", "token"),
        lambda z, t: jnp.where(jax.nn.one_hot(t % V, V, dtype=bool), z, -1e9),
    ),
    "top k": (
        "numbers", ("numbers",), lambda z: jnp.where(z < lax.top_k(z, 9)[0][:, -1:], -jnp.inf, z)
    ),
    "top p": ("numbers", ("numbers",), _top_p),
    "top p, put back": ("numbers", ("numbers",), _top_p_put_back),
    "min p": ("numbers", ("numbers",), _min_p),
    "without the greatest": ("numbers", ("numbers",), _without_the_greatest),
    "where it is finite": (
        "numbers", ("numbers",), lambda z: jnp.nan_to_num(z, posinf=9e9, neginf=-9e9)
    ),
    # masks
    "above neighbors": ("mask", ("numbers",), lambda z: z > jnp.roll(z, 1, -1)),
    "greatest of a group": (
        "mask", ("numbers",), lambda z: z == z.reshape(len(z), 64, -1).max(-1).repeat(V // 64, -1)
    ),
    "in the nucleus": ("mask", ("logits",), lambda z: _nucleus(3 * z)),
    "one or the other": ("mask", ("mask", "mask"), jnp.logical_xor),
    "by a flag, a mask": ("mask", ("mask", "flag"), lambda m, f: m & f[:, None]),
    # places
    "sorted with their places": (
        "places", ("numbers",),
        lambda z: lax.sort((z, lax.broadcasted_iota(int, z.shape, 1)), num_keys=1)[1],
    ),
    "ranks by search": ("places", ("numbers",), _ranks_by_search),
    "sorted by others": (
        "places", ("numbers", "places"), lambda z, o: lax.sort((z, o), num_keys=1)[1]
    ),
    "places of a mask": ("places", ("mask",), lambda m: jnp.argsort(m, -1)),
    # one number for each token
    "entropy": ("one", ("numbers",), lambda z: jax.scipy.special.entr(jax.nn.softmax(z)).sum(-1)),
    "margin": ("one", ("numbers",), lambda z: -jnp.diff(lax.top_k(z, 2)[0], axis=-1)[:, 0]),
    "range": ("one", ("numbers",), lambda z: jnp.ptp(z, -1)),
    "sum of the greatest": ("one", ("numbers",), lambda z: lax.top_k(z, 10)[0].sum(-1)),
    "median": ("one", ("numbers",), lambda z: jnp.median(z, -1)),
    "a high quantile": ("one", ("numbers",), lambda z: jnp.quantile(z, 0.99, axis=-1)),
    "norm": ("one", ("numbers",), lambda z: jnp.linalg.norm(z, axis=-1)),
    "against a vector": ("one", ("numbers",), lambda z: z @ TABLE),
    "mean of all": ("one", ("numbers",), lambda z: jnp.full(len(z), z.mean())),
    "greatest of all": ("one", ("numbers",), lambda z: jnp.full(len(z), z.max())),
    "greatest in parts": ("one", ("numbers",), _greatest_in_parts),
    "mean of a mask": ("one", ("numbers", "mask"), lambda z, m: jnp.mean(z, -1, where=m)),
    "greatest of a mask": (
        "one", ("numbers", "mask"), lambda z, m: jnp.max(z, -1, where=m, initial=-9e9)
    ),
    "loss": (
        "one", ("numbers", "token"),
        lambda z, t: jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, (t % V)[:, None], -1)[:, 0],
    ),
    "by rows": (
        "one", ("numbers", "token"), lambda z, t: lax.map(lambda each: each[0][each[1] % V], (z, t))
    ),
    "of the row before": ("one", ("one",), lambda a: jnp.roll(a, 1)),
    "divergence": (
        "one", ("numbers", "numbers"),
        lambda z, y: (jax.nn.softmax(z) * (jax.nn.log_softmax(z) - jax.nn.log_softmax(y))).sum(-1),
    ),
    # integers, and conditions
    "arg min": ("token", ("numbers",), lambda z: z.argmin(-1)),
    "arg max in parts": ("token", ("numbers",), _arg_max_in_parts),
    "arg max by rows": ("token", ("numbers",), lambda z: lax.map(jnp.argmax, z)),
    "drawn": ("token", ("logits",), lambda z: jax.random.categorical(_KEY, 3 * z)),
    "drawn in order": (
        "token", ("numbers",),
        lambda z: (jnp.cumsum(jax.nn.softmax(z), -1) < _drawn(z)).sum(-1),
    ),
    "drawn of the greatest": (
        "token", ("numbers",),
        lambda z: jax.random.categorical(_KEY, jnp.where(z < lax.top_k(z, 5)[0][:, -1:], -9e9, z)),
    ),
    "beams": ("token", ("numbers",), _beams),
    "best of all": ("token", ("one",), lambda a: jnp.full(len(a), a.argmax())),
    "order of rows": ("token", ("one",), lambda a: jnp.argsort(a)),
    "accepted": (
        "token", ("token", "token"), lambda t, u: jnp.full(len(t), jnp.cumprod(t == u).sum())
    ),
    "greatest that is listed": (
        "token", ("numbers",), lambda z: jnp.where(jnp.asarray(LISTED), z, -jnp.inf).argmax(-1)
    ),
    "in a branch, a token": (
        "token", ("token", "flag"), lambda t, f: lax.cond(f[2], lambda t: t, lambda t: -t, t)
    ),
    "all": ("flag", ("mask",), lambda m: m.all(-1)),
    "the same": ("flag", ("token", "token"), lambda t, u: t == u),
    "nearly": ("flag", ("one", "one"), lambda a, b: jnp.isclose(a, b, rtol=0.1)),
    "a number": ("flag", ("one",), jnp.isfinite),
}  # fmt: skip
