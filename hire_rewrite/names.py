"""Names of sites, and of what layers have in common."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Item = TypeVar("Item")

_Choices = tuple[tuple[str, ...], ...]
"""For each part of a name what may stand there."""

_LISTED = 8
"""Names that a message lists."""

_NUMBER = re.compile(r"\d+")
_DIVIDERS = re.compile(r"([/:])")
_REPEATED = "\0"
"""Before the place of a scope: a part of a name that repeats this scope."""


def grouped(names: Sequence[str]) -> list[str]:
    """The names, those that differ in one place alone written as one.

    Examples:
      >>> grouped(["p/0/q", "p/0/k", "p/1/q", "p/1/k", "p/head"])
      ['p/{0..1}/{q,k}', 'p/head']
      >>> grouped(["Model/block_0:p/block_0/up", "Model/block_1:p/block_1/up"])
      ['Model/block_{0..1}:p/block_{0..1}/up']
    """
    return [name for name, _ in groups(names, lambda name: name, lambda name: ())]


def unique(names: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """The names, those that occur more than once numbered; none is then another or of `others`.

    Examples:
      >>> unique(["w", "w", "w#1", "v"])
      ['w#2', 'w#3', 'w#1', 'v']
    """
    total, seen = Counter([*others, *names]), Counter(others)
    different = []
    for name in names:
        numbered = name
        if total[name] > 1:
            while numbered in total:
                seen[name] += 1
                numbered = f"{name}#{seen[name]}"
            total[numbered] = 1
        different.append(numbered)
    return different


def first_names(names: Sequence[str]) -> str:
    """The names as a message lists them: `grouped`, and no more than eight of those.

    Examples:
      >>> first_names(["p/0/q", "p/1/q", "p/head"])
      'p/{0..1}/q, p/head'
    """
    some = grouped(names)
    return ", ".join(some[:_LISTED]) + (", ..." if len(some) > _LISTED else "")


def groups(
    items: Sequence[Item], name: Callable[[Item], str], alike: Callable[[Item], Hashable]
) -> list[tuple[str, list[Item]]]:
    """Items in groups of one name each, in order of their first.

    Items belong together if they are `alike` and their names form a block: every choice of parts,
    in the places where they differ, is the name of one of them. What a path repeats of the scopes
    before it (`Model/block_0:params/block_0/up`) is chosen there.
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
                repeated = [(i, p) for i, p in enumerate(parts) if p[0].startswith(_REPEATED)]
                key = (len(parts), place < len(parts), here, tuple(repeated), alike(members[0]))
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
    return [(_joined(parts), members) for parts, members in open_groups]


def _parts(name: str) -> list[str]:
    """A name in parts, `layers_3` in two. Where its path repeats a scope, the part says the place
    of that scope; a number alone says too little to be one."""
    scopes, colon, path = name.rpartition(":")
    named = enumerate(_DIVIDERS.split(scopes))
    places = {scope: i for i, scope in named if scope not in "/:" and not _NUMBER.fullmatch(scope)}
    repeating = [
        f"{_REPEATED}{places[part]}" if part in places else part for part in _DIVIDERS.split(path)
    ]
    parts = [*_DIVIDERS.split(scopes + colon), *repeating]
    return [
        piece
        for part in parts
        for piece in ([part] if part.startswith(_REPEATED) else re.split(r"(\d+)", part))
        if piece
    ]


def _joined(parts: _Choices) -> str:
    """A name of parts, some of which may have several choices."""
    written = [""]
    for choices in parts:
        if choices[0].startswith(_REPEATED):
            written[-1] += written[int(choices[0].removeprefix(_REPEATED))]
        elif set(choices) <= {"/", ":"}:
            written += [_written(choices), ""]
        else:
            written[-1] += _written(choices)
    return "".join(written)


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
    """Names that differ in numbers as one, of one folder in short: `layers/{0..95}/up, down`.

    Examples:
      >>> common_name(["p/0/q", "p/1/q", "p/0/k", "p/1/k", "head"])
      'p/{0..1}/q, k, head'
    """
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    for name in dict.fromkeys(names):
        parts = re.split(r"(\d+)", name)
        alike.setdefault(tuple(parts[::2]), []).append(parts)
    merged = [
        "".join(_written(tuple(dict.fromkeys(column))) for column in zip(*group, strict=True))
        for group in alike.values()
    ]
    shown = merged[:1]
    for previous, name in itertools.pairwise(merged):
        folder = previous.rpartition("/")[0]
        shown.append(name.removeprefix(folder + "/") if folder else name)
    return ", ".join(shown)
