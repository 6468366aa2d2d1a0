"""How a head and the code behind it are written: under maps, in loops and branches, with a bias.

A form is a function of the code behind (of logits [T, V] and tokens [T]), of what makes logits
[..., V] of vectors [..., D], of such vectors [T, D], and tokens [T] (see `decisions.trial`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from tests.fuzz.operations import TABLE, V


def plain(behind, logits_of, x, tokens):
    return behind(logits_of(x), tokens)


def with_a_bias(behind, logits_of, x, tokens):
    return behind(logits_of(x) + 0.1 * TABLE, tokens)


def in_rows(behind, logits_of, x, tokens):
    return behind(logits_of(x.reshape(4, -1, x.shape[-1])).reshape(len(x), -1), tokens)


def each_by_itself(behind, logits_of, x, tokens):
    return behind(jax.vmap(logits_of)(x), tokens)


def mapped_over(behind, logits_of, x, tokens):
    return behind(lax.map(logits_of, x), tokens)


def called(behind, logits_of, x, tokens):
    logits = jax.checkpoint(logits_of)(x)
    return jax.jit(lambda *both: behind(*both))(logits, tokens)


def batches(behind, logits_of, x, tokens):
    """Each as if it were alone."""
    of_one = jax.vmap(lambda x, tokens: behind(logits_of(x), tokens))
    return of_one(x.reshape(4, -1, x.shape[-1]), tokens.reshape(4, -1))


def in_a_loop(behind, logits_of, x, tokens):
    """One batch after the other."""
    return lax.map(
        lambda each: behind(logits_of(each[0]), each[1]),
        (x.reshape(4, -1, x.shape[-1]), tokens.reshape(4, -1)),
    )


def decoded(behind, logits_of, x, tokens):
    """The next step's tokens depend on the last's."""

    def step(tokens, x):
        logits = logits_of(x)
        return logits.argmax(-1), behind(logits, tokens)

    return lax.scan(step, tokens[:8], x.reshape(4, 8, -1))


def in_a_branch(behind, logits_of, x, tokens):
    return lax.cond(
        tokens[0] >= 0,
        lambda: behind(logits_of(x), tokens),
        lambda: behind(jnp.broadcast_to(x[:, :1], (len(x), V)), tokens),
    )


FORMS = (
    plain,
    with_a_bias,
    in_rows,
    each_by_itself,
    mapped_over,
    called,
    batches,
    in_a_loop,
    decoded,
    in_a_branch,
)
