"""Functions that close over arrays: an update of these is seen when they are packed again."""

import gc
import weakref

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


def test_an_update_that_cannot_be_packed():
    """What failed leaves nothing behind: neither its trace, nor programs of the array before."""
    held = {"w": rand(D, 64), "norm": rand(1, D)}
    rule = hire.Head(k=48, candidates=48, min_width=8, force=True)
    step = hire.transform(lambda x: jnp.tanh(x * held["norm"]) @ held["w"], rule, weights=())

    def check():
        step.pack(X)
        chosen = np.asarray(step(X)).argmax(-1)
        want = jnp.tanh(X * held["norm"]) @ held["w"]
        np.testing.assert_array_equal(chosen, want.argmax(-1))

    check()
    held["w"] = rand(D, 32)
    for _ in range(2):
        with pytest.raises(hire.HireRewriteError, match="k=48 is more than the width 32"):
            step.pack(X)
    held.update(w=-rand(D, 64), norm=rand(1, D)[:, ::-1])
    check()


def test_what_has_to_be_looked_at_is_packed_on_first_sight():
    w = rand(D, D).astype(jnp.bfloat16).astype(jnp.float32)
    for rules in ((), (hire.Linear(force=True),)):
        step = hire.transform(lambda x: x @ w, *rules, weights=())
        with pytest.warns(hire.HireRewriteWarning, match="packed on first sight"):
            close(step(X), X @ w, 1e-5)
        assert step._sight._seen[1][0].info.sites


def test_a_number_of_python_beside_an_array_of_another_shape():
    held = {"w": rand(D, D)}
    step = hire.transform(lambda scale, x: scale * (x @ held["w"]), COPY, weights=())
    step.pack(2.0, X)
    held["w"] = rand(D + 1, D)
    with pytest.raises(TypeError, match="dot_general"):
        step.pack(2.0, X)


@pytest.mark.filterwarnings("ignore::hire_rewrite.HireRewriteWarning")
@pytest.mark.parametrize("call", [lambda step, x: step(x), lambda step, x: jax.jit(step)(x)])
def test_what_is_dropped_is_freed(call):
    """The function, its programs, and the arrays that it closes over, or that were packed."""

    def made():
        w, rule = rand(D, D), hire.Linear(encoding=hire.Blocks(8), force=True)
        return w, hire.transform(lambda x: x @ w, rule, weights=())

    w, step = made()
    call(step, X)
    packed = jax.tree.leaves(step._sight._seen[1])
    held = [weakref.ref(item) for item in (step, w, *packed)]
    del step, w, packed
    gc.collect()
    assert not any(ref() is not None for ref in held)
