"""What is done behind a head: the operations that programs are made of (see `behind`).

Each has the kind of what it returns, and the kinds of what it reads:

    numbers  [T, V] floats      places  [T, V] tokens in some order, or ranks
    mask     [T, V] conditions  one     [T] floats
    token    [T] integers       flag    [T] conditions
    logits   the head's own numbers
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

V = 4096
_RNG = np.random.default_rng(5)
TABLE = _RNG.normal(size=V).astype(np.float32)
LISTED = _RNG.random(V) < 0.02


def _at(values, index):
    return jnp.take_along_axis(values, (index % V)[:, None], -1)[:, 0]


def _each(one):
    return one[:, None]


OPERATIONS = {
    # numbers of numbers
    "softmax": ("numbers", ("numbers",), jax.nn.softmax),
    "log_softmax": ("numbers", ("numbers",), jax.nn.log_softmax),
    "warmer": ("numbers", ("numbers",), lambda z: z / 0.7),
    "negated": ("numbers", ("numbers",), lambda z: -z),
    "absolute": ("numbers", ("numbers",), jnp.abs),
    "squared": ("numbers", ("numbers",), jnp.square),
    # not so far in saturation that several are equal: see docs/limits.md
    "capped softly": ("numbers", ("numbers",), lambda z: 300 * jnp.tanh(z / 300)),
    "between": ("numbers", ("numbers",), lambda z: jnp.clip(z, -1.0, 1.0)),
    "moved": ("numbers", ("numbers",), lambda z: z + 8),
    "capped": ("numbers", ("numbers",), lambda z: jnp.minimum(z, 0.6)),
    "not below": ("numbers", ("numbers",), lambda z: jnp.maximum(z, -1.0)),
    "rounded": ("numbers", ("numbers",), jnp.round),
    "sums of all before": ("numbers", ("numbers",), lambda z: jnp.cumsum(z, -1)),
    "sorted": ("numbers", ("numbers",), lambda z: jnp.sort(z, -1)),
    "sorted downwards": ("numbers", ("numbers",), lambda z: jnp.sort(z, -1)[:, ::-1]),
    "negated, sorted": ("numbers", ("numbers",), lambda z: -jnp.sort(-z, -1)),
    "differences": ("numbers", ("numbers",), lambda z: jnp.diff(z, prepend=z[:, :1])),
    "plus a vector": ("numbers", ("numbers",), lambda z: z + TABLE),
    "times a vector": ("numbers", ("numbers",), lambda z: z * TABLE),
    "a few forbidden": ("numbers", ("numbers",), lambda z: z.at[:, 3:9].set(-jnp.inf)),
    "one made more": ("numbers", ("numbers",), lambda z: z.at[:, 7].add(3.0)),
    "with another token's": ("numbers", ("numbers",), lambda z: z - 0.5 * z[::-1]),
    "less one": ("numbers", ("numbers", "one"), lambda z, a: z - _each(a)),
    "over one": ("numbers", ("numbers", "one"), lambda z, a: z / (1 + jnp.abs(_each(a)))),
    "times one": ("numbers", ("numbers", "one"), lambda z, a: z * _each(a)),
    "the greater": ("numbers", ("numbers", "numbers"), jnp.maximum),
    "times others": ("numbers", ("numbers", "numbers"), jnp.multiply),
    "by a flag": ("numbers", ("numbers", "flag"), lambda z, f: jnp.where(_each(f), z, 2 * z)),
    "kept, or forbidden": ("numbers", ("numbers", "mask"), lambda z, m: jnp.where(m, z, -jnp.inf)),
    "forbidden, or kept": ("numbers", ("numbers", "mask"), lambda z, m: jnp.where(m, -jnp.inf, z)),
    "kept, or zero": ("numbers", ("numbers", "mask"), lambda z, m: jnp.where(m, z, 0.0)),
    "times a mask": ("numbers", ("numbers", "mask"), jnp.multiply),
    "in an order": ("numbers", ("numbers", "places"), lambda z, o: jnp.take_along_axis(z, o, -1)),
    "put back": (
        "numbers",
        ("numbers", "places"),
        lambda z, o: jnp.zeros_like(z).at[jnp.arange(len(z))[:, None], o].set(z),
    ),
    "a mask in numbers": ("numbers", ("mask",), lambda m: m.astype(jnp.float32)),
    "a table in an order": ("numbers", ("places",), lambda o: jnp.asarray(TABLE)[o]),
    # masks
    "above a number": ("mask", ("numbers",), lambda z: z > 0.3),
    "below a small number": ("mask", ("numbers",), lambda z: z < 1e-3),
    "below nine tenths": ("mask", ("numbers",), lambda z: z < 0.9),
    "above one": ("mask", ("numbers", "one"), lambda z, a: z > _each(a)),
    "not below one": ("mask", ("numbers", "one"), lambda z, a: ~(z < _each(a))),
    "as great as one": ("mask", ("numbers", "one"), lambda z, a: z == _each(a)),
    "above others": ("mask", ("numbers", "numbers"), lambda z, y: z > y),
    "finite": ("mask", ("numbers",), jnp.isfinite),
    "not": ("mask", ("mask",), jnp.logical_not),
    "and": ("mask", ("mask", "mask"), jnp.logical_and),
    "or listed": ("mask", ("mask",), lambda m: m | LISTED),
    "and listed": ("mask", ("mask",), lambda m: m & LISTED),
    "all but one": ("mask", ("token",), lambda t: jnp.arange(V) != _each(t)),
    "the first twenty": ("mask", ("places",), lambda o: o < 20),
    "all but the first twenty": ("mask", ("places",), lambda o: o >= 20),
    "where the first lie": (
        "mask",
        ("places",),
        lambda o: jnp.zeros(o.shape, bool).at[jnp.arange(len(o))[:, None], o[:, :20]].set(True),
    ),
    "a mask put back": (
        "mask",
        ("mask", "places"),
        lambda m, o: jnp.zeros_like(m).at[jnp.arange(len(o))[:, None], o].set(m),
    ),
    "a list in an order": ("mask", ("places",), lambda o: jnp.asarray(LISTED)[o]),
    # places
    "order": ("places", ("numbers",), lambda z: jnp.argsort(z, -1)),
    "order downwards": ("places", ("numbers",), lambda z: jnp.argsort(-z, -1)),
    "ranks": ("places", ("places",), lambda o: jnp.argsort(o, -1)),
    "the other way": ("places", ("places",), lambda o: o[:, ::-1]),
    # one number for each token
    "greatest": ("one", ("numbers",), lambda z: z.max(-1)),
    "least": ("one", ("numbers",), lambda z: z.min(-1)),
    "sum": ("one", ("numbers",), lambda z: z.sum(-1)),
    "mean": ("one", ("numbers",), lambda z: z.mean(-1)),
    "deviation": ("one", ("numbers",), lambda z: z.std(-1)),
    "product": ("one", ("numbers",), lambda z: jnp.prod(1 + 1e-3 * z, -1)),
    "normalizer": ("one", ("numbers",), lambda z: jax.nn.logsumexp(z, -1)),
    "the tenth": ("one", ("numbers",), lambda z: lax.top_k(z, 10)[0][:, -1]),
    "the first": ("one", ("numbers",), lambda z: z[:, 0]),
    "a certain one": ("one", ("numbers",), lambda z: z[:, 77]),
    "the one at": ("one", ("numbers", "token"), _at),
    "by a one-hot row": (
        "one", ("numbers", "token"), lambda z, t: (z * jax.nn.one_hot(t % V, V)).sum(-1)
    ),
    "less another": ("one", ("one", "one"), jnp.subtract),
    "halved": ("one", ("one",), lambda a: a / 2),
    # integers, and conditions
    "arg max": ("token", ("numbers",), lambda z: z.argmax(-1)),
    "arg max of a softmax": ("token", ("numbers",), lambda z: jax.nn.softmax(z).argmax(-1)),
    "the third": ("token", ("numbers",), lambda z: lax.top_k(z, 3)[1][:, 2]),
    "the first place": ("token", ("places",), lambda o: o[:, 0]),
    "the ninth place": ("token", ("places",), lambda o: o[:, 8]),
    "the last place": ("token", ("places",), lambda o: o[:, -1]),
    "the place at": ("token", ("places", "token"), _at),
    "the next": ("token", ("token",), lambda t: (t + 1) % V),
    "one of two": ("token", ("flag", "token", "token"), jnp.where),
    "count": ("token", ("mask",), lambda m: m.sum(-1)),
    "where the first is": ("token", ("mask",), lambda m: m.argmax(-1)),
    "in whole numbers": ("token", ("one",), lambda a: (8 * a).astype(jnp.int32)),
    "above zero": ("flag", ("one",), lambda a: a > 0.0),
    "above another": ("flag", ("one", "one"), lambda a, b: a > b),
    "any": ("flag", ("mask",), lambda m: m.any(-1)),
    "of a certain one": ("flag", ("mask",), lambda m: m[:, 77]),
    "of the one at": ("flag", ("mask", "token"), _at),
    "a table says": ("flag", ("token",), lambda t: jnp.asarray(LISTED)[t % V]),
}  # fmt: skip
