"""The table of docs/scale.md: bytes per device, collectives and expected step of 8B, 32B and 70B, by arithmetic alone.

    python benchmarks/scale.py

Nothing is compiled or run. Peaks, shares reached and memory are those of machines.toml; the rates of the links between
boxes are below, with their sources. A step has 32,768 tokens in examples of 4,096, one at a time on each device.
"""

from __future__ import annotations

from typing import NamedTuple

from aurora_train.machine.table import known_machines


class Model(NamedTuple):
    """Parameters, layers and width of a published shape."""

    parameters: float
    layers: int
    width: int


class Site(NamedTuple):
    """Machines that are linked: each with one device of `machine`; bytes/s one way between neighbours."""

    machine: str
    devices: int
    link: float


MODELS = {"8B (Llama 3)": Model(8.03e9, 32, 4096), "32B (Qwen2.5)": Model(32.8e9, 64, 5120),
          "70B (Llama 3)": Model(70.6e9, 80, 8192)}  # fmt: skip
SITES = {
    "1 DGX Spark": Site("dgx-spark", 1, 0), "2 DGX Sparks": Site("dgx-spark", 2, 25e9),  # ConnectX-7, 200 Gb/s
    "1 DGX Station": Site("dgx-station", 1, 0), "2 DGX Stations": Site("dgx-station", 2, 100e9),  # ConnectX-8, 800 Gb/s
    "8 x H200": Site("h200", 8, 450e9),  # NVLink 4: 900 GB/s both ways together
}
# Bytes per parameter of the state (parameter, gradient, two moments); of a gradient; the share of parameters trained.
STATES = {"float32": (16.0, 4.0, 1.0), "bfloat16": (8.0, 2.0, 1.0), "bfloat16, int8 moments": (6.0, 2.0, 1.0),
          "QLoRA 16": (0.6, 0.1, 0.01)}  # fmt: skip
TOKENS, EXAMPLE = 32_768, 4_096
BUDGET = 0.92  # of the memory that the device's row calls free or seen


def row(model: Model, site: Site, state: str) -> tuple[float, float, float, float]:
    """(bytes per device, budget, seconds of compute, seconds of collectives) of one step; fsdp over all devices."""
    machine, (held, gradient, trained) = known_machines()[site.machine], STATES[state]
    microbatches = TOKENS / EXAMPLE / site.devices
    gathered = 2 * 2 * model.parameters / model.layers  # two units in bfloat16: one in use, one on its way
    kept = 2 * EXAMPLE * model.width * (model.layers + 40)  # residuals of every layer, and one layer computed again
    needed = held * model.parameters / site.devices + kept + (gathered if site.devices > 1 else 0)
    budget = BUDGET * (machine.free or machine.sees).value
    flops = (8 if trained == 1 else 6) * model.parameters * TOKENS  # 2 forward, 2 again, 4 (or 2) backward
    compute = flops / (site.devices * machine.tflops.bfloat16 * 1e12 * machine.reached.value)
    moved = (2 * (2 if trained == 1 else held) + gradient) * model.parameters * (1 - 1 / site.devices) * microbatches
    return needed, budget, compute, moved / site.link if site.link else 0.0


def main() -> None:
    """Print the table in Markdown: the richest state that fits, or what the smallest needs."""
    print("| model | machines | state | GB per device, of budget | compute | collectives | step |")
    print("|---|---|---|---|---|---|---|")
    for name, model in MODELS.items():
        for place, site in SITES.items():
            rows = {state: row(model, site, state) for state in STATES}
            fits = [state for state, (needed, budget, *_) in rows.items() if needed <= budget]
            state = fits[0] if fits else "none fits"
            needed, budget, compute, moved = rows[fits[0] if fits else "QLoRA 16"]
            step = f"{max(compute, moved):.1f} to {compute + moved:.1f} s" if moved else f"{compute:.1f} s"
            print(f"| {name} | {place} | {state} | {needed / 1e9:.0f} of {budget / 1e9:.0f} | {compute:.1f} s | "
                  f"{moved:.1f} s | {step} |")  # fmt: skip


if __name__ == "__main__":
    main()
