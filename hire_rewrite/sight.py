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
        if traced(leaves):
            return self._in_graph(leaves, args, kwargs)
        with self._analyses.lock:
            return self._remembered(leaves, args, kwargs)

    def _in_graph(
        self, leaves: tuple[Any, ...], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Packed | None:
        """`pack` of weights that are traced: nothing is remembered."""
        call = self._analyses.of(None, args, kwargs)
        call.check_decided()
        if not call.packing:
            return None
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
        return call.pack(leaves)

    def _remembered(
        self, leaves: tuple[Any, ...], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Packed | None:
        """`pack` of arrays: what was packed before, of the same weights, if it serves this call."""
        seen, known = self._seen or (None, [])
        if self._kept:
            return known[0]
        call = self._analyses.of(None, args, kwargs)
        call.check_decided()
        if seen is None or len(seen) != len(leaves) or not all(map(operator.is_, seen, leaves)):
            seen, known = None, []
        elif call in self._served:
            return self._served[call]
        if not call.packing and not call.unexamined:
            return None
        packed = next((packed for packed in known if call.served_by(packed)), None)
        lasting = all(isinstance(leaf, jax.Array) for leaf in leaves)
        if packed is None:
            packed = self._new(call, leaves, args, kwargs, known, lasting)
            known = known if packed is None else [*known, packed]
        if lasting:
            if seen is None:
                self._served.clear()
            self._seen, self._served[call] = (leaves, known), packed
        return packed

    def _new(
        self,
        call: Analysis,
        leaves: tuple[Any, ...],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        known: Sequence[Packed],
        lasting: bool,
    ) -> Packed | None:
        """What a call packs; None if a look at the numbers of the weights says that it packs none.

        Args:
          known: made of the same weights, whose sites are not packed anew.
          lasting: whether it is remembered.
        """
        with jax.ensure_compile_time_eval() if tracing() else contextlib.nullcontext():
            call = self._analyses.examined(call, args, kwargs, leaves)
            if not call.packing:
                return None
            hint = ", without calibration, so LowRank predictors will recall badly"
            hint = hint if call.wants_calibration else ""
            often = "on first sight" if lasting else "at every call, as NumPy's may change unseen"
            self._warn(
                f"raw weights are packed {often}{hint}; pack ahead with .pack(...) and "
                "pass the Packed in place of the weights"
            )
            return call.pack(leaves, None, known)


def traced(leaves: Iterable[Any]) -> bool:
    """Whether there is a tracer among them."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def tracing() -> bool:
    """Whether there is a trace around, without which nothing is traced: a quick answer."""
    return get_opaque_trace_state() != _NO_TRACE


with jax.core.eval_context():
    _NO_TRACE = get_opaque_trace_state()
