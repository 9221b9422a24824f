"""What is freed is kept for the next step: counted in page faults of a real process."""

import os
import subprocess
import sys

import pytest

from aurora_train.machine import allocator

_CHURN = """
import resource, sys
from aurora_train.machine.allocator import keep_freed_memory
kept = keep_freed_memory([]) if sys.argv[1] == "kept" else False
import numpy as np
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    for size in (5, 30):
        np.ones(size * 2**18, np.float32)
step(); step()
before = faults()
for _ in range(4):
    step()
print(kept, (faults() - before) // 4)
"""


def _faults(word, **more):
    names = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    env = {name: value for name, value in os.environ.items() if not name.startswith(names)} | more
    done = subprocess.run([sys.executable, "-c", _CHURN, word], env=env, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_step_after_the_first_faults_no_page():
    kept, few = _faults("kept")
    if not kept:
        pytest.skip("another libc")
    assert few < 50
    assert _faults("plain")[1] > 100 * max(few, 1)


def test_what_the_user_set_up_is_left_alone():
    assert not _faults("kept", MALLOC_ARENA_MAX="2")[0]
    assert not _faults("kept", GLIBC_TUNABLES="glibc.malloc.check=0")[0]


def test_nothing_is_done_beside_a_gpu():
    assert not allocator.keep_freed_memory(["NVIDIA H200"])
