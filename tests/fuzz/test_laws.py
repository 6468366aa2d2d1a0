"""The laws of `laws`, for random functions; `make fuzz` tries many more.

What only traces is done for many, what runs for a few. A failure prints the function that
hypothesis found to be the smallest.
"""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.grammar import random_graph
from tests.fuzz.laws import EXECUTED, FOUND, TRACED, broken, subject_of
from tests.fuzz.nesting import FORMS

PARTS = 8


def _holds(laws, graphs, part, chosen=lambda rng: None):
    """Laws hold for so many random graphs; `chosen` takes some of them for each."""

    @seed(part)
    @settings(
        max_examples=graphs, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.randoms(use_true_random=False), st.integers(0, 999))
    def check(rng, numbers):
        graph = random_graph(rng)
        names = chosen(rng) or laws
        found = list(broken(graph, numbers, {name: laws[name] for name in names}))
        assert not found, f"{found} in\n{graph}"

    check()


@pytest.mark.parametrize("part", range(PARTS))
def test_what_is_planted_is_found(part):
    _holds(FOUND, 250, part)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("part", range(PARTS))
def test_laws_that_need_no_numbers(part):
    _holds(TRACED, 4, part)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("part", range(PARTS))
def test_laws_of_numbers(part):
    def two(rng):
        return [rng.choice(sorted(EXECUTED)) for _ in range(2)]

    _holds(EXECUTED, 2, part, two)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("form", FORMS)
def test_a_block_in_every_nest(form):
    """Whatever chance does: each form, with a block and a head in it."""
    from tests.fuzz.grammar import Ffn, Graph, Head
    from tests.fuzz.nesting import Nest

    graph = Graph((Nest(form, (Ffn("a", "silu", "gate first"), Head("b"))),))
    laws = FOUND | TRACED
    assert not list(broken(graph, 1, laws))


def test_a_seed_is_a_graph():
    graphs = [random_graph(random.Random(5)) for _ in range(2)]
    assert graphs[0] == graphs[1]


def test_what_a_custom_derivative_closes_over_is_an_operand():
    """As JAX's own `eval_jaxpr` makes it: found by seed 69880."""
    from tests.fuzz.grammar import Ffn, Graph
    from tests.fuzz.nesting import Nest

    inner = Nest("scan stacking", (Ffn("a", "silu", "gate first"),))
    graph = Graph((Nest("custom_vjp", (inner,)),))
    if os.environ.get("JAX_CUSTOM_VJP3") != "1":  # jax's next one does not count them
        assert any(eqn.params.get("num_consts") for eqn in subject_of(graph, 1).before.eqns)
    assert not list(broken(graph, 1, FOUND | TRACED))
