"""The versions that the tests are run on, and what is recorded of a run."""

import sys

from tests import matrix
from tests.test_package import PROJECT

CASES = 6 * [""] + 2 * ["<skipped/>"] + 3 * ["<failure/>"] + ["<error/>"]
REPORT = "".join(f'<testcase classname="tests.test_one">{what}</testcase>' for what in CASES)


def test_each_interpreter_has_the_newest_and_some_have_more():
    every = matrix.combinations(["3.11", "3.12", "3.13"], PROJECT["project"])
    names = [combination.name for combination in every]
    assert names == ["3.11-newest", "3.11-floors", "3.12-newest", "3.12-jax-0.11",
                     "3.12-upgrades", "3.13-newest"]  # fmt: skip
    assert all(f"{c.python}-" in c.name for c in every)


def test_floors_are_what_pyproject_names():
    held = dict(pin.split("==") for pin in matrix.floors(PROJECT["project"]))
    assert held["jax"] == held["jaxlib"] == "0.10.2"
    assert {"numpy", "networkx", "pytest", "hypothesis"} <= set(held)


def test_what_pytest_reported_is_a_row(tmp_path, monkeypatch):
    (tmp_path / "report.xml").write_text(f"<testsuite>{REPORT}</testsuite>")
    monkeypatch.setattr(matrix, "_report", lambda _: tmp_path / "report.xml")
    monkeypatch.setattr(matrix, "_python", lambda _: sys.executable)
    row = matrix.row(matrix.Combination("3.12-newest", "3.12"))
    assert (row["what"], row["tried"], row["wrong"]) == ("tests: 3.12-newest", 10, 4)
    assert row["note"].startswith("jax ")
    assert "; 2 skipped; commit " in row["note"]
