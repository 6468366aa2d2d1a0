"""Which machine plans are made for, its files, and how its constants are measured."""

import json
import re
import time

import jax
import numpy as np
import pytest

import hire_rewrite as hire
from hire_rewrite import __main__ as program
from hire_rewrite import measuring
from hire_rewrite.cost import machine as machines
from hire_rewrite.cost.machine import COSTS, KINDS, TOKENS, Machine, file_of, load, save
from hire_rewrite.ops import kernels
from hire_rewrite.ops.predictors import Read

OTHER = Machine(
    "other", *((float(i), 2.0, 3.0, 4.0, 5.0) for i in range(1, 10)), 6.0, 7.0, 8.0, 9.0
)


def chosen():
    """`current`, asked again."""
    return machines.current.__wrapped__()


@pytest.fixture(autouse=True)
def no_files(monkeypatch, tmp_path):
    machines.current()  # once and for all, from the environment as other tests want it
    monkeypatch.delenv(machines.VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_the_names_that_are_known():
    names = machines._names()
    assert names == ["bytes", "cpu", "cpu-jax", "gpu", "tpu v5e", "tpu v5p"]
    for name in names:
        machine = machines._known(name)
        assert machine.name == name
        assert all(len(getattr(machine, kind)) == len(TOKENS) for kind in KINDS)
        assert all(min(getattr(machine, kind)) > 0 for kind in KINDS)


def test_the_environment_names_a_machine(monkeypatch, tmp_path):
    monkeypatch.setenv(machines.VARIABLE, "tpu v5p")
    assert chosen().name == "tpu v5p"
    path = tmp_path / "own.json"
    save(OTHER, path, {})
    monkeypatch.setenv(machines.VARIABLE, str(path))
    assert chosen().scored_int8 == OTHER.scored_int8
    monkeypatch.setenv(machines.VARIABLE, "abacus")
    with pytest.raises(
        hire.HireRewriteError,
        match=r"HIRE_REWRITE_MACHINE='abacus' is no file, and none of bytes, cpu, .*calibrate-mach",
    ):
        chosen()


@pytest.mark.parametrize(
    ("backend", "kind", "status", "name"),
    [
        ("cpu", "cpu", "in use", "cpu"),
        ("cpu", "cpu", "not built", "cpu-jax"),
        ("gpu", "NVIDIA H100", "", "gpu"),
        ("tpu", "TPU v5 lite", "", "tpu v5e"),
        ("tpu", "TPU v5", "", "tpu v5p"),
        ("tpu", "TPU v4", "", "tpu v5e"),
        ("METAL", "", "", "bytes"),
    ],
)
def test_the_backend_names_a_machine(monkeypatch, backend, kind, status, name):
    class Device:
        device_kind = kind

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setattr(kernels.cpu, "status", lambda: status)
    assert chosen().name == name
    # The user's own file comes first, for this machine alone.
    save(OTHER, file_of("another"), {})
    assert chosen().name == name
    save(OTHER, file_of(name), {})
    assert chosen().name == f"{name}, measured ({file_of(name)})"
    assert chosen().piece == OTHER.piece


def test_a_file_keeps_every_constant(tmp_path):
    path = tmp_path / "new" / "one.json"
    save(OTHER, path, {"device": "abacus"})
    found = load(path)
    assert {name: getattr(found, name) for name in (*KINDS, *COSTS)} == {
        name: getattr(OTHER, name) for name in (*KINDS, *COSTS)
    }
    assert found.name == f"one, measured ({path})"
    assert json.loads(path.read_text())["about"] == {"device": "abacus"}


def changed(**constants):
    good = {kind: [1.0] * len(TOKENS) for kind in KINDS} | dict.fromkeys(COSTS, 1.0)
    return json.dumps(good | constants)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "a JSON object is expected, not list"),
        ("{}", "there is no dense_float32"),
        (changed(scored_int8=[1.0]), "scored_int8 must be 5 numbers"),
        (changed(scored_int8=3), "scored_int8 must be 5 numbers"),
        (changed(scored_int8=[1, 2, 3, 4, "5"]), "scored_int8 holds '5', which is no number"),
        (changed(scored_int8=[1, 2, 3, 4, 0]), "scored_int8 holds 0, which is no number of at le"),
        (changed(piece=-1), "piece holds -1, which is no number of at least 0"),
        (changed(site=float("nan")), "site holds nan"),
        (None, "No such file"),
    ],
)
def test_a_file_that_holds_no_machine(tmp_path, text, reason):
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(hire.HireRewriteError) as error:
        load(path)
    assert str(error.value).startswith(f"{path} holds no machine (")
    assert reason in str(error.value)
    assert str(error.value).endswith("calibrate-machine`, or delete it")


@pytest.mark.parametrize(
    ("tokens", "each"), [(1, 1.0), (2, 2.0), (3, 2.5), (6, 3.5), (8, 4.0), (20, 4.5), (56, 6.0)]
)
def test_between_the_tokens_that_were_timed(tokens, each):
    assert OTHER.time(Read("dense_float32", 10, tokens)) == pytest.approx(10 * each)


def test_times_do_not_fall_beyond_the_tokens_that_were_timed():
    falling = Machine("falling", *[(5.0, 4.0, 3.0, 2.0, 1.0)] * len(KINDS))
    assert falling.time(Read("scored_int4", 1, 1000)) == 1.0


def test_costs_of_a_read():
    assert OTHER.time(Read("dense_float32", 10, 1, pieces=3, scores=5)) == 10 + 3 * 6 + 5 * 7


def test_a_machine_prints_as_a_table():
    lines = str(OTHER).splitlines()
    assert lines[0].split("  ")[1] == "ns for each"
    assert re.split(r" {2,}", lines[4].strip()) == ["byte, scored_int8", "4", "2", "3", "4", "5"]
    assert [line.split() for line in lines[-4:]] == [
        ["piece", "6"],
        ["score", "7"],
        ["site", "8"],
        ["product", "9"],
    ]


def test_the_program_writes_what_was_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(machines.VARIABLE, "set again afterwards")
    monkeypatch.setattr(measuring, "measured", lambda: OTHER)
    path = tmp_path / "out.json"
    program.main(["calibrate-machine", "--out", str(path)])
    assert load(path).dense_float32 == OTHER.dense_float32
    printed = capsys.readouterr().out
    assert printed.startswith(str(OTHER))
    assert printed.endswith(f"wrote {path}; used with HIRE_REWRITE_MACHINE={path}\n")
    program.main(["calibrate-machine"])
    monkeypatch.delenv(machines.VARIABLE)
    assert chosen() == load(file_of(machines.default_name()))


def test_the_program_asks_for_a_command(capsys):
    with pytest.raises(SystemExit):
        program.main([])
    assert "calibrate-machine" in capsys.readouterr().err


def test_the_fit_has_no_negative_costs():
    factors = np.array([[1.0, 0.0, 1.0], [0.0, 2.0, 1.0], [3.0, 1.0, 1.0], [1.0, 5.0, 1.0]])
    assert measuring._fitted(factors, factors @ [2.0, 0.5, 4.0]) == pytest.approx([2.0, 0.5, 4.0])
    found = measuring._fitted(factors, factors @ [2.0, -0.5, 4.0])
    assert found[1] == 0.0
    assert min(found) >= 0.0
    assert measuring._fitted(factors, [-1.0, -1.0, -1.0, -1.0]) == [0.0, 0.0, 0.0]


def test_measured_constants_are_times_over_bytes(monkeypatch):
    """With a clock that says how long each call takes, and tiny sites."""
    sizes = {"N": 64, "D": 64, "FETCHED": 4, "_HEADS": ((4096, 8, 64),), "_BLOCKS": ((8, 64),)}
    for name, value in sizes.items():
        monkeypatch.setattr(measuring, name, value)
    # A read that looks again is timed for one token alone.
    keys = [(kind, n) for n in TOKENS for kind in KINDS if kind != "fetched_int8" or n == 1]

    def times(calls, rounds):
        assert len(calls) == len(keys) + 8
        jax.block_until_ready([call() for call in calls[: len(KINDS)]])
        reads = [1e6 * place for place in range(1, len(keys) + 1)]
        return reads + [1e9] * 8

    monkeypatch.setattr(measuring, "_times", times)
    measured_order = list(measuring._reads(measuring._arrays(), 1))
    assert sorted(measured_order) == sorted(KINDS)
    found = measuring.measured()
    for place, kind in enumerate(measured_order, 1):
        first = 1e6 * place / measuring._size(kind)
        assert getattr(found, kind)[0] == pytest.approx(first, rel=0.01)
    assert len(set(found.fetched_int8)) == 1
    assert len(set(found.scored_int8)) == len(TOKENS)
    assert found.product == pytest.approx(1e9 / 2, rel=0.5)
    assert min(found.piece, found.score, found.site) >= 0.0


def test_a_clock_tells_the_quickest_call(monkeypatch):
    monkeypatch.setattr(measuring, "_CACHE", 4)
    numbers = iter([0.0, 0.0, 0.03, 0.05, 0.02])
    quick, slow = measuring._times([lambda: None, lambda: time.sleep(next(numbers))], 3)
    assert quick < 0.01e9
    assert 0.015e9 < slow < 0.03e9
