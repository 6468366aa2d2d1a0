"""Which machine plans are made for, its files, and the times of reads."""

import json

import jax
import pytest

import hire_rewrite as hire
from hire_rewrite.cost import machine as machines
from hire_rewrite.cost.machine import COSTS, KINDS, TOKENS, Machine, file_of, load
from hire_rewrite.ops import kernels
from hire_rewrite.ops.predictors import Read

OTHER = Machine(
    "other", *((float(i), 2.0, 3.0, 4.0, 5.0) for i in range(1, 10)), 6.0, 7.0, 8.0, 9.0
)


def chosen():
    """`current`, asked again."""
    return machines.current.__wrapped__()


def constants(machine):
    return {name: getattr(machine, name) for name in (*KINDS, *COSTS)}


def written(path, **changed):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(constants(OTHER) | changed))
    return path


@pytest.fixture(autouse=True)
def no_files(monkeypatch, tmp_path):
    machines.current()  # once and for all, from the environment as other tests want it
    monkeypatch.delenv(machines.VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.mark.parametrize("name", ["bytes", "cpu", "cpu-jax", "gpu", "tpu v5e", "tpu v5p"])
def test_machines_that_come_with_the_package(monkeypatch, name):
    monkeypatch.setenv(machines.VARIABLE, name)
    machine = chosen()
    assert machine.name == name
    assert all(len(getattr(machine, kind)) == len(TOKENS) for kind in KINDS)
    assert all(min(getattr(machine, kind)) > 0 for kind in KINDS)


def test_the_environment_names_a_machine(monkeypatch, tmp_path):
    path = written(tmp_path / "own.json")
    monkeypatch.setenv(machines.VARIABLE, str(path))
    assert constants(chosen()) == constants(OTHER)
    monkeypatch.setenv(machines.VARIABLE, "abacus")
    with pytest.raises(hire.HireRewriteError, match="abacus"):
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
    written(file_of("another"))
    assert chosen().name == name
    written(file_of(name))
    assert chosen().name != name
    assert constants(chosen()) == constants(OTHER)


def test_a_file_keeps_every_constant(tmp_path):
    assert constants(load(written(tmp_path / "one.json"))) == constants(OTHER)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("{", {}),
        ("[]", {}),
        ("{}", {}),
        (None, {"scored_int8": [1.0]}),
        (None, {"scored_int8": 3}),
        (None, {"scored_int8": [1, 2, 3, 4, "5"]}),
        (None, {"scored_int8": [1, 2, 3, 4, 0]}),
        (None, {"piece": -1}),
        (None, {"site": float("nan")}),
    ],
)
def test_a_file_that_holds_no_machine(tmp_path, text, changed):
    path = tmp_path / "bad.json"
    if text is None:
        written(path, **changed)
    else:
        path.write_text(text)
    with pytest.raises(hire.HireRewriteError) as error:
        load(path)
    assert all(name in str(error.value) for name in (str(path), *changed))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(hire.HireRewriteError):
        load(tmp_path / "none.json")


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
