"""Functions that close over arrays: an update of these is seen when they are packed again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from tests.cases import close, inputs, rand

D = 32
X = inputs(2, D)
COPY = hire.Linear(encoding=hire.Float("float32"), force=True)


def in_place(held, name, value):
    held[name][...] = value


def replaced(held, name, value):
    held[name] = jnp.asarray(value)


def donated(held, name, value):
    held[name].delete()
    replaced(held, name, value)


UPDATES = [(lambda w: w + 0, replaced), (lambda w: w + 0, donated), (np.array, in_place)]


@pytest.mark.parametrize(("made", "update"), UPDATES)
@pytest.mark.parametrize("name", ["w", "norm"])
def test_an_update_is_packed(made, update, name):
    held = {"w": made(rand(D, D)), "norm": made(rand(1, D))}

    def model(x):
        return jnp.tanh(x @ held["w"]) * held["norm"]

    step = hire.transform(model, COPY, weights=())
    for x in (X, X[:1]):
        step.pack(x)
        close(step(x), model(x), 1e-5)
    update(held, name, -2 * np.asarray(held[name]))
    step.pack(X)
    for x in (X, X[:1]):
        close(step(x), model(x), 1e-5)
    assert len(step.plan(X).rewritten) == 1


def test_what_stands_beside_the_weights_is_updated_too():
    held = {"norm": rand(1, D)}

    def model(p, x):
        return jnp.tanh(x @ p) * held["norm"]

    step = hire.transform(model, COPY)
    first = step.pack(rand(D, D), X)
    close(step(first, X), model(rand(D, D), X), 1e-5)
    held["norm"] = rand(1, D, seed=1)
    second = step.pack(rand(D, D, seed=1), X)
    close(step(second, X), model(rand(D, D, seed=1), X), 1e-5)


@pytest.mark.parametrize("constant", [np.float32(2), np.tri(D), rand(D, D)])
def test_without_an_update_nothing_is_traced_again(constant):
    traced = []

    def model(p, x):
        traced.append(x.shape)
        return jnp.tanh(x @ p) @ (constant * jnp.ones((D, D)))

    step = hire.transform(model, COPY)
    step(step.pack(rand(D, D), X), X)
    before = len(traced)
    step(step.pack(rand(D, D, seed=1), X), X)
    assert len(traced) <= before + 1  # to see that nothing has changed


def test_inside_a_trace_that_it_closes_over():
    @jax.jit
    def outer(norm, w, x):
        step = hire.transform(lambda p, x: jnp.tanh(x @ p) * norm, COPY)
        return step(step.pack(w, x), x)

    norm, w = rand(1, D), rand(D, D)
    close(outer(norm, w, X), jnp.tanh(X @ w) * norm, 1e-5)
