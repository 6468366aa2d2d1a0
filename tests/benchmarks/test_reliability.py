"""The page of what was tried: every record that there is, and no other."""

from benchmarks import reliability

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


def test_every_record_has_a_title():
    names = {
        path.stem.removeprefix("reliability_")
        for path in reliability.timing.RESULTS.glob("reliability_*.json")
    }
    assert names == set(reliability.records())
