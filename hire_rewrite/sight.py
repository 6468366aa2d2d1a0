"""Raw weights where a `Packed` belongs: they are packed on first sight, and remembered."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import get_opaque_trace_state

from hire_rewrite import _compat
from hire_rewrite.analyses import REMEMBERED, Analyses
from hire_rewrite.analysis import Analysis
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.packed import Packed
from hire_rewrite.recent import Recent

__all__ = ["OnSight", "traced", "tracing"]


class OnSight:
    """The last weights that were seen, and what was packed of them."""

    def __init__(self, analyses: Analyses, warn: Callable[[str], None]) -> None:
        self._analyses, self._warn = analyses, warn
        self._kept = False
        self._seen: tuple[tuple[Any, ...], list[Packed]] | None = None
        self._served: dict[Analysis, Packed | None] = Recent(REMEMBERED)

    def keep(self, packed: Packed) -> None:
        """Have a `Packed` stand for weights that are closed over."""
        with self._analyses.lock:  # a first call that packs now, too, would replace it
            self._kept, self._seen = True, ((), [packed])

    def pack(
        self, leaves: tuple[Any, ...], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Packed | None:
        """A `Packed` made of the raw weights in a call's arguments; None if no site asks for one.

        Several threads pack the same weights once: the others wait.

        Args:
          leaves: the weights among `args`.
        """
        if traced(leaves):  # nothing is remembered
            return self._pack(leaves, args, kwargs)
        with self._analyses.lock:
            return self._pack(leaves, args, kwargs)

    def _pack(
        self, leaves: tuple[Any, ...], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Packed | None:
        seen, known = self._seen or (None, [])
        if self._kept:
            return known[0]
        same = (
            seen is not None and len(seen) == len(leaves) and all(map(operator.is_, seen, leaves))
        )
        analysis = self._analyses.of(None, args, kwargs)
        analysis.check_decided()
        if same and analysis in self._served:
            return self._served[analysis]
        if not analysis.packing and (traced(leaves) or not analysis.unexamined):
            return None
        call = analysis
        for packed in known if same else ():
            if call.sites_in(packed):
                held = self._analyses.of(packed, args, kwargs)
                if held.dense_weights_in(packed):
                    self._served[call] = packed
                    return packed
        if traced(leaves):
            if any(_compat.explicit_spec(jax.typeof(leaf)) is not None for leaf in leaves):
                raise HireRewriteError(
                    f"{self._analyses.name}: raw weights whose types say how they are sharded, "
                    "inside an outer trace: pack ahead with .pack(...) and pass the Packed in "
                    "their place"
                )
            self._warn(
                "raw weights inside an outer trace: the rows and predictors are computed in the "
                "graph at every call, which is slow; pack ahead with .pack(...) and pass the "
                "Packed in place of the weights"
            )
            return analysis.pack(leaves)
        new: list[Packed] = []
        lasting = all(isinstance(leaf, jax.Array) for leaf in leaves)
        with jax.ensure_compile_time_eval() if tracing() else contextlib.nullcontext():
            analysis = self._analyses.examined(analysis, args, kwargs, leaves)
            if analysis.packing:
                hint = ", without calibration, so LowRank predictors will recall badly"
                hint = hint if analysis.wants_calibration else ""
                often = (
                    "on first sight" if lasting else "at every call, as NumPy's may change unseen"
                )
                self._warn(
                    f"raw weights are packed {often}{hint}; pack ahead with .pack(...) and "
                    "pass the Packed in place of the weights"
                )
                new = [analysis.pack(leaves, None, known if same else ())]
        made = new[0] if new else None
        if lasting:
            if not same:
                self._served.clear()
            self._seen = leaves, [*(known if same else ()), *new]
            self._served[call] = made
        return made


def traced(leaves: Iterable[Any]) -> bool:
    """Whether there is a tracer among them."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def tracing() -> bool:
    """Whether there is a trace around, without which nothing is traced: a quick answer."""
    return get_opaque_trace_state() != _NO_TRACE


with jax.core.eval_context():
    _NO_TRACE = get_opaque_trace_state()
