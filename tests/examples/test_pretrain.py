"""The models of the pretraining example, and training that goes on after a break."""

import dataclasses
import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from benchmarks import quality_page, timing
from examples.pretrain import __main__ as command
from examples.pretrain import batches, corpus, model
from examples.pretrain.convert import converted
from examples.pretrain.evaluate import both_ways, validation_loss
from examples.pretrain.lossless import RULES, TOLD, lossless
from examples.pretrain.train import Setting, load, topk_loss, train
from tests.cases import Oracle

VOCAB = 64
ONE_ARCHITECTURE = pytest.mark.parametrize("config", ["gated"], indirect=True)


@pytest.fixture(params=model.ARCHITECTURES)
def config(request):
    return model.Config(request.param, vocab=VOCAB, d_model=16, d_ff=64, layers=2, heads=2)


@pytest.fixture
def params(config):
    return model.init(config, jax.random.key(0))


@pytest.fixture(scope="module")
def text():
    """A text whose next token follows from the last but for some noise: i32[3000]."""
    random = np.random.default_rng(0)
    ids = [1]
    for noise in random.integers(3, size=2999):
        ids.append((5 * ids[-1] + noise) % VOCAB)
    return np.array(ids, np.int32)


@pytest.fixture
def setting(config):
    return Setting(
        config,
        stages=((0.0, 1.0), (0.3, 0.5), (0.6, 0.125)),
        steps=6,
        batch=4,
        context=16,
        rate=1e-2,
        warm_up=2,
        save_every=2,
    )


# Text


def test_every_chapter_is_in_one_part():
    training, validation = corpus.split()
    assert (len(training), len(validation)) == (1129, 60)
    assert not set(training) & set(validation)
    assert sum(map(len, training)) > 3_500_000
    assert training[0].startswith("In the beginning God created the heavens and the earth.")


def test_held_out_chapters_are_neighbors():
    chapters = list(corpus.chapters())
    validation = set(corpus.split()[1])
    held_out = [chapter in validation for chapter in chapters]
    starts = [i for i, held in enumerate(held_out) if held and not held_out[i - 1]]
    assert starts == [100, 300, 500, 700, 900, 1100]
    assert all(all(held_out[start : start + corpus.RUN]) for start in starts)


def test_tokenizer_gives_the_text_back():
    chapters = list(corpus.chapters())[:20]
    words = corpus.train_tokenizer(chapters, 512)
    assert words.get_vocab_size() == 512
    for sample in (*chapters, "Ünïcödé ½ 日本語 🙂\n\n", ""):
        assert words.decode(words.encode(sample).ids) == sample


# Batches


def test_an_epoch_reads_every_row_once(text):
    rows = batches.Batches(text, context=16, batch=4)
    seen = np.concatenate([rows[step] for step in range(rows.per_epoch)])
    assert seen.shape == (rows.per_epoch * 4, 17)
    positions = {tuple(text[i : i + 17]): i for i in range(len(text) - 16)}
    starts = sorted(positions[tuple(row)] for row in seen)
    assert len({start % 16 for start in starts}) == 1
    assert len(set(starts)) == len(starts)


def test_a_batch_follows_from_its_number(text):
    one, other = (batches.Batches(text, context=16, batch=4, seed=1) for _ in range(2))
    later = one.per_epoch + 3
    np.testing.assert_array_equal(one[later], other[later])
    assert not np.array_equal(one[3], one[later])
    assert not np.array_equal(one[3], batches.Batches(text, 16, 4, seed=2)[3])


def test_too_little_text_is_an_error(text):
    with pytest.raises(ValueError, match="60 tokens"):
        batches.Batches(text[:60], context=16, batch=4)


def test_rows_in_order_have_every_target_once(text):
    rows = list(batches.in_order(text, context=16, batch=4))
    targets = np.concatenate([batch[:, 1:].reshape(-1) for batch in rows])
    np.testing.assert_array_equal(targets, text[1 : 1 + len(targets)])
    assert len(text) - 1 - len(targets) < 4 * 16


# Model


def test_prefill_and_decode_agree_with_forward(config, params, text):
    tokens = jnp.asarray(text[:24].reshape(2, 12))
    expected = model.forward(config, params, tokens)
    logits, cache = model.prefill(config, params, tokens[:, :8], model.init_cache(config, 2, 16))
    np.testing.assert_allclose(logits, expected[:, 7], atol=1e-4, rtol=1e-4)
    for i in range(8, 12):
        logits, cache = model.decode_step(config, params, tokens[:, i], cache)
        np.testing.assert_allclose(logits, expected[:, i], atol=1e-4, rtol=1e-4)


def test_later_tokens_do_not_change_earlier_logits(config, params, text):
    tokens = jnp.asarray(text[:12][None])
    changed = tokens.at[:, 6:].set(0)
    a, b = (model.forward(config, params, t)[:, :6] for t in (tokens, changed))
    np.testing.assert_array_equal(a, b)


def test_the_ffn_is_found_in_training_and_in_decoding(config, params, text):
    rule = hire.FFN(k=0.125, force=True)
    decode_step = functools.partial(model.decode_step, config)
    call = (params, jnp.zeros(1, jnp.int32), model.init_cache(config, 1, 16))
    (site,) = hire.inspect(decode_step, *call, rules=[rule]).sites
    assert (site.kind, site.status, site.repeats) == ("ffn", "rewritten", config.layers)
    assert (site.width, site.gated) == (config.d_ff, config.architecture == "gated")
    rows = text[: 4 * 17].reshape(4, 17)
    (site,) = topk_loss(config, 0.125).plan(params, rows).sites
    assert (site.kind, site.width, site.repeats) == ("ffn", config.d_ff, config.layers)


# Training


def test_a_top_k_of_everything_is_the_model_itself(config, params, text):
    rows = text[: 4 * 17].reshape(4, 17)
    dense = topk_loss(config, 1)
    full = hire.transform(dense, hire.FFN(k=1.0, force=True), mode="exact")
    some = topk_loss(config, 0.125)
    expected, gradient = jax.jit(jax.value_and_grad(dense))(params, rows)
    value, same = jax.jit(jax.value_and_grad(full))(params, rows)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)
    assert abs(float(some(params, rows)) - float(expected)) > 1e-4


@ONE_ARCHITECTURE
def test_neurons_outside_the_top_k_learn_nothing(config, params, text):
    """One row of one token: at most k neurons of a layer have a gradient."""
    gradient = jax.jit(jax.grad(topk_loss(config, 0.125)))(params, text[None, :2])
    used = jnp.any(gradient["layers"]["w_down"] != 0, axis=-1).sum(axis=-1)
    assert jnp.all(used > 0)
    assert jnp.all(used <= config.d_ff / 8)


@ONE_ARCHITECTURE
def test_the_gradient_is_the_same_under_checkpoint(config, params, text):
    loss = topk_loss(config, 0.125)
    rows = text[: 4 * 17].reshape(4, 17)
    plain = jax.jit(jax.grad(loss))(params, rows)
    again = jax.jit(jax.grad(jax.checkpoint(loss)))(params, rows)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)


@ONE_ARCHITECTURE
def test_stages(setting):
    assert [setting.k(step) for step in range(7)] == [1.0, 1.0, 0.5, 0.5, 0.125, 0.125, 0.125]


@pytest.mark.long
@ONE_ARCHITECTURE
def test_goes_on_after_a_break_as_if_there_was_none(setting, text, tmp_path, monkeypatch):
    whole = train(setting, text, tmp_path / "whole")

    read = batches.Batches.__getitem__

    def killed(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return read(self, step)

    monkeypatch.setattr(batches.Batches, "__getitem__", killed)
    with pytest.raises(KeyboardInterrupt):
        train(setting, text, tmp_path / "broken")
    steps = []

    def counted(self, step):
        steps.append(step)
        return read(self, step)

    monkeypatch.setattr(batches.Batches, "__getitem__", counted)
    broken = train(setting, text, tmp_path / "broken")
    assert steps == [2, 3, 4, 5]  # from the checkpoint before the kill
    assert broken.history == whole.history
    for a, b in zip(jax.tree.leaves(broken.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(a, b)
    done = train(setting, text, tmp_path / "broken")
    assert steps == [2, 3, 4, 5]
    loaded = load(setting, tmp_path / "broken")
    assert done.seconds == loaded.seconds == broken.seconds
    assert done.history == loaded.history
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(done.params), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="setting"):
        train(dataclasses.replace(setting, rate=1.0), text, tmp_path / "broken")
    with pytest.raises(ValueError, match="no model after 7 steps"):
        load(dataclasses.replace(setting, steps=7), tmp_path / "broken")


@ONE_ARCHITECTURE
def test_training_lowers_the_loss(setting, text, tmp_path):
    setting = dataclasses.replace(setting, stages=((0.0, 0.125),), steps=60, save_every=30)
    trained = train(setting, text[:2500], tmp_path)
    loss = topk_loss(setting.config, setting.k(setting.steps))
    before = model.init(setting.config, jax.random.key(0))
    losses = [validation_loss(loss, p, text[2500:], 16, 4) for p in (before, trained.params)]
    assert losses[1] < 0.8 * losses[0]
    assert [entry["step"] for entry in trained.history] == [30, 60]


@ONE_ARCHITECTURE
def test_a_model_is_evaluated_both_ways(config, params, text):
    losses = both_ways(config, params, text[:300], context=16)
    (rows,) = batches.in_order(text[:300], context=16, batch=16)
    assert losses["dense"] == pytest.approx(float(model.loss(config, params, rows)), abs=2e-5)
    rule = hire.FFN(k=0.05, force=True)
    exact = hire.transform(functools.partial(model.loss, config), rule, mode="exact")
    assert losses["topk"] == pytest.approx(float(exact(params, rows)), abs=2e-5)
    assert losses["topk"] != losses["dense"]


# The command


def test_both_arms_differ_by_the_top_k_alone():
    for architecture in model.ARCHITECTURES:
        dense, topk = (command.setting(architecture, arm, 2048, 1000) for arm in command.STAGES)
        assert dataclasses.replace(topk, stages=dense.stages) == dense
        assert (dense.k(1000), topk.k(1000)) == (1.0, 0.05)


@ONE_ARCHITECTURE
def test_a_model_is_converted_and_measured(config, params, text, monkeypatch):
    """With a predictor that is always right the rewritten model is the exact one."""
    monkeypatch.setattr("examples.pretrain.convert.HEAD", hire.Head(min_width=64, path="nowhere"))
    (found,) = converted(config, params, text, text[:600], 16, predictors=(Oracle(),))
    losses = found["losses"]
    compiled = jax.jit(topk_loss(config, 0.05))
    exact = [compiled(params, rows) for rows in batches.in_order(text[:600], 16, 16)]
    assert losses["exact"] == pytest.approx(np.mean(exact), abs=1e-4)
    assert losses["rewritten"] == pytest.approx(losses["exact"], abs=1e-4)
    assert min(found["recall"]) == 1.0
    assert found["candidates"] == found["k"] == 8  # of 64, in groups of 8


def test_positive_neurons_are_those_of_the_model(text, monkeypatch):
    """Without attention a few lines of NumPy are the model."""
    monkeypatch.setattr("examples.pretrain.convert.HEAD", hire.Head(min_width=64, path="nowhere"))
    config = model.Config("relu2", vocab=VOCAB, d_model=32, d_ff=128, layers=2, heads=2)
    params = model.init(config, jax.random.key(0))
    params["layers"]["wo"] *= 0
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x):
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + config.norm_eps)

    (rows,) = batches.in_order(text[:300], 16, 16)
    x, shares = p["embed"][rows[:, :-1]], []
    for up, down in zip(p["layers"]["w_up"], p["layers"]["w_down"], strict=True):
        h = norm(x) @ up
        shares.append((h > 0).mean())
        x = x + np.square(np.maximum(h, 0)) @ down
    logits = norm(x) @ p["head"]
    picked = np.take_along_axis(logits, rows[:, 1:, None], axis=-1)[..., 0]
    loss = (np.log(np.exp(logits).sum(-1)) - picked).mean()

    (told,) = lossless(config, params, text, text[:300], 16, {"told": TOLD})
    assert told["read"] == pytest.approx(shares, abs=1e-3)
    figures = *told["losses"].values(), told["decoded"]["dense"], told["decoded"]["rewritten"]
    assert figures == pytest.approx([loss] * 4, abs=1e-5)
    rows, norms = 2 * 4 * 32 * 128, 2 * 4 * 128  # bytes of one matrix of both layers
    read = pytest.approx(rows + norms + np.mean(shares) * rows, rel=1e-3)
    assert told["bytes"] == [2 * rows, read]


@pytest.mark.long
def test_the_command_trains_converts_and_records(text, tmp_path, monkeypatch):
    """A tiny model of one architecture, on a tiny text; zeros that are left out lose nothing."""
    words = types.SimpleNamespace(get_vocab_size=lambda: VOCAB)
    monkeypatch.setattr(corpus, "load", lambda: corpus.Corpus(text, text[:2100], words))
    monkeypatch.setattr("examples.pretrain.convert.HEAD", hire.Head(min_width=64, path="nowhere"))
    monkeypatch.setattr(model, "ARCHITECTURES", ("relu2",))
    monkeypatch.setattr(command, "WIDTHS", {"relu2": 160})
    monkeypatch.setattr(command, "STAGES", command.STAGES | {"topk": ((0.0, 0.125),)})
    monkeypatch.setattr(command, "STEPS", 3)
    before = timing.read("pretrain")["architectures"]["relu2"]["topk"]["converted"]
    monkeypatch.setattr(command, "converted", lambda *_: before)  # another test measures them
    shutil.copy(timing.RESULTS / "quality.json", tmp_path)
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(quality_page, "PAGE", tmp_path / "quality.md")

    monkeypatch.setattr("sys.argv", ["pretrain", "--convert", "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="train it first"):
        command.main()
    monkeypatch.setattr("sys.argv", ["pretrain", "--out", str(tmp_path / "out")])
    command.main()

    record = json.loads((tmp_path / "pretrain.json").read_text(encoding="utf-8"))
    arms = record["architectures"]["relu2"]
    assert [row["way"] for row in arms["dense"]["lossless"]] == list(RULES)
    for row in arms["dense"]["lossless"]:
        loss, decoded, exact = row["losses"], row["decoded"], row["way"] in list(RULES)[:2]
        assert loss["dense"] == pytest.approx(arms["dense"]["validation_loss"], abs=1e-4)
        assert loss["rewritten"] == pytest.approx(loss["dense"], abs=1e-6 if exact else 1e-3)
        assert decoded["rewritten"] == pytest.approx(decoded["dense"], abs=1e-6 if exact else 1e-3)
        assert decoded["difference"] < (1e-4 if exact else 0.1)
        assert decoded["tokens"] == 16 * 128
        assert max(row["missed"]) <= (0 if exact else 0.01)
        assert all(0.2 < share < 0.8 for share in row["read"])
    page = (tmp_path / "quality.md").read_text(encoding="utf-8")
    for way in RULES:
        (line,) = [line for line in page.splitlines() if line.startswith(f"| relu2 | {way} |")]
        assert len(line.split("|")) == 13
