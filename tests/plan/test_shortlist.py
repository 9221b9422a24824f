"""What is compiled next: the plan that may be expected to save most, and never one that is known."""

from hypothesis import given
from hypothesis import strategies as st

from aurora_train.plan.search import Candidate
from aurora_train.plan.shortlist import Shortlist


def candidate(size: int, seconds: float, microbatch: int = 4) -> Candidate:
    return Candidate(microbatch, 8 // microbatch, {"a": []}, size, seconds, 0)


CANDIDATES = st.lists(
    st.builds(candidate, st.integers(10**6, 10**9), st.floats(1e-3, 1e3), st.sampled_from([1, 2, 4, 8])),
    min_size=2, max_size=20,
)  # fmt: skip


@given(CANDIDATES, st.integers(10**6, 10**9), st.data())
def test_what_is_promising_may_fit_is_faster_than_the_best_and_not_known(candidates, budget, data):
    shortlist = Shortlist(candidates, budget)
    known = data.draw(st.lists(st.sampled_from(candidates), max_size=3, unique_by=id))
    for c in known:
        shortlist.learn(c, c.bytes + 3000)
    best = data.draw(st.sampled_from(candidates))
    found = shortlist.most_promising(best)
    if found is None:
        rivals = [c for c in candidates if c.seconds < best.seconds and not shortlist.is_compiled(c)]
        assert all(shortlist.expected(c) > budget for c in rivals)
        return
    assert found.seconds < best.seconds
    assert not any(found is c for c in known) and shortlist.promise(found, best) > 0


def test_of_two_that_surely_fit_the_faster_and_of_two_as_fast_the_surer_is_promising():
    slow, fast, tight = candidate(10**8, 2.0), candidate(2 * 10**8, 1.0), candidate(10**9 - 10**6, 0.99)
    assert Shortlist([slow, fast], 10**9).most_promising(None) is fast
    assert Shortlist([slow, fast, tight], 10**9).most_promising(slow) is fast  # 1 % more at even odds is worth less
    assert Shortlist([slow, tight], 10**9).most_promising(None, sure=0.97) is slow


def test_a_compilation_corrects_the_plans_near_it():
    near, same, far = candidate(10**8, 3.0), candidate(101 * 10**6, 2.0), candidate(10**8, 1.0, microbatch=1)
    shortlist = Shortlist([near, same, far], 10**9)
    shortlist.learn(near, 13 * 10**7)
    assert [shortlist.expected(c) for c in (near, same, far)] == [13 * 10**7, 131 * 10**6, 13 * 10**7]
    shortlist.learn(far, 9 * 10**7)
    assert [shortlist.expected(c) for c in (near, same, far)] == [13 * 10**7, 131 * 10**6, 9 * 10**7]
    assert shortlist.is_compiled(far) and shortlist.is_compiled(near) and not shortlist.is_compiled(same)
