"""Every call, loop and branch that is written again keeps its meaning and its numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.cases import inputs, run
from tests.same import chain, replaced, same

X = inputs(3, 4)


relu_like = jax.custom_jvp(lambda x: jnp.sin(x) * (x > 0))
relu_like.defjvp(lambda p, t: (relu_like(*p), t[0]))
vjp_like = jax.custom_vjp(chain)
vjp_like.defvjp(lambda x: (chain(x), x), lambda x, g: (g,))


def generate(x):
    """Dead and live carries, a carry that only comes out, stacked results, a random key."""

    def body(state, row):
        c, key, dead, _ = state
        key, now = jax.random.split(key)
        c = chain(c) + row + 0.01 * jax.random.normal(now, c.shape)
        return (c, key, dead + jnp.sin(c), jnp.sin(c) * 2), (c.sum(), jnp.cos(dead))

    start = (x[0], jax.random.key(1), x[0], jnp.zeros(4))
    (c, _, _, last), (sums, _) = lax.scan(body, start, jnp.concatenate([x, x]))
    return c, last, sums


FUNCTIONS = {
    "plain": chain,
    "jit": jax.jit(chain),
    "jit twice": lambda x: (lambda f: f(f(x)))(jax.jit(chain)),
    "nested jit": jax.jit(lambda x: jax.jit(lambda x: jax.jit(chain)(x) + 1)(x) * 2),
    "jit that hands through": lambda x: jax.jit(lambda x, y: (y, chain(x), x, 2.0))(x, x + 1),
    "jit with dead parts": lambda x: jax.jit(lambda x: (chain(x), jnp.cos(x)))(x)[0],
    "checkpoint": jax.checkpoint(chain),
    "checkpoint with a policy": jax.checkpoint(
        chain, policy=jax.checkpoint_policies.everything_saveable
    ),
    "custom_jvp": lambda x: relu_like(x) + 1,
    "custom_vjp": lambda x: vjp_like(x) + 1,
    "closed array": lambda x: chain(x * np.arange(4.0, dtype=np.float32)),
    "vmap": jax.vmap(chain),
    "vmapped scan": jax.vmap(lambda x: lax.scan(lambda c, r: (jnp.sin(c) + r, c), 0.0, x)),
    "scan": lambda x: lax.scan(lambda c, r: (chain(c) + r, c.sum()), x[0], x),
    "scan without slices": lambda x: lax.scan(lambda c, _: (chain(c), c), x, length=3),
    "scan without carry": lambda x: lax.scan(lambda c, r: (None, chain(r)), None, x),
    "empty scan": lambda x: lax.scan(lambda c, r: (chain(c) + r, c), x[0], x[:0]),
    "reverse scan": lambda x: lax.scan(lambda c, r: (chain(c) + r, c), x[0], x, reverse=True),
    "unrolled scan": lambda x: lax.scan(lambda c, r: (chain(c) + r, c), x[0], x, unroll=2),
    "weak carry": lambda x: lax.scan(lambda c, r: (c + chain(r).sum(), c), 0.0, x),
    "map": lambda x: lax.map(chain, x),
    "generation": generate,
    "nested scan": lambda x: lax.scan(
        lambda c, r: (lax.scan(lambda d, s: (chain(d) + s, d), c, x)[0] + r, c.sum()), x[0], x
    ),
    "fori_loop": lambda x: lax.fori_loop(0, 3, lambda i, c: chain(c) + i, x),
    "fori_loop to a traced end": lambda x: lax.fori_loop(
        0, x[0].astype(int).sum() + 5, lambda i, c: chain(c) + i, x
    ),
    "while": lambda x: lax.while_loop(
        lambda s: s[0] < 4, lambda s: (s[0] + 1, chain(s[1])), (0, x)
    ),
    "while, changed condition": lambda x: lax.while_loop(
        lambda s: jnp.sin(s[0]) < 0.9, lambda s: (s[0] + 0.1, s[1] * 2), (0.0, x)
    ),
    "while, value only out": lambda x: lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.sin(x + s[0])), (0, x)
    )[1],
    "while that never runs": lambda x: lax.while_loop(
        lambda s: s[0] < 0, lambda s: (s[0] + 1, jnp.sin(x + s[0])), (0, x)
    )[1],
    "cond": lambda x: lax.cond(x[0, 0] > 0, chain, lambda x: x * 2, x),
    "cond, other way": lambda x: lax.cond(x[0, 0] < 0, chain, lambda x: x * 2, x),
    "cond by a bool": lambda x: lax.cond((x > 0).all(), chain, lambda x: x * 2, x),
    "switch": lambda x: [
        lax.switch(i, [chain, jnp.cos, lambda x: jnp.sin(x + 1)], x) for i in (0, 1, 2, 5)
    ],
    "cond without operands": lambda x: lax.cond(x[0, 0] > 0, lambda: chain(x), lambda: x),
    "cond with a weak result": lambda x: lax.cond(
        x[0, 0] > 0, lambda x: jnp.sin(x).sum(), lambda x: 0.0, x
    ),
    "cond with dead results": lambda x: lax.cond(
        x[0, 0] > 0, lambda x: (chain(x), jnp.sin(x)), lambda x: (x, x), x
    )[0],
    "cond in scan in while": lambda x: lax.while_loop(
        lambda s: s[0] < 2,
        lambda s: (
            s[0] + 1,
            lax.scan(
                lambda c, r: (lax.cond(c.sum() > 0, chain, lambda c: c - 1, c) + r, None), s[1], x
            )[0],
        ),
        (0, x[0]),
    ),
    "scan in cond in jit": jax.jit(
        lambda x: lax.cond(
            x[0, 0] > 0,
            lambda x: lax.scan(lambda c, r: (jax.checkpoint(chain)(c) + r, c), x[0], x),
            lambda x: (x[0], x),
            x,
        )
    ),
    "associative_scan": lambda x: lax.associative_scan(lambda a, b: jnp.sin(a) + b, x),
    "value and grad": jax.value_and_grad(lambda x: jnp.sum(jax.checkpoint(chain)(x))),
    "grad of a scan": jax.grad(
        lambda x: lax.scan(lambda c, r: (chain(c) + r, None), x[0], x)[0].sum()
    ),
    "integers and bools": lambda x: lax.scan(
        lambda c, r: ((c[0] + 1, c[1] ^ (jnp.sin(r).sum() > 0)), c[0]), (0, False), x
    ),
    "debug print": lambda x: jax.debug.print("{}", jnp.sin(x).sum()) or chain(x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replacing_by_the_same(name):
    fn = FUNCTIONS[name]
    got, _, _, nodes = replaced(fn, X)
    assert nodes or name in ("empty scan", "cond by a bool")
    same(got, run(fn, X))


@pytest.mark.parametrize("name", ["generation", "jit with dead parts", "cond with dead results"])
def test_replacing_nothing(name):
    fn = FUNCTIONS[name]
    got, reports, _, _ = replaced(fn, X, names=())
    assert reports == {}
    same(got, run(fn, X))
