"""Drawn rows and queries are spread as those they were taken from."""

import jax
import numpy as np
import pytest

from benchmarks.structured import Spread, outstanding


@pytest.fixture(scope="module")
def real():
    """Rows of very different norms and queries with a mean, both with a spectrum that falls."""
    rng = np.random.default_rng(0)
    scale = 0.8 ** np.arange(16)
    mixed = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    norms = np.exp(rng.standard_normal((4000, 1)) / 2)
    rows = (rng.standard_normal((4000, 16)) * scale) @ mixed * norms
    queries = rng.standard_normal((4000, 16)) * scale[::-1] + np.arange(16) / 8
    return rows.astype(np.float32), queries.astype(np.float32)


def test_each_part_has_the_real_covariance_and_mean(real):
    spread = Spread.of(*real)
    rows = spread.draw_rows(jax.random.key(0), 20_000, 48)
    queries = spread.draw_queries(jax.random.key(1), 20_000, 48)
    assert rows.shape == queries.shape == (20_000, 48)
    for drawn, given in ((rows, real[0] - real[0].mean(0)), (queries, real[1])):
        wanted = np.cov(given.T)
        for part in np.split(drawn, 3, axis=1):
            assert np.abs(np.cov(part.T) - wanted).max() < 0.06 * np.abs(wanted).max()
    np.testing.assert_allclose(queries.mean(0), np.tile(real[1].mean(0), 3), atol=0.05)
    between = np.cov(queries.T)[:16, 16:32]
    assert np.abs(between).max() < 0.03


def test_eigenvalues_stand_as_often_as_there_are_parts(real):
    spread = Spread.of(*real)
    drawn = spread.draw_queries(jax.random.key(1), 20_000, 64)
    values = np.linalg.eigvalsh(np.cov(drawn.T))[::-1]
    single = np.linalg.eigvalsh(np.cov(real[1].T))[::-1]
    np.testing.assert_allclose(values.reshape(16, 4).mean(1), single, rtol=0.1)


def test_norms_are_as_different_as_the_real_ones(real):
    drawn = Spread.of(*real).draw_rows(jax.random.key(0), 20_000, 160)
    norms = np.linalg.norm(drawn, axis=1)
    plain = np.exp(np.random.default_rng(1).standard_normal(20_000) / 2)
    assert norms.std() / norms.mean() == pytest.approx(plain.std() / plain.mean(), rel=0.25)


def test_only_multiples_can_be_drawn(real):
    with pytest.raises(ValueError, match="no multiple"):
        Spread.of(*real).draw_queries(jax.random.key(0), 4, 24)


def test_outstanding():
    rows = np.zeros((400, 2), np.float32)
    rows[0], rows[1] = (20.0, 0.0), (10.0, 0.0)
    found = outstanding(rows, np.array([[1.0, 0.0]], np.float32))
    products = rows[:, 0]
    assert found["1"] == pytest.approx((20 - products.mean()) / products.std(), abs=1e-3)
    assert found["median gap"] == pytest.approx(10 / products.std(), abs=1e-3)
