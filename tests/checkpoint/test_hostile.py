"""Damaged and hostile checkpoints (`benchmarks.reliability_checkpoints` has thousands)."""

import json
import os
import random
import resource
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from benchmarks.reliability_checkpoints import (
    OF_A_DIRECTORY,
    OF_A_FILE,
    edit_description,
    saved,
    trial,
)
from hire_rewrite.checkpoint.bounded import parse
from hire_rewrite.checkpoint.metadata import checksummed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("orbax.checkpoint")
    return saved(tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("place", [0, 1])
def test_damage_is_refused_or_does_not_matter(checkpoint, place):
    step, packed, places = checkpoint
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    damages = (OF_A_FILE, OF_A_DIRECTORY)[place]
    for number in range(6):
        for name, damage in damages.items():
            found = trial(step, packed, places[place], damage, random.Random(number))
            assert found in ("refused", "same"), (name, number)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 256 * 1024  # kilobytes


@pytest.mark.parametrize("place", [0, 1])
def test_a_flipped_bit_among_the_numbers_is_seen(checkpoint, place, tmp_path):
    """Also the very last one."""
    step, packed, places = checkpoint

    def last(path, rng):
        file = path if path.is_file() else path / "arrays" / "000000" / "0"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    assert trial(step, packed, places[place], last, random.Random(0)) == "refused"


def test_damage_that_is_not_looked_for_is_found(checkpoint):
    """The trial itself: without checksums a flipped bit is other numbers. (A directory has none if
    several processes wrote it; a file without them is refused.)"""
    step, packed, (file, folder) = checkpoint

    def without_checksums(path, rng):
        def edit(told):
            for array in told["arrays"]:
                array["crc32"] = None

        if path.is_file():
            rewrite(path, edit)
        else:
            told = json.loads((path / "packed.json").read_bytes())
            del told["checksum"]
            edit(told)
            (path / "packed.json").write_bytes(checksummed(told))
        held = path if path.is_file() else path / "arrays" / "000000" / "0"
        data = bytearray(held.read_bytes())
        data[-1] ^= 1
        held.write_bytes(data)

    rng = random.Random(0)
    assert trial(step, packed, folder, without_checksums, rng).startswith("other numbers")
    assert trial(step, packed, file, without_checksums, rng) == "refused"


def rewrite(path, edit):
    """A description that is edited, with a right checksum."""
    from benchmarks import reliability_checkpoints as reliability

    def edited(told, rng):
        edit(told)
        return told

    before, reliability.edited = reliability.edited, edited
    try:
        edit_description(path, random.Random(0))
    finally:
        reliability.edited = before


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda told: told.update(version="9.9.0"), "written by hire_rewrite '9.9.0'"),
        (lambda told: told.update(format=0), "format 0"),
        (lambda told: told["rules"][0].update(path="(a+)+$"), "for one layer"),
        (lambda told: told["rules"][0].update(path="{0..99999999}"), "for one layer"),
        (lambda told: told["rules"][0].update(path="(" * 2000 + ")" * 2000), "for one layer"),
        (lambda told: told["rules"][0].update(path="x{" + "9" * 4000 + "}"), "for one layer"),
        (lambda told: told["origin"].update(call={"tree": {"tuple": [None, None]}}), "arguments"),
        (lambda told: told["origin"].update(call={"tree": None}), "give them"),
        (lambda told: told["origin"]["call"]["tree"]["tuple"].append(None), "arguments"),
        (
            lambda told: told["origin"]["call"]["tree"]["tuple"].__setitem__(
                1, {"dict": [[1, None]]}
            ),
            "arguments",
        ),
        (
            lambda told: told["origin"].update(
                call={"tree": {"dict": [["a", {"leaf": [[1], "int8", False]}], [1, None]]}}
            ),
            "damaged",
        ),
        (lambda told: told["rules"][0].update(type="Popen"), "there is no Popen"),
        (lambda told: told["sites"].pop(), "another function"),
        (lambda told: told["sites"][0].update(layout="()"), "stored otherwise"),
        (lambda told: told["sites"][0].update(key="0" * 16), "another function"),
    ],
)
def test_what_is_wrong_is_said(checkpoint, tmp_path, edit, said):
    step, packed, _ = checkpoint
    path = tmp_path / "p.safetensors"
    packed.save(path)
    rewrite(path, edit)
    with pytest.raises(hire.HireRewriteError, match=said):
        hire.Packed.load(path, step)


def test_huge_shapes_are_not_believed(checkpoint, tmp_path):
    """Nothing is traced for them: a loop over them, or a table, would not end."""
    step, packed, _ = checkpoint
    path = tmp_path / "p.safetensors"
    packed.save(path)

    def edit(told):
        told["origin"]["call"]["tree"]["tuple"][0]["tuple"][0]["leaf"][0] = [2**40, 32]

    rewrite(path, edit)
    with pytest.raises(hire.HireRewriteError, match="1099511627776 numbers"):
        hire.Packed.load(path, step)


@pytest.mark.parametrize(
    ("shape", "said"),
    [((5000,), "5000 numbers along"), ((2**19,), "524288"), ((300, 300, 300), "27000000 numbers")],
)
def test_a_long_call_is_not_traced_at_the_word_of_a_small_file(tmp_path, shape, said):
    """A model's own Python may make a mask of the square."""
    traced = []

    def decode(params, tokens):
        traced.append(tokens.shape)
        length = tokens.shape[0]
        mask = np.tril(np.ones((length, length), bool))
        x = params["embed"][tokens]
        return jnp.where(mask, x @ x.T, 0) @ x @ params["embed"].T

    params = {"embed": jnp.asarray(np.random.default_rng(0).normal(size=(256, 16)), jnp.float32)}
    step = hire.transform(decode, hire.Head(k=4, min_width=1, force=True), on_miss="ignore")
    tokens = jnp.arange(8)
    path = tmp_path / "p.safetensors"
    step.pack(params, tokens).save(path)
    assert hire.Packed.load(path, step).sites

    def edit(told):
        told["origin"]["call"]["tree"]["tuple"][0]["tuple"][0]["leaf"][0] = list(shape)

    rewrite(path, edit)
    traced.clear()
    with pytest.raises(hire.HireRewriteError, match=f"{said}.*give the arguments"):
        hire.Packed.load(path, step)
    assert not traced
    assert hire.Packed.load(path, step, params, tokens).sites


@pytest.mark.parametrize(
    "text", [b'"' + b'\\"' * 1_000_000, b'["' * 500_000, b'"' + b"\\" * 1_000_001]
)
def test_a_text_that_never_ends_is_refused_at_once(text):
    """Its time grows as its length: not in hours, as it would if each quote began a search."""
    with pytest.raises(hire.HireRewriteError):
        parse(text, "here")


@pytest.mark.parametrize("name", ["packed", "packed/arrays", "packed/arrays/000000"])
def test_what_lies_elsewhere_is_not_read(checkpoint, tmp_path, name):
    step, _, places = checkpoint
    shutil.copytree(places[1], tmp_path / "packed")
    assert hire.Packed.load(tmp_path / "packed", step)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    if name == "packed":  # the user's own link
        assert hire.Packed.load(tmp_path / name, step)
        return
    with pytest.raises(hire.HireRewriteError, match="is a link"):
        hire.Packed.load(tmp_path / "packed", step)


def test_what_no_one_writes_to_is_not_waited_for(checkpoint, tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(hire.HireRewriteError, match="not a regular file"):
        hire.Packed.load(tmp_path / "pipe.safetensors", checkpoint[0])
    for name in (tmp_path / "pipe.json", "/dev/zero"):
        with pytest.raises(hire.HireRewriteError, match="not a regular file"):
            hire.load_rules(name)
