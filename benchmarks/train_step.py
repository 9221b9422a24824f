"""A training step against torch, eager and compiled, on the same model and batch, interleaved in one run.

    pip install -e '.[parity]'
    python benchmarks/train_step.py [--case 10m ...] [--precision bfloat16 float32] [--rounds 5] [--json FILE]

Ours is a whole `aurora train` on real text with every step logged; it is stopped (SIGSTOP) while torch runs and goes
on (SIGCONT) after. Torch's is transformers' model with float32 masters, autocast and fused AdamW on random tokens of
the same shape, and nothing beside the step. Rates are medians over rounds; a round's ratio is of its own two
neighbours. The peak is the best of large matrix products in that precision, by either side, in the same run.
Without AVX-512 or AMX torch has no bfloat16 kernels (75 s for a step that takes 2.5 s in float32): such a machine
is measured in float32 unless --precision asks.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from sides import Training, in_turns, language_config
from torch_peer import KINDS, Work, torch_side

from aurora_train.machine.profile import cpu_model


@dataclass(frozen=True)
class Case:
    """One model and batch. `vocabulary` None is bytes. `seconds`: how long each side runs in a round."""

    width: int
    layers: int
    heads: int
    sequence: int
    batch: int
    vocabulary: int | None = None
    llama: bool = False
    seconds: float = 12.0

    @property
    def model(self) -> dict:
        """The `model` section of a config."""
        shape = {"width": self.width, "layers": self.layers, "heads": self.heads, "max_length": self.sequence}
        if self.llama:
            return shape | {"kv_heads": self.heads // 2, "activation": "swiglu", "mlp_width": 1408, "tied": True}
        gpt = {"norm": "layernorm", "activation": "gelu_tanh", "positions": "learned", "bias": "all", "tied": True}
        return shape | {"mlp_width": 4 * self.width} | gpt

    def config(self, precision: str) -> dict:
        """A whole config."""
        rows = {"sequence": self.sequence, "batch": self.batch, "vocabulary": self.vocabulary}
        return language_config(self.model, precision=precision, **rows)

    def work(self, precision: str, kind: str) -> Work:
        """The same for torch, whose bytes have no separator."""
        return Work(self.model, self.vocabulary or 256, self.sequence, self.batch, precision, kind)


CASES = {
    "0.8m": Case(128, 4, 4, 64, 12, seconds=4.0),
    "10m": Case(384, 6, 6, 256, 16),
    "30m": Case(512, 8, 8, 512, 8, 8192, seconds=20.0),
    "30m-v32k": Case(512, 8, 8, 512, 8, 32000, seconds=20.0),
    "llama-30m": Case(512, 8, 8, 512, 8, 8192, llama=True, seconds=20.0),
}


class Ours(Training):
    """An `aurora train` that is stopped but when asked to run."""

    def __init__(self, case: Case, precision: str, folder: Path, environment=None):
        super().__init__(case.config(precision), folder, environment)
        self.wait(3)
        self._process.send_signal(signal.SIGSTOP)

    def run(self, seconds: float) -> float:
        """Seconds a step, the median of those between two records of this round."""
        before = len(self.records())
        self._process.send_signal(signal.SIGCONT)
        time.sleep(seconds)
        self.wait(before + 4)
        self._process.send_signal(signal.SIGSTOP)
        times = [record["time"] for record in self.records()[before + 1 :]]  # the first waited for the last round's end
        return statistics.median(b - a for a, b in zip(times, times[1:], strict=False))


def matmul_peak(precision: str) -> float:
    """FLOP/s of the best large product of jax and torch, each in a process of its own."""
    ours = (
        "from aurora_train.tools.calibrate import matmul_seconds as s;"
        f"print(max(2*w**3/s(w, '{precision}', 1.5) for w in (1024, 1536, 2048)))"
    )
    theirs = (
        "import torch, time\nbest = 0\n"
        f"for w in (1024, 1536, 2048):\n a = torch.randn(w, w, dtype=torch.{precision})\n"
        " for _ in range(8):\n  t = time.perf_counter(); a @ a; best = max(best, 2*w**3/(time.perf_counter()-t))\n"
        "print(best)"
    )
    rates = []
    for code in (ours, theirs):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        rates.append(float(done.stdout.split()[-1]))
    return max(rates)


def measure(name: str, precision: str, rounds: int) -> dict:
    """One row: medians in seconds a step, ratios (theirs over ours: above 1 we are faster), peak memory in bytes."""
    case, peers = CASES[name], {}
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(case, precision, Path(folder))
        try:
            peers = {kind: torch_side(case.work(precision, kind)) for kind in KINDS}
            found = in_turns(ours, peers, case.seconds, rounds)
            memory = {"ours": ours.peak_rss()} | {kind: peer.peak_rss() for kind, peer in peers.items()}
        finally:
            ours.close()
            for peer in peers.values():
                peer.close()
    return found | {
        "case": name, "precision": precision, "peak_rss": memory, "peak_flops": matmul_peak(precision),
        "flops": step_flops(case),
    }  # fmt: skip


def step_flops(case: Case) -> float:
    """Model FLOPs of a step: 6 a weight of a product and token; causal attention once (half of T x T)."""
    heads = case.heads // 2 if case.llama else case.heads
    attention = 2 * case.width**2 * (1 + heads / case.heads)
    mlp = 3 * case.width * 1408 if case.llama else 8 * case.width**2
    weights = case.layers * (attention + mlp) + case.width * (case.vocabulary or 256)
    tokens = case.batch * case.sequence
    return tokens * (6 * weights + 6 * case.layers * case.sequence * case.width)


def row(found: dict) -> str:
    """One line of the table."""
    seconds, share = found["seconds"], found["flops"] / found["seconds"]["ours"] / found["peak_flops"]
    spread = f"{min(found['ratios']):.2f} to {max(found['ratios']):.2f}"
    told = [f"{seconds[side] * 1e3:.1f} ms" for side in ("ours", *KINDS)]
    told += [f"**{found['ratio']:.2f}** ({spread})", f"{share:.0%} of {found['peak_flops'] / 1e9:.0f} GFLOP/s"]
    told += [" / ".join(f"{found['peak_rss'][side] / 1e9:.2f}" for side in ("ours", found["best"])) + " GB"]
    return f"| {found['case']} | {found['precision']} | {' | '.join(told)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--precision", nargs="*", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the rows here too")
    options = parser.parse_args()
    flags = Path("/proc/cpuinfo").read_text()
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags]
    precisions = options.precision or (["bfloat16", "float32"] if "avx512f" in wide else ["float32"])
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores, {' '.join(wide)}; {options.rounds} rounds\n")
    print("| case | precision | ours | torch eager | torch compiled | ratio to the best | of the peak | peak RSS |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for name in options.case:
        for precision in precisions:
            rows.append(measure(name, precision, options.rounds))
            print(row(rows[-1]), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
