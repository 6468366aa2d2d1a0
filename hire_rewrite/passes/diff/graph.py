"""A diff as graphs: for Graphviz, both sides in one, and for Google's model-explorer, one each."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hire_rewrite.passes.diff.value import Block, Call, Equation, Same, megabytes

_COLORS = {"same": "#eceff4", "before": "#f6c1bd", "after": "#bfe5c8", "input": "#dfe7f5"}


@dataclasses.dataclass(frozen=True)
class _Node:
    """An equation in a graph.

    Attributes:
      label: its number in the diff, which both sides share where it is in both.
      sides: `"same"`, `"before"` or `"after"`.
      namespace: the calls and loops around, as a path.
      reads: the names that it reads, those that a call's jaxprs return included.
    """

    label: str
    side: str
    namespace: str
    equation: Equation
    reads: tuple[str, ...]


def to_dot(diff: Any) -> str:
    """A `Diff` for Graphviz."""
    lines = ["digraph diff {", "  rankdir=TB; node [shape=box style=filled fontname=monospace];"]
    nodes = list(_nodes(diff.block))
    edges: dict[str, None] = {}
    for side in ("before", "after"):
        makers = _makers(nodes, side)
        for node in nodes:
            if node.side in ("same", side):
                edges |= {
                    f"  {makers.get(name, _quoted(name))} -> {node.label};": None
                    for name in dict.fromkeys(map(_whole, node.reads))
                    if name in makers or _is_input(name)
                }
    read = {_whole(name) for node in nodes for name in node.reads}
    made = _makers(nodes, "before").keys() | _makers(nodes, "after").keys()
    for name in sorted(name for name in read - made if _is_input(name)):
        lines.append(f'  {_quoted(name)} [shape=ellipse fillcolor="{_COLORS["input"]}"];')
    for node in nodes:
        text = _label(node.equation)
        if node.equation.bytes and node.side != "same":
            text += f"\\n{megabytes(node.equation.bytes)}"
        lines.append(f'  {node.label} [label={_quoted(text)} fillcolor="{_COLORS[node.side]}"];')
    return "\n".join([*lines, *edges, "}"])


def to_model_explorer(diff: Any) -> str:
    """A `Diff` for model-explorer: a collection of two graphs, whose changed nodes are colored."""
    nodes = list(_nodes(diff.block))
    graphs = [
        {"id": side, "nodes": _explorer_nodes(nodes, side, dict(_types(diff, side)))}
        for side in ("before", "after")
    ]
    label = " → ".join(diff.names)
    return json.dumps({"label": label, "graphs": graphs}, indent=1, ensure_ascii=False)


def _explorer_nodes(
    nodes: list[_Node], side: str, types: Mapping[str, str]
) -> list[dict[str, Any]]:
    makers = _makers(nodes, side)
    kept = [node for node in nodes if node.side in ("same", side)]
    read = {_whole(name) for node in kept for name in node.reads}
    inputs = [
        {
            "id": name,
            "label": name,
            "namespace": "arguments",
            "attrs": [{"key": "type", "value": types.get(name, "")}],
            "style": {"backgroundColor": _COLORS["input"]},
        }
        for name in sorted(name for name in read if _is_input(name) and name not in makers)
    ]
    outputs = {node.label: [name for name, _ in node.equation.results] for node in kept}
    return inputs + [_explorer_node(node, makers, outputs) for node in kept]


def _explorer_node(
    node: _Node, makers: Mapping[str, str], outputs: Mapping[str, list[str]]
) -> dict[str, Any]:
    equation = node.equation
    edges = []
    for position, name in enumerate(map(_whole, node.reads)):
        if name in makers:
            maker = makers[name]
            number = outputs[maker].index(name) if name in outputs[maker] else 0
            edges.append((maker, str(number), str(position)))
        elif _is_input(name):
            edges.append((name, "0", str(position)))
    attributes = {
        "equation": str(equation),
        "source": equation.place,
        "function": equation.function,
        "bytes read": megabytes(equation.bytes) if equation.bytes else "",
        "estimated ms": "" if equation.milliseconds is None else f"{equation.milliseconds:.3f}",
        "plan": "; ".join(f"{note.name}: {note.reason}" for note in equation.notes),
        **dict(equation.params),
    }
    return {
        "id": node.label,
        "label": _label(equation),
        "namespace": node.namespace,
        "attrs": [{"key": key, "value": value} for key, value in attributes.items() if value],
        "incomingEdges": [
            {"sourceNodeId": maker, "sourceNodeOutputId": out, "targetNodeInputId": place}
            for maker, out, place in edges
        ],
        "outputsMetadata": [
            {"id": str(number), "attrs": [{"key": "tensor_shape", "value": kind}]}
            for number, (_, kind) in enumerate(equation.results)
        ],
        "style": {"backgroundColor": _COLORS[node.side]},
    }


def _nodes(block: Block, namespace: str = "", prefix: str = "n") -> Iterator[_Node]:
    """The equations of both sides, those of calls that changed included."""
    for number, row in enumerate(block.rows):
        label = f"{prefix}{number}"
        if isinstance(row, Same):
            yield _Node(label, "same", namespace, row.equation, row.equation.reads)
        elif isinstance(row, Call):
            inside = "/".join(filter(None, (namespace, f"{_label(row.before)} {label}")))
            for n, inner in enumerate(row.blocks):
                part = f"{inside}/{inner.label}" if len(row.blocks) > 1 else inside
                yield from _nodes(inner, part, f"{label}_{n}_")
            for side, equation, place in (("before", row.before, 0), ("after", row.after, 1)):
                ends = tuple(name for inner in row.blocks for name in inner.results[place])
                reads = equation.reads + ends
                yield _Node(f"{label}{side[0]}", side, inside, equation, reads)
        else:
            for side, equations in (("before", row.before), ("after", row.after)):
                for n, equation in enumerate(equations):
                    yield _Node(f"{label}{side[0]}{n}", side, namespace, equation, equation.reads)


def _makers(nodes: list[_Node], side: str) -> dict[str, str]:
    """The node that makes each name on a side."""
    kept = (node for node in nodes if node.side in ("same", side))
    return {name: node.label for node in kept for name, _ in node.equation.results if name != "_"}


def _types(diff: Any, side: str) -> Iterator[tuple[str, str]]:
    for argument in diff.arguments:
        kind = argument.before if side == "before" else argument.after
        if kind is not None:
            yield argument.path, kind


def _label(equation: Equation) -> str:
    return equation.name or equation.primitive


def _whole(name: str) -> str:
    """The array that a slice is of."""
    return re.sub(r"(\[i\])+$", "", name)


def _is_input(name: str) -> bool:
    """Whether a name is one of an array, and not a number that is written into the program."""
    return not re.fullmatch(r"[-+.0-9einfa]+|True|False|_|array\[.*\]", name)


def _quoted(text: str) -> str:
    return '"' + text.replace('"', "'") + '"'
