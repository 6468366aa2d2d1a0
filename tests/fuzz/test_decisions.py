"""A guess decides nothing, in some of the programs that `make fuzz` tries."""

import pytest

from tests.fuzz.behind import KINDS, STEPS
from tests.fuzz.decisions import chunk, trial

PARTS = 8


@pytest.mark.parametrize("part", range(PARTS))
def test_a_guess_decides_nothing(part):
    found = chunk(15 * part, 15 * (part + 1))
    assert not found["wrong"]
    assert found["counts"]["right"]
    assert found["counts"]["dense"]


def test_what_a_guess_decides_is_seen(monkeypatch):
    """If nothing were refused, one of ten would be wrong."""
    from hire_rewrite.sites.head import match

    monkeypatch.setattr(match, "ranked", lambda *_: match.AS_LOGITS)
    outcomes = [trial(seed)[0] for seed in range(36)]
    assert outcomes.count("wrong") >= 3


def test_every_kind_is_made():
    assert {made for made, _, _ in STEPS.values()} == set(KINDS)
