"""The one place where an equation of the traced function becomes code.

`evaluate` keeps all that an equation carries, as `jax.core.eval_jaxpr` does: the named scopes
around it, its compute type and XLA metadata, the mesh it was traced under, its effects. Inside the
code of a replaced site, names and mesh are the site's (`evaluate_inside`), and an equation may be
given a part of an array only (`evaluate_part`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core
from jax.extend import source_info_util

from hire_rewrite import _compat
from hire_rewrite.graph.nodes import Frame, Node, Value
from hire_rewrite.graph.traits import Trait, has


def evaluate(node: Node | Frame, operands: Sequence[Any]) -> list[Any]:
    """The results of an equation, or of a whole call, as the traced function has it.

    Args:
      operands: arrays for all inputs of the equation (those of numbers are not looked at).
    """
    with traced_context(node.eqn):
        return _run(node.eqn, operands)


def evaluate_inside(node: Node | Frame, operands: Sequence[Any]) -> list[Any]:
    """`evaluate` inside the code of a site: under its names and mesh, not once more its own.

    Where types say how arrays are sharded, the code of a site leaves that to the compiler.
    """
    if all(_compat.explicit_spec(value.aval) is None for value in node.outs):
        with traced_context(node.eqn, inside=True):
            return _run(node.eqn, operands)
    if isinstance(node, Node):
        return evaluate_part(node, operands)
    env = dict(zip(node.ins, operands, strict=True))
    for inner in node.nodes():
        run_node(inner, env)
    return [look_up(value, env) for value in node.outs]


def evaluate_part(node: Node, operands: Sequence[Any], **params: Any) -> list[Any]:
    """An equation on a part of its arrays: some positions of an axis, or one device's shard.

    What was said of the whole arrays is dropped: how they are sharded, and on which mesh.

    Args:
      params: parameters that are different for the part, such as its shape.
    """
    if has(node.primitive, Trait.SHARDS):
        return [_compat.varying_like(operands[0], node.outs[0].aval)]
    whole = {name: None if "sharding" in name else value for name, value in node.params.items()}
    return _bind(node.primitive, _compat.varying_alike(operands), whole | params)


def run_node(node: Node | Frame, env: dict[Value, Any]) -> None:
    """Add the results of one equation inside the code of a site to `env`."""
    results = evaluate_inside(node, [look_up(value, env) for value in node.ins])
    env.update(zip(node.outs, results, strict=True))


def look_up(value: Value, env: Mapping[Value, Any]) -> Any:
    """The array that stands for a value: a number, a closed-over array, or what `env` has."""
    if value.literal is not None:
        return literal_array(value)
    return value.const if value.const is not None else env[value]


def literal_array(value: Value) -> Any:
    """A literal as an operand, weakly typed where the jaxpr says so."""
    if getattr(value.aval, "weak_type", False):
        return np.asarray(value.literal).item()
    return jnp.asarray(value.literal, value.aval.dtype)


@contextlib.contextmanager
def traced_context(eqn: Any, *, inside: bool = False) -> Iterator[None]:
    """All that was around an equation when it was traced.

    Args:
      inside: a site is around it now, whose named scopes and mesh take the place of its own.
    """
    info, names = eqn.source_info, source_info_util.current_name_stack()
    mesh: Any = contextlib.nullcontext()
    if inside:
        mesh = jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh())
    else:
        names = names + info.name_stack
    with source_info_util.user_context(info.traceback, name_stack=names), eqn.ctx.manager, mesh:
        yield


@contextlib.contextmanager
def trial() -> Iterator[None]:
    """Around code that is run on some numbers to learn what it does: outside of the trace and the
    mesh of whoever asks, and whatever transfers it forbids."""
    no_mesh = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
    with jax.core.eval_context(), no_mesh, jax.transfer_guard("allow"):
        yield


def _run(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Bind an equation with its own parameters; its numbers are weakly typed as it has them."""
    arrays = [
        atom.val if isinstance(atom, jex_core.Literal) and not np.ndim(atom.val) else array
        for atom, array in zip(eqn.invars, operands, strict=True)
    ]
    return _bind(eqn.primitive, arrays, eqn.params)


def _bind(primitive: Any, operands: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    results = primitive.bind(*operands, **primitive.get_bind_params(params))
    return list(results) if primitive.multiple_results else [results]
