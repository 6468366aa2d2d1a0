"""How a head and the code behind it are written: under maps, in loops and branches, with a bias.

A form is a function of the code behind (of logits [T, V] and tokens [T]), weights [D, V], tokens
[T, D] and others [T] (see `decisions.trial`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from tests.fuzz.operations import TABLE


def plain(behind, head, x, tokens):
    return behind(x @ head, tokens)


def transposed(behind, head, x, tokens):
    return behind(jnp.einsum("td,vd->tv", x, head.T), tokens)


def with_a_bias(behind, head, x, tokens):
    return behind(x @ head + 0.1 * TABLE, tokens)


def in_rows(behind, head, x, tokens):
    logits = x.reshape(4, -1, x.shape[-1]) @ head
    return behind(logits.reshape(len(x), -1), tokens)


def each_by_itself(behind, head, x, tokens):
    return behind(jax.vmap(lambda row: row @ head)(x), tokens)


def mapped_over(behind, head, x, tokens):
    return behind(lax.map(lambda row: row @ head, x), tokens)


def called(behind, head, x, tokens):
    logits = jax.checkpoint(jnp.matmul)(x, head)
    return jax.jit(lambda *both: behind(*both))(logits, tokens)


def batches(behind, head, x, tokens):
    """Each as if it were alone."""
    of_four = jax.vmap(lambda x, tokens: behind(x @ head, tokens))
    return of_four(x.reshape(4, -1, x.shape[-1]), tokens.reshape(4, -1))


def in_a_loop(behind, head, x, tokens):
    """One batch after the other."""
    return lax.map(
        lambda each: behind(each[0] @ head, each[1]),
        (x.reshape(4, -1, x.shape[-1]), tokens.reshape(4, -1)),
    )


def decoded(behind, head, x, tokens):
    """The next step's tokens depend on the last's."""

    def step(tokens, x):
        logits = x @ head
        return logits.argmax(-1), behind(logits, tokens)

    return lax.scan(step, tokens[:8], x.reshape(4, 8, -1))


def in_a_branch(behind, head, x, tokens):
    return lax.cond(
        tokens[0] >= 0,
        lambda: behind(x @ head, tokens),
        lambda: behind(jnp.broadcast_to(x[:, :1], (len(x), head.shape[1])), tokens),
    )


FORMS = (
    plain,
    transposed,
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
