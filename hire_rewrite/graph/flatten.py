"""Flatten a closed jaxpr to scopes, nodes and values (see `graph.nodes`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex_core
from jax.extend import source_info_util
from jax.extend.core import primitives as p
from jax.extend.source_info_util import NameStack

from hire_rewrite import _compat
from hire_rewrite.graph.calls import InlineCall, inline_call, structured_calls
from hire_rewrite.graph.nodes import Body, Frame, Node, Scope, Value


def flatten(closed: Any) -> Scope:
    """The scope of a closed jaxpr: calls inlined, loops and branches as nested scopes."""
    return _scope(closed, parent=None, length=1)


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs that an equation holds in its parameters."""
    jaxprs = []
    for param in _compat.call_params(eqn).values():
        for item in param if isinstance(param, tuple | list) else (param,):
            code = item.jaxpr if isinstance(item, jax.stages.Traced) else item
            if _compat.is_jaxpr(code):
                jaxprs.append(code)
    return jaxprs


def _scope(closed: Any, parent: Node | None, length: int | None) -> Scope:
    scope = Scope(parent=parent, length=length)
    jaxpr, consts = _compat.open_jaxpr(closed)
    scope.inputs = [Value(var.aval, scope) for var in jaxpr.invars]
    scope.outputs = _inlined(jaxpr, consts, scope.inputs, scope, scope.root)
    return scope


def _inlined(
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
        call = inline_call(eqn)
        body = call and call.body(eqn)
        if call is not None and body is not None:
            outs = _call(call, body, eqn, ins, scope, frame).outs
        else:
            outs = _node(eqn, ins, scope, frame).outs
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _node(eqn: Any, ins: tuple[Value, ...], scope: Scope, frame: Frame) -> Node:
    node = Node(len(scope.nodes), eqn, scope, frame, ins)
    node.outs = tuple(Value(var.aval, scope, node=node) for var in eqn.outvars)
    for position, value in enumerate(ins):
        value.users.append((node, position))
    scope.nodes.append(node)
    frame.entries.append(node)
    if eqn.primitive in structured_calls:
        call = structured_calls[eqn.primitive]
        node.controls = ins[: call.controls]
        node.bodies = tuple(
            Body(_scope(spec.jaxpr, node, spec.length), spec.inputs, spec.outputs)
            for spec in call.bodies(eqn, ins)
        )
    return node


def _call(
    call: InlineCall, body: Any, eqn: Any, ins: tuple[Value, ...], scope: Scope, parent: Frame
) -> Frame:
    frame = Frame(parent, eqn, ins)
    parent.entries.append(frame)

    def passed(value: Value, through: Callable[[Any], Any] | None) -> Value:
        """The value behind what a call does to an operand or a result, traced by JAX."""
        if through is None:
            return value
        info = source_info_util.user_context(eqn.source_info.traceback, name_stack=NameStack())
        with info, eqn.ctx.manager:
            traced = jax.make_jaxpr(through)(value.aval)
        return _inlined(*_compat.open_jaxpr(traced), [value], scope, frame)[0]

    inner = [passed(*pair) for pair in zip(ins, call.on_operands(eqn), strict=True)]
    results = _inlined(*_compat.open_jaxpr(body), inner, scope, frame)
    results = [passed(*pair) for pair in zip(results, call.on_results(eqn), strict=True)]
    if call.derivative:  # what it hands through would else be read as if there were no call
        results = [passed(v, p.copy_p.bind if v in ins else None) for v in results]
    frame.outs = tuple(results)
    return frame
