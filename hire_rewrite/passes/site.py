"""A replacement that is one function of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.patterns.graph import Node, Scope, Value

__all__ = ["SiteReplacement"]


@dataclasses.dataclass(frozen=True, eq=False)
class SiteReplacement:
    """A `Replacement` made of one function of the arrays that stand for `inputs`.

    `run` returns the arrays of `outputs`, and with `reports` a report beside them.
    """

    name: str
    nodes: frozenset[Node]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    run: Callable[[Sequence[Any], Any], Any]
    loops: tuple[Scope, ...] = ()
    reports: bool = False

    def emit(self, ins: Sequence[Any], index: Mapping[Scope, Any]) -> tuple[list[Any], Any]:
        found = self.run(ins, _layer_of(self.loops, index))
        results, report = found if self.reports else (found, None)
        for value, result in zip(self.outputs, results, strict=True):
            got = jax.typeof(result)
            if (got.shape, got.dtype) != (value.shape, value.dtype):
                raise HireRewriteError(
                    f"{self.name}: its replacement returns {got.str_short()} where the function "
                    f"has {value.aval.str_short()}; this is a bug of hire_rewrite: exclude the "
                    "site with a rule's path= and report it"
                )
        return list(results), report


def _layer_of(loops: Sequence[Scope], index: Mapping[Scope, Any]) -> Any:
    """The number of the current iteration among all of the scans `loops`, i32[]."""
    if not loops:
        return np.int32(0)
    layer = index[loops[0]]
    for scope in loops[1:]:
        layer = layer * scope.length + index[scope]
    return layer
