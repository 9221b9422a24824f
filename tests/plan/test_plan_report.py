"""What a person reads of a plan: the verdict first, nothing that is not in the plan, and a picture of what is."""

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from rich.console import Console

from aurora_train.errors import UserError
from aurora_train.nn.stack import Segment
from aurora_train.plan import report
from aurora_train.plan.plan import Plan
from aurora_train.tools import report_capacity, report_plan
from aurora_train.tools.pareto import pareto_figure, pareto_svg
from aurora_train.tools.report import write_report

GB = 10**9
BYTES = {
    "parameters": 16 * GB, "optimizer": 16 * GB, "average": 0, "frozen": 0,
    "saved": 34 * GB, "gradients": 12 * GB, "workspace": 4 * GB,
}  # fmt: skip
PARETO = [
    {"microbatch": m, "bytes": (30 + m * k) * GB, "recompute_flops": 1e15 * (9 - k), "chosen": (m, k) == (2, 4)}
    for m in (1, 2)
    for k in (2, 4, 8)
]
DETAILS = {
    "by_cause": BYTES,
    "tensors": {
        "stack": [
            {"tag": "query", "bytes": 33_554_432, "recompute_flops": 137e9, "kept_units": 32, "units": 32},
            {"tag": "mlp_up", "bytes": 117_440_512, "recompute_flops": 480e9, "kept_units": 12, "units": 32},
            {"tag": "attn_norm", "bytes": 33_554_432, "recompute_flops": 17e6, "kept_units": 0, "units": 32},
        ]
    },
    "next_faster": {
        "microbatch": 4, "accumulation": 4, "stacks": {"stack": [[0, 16, None], [16, 32, []]]},
        "lacks_bytes": 3_100_000_000, "seconds": 9.9,
    },
    "largest_microbatch": 16,
    "levers": [{"name": "8-bit moments", "setting": "optimizer.moments=int8", "saves_bytes": 12 * GB}],
    "time": {
        "step_seconds": 11.2, "seconds": 112_000, "steps": 10_000, "tokens": 5.2e9, "flops": 2.5e20,
        "recompute_flops": 1e15, "rates": "assumed", "source": "60 % of the peak",
    },
    "checkpoint": {"bytes": 48 * GB, "kept": 3, "disk_bytes": 144 * GB},
    "pareto": PARETO,
    "attention": "cudnn",
    "not_verified": ["the cuDNN workspace"],
    "compiles": 2,
    "planning_seconds": 1.4,
}
CUT = {"stack": [Segment(0, 12, ("query", "mlp_up")), Segment(12, 32, ("query",))]}
BARE = Plan(4, 2, {"stack": [Segment(0, 3, None, True)]}, "as configured: save auto, accumulation auto")


def plan(compiled=84 * GB, budget=102 * GB, **changes):
    details = {name: value for name, value in {**DETAILS, **changes}.items() if value != "absent"}
    return Plan(
        2, 8, CUT, "the fastest of 214 that fit", "NVIDIA GB10", "gpu", budget, 82 * GB, compiled, None, details
    )


def shown(one, width=160):
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    report_plan.show(one, console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def table(one) -> dict[str, list[str]]:
    """The cells of every line of the page, by the first of them."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in shown(one).splitlines()]
    return {first: cells for first, *cells in lines}


def test_the_first_line_is_the_verdict():
    assert shown(plan()).splitlines()[0] == (
        "fits: 84.0 GB of 102.0 GB on DGX Spark (GB10) (compiled); microbatch 2 x accumulation 8; "
        "recomputes 12 % of the forward pass"  # 1e15 of a third of 2.5e20 / 1e4
    )
    assert shown(plan(compiled=None)).startswith("fits: 82.0 GB of 102.0 GB on DGX Spark (GB10) (predicted, not comp")
    assert shown(plan(compiled=103 * GB)).startswith("does not fit: 103.0 GB of 102.0 GB")
    assert "no budget" in shown(plan(budget=None)).splitlines()[0]


def test_the_page_has_the_bytes_of_every_cause_and_their_share_of_the_budget():
    rows = table(plan())
    assert rows["saved activations"][-2:] == ["34.0", "33 %"]
    assert rows["total"][-2:] == ["82.0", "80 %"] and rows["budget"][-1:] == ["102.0"]
    assert "moving average" not in rows  # it holds nothing
    assert "predicted 82.0 GB, compiled 84.0 GB (+2.4 %)" in shown(plan())


def test_where_every_tag_is_kept_it_says_what_is_recomputed_all_the_same():
    (line,) = report_plan.segments([Segment(0, 4, ("query",))], ["query"])
    assert line == "units 0 to 3: keep query; recompute what lies between them and has no tag"


def test_the_page_says_of_every_tag_what_becomes_of_it():
    lines = shown(plan()).splitlines()
    assert "  units 0 to 11: keep query, mlp_up; recompute attn_norm" in lines
    assert "  units 12 to 31: keep query; recompute mlp_up, attn_norm" in lines
    fates = {line.split()[0]: line for line in lines if line.startswith(("query", "mlp_up", "attn_norm"))}
    assert fates["query"].endswith("keep") and "33.6 MB" in fates["query"] and "137G" in fates["query"]
    assert fates["mlp_up"].endswith("partly: keep 12 of 32 units") and fates["attn_norm"].endswith("recompute")


@pytest.mark.parametrize(
    "told",
    [
        "next faster plan: microbatch 4 x accumulation 4, stack: units 0 to 15: keep everything; units 16 to 31: "
        "recompute everything; lacks 3.1 GB; 9.9 s a step",
        "largest microbatch that fits: 16",
        "optimizer.moments=int8",
        "run: 10,000 steps, 5.20G tokens, 250EFLOP",
        "time: 1 d 7 h, 11 s a step (assumed rates: 60 % of the peak)",
        "disk: 48.0 GB a checkpoint, 3 kept, 144.0 GB in all",
        "the cuDNN workspace",
    ],
)
def test_the_page_says_what_else_could_be_had_and_what_is_not_known(told):
    assert told in shown(plan())


def test_frozen_parameters_are_said_to_be_shared_with_runs_beside_this_one():
    disk = {"bytes": 1 * GB, "kept": 3, "frozen_bytes": 16 * GB, "disk_bytes": 20 * GB}
    assert "20.0 GB in all, or less: a run beside one that froze the same" in shown(plan(checkpoint=disk))
    assert "or less" not in shown(plan())


def test_a_time_that_nobody_knows_names_the_command_that_would_tell():
    assert "time: unknown, run `aurora doctor --calibrate`" in shown(plan(time=None))
    partly = shown(plan(time={"steps": 10, "flops": 3e12, "step_seconds": None, "seconds": None}))
    assert "run: 10 steps, 3.00TFLOP" in partly and "time: unknown" in partly
    bound = shown(plan(time={**DETAILS["time"], "rates": "bound"}))
    assert "time: at least 1 d 7 h" in bound and "a bound" in bound


@pytest.mark.parametrize("missing", sorted(DETAILS))
@pytest.mark.parametrize("value", [None, "absent"])
def test_no_part_of_a_plan_is_needed_to_show_the_rest(missing, value):
    text = shown(plan(**{missing: value}))
    assert text.startswith("fits: 84.0 GB of 102.0 GB") and "None" not in text


def test_a_plan_that_only_says_what_was_asked_for_is_shown_as_that():
    first = shown(BARE).splitlines()[0]
    assert first.startswith("as configured: save auto") and "not predicted" in first
    assert first.endswith("microbatch 4 x accumulation 2; recomputes nothing")
    assert shown(Plan(4, 2)).splitlines() == [
        "as configured; its memory was not predicted; microbatch 4 x accumulation 2"
    ]


def test_small_amounts_have_small_units():
    small = plan(compiled=None, by_cause={"parameters": 2_000_000, "saved": 30_500_000}, budget=None)
    rows = table(small)
    assert "MB" in next(line for line in shown(small).splitlines() if line.startswith("at the peak"))
    assert "30.5" in rows["saved activations"] and rows["total"][-2:] == ["32.5", "100 %"]


def test_one_line_says_what_training_is_about_to_do():
    assert report.one_line(plan()) == f"plan: {report.verdict(plan())}" and "\n" not in report.one_line(BARE)


def test_predicted_compiled_and_measured_stand_side_by_side():
    known = Plan(1, 1, predicted_bytes=80 * GB, compiled_bytes=84 * GB, measured_bytes=78 * GB)
    assert report.side_by_side(known) == (
        "memory: predicted 80.0 GB, compiled 84.0 GB (+5.0 %), measured 78.0 GB (-2.5 %)"
    )
    on_a_cpu = report.side_by_side(replace(known, platform="cpu", measured_bytes=90 * GB))
    assert on_a_cpu.endswith("90.0 GB (+12.5 %), which on a CPU includes saves, evaluations and compiling")
    assert report.side_by_side(BARE) == "memory: not predicted, not compiled, not measured"


def test_a_script_gets_one_flat_document():
    told = json.loads(json.dumps(report_plan.document(plan())))
    assert told["machine"] == "NVIDIA GB10" and told["compiled_bytes"] == 84 * GB and told["microbatch"] == 2
    assert told["largest_microbatch"] == 16 and told["stacks"]["stack"][0]["save"] == ["query", "mlp_up"]
    assert "details" not in told


def test_capacity_is_shown_whatever_its_rows_are(capsys):
    report_capacity.show_capacity(
        {"machine": "dgx-spark", "budget_bytes": 102 * GB, "rows": [
            {"training": "LoRA", "parameters": 32_000_000_000, "peak_bytes": 99 * GB, "fits": True},
            {"training": "AdamW, float32", "parameters": 3_000_000_000, "peak_bytes": None, "fits": False},
        ]}
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "budget: 102.0 GB" in out and re.search(r"LoRA +32.0G +99.0 GB +yes", out)
    assert re.search(r"AdamW, float32 +3.00G +n/a +no", out)


# ---- pictures


def texts(path):
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("svg")
    return "\n".join("".join(node.itertext()) for node in root.iter() if node.tag.endswith("}text"))


def test_the_pareto_picture_has_a_curve_for_each_microbatch_and_marks_the_plan(tmp_path):
    axes = pareto_figure(DETAILS, 200 * GB).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["microbatch 1", "microbatch 2", "this plan"]  # 200 GB is far above these 46 GB
    assert list(lines["microbatch 2"].get_ydata()) == [46 * GB, 38 * GB, 34 * GB]  # from least recomputed to most
    assert (lines["this plan"].get_xdata()[0], lines["this plan"].get_ydata()[0]) == (5e15, 38 * GB)
    assert "FLOPs recomputed" in texts(pareto_svg(plan(), tmp_path / "p.svg"))


def test_the_pareto_picture_is_over_seconds_where_all_are_known():
    timed = [{**p, "seconds": p["recompute_flops"] / 1e14} for p in PARETO]
    assert pareto_figure({"pareto": timed}, 50 * GB).axes[0].get_xlabel() == "seconds a step"
    timed[0]["seconds"] = None
    axes = pareto_figure({"pareto": timed}, 50 * GB).axes[0]
    assert axes.get_xlabel() == "FLOPs recomputed a step" and axes.lines[-1].get_ydata()[0] == 50 * GB


def test_a_plan_without_details_has_no_picture_and_says_why(tmp_path):
    with pytest.raises(UserError, match="nothing to draw"):
        pareto_svg(BARE, tmp_path / "no.svg")
    assert not list(tmp_path.iterdir())


# ---- the run report


def pinned(folder, one, measured=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("recipe: x\n")
    record = {"step": 1, "loss": 1.0, "tokens": 1, "memory_bytes": 83 * GB}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    value = {"plan": {**one.to_json(), "measured_bytes": measured}, "mesh": {"data": 1, "fsdp": 1}, "device": "gpu"}
    (folder / "plan.json").write_text(json.dumps(value))
    return write_report(folder).read_text()


def test_the_run_report_sets_predicted_compiled_and_measured_beside_what_holds_the_memory(tmp_path):
    html = pinned(tmp_path / "run", plan(), measured=85 * GB)
    start = html.index("<h2>Memory</h2>")
    memory = html[start : html.index("</section>", start)]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", memory)
    for row in (["predicted", "82.0 GB", ""], ["compiled", "84.0 GB", "+2.4 %"], ["measured", "85.0 GB", "+3.7 %"]):
        at = cells.index(row[0])
        assert cells[at : at + 3] == row
    assert cells[cells.index("saved activations") + 1] == "34.0 GB" and "units 12 to 31" in memory
    assert "Memory plan" not in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_the_run_report_takes_what_was_measured_from_the_records_where_the_plan_has_none(tmp_path):
    assert "<td>measured</td><td>83.0 GB</td>" in pinned(tmp_path / "run", plan())


def test_a_plan_without_details_leaves_the_memory_section_out(tmp_path):
    html = pinned(tmp_path / "run", BARE)
    assert "<h2>Memory</h2>" not in html and "<h2>Memory plan</h2>" in html
