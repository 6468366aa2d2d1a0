"""The page of benchmarks, from small results."""

import json

import pytest

from benchmarks import page, peers, timing

MACHINE = {"processor": "a chip", "cores": 2, "jax": "0.10.2", "python": "3.11.9"}
TIMES = {"median ms": 4.0, "spread": 0.1, "ratio": 2.5, "bytes": 8_000_000, "floor ms": 2.0}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)

    def add(name, result):
        whole = {"command": f"python -m benchmarks.{name}", "machine": MACHINE, **result}
        (tmp_path / f"{name}.json").write_text(json.dumps(whole))

    return add


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_heads(results):
    rows = [
        {"side": "jax logits", "ours": False, "tokens": 1, **TIMES},
        {"side": "LowRank(256)", "ours": True, "tokens": 1, "candidates": 512, "reached": True,
         "recall": [1.0, 0.9912], "logits ms": 3.0, "logits ratio": 3.3, "setup s": 9.0, **TIMES},
        {"side": "faiss", "ours": False, "tokens": 1, "candidates": 64, "reached": False,
         "recall": [0.9, 0.5], "setup s": 1.0, **TIMES},
    ]  # fmt: skip
    head = {
        "what": "head 8 × 2, drawn",
        "queries": 1024,
        "outstanding": {"1": 5.0, "2": 4.0, "16": 3.0, "64": 2.0, "median gap": 0.3},
        "read_gb_s": 20.0,
        "jax logits ms": {"before": 4.1, "beside": 4.0},
        "missing": {"ScaNN": "not installed (No module named 'scann')"},
        "rows": rows,
    }
    goal = {"greatest": 0.999, "64 greatest": 0.99}
    results("head", {"goal": goal, "libraries": {"torch": "2.13.0"}, "heads": [head]})
    text = list(page.lines())
    (own,) = [cells(line) for line in text if "LowRank" in line]
    assert own == ["**`LowRank(256)`**", "512", "1.0000", "0.9912", "4.00", "10%", "2.5 ×", "8",
                   "2.00", "2.0", "3.00 ms, 3.3 ×", "9.0"]  # fmt: skip
    (other,) = [cells(line) for line in text if line.startswith("| faiss")]
    assert other[:4] == ["faiss *", "64", "0.9000", "0.5000"]
    assert any("ScaNN: not installed" in line for line in text)
    assert any("took 4.1 ms before" in line for line in text)
    assert any("jax 0.10.2, torch 2.13.0:" in line for line in text)
    widths = {len(cells(line)) for line in text if line.startswith("|")}
    assert widths == {12}


def test_blocks(results):
    rows = [
        {"side": "jax f32", "ours": False, "tokens": 4, **TIMES},
        {"side": "torch int8", "ours": False, "tokens": 4, "error to dense": 0.1, **TIMES},
        {"side": "Quantized(8)", "ours": True, "tokens": 4, "k": 5, "candidates": 9,
         "recall": 0.991, "reached": True, "error to top k": 0.001, **TIMES},
    ]  # fmt: skip
    block = {"what": "gated FFN 2 / 8, drawn", "measured tokens": 1024, "share of squares": 0.8,
             "read_gb_s": 20.0, "missing": {}, "rows": rows}  # fmt: skip
    results("ffn", {"k": 0.05, "goal": 0.99, "blocks": [block]})
    found = [cells(line) for line in page.lines() if line.startswith("|")]
    assert {len(row) for row in found} == {11}
    assert found[-1][:4] == ["**`Quantized(8)`**", "5", "9", "0.9910"]
    assert [row[-1] for row in found[2:]] == ["", "10.00%", "0.10%"]


def test_decode_and_estimate(results):
    row = {
        "batch": 1,
        "way": "FFN of 5 %",
        "sites": "head rewritten",
        "floor ms": 20.0,
        "dense ms": 160.0,
        "rewritten ms": 40.0,
        "by hand ms": 39.0,
        "torch f32 ms": 120.0,
        "spread": 0.05,
        "times dense": 4.0,
        "times by hand": 0.975,
        "times torch f32": 3.0,
    }
    rules, packing = {"FFN of 5 %": ["FFN(k=0.05)"]}, {"FFN of 5 %": 200.2}
    results("decode_1b", {"layers": 16, "rules": rules, "packing s": packing, "rows": [row]})
    sites = [
        {
            "what": "head",
            "tokens": tokens,
            "predictor": "Quantized(4)",
            "expected": 1.2,
            "measured": measured,
            "sign": sign,
        }
        for tokens, measured, sign in ((1, 2.0, "right"), (4, 0.8, "wrong"))
    ]
    results("estimate", {"expected on": "cpu", "rows": sites})
    text = list(page.lines())
    found = [cells(line) for line in text if line.startswith("| FFN of 5 %")]
    assert found == [
        [
            "FFN of 5 %",
            "1",
            "160.0",
            "40.0",
            "5%",
            "20.0",
            "**4.00 ×**",
            "39.0, 0.975 ×",
            "120.0, 3.00 ×",
            "head rewritten",
        ]
    ]
    assert "* FFN of 5 %: `FFN(k=0.05)`" in text
    assert any("Packing: FFN of 5 % 200 s." in line for line in text)
    assert any(line.startswith("2 sites, all rewritten: for 1 the plan is right") for line in text)
    assert [cells(line) for line in text if line.startswith("| head")] == [
        ["head", "4", "`Quantized(4)`", "1.20 ×", "0.80 ×", "wrong"]
    ]


def test_smollm2(results):
    times = {"spread": 0.04, "floor_ms": 15.0}
    said = {"kl": {"code": 0.5, "all": 0.25}, "same_token": {"all": 0.9}, "perplexity": {"all": 12}}
    sides = {
        "dense": {"median_ms": 60.0, "ratio": 1.0, "bytes": 538e6, **times},
        "all in 8 bits": {"median_ms": 16.0, "ratio": 3.7, "bytes": 140e6, **times, **said},
    }
    prompts = {
        str(length): {
            "dense": {"median_ms": 2.0 * length, "ratio": 1.0, "rewritten": 0, "packed": 0},
            "all in 8 bits": {"median_ms": length, "ratio": 2.0, "rewritten": 7, "packed": 8},
        }
        for length in (128, 512)
    }
    missing = {"llama.cpp": "not installed"}
    results("smollm2_step", {"sides": sides, "missing": missing, "prompts": prompts})
    text = list(page.lines())
    rows = [cells(line) for line in text if line.startswith("|")]
    assert rows[2][-3:] == ["", "", ""]
    assert rows[3] == ["all in 8 bits", "16.0", "62.5", "4%", "**3.70 ×**", "140", "15.0",
                       "0.2500", "90.0%", "12.00"]  # fmt: skip
    assert "\nllama.cpp: not installed." in text
    assert rows[-4] == ["", "128 tokens", "512 tokens"]
    assert rows[-1] == ["all in 8 bits", "128, **2.00 ×**, 7 of 8", "512, **2.00 ×**, 7 of 8"]


def test_gemma3(results):
    dense = {"median_ms": 80.0, "ratio": 1.0, "bytes": 1072e6, "spread": 0.04, "floor_ms": 40.0}
    exact = {"sites": 7, "bytes_before": 1072e6, "bytes_after": 350e6}
    tensor = {"tensor": "down", "count": 9, "file_bytes": 6.6e6, "together": None}
    grids = [
        {**tensor, "type": "Q4_K", "bytes": 8.8e6, "encoding": "Blocks(bits=4)"},
        {**tensor, "type": "Q6_K", "bytes": 47.2e6, "encoding": None},
    ]
    step = {"without rules": exact, "sides": {"dense": dense}, "missing": {}}
    results("gemma3", {"grids": grids, "step": step})
    text = list(page.lines())
    rows = [cells(line) for line in text if line.startswith("|")]
    assert rows[2][:3] == ["dense", "80.0", "12.5"]
    assert rows[-2] == ["down", "Q4_K", "9", "6.6", "8.8", "`Blocks(bits=4)`", "float32"]
    assert rows[-1] == ["down", "Q6_K", "9", "6.6", "47.2", "float32", "float32"]
    assert any("(Q4_K, Q6_K)" in line and "1072 MB become 350 MB" in line for line in text)


def test_products(results):
    about = {"n": 8, "d": 4, "tokens": 1, "error": "0.01", **TIMES}
    rows = [{"side": side, "ours": side == "8 bits", **about} for side in ("jax", "8 bits")]
    results("products", {"kernels": "in use", "rows": rows, "missing": {"torch int8": "no wheel"}})
    lines = list(page.lines())
    (own,) = (line for line in lines if "8 bits" in line)
    assert cells(own)[:4] == ["**8 bits**", "4.00", "10%", "2.5 ×"]
    assert cells(own)[-2:] == ["2.0", "0.01"]
    assert any("torch int8: no wheel" in line for line in lines)


def test_top_k_and_overhead(results):
    rows = [
        {"n": 8192, "k": 64, "side": side, "median ms": ms, "recall": share}
        for side, ms, share in (("lax.top_k", 0.05, 1.0), ("ours", 0.02, 0.5))
    ]
    results("top_k", {"kernels": "in use", "rows": rows})
    call = {"us": 99.0, "least us": 90.0, "spread": 0.1, "above plain us": 9.0, "above jit us": 4.0}
    results(
        "overhead",
        {"model": "m", "goal us": 30.0, "per call": {"hire: bare": call}, "once ms": {"trace": 2}},
    )
    text = list(page.lines())
    assert "| 8,192 | 64 | 0.050 | 0.020 (0.500) |" in text
    assert "| hire: bare | 99.0 | 90.0 | 10% | 9.0 | 4.0 |" in text
    assert "\nOnce, in milliseconds: trace 2." in text


def test_nothing_measured(results):
    assert not any(line.startswith(("|", "\n##")) for line in page.lines())


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(peers.MODULES, "some", "no_such_module")
    assert peers.build("head", "some").startswith("not installed (No module")


def test_a_library_that_fails_says_how(monkeypatch):
    monkeypatch.setitem(peers.MODULES, "some", "__init__")
    assert peers.build("no_such_function", "some").startswith("failed (")
