"""It stays home: a run makes no connection to anywhere, and needs no network at all."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from kit import losses

TINY = """recipe: language_model
model: {{width: 16, layers: 1, heads: 2}}
data: {{source: {corpus}, sequence: 16, holdout_test: 0.2, holdout_validation: 0.2}}
train: {{steps: 2, batch: 4}}
memory: {{unroll: false}}
evaluate: {{examples: 8, baselines: false}}
samples: {{count: 0}}
"""


def train(before, tmp_path, corpus):
    (tmp_path / "tiny.yaml").write_text(TINY.format(corpus=corpus))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "JAX_", "DO_NOT"))}
    environment |= {"AURORA_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*before, sys.executable, "-m", "aurora_train.cli.main", "train", "tiny.yaml", "--run", "run", "--quiet"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2]


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, to see what the process connects to")
def test_a_run_makes_no_internet_connection_and_sends_no_packet(tmp_path, corpus):
    trace = tmp_path / "trace"
    train(["strace", "-f", "-qq", "-o", str(trace), "-e", "trace=connect,sendto,sendmsg,sendmmsg"], tmp_path, corpus)
    internet = [line for line in trace.read_text().splitlines() if re.search(r"AF_INET6?\b", line)]
    outside = [line for line in internet if not re.search(r'"(127\.|::1")', line)]
    assert outside == []


def can_unshare():
    return shutil.which("unshare") and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_unshare(), reason="needs unshare -n, to cut the network")
def test_a_run_needs_no_network(tmp_path, corpus):
    train(["unshare", "-n"], tmp_path, corpus)
