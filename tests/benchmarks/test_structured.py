"""What is put together of real parts is spread as they are."""

import numpy as np
import pytest

from benchmarks.structured import draw_queries, draw_rows, outstanding


@pytest.fixture(scope="module")
def rows():
    """Rows of very different norms, with a spectrum that falls."""
    rng = np.random.default_rng(0)
    scale = 0.8 ** np.arange(16) * np.exp(rng.standard_normal((4000, 1)) / 2)
    return (rng.standard_normal((4000, 16)) * scale + 1).astype(np.float32)


def test_each_part_has_the_real_covariance_and_parts_are_independent(rows):
    drawn = draw_rows(rows, 20_000, 48, base=16)
    assert drawn.shape == (20_000, 48)
    wanted = np.cov(rows.T)
    for part in np.split(drawn, 3, axis=1):
        assert np.abs(np.cov(part.T) - wanted).max() < 0.1 * wanted.max()
    assert np.abs(np.cov(drawn.T)[:16, 16:]).max() < 0.1 * wanted.max()


def test_norms_differ_as_much_as_the_real_ones(rows):
    centered = rows - rows.mean(0)
    real, drawn = (
        np.linalg.norm(some, axis=1) for some in (centered, draw_rows(rows, 20_000, 64, base=16))
    )
    assert drawn.std() / drawn.mean() == pytest.approx(real.std() / real.mean(), rel=0.05)
    assert np.square(drawn).mean() == pytest.approx(4 * np.square(real).mean(), rel=0.05)


def test_parts_of_queries_are_real_ones():
    states = np.arange(40.0).reshape(8, 5)
    drawn = draw_queries(states, 100, 8, base=4)
    real = {tuple(state[:4]) for state in states}
    halves = [{tuple(part) for part in half} for half in np.split(drawn, 2, axis=1)]
    assert halves == [real, real]
    assert len(np.unique(drawn, axis=0)) > 40
    assert (draw_queries(states, 100, 8, base=4) == drawn).all()
    assert (draw_queries(states, 100, 8, seed=1, base=4) != drawn).any()


def test_only_multiples_can_be_drawn(rows):
    with pytest.raises(ValueError, match="24"):
        draw_queries(rows, 4, 24, base=16)


def test_outstanding():
    rows = np.zeros((400, 2), np.float32)
    rows[0], rows[1] = (20.0, 0.0), (10.0, 0.0)
    found = outstanding(rows, np.array([[1.0, 0.0]], np.float32))
    products = rows[:, 0]
    assert found["1"] == pytest.approx((20 - products.mean()) / products.std(), abs=1e-3)
    assert found["median gap"] == pytest.approx(10 / products.std(), abs=1e-3)
