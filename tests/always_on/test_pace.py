"""Who makes the others of a run wait is found by what each process measures of itself."""

import pytest

from aurora_train.always_on.pace import stragglers


def figures(waited=0.01, product=0.002):
    return {"waited": waited, "step": 1.0, "product": product}


@pytest.mark.parametrize(
    ("mine", "what"),
    [
        (figures(), []),
        (figures(waited=0.05), []),  # five times as long as the others, and no matter in a step of a second
        (figures(waited=0.4), ["waits for its data"]),
        (figures(product=0.0028), []),
        (figures(product=0.004), ["multiplies"]),
    ],
)
def test_the_process_that_makes_the_others_wait_is_found(mine, what):
    found = stragglers({0: figures(), 1: mine, 2: figures()})
    assert [(process, kind) for process, kind, *_ in found] == [(1, kind) for kind in what]


def test_of_two_processes_the_slower_one_is_found():
    assert [one[0] for one in stragglers({0: figures(product=0.005), 1: figures()})] == [0]
