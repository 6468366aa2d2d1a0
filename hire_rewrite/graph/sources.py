"""What a value is computed from, through the bodies of loops and branches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from hire_rewrite.graph.nodes import Body, Scope, Value
from hire_rewrite.graph.reach import reached


def body_of(value: Value) -> tuple[Body, int]:
    """The body of a loop or branch that a value is an input of, and its number there."""
    node = value.scope.parent
    assert node is not None
    body = next(body for body in node.bodies if body.scope is value.scope)
    return body, body.scope.inputs.index(value)


def sources(value: Value) -> tuple[Value, ...]:
    """What a value is computed from: an equation's operands, or what a body's input is at first."""
    if value.node is not None:
        return value.node.ins
    if value.is_input and value.scope.parent is not None:
        body, i = body_of(value)
        return (body.inputs[i].outer,)
    return ()


def sources_first(
    value: Value, done: Collection[Value], among: Callable[[Value], bool] = lambda _: True
) -> Iterator[Value]:
    """A value and all that it is computed from, each behind its sources, however many stand in a
    row.

    Args:
      done: those that need not be visited; whoever asks puts each one there that is returned.
      among: which sources are of interest.
    """
    stack = [value]
    while stack:
        current = stack[-1]
        missing = [v for v in sources(current) if v not in done and among(v)]
        if current in done:
            stack.pop()
        elif missing:
            stack += missing
        else:
            stack.pop()
            yield current


def backward_slice(value: Value, within: Scope | None = None) -> Iterator[Value]:
    """A value and all that it is computed from, each once.

    Args:
      within: a scope around the value at whose own inputs to end; None for the function's.
    """
    outermost = within.parent if within is not None else None

    def behind(value: Value) -> tuple[Value, ...]:
        ends = value.is_input and value.scope.parent is outermost
        return () if ends else sources(value)

    return reached([value], behind)
