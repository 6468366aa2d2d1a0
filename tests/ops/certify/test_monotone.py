import jax
import jax.numpy as jnp
import pytest

from hire_rewrite.ops.certify.monotone import examine

V = 8
KEPT = jnp.arange(V) < 5


def seen(code, dtype="float32"):
    return examine(code, (2, V), dtype)


PLAIN = {
    "nothing": lambda z: (z,),
    "a mask": lambda z: (jnp.where(KEPT, z, -jnp.inf),),
    "layout": lambda z: (z.reshape(2, 1, V).transpose(1, 0, 2)[0, :, :5],),
    "a constant beside": lambda z: (z, jnp.ones(V) * jnp.arange(V)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain(name):
    chain = seen(PLAIN[name])
    assert chain.obstacle is None
    assert chain.plain


MONOTONE = {
    "bias": lambda z: (z + jnp.arange(V),),
    "a scale of unknown sign": lambda z: (z * jnp.cos(jnp.arange(V)),),
    "temperature": lambda z: (z / 0.7,),
    "from above": lambda z: (1.0 - z,),
    "soft-cap": lambda z: (30.0 * jnp.tanh(z / 30.0),),
    "noise": lambda z: (z + jax.random.gumbel(jax.random.key(0), (2, V)),),
    "clipping": lambda z: (jnp.clip(z, -5.0, 5.0),),
    "relu": lambda z: (jax.nn.relu(z),),
    "a choice between two scales": lambda z: (jnp.where(KEPT, z * 2, z / 2),),
    "a jitted function": lambda z: (jax.jit(lambda y: jnp.exp(y))(z),),
}


@pytest.mark.parametrize("name", MONOTONE)
def test_monotone(name):
    chain = seen(MONOTONE[name])
    assert chain.obstacle is None
    assert not chain.plain
    assert chain.unit == 2.0**-24


OTHERS = {
    "mul": lambda z: (z * z,),
    "add": lambda z: (z + jnp.tanh(-2 * z),),
    "lt": lambda z: (jnp.where(z < 0, z * 1.2, z / 1.2),),
    "gt": lambda z: (z, z > 0),
    "abs": lambda z: (jnp.abs(z),),
    "reduce_max": lambda z: (z - z.max(-1, keepdims=True),),
    "div": lambda z: (1.0 / z,),
    "cos": lambda z: (jax.jit(jnp.cos)(z),),
    "scan": lambda z: (jax.lax.scan(lambda c, row: (c, row + 1), 0, z)[1],),
    "convert_element_type": lambda z: (z.astype(jnp.float16),),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_may_not_be_monotone_is_named(name):
    assert seen(OTHERS[name]).obstacle.startswith(name)


def test_what_is_not_returned_does_not_matter():
    assert seen(lambda z: (z, z > 0)[:1]).obstacle is None


def test_sides_may_be_tracers():
    @jax.jit
    def run(bias):
        chain = seen(lambda z: (z + bias,))
        assert chain.obstacle is None
        return bias

    run(jnp.ones(V))


@pytest.mark.parametrize(
    ("code", "plain", "unit"),
    [
        (lambda z: (z.astype(jnp.float32),), True, 2.0**-24),
        (lambda z: (jnp.where(KEPT, z, jnp.bfloat16(-1e9)),), True, 2.0**-24),
        # The threshold may lie between a logit and its rounding.
        (lambda z: (jnp.where(KEPT, z.astype(jnp.float32), 0.1),), False, 2.0**-24),
        (lambda z: (z.astype(jnp.float32) / 3,), False, 2.0**-24),
        (lambda z: (z / 3,), False, 2.0**-8),
    ],
)
def test_narrow_logits(code, plain, unit):
    chain = seen(code, "bfloat16")
    assert chain.obstacle is None
    assert (chain.plain, chain.unit) == (plain, unit)


def test_a_cast_to_less_is_no_plain_code():
    chain = seen(lambda z: (z.astype(jnp.bfloat16).astype(jnp.float32),))
    assert (chain.plain, chain.unit) == (False, 2.0**-8)
