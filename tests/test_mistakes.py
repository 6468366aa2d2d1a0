"""Calls that cannot be right: what is said, and that it is this package's error."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire

D, V = 16, 64
RULE = hire.Linear(encoding=hire.Blocks(8), force=True)
TOKEN, CACHE = jnp.array([3]), {"k": jnp.zeros((4, D))}


def decode(params, token, cache):
    x = params["embed"][token] + cache["k"].mean(0)
    return jnp.tanh(x @ params["up"]) @ params["embed"].T, {"k": cache["k"].at[0].set(x[0])}


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {"embed": jax.random.normal(keys[0], (V, D)), "up": jax.random.normal(keys[1], (D, D))}


@pytest.fixture(scope="module")
def step():
    return hire.transform(decode, RULE, on_miss="ignore")


@pytest.fixture(scope="module")
def packed(step, params):
    return step.pack(params, TOKEN, CACHE)


BATCH = (TOKEN, CACHE)
THIRD = hire.transform(lambda token, cache, params: decode(params, token, cache), RULE, weights=2)
UP = jnp.eye(D)
BOTH = hire.transform(lambda a, b, x: x @ a @ b, RULE, weights=(0, 1))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda step, params, packed: step.tune(packed, [BATCH] * 2, kl=1.0), "a Packed was given"),
        (lambda step, params, packed: step.tune(params, BATCH, kl=1.0), "list of tuples"),
        (lambda step, params, packed: step.tune(params, BATCH), "list of tuples"),
        (lambda step, params, packed: step.evaluate(packed, [BATCH], weights=packed), "a Packed"),
        (lambda step, params, packed: step.pack(params), "'token'"),
        (lambda step, params, packed: step(params), "'token'"),
        (lambda step, params, packed: step.pack(params, *BATCH, 1), "too many"),
        (lambda step, params, packed: step.pack(TOKEN, params, CACHE), "argument 1 `token`"),
        (lambda step, params, packed: step(packed, TOKEN), "'cache'"),
        (lambda step, params, packed: step(packed, *BATCH, TOKEN), "too many"),
        (lambda step, params, packed: step(packed, *BATCH, more=1), "'more'"),
        (lambda step, params, packed: step(packed, CACHE, TOKEN), "look at these first"),
        (lambda step, params, packed: step(packed, jnp.ones(3), CACHE), "look at these first"),
        (lambda step, params, packed: hire.save_rules("r.json", packed.rules), "rules first"),
        (lambda step, params, packed: hire.save_rules([packed], "r.json"), "is not a rule"),
        (lambda step, params, packed: hire.save_rules(packed, "r.json"), r"packed\.rules"),
        (lambda step, params, packed: hire.save_rules(step, "r.json"), r"step\.rules"),
        (lambda step, params, packed: hire.save_rules(None, "r.json"), "a NoneType"),
        (lambda step, params, packed: hire.save_rules(5, "r.json"), "a int"),
        (lambda step, params, packed: step.evaluate(packed, 3), "a int is given"),
        (lambda step, params, packed: step.pack(params, *BATCH, calibration=3), "a int is given"),
        (lambda step, params, packed: step.tune(params, 3, kl=1.0), "give at least 2"),
        (
            lambda step, params, packed: step.pack(params, *BATCH, calibration=[("x", CACHE)]),
            "holds a str in argument 0",
        ),
        (lambda step, params, packed: step.tune(params, [BATCH] * 2, recall="a"), "recall='a'"),
        (
            lambda step, params, packed: step(packed, jax.eval_shape(lambda: TOKEN), CACHE),
            "argument `token` is a ShapeDtypeStruct",
        ),
        (
            lambda step, params, packed: step(packed, TOKEN, cache={"k": "abc"}),
            "argument `cache` holds a str",
        ),
        (lambda step, params, packed: packed.with_arrays(None), "a NoneType: give a dict"),
        (lambda step, params, packed: hire.inspect(decode, rules=jnp.array(3)), "give a rule, or"),
        (
            lambda step, params, packed: step.pack(params, *BATCH, calibration=jnp.array(3)),
            "is given: give tuples",
        ),
        (lambda step, params, packed: step.evaluate(packed, jnp.array(3)), "is given: give tuples"),
        (lambda step, params, packed: step.tune(params, jnp.array(3)), "give at least 2"),
        (lambda step, params, packed: step.tune(params, jnp.array(3), kl=1.0), "give at least 2"),
        (lambda step, params, packed: hire.save_rules(jnp.array(3), "r"), r"give packed\.rules"),
        (
            lambda step, params, packed: hire.transform(decode, on_miss=np.array([1, 2])),
            "on_miss=.* must be one of",
        ),
        (lambda step, params, packed: hire.inspect(None, params, *BATCH), "None is not callable"),
        (lambda step, params, packed: hire.diff(None, params, *BATCH), "None is not callable"),
        (lambda step, params, packed: hire.da_top_k(UP, None), "k=None must be an int"),
        (lambda step, params, packed: hire.da_top_k(10**30, 3), "x is a int: give an array"),
        (lambda step, params, packed: hire.da_top_k(UP, 10**30), "k=1000"),
        (
            lambda step, params, packed: step.pack(
                {**params, "up": jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, n"), "f4")},
                *BATCH,
            ),
            "an axis of size n",
        ),
        (lambda step, params, packed: hire.transform(decode, mode=["hire"]), "must be one of"),
        (lambda step, params, packed: BOTH(BOTH.pack(UP, UP, UP), UP, UP), "argument 1 is float32"),
        (lambda step, params, packed: packed.check({**params, "up": "abc"}), "params/up is none"),
        (lambda step, params, packed: THIRD.evaluate(THIRD.pack(*BATCH, params), [()]), "a batch"),
        (lambda step, params, packed: THIRD.tune(params, [(TOKEN,)] * 2), "a batch has 1 arg"),
        (lambda step, params, packed: step(packed, 2**70, CACHE), "number 11805916.* does not fit"),
        (lambda step, params, packed: step.plan(params, 2**70, CACHE), "does not fit"),
        (lambda step, params, packed: step.pack({**params, "up": 2**70}, *BATCH), "does not fit"),
        (lambda step, params, packed: step.evaluate(packed, [(2**70, CACHE)]), "does not fit"),
        (
            lambda step, params, packed: step.pack(params, *BATCH, calibration=[(2**70, CACHE)]),
            "does not fit",
        ),
        (
            lambda step, params, packed: BOTH.tune(5, [(TOKEN,)] * 2),
            "are a int, and the function has 2",
        ),
        (
            lambda step, params, packed: step.evaluate(packed=packed, batches=[BATCH]),
            "packed, batches are given by position",
        ),
        (lambda step, params, packed: step.evaluate(packed, batches=[BATCH]), "leave out batches="),
        (
            lambda step, params, packed: step.tune(weights=params, batches=[BATCH] * 2),
            "weights, batches are given by position",
        ),
        (lambda step, params, packed: step.tune(params, batches=[BATCH] * 2), "leave out batches="),
        (lambda step, params, packed: step.tune([BATCH] * 2, weights=params), "leave out weights="),
        (
            lambda step, params, packed: hire.Packed.load(path="packed", step=step),
            "path, step are given by position",
        ),
    ],
)
def test_what_was_wrong_is_named_first(step, params, packed, call, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing is written
    with pytest.raises(hire.HireRewriteError, match=named):
        call(step, params, packed)
    assert not [*tmp_path.iterdir()]


def test_missing_arguments_are_not_a_matter_of_packing(step, packed):
    with pytest.raises(hire.HireRewriteError) as caught:
        step(packed, TOKEN)
    assert "ack again" not in str(caught.value)


def test_a_packed_of_shapes_is_not_called(step, params, packed):
    shapes = step.pack(jax.eval_shape(lambda: params), *BATCH)
    for call in (lambda: step(shapes, *BATCH), lambda: step.evaluate(shapes, [BATCH])):
        with pytest.raises(hire.HireRewriteError, match="made of shapes"):
            call()
    assert jax.eval_shape(step, shapes, *BATCH)[0].shape == (1, V)
    jax.jit(step).lower(shapes, *BATCH)


def test_an_error_of_the_function_itself_stays(params):
    def broken(params, token):
        raise KeyError("of mine")

    with pytest.raises(KeyError, match="of mine"):
        hire.transform(broken).pack(params, TOKEN)


def test_rules_go_to_a_path_of_pathlib(packed, tmp_path):
    hire.save_rules(packed.rules, tmp_path / "rules.json")
    assert hire.load_rules(tmp_path / "rules.json") == packed.rules


WRITTEN = {
    "save_rules": (lambda plan, changes, path: hire.save_rules([hire.Head()], path), ".json"),
    "diff": (lambda plan, changes, path: changes.save(path), ".html"),
    "diff as JSON": (lambda plan, changes, path: changes.to_json(path), ".json"),
    "plan": (lambda plan, changes, path: plan.to_json(path), ".json"),
    "draw": (lambda plan, changes, path: plan.draw(path), ".svg"),
}


@pytest.fixture(scope="module")
def small():
    """The plan and the diff of a function in which nothing is rewritten."""
    step = hire.transform(lambda w, x: x @ w, on_miss="ignore")
    args = jnp.ones((8, 8)), jnp.ones((1, 8))
    return step.plan(*args), step.diff(*args)


@pytest.mark.parametrize("what", WRITTEN)
def test_a_path_that_cannot_be_written_is_told_of(small, what, tmp_path):
    write, ending = WRITTEN[what]
    if what == "draw":
        pytest.importorskip("matplotlib")
    (tmp_path / f"folder{ending}").mkdir()
    for path in (f"missing/x{ending}", f"folder{ending}", f"{'x' * 300}{ending}"):
        with pytest.raises(hire.HireRewriteError, match=r"x|folder"):
            write(*small, tmp_path / path)
    for path in (f"a\0b{ending}", 5, "gs://bucket/x.json"):
        with pytest.raises(hire.HireRewriteError):
            write(*small, path)
    assert [path.name for path in tmp_path.iterdir()] == [f"folder{ending}"]


def test_no_path_is_told_of(small):
    with pytest.raises(hire.HireRewriteError, match="NoneType"):
        small[1].save(None)
    with pytest.raises(hire.HireRewriteError, match="NoneType"):
        small[0].draw(None)
    with pytest.raises(hire.HireRewriteError, match="NoneType"):
        hire.save_rules([], None)


def test_rules_that_were_there_stay_until_others_are_complete(tmp_path, monkeypatch):
    path, link = tmp_path / "rules.json", tmp_path / "link.json"
    link.symlink_to("rules.json")
    path.touch()
    path.chmod(0o600)
    hire.save_rules([hire.Head(k=4)], link)
    assert path.stat().st_mode & 0o777 == 0o600

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(hire.HireRewriteError, match="No space left"):
            hire.save_rules([hire.Head(k=8)], path)
    assert hire.load_rules(path) == (hire.Head(k=4),)
    assert {*tmp_path.iterdir()} == {path, link}
    assert link.is_symlink()


def test_a_pipe_is_written_to(tmp_path):
    """Not replaced, as /dev/null is not either."""
    os.mkfifo(tmp_path / "pipe")
    read = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    hire.save_rules([hire.Head(k=4)], tmp_path / "pipe")
    assert b"Head" in os.read(read, 10_000)
    os.close(read)
    hire.save_rules([hire.Head(k=4)], os.devnull)


@pytest.mark.parametrize(
    "text", [b"\xff\xfe", b"[" * 100_000, b"{", b"5", b"{}", b'[{"type": "Nope"}]']
)
def test_a_file_of_something_else_has_no_rules(tmp_path, text):
    (tmp_path / "rules.json").write_bytes(text)
    with pytest.raises(hire.HireRewriteError, match=r"load_rules: (there is no|.*holds no rules)"):
        hire.load_rules(tmp_path / "rules.json")


class Module:
    """A module as of a library whose fields are leaves, whatever they are."""

    def __init__(self, w, rate, quiet):
        self.w, self.rate, self.quiet = w, rate, quiet


jax.tree_util.register_pytree_with_keys(
    Module,
    lambda m: (
        tuple((jax.tree_util.GetAttrKey(n), getattr(m, n)) for n in ("w", "rate", "quiet")),
        None,
    ),
    lambda _, leaves: Module(*leaves),
)


def dropped(module, x):
    y = x @ module.w
    return y if module.quiet else y * module.rate


@pytest.mark.parametrize("layers", [lambda m: m, lambda m: {"layers": [m, m]}])
def test_the_field_whose_value_is_needed_is_named(layers):
    module = layers(Module(jnp.ones((D, D)), 0.1, True))
    fn = lambda model, x: dropped(model if isinstance(model, Module) else model["layers"][1], x)  # noqa: E731
    with pytest.raises(hire.HireRewriteError, match="quiet") as caught:
        hire.inspect(fn, module, jnp.ones((1, D)))
    assert "rate" not in str(caught.value)
    assert "layers/0" not in str(caught.value)


def test_a_field_that_is_not_an_array_is_named():
    module = Module(jnp.ones((D, D)), "a name", True)
    with pytest.raises(hire.HireRewriteError, match=r"model/rate is a str.*eqx\.partition"):
        hire.inspect(lambda model, x: x @ model.w, module, jnp.ones((1, D)))


def test_an_argument_whose_value_is_needed_is_closed_over():
    with pytest.raises(hire.HireRewriteError, match="of flag: close over it"):
        hire.inspect(lambda w, x, flag: x @ w if flag else x, jnp.ones((D, D)), jnp.ones(D), True)
