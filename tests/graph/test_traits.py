"""One table says what primitives do: a new one is taught to every matcher at once."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive

from hire_rewrite.graph.traits import Trait, has, is_widening, register_traits, slope
from hire_rewrite.ops.certify.monotone import examine
from hire_rewrite.patterns.refusal import Refusal
from tests.cases import D, T, found_in, inputs, plan_of
from tests.cases_ffn import PLAIN
from tests.cases_head import UNTIED


def primitive(name):
    bend_p = Primitive(name)
    bend_p.def_impl(lambda x: jnp.maximum(x, 0) ** 2)
    bend_p.def_abstract_eval(lambda x: x)
    return bend_p


def test_a_new_primitive_is_taught_in_one_place():
    bend_p = primitive("bend")
    block = lambda p, x: bend_p.bind(x @ p["up"]) @ p["down"]  # noqa: E731
    head = lambda p, x: bend_p.bind(x @ p["head"]).argmax(-1)  # noqa: E731
    x = inputs(T, D)

    for fn, params in ((block, PLAIN), (head, UNTIED)):
        plan = plan_of(fn, params, x)
        assert plan.sites == ()
        (rejection,) = (r for r in plan.rejected if r.name in ("p/down", "p/head"))
        assert rejection.refusal is Refusal.UNKNOWN_OPERATION
        assert "bend" in rejection.reason
    assert examine(lambda z: (bend_p.bind(z),), (2, 8), "float32").obstacle is not None

    register_traits(bend_p, Trait.POINTWISE, slopes="+")
    assert [site.activation for site in plan_of(block, PLAIN, x).sites] == ["relu2"]
    _, (found,) = found_in(head, UNTIED, x)
    assert [node.primitive for node in found.match.epilogue] == [bend_p]
    assert examine(lambda z: (bend_p.bind(z),), (2, 8), "float32").obstacle is None


def test_unknown_primitives_have_no_traits():
    unknown_p = primitive("unknown")
    assert not any(has(unknown_p, trait) for trait in Trait)
    assert slope(unknown_p, 0) == "."


def test_the_last_slope_is_that_of_all_that_follow():
    choose_p = primitive("choose")
    register_traits(choose_p, Trait.POINTWISE, slopes=".-")
    assert [slope(choose_p, i) for i in range(4)] == [".", "-", "-", "-"]


SMALL = [
    *("float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
    *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("bfloat16", "float16"),
]


@pytest.mark.parametrize("source", SMALL)
def test_widening(source):
    """A cast loses nothing if every number comes back as it was."""
    bits = jnp.finfo(source).bits
    codes = np.arange(2**bits, dtype=np.uint8 if bits <= 8 else np.uint16)
    with np.errstate(all="ignore"):
        numbers = codes.view(jnp.dtype(source)).astype(np.float64)
        numbers = numbers[np.isfinite(numbers)]
        for target in (*SMALL, "float32"):
            back = numbers.astype(jnp.dtype(target)).astype(np.float64)
            assert is_widening(source, target) == np.array_equal(back, numbers), target


def test_only_floats_widen():
    assert not is_widening("int8", "float32")
    assert not is_widening("bfloat16", "int32")
