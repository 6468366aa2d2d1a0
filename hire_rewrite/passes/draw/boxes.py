"""Layers as boxes: those that are alike folded into one, in levels from the first to the last."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import networkx as nx

from hire_rewrite.names import common_name

if TYPE_CHECKING:
    from hire_rewrite.plan import Layer


@dataclasses.dataclass(frozen=True)
class Box:
    """Layers that differ in the numbers of their names alone.

    Attributes:
      name: of all, as `layers/{0..29}/w_up`.
      layer: the first of them.
      count: runs of all of them in one call.
      bytes_before, bytes_after: of all of them.
      level: how many boxes lie on the longest way to it.
      reads: places of the boxes whose results it reads.
    """

    name: str
    layer: Layer
    count: int
    bytes_before: int
    bytes_after: int
    level: int
    reads: tuple[int, ...]


def boxes_of(layers: Sequence[Layer]) -> tuple[Box, ...]:
    """The boxes of a plan's layers, in the order of the program."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for place, layer in enumerate(layers):
        name = re.sub(r"\d+", "0", layer.name)
        sizes = layer.repeats, layer.bytes_before, layer.bytes_after
        key = (name, layer.kind, layer.status, layer.about, *sizes)
        alike.setdefault(key, []).append(place)
    groups = list(alike.values())
    group_of = {place: number for number, group in enumerate(groups) for place in group}
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(groups)))
    for place, layer in enumerate(layers):
        # From one repetition to the next leads back to the first box: the fold says so.
        ends = ((group_of[before], group_of[place]) for before in layer.reads)
        graph.add_edges_from((a, b) for a, b in ends if a < b)
    graph = nx.transitive_reduction(graph)
    levels: dict[int, int] = {}
    for number in range(len(groups)):  # edges lead to greater numbers
        levels[number] = max((levels[a] + 1 for a in graph.predecessors(number)), default=0)
    return tuple(
        Box(
            name=common_name([layers[place].name for place in group]),
            layer=layers[group[0]],
            count=sum(layers[place].repeats for place in group),
            bytes_before=sum(layers[place].bytes_before for place in group),
            bytes_after=sum(layers[place].bytes_after for place in group),
            level=levels[number],
            reads=tuple(sorted(graph.predecessors(number))),
        )
        for number, group in enumerate(groups)
    )


def rows_of(boxes: Sequence[Box], columns: int) -> list[list[int]]:
    """Places of boxes by rows of at most `columns`, those of a level beside each other."""
    rows = []
    order = sorted(range(len(boxes)), key=lambda place: boxes[place].level)
    for _, level in itertools.groupby(order, lambda place: boxes[place].level):
        places = list(level)
        rows += [places[i : i + columns] for i in range(0, len(places), columns)]
    return rows


def frames_of(boxes: Sequence[Box], rows: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """Stretches of rows whose boxes all run equally often, and more than once.

    Returns:
      The first row, the last one, and how often.
    """

    def count(row: Sequence[int]) -> int:
        counts = {boxes[place].count for place in row}
        return counts.pop() if len(counts) == 1 else 0

    frames, at = [], 0
    for times, stretch in itertools.groupby(rows, count):
        length = len(list(stretch))
        if times > 1 and sum(len(row) for row in rows[at : at + length]) > 1:
            frames.append((at, at + length - 1, times))
        at += length
    return frames
