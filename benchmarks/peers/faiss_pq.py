"""faiss: product quantization with 4-bit codes (fast scan), and exact products of the best.

One query is searched by one thread; so that it has all cores, the rows lie in as many shards.
"""

from __future__ import annotations

import time

import faiss
import numpy as np

from benchmarks.peers import THREADS, TOP, Found, Side, columns

TRAINED = 32_768  # rows that the code books are fitted to

faiss.omp_set_num_threads(THREADS)


def head(rows: np.ndarray) -> Side:
    began = time.perf_counter()
    n, d = rows.shape
    codes = d // columns(d)
    first = faiss.IndexPQFastScan(d, codes, 4, faiss.METRIC_INNER_PRODUCT)
    first.train(rows[:: max(1, n // TRAINED)])
    coded = faiss.IndexShards(d, True, True)
    shards = [first, *(faiss.clone_index(first) for _ in range(THREADS - 1))]
    for shard in shards:
        coded.add_shard(shard)
    whole = faiss.IndexRefineFlat(coded)
    whole.add(rows)

    def search(queries: np.ndarray, candidates: int | None) -> Found:
        if candidates is None:
            return coded.search(queries, TOP)
        whole.k_factor = candidates / TOP
        return whole.search(queries, TOP)

    side = Side(
        f"faiss PQ{codes}x4 + refine",
        search,
        lambda queries, count: coded.search(queries, count)[1],
        lambda candidates: n * codes // 2 + (candidates or 0) * d * 4,
        most=64,
        setup_s=time.perf_counter() - began,
    )
    object.__setattr__(side, "kept", (shards, coded, whole))  # faiss holds no references
    return side
