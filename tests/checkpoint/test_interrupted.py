"""Saving that fails, or that others do at the same time, and reading what others replace."""

import os
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from hire_rewrite import files
from hire_rewrite.checkpoint import directory, one_file
from tests.cases import inputs, rand

D = 32
X = inputs(2, D)
RULE = hire.Linear(encoding=hire.Blocks(8), force=True)


def step_of(seed=0):
    step = hire.transform(lambda p, x: jnp.tanh(x @ p["w"]) * p["norm"], RULE)
    return step, step.pack({"w": rand(D, D, seed=seed), "norm": rand(1, D, seed=seed)}, X)


def test_a_file_that_is_replaced_while_it_is_read_is_read_whole(tmp_path, monkeypatch):
    place = tmp_path / "p.safetensors"
    step, packed = step_of()
    packed.save(place)
    want = step(packed, X)
    arrays = one_file.Reader.arrays

    def replaced(self, *args):
        step_of(seed=1)[1].save(place)
        return arrays(self, *args)

    monkeypatch.setattr(one_file.Reader, "arrays", replaced)
    np.testing.assert_array_equal(step(hire.Packed.load(place, step), X), want)


def test_a_file_has_the_rights_of_other_files_and_any_name(tmp_path):
    place, other = tmp_path / ("n" * 243 + ".safetensors"), tmp_path / "other"
    before = os.umask(0o027)
    try:
        step_of()[1].save(place)
        other.touch()
    finally:
        os.umask(before)
    assert place.stat().st_mode == other.stat().st_mode
    assert sorted(tmp_path.iterdir()) == sorted([place, other])


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["on_host", "checksummed"])
def test_a_directory_that_is_not_completed_is_removed(tmp_path, monkeypatch, where, error):
    pytest.importorskip("orbax.checkpoint")
    step, packed = step_of()
    calls = []

    def fail(*args):
        calls.append(args)
        if where == "on_host" or len(calls) > 1:  # the first is to see whether it can be written
            raise error
        return b"{}"

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["hire_rewrite.checkpoint.save"], where, fail)
        told = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else hire.HireRewriteError
        with pytest.raises(told, match=str(error)):
            packed.save(tmp_path / "p")
    assert not (tmp_path / "p").exists()
    packed.save(tmp_path / "p")
    np.testing.assert_array_equal(step(hire.Packed.load(tmp_path / "p", step), X), step(packed, X))


def test_of_several_that_save_to_one_directory_one_does(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    step, packed = step_of()
    ready, refused = threading.Barrier(4), []

    def save():
        ready.wait()
        try:
            packed.save(tmp_path / "p")
        except hire.HireRewriteError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3
    assert all("is there already" in text for text in refused)
    np.testing.assert_array_equal(step(hire.Packed.load(tmp_path / "p", step), X), step(packed, X))


def test_an_empty_directory_can_be_written_and_another_cannot(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    _, packed = step_of()
    (tmp_path / "empty").mkdir()
    packed.save(tmp_path / "empty")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes").touch()
    (tmp_path / "file").touch()
    for name in ("empty", "taken", "file"):
        before = sorted((tmp_path / name).rglob("*"))
        with pytest.raises(hire.HireRewriteError, match="is there already"):
            packed.save(tmp_path / name)
        assert sorted((tmp_path / name).rglob("*")) == before


NO_PATHS = [b"p.safetensors", 3, None, "a\0b.safetensors", "gs://a/b", "\ud800.safetensors"]


@pytest.mark.parametrize("path", NO_PATHS)
def test_paths_that_are_none(path):
    step, packed = step_of()
    with pytest.raises(hire.HireRewriteError, match="path"):
        packed.save(path)
    for load in (lambda path: hire.Packed.load(path, step), hire.load_rules):
        with pytest.raises(hire.HireRewriteError, match="path"):
            load(path)


def test_paths_where_nothing_can_be(tmp_path):
    step, packed = step_of()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for parent in ("file", "loop"):
        for name in ("p.safetensors", "p"):
            with pytest.raises(hire.HireRewriteError, match="save: "):
                packed.save(tmp_path / parent / name)
    for load in (lambda path: hire.Packed.load(path, step), hire.load_rules):
        for name in ("n" * 5000, "nowhere.json", "file/p.safetensors"):
            with pytest.raises(hire.HireRewriteError, match="was saved"):
                load(tmp_path / name)


def test_arrays_that_were_donated(tmp_path):
    step, params = step_of()[0], {"w": rand(D, D), "norm": rand(1, D)}
    packed = step.pack(params, X)
    params["norm"].delete()
    for use in (lambda: step(packed, X), lambda: packed.save(tmp_path / "p.safetensors")):
        with pytest.raises(hire.HireRewriteError, match="p/norm was deleted, or donated"):
            use()
    with pytest.raises(hire.HireRewriteError, match="p/norm was deleted, or donated"):
        step.pack(params, X)
    with pytest.raises(hire.HireRewriteError, match="p/norm was deleted, or donated"):
        packed.check(params)


def test_a_directory_to_which_threads_still_write_is_removed(tmp_path, monkeypatch):
    """As Orbax's do after an interrupt."""
    pytest.importorskip("orbax.checkpoint")
    step, packed = step_of()
    left = [*range(3)]

    def rmtree(path, **settings):
        removed(path, **settings)
        if left:
            left.pop()
            (path / "arrays").mkdir(parents=True)

    def fail(*args):
        raise KeyboardInterrupt

    removed = directory.shutil.rmtree
    with monkeypatch.context() as patched:
        patched.setattr(directory.shutil, "rmtree", rmtree)
        patched.setattr(directory, "_checkpointer", fail)
        with pytest.raises(KeyboardInterrupt):
            packed.save(tmp_path / "p")
    assert not (tmp_path / "p").exists()
    packed.save(tmp_path / "p")
    assert hire.Packed.load(tmp_path / "p", step).info == packed.info


def test_a_save_whose_process_was_killed_is_told_of(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    _, packed = step_of()
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / ".packed.json").touch()
    with pytest.raises(hire.HireRewriteError, match="interrupted or still runs: remove it"):
        packed.save(tmp_path / "p")


def test_what_killed_processes_leave_of_a_file_is_removed(tmp_path):
    """But not what another one is writing, or of another file."""
    place, other = tmp_path / "p.safetensors", tmp_path / "q.safetensors"
    parts = [Path(files._beside(str(path))) for path in (place, place, other)]
    for part in parts:
        part.touch()
    old, _, of_other = parts
    for part in (old, of_other):
        os.utime(part, (0, 0))
    with files.replacing(str(place)) as file:
        os.utime(file.name, (0, 0))
        step_of()[1].save(place)
        assert os.path.exists(file.name)
        file.write(b"last")
    assert place.read_bytes() == b"last"
    assert sorted(tmp_path.iterdir()) == sorted([place, *parts[1:]])
