"""Every call, loop and branch that is written again keeps its meaning and its numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hire_rewrite._compat import call_params, is_high_call, open_jaxpr
from hire_rewrite.graph.flatten import inner_jaxprs
from hire_rewrite.graph.trace import trace
from hire_rewrite.passes.rewrite import rewrite
from tests.cases import inputs, run
from tests.same import Same, chain, nodes_of, replaced, same

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


@pytest.mark.sampled(3)
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


# What a call that is written again keeps


def written(fn, *args, names=("sin",)):
    """The primitives and parameters of all equations of `fn` with `names` replaced."""
    traced = trace(fn, args, {}, ())
    swaps = [Same(f"{i}", (node,)) for i, node in enumerate(nodes_of(traced, *names))]
    rewritten = rewrite(traced, swaps)
    eqns, stack = [], [jax.make_jaxpr(lambda *xs: rewritten(dict(enumerate(xs)))[0])(*args)]
    while stack:
        found = open_jaxpr(stack.pop())[0].eqns
        eqns += found
        stack += [jaxpr for eqn in found for jaxpr in inner_jaxprs(eqn)]
    return [(name_of(eqn), call_params(eqn)) for eqn in eqns]


def name_of(eqn):
    """The name of its primitive: with JAX_REMAT3 a checkpoint is a call of another kind."""
    return "remat2" if is_high_call(eqn) and "policy" in call_params(eqn) else str(eqn.primitive)


def params_of(eqns, name):
    (params,) = (params for primitive, params in eqns if primitive == name)
    return params


def test_a_jit_keeps_its_options():
    call = jax.jit(lambda x, y: jnp.sin(x) + y, keep_unused=True, donate_argnums=1, inline=False)
    params = params_of(written(lambda x: call(x, x + 1), X), "jit")
    assert params["name"] == "<lambda>"
    assert params["keep_unused"]
    assert sorted(params["donated_invars"]) == [False, True]


def test_a_jit_keeps_its_shardings():
    mesh = jax.make_mesh((3,), ("x",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    call = jax.jit(lambda x: (jnp.sin(x), x), in_shardings=rows, out_shardings=rows)
    fn = lambda x: jnp.stack(call(x))  # noqa: E731
    shardings = [p["sharding"] for name, p in written(fn, X) if name == "sharding_constraint"]
    assert shardings == [rows] * 3
    same(replaced(fn, X)[0], run(fn, X))


def test_a_checkpoint_keeps_its_policy():
    policy = jax.checkpoint_policies.dots_saveable
    call = jax.checkpoint(lambda x, y: jnp.sin(x) * y, policy=policy, prevent_cse=(True, False))
    params = params_of(written(lambda x: call(x, x + 1), X), "remat2")
    assert params["policy"] is policy
    assert params["prevent_cse"] == (True, False)


def test_a_checkpoint_in_a_gradient_keeps_its_barrier():
    """Else the compiler would find what the forward pass has computed, and keep it."""
    fn = jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))(x).sum())
    assert "optimization_barrier" in [name for name, _ in written(fn, X, names=("cos",))]
    same(replaced(fn, X, names=("cos",))[0], run(fn, X))


def test_a_scan_keeps_its_order():
    fn = lambda x: lax.scan(lambda c, r: (jnp.sin(c) + r, c), x[0], x, reverse=True, unroll=3)  # noqa: E731
    params = params_of(written(fn, X), "scan")
    assert (params["length"], params["reverse"], params["unroll"]) == (3, True, 3)


def test_platforms():
    """Lowered for another platform it takes that one's branch."""

    def fn(x):
        return lax.platform_dependent(
            x, cpu=jnp.sin, cuda=lambda x: x * 2, default=lambda x: jnp.sin(x) + 1
        )

    got, _, rewritten, _ = replaced(fn, X)
    same(got, run(fn, X))
    traced = jax.jit(lambda x: rewritten({0: x})[0]).trace(X)
    for platform, word in {"cpu": "sine", "cuda": "multiply", "tpu": "add"}.items():
        assert word in traced.lower(lowering_platforms=(platform,)).as_text()
    assert "sine" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_gradients_go_through_calls_that_hand_through():
    """The derivative of an identity, as where gradients are clipped or added over devices."""
    clip = jax.custom_vjp(lambda x: x)
    clip.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))
    fn = lambda x: jnp.sin(clip(x)).sum()  # noqa: E731
    rewritten = replaced(fn, X)[2]
    np.testing.assert_allclose(jax.grad(lambda x: rewritten({0: x})[0][0])(X), jax.grad(fn)(X))
