"""`mesh: auto`: which meshes are weighed, by which links, and what of a compiled step is compared with the estimate."""

from __future__ import annotations

import json
from types import SimpleNamespace

import babble
import pytest
from kit import Aurora, events, in_process

from aurora_train.boxes import choice
from aurora_train.errors import UserError
from aurora_train.machine import links
from aurora_train.machine.table import known_machines
from aurora_train.plan.traffic import received


def section(data, fsdp, tensor):
    return SimpleNamespace(data=data, fsdp=fsdp, tensor=tensor)


def test_every_mesh_that_the_config_allows_is_weighed_and_no_other():
    assert choice.shapes_of(section(-1, 2, 1), 8) == [(4, 2, 1)]
    assert set(choice.shapes_of(section("auto", "auto", 2), 8)) == {(1, 4, 2), (2, 2, 2), (4, 1, 2)}
    assert len(choice.shapes_of(section("auto", "auto", "auto"), 8)) == 10
    with pytest.raises(UserError, match="data: auto, fsdp: 3, tensor: 1.* has 8 devices") as caught:
        choice.shapes_of(section("auto", 3, 1), 8)
    assert "1, 2, 4, 8" in str(caught.value)


def test_a_run_keeps_its_mesh_on_the_same_devices_only():
    known = {"mesh": {"data": 1, "fsdp": 2, "tensor": 1}, "device": "cpu"}
    assert choice.kept(section("auto", "auto", 1), known, 2, "cpu") == (1, 2, 1)
    assert choice.kept(section("auto", "auto", 1), known, 4, "cpu") is None
    assert choice.kept(section("auto", "auto", 1), known, 2, "NVIDIA GB10") is None
    assert choice.kept(section("auto", 1, 1), known, 2, "cpu") is None  # the config has been changed


def test_links_are_those_of_the_box_or_of_the_cable_and_what_was_measured_comes_first(monkeypatch):
    h200, spark = known_machines()["h200"], known_machines()["dgx-spark"]
    sixteen = links.links_of(h200, 16)
    assert sixteen.per_box == 8 and sixteen.rate(1, 8) == pytest.approx(0.8 * 450e9)
    assert sixteen.rate(8, 2) == sixteen.rate(1, 16) == pytest.approx(0.8 * 50e9)
    assert sixteen.rate(1, 3) == sixteen.between  # 3 do not divide 8: one of the groups lies in two boxes
    assert links.links_of(spark, 2).rate(1, 2) == pytest.approx(0.8 * 25e9)
    unknown = links.links_of(None, 2)
    assert unknown.rate(1, 2) is None and "no rate of these links is known" in unknown.describe()
    monkeypatch.setenv(links.MEASURED, "2e9")
    assert links.links_of(spark, 2, 1, per_process=1).rate(1, 2) == 2e9
    assert links.links_of(h200, 16, 8, per_process=8).rate(8, 2) == 2e9 / 8  # its processes share the cable
    assert links.links_of(spark, 2).rate(1, 2) == pytest.approx(0.8 * 25e9)  # a plan for other machines
    monkeypatch.setenv(links.MEASURED, "fast")
    with pytest.raises(UserError, match="'fast' is no rate"):
        links.links_of(spark, 2, 1, per_process=1)


HLO = """
%body.1 (p: f32[8]) -> f32[8] {
  %all-gather.5 = bf16[64,32]{1,0} all-gather(%p), replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}
  ROOT %x = f32[8]{0} add(%p, %p)
}

%start.2 (p: f32[8]) -> f32[4] {
  %rs = ((f32[64]{0}), f32[32]{0}) reduce-scatter-start(%p), replica_groups=[2,2]<=[4], to_apply=%add
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %ar = f32[100]{0} all-reduce-start(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %w = f32[8]{0} while(%p), body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %c = f32[4]{0} call(%w), to_apply=%start.2
}
"""


def test_what_a_compiled_step_moves_is_read_from_its_text():
    """By hand: half of 4096 bytes, three times; three quarters of 400 twice; half of 256."""
    assert received(HLO) == {"all-gather": 3 * 2048, "all-reduce": 600, "reduce-scatter": 128}
    assert received("ENTRY %main (p: f32[8]) -> f32[8] {\n}\n") == {}


def test_devices_are_given_for_another_machine_only(capsys):
    assert in_process("plan", "quickstart", "--devices", "2") == 2
    assert "--machine NAME --devices N" in capsys.readouterr().err
    assert in_process("plan", "quickstart", "--machine", "h200", "mesh.fsdp=auto", "--no-compile") == 2
    assert "for how many devices" in capsys.readouterr().err


SMALL = ("model.layers=3", "model.attention=reference", "model.width=64", "optimizer.schedule.name=constant",
         "mesh.data=auto", "mesh.fsdp=auto")  # fmt: skip


@pytest.mark.slow
def test_the_fastest_mesh_that_fits_is_taken_said_and_kept(tmp_path):
    """Where all fits, cutting the batch moves least; where it does not, the state is cut."""
    aurora, config = Aurora(tmp_path, tmp_path / "cache"), babble.write(tmp_path)
    run = ("--run", "r", "checkpoint.every=2", "evaluate.final=false")
    said = aurora.good("train", config, *SMALL, "train.steps=2", *run, devices=2).stderr
    assert "mesh data 2, fsdp 1, tensor 1: chosen, the fastest that fits" in said
    assert "mesh data 1, fsdp 2, tensor 1: not chosen" in said and "meshes are ranked by the bytes" in said
    (event,) = events(tmp_path / "r", "mesh")
    chosen = next(row for row in event["weighed"] if row.get("chosen"))
    assert chosen["mesh"] == [2, 1, 1] and chosen["moved_bytes"] > 0
    assert json.loads((tmp_path / "r/plan.json").read_text())["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    assert "fsdp: auto" in (tmp_path / "r/config.yaml").read_text()
    plan = json.loads(aurora.good("plan", config, *SMALL, "memory.save=nothing", "--no-compile", "--json", "--budget",
                                  "2.2MB", devices=2).stdout)  # fmt: skip
    rows = {tuple(row["mesh"]): row for row in plan["meshes"] if "mesh" in row}
    assert rows[2, 1, 1]["seconds"] is None and "2.89 MB of 2.20 MB" in rows[2, 1, 1]["why"]
    assert rows[1, 2, 1]["chosen"] and rows[1, 2, 1]["bytes"] == plan["predicted_bytes"] < 2.2e6
    assert plan["links"]["bytes"].keys() == {"fsdp"} and plan["links"]["seconds"] is None
