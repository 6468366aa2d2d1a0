"""Answers of two steps side by side, by numbers that are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from examples.smollm2 import compare

VOCAB, END = 80, 7
NEXT = {3: 5, 5: 4, 4: END, END: 2, 2: 1}  # the likeliest token after each


def chances(table, seed, noise):
    """Logits after each token, of which the likeliest next one's are the greatest."""
    logits = noise * np.random.default_rng(seed).standard_normal((VOCAB, VOCAB)).astype(np.float32)
    for token, following in table.items():
        logits[token, following] = 9.0
    return jnp.asarray(logits)


def step(weights, token, cache):
    """Chances by the token alone; the cache counts the tokens that were read."""
    return weights[token], cache + 1


def read():
    return jnp.zeros((1, VOCAB)).at[0, 3].set(1.0), jnp.int32(0)


DENSE = chances(NEXT, 0, 1.0)
OTHER = chances(NEXT | {5: 6}, 1, 1.0)


def test_an_answer_ends_behind_its_end():
    said = compare.answer(read, (step, DENSE), 9, END)
    assert said.first == 3
    assert said.tokens.tolist() == [5, 4, END]
    assert said.read == [3, 5, 4]
    np.testing.assert_array_equal(said.logits, DENSE[jnp.array(said.read)])
    assert len(compare.answer(read, (step, DENSE), 2, END).tokens) == 2


def test_another_step_is_given_the_same_tokens():
    done = compare.compare(read, (step, DENSE), (step, OTHER), 9, END)
    assert done.rewritten.tolist() == [5, 6, END]
    assert done.same == 2
    seen = np.array([3, 5, 4])
    p, q = (np.asarray(logits, np.float64)[seen] for logits in (DENSE, OTHER))
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (p, q))
    np.testing.assert_allclose(done.kl, (p * np.log(p / q)).sum(-1), rtol=1e-9)
    for i, token in enumerate(seen):
        top = [set(np.argsort(np.asarray(z[token]))[-compare.TOP :]) for z in (DENSE, OTHER)]
        assert done.recall[i] == pytest.approx(len(top[0] & top[1]) / compare.TOP)


def test_the_same_step_diverges_by_nothing():
    done = compare.compare(read, (step, DENSE), (step, DENSE), 9, END)
    assert done.same == len(done.dense)
    assert (done.recall == 1.0).all()
    assert (abs(done.kl) < 1e-15).all()
