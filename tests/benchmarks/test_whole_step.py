"""The comparison of whole decode steps: what logits differ by, and sides that are missing."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from benchmarks import peers, timing, whole_step
from examples.smollm2 import model, weights

FIRST = 1


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_differences():
    rng = np.random.default_rng(0)
    got, expected = rng.normal(size=(2, 6, 11)).astype(np.float32)
    got[:3] = expected[:3] + 0.5  # the same chances
    tokens = rng.integers(0, 11, 6).astype(np.int32)
    p, q = softmax(expected.astype(np.float64)), softmax(got.astype(np.float64))
    means = whole_step.differences(got, expected, tokens)
    assert float(means["kl"]) == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-5)
    assert float(means["same_token"]) == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    nll = -np.log([q[i, tokens[i + 1]] for i in range(5)]).mean()
    assert float(means["nll"]) == pytest.approx(nll, rel=1e-5)
    assert float(whole_step.differences(expected, expected, tokens)["kl"]) == pytest.approx(0)


def test_sides_beside_dense(monkeypatch):
    monkeypatch.setattr(peers, "build", lambda *_: "not installed (no wheel)")
    monkeypatch.setattr(timing, "bandwidth", lambda: 1e9)
    monkeypatch.setattr(timing, "LONG", 2**12)
    config = model.Config(vocab=40, d_model=16, d_ff=24, layers=2, heads=2, kv_heads=1,
                          rope_base=1e4, norm_eps=1e-5)  # fmt: skip
    rng = np.random.default_rng(0)
    params = small(config, rng)
    halved = {**params, "embed": params["embed"] * 0.5}
    step = jax.jit(functools.partial(model.decode_step, config), donate_argnums=2)
    sides = {
        "dense": whole_step.jax_side(config, FIRST, step, params, 4_000_000),
        "halved": whole_step.jax_side(config, FIRST, step, halved, 2_000_000),
    }
    texts = {kind: rng.integers(0, 40, 9).astype(np.int32) for kind in ("prose", "code")}
    forward = lambda tokens: model.forward(config, params, tokens[None])[0]  # noqa: E731
    result = whole_step.measure(
        sides, texts, forward, rounds=2, first=FIRST, path=pathlib.Path("none.gguf"), size=0
    )
    dense, halved = result["sides"]["dense"], result["sides"]["halved"]
    assert dense["kl"]["all"] == pytest.approx(0, abs=1e-4)
    assert dense["same_token"] == {"prose": 1.0, "code": 1.0, "all": 1.0}
    assert halved["kl"]["all"] == pytest.approx(
        (halved["kl"]["prose"] + halved["kl"]["code"]) / 2, abs=1e-5
    )
    assert halved["kl"]["all"] > 1e-3
    assert dense["ratio"] == 1.0
    assert (dense["floor_ms"], halved["floor_ms"]) == (4.0, 2.0)
    assert result["missing"] == {"llama.cpp": "not installed (no wheel)"}


def test_prompts_are_read_by_each_side(monkeypatch):
    """All see the same tokens in an empty cache, and say the same where nothing is lost."""
    monkeypatch.setattr(timing, "LONG", 2**12)
    monkeypatch.setattr(whole_step, "PROMPTS", (5, 9))
    said = {}

    def alternate(sides, rounds, cold):
        for name, side in sides.items():
            first, second = (np.asarray(side()) for _ in range(2))
            np.testing.assert_array_equal(first, second)  # nothing is left in the cache
            said.setdefault(name, []).append(first)
        return timing.Timings({name: tuple(range(2, 2 + rounds)) for name in sides})

    monkeypatch.setattr(timing, "alternate", alternate)
    config = model.Config(vocab=40, d_model=16, d_ff=24, layers=2, heads=2, kv_heads=1,
                          rope_base=1e4, norm_eps=1e-5)  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), small(config, rng))
    step = hire.transform(functools.partial(model.decode_step, config))
    packed = step.pack(params, jnp.zeros(1, jnp.int32), model.init_cache(config, 1, 512))
    assert packed.sites
    text = rng.integers(0, 40, 12).astype(np.int32)
    prefill = functools.partial(model.prefill, config)
    result = whole_step.prompts(prefill, params, {"same": ((), packed)}, config, text, 3)
    assert list(result) == ["5", "9"]
    for length, rows in result.items():
        assert (rows["same"]["ratio"], rows["same"]["median_ms"]) == (1.0, 3000.0)
        assert rows["same"]["packed"] == len(packed.sites)
        i, expected = (
            list(result).index(length),
            model.forward(config, params, text[None, : int(length)]),
        )
        for name in ("dense", "same"):
            np.testing.assert_allclose(said[name][i], expected[:, -1], rtol=1e-4, atol=1e-4)


def small(config, rng):
    def matrices(*shape):
        return (rng.normal(size=shape) / np.sqrt(shape[-2])).astype(np.float32)

    d, f, layers, kv = config.d_model, config.d_ff, config.layers, config.kv_heads * config.head_dim
    ones = np.ones((layers, d), np.float32)
    return {
        "embed": matrices(config.vocab, d),
        "layers": {
            "attn_norm": ones, "ffn_norm": ones,
            "wq": matrices(layers, d, d), "wk": matrices(layers, d, kv),
            "wv": matrices(layers, d, kv), "wo": matrices(layers, d, d),
            "w_gate": matrices(layers, d, f), "w_up": matrices(layers, d, f),
            "w_down": matrices(layers, f, d),
        },
        "final_norm": np.ones(d, np.float32),
    }  # fmt: skip


def test_llama_cpp_reads_the_same_file():
    pytest.importorskip("cyllama")
    from benchmarks.peers import llama_cpp

    decoder = llama_cpp.Decoder(weights.find(), 64, spins=0)
    try:
        tokens = decoder.greedy(FIRST, 6)
        read = np.array([FIRST, *tokens[:-1]], np.int32)
        logits = decoder.logits(read)
        assert decoder.answer([FIRST], 6) == tokens
        assert decoder.answer([FIRST, *tokens[:2]], 4) == tokens[2:]
    finally:
        decoder.close()
    assert logits.argmax(-1).tolist() == tokens
    assert len(decoder.own) == 1
    params, config = weights.load()
    dense = model.forward(config, params, read[None])[0]
    assert float(whole_step.differences(logits, dense, read)["kl"]) < 0.1
