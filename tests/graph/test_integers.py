"""Bounds of integers hold for all numbers within those that they are made of."""

import itertools

import numpy as np
import pytest
from jax.extend.core import primitives as p

from hire_rewrite.graph.integers import result_bounds

RANGES = [(0, 0), (0, 1), (0, 5), (3, 6), (1, 2), (-3, 2), (-5, -1), (-2, 0)]
BITS = [p.and_p, p.or_p, p.xor_p, p.shift_right_logical_p, p.shift_right_arithmetic_p]
ARITHMETIC = [p.add_p, p.sub_p, p.mul_p, p.max_p, p.min_p, p.div_p, p.rem_p]


@pytest.mark.parametrize("primitive", [p.abs_p, p.neg_p, p.sign_p, *ARITHMETIC, *BITS])
def test_results_are_within_their_bounds(primitive):
    one = primitive in (p.abs_p, p.neg_p, p.sign_p)
    told = 0
    for ins in itertools.product(RANGES, repeat=1 if one else 2):
        bounds = result_bounds(primitive, ins)
        if bounds is None:
            continue
        told += 1
        grid = np.meshgrid(*(np.arange(low, high + 1, dtype=np.int32) for low, high in ins))
        results = np.asarray(primitive.bind(*grid))
        assert bounds[0] <= results.min()
        assert results.max() <= bounds[1]
    assert told >= (len(RANGES) if one else 24)
    assert primitive not in BITS or result_bounds(primitive, [(-1, 2), (0, 1)]) is None


@pytest.mark.parametrize("primitive", [p.shift_right_logical_p, p.shift_right_arithmetic_p])
def test_shifts_beyond_all_bits(primitive):
    assert result_bounds(primitive, [(0, 7), (0, 2**62)]) == (0, 7)
    assert result_bounds(primitive, [(5, 7), (200, 2**62)]) == (0, 0)
