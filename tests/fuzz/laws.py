"""The laws that hold for every random function, and what breaks one."""

from __future__ import annotations

import collections
import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hire_rewrite as hire
from hire_rewrite.ops.encodings import Float
from tests.cases import Oracle
from tests.fuzz.contexts import CONTEXTS
from tests.fuzz.evaluate import evaluate, structure
from tests.fuzz.grammar import Graph
from tests.fuzz.nesting import LOG, expected

WIDTH = 30  # of a vocabulary, at least
FULL = (
    hire.FFN(k=1.0, candidates=1.0, predictor=Oracle(), max_tokens=None, force=True),
    hire.Head(k=1.0, candidates=1.0, predictor=Oracle(), min_width=WIDTH, force=True),
)
ALL = (*FULL, hire.Linear(encoding=Float("float32"), force=True))
FEW = (
    hire.FFN(k=4, candidates=6, group=2, predictor=Oracle(), max_tokens=None, force=True),
    hire.Head(k=4, candidates=8, predictor=Oracle(), min_width=WIDTH, force=True),
)
NOTHING = (hire.Head(path="of no site"),)

Arrays = tuple[Any, Any]
"""Weights and tokens."""


class Broken(AssertionError):  # noqa: N818 (a finding)
    """A law does not hold.

    Attributes:
      law: its name, without what is particular to a graph.
    """

    def __init__(self, law: str, about: str = "") -> None:
        super().__init__(f"{law}: {about}" if about else law)
        self.law = law


@dataclasses.dataclass
class Subject:
    """A graph with its arrays, and what is made of it once."""

    graph: Graph
    seed: int
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def __post_init__(self) -> None:
        self.arrays: Arrays = (self.graph.params(self.seed), self.graph.tokens(self.seed))
        self.before = jax.make_jaxpr(self.graph)(*self.arrays)

    def step(self, *rules: Any, mode: str = "hire") -> Any:
        return hire.transform(self.graph, *rules, mode=mode, on_miss="ignore")

    def packed(self, step: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return step.pack(*self.arrays)

    def rewritten(self, step: Any) -> tuple[Any, Any]:
        """The jaxpr of a call, and its weights."""
        weights = self.packed(step)
        return jax.make_jaxpr(step)(weights, self.arrays[1]), weights

    def dense(self) -> list[Any]:
        return evaluate(self.before, jax.tree.leaves(self.arrays))

    def result(self, step: Any) -> list[Any]:
        after, weights = self.rewritten(step)
        return evaluate(after, jax.tree.leaves((weights, self.arrays[1])))

    @property
    def tolerance(self) -> float:
        return 1e-3 if self.graph.dtype == "float32" else 0.1


_REFUSED = (
    # A `Ref` that is mapped along one axis takes no value that is mapped along another.
    "Invalid shape for `swap`",
    "Reverse-mode differentiation does not work for lax.while_loop",
    "can't apply forward-mode autodiff (jvp) to a custom_vjp function",
    "Differentiation rule for 'custom_lin' not implemented",  # of its gradient
)


def subject_of(graph: Graph, seed: int) -> Subject | None:
    """None for the few graphs that JAX itself does not trace."""
    try:
        return Subject(graph, seed)
    except (NotImplementedError, TypeError, ValueError) as error:
        if not str(error).startswith(_REFUSED):
            raise
        return None


def _sites_of(plan: Any, name: str) -> list[Any]:
    return [site for site in plan.sites if re.search(rf"\bp/{name}(?![a-z0-9])", site.name)]


def planted_are_found(subject: Subject) -> None:
    """Every planted site is found and rewritten, and no near miss is taken."""
    step = subject.step(*FULL)
    plan = step.plan(*subject.arrays)
    wanted = expected(subject.graph.steps)
    if subject.graph.logits:
        wanted["last"] = "head", False
    for name, (kind, near) in wanted.items():
        here = _sites_of(plan, name)
        if near:
            subject.counts["near misses"] += 1
            if here:
                raise Broken("a near miss is taken", f"{here[0].kind} {name}")
        else:
            subject.counts["planted"] += 1
            if {site.kind for site in here} != {kind}:
                why = [r.reason for r in plan.rejected if f"p/{name}" in r.name]
                raise Broken("what is planted is not found", f"{kind} {name}: {why}")
            if any(site.status != "rewritten" for site in here):
                raise Broken("what is planted stays dense", f"{kind} {name}: {here[0].reason}")


def same_twice(subject: Subject) -> None:
    """The same plan and the same jaxpr, in a second go."""
    steps = [subject.step(*FULL) for _ in range(2)]
    plans = [step.plan(*subject.arrays).to_json() for step in steps]
    if plans[0] != plans[1]:
        raise Broken("two plans differ")
    first, second = (structure(subject.rewritten(step)[0]) for step in steps)
    if first != second:
        raise Broken("two rewritten jaxprs differ")


def nothing_changes_without_sites(subject: Subject) -> None:
    """With a rule for no site the jaxpr comes out as it was."""
    step = subject.step(*NOTHING)
    params, x = subject.arrays
    packed = step.pack(params, x)
    if packed.sites:
        raise Broken("sites of a rule for none")
    # JAX hands over weights by path there, and in the order of the arguments here.
    paths = [jax.tree_util.keystr(path, simple=True, separator="/")
             for path, _ in jax.tree_util.tree_leaves_with_path({"p": params})]  # fmt: skip

    def again(params: Any, x: Any) -> Any:
        by_path = dict(zip(paths, jax.tree.leaves(params), strict=True))
        weights = {path: by_path[path] for path in packed.weights}
        return step(dataclasses.replace(packed, weights=weights), x)

    after = structure(jax.make_jaxpr(again)(params, x))
    if after != structure(subject.before):
        raise Broken("the jaxpr changes without sites")


def same_types(subject: Subject) -> None:
    """Shapes, dtypes and weak types are the function's, with all that can be rewritten."""
    after, _ = subject.rewritten(subject.step(*ALL))
    types = [[str(aval) for aval in closed.out_avals] for closed in (subject.before, after)]
    if types[0] != types[1]:
        raise Broken("types differ", f"{types}")


def same_numbers(rules: tuple[Any, ...], law: str) -> Callable[[Subject], None]:
    def check(subject: Subject) -> None:
        _close(subject.result(subject.step(*rules)), subject.dense(), subject.tolerance, law)

    check.__doc__ = f"{law}."
    return check


def exact_is_hire(subject: Subject) -> None:
    """Mode "exact" on raw weights is mode "hire" where nothing is missed."""
    rules = tuple(rule for rule in FEW if isinstance(rule, hire.FFN))
    exact = jax.make_jaxpr(subject.step(*rules, mode="exact"))(*subject.arrays)
    want = evaluate(exact, jax.tree.leaves(subject.arrays))
    got = subject.result(subject.step(*rules))
    _close(got, want, subject.tolerance, 'modes "hire" and "exact" differ')


def tokens_are_apart(subject: Subject) -> None:
    """A token's results are the same, whatever the others are."""
    step = subject.step(*FEW)
    after, weights = subject.rewritten(step)
    x = subject.arrays[1]
    other = x.at[1:].set(jnp.flip(x[1:], -1) * 2)
    results = [evaluate(after, jax.tree.leaves((weights, tokens))) for tokens in (x, other)]
    first = [[result[0] for result in many] for many in results]
    _close(*first, subject.tolerance, "a token depends on others")


def effects_in_order(subject: Subject) -> None:
    """Effects happen once, the ordered ones in order, and see the same numbers."""
    params, x = subject.arrays
    step = subject.step(*ALL)
    weights = subject.packed(step)
    logs = []
    for fn, args in ((jax.jit(subject.graph), (params, x)), (jax.jit(step), (weights, x))):
        LOG.clear()
        jax.block_until_ready(fn(*args))
        jax.effects_barrier()
        logs.append(([e for e in LOG if e[1]], sorted(e for e in LOG if not e[1])))
    for want, got in zip(*logs, strict=True):
        if [entry[0] for entry in want] != [entry[0] for entry in got]:
            raise Broken("effects differ", f"{[e[0] for e in want]}, {[e[0] for e in got]}")
        numbers = [[entry[2] for entry in log] for log in (got, want)]
        _close([np.asarray(numbers[0])], [np.asarray(numbers[1])], 10 * subject.tolerance,
               "effects see other numbers")  # fmt: skip


def same_under(name: str) -> Callable[[Subject], None]:
    """The compiled functions agree in a context: packed outside of it, and inside."""

    def check(subject: Subject) -> None:
        params, x = subject.arrays
        step, jitted = subject.step(*ALL), jax.jit(subject.graph)
        outside = subject.packed(step)
        with CONTEXTS[name]():
            try:
                want = jitted(params, x)
            except Exception as error:
                try:
                    jax.block_until_ready(step(outside, x))
                except (type(error), hire.HireRewriteError):
                    return
                raise Broken("only the function itself raises", name) from error
            # Packing brings constants to the device, as all code does that is not compiled.
            inside = outside if "transfers" in name else subject.packed(step)
            for weights in (outside, inside):
                got = step(weights, x)
                _close(jax.tree.leaves(got), jax.tree.leaves(want), 20 * subject.tolerance,
                       f"another result under {name}")  # fmt: skip

    return check


def _close(got: list[Any], want: list[Any], tolerance: float, law: str) -> None:
    for a, b in zip(got, want, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise Broken(law, f"{a.dtype}{a.shape}, not {b.dtype}{b.shape}")
        x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
        # Masked logits are a billion below others.
        limit = tolerance * max(1.0, np.abs(y[np.abs(y) < 1e6]).max(initial=0.0))
        if not np.allclose(x, y, rtol=tolerance, atol=limit, equal_nan=True):
            raise Broken(law, f"by {np.abs(x - y).max()}")


Law = Callable[[Subject], None]

FOUND: dict[str, Law] = {"planted sites are found, near misses are not": planted_are_found}
"""The law for which nothing is packed."""

TRACED: dict[str, Law] = {
    "types are the function's": same_types,
    "nothing changes without sites": nothing_changes_without_sites,
    "a second plan and a second jaxpr are the first": same_twice,
}
"""Laws for which nothing runs."""

EXECUTED: dict[str, Law] = {
    "the numbers are the same at full budget": same_numbers(ALL, "other numbers at full budget"),
    "the numbers are the same without rules": same_numbers((), "other numbers without rules"),
    'modes "exact" and "hire" agree': exact_is_hire,
    "tokens are independent": tokens_are_apart,
    "effects happen once and in order": effects_in_order,
    **{f"the same under {name}": same_under(name) for name in CONTEXTS},
}
"""Laws for which the function and what becomes of it run."""


def holds_for(law: str, graph: Graph) -> bool:
    """Whether a law says anything of a graph."""
    if law == "tokens are independent":
        return graph.tokenwise
    if law == "effects happen once and in order":
        return graph.has_effects
    return True


def broken(graph: Graph, seed: int, laws: dict[str, Law]) -> Iterator[tuple[str, str]]:
    """The laws that a graph breaks, each with what happened; none if JAX refuses the graph."""
    subject = subject_of(graph, seed)
    if subject is None:
        return
    for name, law in laws.items():
        if not holds_for(name, graph):
            continue
        try:
            law(subject)
        except Broken as error:
            yield name, str(error)
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}"
