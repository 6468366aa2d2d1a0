"""Operations on no tokens, and on a number of tokens that is a symbol when they are exported."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import close, run
from tests.ops.cases import normal
from tests.ops.every import EVERY, D

MANY = 11  # a size that nothing else has
SOME = (
    *("scores", "encodings", "gathered float32", "greatest", "block, plain", "block, selecting"),
    *("block, predicted", "head, plain", "head, certified", "head, cascade"),
)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", EVERY)
def test_no_tokens(name):
    fn = EVERY[name]()
    got, many = run(fn, jnp.zeros((0, D))), jax.eval_shape(fn, jnp.zeros((MANY, D)))
    for leaf, other in zip(jax.tree.leaves(got), jax.tree.leaves(many), strict=True):
        assert leaf.shape == tuple(0 if size == MANY else size for size in other.shape)
        assert leaf.dtype == other.dtype
        assert not np.isnan(np.asarray(leaf, np.float32)).any()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", SOME)
def test_a_number_of_tokens_that_is_a_symbol(name):
    fn = EVERY[name]()
    (tokens,) = jax.export.symbolic_shape("tokens")
    exported = jax.export.export(jax.jit(fn))(jax.ShapeDtypeStruct((tokens, D), jnp.float32))
    for count in (1, 3):
        x = normal(7, count, D)
        close(run(exported.call, x), run(fn, x), 1e-3)
