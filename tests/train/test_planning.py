"""A config and a machine give a plan; a run is pinned to it until what decides it changes."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import pytest

from aurora_train import files
from aurora_train import mesh as meshes
from aurora_train.cli.main import main
from aurora_train.config import load
from aurora_train.errors import UserError
from aurora_train.machine.targets import find_machine
from aurora_train.nn.stack import Segment
from aurora_train.plan import account
from aurora_train.plan.account import SAVE_COPIES
from aurora_train.plan.plan import Plan
from aurora_train.plan.report import verdict
from aurora_train.run import Run
from aurora_train.train import planning
from aurora_train.train.planning import asked, device_kind, pinned_plan, plan_config, planner_here
from aurora_train.train.rehearsal import Rehearsal

MB = 10**6


@pytest.fixture(autouse=True)
def plans(tmp_path_factory, monkeypatch):
    """A cache of plans of each test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("AURORA_CACHE", str(folder))
    return folder / "plans"


@pytest.fixture
def language_model(tmp_path_factory):
    """A config that is planned without data."""

    def make(**sections):
        tree = {
            "recipe": "language_model",
            "model": {"width": 64, "layers": 4, "heads": 2},
            "data": {"sequence": 128, "tokenizer": {"kind": "byte"}},
            "train": {"batch": 8, "precision": "bfloat16"},
            "mesh": {"data": 1},
        }
        tree |= {name: tree.get(name, {}) | section for name, section in sections.items()}
        file = tmp_path_factory.mktemp("config") / "small.yaml"
        file.write_text(json.dumps(tree))  # YAML holds JSON
        config = load(file)
        return config, config.recipe_class(config, file.parent)

    return make


@pytest.fixture
def no_compiler(monkeypatch):
    """As where the extra [plan] is not installed."""
    for module in ("train.planning", "train.rehearsal", "plan.account", "plan.verify"):
        monkeypatch.setattr(f"aurora_train.{module}.can_compile_for_gpu", lambda: False)


# ---- for a machine that is not here


def test_a_key_that_is_free_to_change_un_pins_no_plan():
    from aurora_train.config.schema import Core
    from aurora_train.train.planning import asked

    whole = Core.model_construct(memory=Core.model_fields["memory"].default)
    assert not {"guard", "on_oom"} & asked(whole).keys()


def test_without_the_compiler_a_plan_is_estimated_and_says_what_would_verify_it(no_compiler, language_model):
    told = []
    plan = plan_config(*language_model(), machine="h100", progress=lambda *step: told.append(step))
    assert plan.compiled_bytes is None and 0 < plan.predicted_bytes < plan.budget_bytes
    assert (plan.machine, plan.platform, plan.budget_bytes) == ("h100", "gpu", find_machine("h100").budget_bytes)
    assert "pip install 'aurora_train[plan]'" in plan.details["not_verified"][0] and "not compiled" in plan.reason
    assert not told and plan.details["compiles"] == 0
    assert plan.details["time"]["step_seconds"] > 0 and plan.details["time"]["rates"] != "measured"


@pytest.mark.skipif(not planning.can_compile_for_gpu(), reason="nothing compiles for an absent GPU here")
def test_a_step_that_the_compiler_of_an_absent_gpu_cannot_compile_is_estimated_and_says_so(language_model, monkeypatch):
    """As XLA does of jax 0.10 for `driving/motion` on a DGX Station: "Couldn't find output tile sizes"."""

    def fails(self, plan):
        raise jax.errors.JaxRuntimeError("INTERNAL: no tile sizes\nwith much more")

    config, recipe = language_model()
    monkeypatch.setattr(Rehearsal, "compile", fails)
    plan = plan_config(config, recipe, machine="dgx-station")
    compiler, peak, *_ = plan.details["not_verified"]
    assert "compiling for dgx-station: XLA failed (INTERNAL: no tile sizes" in compiler and "\n" not in compiler
    assert plan.compiled_bytes is None and plan.predicted_bytes > 0 and peak.startswith("the peak: nothing")


def test_a_compiler_that_is_not_wanted_is_not_recommended(monkeypatch, language_model):
    monkeypatch.setattr("aurora_train.train.rehearsal.can_compile_for_gpu", lambda: False)
    monkeypatch.setattr("aurora_train.plan.account.can_compile_for_gpu", lambda: True)
    plan = plan_config(*language_model(), machine="h100", verify=False)
    assert plan.compiled_bytes is None and "pip" not in " ".join(plan.details["not_verified"])


def test_less_memory_gives_a_plan_that_recomputes_more(no_compiler, language_model):
    roomy = plan_config(*language_model(), machine="dgx-spark")
    tight = plan_config(*language_model(), machine="dgx-spark", budget=int(0.6 * roomy.predicted_bytes))
    assert tight.predicted_bytes <= 0.6 * roomy.predicted_bytes and "--budget" in tight.reason
    time = [plan.details["time"]["step_seconds"] for plan in (roomy, tight)]
    assert time[0] <= time[1] and tight.details["next_faster"]["lacks_bytes"] > 0


def test_a_plan_is_made_once_and_again_for_anything_that_could_change_it(no_compiler, language_model, monkeypatch):
    made = []
    monkeypatch.setattr(planning.Planner, "run", lambda self: made.append(self.budget) or Plan(8, 1, budget_bytes=1))
    config, recipe = language_model()
    first = plan_config(config, recipe, machine="h100")
    again = plan_config(config, recipe, machine="h100")
    assert len(made) == 1 and again.work == first.work and again.details["cached"] and not first.details
    plan_config(config, recipe, machine="h200")
    plan_config(config, recipe, machine="h100", budget=MB)
    plan_config(*language_model(train={"batch": 4}), machine="h100")
    assert len(made) == 4


def test_a_broken_cache_is_planned_again(no_compiler, language_model, plans, monkeypatch):
    made = []
    monkeypatch.setattr(planning.Planner, "run", lambda self: made.append(1) or Plan(8, 1))
    config, recipe = language_model()
    plan_config(config, recipe, machine="h100")
    (kept,) = plans.iterdir()
    for broken in ("", "{", "[]", json.dumps({"key": "another"}), kept.read_text()[:-20]):
        kept.write_text(broken)
        assert plan_config(config, recipe, machine="h100") == Plan(8, 1)
    assert len(made) == 6


def test_a_cache_that_cannot_be_written_costs_no_plan(no_compiler, language_model, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(planning.Planner, "run", lambda self: Plan(8, 1))
    assert plan_config(*language_model(), machine="h100") == Plan(8, 1)


def test_what_does_not_fit_is_refused_with_the_setting_and_what_would_help(no_compiler, language_model):
    with pytest.raises(UserError) as caught:
        plan_config(*language_model(memory={"budget": "1MB"}), machine="h100")
    for part in ("memory.budget", "no plan fits h100", "memory.budget: 1MB", "saves"):
        assert part in str(caught.value)


def test_the_budget_is_the_callers_then_the_configs_then_the_machines(no_compiler, language_model):
    def budget_of(budget=None, machine="h100", **sections):
        plan = plan_config(*language_model(**sections), machine=machine, budget=budget)
        return plan.budget_bytes, plan.reason.partition("budget: ")[2]

    target, asked = find_machine("h100"), {"budget": "50MB"}
    assert budget_of(30 * MB, memory=asked) == (30 * MB, "--budget 30.0 MB")
    assert budget_of(memory=asked) == (50 * MB, "memory.budget: 50MB")
    assert budget_of() == (target.budget_bytes, target.budget_reason)


def test_where_memory_is_shared_a_plan_leaves_room_for_the_copy_that_a_save_makes(no_compiler, language_model):
    box = find_machine("dgx-spark")
    plan = plan_config(*language_model(), machine="dgx-spark")
    state = sum(plan.details["by_cause"][cause] for cause in ("parameters", "optimizer", "average"))
    assert box.budget_bytes - plan.budget_bytes == pytest.approx(SAVE_COPIES * state, rel=1e-3)
    assert "for the copy that a save makes" in plan.reason
    assert not plan.saves_in_place
    adapters = plan_config(*language_model(model={"lora": {"rank": 2}}), machine="dgx-spark")
    by_cause = adapters.details["by_cause"]
    whole = sum(by_cause[cause] for cause in ("parameters", "optimizer", "average", "frozen"))  # one piece: it is small
    assert box.budget_bytes - adapters.budget_bytes == pytest.approx(SAVE_COPIES * whole, rel=1e-3)


@pytest.fixture
def small_pieces(monkeypatch):
    """A save in place holds less than a state, although the states of tests are smaller than a piece."""
    monkeypatch.setattr(account, "PIECE_BYTES", 1)


WHOLE = {"save": "all", "accumulation": 1}  # one plan only, so that it fits or does not


def test_where_the_copy_does_not_fit_beside_a_step_saves_are_made_in_place(
    no_compiler, language_model, small_pieces, monkeypatch
):
    roomy = plan_config(*language_model(memory=WHOLE), machine="dgx-spark")
    state = sum(roomy.details["by_cause"][cause] for cause in ("parameters", "optimizer", "average"))
    for share, in_place in ((1.01, False), (0.5, True)):  # of the copy, beside the step
        budget = int(roomy.predicted_bytes + share * SAVE_COPIES * state)
        box = dataclasses.replace(find_machine("dgx-spark"), budget_bytes=budget)
        monkeypatch.setattr(planning, "find_machine", lambda name, box=box: box)
        plan = plan_config(*language_model(memory=WHOLE), machine="dgx-spark")
        assert plan.saves_in_place == in_place, (budget, plan.predicted_bytes, plan.reason)
        assert Plan.from_json(plan.to_json()) == plan
        assert ("saves in place" in verdict(plan)) == in_place
        assert plan.predicted_bytes <= plan.budget_bytes


def test_a_budget_of_ones_own_that_leaves_no_room_for_the_copy_means_saves_in_place(
    no_compiler, language_model, small_pieces, monkeypatch
):
    roomy = plan_config(*language_model(memory=WHOLE), machine="dgx-spark")
    box = dataclasses.replace(find_machine("dgx-spark"), budget_bytes=roomy.predicted_bytes + MB)
    monkeypatch.setattr(planning, "find_machine", lambda name: box)
    plan = plan_config(*language_model(memory=WHOLE | {"budget": "1GB"}), machine="dgx-spark")
    assert plan.saves_in_place and plan.budget_bytes == 10**9


def test_a_machine_nobody_knows_is_refused(language_model):
    with pytest.raises(UserError, match="h100"):
        plan_config(*language_model(), machine="h1oo")


# ---- for this machine


def test_here_the_plan_is_compiled_unless_told_not_to(language_model):
    config, recipe = language_model()
    search = planner_here(config, recipe, budget=500 * MB, verify=False)
    assert (search.budget, search.budget_reason, search.verify) == (500 * MB, "--budget 500 MB", False)
    assert search.program.config is config and not search.program.remote
    plan = plan_config(config, recipe, budget=500 * MB, verify=False)
    assert plan.compiled_bytes is None and plan.platform == "cpu" and plan.budget_bytes == 500 * MB
    assert "pip" not in plan.details["not_verified"][0], "here nothing is missing"


def test_a_plan_that_free_memory_cannot_change_is_kept_for_the_next_start(language_model, plans, monkeypatch):
    config, recipe = language_model()
    recipe.use({"vocabulary": 257})

    def plan(config):
        return planning.plan_here(config, recipe, planning.rehearse(config, recipe), None)

    first = plan(config)
    assert len(list(plans.iterdir())) == 1 and "cached" not in first.details
    with monkeypatch.context() as patched:
        patched.setattr(planning.Planner, "run", lambda planner: pytest.fail("planned again"))
        again = plan(config)
    assert again.work == first.work and again.predicted_bytes == first.predicted_bytes and again.details["cached"]
    tight, _ = language_model(memory={"budget": f"{int(1.9 * first.predicted_bytes)}B"})
    assert "cached" not in plan(tight).details  # what does not fit with ease is searched for each time
    assert "cached" not in plan(tight).details


def test_the_configs_budget_counts_here_too(language_model):
    assert planner_here(*language_model(memory={"budget": "400MB"})).budget == 400 * MB
    auto = planner_here(*language_model())
    assert auto.budget > 0 and "kept for the rest of the machine" in auto.budget_reason


# ---- what a run is pinned to


PLAN = Plan(4, 2, {"stack": [Segment(0, 4, ("hidden",))]}, "because", "cpu", "cpu", 9, 8, 7)


@pytest.fixture
def pinned(tmp_path, language_model):
    """(run, config, mesh) of a run that was pinned to PLAN."""
    config, _ = language_model()
    run, mesh = Run(tmp_path), meshes.make_mesh(1, 1)
    record = {"plan": PLAN.to_json(), "mesh": dict(mesh.shape), "device": device_kind(mesh), "asked": asked(config)}
    files.write_json(run.plan, record)
    return run, config, mesh


def test_a_resume_has_the_plan_it_was_pinned_to(pinned):
    assert pinned_plan(*pinned) == PLAN


def test_a_new_run_has_none(tmp_path, language_model):
    assert pinned_plan(Run(tmp_path), language_model()[0], meshes.make_mesh(1, 1)) is None


@pytest.mark.parametrize(
    "changed",
    [{"budget": "2GB"}, {"accumulation": 2}, {"save": "nothing"}, {"save": ["query"]}, {"unroll": True}],
    ids=str,
)
def test_a_changed_memory_section_asks_for_another_plan(pinned, changed, language_model):
    run, _, mesh = pinned
    assert pinned_plan(run, language_model(memory=changed)[0], mesh) is None


def test_what_does_not_decide_a_plan_does_not_ask_for_another(pinned, language_model):
    run, _, mesh = pinned
    other, _ = language_model(memory={"on_oom": "stop"}, train={"steps": 7}, log={"every": 3})
    assert pinned_plan(run, other, mesh) == PLAN


def test_another_mesh_or_device_asks_for_another_plan(pinned):
    run, config, mesh = pinned
    device = SimpleNamespace(device_kind=device_kind(mesh))
    like = SimpleNamespace(shape=dict(mesh.shape), devices=SimpleNamespace(flat=[device]))
    assert pinned_plan(run, config, like) == PLAN
    assert pinned_plan(run, config, SimpleNamespace(shape={"data": 2, "fsdp": 1}, devices=like.devices)) is None
    device.device_kind = "another"
    assert pinned_plan(run, config, like) is None


def test_a_real_run_resumes_with_its_plan_and_plans_again_for_another_memory_section(finished, capsys):
    before = files.read_json(finished / "plan.json")
    assert before["asked"]["accumulation"] == 2 and before["plan"]["accumulation"] == 2
    assert main(["resume", "run", "train.steps=31", "--quiet"]) == 0
    assert files.read_json(finished / "plan.json")["plan"]["stacks"] == before["plan"]["stacks"]
    assert main(["resume", "run", "train.steps=32", "memory.accumulation=4", "--quiet"]) == 0
    after = files.read_json(finished / "plan.json")
    assert after["plan"]["accumulation"] == 4 and after["asked"]["accumulation"] == 4


# ---- losses that couple a batch
