"""The measuring rules: alternation, what is waited for, and what a results file holds."""

import json
import shutil
import subprocess

import jax
import pytest

from benchmarks import timing


def test_sides_alternate_and_the_warm_up_does_not_count():
    calls = []
    timings = timing.alternate(
        {name: lambda name=name: calls.append(name) for name in "abc"}, rounds=40
    )
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 42
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    # no side always follows the same other
    for name in "abc":
        before = [calls[i - 1] for i, call in enumerate(calls) if call == name and i]
        assert all(before.count(other) >= 10 for other in "abc" if other != name)
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {
        "a": 40,
        "b": 40,
        "c": 40,
    }


def test_statistics():
    timings = timing.Timings({"slow": (4.0, 2.0, 6.0, 4.0, 4.0), "fast": (2.0, 2.0, 1.0, 9.0, 1.0)})
    assert timings.median("slow") == 4.0
    assert timings.least("fast") == 1.0
    assert timings.ratio("slow", "fast") == 2.0  # of 2, 1, 6, 4/9 and 4
    assert timings.spread("slow") == pytest.approx(0.5)
    assert timings.summary()["fast"]["median_ms"] == 2000.0
    fast = timings.beside("slow", {"slow": 100, "fast": 50}, bandwidth=25.0)["fast"]
    assert (fast["median_ms"], fast["floor_ms"], fast["ratio"]) == (2000.0, 2000.0, 2.0)


def test_results_are_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    timing.alternate({"a": lambda: 1, "b": lambda: 2}, rounds=1, cold=True)
    assert sorted(waited) == [1, 1, 1, 2, 2, 2]


def test_bandwidth_is_of_this_world():
    assert 1e8 < timing.bandwidth(size=2**24, rounds=3) < 1e14


def test_write(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    path = timing.write("some", {"ratio": 2.5}, "python -m benchmarks.some")
    written = json.loads(path.read_text())
    assert path.name == "some.json"
    assert written["ratio"] == 2.5
    assert written["command"] == "python -m benchmarks.some"
    assert written["machine"]["jax"] == jax.__version__
    assert written["machine"]["cores"] >= 1
    assert written["commit"] is None  # of a folder that is in no checkout


def test_a_record_knows_its_commit_and_whether_code_was_changed(tmp_path, monkeypatch):
    def git(*arguments):
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        run = ["git", "-C", str(tmp_path), *names, *arguments]
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()

    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "benchmarks" / "results")
    for folder in ("benchmarks/results", "hire_rewrite"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_text("before")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    (tmp_path / "benchmarks" / "results" / "file").write_text("a record is no code")
    assert timing.commit() == git("rev-parse", "--short", "HEAD")
    (tmp_path / "hire_rewrite" / "file").write_text("after")
    assert timing.commit() == git("rev-parse", "--short", "HEAD") + ", changed"
