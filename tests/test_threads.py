"""Many callers, an interrupt, too little memory: the next call is right, and nothing is left."""

import gc
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from hire_rewrite.analysis import Analysis
from hire_rewrite.sites.linear.operation import LinearOperation
from tests.cases import inputs, rand

D = 32
X = inputs(2, D)
RULE = hire.Linear(encoding=hire.Blocks(8), force=True)
PARAMS = {"up": rand(D, D), "down": rand(D, D, seed=1)}

pytestmark = pytest.mark.filterwarnings("ignore::hire_rewrite.HireRewriteWarning")


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


@pytest.fixture(scope="module")
def want():
    step = hire.transform(model, RULE)
    return np.asarray(step(step.pack(PARAMS, X), X))


@pytest.fixture
def packs(monkeypatch):
    """The layers that are packed, by name; `packs.fails` is called before each."""
    packed = LinearOperation.pack

    class Packs(list):
        fails = staticmethod(lambda number: None)

    seen = Packs()

    def pack(self, *args):
        seen.append(self.site.name)
        seen.fails(len(seen))
        return packed(self, *args)

    monkeypatch.setattr(LinearOperation, "pack", pack)
    return seen


def together(calls):
    """The results of calls that begin at one time."""
    gate = threading.Barrier(len(calls))

    def run(call):
        gate.wait(60)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [job.result(120) for job in [pool.submit(run, call) for call in calls]]


def test_the_first_calls_of_many_threads(want, packs):
    """The weights are packed once, and shapes that are new to all of them come too."""
    step = hire.transform(model, RULE)
    rows = [X, X[:1], X[None], X] * 2
    results = together([lambda x=x: step(PARAMS, x) for x in rows])
    for x, result in zip(rows, results, strict=True):
        np.testing.assert_allclose(result, want[: len(x)] if x.ndim == 2 else want[None], atol=1e-6)
    assert sorted(packs) == ["params/down", "params/up"]


def test_threads_that_plan_pack_and_call(want):
    step = hire.transform(model, RULE)
    packed = step.pack(PARAMS, X)
    calls = [lambda: step(packed, X), lambda: step(step.pack(PARAMS, X), X)] * 3
    calls += [lambda: len(step.plan(PARAMS, X).sites), lambda: len(str(step.diff(PARAMS, X)))]
    *results, sites, _ = together(calls)
    assert sites == 2
    for result in results:
        np.testing.assert_array_equal(result, want)


def test_other_weights_in_each_thread(want):
    """Each caller has its own result, whatever the others have packed meanwhile."""
    step = hire.transform(model, RULE)
    weights = [{**PARAMS, "down": scale * PARAMS["down"]} for scale in (1.0, 2.0, 4.0, 8.0)]
    for _ in range(3):
        results = together([lambda w=w: step(w, X) for w in weights])
        for scale, result in zip((1.0, 2.0, 4.0, 8.0), results, strict=True):
            np.testing.assert_array_equal(result, scale * want)


def test_a_function_that_calls_itself(want):
    """Inside its own trace, on weights that are there: they are packed there."""

    def any_rank(params, x):
        return step(PARAMS, x[0])[None] if x.ndim == 3 else model(params, x)

    step = hire.transform(any_rank, RULE)
    np.testing.assert_allclose(step(PARAMS, X[None]), want[None], atol=1e-6)
    np.testing.assert_allclose(step(PARAMS, X), want, atol=1e-6)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError("of mine"), SystemExit])
def test_packing_that_is_broken_off(want, packs, error, raw):
    """In its middle: nothing half made is kept, and the next call works."""
    step = hire.transform(model, RULE)

    def fails(number):
        if number == 2:
            raise error

    packs.fails = fails
    begin = lambda: step(PARAMS, X) if raw else step.pack(PARAMS, X)  # noqa: E731
    gc.collect()
    before = len(jax.live_arrays())
    kind = hire.HireRewriteError if isinstance(error, MemoryError) else error
    with pytest.raises(kind) as caught:
        begin()
    if kind is hire.HireRewriteError:
        assert "memory does not suffice" in str(caught.value)
        assert "params/" in str(caught.value)
        gc.collect()
        assert len(jax.live_arrays()) <= before  # the error is still there
    del caught
    packs.fails = lambda number: None
    np.testing.assert_array_equal(step(step.pack(PARAMS, X), X), want)
    np.testing.assert_array_equal(step(PARAMS, X), want)


def test_an_allocation_of_xla_that_fails(packs):
    step = hire.transform(model, RULE)

    def fails(number):
        jnp.zeros((2**50,), jnp.float32).block_until_ready()

    packs.fails = fails
    with pytest.raises(hire.HireRewriteError, match="memory does not suffice to pack"):
        step.pack(PARAMS, X)


def test_another_error_while_packing_stays_itself(packs):
    def fails(number):
        raise RuntimeError("of mine")

    packs.fails = fails
    with pytest.raises(RuntimeError, match="of mine"):
        hire.transform(model, RULE).pack(PARAMS, X)


def test_packs_are_forgotten(want):
    """Of weights that are updated again and again, packed ahead and at first sight."""
    step = hire.transform(model, RULE)
    counts = []
    for number in range(60):
        weights = jax.tree.map(lambda w: w + 0, PARAMS)
        packed = step.pack(weights, X)
        step(packed, X)
        step(weights, X)
        del weights, packed
        if number % 20 == 19:
            gc.collect()
            counts.append((len(jax.live_arrays()), len(step._analyses._known)))
    assert counts[0] == counts[-1]


def test_instances_are_forgotten():
    class Model:
        @hire.transform
        def __call__(self, params, x):
            return model(params, x)

    for _ in range(300):
        Model().__call__  # noqa: B018
    gc.collect()
    assert sum(isinstance(item, Model) for item in gc.get_objects()) < 100


def test_warnings_of_threads_are_not_lost():
    step = hire.transform(model, RULE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        together([lambda: step(PARAMS, X)] * 4)
    assert sum("first sight" in str(w.message) for w in caught) == 1


def test_what_is_packed_by_hand_stays(monkeypatch):
    """Beside a first call, which packs at the same time and is done later."""
    w, packing, packed = rand(D, D), threading.Event(), threading.Event()
    rule = hire.Linear(encoding=hire.Blocks(8), force=True)
    step = hire.transform(lambda x: x @ w, rule, weights=())
    call = threading.Thread(target=step, args=(X,))
    original = Analysis.pack

    def slow(self, *args):
        made = original(self, *args)
        if threading.current_thread() is call:
            packing.set()
            packed.wait(1.0)  # in vain, where the other waits for the lock
        return made

    def batches():
        call.start()
        packing.wait()
        yield (X,)

    monkeypatch.setattr(Analysis, "pack", slow)
    mine = step.pack(X, calibration=batches())
    packed.set()
    call.join()
    assert step._sight._seen[1][0] is mine


def test_weights_of_numpy_are_said_to_be_packed_at_every_call():
    step, weights = hire.transform(model, RULE), jax.tree.map(np.asarray, PARAMS)
    with pytest.warns(hire.HireRewriteWarning, match="at every call, as NumPy's may change"):
        step(weights, X)
