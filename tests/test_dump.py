"""`HIRE_DUMP_TO`, and what is logged."""

import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import hire_rewrite as hire

RULE = hire.Head(k=4, candidates=8, min_width=1, force=True)
PARAMS = {"vocabulary": jnp.sin(jnp.arange(1024.0)).reshape(16, 64)}
X = jnp.ones((1, 16))
ENDINGS = ["0.traced.txt", "1.plan.txt", "2.rewritten.txt", "3.diff.html", "3.diff.txt"]


def decode_step(params, x):
    return jnp.tanh(x) @ params["vocabulary"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "to" / "here"
    monkeypatch.setenv("HIRE_DUMP_TO", str(path))
    return path


def packed_step(fn=decode_step, rule=RULE):
    step = hire.transform(fn, rule)
    return step, step.pack(PARAMS, X)


def test_each_kind_of_call_has_its_files(folder):
    step, packed = packed_step()
    for x in (X, X, jnp.ones((2, 16))):
        jax.jit(step)(packed, x)
    names = sorted(path.name for path in folder.iterdir())
    # packing, and calls of one token and of two
    assert names == [f"{n:04d}.decode_step.{ending}" for n in (1, 2, 3) for ending in ENDINGS]


def test_files_hold_what_their_names_say(folder):
    step, packed = packed_step()
    step(packed, X)
    held = {path.name.partition("decode_step.")[2]: path for path in folder.glob("0002.*")}
    text = {ending: path.read_text(encoding="utf-8").strip() for ending, path in held.items()}
    changes = step.diff(packed, X)
    assert text["0.traced.txt"] == str(changes.before)
    assert "tanh" in text["0.traced.txt"]
    assert "hire_head" not in text["0.traced.txt"]
    assert text["1.plan.txt"] == str(step.plan(packed, X))
    assert text["2.rewritten.txt"] == str(changes.after)
    assert "hire_head" in text["2.rewritten.txt"]
    assert text["3.diff.txt"] == str(changes).strip()
    assert text["3.diff.html"] == changes.to_html()


def test_what_tune_and_evaluate_analyze(folder):
    batches = [(jax.random.normal(key, (8, 16)),) for key in jax.random.split(jax.random.key(0))]
    step = hire.transform(decode_step, RULE)
    rules = step.tune(PARAMS, batches, recall=0.5)
    tuned = [path.read_text(encoding="utf-8") for path in folder.glob("*.decode_step.tune.1.*")]
    predictors = {str(trial.rule.predictor) for trial in rules.trials}
    assert len(predictors) > 1
    for predictor in predictors:
        assert any(predictor in plan for plan in tuned), predictor
    for diff in folder.glob("*.decode_step.tune.3.diff.txt"):
        assert "hire_head" in diff.read_text(encoding="utf-8")
    packed = step.pack(PARAMS, X)
    before = set(folder.iterdir())
    step.evaluate(packed, [(jnp.ones((3, 16)),)])
    (plan,) = (path for path in set(folder.iterdir()) - before if "evaluate.1" in path.name)
    assert plan.name.endswith(".decode_step.evaluate.1.plan.txt")
    assert len(set(folder.iterdir()) - before) == len(ENDINGS)


def test_a_second_process_goes_on(folder):
    folder.mkdir(parents=True)
    (folder / "0041.other.0.traced.txt").write_text("kept")
    packed_step()
    numbers = {path.name[:4] for path in folder.glob("*.decode_step.*")}
    assert numbers == {"0042"}
    assert (folder / "0041.other.0.traced.txt").read_text() == "kept"


def test_names_are_names_of_files(folder):
    packed_step(lambda params, x: x @ params["vocabulary"])
    assert (folder / "0001.lambda.0.traced.txt").exists()


def test_inside_other_transformations(folder):
    step, packed = packed_step()
    _, out = jax.lax.scan(lambda c, x: (c, step(packed, x)), None, jnp.stack([X, X]))
    assert jnp.array_equal(out[0], step(packed, X))
    assert jax.vmap(lambda x: step(packed, x))(jnp.stack([X, X])).shape == (2, 1, 64)
    assert len(list(folder.glob("*.3.diff.html"))) == 2


def test_what_cannot_be_rewritten_says_so(folder):
    rule = hire.FFN(k="auto", force=True)
    weights = {"up": jnp.ones((16, 64)), "down": jnp.ones((64, 16))}

    def block(w, x):
        return jax.nn.relu(x @ w["up"]) @ w["down"]

    step = hire.transform(block, rule)
    step.plan(weights, X)
    (written,) = folder.glob("*.2.rewritten.txt")
    with pytest.raises(hire.HireRewriteError) as error:
        step.diff(weights, X)
    assert str(error.value) in written.read_text(encoding="utf-8")


def test_a_directory_that_is_a_file(folder):
    folder.parent.mkdir()
    folder.write_text("")
    step = hire.transform(decode_step, RULE)
    for _ in range(2):
        with pytest.raises(hire.HireRewriteError, match="HIRE_DUMP_TO"):
            step.plan(PARAMS, X)


def test_nothing_is_imported_where_it_is_not_asked_for():
    code = (
        "import sys, jax, jax.numpy as jnp, hire_rewrite as hire\n"
        "print(hire.inspect(lambda w, x: x @ w, jnp.ones((4, 4)), jnp.ones(4)))\n"
        "assert 'hire_rewrite.dump' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_passes_are_logged(caplog):
    with caplog.at_level(logging.DEBUG, logger="hire_rewrite"):
        step, packed = packed_step()
        step(packed, X)
    verbs = [record.args[1] for record in caplog.records]
    assert {"trace", "detect", "decide", "pack", "rewrite"} <= set(verbs)
    assert all(record.name == "hire_rewrite" for record in caplog.records)
    assert all(record.args[0] == "decode_step" for record in caplog.records)
    assert any("params/vocabulary" in record.getMessage() for record in caplog.records)


def test_the_log_is_silent_by_default(capfd):
    packed_step(lambda params, x: x @ params["vocabulary"])
    assert "decide" not in capfd.readouterr().err
