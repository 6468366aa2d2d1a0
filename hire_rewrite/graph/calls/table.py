"""The table itself: primitive → how to look inside it and how to write it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hire_rewrite.graph.nodes import Body, Input, Node, Output


class InlineCall:
    """A call that only groups its body: the body runs once, on the operands as they are."""

    dissolves = True
    """Whether its body stands in the caller once anything in it changes."""
    derivative = False
    """Whether it brings a derivative of its own."""

    def body(self, eqn: Any) -> Any:
        """The jaxpr that the equation runs; None if JAX does not tell."""
        raise NotImplementedError

    def on_operands(self, eqn: Any) -> Sequence[Callable[[Any], Any] | None]:
        """What it does to each operand before its body sees it."""
        return [None] * len(eqn.invars)

    def on_results(self, eqn: Any) -> Sequence[Callable[[Any], Any] | None]:
        """What it does to each result of its body."""
        return [None] * len(eqn.outvars)

    def wrap(
        self, eqn: Any, fun: Callable[..., Any], operands: Sequence[int]
    ) -> Callable[..., Any]:
        """`fun` under the public form of the call, if it does not dissolve.

        Args:
          operands: the numbers of the equation's operands that `fun` is given.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class BodySpec:
    """A jaxpr inside a structured primitive and its links to the outside."""

    jaxpr: Any
    length: int | None
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]


class BodyWriter(Protocol):
    """What a structured primitive needs in order to write itself again."""

    def read(self, value: Any) -> Any:
        """The array that stands for a value of the scope around the primitive."""

    def is_live(self, value: Any) -> bool:
        """Whether anything needs the value."""

    def units(self, body: Body) -> list[Any]:
        """The replacements inside a body (see `sites.replacement`)."""

    def run(
        self,
        body: Body,
        inputs: dict[int, Any],
        index: Any = None,
        states: dict[Any, Any] | None = None,
    ) -> BodyResult:
        """Run a body on `inputs` by number.

        Args:
          index: the iteration of a `scan`.
          states: arrays that take the place of those of replacements inside.
        """

    def split_reports(
        self, body: Body, reports: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reports of sites with weights of their own in each iteration, which a loop stacks, and
        all others, which it sums."""

    def report_zeros(self, run: Callable[..., Any], *args: Any) -> dict[str, Any]:
        """Zeros like the reports that `run(*args)` returns beside its outputs."""


@dataclasses.dataclass(frozen=True)
class BodyResult:
    """Outputs by number (live ones only), and what the sites inside report, by site."""

    outputs: dict[int, Any]
    reports: dict[str, Any]


class StructuredCall(Protocol):
    """A loop or a branch: its bodies are scopes of their own."""

    controls: int
    """How many leading operands no body reads, since they decide which one runs."""

    def bodies(self, eqn: Any, ins: Sequence[Any]) -> list[BodySpec]:
        """The jaxprs inside and how their inputs and outputs are linked to the operands."""

    def write(self, node: Node, writer: BodyWriter) -> BodyResult:
        """Emit the primitive again by its public form; outputs by number of the equation's."""
