"""A function flattened: values, the nodes that define them, and nested scopes.

Calls (`jit`, `checkpoint`, `custom_jvp`, ...) are inlined in the caller's *scope*, so that a value
keeps one identity on both sides of the call, and remembered as *frames*, so that the code can be
emitted again as it was. Loops and branches are nodes with scopes of their own, tied to the outside
by `Input` and `Output` links.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator
from typing import Any, Protocol

from hire_rewrite.graph.source import user_place


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """One array of the flattened function. Compared by identity.

    Exactly one of these says where it comes from: `node` (an equation's result), `literal` (a
    scalar or array written into the jaxpr), `const` (an array that the function closed over),
    or none of them: an input of its scope.
    """

    aval: Any
    scope: Scope
    _: dataclasses.KW_ONLY
    node: Node | None = None
    literal: Any = None
    const: Any = None
    users: list[tuple[Node, int]] = dataclasses.field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return getattr(self.aval, "shape", ())

    @property
    def dtype(self) -> Any:
        return self.aval.dtype

    @property
    def is_constant(self) -> bool:
        """Whether it is a part of the function itself: written into the jaxpr, or closed over."""
        return self.literal is not None or self.const is not None

    @property
    def is_input(self) -> bool:
        return self.node is None and not self.is_constant

    def __repr__(self) -> str:
        return f"Value({self.aval.str_short()}, {self.node})"


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """One equation of a scope; `index` is its place in the order of execution."""

    index: int
    eqn: Any
    scope: Scope
    frame: Frame
    ins: tuple[Value, ...]
    outs: tuple[Value, ...] = ()
    bodies: tuple[Body, ...] = ()
    controls: tuple[Value, ...] = ()
    """Operands that no body reads but that decide which one runs."""

    @property
    def primitive(self) -> Any:
        return self.eqn.primitive

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params

    def walk(self) -> Iterator[Node]:
        """It and every node inside it, at any depth."""
        yield self
        for body in self.bodies:
            for node in body.scope.nodes:
                yield from node.walk()

    def eqns_around(self) -> Iterator[Any]:
        """Its equation and those of the calls and loops that it is in, innermost first."""
        here: Node | None = self
        while here is not None:
            yield here.eqn
            yield from (frame.eqn for frame in here.frame.around() if frame.eqn is not None)
            here = here.scope.parent

    def __repr__(self) -> str:
        return f"Node({self.primitive}#{self.index})"


@dataclasses.dataclass(eq=False, slots=True)
class Frame:
    """A call whose body was inlined in the scope; the scope's own root has no equation."""

    parent: Frame | None = None
    eqn: Any = None
    """The call; None for the root of a scope."""
    ins: tuple[Value, ...] = ()
    outs: tuple[Value, ...] = ()
    entries: list[Node | Frame] = dataclasses.field(default_factory=list)

    def around(self) -> Iterator[Frame]:
        """It and the frames around it, innermost first."""
        frame: Frame | None = self
        while frame is not None:
            yield frame
            frame = frame.parent

    def nodes(self) -> Iterator[Node]:
        """All nodes in it, those of the frames inside included, in order."""
        for entry in self.entries:
            if isinstance(entry, Frame):
                yield from entry.nodes()
            else:
                yield entry


@dataclasses.dataclass(eq=False, slots=True)
class Scope:
    """A function body with its calls inlined: the whole function, a loop body, a branch."""

    parent: Node | None = None
    length: int | None = 1
    """How often it runs each time the parent runs; None if that is not known."""
    inputs: list[Value] = dataclasses.field(default_factory=list)
    outputs: list[Value] = dataclasses.field(default_factory=list)
    nodes: list[Node] = dataclasses.field(default_factory=list)
    root: Frame = dataclasses.field(default_factory=Frame)

    def walk(self) -> Iterator[Scope]:
        """This scope and every scope inside it, outermost first."""
        yield self
        for node in self.nodes:
            for body in node.bodies:
                yield from body.scope.walk()

    def operands(self) -> Iterator[Value]:
        """What operations and loops read in this scope and in those inside it."""
        for scope in self.walk():
            for node in scope.nodes:
                yield from node.ins
                for body in node.bodies:
                    yield from (link.outer for link in body.inputs)

    def ancestors(self) -> Iterator[Scope]:
        """This scope and those around it, innermost first."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent.scope if scope.parent is not None else None


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """What an input of a body holds: an outer value whole, a slice of it, or a loop's carry."""

    outer: Value
    role: str
    """`"const"`: the outer value; `"slice"`: one slice of its first axis for each iteration;
    `"carry"`: the outer value at first, then an output of the last iteration; `"shard"`: a
    device's part of it."""
    spec: Any = None
    """The `PartitionSpec` that says which part of it a device has."""


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """Where an output of a body goes: to the node's output `outer`, and back to inputs."""

    outer: int | None
    feeds: tuple[tuple[int, int], ...] = ()
    """(body, input) pairs of the same node that hold it in the next iteration."""


@dataclasses.dataclass(eq=False, slots=True)
class Body:
    """A scope of a loop or branch with its links, one for each input and output."""

    scope: Scope
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]


class Uses(Protocol):
    """Who reads a value (see `graph.liveness`)."""

    @property
    def results(self) -> Collection[Value]:
        """Values that are results of their scope."""

    def users(self, value: Value) -> list[tuple[Node, int]]:
        """The nodes that read a value, with the operand's position."""


def source_of(node: Node) -> str:
    """`file.py:line (function)` of the user's code that made the equation, or the call or the loop
    that it is in (JAX knows no line of what its own functions do)."""
    for eqn in node.eqns_around():
        place = user_place(eqn.source_info)
        if place is not None:
            return f"{os.path.basename(place[0])}:{place[1]} ({place[2]})"
    return "unknown"
