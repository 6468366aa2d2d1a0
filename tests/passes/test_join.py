"""Sites that read the same inputs run in one call, where nothing keeps them apart."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.xla_metadata import set_xla_metadata

import hire_rewrite as hire
from hire_rewrite import Blocks, Float, Linear
from tests.cases import close, inputs, rand

D = 64
PARAMS = {name: rand(D, D, seed=i) / 8 for i, name in enumerate("qkvo")}
X = inputs(2, D)


def attention(w, x):
    q, k, v = x @ w["q"], x @ w["k"], x @ w["v"]
    return (jnp.tanh(q) * k + v) @ w["o"]


def calls(step, params=PARAMS):
    """How many results each call of a linear layer has."""
    packed = step.pack(params, X)
    eqns = jax.make_jaxpr(step.__call__)(packed, X).jaxpr.eqns
    return sorted(
        len(eqn.outvars) for eqn in eqns if str(eqn.params.get("name")).startswith("hire_linear")
    )


def everywhere(fn, **settings):
    return hire.transform(fn, Linear(force=True, **({"encoding": Blocks(8)} | settings)))


def test_products_of_one_input_are_one_call():
    step = everywhere(attention)
    assert calls(step) == [1, 3]
    want = jnp.float32(attention(PARAMS, X))
    packed = step.pack(PARAMS, X)
    close(step(packed, X), want, 0.02)
    assert len(packed.sites) == 4
    for row in range(2):
        close(step(packed, X[row : row + 1])[0], step(packed, X)[row], 1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"k": 0.5}, {"k": 0.5, "exact": Blocks(8)}, {"encoding": Float("bfloat16")}],
    ids=["exact columns", "columns in 8 bits", "an encoding that reads one matrix at a time"],
)
def test_settings(settings):
    step = everywhere(attention, **settings)
    assert calls(step) == [1, 3]
    close(step(step.pack(PARAMS, X), X), attention(PARAMS, X), 0.02)


def test_encodings_apart():
    rules = (
        Linear(encoding=Blocks(8), path="w/q", force=True),
        Linear(encoding=Blocks(4), path="w/[kv]", force=True),
        Linear(encoding=Blocks(8), path="w/o", force=True),
    )
    assert calls(hire.transform(attention, *rules)) == [1, 1, 2]


def test_inputs_and_annotations_apart():
    def model(w, x):
        q = x @ w["q"]
        with set_xla_metadata(mark="here"):
            k = x @ w["k"]
        return q + k + jnp.tanh(x) @ w["v"] + x @ w["o"]

    assert calls(everywhere(model)) == [1, 1, 2]


def test_a_call_stays_whole():
    """One layer stands in a named call, which would dissolve if it left."""

    @jax.jit
    def apart(w, x):
        return jnp.tanh(x @ w)

    def model(w, x):
        return apart(w["q"], x) + x @ w["k"] + x @ w["v"]

    step = everywhere(model)
    jaxpr = jax.make_jaxpr(step.__call__)(step.pack(PARAMS, X), X).jaxpr
    assert [str(eqn.params["name"]) for eqn in jaxpr.eqns if "name" in eqn.params].count(
        "apart"
    ) == 1
    assert calls(step) == [2]
    close(step(step.pack(PARAMS, X), X), model(PARAMS, X), 0.02)


def test_under_scan_and_vmap():
    stacked = jax.tree.map(lambda w: jnp.stack([w, w / 2]), PARAMS)

    def model(w, x):
        return jax.lax.scan(lambda x, layer: (x + attention(layer, x), None), x, w)[0]

    step = everywhere(model)
    packed = step.pack(stacked, X)
    close(step(packed, X), model(stacked, X), 0.02)
    close(jax.vmap(lambda x: step(packed, x[None])[0])(X), step(packed, X), 1e-5)


def test_many_tokens():
    step, x = everywhere(attention), inputs(40, D)
    close(step(step.pack(PARAMS, X), x), attention(PARAMS, x), 0.02)
