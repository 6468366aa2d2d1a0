"""Of the refusals of two kinds the one that says more is kept."""

from hire_rewrite.patterns.refusal import NoMatch, Refusal, closer


def refusal(kind, matched=1, *, intended=False):
    return NoMatch(kind, kind.value, node=None, matched=matched, intended=intended)


def test_the_only_one():
    miss = refusal(Refusal.TOO_NARROW)
    assert closer(None, miss) is miss


def test_the_kind_that_was_meant():
    block, head = refusal(Refusal.LOW_RANK, 9), refusal(Refusal.CONTRACTED, intended=True)
    assert closer(block, head) is head
    assert closer(head, block) is head


def test_the_one_that_got_further():
    near, far = refusal(Refusal.READ_ELSEWHERE, 5), refusal(Refusal.TOO_NARROW, 1)
    assert closer(near, far) is near
    assert closer(far, near) is near


def test_both_where_neither_got_far():
    first, second = refusal(Refusal.FROM_OUTSIDE), refusal(Refusal.TOO_NARROW)
    both = closer(first, second)
    assert both.refusal is Refusal.FROM_OUTSIDE
    assert all(miss.reason in both.reason for miss in (first, second))
