"""The constants of a machine, by a clock that says how long each call takes, on tiny sites."""

import json

import jax
import pytest

from benchmarks import machine as program
from benchmarks import timing
from hire_rewrite.cost import machine as machines
from hire_rewrite.cost.machine import COSTS, KINDS, TOKENS, Machine, load

BYTE = {kind: 0.5 + place for place, kind in enumerate(KINDS)}
"""Nanoseconds for a byte of one token; so much more for each token beside it."""
TRUE = Machine(
    "true",
    **{kind: tuple(byte * n for n in TOKENS) for kind, byte in BYTE.items()},
    piece=3e3,
    score=20.0,
    site=1e5,
    product=2e4,
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    sizes = {"N": 64, "D": 64, "FETCHED": 4, "HEADS": ((4096, 8, 64), (4096, 8, 256))}
    for name, value in {**sizes, "BLOCKS": ((8, 64),)}.items():
        monkeypatch.setattr(program, name, value)
    monkeypatch.setattr(timing, "LONG", 64)
    monkeypatch.setenv(machines.VARIABLE, "bytes")


def test_measured_constants_are_those_of_the_clock(monkeypatch, tmp_path, capsys):
    calls, sites = {}, []
    reads_of, timed_sites = program.reads_of, program.timed_sites

    def reads(arrays, tokens):
        found = reads_of(arrays, tokens)
        if tokens == 1:
            assert sorted(found) == sorted(KINDS)
            jax.block_until_ready([call() for call in found.values()])
        calls.update({(kind, tokens): call for kind, call in found.items()})
        return found

    def kept():
        for site in timed_sites():
            sites.append(site)
            yield site

    def alternate(sides, rounds, cold):
        assert cold
        empty = 1e-6
        times = [getattr(TRUE, kind)[TOKENS.index(n)] * program.size(kind) for kind, n in calls]
        times += [site.expected(TRUE) for site in sites]
        seconds = [empty, *(empty + 1e-9 * time for time in times)]
        return timing.Timings(
            {side: (time, time + 1.0) for side, time in zip(sides, seconds, strict=True)}
        )

    monkeypatch.setattr(program, "reads_of", reads)
    monkeypatch.setattr(program, "timed_sites", kept)
    monkeypatch.setattr(timing, "alternate", alternate)
    path = tmp_path / "new" / "machine.json"
    program.main([str(path)])
    measured = load(path)
    for kind in KINDS:
        # What looks again at rows is timed for one token alone.
        times = (BYTE[kind],) * len(TOKENS) if kind == "fetched_int8" else getattr(TRUE, kind)
        assert getattr(measured, kind) == pytest.approx(times, rel=0.01)
    for cost in COSTS:
        assert getattr(measured, cost) == pytest.approx(getattr(TRUE, cost), rel=0.05)
    assert str(path) in capsys.readouterr().out
    assert json.loads(path.read_text())["about"]["machine"] == machines.default_name()


def test_the_user_has_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(program, "measure", lambda rounds: TRUE)
    program.main([])
    assert load(machines.file_of(machines.default_name())).piece == TRUE.piece
