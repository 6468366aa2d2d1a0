"""What a search finds, and how many candidates it needs."""

import numpy as np
import pytest

from benchmarks import recall

WANTED = np.array([[3, 1], [0, 2]])


def test_recall():
    assert recall.recall(np.array([[1, 3, 0], [2, 5, 4]]), WANTED) == (0.5, 0.75)
    assert recall.recall(WANTED, WANTED) == (1.0, 1.0)


def test_places():
    ordered = np.array([[1, 4, 3], [5, 0, 1]])
    assert recall.places(ordered, WANTED).tolist() == [[2, 0], [1, 3]]


def test_the_first_candidates_of_an_order_recall_what_a_search_among_them_does():
    rng = np.random.default_rng(0)
    ordered = np.stack([rng.permutation(50) for _ in range(20)])
    wanted = np.stack([rng.permutation(50)[:8] for _ in range(20)])
    found = recall.by_candidates(recall.places(ordered, wanted), (1, 10, 50))
    for count, got in found.items():
        assert got == pytest.approx(recall.recall(ordered[:, :count], wanted))
    assert found[50] == (1.0, 1.0)


def test_needed_stops_at_the_first_that_reaches_the_goal():
    asked = []

    def at(count):
        asked.append(count)
        return (1.0, count / 100)

    assert recall.needed(at, (50, 90, 99, 100), (0.999, 0.99)) == (99, (1.0, 0.99))
    assert asked == [50, 90, 99]
    assert recall.needed(at, (10, 20), (0.999, 0.99)) == (20, (1.0, 0.2))
