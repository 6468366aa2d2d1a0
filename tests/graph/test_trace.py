"""Tracing names every input as a user would, and refuses what is not an array."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_rewrite import HireRewriteError
from hire_rewrite.graph.trace import abstract, trace
from tests.cases import inputs

X = inputs(3, 4)


def paths(fn, *args, weights=(0,), **kwargs):
    return trace(fn, args, kwargs, weights).paths


def test_paths():
    params = {"layers": [{"w": X}, {"w": X}], "embed": X}
    fn = lambda params, token, *, scale: params["embed"] * scale  # noqa: E731
    found = paths(fn, params, X, scale=2.0)
    assert found == ("params/embed", "params/layers/0/w", "params/layers/1/w", "token", "scale")


def test_paths_of_unnamed_arguments():
    assert paths(lambda *args: args[1], X, X) == ("arg0", "arg1")
    assert paths(lambda a, *args: a, X, X, X) == ("a", "arg1", "arg2")
    assert paths(functools.partial(lambda config, params, x: x, 3), X, X) == ("params", "x")
    assert paths(jnp.add, X, X, weights=())[0] in ("x", "arg0")


def test_weights_are_inputs_by_number():
    fn = lambda x, a, b: x  # noqa: E731
    traced = trace(fn, (X, {"w": X, "v": X}, [X]), {}, (1, 2))
    assert traced.weights == (1, 2, 3)
    assert [traced.paths[i] for i in traced.weights] == ["a/v", "a/w", "b/0"]
    assert [traced.provenance.is_weight(value) for value in traced.scope.inputs] == [
        False,
        True,
        True,
        True,
    ]


def test_shapes_stand_for_arrays():
    arrays = ({"w": X}, np.float32(2), 3, 1.0)
    specs = jax.tree.map(abstract, arrays)
    fn = lambda p, a, b, c: p["w"] * a + b * c  # noqa: E731
    one, other = trace(fn, arrays, {}, (0,)), trace(fn, specs, {}, (0,))
    assert str(one.closed) == str(other.closed)
    assert [spec.weak_type for spec in jax.tree.leaves(specs)] == [False, False, True, True]


def test_structure_of_the_results():
    traced = trace(lambda x: {"a": (x, None), "b": [x, 2]}, (X,), {}, (0,))
    assert traced.out_tree == jax.tree.structure({"a": (0, None), "b": [0, 0]})
    assert len(traced.scope.outputs) == 3


@pytest.mark.parametrize(
    ("args", "path"),
    [(({"name": "adam", "w": X},), "params/name"), ((X, object()), "x")],
)
def test_an_argument_that_is_no_array(args, path):
    with pytest.raises(HireRewriteError, match=f"argument {path} is a .*close over it"):
        trace(lambda params, x=None: params, args, {}, (0,))


def test_a_result_that_is_no_array():
    with pytest.raises(HireRewriteError, match="Return arrays"):
        trace(lambda x: (x, "done"), (X,), {}, (0,))


def test_errors_of_the_function_are_its_own():
    with pytest.raises(TypeError, match="dot_general"):
        trace(lambda w, x: w @ x, (X, X), {}, (0,))


def test_closed_arrays_are_named_by_shape():
    traced = trace(lambda x: x @ jnp.asarray(np.ones((4, 2))), (X,), {}, ())
    values = [v for node in traced.scope.nodes for v in node.ins if v.const is not None]
    assert {traced.path(value) for value in values} == {"closure[4×2]"}
