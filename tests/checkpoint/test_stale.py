"""Packs that do not belong to a call: of another model, old, or restored in part."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hire_rewrite as hire
from hire_rewrite.fingerprint import fingerprint
from tests.cases import inputs, rand

D, F = 32, 64
X = inputs(2, D)
RULE = hire.Linear(encoding=hire.Blocks(8), force=True)
PARAMS = {"up": rand(D, F), "down": rand(F, D), "norm": inputs(D)}


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"] * params["norm"]


@pytest.fixture(scope="module")
def step():
    return hire.transform(model, RULE)


@pytest.fixture(scope="module")
def packed(step):
    return step.pack(PARAMS, X)


@pytest.fixture(scope="module")
def file(packed, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "p.safetensors"
    packed.save(path)
    return path


def deeper(params, x):
    return model(params, jnp.tanh(x @ params["more"]))


def turned(params, x):
    return model({**params, "up": params["down"].T}, x)


MORE = {**PARAMS, "more": rand(D, D)}
SHAPES = jax.eval_shape(lambda: PARAMS)


OTHER = {name: -w for name, w in PARAMS.items()}


@pytest.mark.parametrize("kind", ["tree.map", "arrays", "half", "orbax", "saved"])
def test_arrays_of_another_pack_are_not_those_of_its_weights(step, packed, kind, tmp_path):
    """The structure tells what it was made of, the arrays are others."""
    other = step.pack(OTHER, X)
    if kind == "orbax":
        ocp = pytest.importorskip("orbax.checkpoint")
        with ocp.StandardCheckpointer() as saver:
            saver.save(tmp_path / "there", other)
        with ocp.StandardCheckpointer() as saver:
            mixed = saver.restore(tmp_path / "there", packed)
    elif kind == "arrays":
        mixed = packed.with_arrays(other.arrays)
    elif kind == "half":
        arrays = dict(list(packed.arrays.items())[:1] + list(other.arrays.items())[1:])
        mixed = packed.with_arrays(arrays)
    else:
        mixed = jax.tree.map(lambda _, array: array, packed, other)
    if kind == "saved":
        mixed.save(tmp_path / "mixed.safetensors")
        mixed = hire.Packed.load(tmp_path / "mixed.safetensors", step)
    if kind != "half":
        np.testing.assert_allclose(step(mixed, X), step(other, X), atol=1e-6)
    for weights in (PARAMS, OTHER):
        with pytest.raises(hire.HireRewriteError, match="does not know the numbers"):
            mixed.check(weights)
    jax.tree.map(jnp.copy, packed).check(PARAMS)
    packed.with_arrays({name: np.asarray(a) for name, a in packed.arrays.items()}).check(PARAMS)


@pytest.mark.parametrize(
    ("fn", "rules", "args", "said"),
    [
        (deeper, (RULE,), (), "another function"),
        (deeper, (RULE,), (MORE, X), "other weights"),
        (turned, (RULE,), (), "another function"),
        (lambda params, x: x @ params["up"], (RULE,), (), "another function"),
        (model, (RULE.replace(encoding=hire.Blocks(4)),), (), "pack again"),
        (model, (RULE,), ({**PARAMS, "norm": inputs(2, D)}, X), "norm was float32"),
        (model, (RULE,), (jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS), X), "bfloat16"),
        (model, (RULE,), ({**PARAMS, "norms": PARAMS["norm"]}, X), "other weights"),
        (model, (hire.Linear(path="up", encoding=hire.Blocks(8), force=True),), (), "lacks"),
    ],
)
def test_a_pack_of_another_function_is_not_loaded(file, fn, rules, args, said):
    with pytest.raises(hire.HireRewriteError, match=said):
        hire.Packed.load(file, hire.transform(fn, *rules), *args)


def test_nor_for_more_weight_arguments(file):
    step = hire.transform(lambda x, a, b: model({**a, **b}, x), RULE, weights=(1, 2))
    with pytest.raises(hire.HireRewriteError, match="1 weight arguments"):
        hire.Packed.load(file, step)
    with pytest.raises(hire.HireRewriteError, match="what transform returned"):
        hire.Packed.load(file, model)
    with pytest.raises(hire.HireRewriteError, match="No such file"):
        hire.Packed.load(file.parent / "other.safetensors", step)


def test_another_machine_loads_it(file, packed, monkeypatch):
    """Whether it pays there or not."""
    from hire_rewrite.cost import machine as machines

    slow = dataclasses.replace(machines.current(), name="slow", site=1e12)
    monkeypatch.setattr(machines, "current", lambda: slow)
    step = hire.transform(model, RULE)
    loaded = hire.Packed.load(file, step)
    np.testing.assert_allclose(step(loaded, X), step(packed, X), atol=1e-6)


def test_a_pack_is_equal_to_itself_alone(step, packed):
    other = step.pack(PARAMS, X)
    assert packed != other
    assert packed in [other, packed]
    assert packed not in [other, None]
    assert len({packed, other, packed}) == 2


def test_a_pack_of_other_arrays_is_not_called(step, packed):
    name = "params/norm"
    wrong = [
        dataclasses.replace(packed, weights={}),
        dataclasses.replace(packed, weights={name: packed.weights[name][None]}),
        dataclasses.replace(packed, weights={name: packed.weights[name].astype(jnp.bfloat16)}),
        dataclasses.replace(packed, weights={name: None}),
        dataclasses.replace(packed, sites={}),
    ]
    for changed in wrong:
        for call in (step, jax.jit(step)):
            with pytest.raises(hire.HireRewriteError):
                call(changed, X)
        with pytest.raises(hire.HireRewriteError):
            changed.check()


@pytest.mark.parametrize("change", [lambda w: w * 1.0001, lambda w: w + 1e-3, lambda w: w[::-1]])
@pytest.mark.parametrize("name", sorted(PARAMS))
def test_weights_that_changed_are_known(packed, name, change):
    packed.check(PARAMS)
    packed.check({key: np.asarray(w) for key, w in PARAMS.items()})
    with pytest.raises(hire.HireRewriteError, match=f"{name} has changed"):
        packed.check({**PARAMS, name: change(PARAMS[name])})


def test_a_pack_that_has_left_its_mesh(step):
    mesh = Mesh(np.array(jax.devices()[:4]), ("m",))
    placed = {**PARAMS, "up": jax.device_put(PARAMS["up"], NamedSharding(mesh, P(None, "m")))}
    packed = step.pack(placed, X)
    want = step(packed, X)
    turned = Mesh(np.array(jax.devices()[3::-1]), ("m",))
    for place in (jax.devices()[1], NamedSharding(turned, P())):
        with pytest.raises(hire.HireRewriteError, match="was packed over the mesh of"):
            step(jax.device_put(packed, place), jax.device_put(X, place))
    np.testing.assert_array_equal(step(packed, X), want)


def test_it_goes_where_the_arrays_go(step, packed):
    jax.tree.map(lambda leaf: leaf, packed).check(PARAMS)
    jax.device_put(packed, jax.devices()[1]).check(PARAMS)
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    place = NamedSharding(mesh, P("x"))
    packed.check(jax.tree.map(lambda w: jax.device_put(w, place), PARAMS))
    typed = Mesh(np.array(jax.devices()[:2]), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    packed.check(jax.device_put(PARAMS, NamedSharding(typed, P("x"))))


def test_a_program_for_two_packs_does_not_mix_them_up(step, packed):
    """One program serves all packs of a shape: what it returns does not tell what it is of."""
    identity = jax.jit(lambda packed: packed)
    identity(packed)
    new = {**PARAMS, "up": 2 * PARAMS["up"]}
    again = step.pack(new, X)
    assert again.info == packed.info
    for returned in (identity(again), jax.jit(lambda w: step.pack(w, X))(PARAMS)):
        with pytest.raises(hire.HireRewriteError, match="in a trace"):
            returned.check(new)
    again.check(new)


def test_other_arrays_are_not_taken_for_those_that_were_packed(step, packed):
    new = step.pack(negated(PARAMS), X)
    packed.with_arrays(packed.arrays).check(PARAMS)
    mixed = packed.with_arrays(new.arrays)
    np.testing.assert_array_equal(step(mixed, X), step(new, X))
    for weights in (PARAMS, negated(PARAMS)):
        with pytest.raises(hire.HireRewriteError, match="does not know the numbers"):
            mixed.check(weights)


def test_a_small_step_in_few_bits_is_seen(step):
    """In bfloat16 a few in a hundred numbers change."""
    params = {**PARAMS, "norm": jnp.asarray(inputs(256, 256), jnp.bfloat16)}
    moved = (params["norm"] + 1e-4 * jnp.sign(inputs(256, 256))).astype(jnp.bfloat16)
    assert 0.01 < np.mean(moved != params["norm"]) < 0.1
    packed = hire.transform(lambda p, x: x @ p["norm"][:D]).pack(params, X)
    with pytest.raises(hire.HireRewriteError, match="norm has changed"):
        packed.check({**params, "norm": moved})


def test_one_of_two_arguments_changed():
    step = hire.transform(lambda a, b, x: jnp.tanh(x @ a) @ b, RULE, weights=(0, 1))
    packed = step.pack(PARAMS["up"], PARAMS["down"], X)
    packed.check(PARAMS["up"], PARAMS["down"])
    with pytest.raises(hire.HireRewriteError, match="b has changed"):
        packed.check(PARAMS["up"], -PARAMS["down"])
    with pytest.raises(hire.HireRewriteError, match="2 arrays"):
        packed.check(PARAMS["up"])


def test_a_fingerprint_leaves_weights_to_be_donated(step):
    weights = jax.tree.map(lambda w: w + 0, PARAMS)
    places = {name: w.unsafe_buffer_pointer() for name, w in weights.items()}
    step.pack(weights, X)
    after = jax.jit(lambda w: jax.tree.map(jnp.negative, w), donate_argnums=0)(weights)
    assert {name: w.unsafe_buffer_pointer() for name, w in after.items()} == places


@pytest.mark.filterwarnings("ignore::hire_rewrite.HireRewriteWarning")
def test_raw_weights_that_are_updated_are_packed_again():
    """Arrays are told apart by identity; what numpy has may change unseen, and is packed anew."""
    step = hire.transform(model, RULE, on_miss="ignore")
    want = step(step.pack(PARAMS, X), X)
    new = {**PARAMS, "up": -PARAMS["up"]}
    mutable = {name: np.array(w) for name, w in PARAMS.items()}
    np.testing.assert_array_equal(step(PARAMS, X), want)
    np.testing.assert_allclose(step(new, X), -np.asarray(want), atol=1e-6)
    np.testing.assert_array_equal(step(PARAMS, X), want)
    np.testing.assert_array_equal(step(mutable, X), want)
    mutable["up"] *= -1
    np.testing.assert_allclose(step(mutable, X), -np.asarray(want), atol=1e-6)


def test_what_cannot_be_saved_is_said(step, packed, tmp_path, monkeypatch):
    shapes = step.pack(SHAPES, X)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    (tmp_path / "d.safetensors").mkdir()
    for made, path, said in (
        (shapes, tmp_path / "p.safetensors", "made of shapes"),
        (packed, "gs://bucket/packed", "not a path"),
        (packed, taken, "there already"),
        (packed, tmp_path / "d.safetensors", "there already"),
    ):
        with pytest.raises(hire.HireRewriteError, match=said):
            made.save(path)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(hire.HireRewriteError, match="pip install orbax-checkpoint"):
        packed.save(tmp_path / "new")
    assert sorted(file.name for file in tmp_path.rglob("*")) == [
        "d.safetensors",
        "notes.txt",
        "taken",
    ]


@pytest.mark.parametrize("shape", [(96, D, D), (3, 50, D, D)])
def test_no_layer_of_a_stack_changes_unseen(shape):
    stack = np.array(rand(*shape))
    before = fingerprint([stack])
    for i in np.ndindex(shape[:-2]):
        stack[i] *= -1
        assert fingerprint([stack]) != before
        stack[i] *= -1
    assert fingerprint([stack]) == before


@pytest.mark.parametrize(
    "shape",
    [(576, 1536), (576, 576), (2048, 576), (49152, 576), (16, 100), (5000,), (30, 64, 640)],
)
def test_one_index_in_a_hundred_does_not_change_unseen(shape):
    """Neither beside each other nor at equal distances, along any axis."""
    weight = np.zeros(shape, np.int8)
    before = fingerprint([weight])
    for axis, size in enumerate(shape):
        along = np.moveaxis(weight, axis, 0)
        width = -(-size // 100)
        blocks = [slice(at, at + width) for at in range(0, size - width + 1, (width + 1) // 2)]
        combs = [slice(at, None, n) for n in (2, 3, 16, 96) if 2 * n <= size for at in range(n)]
        for some in blocks + combs:
            along[some] = 1
            assert fingerprint([weight]) != before, (axis, some)
            along[some] = 0
    assert fingerprint([weight]) == before


@pytest.mark.parametrize(
    ("shape", "columns"), [((576, 1536), slice(1223, 1261)), ((16, 100), [2, 52])]
)
def test_columns_that_changed_are_seen(shape, columns):
    weight = jnp.asarray(rand(*shape))
    step = hire.transform(lambda w, x: x @ w, RULE, on_miss="ignore")
    packed = step.pack(weight, inputs(2, shape[0]))
    packed.check(weight)
    with pytest.raises(hire.HireRewriteError, match="has changed"):
        packed.check(weight.at[:, jnp.r_[columns]].set(0.0))


def test_places_are_the_same_where_an_array_is_divided():
    weight = rand(64, 256)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    divided = jax.device_put(weight, NamedSharding(mesh, P("b", "a")))
    assert fingerprint([divided]) == fingerprint([np.asarray(weight)])


def negated(params):
    return jax.tree.map(jnp.negative, params)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda step, packed: step.pack(packed, X), "has a Packed where the weights stand"),
        (lambda step, packed: packed.check(SHAPES), "are shapes"),
        (lambda _, packed: jax.jit(lambda p: packed.check(p))(PARAMS), "are traced"),
        (
            lambda step, packed: step.evaluate(packed, [(X,)], weights={"up": PARAMS["up"]}),
            "other weights",
        ),
        (
            lambda step, packed: step.evaluate(packed, [(X,)], weights=negated(PARAMS)),
            "has changed",
        ),
        (
            lambda step, packed: step(packed.with_arrays({**packed.arrays, "norm": ...}), X),
            "is ellipsis",
        ),
    ],
)
def test_a_mistake_is_said(step, packed, call, said):
    with pytest.raises(hire.HireRewriteError, match=said):
        call(step, packed)


def test_packed_with_x64_and_called_without(step):
    with jax.enable_x64(True):
        wide = {**PARAMS, "norm": np.ones(D)}
        packed = step.pack(wide, X)
        step(packed, X)
    with pytest.raises(hire.HireRewriteError, match="jax_enable_x64"):
        step(packed, X)
