"""Where an equation comes from: the line of the user's file, and the names around it."""

from __future__ import annotations

import os
from collections.abc import Iterable

from jax.extend import source_info_util
from jax.extend.source_info_util import NameStack

from hire_rewrite.graph.nodes import Frame, Node


def source_of(node: Node) -> str:
    """`file.py:line (function)` of the user's code that made the equation."""
    summary = source_info_util.summarize(node.eqn.source_info)
    place, _, function = summary.partition(" (")
    path, _, rest = place.partition(":")
    line = rest.partition(":")[0]
    name = f"{os.path.basename(path)}:{line}" if line else os.path.basename(path)
    return f"{name} ({function}" if function else name


def names_around(entry: Node | Frame, home: Frame) -> NameStack:
    """The calls between a frame and an entry of it, however deep, with their named scopes."""
    names = NameStack()
    frame = entry.parent if isinstance(entry, Frame) else entry.frame
    while frame is not None and frame is not home:
        call = frame.eqn
        own = call.source_info.name_stack
        if "name" in call.params:
            own = own.extend(f"jit({call.params['name']})")
        names, frame = own + names, frame.parent
    return names


def common_names(nodes: Iterable[Node], home: Frame) -> NameStack:
    """The named scopes inside `home` that all of the nodes stand in."""
    stacks = [names_around(n, home) + n.eqn.source_info.name_stack for n in nodes]
    depth = min(map(len, stacks))
    while depth and any(stack[:depth] != stacks[0][:depth] for stack in stacks):
        depth -= 1
    # What `einsum` adds names a product, not a layer.
    while depth and "->" in str(stacks[0][depth - 1 : depth]):
        depth -= 1
    return stacks[0][:depth]
