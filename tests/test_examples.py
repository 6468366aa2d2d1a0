"""The examples in docstrings."""

import doctest
import importlib
from pathlib import Path

import pytest

import hire_rewrite

ROOT = Path(hire_rewrite.__file__).parent
SHOWN = sorted(path for path in ROOT.rglob("*.py") if ">>>" in path.read_text(encoding="utf-8"))
MODULES = [".".join((ROOT.name, *path.relative_to(ROOT).with_suffix("").parts)) for path in SHOWN]


@pytest.mark.parametrize("name", MODULES)
def test_they_run_and_give_what_they_say(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried
    assert not failed
