"""The command line, on the model of its demo and on one of this file."""

import json
import re
import shlex

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner

import hire_rewrite as hire
from hire_rewrite import command
from hire_rewrite.command.target import parsed_rule
from hire_rewrite.transformed import Transformed

HERE, DEMO = "tests.command.test_command", "hire_rewrite.command.demo:model"
HEAD = ("--rule", "Head(k=64, force=True)")
NAMES = sorted(command.group.commands)


def spread():
    """Two arguments with weights, after one without."""
    keys = jax.random.split(jax.random.key(1), 2)
    x, up, embed = jnp.ones((1, 64)), *(jax.random.normal(key, (9000, 64)) for key in keys)
    return lambda x, up, embed: (x @ up.T, x @ embed.T), (x, up, embed)


def widened():
    """bfloat16 numbers in float32: half of the bytes would do, and only packing sees it."""
    w = jax.random.normal(jax.random.key(2), (2048, 2048), jnp.bfloat16).astype(jnp.float32)
    return lambda w, x: jnp.tanh(x @ w).sum(), (w, jnp.ones((1, 2048)))


def no_pair():
    return 3


def run_with(size):
    return widened()


def broken():
    raise RuntimeError("broken by itself")


def run(*args):
    result = CliRunner().invoke(command.group, args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_inspect():
    shown = run("inspect", DEMO, *HEAD).output
    assert "params/embed" in shown
    plan = json.loads(run("inspect", DEMO, *HEAD, "--json").stdout)
    by_kind = {site["kind"]: site for site in plan["sites"]}
    assert by_kind["head"]["status"] == "rewritten"
    assert parsed_rule(by_kind["head"]["rule"]) == hire.Head(k=64, force=True)
    assert by_kind["ffn"]["status"] == "dense"


def test_pack_looks_at_the_numbers():
    for pack in (), ("--pack",):
        plan = json.loads(run("inspect", f"{HERE}:widened", *pack, "--json").stdout)
        assert ("rewritten" in [site["status"] for site in plan["sites"]]) == bool(pack)
        changes = json.loads(run("diff", f"{HERE}:widened", *pack, "--json").stdout)
        assert bool(changes["regions"]) == bool(pack)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("options", "code"),
    [
        (HEAD, 0),
        ((*HEAD, "--rule", "FFN(k=8, path='nowhere')"), 3),
        (("--rule", "Head(path='nowhere')"), 3),
        (("--rule", "Head(k=1000000, force=True)"), 1),  # more than there are
        (("--rule", "Hed(k=3)"), 2),
        (("--rule", "Head(k=__import__('os'))"), 2),
        (("--rule", "Head(**{'k': 3})"), 2),
        (("--rule", "Quantized(4)"), 2),
        (("--rule", "Head(k=(3"), 2),
        (("--weights", "one"), 2),
    ],
)
def test_exit_codes(options, code):
    assert run("inspect", DEMO, "--fail-on-miss", *options).exit_code == code


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nowhere:fn", "nowhere"),
        (f"{HERE}:nothing", "nothing"),
        ("tests", "package.module:name"),
        (f"{HERE}:no_pair", "(fn, args)"),
        (f"{HERE}:DEMO", "is a str"),
        (f"{HERE}:run_with", "required"),
    ],
)
def test_targets_that_are_none(target, said):
    result = run("inspect", target)
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize(
    ("option", "name", "said"),
    [("--batches", "DEMO", "is a str"), ("--calibration", "run_with", "required")],
)
def test_batches_that_no_function_returns(option, name, said):
    result = run("evaluate", DEMO, option, f"{HERE}:{name}")
    assert result.exit_code == 2
    assert said in result.output
    assert option in result.output


def test_an_error_of_the_factory_is_its_own():
    with pytest.raises(RuntimeError, match="broken by itself"):
        run("inspect", f"{HERE}:broken")


def test_several_arguments_with_weights():
    result = run("bench", f"{HERE}:spread", "--weights", "1,2", *HEAD, "--rounds", "4", "--json")
    found = json.loads(result.stdout)
    assert found["rounds"] == 4
    assert set(found["median_ms"]) == {"dense", "rewritten"}
    ratio = found["median_ms"]["dense"] / found["median_ms"]["rewritten"]
    assert found["ratio"] == pytest.approx(ratio)
    report = run("evaluate", f"{HERE}:spread", "--weights", "1,2", *HEAD, "--json")
    assert len(json.loads(report.stdout)["sites"]) == 2


@pytest.mark.parametrize("name", ["tune", "draw", "diff"])
def test_an_output_that_cannot_be_written_is_told_of_at_once(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Transformed, name if name != "draw" else "plan", None)
    option = "--html" if name == "diff" else "-o"
    args = ("--batches", "hire_rewrite.command.demo:batches", "--kl", "1") if name == "tune" else ()
    result = run(name, DEMO, *HEAD, *args, option, str(tmp_path / "missing" / "plan.svg"))
    assert result.exit_code == 1
    assert "missing/plan.svg" in result.output
    assert not [*tmp_path.iterdir()]


def shapes_alone():
    fn, args = spread()
    return fn, jax.eval_shape(lambda: args)


def test_where_there_is_nothing_to_time_or_to_show():
    result = run("bench", f"{HERE}:shapes_alone", "--weights", "1,2", *HEAD)
    assert result.exit_code == 1
    assert "is a ShapeDtypeStruct, which has no numbers to compute with" in result.output
    result = run("diff", f"{HERE}:widened")
    assert (result.exit_code, "nothing is rewritten" in result.output) == (0, True)


def test_rules_are_read_from_a_file(tmp_path):
    path = tmp_path / "rules.json"
    hire.save_rules([hire.Head(k=7, force=True)], str(path))
    plan = json.loads(run("inspect", DEMO, "--rules", str(path), "--json").stdout)
    assert "Head(k=7, force=True)" in [site["rule"] for site in plan["sites"]]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_its_help_works(name, tmp_path, monkeypatch):
    text = run(name, "--help").output.replace("\\\n", " ")
    (example,) = re.findall(r"^\s*hire-rewrite (.*)$", text, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    result = run(*shlex.split(example))
    assert result.exit_code == 0, result.output
    assert result.output
    if name == "draw":
        assert "<svg" in (tmp_path / "plan.svg").read_text(encoding="utf-8")
    if name == "tune":
        assert hire.load_rules("rules.json")
