"""The table of what a machine trains: a walk over a ladder, and cells that are estimated steps of the real trainer."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from aurora_train.cli import plan as verb
from aurora_train.cli.main import main
from aurora_train.errors import UserError
from aurora_train.machine import targets
from aurora_train.nn.stack import Segment
from aurora_train.plan.plan import Plan
from aurora_train.plan.planner import Planner
from aurora_train.tools import capacity as room
from aurora_train.tools import report_capacity
from aurora_train.tools.capacity import CONTEXTS, LADDER, STATES, capacity, climb, step_config

MB = 10**6
SMALL = tuple(
    room.Size(f"w{width}", {"width": width, "layers": 3, "heads": 2, "mlp_width": 4 * width}, 512, "made up")
    for width in (64, 128, 256)
)
BUDGET = 20 * MB


@pytest.fixture
def box(monkeypatch):
    """A machine of 20 MB: everything else of it is an H100's. Nothing is compiled unless a test says how."""
    real = targets.find_machine("h100")
    small = targets.Target(real.slug, real.row, BUDGET, "made up", real.config_text)
    monkeypatch.setattr(room, "find_machine", lambda name: small)
    monkeypatch.setattr(room, "can_compile_for_gpu", lambda: True)
    monkeypatch.setattr("aurora_train.train.rehearsal.can_compile_for_gpu", lambda: False)
    monkeypatch.setattr(Planner, "compile", lambda self, plan: pytest.fail("compiled"))


@pytest.fixture
def reckoned(box, monkeypatch):
    """Steps that take 16 bytes a parameter and 1 kB a token, without a trace."""

    def step(box, state, size, context):
        count = step_config(state, size, context).model.num_parameters(size.vocab)
        program = SimpleNamespace(config=step_config(state, size, context))
        return room._Step(Planner(program, box.budget, "", ""), Plan(1, 1), 16 * count + 1000 * context, count)

    monkeypatch.setattr(room, "_step", step)


def table(states=STATES, contexts=(64, 256), **how):
    found = capacity("h100", ladder=SMALL, states=states, contexts=contexts, **how)
    return {(c["training"], c["context"]): c for c in found["cells"]}, found


# ---- the ladder and the walk


def test_the_ladder_rises_and_is_what_its_names_say():
    counts = []
    for size in LADDER:
        config = step_config(STATES[0], size, 2048)
        counts.append(config.model.num_parameters(size.vocab))
        assert counts[-1] == pytest.approx(float(size.name[:-1]) * 1e9, rel=0.25), size.name
    assert counts == sorted(counts) and all(size.source for size in LADDER)
    published = {"1B": 1_235_814_400, "3B": 3_212_749_824, "8B": 8_030_261_248, "70B": 70_553_706_496}
    assert {s.name: n for s, n in zip(LADDER, counts, strict=True) if s.name in published} == published


@pytest.mark.parametrize("start", range(5))
@pytest.mark.parametrize("last", range(-1, 5))
def test_the_walk_finds_the_last_rung_that_fits_from_wherever_it_starts(start, last):
    asked = []

    def fits(rung):
        asked.append(rung)
        return rung <= last

    assert climb(fits, start, 5) == last
    assert len(asked) == len(set(asked)) and len(asked) <= abs(start - last) + 1 + (last >= start)


def test_every_training_reaches_the_config():
    seen = {}
    for state in STATES:
        config = step_config(state, LADDER[0], 4096)
        lora = (config.model.lora.rank, config.model.lora.base) if config.model.lora else None
        seen[state.name] = (config.optimizer.master, config.optimizer.moments, lora)
        assert (config.train.batch, config.train.precision, config.data.sequence) == (1, "bfloat16", 4096)
    assert list(seen.values()) == [
        ("float32", "float32", None), ("bfloat16", "bfloat16", None), ("bfloat16", "int8", None),
        ("float32", "float32", (16, "compute")), ("float32", "float32", (16, "nf4")),
    ]  # fmt: skip


# ---- the table


def test_cells_are_the_estimated_steps_and_the_next_size_does_not_fit(box):
    cells, found = table(STATES[:1])
    cell = cells["AdamW, float32", 64]
    assert cell["size"] == "w128" and cell["next_size"] == "w256" and cell["how"] == "estimated"
    size = SMALL[1]
    program = room._box("h100", False).rehearsal(STATES[0], size, 64)
    plan = Plan(1, 1, {"stack": [Segment(0, 3, ())]})
    assert cell["peak_bytes"] == Planner(program, BUDGET, "", "").estimated(plan).bytes
    assert cell["peak_bytes"] * (1 + STATES[0].short) <= BUDGET < cell["next_bytes"]
    assert cell["left_bytes"] == BUDGET - cell["peak_bytes"] and cell["share"] == cell["peak_bytes"] / BUDGET
    assert cell["parameters"] == program.config.model.num_parameters(512)
    assert cells["AdamW, float32", 256]["peak_bytes"] > cell["peak_bytes"]
    assert json.loads(json.dumps(found)) == found


def test_leaner_states_hold_less_of_one_size(box, monkeypatch):
    monkeypatch.setattr(room, "find_machine", targets.find_machine)  # with room for all of them
    one = {}
    for state in STATES:
        found = capacity("h100", ladder=SMALL[2:], states=(state,), contexts=(64,))
        (cell,) = found["cells"]
        one[state.name] = (cell["peak_bytes"], cell["parameters"])
    (full, count), (half, _), (eighth, _), (adapters, _), (coded, _) = one.values()
    assert full > 16 * count and half < 0.65 * full, "bfloat16 masters, moments and gradients are half of float32 ones"
    assert eighth < 0.9 * half and coded < adapters < 0.8 * eighth


def test_what_does_not_fit_at_all_is_none_and_the_margin_counts(reckoned, monkeypatch):
    cells, _ = table(STATES[:1], (64,))
    short = BUDGET / cells["AdamW, float32", 64]["peak_bytes"] - 1
    kept = [room.State("kept", STATES[0].sections, margin) for margin in (short * 0.99, short * 1.01)]
    assert [table((state,), (64,))[0]["kept", 64]["size"] for state in kept] == ["w128", "w64"]
    nothing, _ = table((room.State("kept", STATES[0].sections, 99.0),), (64,))
    cell = nothing["kept", 64]
    assert (cell["size"], cell["peak_bytes"], cell["left_bytes"], cell["next_size"]) == (None, None, None, "w64")


def test_compiled_bytes_decide_where_they_were_asked_for(reckoned, monkeypatch):
    compiled = []

    def compile(self, plan):
        width = self.program.config.model.width
        compiled.append(width)
        self.compiled["step"] = BUDGET + 1 if width == 128 else BUDGET // 2
        return self.compiled["step"]

    monkeypatch.setattr(Planner, "compile", compile)
    cells, found = table(STATES[:1], (64,), verify=True)
    cell = cells["AdamW, float32", 64]
    assert compiled == [128, 64] and cell["size"] == "w64" and cell["how"] == "compiled"
    assert cell["peak_bytes"] == cell["compiled_bytes"] == BUDGET // 2 != cell["estimated_bytes"]
    assert (cell["next_size"], cell["next_bytes"]) == ("w128", BUDGET + 1)
    assert found["how"].startswith("compiled")


def test_progress_ends_at_its_total(reckoned):
    told = []
    table(STATES[:2], progress=lambda *done: told.append(done))
    assert [done for done, *_ in told] == [0, 1, 2, 3, 4] and {total for _, total, _ in told} == {4}
    assert len({what for *_, what in told}) == 1, "a new text would start the time left again"


def test_a_processor_is_sent_to_the_machines_by_name(monkeypatch):
    monkeypatch.setattr(room, "this_machine", lambda: SimpleNamespace(platform="cpu"))
    with pytest.raises(UserError, match="--machine NAME, one of dgx-spark"):
        capacity(None)
    with pytest.raises(UserError, match="dgx-spark"):
        capacity("dgx-sparc")


def test_every_machine_by_name_has_a_table(reckoned, monkeypatch):
    monkeypatch.setattr(room, "find_machine", targets.find_machine)
    for name in targets.machine_names():
        found = capacity(name, ladder=SMALL[:1], states=STATES[:1], contexts=(64,))
        (cell,) = found["cells"]
        assert cell["size"] == "w64" and found["budget_bytes"] == targets.find_machine(name).budget_bytes, name


# ---- as a person reads it


def test_the_table_has_a_row_a_training_and_a_column_a_context(reckoned, capsys):
    _, found = table(STATES[:2])
    report_capacity.show_capacity(found)
    out = capsys.readouterr().out
    lines = out.splitlines()
    head = next(line for line in lines if line.startswith("largest model"))
    assert head.split() == "largest model context 64 context 256".split()
    row = lines.index(next(line for line in lines if line.startswith("AdamW, float32")))
    assert lines[row].split()[-2:] == ["w128", "w128"] and lines[row + 1].count(" MB (") == 2
    assert lines[row + 2].count(" MB left") == 2 and lines[row + 3].count("w256 would take") == 2
    assert "estimated, not measured" in out and "optimizer.master=bfloat16 optimizer.moments=bfloat16" in out
    assert "made up" in out and "budget: 20.0 MB" in out


def test_a_compiled_cell_says_so_and_an_empty_one_says_none(capsys):
    cell = {"training": "t", "context": 4096, "size": "8B", "peak_bytes": 9 * 10**9, "share": 0.9, "how": "compiled",
            "left_bytes": 10**9, "next_size": None, "next_bytes": None}  # fmt: skip
    report_capacity.show_capacity({"cells": [cell, cell | {"context": 8192, "size": None}]})
    out = capsys.readouterr().out
    assert "9.0 GB (90 %, compiled)" in out and "context 4k" in out and "none" in out and "would take" not in out
    report_capacity.show_capacity({"cells": [cell | {"next_size": "14B", "next_bytes": 9_900_000_000}]})
    assert "14B: 9.9 GB, too close" in capsys.readouterr().out


@pytest.mark.parametrize("compile,verify", [(None, False), (True, True), (False, False)])
def test_a_capacity_is_compiled_only_where_it_was_asked_for(compile, verify, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(room, "capacity", lambda *given, **how: asked.append((given[0], how)) or {"cells": []})
    verb.command(machine="h200", compile=compile, capacity=True, json=True)
    assert asked == [("h200", {"verify": verify})]


def test_contexts_are_whole_thousands():
    assert [report_capacity._binary(c) for c in CONTEXTS] == ["2k", "4k", "8k", "32k", "64k", "128k"]


# ---- the 8B shape as tuned, in docs/capacity.md

DOCS = Path(__file__).parents[2] / "docs" / "capacity.md"


def tuned_cells() -> list:
    """(command, settings, machine, cell) of the table."""
    section = DOCS.read_text().split("## An 8B model, tuned\n")[1].split("\n## ")[0]
    command = re.search(r"^aurora (plan .*) SETTINGS --machine NAME (.*)$", section, re.MULTILINE)
    head, _, *rows = ([one.strip(" `") for one in line.strip("|").split("|")]
                      for line in section.splitlines() if line.startswith("|"))  # fmt: skip
    return [
        pytest.param(command, "" if settings == "the defaults" else settings, machine, cell, id=f"{name}, {machine}",
                     marks=pytest.mark.slow if machine == "dgx-spark" else pytest.mark.release)
        for name, settings, *cells in rows for machine, cell in zip(head[2:], cells, strict=True)
    ]  # fmt: skip


def test_the_docs_have_every_way_of_tuning_on_every_machine():
    ways = {(machine, settings) for _, settings, machine, _ in (one.values for one in tuned_cells())}
    assert {machine for machine, _ in ways} == {"dgx-spark", "dgx-station", "h200", "rtx-5090"}
    assert {settings for _, settings in ways} >= {"", "model.lora.rank=16", "model.lora.rank=16 model.lora.base=nf4"}
    assert len(ways) == 20


@pytest.mark.parametrize("command,settings,machine,cell", tuned_cells())
def test_a_tuned_8b_is_planned_as_the_docs_say(command, settings, machine, cell, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path))  # rates that someone measured would give another plan
    asked = [*command[1].split(), *settings.split(), "--machine", machine, *command[2].split(), "--json"]
    status = main(asked)
    out, err = capsys.readouterr()
    if cell.startswith("does not fit"):
        assert status == 2 and f"the smallest needs {cell.removeprefix('does not fit: ')}" in err
        return
    assert status == 0, err
    plan = json.loads(out)
    peak, budget = plan["predicted_bytes"] / 1e9, plan["budget_bytes"] / 1e9
    assert cell == f"{peak:.1f} of {budget:.1f} GB, {plan['microbatch']} x {plan['accumulation']}"
    assert plan["predicted_bytes"] <= plan["budget_bytes"]
