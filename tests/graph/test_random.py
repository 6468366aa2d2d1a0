"""Random numbers are not weights, whatever their keys are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hire_rewrite as hire

D, F = 32, 128
X = jnp.ones((1, D))
RULE = hire.FFN(k=1.0, candidates=1.0, force=True)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, F, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(F, D, rngs=rngs)

    def __call__(self, x):
        return self.down(self.dropout(nnx.relu(self.up(x))))


def call_of(model):
    graph, state = nnx.split(model)
    return (lambda state, x: nnx.merge(graph, state)(x)), state


def test_an_active_dropout_stands_in_the_way():
    plan = hire.inspect(*call_of(Block(nnx.Rngs(0))), X, rules=[RULE])
    assert not plan.sites
    assert any("dropout" in rejection.reason for rejection in plan.rejected)
    model = Block(nnx.Rngs(0))
    model.eval()
    assert hire.inspect(*call_of(model), X, rules=[RULE]).sites[0].status == "rewritten"


def dropped(params, x):
    """A dropout behind the block, whose mask is drawn at each call."""
    y = jax.nn.relu(x @ params["up"]) @ params["down"]
    return y * jax.random.bernoulli(params["key"], 0.5, y.shape)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_a_key_among_the_weights_stays_a_key(make):
    up, down = jax.random.normal(jax.random.key(1), (2, D, F))
    params = {"up": up, "down": down.T, "key": make(0)}
    step = hire.transform(dropped, RULE)
    packed = step.pack(params, X)
    assert "params/key" in packed.weights
    np.testing.assert_allclose(step(packed, X), dropped(params, X), rtol=1e-4, atol=1e-4)


def test_a_fixed_projection_is_a_weight():
    def project(params, x):
        up = jax.random.normal(jax.random.key(3), (D, F))
        return jax.nn.relu(x @ up) @ params

    down = jax.random.normal(jax.random.key(1), (F, D))
    step = hire.transform(project, RULE)
    assert step.plan(down, X).sites[0].status == "rewritten"
    got = step(step.pack(down, X), X)
    np.testing.assert_allclose(got, project(down, X), rtol=1e-4, atol=1e-4)
