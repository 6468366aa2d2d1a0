"""Rules in a JSON file."""

from __future__ import annotations

import dataclasses
import json
import numbers
import os
from collections.abc import Iterable, Mapping
from typing import Any

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.files import local, write
from hire_rewrite.ops.encodings import encoding_types
from hire_rewrite.ops.predictors import predictor_types
from hire_rewrite.rules import Rule
from hire_rewrite.settings import is_int, is_iterable
from hire_rewrite.sites import site_kinds


def save_rules(rules: Iterable[Rule], path: str | os.PathLike[str]) -> None:
    """Write rules to a JSON file, which `load_rules` reads; one that is there is replaced.

    Raises:
      HireRewriteError: the arguments are something else, a predictor or an encoding is not
        registered, or the file cannot be written.
    """
    text = json.dumps([plain(rule, rule_types()) for rule in _rules(rules, path)], indent=1)
    write("save_rules", path, text + "\n")


def _rules(rules: Any, path: Any) -> list[Rule]:
    """The rules that are given to be saved to a path.

    Raises:
      HireRewriteError: they are something else.
    """
    kind = type(rules).__name__
    if isinstance(rules, str | os.PathLike):
        raise HireRewriteError(
            f"save_rules: rules are a {kind} and the path is a {type(path).__name__}: give "
            "save_rules(rules, path), the rules first"
        )
    if hasattr(rules, "rules"):
        name = {"Packed": "packed", "Transformed": "step"}.get(kind, "its")
        raise HireRewriteError(
            f"save_rules: a {kind} stands where the rules belong: give {name}.rules"
        )
    if isinstance(rules, Rule):
        return [rules]
    if not is_iterable(rules):
        raise HireRewriteError(
            f"save_rules: rules are a {kind}: give packed.rules, say, or those of tune"
        )
    found = list(rules)
    for rule in found:
        if not isinstance(rule, Rule):
            raise HireRewriteError(
                f"save_rules: {rule!r} is not a rule: give packed.rules, say, or those of tune"
            )
    return found


def load_rules(path: str | os.PathLike[str]) -> tuple[Rule, ...]:
    """The rules in a file of `save_rules`, or of what was written by `Packed.save`.

    Raises:
      HireRewriteError: there is no such file, or it holds something else.
    """
    # These need this module.
    from hire_rewrite.checkpoint import is_checkpoint, read_rules
    from hire_rewrite.checkpoint.bounded import MAX_BYTES, parse, read_bytes

    path = local("load_rules", path)
    if is_checkpoint(path):
        return read_rules(path)
    items = parse(read_bytes(path, MAX_BYTES), f"load_rules: {path} holds no rules")
    try:
        if not isinstance(items, list):
            raise ValueError(f"it is a {type(items).__name__}, and not a list of rules")
        rules = tuple(built(item, rule_types()) for item in items)
    except HireRewriteError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise HireRewriteError(f"load_rules: {path} holds no rules: {error}") from error
    for rule in rules:
        if not isinstance(rule, Rule):
            raise HireRewriteError(f"load_rules: {path} holds {rule!r}, which is not a rule")
    return rules


def plain(item: Any, types: Mapping[str, type], what: str = "save_rules") -> Any:
    """A setting as JSON has it: a dataclass as its fields and `type`, a tuple as a list, NumPy's
    numbers as Python's.

    Args:
      types: the dataclasses that there may be, by their names.
      what: the function that messages begin with.
    """
    if isinstance(item, tuple):
        return [plain(value, types, what) for value in item]
    if is_int(item):
        return int(item)
    if isinstance(item, numbers.Real) and not isinstance(item, bool):
        return float(item)
    if not dataclasses.is_dataclass(item) or isinstance(item, type):
        return item
    name = type(item).__name__
    if types.get(name) is not type(item):
        raise HireRewriteError(
            f"{what}: {item!r} is none of {', '.join(types)}: register its class with "
            "register_predictor or register_encoding, or its kind of site with register_kind"
        )
    fields = {
        field.name: plain(getattr(item, field.name), types, what)
        for field in dataclasses.fields(item)
    }
    return {"type": name, **fields}


def built(item: Any, types: Mapping[str, type], what: str = "load_rules") -> Any:
    """Of what `plain` returned.

    Raises:
      HireRewriteError: there is no such dataclass.
      ValueError, TypeError, KeyError: it is something else.
    """
    if isinstance(item, list):
        return tuple(built(value, types, what) for value in item)
    if not isinstance(item, dict):
        return item
    fields = {name: built(value, types, what) for name, value in item.items() if name != "type"}
    if item["type"] not in types:
        raise HireRewriteError(
            f"{what}: there is no {item['type']}, only {', '.join(types)}: register its class with "
            "register_predictor or register_encoding, or its kind of site with register_kind"
        )
    return types[item["type"]](**fields)


def rule_types() -> Mapping[str, type]:
    """The classes that a file of rules may name, by their names."""
    rules = {kind.rule.__name__: kind.rule for kind in site_kinds()}
    return {**encoding_types(), **predictor_types(), **rules}
