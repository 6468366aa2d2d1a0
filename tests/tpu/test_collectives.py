"""Programs of the real TPU compiler: what goes between chips, and over which groups."""

import re

import pytest

pytest.importorskip("libtpu")

from benchmarks import tpu
from benchmarks.collectives import collectives

TOPOLOGIES = list(tpu.TOPOLOGIES)
READABLE = [topology for topology in TOPOLOGIES if topology not in tpu.UNREAD]
ALL_LOGITS = tpu.BATCH * tpu.VOCABULARY * 4


def text_of(topology: str, name: str) -> str:
    mesh = tpu.mesh_of(topology)
    return tpu.compiled(tpu.searches(mesh)[name], tpu.logits(mesh))


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", ["da_top_k, exact", "da_top_k, 0.99", "da_top_k, 0.99, butterfly"])
def test_a_search_sends_a_hundredth_of_all_logits(topology, name):
    found = collectives(text_of(topology, name))
    assert found
    assert sum(one.bytes for one in found) <= ALL_LOGITS / 100


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_lower_target_sends_less_than_the_compilers_own_search(topology):
    own = sum(one.bytes for one in collectives(text_of(topology, "lax.top_k")))
    few = collectives(text_of(topology, "da_top_k, 0.99"))
    assert sum(one.bytes for one in few if not one.branch) < own
    assert any(one.branch for one in few)


def test_a_butterfly_permutes_and_a_gather_gathers():
    kinds = {
        name: {one.kind for one in collectives(text_of("v5e:2x2", name))}
        for name in ("da_top_k, 0.99", "da_top_k, 0.99, butterfly")
    }
    assert kinds["da_top_k, 0.99"] == {"all-gather", "all-reduce"}
    assert kinds["da_top_k, 0.99, butterfly"] == {"collective-permute", "all-reduce"}


def test_the_groups_are_those_of_the_axes():
    (gather,) = collectives(text_of("v5e:2x2", "da_top_k, exact"))
    assert re.search(r"replica_groups=\{\{0,1,2,3\}\}", gather.text)
    # 4 lists of 64 pairs of 8 bytes for each of 8 rows
    assert gather.bytes == 4 * 64 * 8 * 8


@pytest.mark.parametrize("topology", tpu.UNREAD)
@pytest.mark.parametrize("name", ["head", "block", "step"])
def test_what_cannot_be_read_compiles(topology, name):
    function, args = getattr(tpu, name)(tpu.mesh_of(topology))
    assert tpu.program(*tpu.rewritten(function, args)) is not None


@pytest.mark.parametrize("topology", READABLE)
@pytest.mark.parametrize("name", ["head", "block", "step"])
def test_nothing_as_large_as_a_shard_of_a_weight(topology, name):
    mesh = tpu.mesh_of(topology)
    function, args = getattr(tpu, name)(mesh)
    found = collectives(tpu.compiled(*tpu.rewritten(function, args)))
    least = {"head": 2048 * tpu.VOCABULARY, "block": 2048 * 8192, "step": 1024 * 4096}[name]
    assert found
    assert max(one.bytes for one in found) < least * 2 / mesh.size
    assert all(one.bytes < ALL_LOGITS / 100 for one in found)


@pytest.mark.parametrize("topology", READABLE)
def test_a_block_adds_up_what_the_dense_one_does(topology):
    function, args = tpu.block(tpu.mesh_of(topology))
    dense = collectives(tpu.compiled(function, *args))
    mine = collectives(tpu.compiled(*tpu.rewritten(function, args)))
    assert [(one.kind, one.bytes) for one in mine] == [(one.kind, one.bytes) for one in dense]
