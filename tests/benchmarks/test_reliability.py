"""The page of what was tried: every record that there is, and no other."""

import pytest

from benchmarks import reliability, reliability_tests

MACHINE = {"cores": 2, "processor": "a chip", "jax": "0.10.2", "python": "3.11.9"}


def test_page_has_each_record_and_its_counts():
    record = {
        "about": "Programs.", "command": "make fuzz", "machine": MACHINE,
        "rows": [{"what": "graphs", "tried": 100_000, "wrong": 3, "note": "seeds 0 to 9"}],
    }  # fmt: skip
    text = list(reliability.lines({"fuzz": record}))
    headings = [line for line in text if line.startswith("\n## ")]
    assert headings == [f"\n## {reliability.TITLES['fuzz']}\n"]
    assert "| graphs | 100,000 | 3 | seeds 0 to 9 |" in text
    assert "commit" not in text[-1]
    assert "commit abc" in list(reliability.lines({"fuzz": record | {"commit": "abc"}}))[-1]


def test_every_record_has_a_title():
    names = {
        path.stem.removeprefix("reliability_")
        for path in reliability.timing.RESULTS.glob("reliability_*.json")
    }
    assert names == set(reliability.records())


REPORT = """\
<testsuites><testsuite>
<testcase classname="tests.test_export" name="a"/>
<testcase classname="tests.test_export" name="b"><failure message="no">...</failure></testcase>
<testcase classname="tests.test_export" name="c"><skipped/></testcase>
<testcase classname="tests.test_exported" name="d"><error/></testcase>
<testcase classname="tests.fuzz.test_laws" name="e"><properties/></testcase>
</testsuite></testsuites>
"""


def test_tests_are_counted_by_their_files(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    found = reliability_tests.outcomes(tmp_path / "report.xml")
    row = reliability_tests.row("export", ["tests/test_export.py"], found)
    assert (row["tried"], row["wrong"]) == (2, 1)
    assert row["note"] == "`tests/test_export.py`; 1 skipped"
    row = reliability_tests.row("laws", ["tests/fuzz"], found)
    assert (row["tried"], row["wrong"]) == (1, 0)
    with pytest.raises(ValueError, match="test_serve"):
        reliability_tests.row("the server", ["tests/examples/test_serve.py"], found)


def test_files_of_counted_tests_exist():
    for path in (path for part in reliability_tests.PARTS.values() for path in part):
        assert (reliability_tests.ROOT / path).exists(), path
