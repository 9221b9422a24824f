"""The table of docs/scale.md: what 8B, 32B and 70B hold, move and take on one box and on two, by the planner.

    python benchmarks/scale.py [--only TEXT] [--compile] [--json scale.json]

Each row is `aurora plan` for machines that are not here, with `mesh: auto` (`tensor` inside a box only), and the
richest state that fits. Nothing is run. Without --compile nothing is compiled either; with it, what the compiled step
moves stands beside the estimate (needs the extra [plan], minutes a row). About ten minutes without it (Intel Xeon, one
core, 2026-12-01).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from aurora_train.config import load
from aurora_train.errors import UserError
from aurora_train.machine.precision import settled
from aurora_train.machine.profile import prepare_environment
from aurora_train.machine.targets import find_machine

# The bundled config with each shape, and its number of parameters: only to leave out states that cannot fit.
MODELS = {
    "8B (Llama 3)": ("language/8b", ["data.tokenizer.vocab=128256", "model.tied=false"], 8.0e9),
    "32B (Qwen3)": ("language/32b_lora", [], 32.8e9),
    "70B (Llama 3.1)": ("language/70b_qlora", [], 70.6e9),
}
SITES = {
    "1 DGX Spark": ("dgx-spark", 1), "2 DGX Sparks": ("dgx-spark", 2), "1 DGX Station": ("dgx-station", 1),
    "2 DGX Stations": ("dgx-station", 2), "8 x H200": ("h200", 8),
}  # fmt: skip
_LORA = "model.lora={rank: 16, alpha: 32, base: nf4}"
STATES = {  # bytes a parameter, at least; settings
    "float32": (16.0, ["model.lora=null"]),
    "bfloat16": (8.0, ["model.lora=null", "optimizer.master=bfloat16", "optimizer.moments=bfloat16"]),
    "bfloat16, int8 moments": (6.0, ["model.lora=null", "optimizer.master=bfloat16", "optimizer.moments=int8"]),
    "QLoRA 16": (0.55, [_LORA]),
}
STEP = ["train.batch=8", "data.sequence=4096", "train.precision=bfloat16", "evaluate.final=false"]


def planned(model: str, site: str, *, verify: bool) -> dict:
    """One row: the plan of the richest state that fits."""
    from aurora_train.train.beginning import Beginning
    from aurora_train.train.planning import plan_config

    (name, settings, parameters), (machine, devices) = MODELS[model], SITES[site]
    target, why = find_machine(machine), []
    tensor = "auto" if target.row.per_box > 1 else 1
    mesh = ["mesh.data=auto", "mesh.fsdp=auto", f"mesh.tensor={tensor}"]
    for state, (least, chosen) in STATES.items():
        if least * parameters / devices > target.budget_bytes:
            continue
        overrides = [*settings, *STEP, *mesh, *chosen]
        config = settled(load(name, overrides), machine=machine)
        try:
            plan = plan_config(config, Beginning.of(config).recipe, machine=machine, devices=devices, verify=verify)
        except UserError as error:
            why.append(f"{state}: {error.what}")
            continue
        shown = " ".join(one if " " not in one else f"'{one}'" for one in overrides)
        command = f"aurora plan {name} --machine {machine} --devices {devices} --no-compile {shown}"
        return {"model": model, "site": site, "state": state, "command": command, "plan": plan, "why": why}
    raise SystemExit(f"{model} on {site}: no state fits: {'; '.join(why)}")


def shown(found: dict) -> str:
    """A row in Markdown."""
    plan, details = found["plan"], found["plan"].details
    time, links = details["time"], details.get("links") or {}
    weighed = [row for row in details.get("meshes") or [] if row.get("chosen")]
    mesh = "/".join(map(str, weighed[0]["mesh"])) if weighed else "1/1/1"
    products, moved = time.get("product_seconds", time["step_seconds"]), links.get("seconds")
    step = f"{max(products, moved):.1f} to {products + moved:.1f} s" if moved else f"{products:.1f} s"
    held, kind = plan.compiled_bytes or plan.predicted_bytes, "" if plan.compiled_bytes is None else ", compiled"
    bytes_in = f"{sum(links['bytes'].values()) / 1e9:.0f} GB" if links else "none"
    if "received" in details:
        by_kind = ", ".join(f"{kind} {number / 1e9:.0f}" for kind, number in details["received"].items())
        bytes_in += f" (compiled: {by_kind} GB)"
    fits, parts = f"{held / 1e9:.0f} of {plan.budget_bytes / 1e9:.0f}{kind}", f"{plan.microbatch} x {plan.accumulation}"
    cells = [found["model"], found["site"], found["state"], mesh, fits, parts, f"{products:.1f} s", bytes_in,
             f"{moved or 0:.1f} s", step]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table in Markdown, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose model and machines contain this text")
    parser.add_argument("--compile", action="store_true", help="compile each step for its machine")
    parser.add_argument("--json", type=Path, help="also write every plan and its command")
    options = parser.parse_args()
    prepare_environment()
    print("| model | machines | state | mesh | GB per device, of budget | parts | products | moved | links | step |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for model in MODELS:
        for site in SITES:
            if options.only in f"{model} {site}":
                rows.append(planned(model, site, verify=options.compile))
                print(shown(rows[-1]), flush=True)
    if options.json:
        plain = [row | {"plan": row["plan"].to_json()} for row in rows]
        options.json.write_text(json.dumps(plain, indent=1))


if __name__ == "__main__":
    main()
