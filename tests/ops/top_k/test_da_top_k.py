"""da_top_k against lax.top_k: any shards, any data, any order; then its transformations."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hire_rewrite import HireRewriteError, da_top_k
from hire_rewrite.ops.top_k.keys import to_keys
from hire_rewrite.ops.top_k.merge import cheapest
from hire_rewrite.ops.top_k.recall import allowed_misses, expected_recall, kept_per_shard

SHARDS = (1, 2, 3, 4, 8)
QUICK = {"xla_backend_optimization_level": 0}  # what runs once is mostly compiled
ROWS = 4


def mesh_of(*sizes: int, names: tuple[str, ...] = ("x",)) -> Mesh:
    return Mesh(np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes), names)


def data(kind: str, n: int, dtype=np.float32) -> np.ndarray:
    """ROWS rows of n values, hostile in one way or another."""
    rng = np.random.default_rng(n)
    x = rng.normal(size=(ROWS, n)) * 10
    if kind == "ties":
        x = rng.integers(0, 3, size=(ROWS, n)).astype(float)
    elif kind == "equal":
        x = np.zeros((ROWS, n))
    elif kind == "ascending":
        x = np.sort(x, axis=-1)
    elif kind == "descending":
        x = -np.sort(-x, axis=-1)
    elif kind == "frequency":  # the mean falls with the place, as with token ids
        x = x / 4 - 3 * np.log1p(np.arange(n))
    elif kind == "spike":
        x[:, -1] = 100
    elif kind == "special" and np.issubdtype(dtype, np.floating):
        x = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0], size=(ROWS, n))
    if np.issubdtype(dtype, np.unsignedinteger):
        x = np.abs(x)
    return np.asarray(x).astype(dtype)


KINDS = (
    "random", "ties", "equal", "ascending", "descending", "frequency", "spike", "special",
)  # fmt: skip


@functools.cache
def compiled(shards: int, k: int, **settings):
    mesh = mesh_of(shards)
    return jax.jit(
        lambda x: da_top_k(x, k, mesh=mesh, spec=P(None, "x"), **settings),
        compiler_options=QUICK,
    )


def assert_same(found, wanted) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


def recalls(found: jax.Array, x: np.ndarray, k: int) -> np.ndarray:
    """The share of each row's k greatest values that were found (any of equal ones)."""
    keys = np.asarray(to_keys(jnp.asarray(x)))  # ascending, NaN too
    last = np.sort(keys, axis=-1)[:, k - 1 : k]
    return (np.take_along_axis(keys, np.asarray(found), -1) <= last).mean(-1)


class TestExact:
    @pytest.mark.sampled(5)
    @pytest.mark.parametrize("merge", ["gather", "butterfly"])
    @pytest.mark.parametrize("shards", SHARDS)
    @pytest.mark.parametrize(("n", "k"), [(24, 1), (24, 5), (24, 24), (1000, 64), (4803, 257)])
    def test_equals_top_k(self, shards, n, k, merge):
        run = compiled(shards, k, recall_target=1.0, merge=merge)
        for kind in KINDS:
            x = data(kind, n)
            assert_same(run(x), lax.top_k(x, k))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32", "uint32", "int8", "uint8"])
    @pytest.mark.parametrize("shards", [3, 8])
    def test_dtypes(self, shards, dtype):
        run = compiled(shards, 9, recall_target=1.0)
        for kind in KINDS:
            x = data(kind, 200, jnp.dtype(dtype))
            assert_same(run(x), lax.top_k(x, 9))

    def test_float64(self):
        with jax.enable_x64(True):
            x = data("random", 100, np.float64) * (1 + 1e-12)
            assert_same(compiled(4, 7, recall_target=1.0)(x), lax.top_k(x, 7))

    @pytest.mark.parametrize("shards", [1, 8])
    def test_an_uneven_vocabulary(self, shards):
        x = data("spike", 49153)
        assert_same(compiled(shards, 64, recall_target=1.0)(x), lax.top_k(x, 64))

    def test_one_row_and_many_axes(self):
        mesh = mesh_of(4)
        x = data("random", 96)
        assert_same(da_top_k(x[0], 5, mesh=mesh, spec=P("x")), lax.top_k(x[0], 5))
        cube = x.reshape(2, 2, 96)
        found = da_top_k(cube, 5, mesh=mesh, spec=P(None, None, "x"), recall_target=1.0)
        assert_same(found, lax.top_k(cube, 5))


class TestRecall:
    @pytest.mark.sampled(6)
    @pytest.mark.parametrize("target", [0.9, 0.95, 0.99, 0.999])
    @pytest.mark.parametrize("shards", SHARDS)
    def test_every_row_reaches_the_target(self, shards, target):
        for n, k in ((1000, 64), (4803, 257)):
            run = compiled(shards, k, recall_target=target)
            for kind in KINDS:
                x = data(kind, n)
                values, found = run(x)
                assert (recalls(found, x, k) >= target).all(), (kind, n)
                best = lax.top_k(x, 1)
                assert_same((values[:, :1], found[:, :1]), best)
                np.testing.assert_array_equal(np.take_along_axis(x, np.asarray(found), -1), values)

    @pytest.mark.parametrize(("n", "k", "shards"), [(8192, 512, 8), (32768, 64, 4)])
    def test_the_formula_is_what_is_measured(self, n, k, shards):
        keep = round(1.1 * k / shards)
        rng = np.random.default_rng(0)
        x = rng.normal(size=(64, n)).astype(np.float32)
        found = compiled(shards, k, keep=keep)(x)[1]
        assert recalls(found, x, k).mean() == pytest.approx(
            expected_recall(n, k, shards, keep), abs=0.006
        )

    def test_published_values(self):
        assert expected_recall(8192, 512, 8, 64) == pytest.approx(0.955, abs=5e-4)
        assert expected_recall(32768, 64, 4, 18) == pytest.approx(0.962, abs=5e-4)
        assert expected_recall(32768, 64, 8, 12) == pytest.approx(0.988, abs=5e-4)
        assert expected_recall(32768, 64, 8, 64) == 1.0

    @pytest.mark.parametrize("shards", [2, 3, 8, 64])
    def test_what_is_kept_grows_with_the_target(self, shards):
        kept = [kept_per_shard(262144, 64, shards, t) for t in (0.5, 0.9, 0.99, 1.0)]
        assert kept == sorted(kept)
        assert kept[-1] == 64
        assert 64 / shards <= kept[0] <= 64
        assert shards * kept[2] < 64 * shards or shards == 2

    def test_allowed_misses(self):
        assert [allowed_misses(64, t) for t in (1.0, 0.99, 0.95, 0.9)] == [0, 0, 3, 6]
        assert allowed_misses(10, 0.9) == 1


class TestPlaces:
    def test_two_axes_of_a_mesh_and_a_spread_batch(self):
        mesh = mesh_of(2, 2, 2, names=("data", "host", "chip"))
        x = data("frequency", 400)
        for merge in ("gather", "butterfly", None):
            found = da_top_k(
                x, 9, mesh=mesh, spec=P("data", ("host", "chip")), recall_target=1.0, merge=merge
            )
            assert_same(found, lax.top_k(x, 9))

    def test_a_spec_that_spreads_another_axis(self):
        x = data("random", 50)
        assert_same(da_top_k(x, 3, mesh=mesh_of(4), spec=P("x")), lax.top_k(x, 3))

    def test_inside_shard_map(self):
        mesh, x = mesh_of(8), data("ties", 160)
        for check in (True, False):
            run = jax.shard_map(
                lambda shard: da_top_k(shard, 7, axis_name="x", recall_target=1.0),
                mesh=mesh,
                in_specs=P(None, "x"),
                out_specs=P(),
                check_vma=check,
            )
            assert_same(run(x), lax.top_k(x, 7))
            assert_same(jax.jit(run)(x), lax.top_k(x, 7))

    def test_explicit_sharding(self):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
        x = data("random", 160)
        with jax.sharding.set_mesh(mesh):
            spread = jax.device_put(x, NamedSharding(mesh, P(None, "x")))
            found = jax.jit(lambda x: da_top_k(x, 7, mesh=mesh, spec=P(None, "x")))(spread)
        assert_same(found, lax.top_k(x, 7))

    def test_explicit_axes_and_an_array_that_is_elsewhere(self):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
        x = data("random", 163)
        run = lambda x: da_top_k(x, 7, mesh=mesh, spec=P(None, "x"))  # noqa: E731
        assert_same(run(x), lax.top_k(x, 7))
        with jax.sharding.set_mesh(mesh):
            assert_same(jax.jit(run)(x), lax.top_k(x, 7))

    def test_indices_of_interleaved_shards(self):
        n, shards = 203, 8
        mesh, x = mesh_of(shards), data("ties", n)
        m = -(-n // shards)
        ids = np.arange(m * shards, dtype=np.int32).reshape(m, shards).T
        rows = np.pad(x, ((0, 0), (0, m * shards - n)), constant_values=99)[:, ids.ravel()]
        ids = np.where(ids < n, ids, -1)
        run = jax.shard_map(
            lambda shard, own: da_top_k(
                shard, 11, axis_name="x", indices=own[0], recall_target=1.0
            ),
            mesh=mesh,
            in_specs=(P(None, "x"), P("x")),
            out_specs=P(),
        )
        assert_same(run(rows, ids), lax.top_k(x, 11))

    def test_padding_comes_last(self):
        run = jax.shard_map(
            lambda x, own: da_top_k(x, 6, axis_name="x", indices=own, recall_target=1.0),
            mesh=mesh_of(4),
            in_specs=P("x"),
            out_specs=P(),
        )
        least = np.iinfo(np.int32).min
        values, found = run(np.full(8, least, np.int32), np.array([0, -1] * 4, np.int32) * 1)
        assert found.tolist()[4:] == [-1, -1]
        assert (np.asarray(values) == least).all()

    def test_few_real_values_among_padding_are_all_found(self):
        m, real = 512, 9
        ids = np.full((8, m), -1, np.int32)
        ids[0, :real] = np.arange(real)
        x = np.arange(8 * m, dtype=np.float32)
        run = jax.shard_map(
            lambda x, own: da_top_k(x, 10, axis_name="x", indices=own),
            mesh=mesh_of(8),
            in_specs=P("x"),
            out_specs=P(),
        )
        values, found = run(x, ids.reshape(-1))
        assert found.tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0, -1]
        assert values[:real].tolist() == list(range(8, -1, -1))

    @pytest.mark.parametrize("merge", ["gather", "butterfly"])
    def test_rows_on_other_devices_may_need_another_merge(self, merge):
        """All devices must take the same branch, or a permutation waits forever."""
        x = data("random", 16384)
        x[2:] = np.sort(x[2:])  # the second half of the rows, with all of the greatest together
        mesh = mesh_of(2, 4, names=("data", "x"))
        for target in (0.7, 0.9):
            found = da_top_k(
                x, 64, mesh=mesh, spec=P("data", "x"), recall_target=target, merge=merge
            )
            assert (recalls(found[1], x, 64) >= target).all()


class TestTransformations:
    mesh = mesh_of(8)

    def run(self, x, k=5, **settings):
        return da_top_k(x, k, mesh=self.mesh, spec=P(*(None,) * (x.ndim - 1), "x"), **settings)

    def test_gradient(self):
        x = jnp.asarray(data("random", 80))
        weights = jnp.arange(5.0)
        mine = jax.grad(lambda x: (self.run(x)[0] * weights).sum())(x)
        theirs = jax.grad(lambda x: (lax.top_k(x, 5)[0] * weights).sum())(x)
        np.testing.assert_array_equal(mine, theirs)

    def test_gradient_with_unchecked_axes(self):
        x = jnp.asarray(data("random", 80))
        run = jax.shard_map(
            lambda x: da_top_k(x, 5, axis_name="x")[0],
            mesh=self.mesh,
            in_specs=P(None, "x"),
            out_specs=P(),
            check_vma=False,
        )
        weights = jnp.arange(5.0)
        mine = jax.grad(lambda x: (run(x) * weights).sum())(x)
        theirs = jax.grad(lambda x: (lax.top_k(x, 5)[0] * weights).sum())(x)
        np.testing.assert_array_equal(mine, theirs)

    def test_tangents(self):
        x, t = jnp.asarray(data("random", 80)), jnp.asarray(data("frequency", 80))
        mine = jax.jvp(lambda x: self.run(x)[0], (x,), (t,))
        assert_same(mine, jax.jvp(lambda x: lax.top_k(x, 5)[0], (x,), (t,)))

    def test_second_derivative(self):
        x = jnp.asarray(data("random", 80))
        hessian = jax.hessian(lambda x: (self.run(x)[0] ** 3).sum())(x[0])
        wanted = jax.hessian(lambda x: (lax.top_k(x, 5)[0] ** 3).sum())(x[0])
        np.testing.assert_allclose(hessian, wanted)

    def test_vmap(self):
        x = jnp.asarray(data("ties", 80)).reshape(2, 2, 80)
        for axis in (0, 1):
            mine = jax.vmap(self.run, in_axes=axis, out_axes=axis)(x)
            assert_same(mine, lax.top_k(x, 5))

    def test_vmap_over_the_shards(self):
        x = data("ties", 80)
        shards = x.reshape(ROWS, 8, 10).swapaxes(0, 1)
        run = functools.partial(da_top_k, k=5, axis_name="x", recall_target=1.0)
        mine = jax.vmap(run, axis_name="x", out_axes=None)(shards)
        assert_same(mine, lax.top_k(x, 5))

    def test_vmap_over_one_of_two_axes(self):
        x = data("ties", 80)
        parts = x.reshape(ROWS, 4, 2, 10).transpose(1, 2, 0, 3)
        run = functools.partial(da_top_k, k=5, axis_name=("a", "b"))
        inner = jax.vmap(run, axis_name="b", out_axes=None)
        mine = jax.vmap(inner, axis_name="a", out_axes=None)(parts)
        assert_same(mine, lax.top_k(x, 5))

    def test_scan(self):
        x = jnp.asarray(data("random", 80))

        def step(carry, row):
            values, found = self.run(row)
            return carry + values.sum(), found

        total, found = jax.jit(lambda x: lax.scan(step, 0.0, x))(x)
        np.testing.assert_array_equal(found, lax.top_k(x, 5)[1])
        assert total == pytest.approx(float(lax.top_k(x, 5)[0].sum()), rel=1e-5)

    @pytest.mark.parametrize("platform", ["cpu", "tpu"])
    def test_export(self, platform):
        x = jax.device_put(data("random", 4096 * 8), NamedSharding(self.mesh, P(None, "x")))
        exported = jax.export.export(jax.jit(self.run), platforms=[platform])(x)
        again = jax.export.deserialize(exported.serialize())
        assert again.nr_devices == 8
        assert "all_gather" in again.mlir_module()
        if platform == "cpu":
            assert_same(jax.jit(again.call)(x), lax.top_k(x, 5))

    def test_a_name_in_the_jaxpr(self):
        text = str(jax.make_jaxpr(self.run)(data("random", 80)))
        assert "da_top_k[" in text


class TestErrors:
    x = np.zeros((2, 16), np.float32)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"axis_name": "y"}, "no axis 'y' is bound"),
            ({}, "give either axis_name"),
            ({"axis_name": "x", "mesh": mesh_of(2)}, "give either axis_name"),
            ({"mesh": mesh_of(2)}, "mesh= goes with spec="),
            ({"axis_name": "x", "spec": P("x")}, "spec= goes with mesh="),
            ({"mesh": mesh_of(2), "spec": P(None, "y")}, "names 'y'"),
            ({"mesh": mesh_of(2), "spec": P(None, None, "x")}, "has 3 parts"),
            ({"mesh": mesh_of(3), "spec": P("x")}, "axis 0 of x, of size 2"),
            ({"mesh": mesh_of(2), "spec": P(None, "x"), "recall_target": 1.5}, "recall_target=1.5"),
            ({"mesh": mesh_of(2), "spec": P(None, "x"), "keep": 1}, "keep at least 2"),
            ({"mesh": mesh_of(2), "spec": P(None, "x"), "keep": 0}, "keep=0"),
            (
                {"mesh": mesh_of(8), "spec": P("x"), "x": np.arange(9.0), "k": 8, "keep": 1},
                "keep at least 2",
            ),
            ({"mesh": mesh_of(2), "spec": P(None, "x"), "merge": "tree"}, "merge='tree'"),
            ({"mesh": mesh_of(2), "spec": P(None, "x"), "k": 17}, "k=17 of 16 values"),
            ({"mesh": mesh_of(2), "spec": P(None, "x"), "k": 0}, "k=0 must be at least 1"),
            ({"mesh": mesh_of(2), "spec": P(), "x": np.zeros(3, bool)}, "floating-point numbers"),
            ({"mesh": mesh_of(2), "spec": P(), "x": None}, "x is a NoneType"),
            ({"mesh": mesh_of(2), "spec": P(None, "x"), "k": "a"}, "k='a' must be an int"),
            ({"mesh": mesh_of(2), "spec": P(None, "x"), "keep": 2.5}, "keep=2.5 must be an int"),
            ({"mesh": mesh_of(2), "spec": P(None, "x"), "recall_target": "a"}, "recall_target='a'"),
        ],
    )
    def test_says_what_is_wrong(self, settings, message):
        settings = {"x": self.x, "k": 4, **settings}
        with pytest.raises(HireRewriteError, match=re.escape(message)):
            da_top_k(**settings)


class TestMerges:
    def test_few_shards_gather_and_many_exchange(self):
        assert [cheapest(("x",), (s,), 20, 64)[0].how for s in (4, 8)] == ["gather"] * 2
        assert [cheapest(("x",), (s,), 20, 64)[0].how for s in (256, 4096)] == ["butterfly"] * 2

    def test_slow_axes_see_few_pairs(self):
        merge = cheapest(("host", "chip"), (16, 8), 20, 64, rows=64, slow=("host",))
        assert [level.axes for level in merge] == [("chip",), ("host",)]
        assert merge[1].kept == 64

    def test_what_a_device_receives(self):
        gather, butterfly = (
            cheapest(("x",), (8,), 20, 64, how=how)[0] for how in ("gather", "butterfly")
        )
        assert (gather.lists, butterfly.lists) == ([140], [20, 40, 64])
        assert cheapest(("x",), (3,), 20, 64, how="butterfly")[0].lists == [20, 40]
