"""ScaNN: asymmetric hashing, and exact products of the best.

Its anisotropic loss is left out: on these heads it recalled no more (512 of 32,768 × 2,048: 0.990
of the 64 greatest either way), and took four times as long to build.
"""

from __future__ import annotations

import math
import time

import numpy as np
from scann.scann_ops.py import scann_ops_pybind

from benchmarks.peers import THREADS, TOP, Found, Side, columns

FIRST = 1024  # candidates, if it is not told how many
TRAINED = 8192  # rows that the code books are fitted to


def head(rows: np.ndarray) -> Side:
    began = time.perf_counter()
    n, d = rows.shape
    builder = scann_ops_pybind.builder(rows, TOP, "dot_product")
    builder = builder.set_n_training_threads(THREADS)
    builder = builder.score_ah(
        columns(d), anisotropic_quantization_threshold=math.nan, training_sample_size=TRAINED
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
        f"ScaNN, {columns(d)} columns a code, + reorder",
        search,
        None,
        lambda candidates: n * d // columns(d) // 2 + (candidates or FIRST) * d * 4,
        most=64,
        setup_s=time.perf_counter() - began,
    )
