"""Build the flattened view of a closed jaxpr (see `graph.nodes`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend import core as jex_core

from hire_rewrite import _compat
from hire_rewrite.graph.calls import inline_calls, structured_calls
from hire_rewrite.graph.nodes import Body, Frame, Node, Scope, Value, is_drop
from hire_rewrite.patterns.axes import rerun
from hire_rewrite.patterns.region import literal_array

__all__ = ["evaluate", "flatten", "inner_jaxprs", "look_up", "run_node", "run_untyped"]

_EMPTY = _compat.open_jaxpr(jax.make_jaxpr(lambda: ())())[0]


def flatten(closed: Any) -> Scope:
    """The scope of a closed jaxpr: calls spread out, loops and branches as nested scopes."""
    return _scope(closed, parent=None, length=1)


def look_up(value: Value, env: Mapping[Value, Any]) -> Any:
    """The array that stands for a value: a number, a closed-over array, or what `env` has."""
    if value.literal is not None:
        return literal_array(value)
    return value.const if value.const is not None else env[value]


def evaluate(node: Node | Frame, operands: Sequence[Any]) -> list[Any]:
    """Run one equation on arrays as the jaxpr has it; `operands` for all its inputs."""
    eqn = node.eqn
    bound = {
        atom: array
        for atom, array in zip(eqn.invars, operands, strict=True)
        if not isinstance(atom, jex_core.Literal)
    }
    kept = [var for var in eqn.outvars if not is_drop(var)]
    one = _EMPTY.replace(invars=list(bound), outvars=kept, eqns=[eqn], effects=eqn.effects)
    results = iter(jax.core.eval_jaxpr(one, (), *bound.values()))
    return [None if is_drop(var) else next(results) for var in eqn.outvars]


def run_untyped(node: Node | Frame, operands: Sequence[Any]) -> Sequence[Any]:
    """`evaluate`, without what types say of how arrays are spread: the compiler may choose."""
    if all(_compat.explicit_spec(value.aval) is None for value in node.outs):
        return evaluate(node, operands)
    if isinstance(node, Node):
        return rerun(node, operands)
    env = dict(zip(node.ins, operands, strict=True))
    for inner in node.nodes():
        run_node(inner, env)
    return [look_up(value, env) for value in node.outs]


def run_node(node: Node | Frame, env: dict[Value, Any]) -> None:
    """Add the results of one equation to `env`; see `run_untyped`."""
    results = run_untyped(node, [look_up(value, env) for value in node.ins])
    env.update(zip(node.outs, results, strict=True))


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs that an equation holds in its parameters."""
    found = []
    for param in eqn.params.values():
        for item in param if isinstance(param, tuple | list) else (param,):
            if _compat.is_jaxpr(item):
                found.append(item)
    return found


def _scope(closed: Any, parent: Node | None, length: int | None) -> Scope:
    scope = Scope(parent=parent, length=length)
    jaxpr, consts = _compat.open_jaxpr(closed)
    scope.inputs = [Value(var.aval, scope) for var in jaxpr.invars]
    scope.outputs = _spread(jaxpr, consts, scope.inputs, scope, scope.root)
    return scope


def _spread(
    jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value], scope: Scope, frame: Frame
) -> list[Value]:
    """Append the equations of `jaxpr` to the scope; the values of its results."""
    env: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        env[var] = Value(var.aval, scope, const=const)

    def read(atom: Any) -> Value:
        if not isinstance(atom, jex_core.Literal):
            return env[atom]
        if getattr(atom.aval, "shape", ()):  # an array that was closed over, not a number
            return Value(atom.aval, scope, const=atom.val)
        return Value(atom.aval, scope, literal=atom.val)

    for eqn in jaxpr.eqns:
        ins = tuple(map(read, eqn.invars))
        if eqn.primitive in inline_calls:
            call = Frame(frame, eqn, ins)
            frame.entries.append(call)
            body, body_consts = _compat.open_jaxpr(inline_calls[eqn.primitive].body(eqn))
            call.outs = tuple(_spread(body, body_consts, ins, scope, call))
            env.update(zip(eqn.outvars, call.outs, strict=True))
            continue
        node = Node(len(scope.nodes), eqn, scope, frame, ins)
        node.outs = tuple(Value(var.aval, scope, node=node) for var in eqn.outvars)
        for position, value in enumerate(ins):
            value.users.append((node, position))
        env.update(zip(eqn.outvars, node.outs, strict=True))
        scope.nodes.append(node)
        frame.entries.append(node)
        if eqn.primitive in structured_calls:
            call_like = structured_calls[eqn.primitive]
            node.controls = ins[: call_like.controls]
            specs = call_like.bodies(eqn, ins)
            node.bodies = tuple(
                Body(_scope(spec.jaxpr, node, spec.length), spec.inputs, spec.outputs)
                for spec in specs
            )
    return [read(atom) for atom in jaxpr.outvars]
