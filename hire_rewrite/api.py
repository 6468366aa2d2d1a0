"""The front door: `transform`, `inspect` and `diff`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Never

import jax
from jax.sharding import Mesh

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.passes.diff import Diff, compare_functions
from hire_rewrite.passes.modes import MODES
from hire_rewrite.plan import Plan
from hire_rewrite.rules import Rule
from hire_rewrite.settings import is_iterable
from hire_rewrite.sites import site_kinds
from hire_rewrite.transformed import Transformed

_ON_MISS = ("ignore", "warn", "raise")


def transform(
    fn: Any = None,
    *rules: Rule,
    weights: int | Sequence[int] = 0,
    mesh: Mesh | None = None,
    mode: str = "hire",
    on_miss: str = "warn",
    telemetry: bool | float = False,
    **others: Never,
) -> Any:
    """Rewrite the vocabulary heads, FFN blocks and other linear layers of a JAX function.

    Works on a function (`transform(step, Head())`), as a decorator (`@transform`) and as a
    decorator with arguments (`@transform(Head(), weights=1)`).

    Args:
      fn: any function of arrays that JAX can trace.
      rules: what to rewrite and how; the first that fits a site decides. Without any, what does
        not change the model: the same numbers in fewer bits, for every layer that they fit;
        `Head()` for other heads; FFN blocks that keep the greatest of their gates, by their own k,
        and those behind a ReLU without what it makes zero, where that pays.
      weights: the positions of the arguments that hold weights, as `argnums` in `jax.grad`.
        Arrays that `fn` closes over are weights too; `()` if there are no others.
      mesh: shard the rows of sites over all devices of this mesh, where their weights are not
        sharded over one already. (How weights lie on a mesh is read from the arrays, or from the
        shardings of shapes.)
      mode: `"hire"` predicts and gathers; `"exact"` has the same meaning (the same top-k) in dense
        arithmetic on the weights as they are, and is differentiable (inside a `jit` of your own
        nobody knows how weights lie on a mesh: give `FFN(parts=...)`); `"dense"` is the original.
      on_miss: what to do when a rule fits no site or rewrites none of its sites, or without rules
        nothing is rewritten: `"warn"` (once, a `HireRewriteWarning`), `"raise"` or `"ignore"`.
      telemetry: whether calls return a pair, the result of `fn` and a `Telemetry`: counters of
        what each packed site read, to be added up and watched while it serves. A number between 0
        and 1 is the share of a site's runs in which its recall is measured too, beside all rows.

    Returns:
      A `Transformed`, called like `fn` with a `Packed` in place of the weights.

    Raises:
      HireRewriteError: an argument is out of its range, or there is no argument of this name.
    """
    if others:
        name = next(iter(others))
        raise HireRewriteError(
            f"transform: there is no argument {name}=: "
            + (
                "rules are given one by one after the function, transform(fn, *rules)"
                if name in ("rule", "rules")
                else "its settings are weights=, mesh=, mode=, on_miss= and telemetry="
            )
        )
    if fn is None or isinstance(fn, Rule):
        given = rules if fn is None else (fn, *rules)
        for other in rules if fn is not None else ():
            if callable(other) and not isinstance(other, Rule):
                name = getattr(other, "__name__", repr(other))
                raise HireRewriteError(
                    f"transform: the function comes first: transform({name}, *rules), and not "
                    f"transform({fn!r}, {name})"
                )
        return functools.partial(
            _transform, rules=given, weights=weights, mesh=mesh, mode=mode, on_miss=on_miss,
            telemetry=telemetry,
        )  # fmt: skip
    return _transform(fn, rules, weights, mesh, mode, on_miss, telemetry)


def _transform(
    fn: Callable[..., Any],
    rules: tuple[Rule, ...],
    weights: int | Sequence[int],
    mesh: Mesh | None,
    mode: str,
    on_miss: str,
    telemetry: bool | float,
) -> Transformed:
    _check_callable("transform", fn)
    if isinstance(fn, Transformed):
        raise HireRewriteError(
            f"transform: {fn.name} is transformed already: give all rules in one call of "
            f"transform, or transform its original, {fn.name}.fn"
        )
    for rule in rules:
        if isinstance(rule, list | tuple):
            raise HireRewriteError(
                f"transform: {rule!r} is a {type(rule).__name__} of rules: unpack it, "
                "transform(fn, *rules)"
            )
        if not isinstance(rule, tuple(kind.rule for kind in site_kinds())):
            known = " or ".join(f"{kind.rule.__name__}(...)" for kind in site_kinds())
            raise HireRewriteError(
                f"transform: {rule!r} is not a rule: give {known} (`register_kind` adds others)"
            )
    if not isinstance(mode, str) or mode not in MODES:
        raise HireRewriteError(f"transform: mode={mode!r} must be one of {', '.join(MODES)}")
    if not isinstance(on_miss, str) or on_miss not in _ON_MISS:
        raise HireRewriteError(
            f"transform: on_miss={on_miss!r} must be one of {', '.join(_ON_MISS)}"
        )
    positions = tuple(weights) if isinstance(weights, list | tuple) else (weights,)
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in positions):
        raise HireRewriteError(
            f"transform: weights={weights!r} must be positions of arguments, counted from 0"
        )
    if mesh is not None and not isinstance(mesh, Mesh):
        raise HireRewriteError(
            f"transform: mesh={mesh!r} is not a jax.sharding.Mesh: give one, or None"
        )
    if not isinstance(telemetry, bool) and not (
        isinstance(telemetry, float | int) and 0 < telemetry <= 1
    ):
        raise HireRewriteError(
            f"transform: telemetry={telemetry!r} must be True, False or a share between 0 and 1"
        )
    positions = tuple(sorted(set(positions)))
    return Transformed(fn, rules, positions, mesh, MODES[mode], on_miss, telemetry)


def inspect(
    fn: Callable[..., Any],
    /,
    *args: Any,
    rules: Rule | Iterable[Rule] = (),
    weights: int | Sequence[int] = 0,
    **kwargs: Any,
) -> Plan:
    """The plan for a function: its sites, its other linear layers, and why each is what it is.

    Args:
      args, kwargs: a call's arguments: arrays, or `jax.ShapeDtypeStruct`s (nothing is computed).
        Those that are called `rules` or `weights` are given by their position.
      rules: several, or one.
      weights: as in `transform`.
    """
    _check_callable("inspect", fn)
    given = _several("inspect", rules)
    return transform(fn, *given, weights=weights, on_miss="ignore").plan(*args, **kwargs)


def diff(
    fn: Callable[..., Any],
    /,
    *args: Any,
    rules: Rule | Iterable[Rule] = (),
    weights: int | Sequence[int] = 0,
    **kwargs: Any,
) -> Diff:
    """What differs between two functions, or a function before and after rewriting.

    `diff(f, g, *args)` compares any two functions of the same arguments, by what their equations
    compute and what they read. `diff(f, *args)` compares `f` with what `transform` makes of it;
    rules may stand before the arguments too: `diff(f, Head(k=64), *args)`.

    Examples:
      >>> import jax.numpy as jnp, hire_rewrite as hire
      >>> changes = hire.diff(jnp.sin, lambda x: jnp.sin(x) + 1, jnp.ones(3))
      >>> changes.regions[0].after[0].primitive
      'add'
      >>> hire.diff(jnp.sin, jnp.sin, jnp.ones(3)).changed
      False

    Args:
      args: the second function, if there is one: a callable that is not a pytree of arrays; then
        a call's arguments, as in `inspect`.
      rules: several, or one; not for two functions.
      weights: as in `transform`; not for two functions.
      kwargs: the call's keyword arguments.

    Raises:
      HireRewriteError: rules are given for two functions, or one of them cannot be traced.
    """
    _check_callable("diff", fn)
    rules = _several("diff", rules)
    while args and isinstance(args[0], Rule):
        rules, args = (*rules, args[0]), args[1:]
    if args and callable(args[0]) and jax.tree.leaves(args[0]) == [args[0]]:
        if rules:
            raise HireRewriteError(
                "diff: rules are for one function: give diff(fn, *args, rules=...), or compare "
                "with transform(fn, *rules)"
            )
        return compare_functions(fn, args[0], args[1:], kwargs)
    return transform(fn, *rules, weights=weights).diff(*args, **kwargs)


def _check_callable(name: str, fn: Any) -> None:
    """Raise HireRewriteError if what is given to a function of this name is not a function."""
    if not callable(fn):
        raise HireRewriteError(f"{name}: {fn!r} is not callable: give the function first")


def _several(name: str, rules: Rule | Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules that are given to a function of this name, which may be a single one."""
    if isinstance(rules, Rule):
        return (rules,)
    if not is_iterable(rules):
        raise HireRewriteError(f"{name}: rules={rules!r}: give a rule, or a list of rules")
    return tuple(rules)
