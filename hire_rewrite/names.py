"""Names of sites, and of what layers have in common."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")

_Choices = tuple[tuple[str, ...], ...]
"""For each part of a name what may stand there."""

_NUMBER = re.compile(r"\d+")
_DIVIDERS = re.compile(r"([/:])")


def site_pattern(name: str, others: Iterable[str] = ()) -> str:
    """A regular expression for the name of one site, whatever the argument that holds its weights
    is called, and whatever scopes its layer stands in.

    Args:
      others: names of sites that it must not fit; where they leave no choice it is the whole name.

    Example:
      >>> site_pattern("eqx.nn.Linear:model/layers/0/q")
      '^(.*:)?[^/:]+/layers/0/q$'
      >>> site_pattern("a/q", ["b/q"])
      '^a/q$'
    """
    path = name.rpartition(":")[2]
    argument, _, rest = path.partition("/")
    pattern = f"[^/:]+/{re.escape(rest)}" if rest else re.escape(argument)
    pattern = f"^(.*:)?{pattern}$"
    if any(re.search(pattern, other) for other in others if other != name):
        return f"^{re.escape(name)}$"
    return pattern


def sites_pattern(names: Sequence[str], others: Sequence[str]) -> str:
    """A regular expression for the names of some sites, as `site_pattern` for one.

    Example:
      >>> sites_pattern(["model/0/q", "model/1/q"], ["model/0/k", "model/1/k"])
      '^(.*:)?[^/:]+/(0|1)/q$'
    """
    rest = [other for other in others if other not in names]
    patterns = [site_pattern(name, rest) for name in dict.fromkeys(names)]
    columns = list(zip(*(pattern.split("/") for pattern in patterns), strict=False))
    differing = [i for i, parts in enumerate(columns) if len(set(parts)) > 1]
    whole = all(pattern.count("/") == patterns[0].count("/") for pattern in patterns)
    if not whole or len(differing) != 1 or differing[0] in (0, len(columns) - 1):
        return "|".join(patterns)
    parts = [column[0] for column in columns]
    parts[differing[0]] = f"({'|'.join(columns[differing[0]])})"
    return "/".join(parts)


def grouped(names: Sequence[str]) -> list[str]:
    """The names, those that differ in one place alone written as one.

    Example:
      >>> grouped(["p/0/q", "p/0/k", "p/1/q", "p/1/k", "p/head"])
      ['p/{0..1}/{q,k}', 'p/head']
    """
    return [name for name, _ in groups(names, lambda name: name, lambda name: ())]


def groups(
    items: Sequence[Item], name: Callable[[Item], str], alike: Callable[[Item], Hashable]
) -> list[tuple[str, list[Item]]]:
    """Items in groups of one name each, in order of their first.

    Items belong together if they are `alike` and their names form a block: every choice of parts,
    in the places where they differ, is the name of one of them.
    """
    first = {id(item): i for i, item in enumerate(items)}
    open_groups: list[tuple[_Choices, list[Item]]]
    open_groups = [(tuple((part,) for part in _parts(name(item))), [item]) for item in items]
    merged = True
    while merged:
        merged = False
        places = range(max((len(parts) for parts, _ in open_groups), default=0))
        for place in reversed(places):
            buckets: dict[Hashable, list[tuple[_Choices, list[Item]]]] = {}
            for parts, members in open_groups:
                here = parts[:place] + parts[place + 1 :] if place < len(parts) else parts
                key = (len(parts), place < len(parts), here, alike(members[0]))
                buckets.setdefault(key, []).append((parts, members))
            joined = []
            for bucket in buckets.values():
                parts, _ = bucket[0]
                if len(bucket) > 1 and place < len(parts):
                    merged = True
                    union = tuple(dict.fromkeys(p for other, _ in bucket for p in other[place]))
                    parts = (*parts[:place], union, *parts[place + 1 :])
                    bucket = [(parts, [item for _, members in bucket for item in members])]
                joined += bucket
            open_groups = joined
    open_groups.sort(key=lambda group: min(first[id(item)] for item in group[1]))
    return [("".join(map(_written, parts)), members) for parts, members in open_groups]


def _parts(name: str) -> list[str]:
    """A name in parts, `layers_3` in two; joined they are the name."""
    return [piece for part in _DIVIDERS.split(name) for piece in re.split(r"(\d+)", part) if piece]


def _written(choices: tuple[str, ...]) -> str:
    if len(choices) == 1:
        return choices[0]
    numbers = [int(c) for c in choices if _NUMBER.fullmatch(c)]
    if len(numbers) == len(choices) and len(numbers) > 1:
        numbers.sort()
        if numbers == list(range(numbers[0], numbers[-1] + 1)):
            return f"{{{numbers[0]}..{numbers[-1]}}}"
        return "{" + ",".join(map(str, numbers)) + "}"
    return "{" + ",".join(choices) + "}"


def common_name(names: Sequence[str]) -> str:
    """Names that differ in numbers as one, of one folder in short: `layers/{0…95}/up, down`."""
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    for name in dict.fromkeys(names):
        parts = re.split(r"(\d+)", name)
        alike.setdefault(tuple(parts[::2]), []).append(parts)
    merged = ["".join(map(_numbers, zip(*group, strict=True))) for group in alike.values()]
    shown = merged[:1]
    for previous, name in itertools.pairwise(merged):
        folder = previous.rpartition("/")[0]
        shown.append(name.removeprefix(folder + "/") if folder else name)
    return ", ".join(shown)


def _numbers(column: Sequence[str]) -> str:
    kinds = list(dict.fromkeys(column))
    if len(kinds) == 1:
        return kinds[0]
    numbers = sorted(map(int, kinds))
    run = numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) > 2
    return f"{{{numbers[0]}…{numbers[-1]}}}" if run else f"{{{', '.join(map(str, numbers))}}}"
