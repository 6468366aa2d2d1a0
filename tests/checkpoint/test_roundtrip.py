"""What is saved is what is loaded: numbers, dtypes, and what was decided."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hire_rewrite as hire
from hire_rewrite.checkpoint.arrays import on_host
from tests.cases import inputs, rand

D, F, V = 32, 64, 128
X = inputs(2, D)
RULES = (
    hire.FFN(k=0.25, tail="predicted", encoding=hire.Blocks(4), force=True),
    hire.Head(k=8, min_width=V, force=True),
    hire.Linear(encoding=hire.Blocks(8), force=True),
)
KINDS = ["packed.safetensors", "packed"]


def model(params, x):
    x = jnp.tanh(x @ params["layers"][0]) + params["norm"]
    x = x + jax.nn.silu(x @ params["up"]) @ params["down"]
    return x @ params["head"]


@pytest.fixture(scope="module")
def params():
    layers = (rand(D, D),)
    more = {"norm": inputs(D), "up": rand(D, F), "down": rand(F, D), "head": rand(D, V)}
    return {"layers": layers, **more}


@pytest.fixture(scope="module")
def step():
    return hire.transform(model, *RULES)


@pytest.fixture(scope="module")
def packed(step, params):
    return step.pack(params, X)


@pytest.fixture
def place(request, tmp_path):
    if request.param == "packed":
        pytest.importorskip("orbax.checkpoint")
    return tmp_path / request.param


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("place", KINDS, indirect=True)
def test_what_is_saved_is_what_is_loaded(place, step, params, packed):
    packed.save(place)
    fresh = hire.transform(model, *RULES)
    loaded = hire.Packed.load(place, fresh)
    same(loaded, packed)
    assert loaded.info == packed.info
    np.testing.assert_array_equal(fresh(loaded, X), step(packed, X))
    loaded.check(params)
    with pytest.raises(hire.HireRewriteError, match="up has changed"):
        loaded.check({**params, "up": params["up"] * 1.001})
    with_arguments = hire.Packed.load(place, fresh, jax.eval_shape(lambda: params), X)
    same(with_arguments, packed)


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("~/p.safetensors", "p.safetensors"),
        ("P.SafeTensors", "P.SafeTensors"),
        (".safetensors", ".safetensors"),
        ("slash.safetensors/", "slash.safetensors"),
        ("link.safetensors", "blob"),
        ("latest", "other.safetensors"),
    ],
)
def test_paths_to_one_file(tmp_path, monkeypatch, step, packed, given, written):
    """With the user's directory, letters of another size, a slash, and links, which stay."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    links = [tmp_path / "link.safetensors", tmp_path / "latest"]
    for link, target in zip(links, ("blob", "other.safetensors"), strict=True):
        link.symlink_to(target)
    for _ in range(2):
        packed.save(given)
        same(hire.Packed.load(given, step), packed)
        assert hire.load_rules(given) == packed.rules
    assert all(link.is_symlink() for link in links)
    assert (tmp_path / written).is_file()
    assert {*tmp_path.iterdir()} == {*links, tmp_path / written}


@pytest.mark.parametrize("given", ["~/packed", "packed/", "link"])
def test_paths_to_a_directory(tmp_path, monkeypatch, step, packed, given):
    pytest.importorskip("orbax.checkpoint")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("packed")
    packed.save(given)
    same(hire.Packed.load(given, step), packed)
    assert hire.load_rules(given) == packed.rules
    assert {*tmp_path.iterdir()} == {tmp_path / "link", tmp_path / "packed"}


@pytest.mark.parametrize("path", ["", "a\0b.safetensors", "pipe.safetensors"])
def test_paths_that_nothing_is_saved_to(tmp_path, monkeypatch, packed, path):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.safetensors")
    with pytest.raises(hire.HireRewriteError):
        packed.save(path)
    assert os.listdir() == ["pipe.safetensors"]


@pytest.mark.parametrize("place", KINDS, indirect=True)
def test_the_rules_are_in_it(place, packed, step):
    packed.save(place)
    rules = hire.load_rules(place)
    assert rules == packed.rules
    again = hire.transform(model, *rules)
    np.testing.assert_array_equal(again(hire.Packed.load(place, again), X), step(packed, X))


@pytest.mark.parametrize("place", KINDS[1:], indirect=True)
def test_a_function_that_calls_the_argument_otherwise_loads_it(place, packed, step):
    packed.save(place)
    other = hire.transform(lambda weights, x: model(weights, x), *RULES)
    loaded = hire.Packed.load(place, other)
    assert all(name.startswith("weights/") for name in loaded.sites)
    np.testing.assert_array_equal(other(loaded, X), step(packed, X))


@pytest.mark.parametrize("place", KINDS, indirect=True)
@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", "float16", "int4", "float8_e4m3fn", "float8_e5m2", "int8", "bool", "complex64"],
)
def test_dtypes_survive(place, dtype):
    """Of a weight that stays, of an odd number of numbers; nothing is packed besides."""
    weight = jnp.asarray(np.arange(15).reshape(3, 5) % 7 - 3).astype(dtype)
    weights = {"w": weight, "one": jnp.float32(2.0), "none": jnp.zeros((0, 3))}
    fn = lambda p, x: x * p["w"].real.astype(jnp.float32).sum() * p["one"] + p["none"].sum()  # noqa: E731
    step = hire.transform(fn)
    packed = step.pack(weights, jnp.ones(()))
    packed.save(place)
    same(hire.Packed.load(place, hire.transform(fn)), packed)


def test_a_name_that_is_too_long_is_refused_before_it_is_written(tmp_path):
    params, x = {"w" * 5000: rand(D, D)}, X
    step = hire.transform(
        lambda params, x: x @ params["w" * 5000], hire.Linear(encoding=hire.Blocks(8), force=True)
    )
    with pytest.raises(hire.HireRewriteError, match="too long to be saved"):
        step.pack(params, x).save(tmp_path / "packed.safetensors")
    assert not [*tmp_path.iterdir()]


def test_keys_of_random_numbers_are_refused_in_words(tmp_path):
    step = hire.transform(lambda p, x: x + jax.random.normal(p["key"], x.shape))
    packed = step.pack({"key": jax.random.key(0)}, jnp.ones(2))
    step(packed, jnp.ones(2))
    with pytest.raises(hire.HireRewriteError, match="arrays of numbers alone"):
        packed.save(tmp_path / "p.safetensors")


def test_a_model_of_many_levels_is_given_as_shapes(tmp_path):
    """Its tree is not written, of which no more would be read than of a stranger's."""
    weights = {"w": rand(D, D)}
    for _ in range(40):
        weights = {"inner": weights}

    def fn(params, x):
        return x @ jax.tree.leaves(params)[0]

    step = hire.transform(fn)
    packed = step.pack(weights, X)
    packed.save(tmp_path / "p.safetensors")
    with pytest.raises(hire.HireRewriteError, match="give them"):
        hire.Packed.load(tmp_path / "p.safetensors", step)
    same(hire.Packed.load(tmp_path / "p.safetensors", step, weights, X), packed)


@pytest.mark.parametrize("place", KINDS[:1], indirect=True)
def test_numbers_of_numpy_in_rules(place, tmp_path):
    step = hire.transform(model, hire.Head(k=np.int64(8), candidates=np.float32(0.5), force=True))
    params = {"layers": (rand(D, D),), "norm": inputs(D), "up": rand(D, F), "down": rand(F, D)}
    packed = step.pack({**params, "head": rand(D, V)}, X)
    packed.save(place)
    assert hire.load_rules(place) == packed.rules
    hire.save_rules(step.rules, tmp_path / "rules.json")
    assert hire.load_rules(tmp_path / "rules.json") == step.rules


@pytest.mark.parametrize("place", KINDS[:1], indirect=True)
def test_what_calibration_found_is_kept(place):
    rule = hire.FFN(k="auto", keep=0.5, group=4, predictor=hire.LowRank(4), force=True)
    fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]  # noqa: E731
    step, weights = hire.transform(fn, rule), {"up": rand(D, F), "down": rand(F, D)}
    packed = step.pack(weights, X, calibration=[(inputs(64, D),)])
    packed.save(place)
    fresh = hire.transform(fn, rule)
    loaded = hire.Packed.load(place, fresh)
    assert loaded.info == packed.info
    assert loaded.info.sites[0].statistics.k
    np.testing.assert_array_equal(fresh(loaded, X), step(packed, X))


@pytest.mark.parametrize("place", KINDS[:1], indirect=True)
@pytest.mark.parametrize("rules", [(), (hire.FFN(k="positive", force=True),)])
def test_what_numbers_told_is_kept(place, rules):
    """Without rules encodings are found by a look at the numbers."""
    narrow = lambda *shape: rand(*shape).astype(jnp.bfloat16).astype(jnp.float32)  # noqa: E731
    weights = {"up": narrow(D, F), "down": narrow(F, D), "out": narrow(D, D)}
    fn = lambda p, x: (jax.nn.relu(x @ p["up"]) @ p["down"]) @ p["out"]  # noqa: E731
    step = hire.transform(fn, *rules)
    packed = step.pack(weights, X)
    assert packed.sites
    packed.save(place)
    loaded = hire.Packed.load(place, hire.transform(fn, *rules))
    same(loaded, packed)
    assert loaded.info == packed.info


def sharded(tree, mesh):
    def put(w):
        return jax.device_put(w, NamedSharding(mesh, P(None, "x") if w.ndim > 1 else P()))

    return jax.tree.map(put, tree)


def placed(tree, mesh):
    like = jax.tree.map(lambda w: w.sharding, sharded(tree, mesh))
    return jax.tree.map(lambda w, s: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=s), tree, like)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("place", KINDS, indirect=True)
def test_onto_another_mesh(place, params):
    """Of as many shards: on half as many devices, or with the axes in another order."""
    devices, rule = np.array(jax.devices()), hire.Linear(encoding=hire.Blocks(8), force=True)
    step = hire.transform(model, rule)
    packed = step.pack(sharded(params, Mesh(devices.reshape(2, 4), ("data", "x"))), X)
    want = step(packed, X)
    packed.save(place)
    for mesh in (Mesh(devices[:4], ("x",)), Mesh(devices.reshape(4, 2), ("x", "data"))):
        loaded = hire.Packed.load(place, step, placed(params, mesh), X)
        leaves = jax.tree.leaves(loaded)
        assert {len(leaf.sharding.device_set) for leaf in leaves} == {mesh.size}
        assert any(not leaf.sharding.is_fully_replicated for leaf in leaves)
        np.testing.assert_allclose(step(loaded, X), want, atol=1e-5)
        loaded.check(params)
    with pytest.raises(hire.HireRewriteError, match="sharded over 8 devices: give"):
        hire.Packed.load(place, step)
    with pytest.raises(hire.HireRewriteError, match="on a mesh that makes others, pack again"):
        hire.Packed.load(place, step, placed(params, Mesh(devices, ("x",))), X)


class Box:
    """A node whose type is not in JSON."""

    def __init__(self, w):
        self.w = w


jax.tree_util.register_pytree_node(Box, lambda box: ((box.w,), None), lambda _, w: Box(*w))


@pytest.mark.parametrize("place", KINDS[:1], indirect=True)
def test_a_model_of_another_type_is_given_as_shapes(place):
    fn = lambda box, x: jnp.tanh(x @ box.w)  # noqa: E731
    rule, box = hire.Linear(encoding=hire.Blocks(8), force=True), Box(rand(D, D))
    packed = hire.transform(fn, rule).pack(box, X)
    packed.save(place)
    fresh = hire.transform(fn, rule)
    with pytest.raises(hire.HireRewriteError, match="give them"):
        hire.Packed.load(place, fresh)
    same(hire.Packed.load(place, fresh, jax.eval_shape(lambda: box), X), packed)


@pytest.mark.parametrize("place", KINDS[:1], indirect=True)
def test_several_weight_arguments_and_keywords(place):
    def fn(x, a, b, *, scale):
        return jnp.tanh(x @ a) @ b["w"] * scale

    rule = hire.Linear(encoding=hire.Blocks(8), force=True)
    step = hire.transform(fn, rule, weights=(1, 2))
    packed = step.pack(X, rand(D, D), {"w": rand(D, D, seed=1)}, scale=2.0)
    packed.save(place)
    fresh = hire.transform(fn, rule, weights=(1, 2))
    loaded = hire.Packed.load(place, fresh)
    want = step(X, packed, None, scale=2.0)
    np.testing.assert_array_equal(fresh(X, loaded, None, scale=2.0), want)
    loaded.check(rand(D, D), {"w": rand(D, D, seed=1)})


def test_a_function_that_closes_over_its_weights(tmp_path):
    w = rand(D, D)
    rule = hire.Linear(encoding=hire.Blocks(8), force=True)
    step = hire.transform(lambda x: jnp.tanh(x @ w), rule, weights=())
    step.pack(X).save(tmp_path / "p.safetensors")
    fresh = hire.transform(lambda x: jnp.tanh(x @ w), rule, weights=())
    hire.Packed.load(tmp_path / "p.safetensors", fresh)
    np.testing.assert_array_equal(fresh(X), step(X))


def test_other_programs_read_the_file(tmp_path, packed):
    safetensors = pytest.importorskip("safetensors")
    packed.save(tmp_path / "p.safetensors")
    with safetensors.safe_open(tmp_path / "p.safetensors", "numpy") as file:
        norm = file.get_tensor("weights/norm")
        assert len(file.keys()) == len(jax.tree.leaves(packed))
    np.testing.assert_array_equal(norm, packed.weights["params/norm"])


def test_saving_keeps_no_copy_and_nothing_half_written(tmp_path, packed):
    path = tmp_path / "deep" / "p.safetensors"
    packed.save(path)
    packed.save(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    leaf = jax.tree.leaves(packed)[0] + 0
    before = leaf.unsafe_buffer_pointer()
    on_host(leaf)
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(leaf)
    assert after.unsafe_buffer_pointer() == before  # it could be donated


def of_another_process(name, path):
    """What a function of this file returns there, with a `Packed` that is loaded from a path."""
    program = f"""
        import json, sys
        import hire_rewrite as hire
        from tests.checkpoint.test_roundtrip import X, {name}
        step = hire.transform({name}, *hire.load_rules(sys.argv[1]))
        print(json.dumps(step(hire.Packed.load(sys.argv[1], step), X).tolist()))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def masked(p, x):
    """A model with arrays of numbers of its own: a table, and a mask in a weight."""
    table = np.cos(np.arange(D * D, dtype=np.float32)).reshape(D, D)
    return jnp.tanh(x @ table) @ jnp.where(np.tri(D, dtype=bool), p["w"], 0)


def test_numbers_of_the_program_are_the_same_in_another_process_and_at_another_batch(tmp_path):
    rule, params = hire.Linear(encoding=hire.Blocks(8), force=True), {"w": rand(D, D, seed=2)}
    step = hire.transform(masked, rule)
    packed = step.pack(params, X)
    assert len(packed.sites) == 2
    np.testing.assert_allclose(step(packed, X[:1]), step(packed, X)[:1], atol=1e-5)
    packed.save(tmp_path / "p.safetensors")
    got = of_another_process("masked", tmp_path / "p.safetensors")
    np.testing.assert_allclose(got, step(packed, X), atol=1e-5)


def test_in_another_process_without_the_weights(tmp_path, packed, step):
    packed.save(tmp_path / "p.safetensors")
    got = of_another_process("model", tmp_path / "p.safetensors")
    np.testing.assert_allclose(got, step(packed, X), atol=1e-5)


@pytest.mark.parametrize("place", KINDS, indirect=True)
def test_what_stays_dense_lies_where_shapes_say(place):
    mesh = Mesh(np.array(jax.devices()[:4]), ("m",))
    columns = NamedSharding(mesh, P(None, "m"))
    shapes = {"head": jax.ShapeDtypeStruct((D, V), jnp.float32, sharding=columns)}
    weights = {"head": jax.device_put(rand(D, V), columns)}
    certified = hire.Head(certify=True, min_width=V, force=True)  # which no mesh has
    for rules in ((), (certified,)):
        step = hire.transform(lambda p, x: x @ p["head"], *rules, on_miss="ignore")
        packed = step.pack(weights, X)
        assert step.pack(shapes, X).weights["p/head"].sharding == columns
        packed.save(place)
        assert hire.Packed.load(place, step, shapes, X).weights["p/head"].sharding == columns
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    step.pack({"head": rand(D, V)}, X).save(place)
    with pytest.raises(hire.HireRewriteError, match="where proofs are not supported"):
        hire.Packed.load(place, step, shapes, X)


def test_what_is_on_the_host_is_saved(tmp_path, step, packed):
    jax.device_get(packed).save(tmp_path / "p.safetensors")
    same(hire.Packed.load(tmp_path / "p.safetensors", step), packed)
