"""Training on one GPU against torch: tokens/s, MFU and peak memory from 125M to 8B, on the same card in the same call.

    pip install -e '.[cuda13,parity]'    # or cuda12; a torch of another environment: --torch-python
    python benchmarks/gpu.py                                         # all that fits the card; hours
    python benchmarks/gpu.py --case 1b --sequence 4096 --rounds 3 --json gpu.json
    python benchmarks/gpu.py --case 1b --sequence 2048 --profile     # and what limits, from a trace
    python benchmarks/gpu.py --tiny                                  # the same path on a CPU, in a minute

Ours is a whole `aurora train` on real text, which plans its memory itself, with document masks and every step logged.
Torch's is transformers' LlamaForCausalLM on random tokens of the same shape: SDPA without a written-out mask, bfloat16
autocast, float32 masters, fused AdamW, torch.compile, and nothing beside the step. Llama-like both: RMSNorm, SwiGLU,
grouped keys, rotary; 8B trains adapters of rank 16 on a base frozen in bfloat16. The global batch is the same; torch
takes smaller microbatches until one fits, and recomputes every layer (gradient checkpointing) only where not even one
example at a time fits without.

A card holds one side at a time: in each round a process of ours starts, is measured and ends, then one of torch's. A
side's rate is the median over rounds of its median step; the ratio is that of the rounds' ratios, above 1 where we are
faster. Tokens are batch x sequence, for both. MFU of both is by the recipe's formula: 6 FLOPs a weight and token (4
where it is frozen) and causal attention once, over the card's dense bfloat16 peak from machines.toml;
n/a where the card is not in it. Memory is the most that each side's own allocator held.

aurora keeps to kernels that give the same bits twice (--xla_gpu_deterministic_ops, without autotuning), as it does for
a user; XLA_FLAGS=--xla_gpu_deterministic_ops=false in the environment gives that up. --fp8 measures ours in fp8 too, in
the same rounds, and its rate over that in bfloat16; its MFU is a share of the bfloat16 peak as well, to be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from gpu_cases import CASES, TINY, Job, least_bytes
from gpu_table import card_line, fp8_table, goals, header, notes, row, top_of_profile
from sides import Ended, Training
from torch_peer import KINDS, OUT_OF_MEMORY, torch_side

from aurora_train.errors import UserError
from aurora_train.machine.profile import cpu_model
from aurora_train.machine.table import lookup
from aurora_train.units import size

WARM = 5  # records of ours before the clock: the first steps of a process still pay for what the compiler left to it
STEPS = 6  # records after it, at least
JAX_PROBE = """
import json, jax
device = jax.devices()[0]
print(json.dumps({"platform": device.platform, "name": device.device_kind, "jax": jax.__version__}))
"""
TORCH_PROBE = """
import json, torch, transformers
found = {"torch": torch.__version__, "transformers": transformers.__version__, "memory": None}
if torch.cuda.is_available():
    found["memory"] = torch.cuda.get_device_properties(0).total_memory
print(json.dumps(found))
"""


def environment(tiny: bool) -> dict[str, str]:
    """What every process is given: one card, and for torch an allocator that does not break memory into pieces."""
    if tiny:
        return {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    pieces = os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return {"CUDA_VISIBLE_DEVICES": first, "PYTORCH_ALLOC_CONF": pieces}


def asked_of(python: str, code: str, what: str, hint: str, given: dict) -> dict:
    """What a probe prints, in a process that lets go of the card when it ends."""
    given = {**os.environ, **given, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=given)
    except OSError as error:
        raise UserError(f"cannot start {python}: {error.strerror}", hint=hint) from None
    if done.returncode:
        why = Ended(done.stderr).words
        raise UserError(f"{what} does not start", why=why, hint=hint)
    return json.loads(done.stdout.splitlines()[-1])


def find_card(options) -> dict:
    """Name, memory and versions. UserError where jax or torch sees no GPU, unless --tiny asks for none."""
    given = environment(options.tiny)
    install, elsewhere = "pip install -e '.[cuda13,parity]' (or cuda12)", "--torch-python names another environment's"
    ours = asked_of(sys.executable, JAX_PROBE, "jax", install, given)
    if not options.tiny and ours["platform"] == "cpu":
        raise UserError("jax sees no GPU", hint=f"{install}; --tiny takes the same path on a CPU")
    theirs = asked_of(options.torch_python, TORCH_PROBE, "torch", f"{install}; {elsewhere}", given)
    if not options.tiny and theirs["memory"] is None:
        raise UserError(f"torch {theirs['torch']} sees no GPU", hint=f"a torch built for this card; {elsewhere}")
    known = None if options.tiny else lookup(ours["name"])
    peak = known and known.peak_flops.get("bfloat16")
    named = {"name": cpu_model()} if options.tiny else {}
    return {**ours, **theirs, **named, "driver": driver(), "date": str(date.today()),
            "peak_flops": peak and peak.value, "peak_source": peak and peak.source}  # fmt: skip


def driver() -> str | None:
    """NVIDIA's, or None where nobody says."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None


OURS = {"ours": "bfloat16", "ours in fp8": "fp8"}  # sides and their train.precision


def sides_of(options) -> list[str]:
    """What is measured in each round, in turn."""
    return ["ours", *(["ours in fp8"] if options.fp8 else []), *options.torch]


def measure_ours(job: Job, precision: str, options) -> dict:
    """One round of an `aurora train`: {"seconds", "memory", "how", "parameters"}. Raises Ended where it refuses."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        training = Training(job.config_in(precision), Path(folder), environment(options.tiny))
        try:
            began = training.wait(WARM)[-1]["time"]
            count = WARM + STEPS
            while (found := training.wait(count))[-1]["time"] - began < options.seconds:
                count = len(found) + 1
            held = training.peak_rss() if options.tiny else found[-1]["memory_bytes"]
            plan = json.loads((training.run_folder / "plan.json").read_text())["plan"]
            kernel = plan["details"]["attention"]
            events = map(json.loads, (training.run_folder / "events.jsonl").read_text().splitlines())
            start = next(event for event in events if event["event"] == "start")
            # A small run on a CPU prints no page about memory, and so not which attention it has: the plan names it.
            remarks = [f"attention: {kernel}", *training.remarks("plan", "fp8")]
        finally:
            training.close()
    times = [record["time"] for record in found[WARM - 1 :]]
    return {
        "seconds": statistics.median(b - a for a, b in zip(times, times[1:], strict=False)), "memory": held,
        "how": f"{plan['accumulation']} x {plan['microbatch']}", "remarks": remarks,
        "parameters": [start["parameters"], start.get("frozen", 0)],
    }  # fmt: skip


def attempts(batch: int) -> list[tuple[int, bool]]:
    """(microbatch, whether every layer is recomputed), in the order in which torch tries them."""
    parts = [number for number in range(batch, 0, -1) if batch % number == 0]
    return [(microbatch, checkpointing) for checkpointing in (False, True) for microbatch in parts]


def first_that_fits(job: Job, kind: str, ways: list, open_side):
    """(the side, the ways that are left, this one first). Raises Ended where none fits, or for another fault."""
    for number, way in enumerate(ways):
        try:
            return open_side(job.work(kind, *way)), ways[number:]
        except Ended as ended:
            if OUT_OF_MEMORY not in str(ended.code):
                raise
    raise Ended("does not fit, not even one example at a time with every layer recomputed")


def measure_torch(job: Job, kind: str, seconds: float, ways: list, options) -> tuple[dict, list]:
    """(one round of torch like `measure_ours`, the ways to try in the next). Raises Ended where it cannot."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        special = {"python": options.torch_python, "environment": environment(options.tiny),
                   "stderr": Path(folder) / "stderr"}  # fmt: skip
        side, ways = first_that_fits(job, kind, ways, lambda work: torch_side(work, **special))
        try:
            taken = side.run(seconds)
            held, counts = int(side.ask("memory")), [int(n) for n in side.ask("parameters").split()]
        finally:
            side.close()
    microbatch, checkpointing = ways[0]
    how = f"{job.batch // microbatch} x {microbatch}{', recomputing' if checkpointing else ''}"
    return {"seconds": taken, "memory": held, "how": how, "parameters": counts}, ways


def measure(job: Job, card: dict, options) -> dict:
    """All rounds of one case and sequence: one row. A side that cannot run is not tried again, and says why."""
    rounds: dict[str, list[dict]] = {side: [] for side in sides_of(options)}
    why: dict[str, str] = {}
    ways = {kind: attempts(job.batch) for kind in options.torch}
    if card["memory"] and least_bytes(*job.parameters) > card["memory"]:
        least = f"weights, gradients and moments alone take {size(least_bytes(*job.parameters))}"
        why = {kind: f"does not fit: {least} of {size(card['memory'])}" for kind in options.torch}
    for _ in range(options.rounds):
        for side, found in rounds.items():
            if side in why:
                continue
            try:
                if side in OURS:
                    found.append(measure_ours(job, OURS[side], options))
                else:
                    one, ways[side] = measure_torch(job, side, options.seconds, ways[side], options)
                    found.append(one)
            except Ended as ended:
                why[side], rounds[side] = ended.words, []  # some rounds without others make no ratio
    for side, found in rounds.items():
        if found and found[-1]["parameters"] != list(job.parameters):
            raise UserError(
                f"{side} has {found[-1]['parameters']} trained and frozen parameters, not {list(job.parameters)}",
                where=job.name, why="the sides would not be compared on one model",
            )  # fmt: skip
    return summary(job, card, rounds, why)


def summary(job: Job, card: dict, rounds: dict[str, list[dict]], why: dict[str, str]) -> dict:
    """One row as data: what was not measured is None."""
    sides = {}
    for side, found in rounds.items():
        taken = [one["seconds"] for one in found]
        rate = job.tokens / statistics.median(taken) if taken else None
        mfu = rate * job.flops_per_token / card["peak_flops"] if rate and card["peak_flops"] else None
        last = found[-1] if found else {}
        sides[side] = {
            "tokens_per_s": rate, "mfu": mfu, "memory_bytes": max((one["memory"] for one in found), default=None),
            "microbatches": last.get("how"), "remarks": last.get("remarks", []), "seconds": taken, "why": why.get(side),
        }  # fmt: skip
    peers = [side for side in sides if side not in OURS and sides[side]["tokens_per_s"]]
    best = max(peers, key=lambda side: sides[side]["tokens_per_s"], default=None)
    ratios = over(sides, "ours", best)
    return {
        "case": job.case, "sequence": job.sequence, "batch": job.batch, "trained": job.parameters[0],
        "frozen": job.parameters[1], "flops_per_token": job.flops_per_token, "sides": sides, "best": best,
        "ratio": statistics.median(ratios) if ratios else None, "ratios": ratios,
        "fp8_ratios": over(sides, "ours in fp8", "ours"),
    }  # fmt: skip


def over(sides: dict, side: str, other: str | None) -> list[float]:
    """How many times as fast a side was as another, by rounds; none where either was not measured."""
    pairs = zip(sides[other]["seconds"], sides[side]["seconds"], strict=False) if {side, other} <= sides.keys() else ()
    return [theirs / mine for theirs, mine in pairs]


def profile(job: Job, options) -> str:
    """What limits ours: `aurora profile`, whose trace stays; the top of its table."""
    out = Path(options.profile) / f"{job.case}-{job.sequence}"
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        config = Path(folder) / "case.yaml"
        config.write_text(json.dumps(job.config))
        command = [sys.executable, "-m", "aurora_train", "profile", str(config), "--steps", "3", "--out", str(out)]
        given = {**os.environ, **environment(options.tiny)}
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=given)
    if done.returncode:
        return f"profile of {job.name}: not measured ({Ended(done.stderr).words})"
    return top_of_profile(job.name, json.loads(done.stdout))


def jobs_of(options, card: dict) -> list[Job]:
    """What is asked for, or all that the card's memory may hold; says what is left out."""
    cases = TINY if options.tiny else CASES
    jobs = []
    for name in options.case or cases:
        for sequence in options.sequence or ([64] if options.tiny else [2048, 8192]):
            job = Job(name, cases[name], sequence)
            least = least_bytes(*job.parameters)
            if options.case or not card["memory"] or least <= card["memory"]:
                jobs.append(job)
            else:
                print(f"{job.name}: left out, it takes {size(least)} at least; --case {name} asks for it")
    return jobs


def parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=[*CASES, *TINY], help="default: all that may fit the card")
    parser.add_argument("--sequence", nargs="+", type=int, metavar="T", help="tokens a row; default: 2048 8192")
    parser.add_argument("--rounds", type=int, default=3, help="of both sides in turn (default: 3)")
    parser.add_argument("--seconds", type=float, default=20.0, help="each side is measured a round (default: 20)")
    parser.add_argument("--torch", nargs="+", choices=KINDS, default=["compiled"], help="default: compiled")
    parser.add_argument("--fp8", action="store_true", help="ours in fp8 too, in the same rounds")
    parser.add_argument("--torch-python", default=sys.executable, metavar="PYTHON", help="that has torch's packages")
    parser.add_argument("--profile", nargs="?", const="profiles/gpu", metavar="DIR",
                        help="trace ours too, into DIR/CASE-T, each a new folder (default: profiles/gpu)")  # fmt: skip
    parser.add_argument("--folder", metavar="DIR", help="for runs: with room for one checkpoint (default: /tmp)")
    parser.add_argument("--json", metavar="FILE", help="write card and rows here too")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU: for testing this file")
    options = parser.parse_args(arguments)
    wrong = [name for name in options.case or () if (name in TINY) != options.tiny]
    if wrong:
        parser.error(f"--case {wrong[0]} {'is not a tiny one' if options.tiny else 'goes with --tiny'}")
    if options.rounds < 1 or options.seconds <= 0 or min(options.sequence or [2]) < 2:
        parser.error("--rounds is at least 1, --seconds more than 0, --sequence at least 2")
    if options.folder and not Path(options.folder).is_dir():
        parser.error(f"--folder {options.folder}: there is no such folder")
    return options


def run(options) -> None:
    """Measure, print, write."""
    card = find_card(options)
    print(f"{card_line(card)}; {options.rounds} rounds of {options.seconds:g} s")
    jobs, rows = jobs_of(options, card), []
    print(f"\n{header()}", flush=True)
    for job in jobs:
        rows.append(measure(job, card, options))
        print(row(rows[-1]), flush=True)
        if options.json:  # each row as it comes: hours may follow
            Path(options.json).write_text(json.dumps({"card": card, "rows": rows}, indent=1))
    told = (*fp8_table(rows), *notes(rows), *([] if options.tiny else goals(rows)))
    print("".join(f"\n{line}" for line in told))
    for job in jobs if options.profile else ():
        print(f"\n{profile(job, options)}", flush=True)


def main(arguments=None) -> None:
    try:
        run(parse(arguments))
    except UserError as error:
        print("gpu.py: " + "; ".join(str(error).split("\n  ")), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
