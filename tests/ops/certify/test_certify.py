"""Proofs of the greatest logits: never wrong, whatever the predictor, the data or the order."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.certify import proof as certify
from hire_rewrite.ops.certify import rounding
from hire_rewrite.ops.certify.dense import dense_error
from hire_rewrite.ops.certify.head import certified
from hire_rewrite.ops.certify.monotone import Chain
from hire_rewrite.ops.head.head import HeadSpec, HeadState, dense_head, hire_head
from hire_rewrite.ops.predictors import LowRank, Quantized
from tests.ops.cases import Oracle, normal

V, D = 200, 24
F32, PLAIN = jnp.dtype("float32"), Chain(None, True, 2.0**-24)


@dataclasses.dataclass(frozen=True)
class Stub:
    """Scores off by `error` in the given direction, with the bound that it claims."""

    error: float = 0.0
    claims: float = float("inf")
    useless: bool = False

    wants_calibration = False
    certifies = True

    def check(self, n, d, *, site="", tokens=None):
        pass

    def fit(self, rows, moments=None):
        return {"rows": rows.astype(jnp.float32)}

    def score(self, state, x, layer, choose=None):
        exact = x.astype(jnp.float32) @ state["rows"][layer].T
        if self.useless:
            return jnp.zeros_like(exact) + jnp.arange(exact.shape[1])
        return exact + self.error

    def bytes(self, n, d, dtype, tokens=1):
        return 0

    def fit_bound(self, rows, state):
        return {"norm": rounding.norms(rows)}

    def bound(self, state, extra, x, layer):
        return jnp.full((x.shape[0], extra["norm"].shape[1]), self.claims, jnp.float32)


def state_of(rows, predictor):
    rows = jnp.asarray(rows)
    state = jax.vmap(predictor.fit)(rows)
    return HeadState(rows, state, jax.vmap(predictor.fit_bound)(rows, state))


def spec_of(certify=1, dtype="float32", **changes):
    settings = {"width": V, "k": 4, "candidates": 20, "tail": "predicted", **changes}
    dtype = jnp.dtype(dtype)
    return HeadSpec(
        **settings, out_dtype=dtype, precision=None, compute_dtype=dtype, certify=certify
    )


def raw(z):
    return (z,)


@functools.partial(jax.jit, static_argnames=("spec", "endpoints", "predictor"))
def run(x, state, spec, endpoints=raw, predictor=Quantized()):
    return certified(x, state, 0, spec=spec, endpoints=endpoints, predictor=predictor)


@functools.partial(jax.jit, static_argnames=("spec", "endpoints"))
def dense(x, state, spec, endpoints=raw):
    return dense_head(x, state, 0, spec=spec, endpoints=endpoints)


def order_of(values, c=1):
    """The c greatest of each row, ties in the order of their places."""
    return np.argsort(-np.asarray(values, np.float64), axis=-1, kind="stable")[:, :c]


def sums(products):
    """Sums in f32 of products: f32[..., d] in several orders, some of them as bad as can be."""
    ascending = np.sort(products, -1)
    orders = [products, products[..., ::-1], ascending, ascending[..., ::-1]]
    found = [np.cumsum(order, -1, dtype=np.float32)[..., -1] for order in orders]
    halves = products
    while halves.shape[-1] > 1:
        halves = np.pad(halves, [(0, 0)] * (halves.ndim - 1) + [(0, halves.shape[-1] % 2)])
        halves = halves[..., ::2] + halves[..., 1::2]
    return np.stack([*found, halves[..., 0]])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1.0, 1e-3, 1e-5, 3e-6, 1e-6, 1e-7, 0.0]))
def test_a_proof_holds_in_every_order(seed, nearness):
    """Another row that is nearly the best one: the closer, the less can be proved."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((1, V, D)).astype(np.float32)
    x = (rng.standard_normal((2, D)) + 1).astype(np.float32)
    best = order_of(x[:1] @ rows[0].T)[0, 0]
    rows[0, (best + 50) % V] = rows[0, best] * np.float32(1 - nearness)
    state = state_of(rows, Quantized())
    (got,), proved = run(x, state, spec_of())
    np.testing.assert_array_equal(order_of(got), order_of(dense(x, state, spec_of())[0]))
    orders = sums(x[:, None] * rows)
    for token in np.flatnonzero(proved):
        winner = int(np.argmax(got[token]))
        worst = orders[:, token, winner].min()
        others = np.delete(orders[:, token].max(0), winner).max()
        assert worst > others


def test_what_is_far_apart_is_proved_and_what_is_equal_is_not():
    rows = np.array(normal(0, 1, V, D))
    x = np.asarray(normal(1, 1, D)) + 1
    (got,), proved = run(x, state_of(rows, Quantized()), spec_of())
    assert proved.all()
    best = int(np.argmax(got))
    rows[0, (best + 50) % V] = rows[0, best]
    state = state_of(rows, Quantized())
    (got,), proved = run(x, state, spec_of())
    assert not proved.any()
    np.testing.assert_array_equal(got, dense(x, state, spec_of())[0])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("d", [1, 7, 300, 5000])
@pytest.mark.parametrize("kind", ["mixed", "positive", "heavy"])
def test_the_dense_product_is_within_its_bound(d, kind):
    rng = np.random.default_rng(d)
    x, w = rng.standard_normal((2, 40, d)).astype(np.float32)
    if kind == "positive":
        x, w = np.abs(x), np.abs(w)
    if kind == "heavy":
        w *= (10.0 ** rng.uniform(-6, 2, w.shape)).astype(np.float32)
    exact = (x.astype(np.float64) * w).sum(-1)
    error = np.abs(sums(x * w) - exact).max(0)
    positive, negative, _ = rounding.signed_sums(jnp.asarray(x * w))
    lengths, norms = rounding.norms(jnp.asarray(x)), rounding.norms(jnp.asarray(w))
    slack = dense_error(d, F32, None, lengths, norms)
    tight = slack.of(rounding.at_least(positive), rounding.at_least(negative))
    assert (error <= tight).all()
    assert (tight <= 1.0001 * slack.below(lengths, norms)).all()
    assert (tight <= 1.01 * (d + 1) * 2.0**-24 * np.abs(x.astype(np.float64) * w).sum(-1)).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from(["float32", "bfloat16"]))
def test_a_useless_predictor_costs_time_and_nothing_else(seed, useless, dtype):
    rows = normal(seed, 1, V, D, dtype=dtype)
    x = normal(seed + 1, 3, D, dtype=dtype)
    predictor = Stub(useless=useless)
    state = state_of(rows, predictor)
    (got,), proved = run(x, state, spec_of(dtype=dtype), predictor=predictor)
    assert not proved.any()
    np.testing.assert_array_equal(got, dense(x, state, spec_of(dtype=dtype))[0])


@pytest.mark.parametrize(("claims", "sure"), [(9.99, True), (10.01, False), (np.nan, False)])
def test_a_row_just_below_and_just_above_the_winner(claims, sure):
    """Logits are 0, 1, 2, ...: of 20 candidates the greatest is 199, and 179 is no candidate."""
    rows = np.zeros((1, V, D), np.float32)
    rows[0, :, 3] = np.arange(V)
    rows[0, -1, 3] = 189.0  # and the last is 10 more than the greatest that is no candidate
    rows[0, 180:-1, 3] = 188.0
    x = np.zeros((1, D), np.float32)
    x[0, 3] = 1.0
    predictor = Stub(claims=claims)
    (got,), proved = run(x, state_of(rows, predictor), spec_of(), predictor=predictor)
    assert proved.all() == sure
    assert int(np.argmax(got)) == V - 1


def test_the_dense_sums_of_other_rows_count_as_well():
    """A coordinate that all rows have at zero: only a bound by norms is known of it."""
    rows = np.zeros((1, V, D), np.float32)
    rows[0, :, 3] = np.arange(V)
    x = np.zeros((2, D), np.float32)
    x[:, 3], x[1, 5] = 1.0, 1e6
    predictor = Stub(claims=1.0)
    _, proved = run(x, state_of(rows, predictor), spec_of(), predictor=predictor)
    np.testing.assert_array_equal(proved, [True, False])


@pytest.mark.parametrize("c", [1, 3, 4])
def test_the_order_of_the_greatest_is_proved(c):
    rows, x = normal(0, 1, V, D), normal(1, 50, D)
    state, spec = state_of(rows, Quantized()), spec_of(c)
    (got,), proved = run(x, state, spec)
    assert proved.mean() > 0.5
    np.testing.assert_array_equal(order_of(got, c), order_of(dense(x, state, spec)[0], c))


def test_a_tie_further_down_matters_if_it_is_to_be_proved():
    rows, x = np.array(normal(0, 1, V, D)), normal(1, 1, D)
    _, second, third = order_of(x @ rows[0].T, 3)[0]
    rows[0, third] = rows[0, second]
    state = state_of(rows, Quantized())
    assert [bool(run(x, state, spec_of(c))[1][0]) for c in (1, 2, 3)] == [True, False, False]


SIGNS = np.where(np.arange(V) % 2, 1.0, -1.0).astype(np.float32)
MASKED = np.arange(V) < 150
BIAS = np.asarray(normal(3, V)) * 5
ENDPOINTS = {
    "bias": lambda z: (z + BIAS,),
    "mask": lambda z: (jnp.where(MASKED, z, -jnp.inf),),
    "signs": lambda z: (z * SIGNS,),
    "cap": lambda z: (30.0 * jnp.tanh(z / 30.0),),
    "two": lambda z: (z, -2.0 * z),
    "widened": lambda z: (z.astype(jnp.float32) / 0.7,),
    "cut": lambda z: (jnp.where(MASKED, z, -jnp.inf)[:, :150],),
    "noise": lambda z: (z + jax.random.gumbel(jax.random.key(0), z.shape, z.dtype),),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ENDPOINTS)
def test_code_behind_the_logits(name, dtype):
    endpoints = ENDPOINTS[name]
    state = state_of(normal(0, 1, V, D, dtype=dtype), Quantized())
    x, spec = normal(1, 60, D, dtype=dtype), spec_of(dtype=dtype)
    got, proved = run(x, state, spec, endpoints)
    assert proved.mean() > (0.8 if dtype == "float32" else 0.2)
    for one, other in zip(got, dense(x, state, spec, endpoints), strict=True):
        np.testing.assert_array_equal(order_of(one), order_of(other))


def test_a_saturated_cap_is_not_proved():
    state, x = state_of(100 * normal(0, 1, V, D), Quantized()), 100 * normal(1, 2, D)
    spec = spec_of()
    endpoints = ENDPOINTS["cap"]
    (got,), proved = run(x, state, spec, endpoints)
    assert not proved.any()
    np.testing.assert_array_equal(got, dense(x, state, spec, endpoints)[0])


def test_fewer_unmasked_values_than_are_to_be_proved():
    endpoints = one_row
    state, x = state_of(normal(0, 1, V, D), Quantized()), normal(1, 2, D)
    assert run(x, state, spec_of(1), endpoints)[1].all()
    (got,), proved = run(x, state, spec_of(2), endpoints)
    assert not proved.any()
    np.testing.assert_array_equal(np.argmax(got, -1), [7, 7])


def one_row(z):
    return (jnp.where(jnp.arange(V) == 7, z, -jnp.inf),)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_finite_falls_back_alone(value):
    rows, x = normal(0, 1, V, D), np.array(normal(1, 4, D))
    state, spec = state_of(rows, Quantized()), spec_of()
    (clean,), sure = run(x, state, spec)
    assert sure.all()
    x[2, 5] = value
    (got,), proved = run(x, state, spec)
    np.testing.assert_array_equal(proved, [True, True, False, True])
    others = np.array([0, 1, 3])
    np.testing.assert_array_equal(got[others], clean[others])
    np.testing.assert_array_equal(got[2], dense(x, state, spec)[0][2])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_proves_nothing(value):
    rows = np.array(normal(0, 1, V, D))
    rows[0, 9, 2] = value
    state, x = state_of(rows, Quantized()), normal(1, 2, D)
    (got,), proved = run(x, state, spec_of())
    assert not proved.any()
    np.testing.assert_array_equal(got, dense(x, state, spec_of())[0])


def test_rounded_logits_that_tie():
    """In bfloat16 257 is 256: one is greatest before it is rounded, the other comes first."""
    rows = np.zeros((1, V, D), np.float32)
    rows[0, :, 0] = -np.arange(V)
    rows[0, [3, 120], 0] = 256.0
    rows[0, 120, 1] = 1.0
    x = np.zeros((1, D), np.float32)
    x[0, :2] = 1.0
    rows, x = jnp.asarray(rows, jnp.bfloat16), jnp.asarray(x, jnp.bfloat16)
    state, spec = state_of(rows, Quantized()), spec_of(dtype="bfloat16")
    (got,), proved = run(x, state, spec)
    assert not proved.any()
    np.testing.assert_array_equal(got, dense(x, state, spec)[0])


def test_the_tail_asked_for_is_there_with_and_without_proof():
    rows, x = np.array(normal(0, 1, V, D)), np.array(normal(1, 2, D))
    best = int(np.argmax(x[0] @ rows[0].T))
    rows[0, (best + 50) % V] = rows[0, best]
    state, spec = state_of(rows, Quantized()), spec_of(tail="-inf")
    (got,), proved = run(x, state, spec)
    np.testing.assert_array_equal(proved, [False, True])
    np.testing.assert_array_equal(np.isfinite(got).sum(1), [20, 20])


def test_full_budget_is_dense_and_proved():
    state, x = state_of(normal(0, 1, V, D), Quantized()), normal(1, 2, D)
    spec = spec_of(candidates=V)
    (got,), proved = run(x, state, spec)
    assert proved.all()
    np.testing.assert_array_equal(got, dense(x, state, spec)[0])


def test_many_tokens_layers_vmap_and_gradients():
    rows, x = normal(0, 2, V, D), normal(1, 40, D)
    state, spec = state_of(rows, Quantized()), spec_of()

    def head(x, layer):
        return hire_head(x, state, layer, spec=spec, endpoints=raw, predictor=Quantized())[0]

    got = jax.jit(head)(x, 1)
    want = np.asarray(x) @ np.asarray(rows[1]).T
    np.testing.assert_array_equal(order_of(got), order_of(want))
    mapped = jax.jit(jax.vmap(lambda token: head(token[None], 1)[0]))(x[:3])
    np.testing.assert_array_equal(order_of(mapped), order_of(want[:3]))
    slope = jax.jit(jax.grad(lambda x: head(x, 1).max()))(x[:1])
    np.testing.assert_allclose(slope[0], rows[1, order_of(want)[0, 0]], rtol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("predictor", [Quantized(), Quantized(4, 8)])
def test_it_lowers_for_every_platform(platform, predictor):
    state, x = state_of(normal(0, 1, V, D), predictor), normal(1, 2, D)
    run.trace(x, state, spec_of(), predictor=predictor).lower(lowering_platforms=(platform,))


def test_bounds_elsewhere_are_wider():
    """What is supposed of other backends covers rounded operands and sums that are cut off."""
    lengths, norms = jnp.ones((1, 1)), jnp.ones(3)
    here = dense_error(D, F32, None, lengths, norms).below(lengths, norms)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "platform", lambda cpu, other: jnp.float32(other))
        there = dense_error(D, F32, None, lengths, norms).below(lengths, norms)
        bf16 = dense_error(D, jnp.bfloat16, None, lengths, norms).below(lengths, norms)
    assert (there > 2.0**-7).all()
    assert ((bf16 > 3.9 * here) & (bf16 < 5 * here)).all()


@pytest.mark.parametrize(
    ("predictor", "endpoints", "message"),
    [
        (LowRank(8), raw, r"certify: LowRank\(rank=8\) has no bound .*give Quantized"),
        (Oracle(), raw, "has no bound"),
        (Quantized(), lambda z: (z * z,), "certify: mul of logits .*leave certify out"),
    ],
)
def test_what_cannot_be_proved(predictor, endpoints, message):
    rows = normal(0, 1, V, D)
    state = HeadState(rows, jax.vmap(predictor.fit)(rows))
    with pytest.raises(HireRewriteError, match=message):
        run(normal(1, 2, D), state, spec_of(), endpoints, predictor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"certify": 5}, "certify=5 of k=4"),
        ({"certify": -1}, "certify=-1"),
        ({"out_dtype": jnp.dtype("float16")}, "float16 cannot be certified"),
        ({"compute_dtype": jnp.dtype("int8")}, "a product of int8"),
        ({"precision": jax.lax.DotAlgorithmPreset.BF16_BF16_F32}, "precision=.* is not known"),
    ],
)
def test_a_spec_that_cannot_be_certified(changes, message):
    with pytest.raises(HireRewriteError, match=message):
        dataclasses.replace(spec_of(), **changes)


def test_ends_of_narrow_logits_are_rounded_even_if_the_model_widens_them():
    """Compilers leave out casts to and fro; dense logits may have been rounded all the same."""
    spec = spec_of(dtype="bfloat16")

    @jax.jit
    def ends(middle):
        low, high = certify.enclose(middle, jnp.zeros_like(middle), spec, PLAIN)
        return [end.astype(jnp.float32) for end in (low, high)]

    for end in ends(jnp.float32(257.0)):
        assert end in (256.0, 258.0)
    assert ends.lower(jnp.float32(0.0)).as_text().count("reduce_precision") == 2


def test_infinite_values_stay_so_when_widened():
    chain = Chain(None, False, 2.0**-24)
    values = jnp.array([-jnp.inf, 1.0, jnp.inf])
    low, high = certify.widen(values, values, chain)
    np.testing.assert_array_equal(np.isinf(low), [True, False, True])
    assert low[1] < 1.0 < high[1]
    assert not np.isnan(np.stack([low, high])).any()
