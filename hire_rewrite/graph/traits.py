"""What primitives do with their operands: the one table that every matcher reads.

A matcher asks "does it only move numbers?" or "does it order them?", never "is it one of these?". A
line teaches all of them a new primitive:

    register_traits(my_primitive, Trait.POINTWISE, slopes="+")

A primitive that is not in the table has no traits, and stops every match with its name.
"""

from __future__ import annotations

import enum
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as p

from hire_rewrite import _compat


class Trait(enum.Flag):
    """A fact about a primitive."""

    POINTWISE = enum.auto()  # makes each number of those in the same place of the operands
    LINEAR = enum.auto()  # linear in each operand
    ADDS = enum.auto()  # a sum or a difference
    CASTS = enum.auto()  # changes the type of its operand
    COMPARES = enum.auto()  # compares two operands
    BENDS = enum.auto()  # the non-linear core of an activation function
    KEEPS = enum.auto()  # returns its operands as they are
    SHARDS = enum.auto()  # changes how its operand is sharded, and nothing else
    MOVES = enum.auto()  # returns the numbers of its operand in other places
    CUTS = enum.auto()  # returns a part of its operand, or several
    EXTENDS = enum.auto()  # returns its operand and more; axes stay, and grow no shorter
    REDUCES = enum.auto()  # makes a number of all along some axes, or of each one and all before it
    ORDERS = enum.auto()  # returns the numbers along an axis by size, all or the greatest
    SEARCHES = enum.auto()  # returns where the greatest numbers along an axis are
    SCATTERS = enum.auto()  # writes to places that an operand says
    MULTIPLIES = enum.auto()  # a product of matrices
    RANDOM = enum.auto()  # makes random numbers of a key
    MERGES = enum.auto()  # makes one array, number by number, of those of several devices
    COLLECTS = enum.auto()  # joins the arrays of several devices


_table: dict[Any, tuple[Trait, str]] = {}


def register_traits(primitive: Any, traits: Trait, slopes: str = ".") -> None:
    """Add a primitive to the table, or replace what was known of it.

    Args:
      slopes: a character for each operand, the last one for all that follow: whether the result
        rises (`+`) or falls (`-`) with it while the others stay, does one of the two (`?`), or
        neither (`.`).
    """
    _table[primitive] = traits, slopes


def has(primitive: Any, traits: Trait) -> bool:
    """Whether a primitive has any of the traits."""
    return bool(_table.get(primitive, _NOTHING)[0] & traits)


def slope(primitive: Any, operand: int) -> str:
    """How the result changes with an operand: `+`, `-`, `?` or `.` (see `register_traits`)."""
    slopes = _table.get(primitive, _NOTHING)[1]
    return slopes[min(operand, len(slopes) - 1)]


def is_widening(source: Any, target: Any) -> bool:
    """Whether a cast between two floating-point types, 8 bits and less included, loses nothing."""
    if not (jnp.issubdtype(source, jnp.floating) and jnp.issubdtype(target, jnp.floating)):
        return False
    old, new = jnp.finfo(source), jnp.finfo(target)
    return bool(
        old.nmant <= new.nmant
        and old.maxexp <= new.maxexp
        and old.minexp - old.nmant >= new.minexp - new.nmant
    )


_NOTHING = Trait(0), "."
_EACH = Trait.POINTWISE
_LINEAR = Trait.POINTWISE | Trait.LINEAR
_CAST = _LINEAR | Trait.CASTS
_BEND = Trait.POINTWISE | Trait.BENDS
_SAME = Trait.POINTWISE | Trait.KEEPS
_ROWS: tuple[tuple[Any, ...], ...] = (
    (_LINEAR | Trait.ADDS, "++", p.add_p),
    (_LINEAR | Trait.ADDS, "+-", p.sub_p),
    (_LINEAR, "-", p.neg_p),
    (_LINEAR, "??", p.mul_p),
    (_LINEAR, "?.", p.div_p),
    (_EACH, ".+", p.select_n_p),
    (_CAST, "+", p.convert_element_type_p, p.reduce_precision_p),
    (_BEND, "+", p.tanh_p, p.logistic_p, p.exp_p),
    (_BEND, "+", p.max_p),
    (_BEND, ".", p.erf_p, p.erfc_p),
    (_EACH, "+", p.min_p, p.clamp_p),
    (_EACH | Trait.COMPARES, ".", p.eq_p, p.ne_p, p.lt_p, p.le_p, p.gt_p, p.ge_p),
    (_EACH, ".", p.abs_p, p.acos_p, p.acosh_p, p.and_p, p.asin_p, p.asinh_p, p.atan2_p, p.atan_p,
     p.atanh_p, p.cbrt_p, p.ceil_p, p.cos_p, p.cosh_p, p.digamma_p, p.erf_inv_p, p.exp2_p,
     p.expm1_p, p.floor_p, p.integer_pow_p, p.is_finite_p, p.lgamma_p, p.log1p_p, p.log_p,
     p.nextafter_p, p.not_p, p.or_p, p.pow_p, p.rem_p, p.round_p, p.rsqrt_p, p.shift_left_p,
     p.shift_right_arithmetic_p, p.shift_right_logical_p, p.sign_p, p.sin_p, p.sinh_p, p.sqrt_p,
     p.square_p, p.tan_p, p.xor_p),
    (_SAME, "+", p.copy_p, p.name_p, p.stop_gradient_p),
    (_SAME | Trait.SHARDS, "+", p.sharding_constraint_p, *_compat.sharding_casts),
    (Trait.KEEPS, "+", _compat.optimization_barrier_p),
    (Trait.MOVES, "+", p.transpose_p, p.reshape_p, p.squeeze_p, p.broadcast_in_dim_p),
    (Trait.CUTS, "+", p.slice_p, _compat.split_p, _compat.unstack_p),
    (Trait.CUTS, "+.", p.dynamic_slice_p),
    (Trait.EXTENDS, ".", p.concatenate_p, p.pad_p, p.rev_p, p.dynamic_update_slice_p),
    (Trait.REDUCES, ".", p.reduce_sum_p, p.reduce_prod_p, p.reduce_max_p, p.reduce_min_p,
     p.reduce_or_p, p.reduce_and_p, p.reduce_p, p.cumsum_p, p.cumprod_p, p.cummax_p, p.cummin_p,
     p.cumlogsumexp_p),
    (Trait.REDUCES | Trait.SEARCHES, ".", p.argmax_p),
    (Trait.ORDERS, ".", p.sort_p),
    (Trait.ORDERS | Trait.SEARCHES, ".", p.top_k_p, p.approx_top_k_p),
    (Trait.SCATTERS, ".", p.scatter_p, p.scatter_add_p, p.scatter_mul_p, p.scatter_max_p,
     p.scatter_min_p),
    (Trait.MULTIPLIES, ".", p.dot_general_p, p.conv_general_dilated_p,
     _compat.ragged_dot_general_p),
    (Trait.RANDOM, ".", p.random_bits_p, p.random_gamma_p, p.rng_bit_generator_p, p.rng_uniform_p,
     p.threefry2x32_p),
    (Trait.MERGES, ".", *_compat.reductions),
    (Trait.COLLECTS, ".", p.all_gather_p),
)  # fmt: skip

for _traits, _slopes, *_primitives in _ROWS:
    for _primitive in _primitives:
        register_traits(_primitive, _traits, _slopes)
