"""The benchmark of blocks whose zeros are not read: what it counts, on small blocks and models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from benchmarks import relu_blocks, relu_layers, relu_page, relu_proofs, timing
from benchmarks import relu_translation as marian
from examples.translate import model
from examples.translate.tokenizer import END, UNKNOWN

D, F = 32, 128
TINY = model.Config(vocab=40, d_model=16, d_ff=24, encoder_layers=2, decoder_layers=2, heads=2)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def block(rng):
    real = rng.beta(0.5, 2, 500)
    (w,) = relu_blocks.made(D, F, 1, "float32", real, 0.2)
    return relu_proofs.Block(w["up"], w["bias"], w["down"])


def test_shares_have_the_mean_and_the_order_of_the_real_ones(rng):
    real = rng.beta(0.3, 2, 1000)
    found = relu_blocks.shares(real, 4000, 0.1, np.random.default_rng(5))
    drawn = np.clip(np.random.default_rng(5).choice(real, 4000), 1e-4, 1 - 1e-4)
    assert found.mean() == pytest.approx(0.1, abs=1e-9)
    assert (np.diff(found[np.argsort(drawn)]) >= 0).all()
    assert found.std() > 0.03


def test_made_blocks_are_as_often_positive(rng):
    (w,) = relu_blocks.made(256, 1024, 1, "float32", rng.beta(0.3, 2, 1000), 0.1)
    found = relu_blocks.statistics(w, rng, tokens=200)
    assert found["positive"] == pytest.approx(0.1, abs=0.01)


def test_overlap():
    positive = np.array([[1, 1, 0, 0], [1, 0, 0, 1], [1, 0, 0, 1]], bool)
    assert relu_blocks.overlap(positive) == {"positive": 0.5, "again": 0.75}


def test_bounds_hold(rng):
    x, residual = rng.standard_normal((5, 256)), rng.standard_normal((7, 256))
    *proved, guess = relu_proofs.bounds(x, residual)
    exact = x @ residual.T
    for bound in proved:
        assert (np.abs(exact - bound.known) <= bound.off * (1 + 1e-12)).all(), bound.name
    whole, *others = proved
    np.testing.assert_allclose(
        whole.off, np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(residual, axis=1)
    )
    assert all((bound.off <= whole.off * (1 + 1e-12)).all() for bound in others)
    np.testing.assert_allclose(guess.off, whole.off * 3 / 16)


def test_check_finds_nothing_wrong_in_a_proof(block, rng):
    tokens = rng.standard_normal((40, D), np.float32)
    found = relu_proofs.check(block, tokens, hire.Quantized(8))
    pre = tokens.astype(np.float64) @ np.asarray(block.up, np.float64) + np.asarray(block.bias)
    assert found["positive"] == pytest.approx((pre > 0).mean())
    assert found["wrong"] == 0
    assert found["greatest"] < 0
    assert found["skipped"] == round((1 - found["read"]) * pre.size)
    assert 0.15 < found["positive"] <= found["read"] < 0.4
    assert max(found["off"], found["orders"]) < 1e-5


def test_check_finds_what_a_wrong_bound_misses(block, rng, monkeypatch):
    by_hand = relu_proofs.by_hand
    monkeypatch.setattr(relu_proofs, "by_hand", lambda b, p, _: by_hand(b, p, 1e-3))
    found = relu_proofs.check(block, rng.standard_normal((40, D), np.float32), hire.Quantized(4))
    assert found["wrong"] > 0
    assert found["greatest"] > 0
    assert found["off"] > 100 * found["orders"]


def test_sides_beside_dense(rng, monkeypatch):
    monkeypatch.setattr(timing, "LONG", 2**12)
    sides = (relu_blocks.TOLD, "4 bits, 3 deviations")
    found = relu_blocks.measure(
        D, F, "float32", 0.2, rng.beta(0.5, 2, 500), layers=1, tokens=(1, 2), rounds=2,
        bandwidth=1e9, only=sides,
    )  # fmt: skip
    assert [(row["side"], row["tokens"]) for row in found["rows"]] == [
        (name, tokens) for tokens in (1, 2) for name in ("dense", *sides)
    ]
    dense, told, guessed = found["rows"][:3]
    assert dense["bytes"] == 2 * D * F * 4
    assert dense["ratio"] == 1.0
    picked = round(told["read"] * F)
    assert told["bytes"] == (F + picked) * D * 4
    assert (told["missed"], told["whole"]) == (0, 0)
    assert told["error"] < 1e-5
    assert guessed["read"] > told["read"]
    assert guessed["bytes"] == F * (D // 2 + 2) + 2 * round(guessed["read"] * F) * D * 4


@pytest.fixture(scope="module")
def translation():
    draw = np.random.default_rng(0).standard_normal
    d, f = TINY.d_model, TINY.d_ff

    def array(*shape):
        return jnp.asarray(draw(shape) / np.sqrt(shape[0]), jnp.float32)

    def block(**shapes):
        arrays = {name: array(*shape) for name, shape in shapes.items()}
        return arrays | {"norm_scale": jnp.ones(d), "norm_bias": jnp.zeros(d)}

    def ffn():
        return block(w1=(d, f), b1=(f,), w2=(f, d), b2=(d,))

    def attn():
        matrices = {f"w{part}": (d, d) for part in "qkvo"}
        return block(**matrices, **{f"b{part}": (d,) for part in "qkvo"})

    params = {
        "embed": array(d, TINY.vocab).T,
        "encoder": [{"attn": attn(), "ffn": ffn()} for _ in range(2)],
        "decoder": [
            {"rnn": block(w=(d, d), wf=(d, d), bf=(d,)), "attn": attn(), "ffn": ffn()}
            for _ in range(2)
        ],
        "head_bias": jnp.zeros(TINY.vocab),
    }
    mask = np.arange(6) < np.array([6, 3, 4])[:, None]
    ids = np.random.default_rng(1).integers(2, TINY.vocab, (3, 6), dtype=np.int32)
    return marian.Translation(params, TINY, ids, mask)


def test_inputs_are_those_of_the_layers(translation):
    """What the last layer reads gives the step's logits."""
    tokens = np.array([[5, 7, END, END], [9, END, END, END], [4, 6, 8, END]], np.int32)
    assert [marian.length(row) for row in tokens] == [3, 2, 4]
    found = translation.inputs(tokens)
    assert {x.shape for x in found["encoder"]} == {(13, TINY.d_model)}
    assert {x.shape for x in found["decoder"]} == {(9, TINY.d_model)}
    params = translation.params
    x = model._ffn(params["decoder"][-1]["ffn"], jnp.asarray(found["decoder"][-1]))
    logits = x @ params["embed"].T + params["head_bias"]
    for i, places in enumerate((slice(0, 3), slice(3, 5), slice(5, 9))):
        want = translation.forced(translation.dense, i, tokens[i])[: marian.length(tokens[i])]
        np.testing.assert_allclose(logits[places], want, rtol=1e-4, atol=1e-4)


def test_what_differs_is_looked_at(translation):
    dense = np.array([[5, 7, END, END], [9, 3, END, END], [4, 6, 8, END]], np.int32)
    other = dense.copy()
    other[1, 1] = 11
    beam = f"beam of {marian.BEAM}"
    found = translation.beside({"greedy": other, beam: other}, {"greedy": dense, beam: dense})
    assert (found["greedy"]["same"], found["greedy"]["of"]) == (2, 3)
    state = translation.begin(translation.dense, 1)
    _, state = translation.step(translation.params, jnp.zeros(1, jnp.int32), state)
    logits, _ = translation.step(translation.params, jnp.array([9]), state)
    logits = np.delete(np.asarray(logits[0]), UNKNOWN)
    best = np.sort(logits)
    assert found["greedy"]["gaps"] == [pytest.approx(best[-1] - best[-2], abs=1e-5)]
    scores = [
        np.mean([
            jax.nn.log_softmax(row)[token]
            for row, token in zip(
                translation.forced(translation.dense, 1, said[1])[:3], said[1][:3], strict=True
            )
        ])
        for said in (dense, other)
    ]  # fmt: skip
    assert found[beam]["scores"] == [pytest.approx(scores[0] - scores[1], abs=1e-5)]


def test_what_a_rule_reads_of_a_layer(translation, rng):
    w = translation.params["encoder"][0]["ffn"]
    x = rng.standard_normal((20, TINY.d_model)).astype(np.float32)
    rule = hire.FFN(k="positive", max_tokens=None, force=True)
    found = relu_layers.layer(w, x, rule)
    positive = x[10:] @ np.asarray(w["w1"]) + np.asarray(w["b1"]) > 0
    # After calibration a guess in 8 bits is expected to pay, so that a few more are read.
    assert positive.mean() <= found["read"] < positive.mean() + 0.05
    assert found["missed"] == 0
    assert found["error"] < 1e-5


def test_every_layer_is_looked_at_by_every_rule(translation, monkeypatch):
    asked = []
    monkeypatch.setattr(
        relu_layers, "layer", lambda w, x, rule: asked.append((x.shape, rule)) or {}
    )
    tokens = np.array([[5, 7, END], [9, END, END], [4, 6, END]], np.int32)
    inputs = translation.inputs(tokens)
    rows = relu_layers.layers(translation, inputs, most=7)
    where = [("encoder", 0), ("encoder", 1), ("decoder", 0), ("decoder", 1)]
    assert [(row["part"], row["layer"]) for row in rows] == where
    assert {shape for shape, _ in asked} == {(7, TINY.d_model)}
    assert all(rule.k == "positive" for _, rule in asked)
    assert {len(row["rules"]) for row in rows} == {4}
    often, means = relu_layers.often(translation, inputs)
    assert often.shape == (4 * TINY.d_ff,)
    assert means["positive"] == pytest.approx(often.mean())


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_page():
    crossing = [
        {"d": 256, "f": 1024, "mean": mean, "read": {"told": mean, "proved": mean + 0.1},
         "bytes": {"told": 0.5 + mean / 2, "proved": bytes_}}
        for mean, bytes_ in ((0.1, 0.45), (0.5, 0.85))
    ]  # fmt: skip
    proof = {"what": "encoder 0", "tokens": 1000, "positive": 0.2, "read": 0.25, "skipped": 750,
             "wrong": 0, "greatest": -0.01, "off": 3e-6, "orders": 2e-6, "error": 2e-6,
             "error_dense": 1e-6}  # fmt: skip
    machine = {"processor": "a chip", "cores": 2, "jax": "0.10.2", "python": "3.11.9"}
    result = {"command": "python", "machine": machine, "crossing": crossing, "proofs": [proof]}
    text = list(relu_page.lines(result))
    rows = [cells(line) for line in text if line.startswith("|")]
    assert rows[2][:6] == ["encoder 0", "1,000", "20.0%", "25.0%", "750", "0"]
    assert rows[2][9] == "**1.50**"
    assert rows[-2:] == [
        ["256", "10%", "10.0%, 55%", "20.0%, **45%**"],
        ["256", "50%", "50.0%, **75%**", "60.0%, 85%"],
    ]
    assert any("256: 30% and 50% and above" in line for line in text)
