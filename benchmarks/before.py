"""This checkout against an earlier commit of the project, interleaved in one run: steps, and warm starts.

    python benchmarks/before.py COMMIT [--case 10m 30m] [--precision float32 bfloat16] [--rounds 5] [--starts 7]

Both sides are whole `aurora train` processes of one environment, whose PYTHONPATH names the checkout. For the steps,
one is stopped (SIGSTOP) while the other runs. A start is `aurora train quickstart` with data and compiled programs in
its side's own cache, until the first record of its log. A round's ratio is of its two neighbours; above 1, this
checkout is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import tempfile
from datetime import date
from pathlib import Path

from startup import trained
from train_step import CASES, Ours

from aurora_train.machine.profile import cpu_model

HERE = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def checkout(commit: str):
    """The folder of a temporary worktree of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "before"
        subprocess.run(["git", "-C", HERE, "worktree", "add", "-q", "--detach", there, commit], check=True)
        try:
            yield there
        finally:
            subprocess.run(["git", "-C", HERE, "worktree", "remove", "--force", there], check=True)


def of(root: Path, folder: Path) -> dict[str, str]:
    """The environment in which `python -m aurora_train` is that of a checkout, with a cache of its own."""
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    # PYTHONSAFEPATH: otherwise `python -m` would import what lies in the current folder.
    return {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "AURORA_CACHE": str(folder / f"cache-{root.name}")}


def steps(name: str, precision: str, rounds: int, before: Path) -> tuple[list[float], list[float]]:
    """Seconds a step in each round: (this checkout, the earlier commit)."""
    with tempfile.TemporaryDirectory() as top:
        sides = []
        try:
            for root in (HERE, before):
                folder = Path(top) / f"side-{root.name}"
                folder.mkdir()
                sides.append(Ours(CASES[name], precision, folder, of(root, Path(top))))
            rows = [[side.run(CASES[name].seconds) for side in sides] for _ in range(rounds)]
        finally:
            for side in sides:
                side.close()
    return tuple(map(list, zip(*rows, strict=True)))


def starts(rounds: int, before: Path) -> tuple[list[float], list[float]]:
    """Seconds of a warm start to the first logged step, as `steps`. The first start of each side fills its cache."""
    arguments = ["train", "quickstart", "log.every=1", "evaluate.every=null"]
    with tempfile.TemporaryDirectory() as top:
        folder, rows = Path(top), []
        for _ in range(rounds + 1):
            seconds = []
            for root in (HERE, before):
                run = folder / f"run-{root.name}"
                seconds.append(trained([*arguments, "--run", str(run)], run, **of(root, folder)))
                shutil.rmtree(run)
            rows.append(seconds)
    return tuple(map(list, zip(*rows[1:], strict=True)))


def row(what: str, ours: list[float], theirs: list[float]) -> str:
    """One line of the table."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    times = " | ".join(f"{statistics.median(side):.3f}" for side in (ours, theirs))
    return f"| {what} | {times} | **{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--case", nargs="*", choices=CASES, default=["10m", "30m"])
    parser.add_argument("--precision", nargs="*", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=7, help="rounds of warm starts; 0: none")
    asked = parser.parse_args()
    print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores; against {asked.commit}\n")
    print("| what | here, s | before, s | ratio, median (spread) |\n|---|---|---|---|")
    with checkout(asked.commit) as before:
        if asked.starts:
            print(row("warm start of quickstart", *starts(asked.starts, before)), flush=True)
        for name in asked.case:
            for precision in asked.precision:
                print(row(f"step, {name}, {precision}", *steps(name, precision, asked.rounds, before)), flush=True)


if __name__ == "__main__":
    main()
