"""Jaxprs, run without compiling them, and their structure without names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from hire_rewrite import _compat

_CALLS = {
    "jit": "jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr", "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "core_call": "call_jaxpr",
}  # fmt: skip


def evaluate(closed: Any, args: Sequence[Any]) -> list[Any]:
    """The results of a jaxpr, one operation at a time: small ones are compiled once for all.

    Loops, branches and calls run in Python; what holds references or a mesh is compiled whole.
    """
    jaxpr, consts = _compat.open_jaxpr(closed)
    if _needs_jit(jaxpr):
        return list(jax.jit(jex_core.jaxpr_as_fun(closed))(*args))
    return _run(jaxpr, consts, args)


def _needs_jit(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name == "shard_map"
        or any(_compat.is_ref(var.aval) for var in eqn.outvars)
        or any(_needs_jit(_compat.open_jaxpr(inner)[0]) for inner in _jaxprs(eqn))
        for eqn in jaxpr.eqns
    )


def _jaxprs(eqn: Any) -> list[Any]:
    leaves = jax.tree.leaves(list(eqn.params.values()), is_leaf=_compat.is_jaxpr)
    return [leaf for leaf in leaves if _compat.is_jaxpr(leaf)]


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if _literal(atom) else env[atom]

    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, _equation(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [_array(read(var), var.aval) for var in jaxpr.outvars]


def _array(value: Any, aval: Any) -> Any:
    return value if isinstance(value, jax.Array) else jnp.asarray(value, aval.dtype)


def _call(closed: Any, args: Sequence[Any]) -> list[Any]:
    jaxpr, consts = _compat.open_jaxpr(closed)
    return _run(jaxpr, consts, args)


def _equation(eqn: Any, ins: list[Any]) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    if name in _CALLS and _CALLS[name] in params:
        return _call(params[_CALLS[name]], ins)
    if name == "cond":
        branches = params["branches"]
        return _call(branches[int(np.clip(int(ins[0]), 0, len(branches) - 1))], ins[1:])
    if name == "while":
        nc, nb = params["cond_nconsts"], params["body_nconsts"]
        carry = ins[nc + nb :]
        while bool(_call(params["cond_jaxpr"], [*ins[:nc], *carry])[0]):
            carry = _call(params["body_jaxpr"], [*ins[nc : nc + nb], *carry])
        return carry
    if name == "scan":
        return _scan(eqn, ins)
    results = eqn.primitive.bind(*ins, **eqn.primitive.get_bind_params(params))
    return list(results) if eqn.primitive.multiple_results else [results]


def _scan(eqn: Any, ins: list[Any]) -> list[Any]:
    params = eqn.params
    consts, carried = _compat.scan_split(params)
    carry, slices = ins[consts : consts + carried], ins[consts + carried :]
    order = range(params["length"])
    rows = []
    for i in reversed(order) if params["reverse"] else order:
        outs = _call(params["jaxpr"], [*ins[:consts], *carry, *(xs[i] for xs in slices)])
        carry = outs[:carried]
        rows.append(outs[carried:])
    if params["reverse"]:
        rows.reverse()
    return [*carry, *(jnp.stack(ys) for ys in zip(*rows, strict=True))]


def structure(closed: Any) -> list[str]:
    """The equations of a jaxpr that are of use, a line each, with numbers for names.

    Calls that only return their operands are none.
    """
    jaxpr, consts = _compat.open_jaxpr(closed)
    lines: list[str] = []
    names: dict[Any, str] = {}

    same: dict[Any, Any] = {}
    for eqn in filter(_hands_through, jaxpr.eqns):
        body = _compat.open_jaxpr(eqn.params[_CALLS[eqn.primitive.name]])[0]
        inside = dict(zip(body.invars, eqn.invars, strict=True))
        for out, result in zip(eqn.outvars, body.outvars, strict=True):
            given = inside.get(result, result) if not _literal(result) else result
            same[out] = given if _literal(given) else same.get(given, given)
    equations = [eqn for eqn in jaxpr.eqns if not _hands_through(eqn)]

    def resolved(atoms: Sequence[Any]) -> list[Any]:
        return [atom if _literal(atom) else same.get(atom, atom) for atom in atoms]

    def name(atom: Any) -> str:
        if _literal(atom):
            return f"{atom.val}:{atom.aval.str_short()}{getattr(atom.aval, 'weak_type', '')}"
        return names.setdefault(atom, f"v{len(names)}")

    for var, const in zip(jaxpr.constvars, consts, strict=True):
        names[var] = f"const({_plain(const)})"
    for var in jaxpr.invars:
        name(var)
    live = {var for var in resolved(jaxpr.outvars) if not _literal(var)}
    kept = []
    for eqn in reversed(equations):
        if eqn.effects or any(var in live for var in eqn.outvars):
            kept.append(eqn)
            live.update(v for v in resolved(eqn.invars) if not _literal(v))
    for eqn in reversed(kept):
        ins = " ".join(map(name, resolved(eqn.invars)))
        outs = " ".join(
            f"{name(v)}:{v.aval.str_short()}" if v in live else "_" for v in eqn.outvars
        )
        told = " ".join(f"{k}={_plain(v)}" for k, v in sorted(_params(eqn).items()))
        lines.append(f"{outs} = {eqn.primitive.name}[{told}] {ins}")
        for inner in _jaxprs(eqn):
            lines += ["  " + line for line in structure(inner)]
    lines.append("return " + " ".join(map(name, resolved(jaxpr.outvars))))
    return lines


def _params(eqn: Any) -> dict[str, Any]:
    """An equation's own, as they are after `jax.core.eval_jaxpr`: that makes operands of what a
    `custom_vjp` closes over."""
    return eqn.params | ({"num_consts": 0} if eqn.primitive.name == "custom_vjp_call" else {})


def _literal(atom: Any) -> bool:
    return isinstance(atom, jex_core.Literal)


def _hands_through(eqn: Any) -> bool:
    """Whether an equation is a call that returns its operands."""
    jaxpr = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
    return jaxpr is not None and not _compat.open_jaxpr(jaxpr)[0].eqns


def _plain(value: Any) -> str:
    """A parameter as text that says no addresses."""
    if _compat.is_jaxpr(value):
        return "{}"
    if isinstance(value, jax.Array | np.ndarray):
        data = np.asarray(value)
        digest = hashlib.sha256(data.tobytes()).hexdigest()[:12]
        return f"{data.dtype}{list(data.shape)}#{digest}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(_plain, value)) + ")"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str | int | float | bool | type(None) | np.generic | np.dtype):
        return str(value)
    if hasattr(value, "call_wrapped"):  # a function, of whatever JAX has wrapped around it
        return type(value).__name__
    text = str(value)
    return type(value).__name__ if " at 0x" in text or "<" in text else text
