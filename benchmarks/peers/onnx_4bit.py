"""onnxruntime's `MatMulNBits`: 4-bit weights, a scale for 32 columns, 8-bit inputs.

The refinement is part of the graph: the best candidates' rows are gathered, multiplied and ranked.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.peers import THREADS, TOP, Found, Side

BLOCK = 32
_STEP = 1 << 13  # rows that are quantized at a time


def head(rows: np.ndarray) -> Side:
    began = time.perf_counter()
    n, d = rows.shape
    session = _session(*quantize(rows), n, d)
    kept = onnxruntime.OrtValue.ortvalue_from_numpy(rows)
    only = onnxruntime.RunOptions()
    only.add_run_config_entry("log_severity_level", "3")
    only.only_execute_path_to_fetches = True

    def run(outputs: list[str], queries: np.ndarray, count: int) -> list[Any]:
        feed = {
            "x": onnxruntime.OrtValue.ortvalue_from_numpy(queries),
            "rows": kept,
            "count": onnxruntime.OrtValue.ortvalue_from_numpy(np.array([count], np.int64)),
        }
        return [one.numpy() for one in session.run_with_ort_values(outputs, feed, only)]

    def search(queries: np.ndarray, candidates: int | None) -> Found:
        if candidates is None:
            values, found = run(["guessed", "found"], queries, TOP)
            return values, found
        values, best, found = run(["values", "best", "found"], queries, candidates)
        return values, np.take_along_axis(found, best, 1)

    return Side(
        "onnxruntime 4-bit",
        search,
        lambda queries, count: run(["found"], queries, count)[0],
        lambda candidates: n * d // 2 + n * d // BLOCK * 4 + (candidates or 0) * d * 4,
        lambda queries: run(["logits"], queries, TOP)[0],
        setup_s=time.perf_counter() - began,
    )


def quantize(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u8[n, d / 32, 16], two numbers to a byte and the first in the low bits, and f32[n, d / 32].

    A number q stands for (q − 8) · scale; the greatest of a block in magnitude is −8 scales, so
    that it is exact.
    """
    n, d = rows.shape
    packed = np.empty((n, d // BLOCK, BLOCK // 2), np.uint8)
    scales = np.empty((n, d // BLOCK), np.float32)
    for start in range(0, n, _STEP):
        part = rows[start : start + _STEP].reshape(-1, d // BLOCK, BLOCK)
        place = np.abs(part).argmax(-1)[..., None]
        scale = np.take_along_axis(part, place, -1) / -8
        steps = part / np.where(scale == 0, 1, scale)
        numbers = np.clip(np.rint(steps) + 8, 0, 15).astype(np.uint8)
        packed[start : start + _STEP] = numbers[..., ::2] | (numbers[..., 1::2] << 4)
        scales[start : start + _STEP] = scale[..., 0]
    return packed, scales


def _session(packed: np.ndarray, scales: np.ndarray, n: int, d: int) -> Any:
    product = helper.make_node(
        "MatMulNBits",
        ["x", "packed", "scales"],
        ["logits"],
        domain="com.microsoft",
        K=d,
        N=n,
        bits=4,
        block_size=BLOCK,
        accuracy_level=4,
    )
    nodes = [
        product,
        helper.make_node("TopK", ["logits", "count"], ["guessed", "found"]),
        helper.make_node("Gather", ["rows", "found"], ["fetched"], axis=0),
        helper.make_node("Unsqueeze", ["x", "two"], ["column"]),
        helper.make_node("MatMul", ["fetched", "column"], ["products"]),
        helper.make_node("Squeeze", ["products", "two"], ["exact"]),
        helper.make_node("TopK", ["exact", "top"], ["values", "best"]),
    ]
    made = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "head",
        [
            made("x", TensorProto.FLOAT, ["tokens", d]),
            made("rows", TensorProto.FLOAT, [n, d]),
            made("count", TensorProto.INT64, [1]),
        ],
        [
            made("logits", TensorProto.FLOAT, None),
            made("guessed", TensorProto.FLOAT, None),
            made("found", TensorProto.INT64, None),
            made("values", TensorProto.FLOAT, None),
            made("best", TensorProto.INT64, None),
        ],
        [
            numpy_helper.from_array(packed, "packed"),
            numpy_helper.from_array(scales.reshape(-1), "scales"),
            numpy_helper.from_array(np.array([2], np.int64), "two"),
            numpy_helper.from_array(np.array([TOP], np.int64), "top"),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
