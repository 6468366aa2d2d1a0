"""ScaNN: asymmetric hashing of pairs of columns, and exact products of the best."""

from __future__ import annotations

import time

import numpy as np
from scann.scann_ops.py import scann_ops_pybind

from benchmarks.peers import THREADS, TOP, Found, Side

COLUMNS = 2  # that share a code
FIRST = 1024  # candidates, if it is not told how many
THRESHOLD = 0.2


def head(rows: np.ndarray) -> Side:
    began = time.perf_counter()
    n, d = rows.shape
    builder = scann_ops_pybind.builder(rows, TOP, "dot_product")
    builder = builder.set_n_training_threads(THREADS)
    builder = builder.score_ah(
        COLUMNS, anisotropic_quantization_threshold=THRESHOLD, training_sample_size=32_768
    )
    searcher = builder.reorder(FIRST).build()
    searcher.set_num_threads(THREADS)

    def search(queries: np.ndarray, candidates: int | None) -> Found:
        many = FIRST if candidates is None else candidates
        if len(queries) == 1:
            found, values = searcher.search(queries[0], TOP, many)
            return values[None], found[None]
        found, values = searcher.search_batched_parallel(queries, TOP, many)
        return values, found

    return Side(
        f"ScaNN, {COLUMNS} columns a code, + reorder",
        search,
        None,
        lambda candidates: n * d // COLUMNS // 2 + (candidates or FIRST) * d * 4,
        most=64,
        setup_s=time.perf_counter() - began,
    )
