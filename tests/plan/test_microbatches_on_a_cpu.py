"""On a CPU with room, where a large batch is no faster than its parts, the planner takes it in parts."""

from test_planner import LENGTH, planner, program

from aurora_train.plan.planner import ROOMY


def parts_of(batch, **more) -> tuple[int, int]:
    sections = {"train": {"batch": batch}} | more.pop("sections", {})
    plan = planner(program(**sections, **more), 2**37, compiled_later=True).run()
    assert plan.microbatch * plan.accumulation == batch
    assert all(segment.save is None for cut in plan.stacks.values() for segment in cut), "everything is kept"
    whole = planner(program(train={"batch": batch}, memory={"accumulation": 1}), 2**37, compiled_later=True).run()
    assert (plan.predicted_bytes < whole.predicted_bytes) == (plan.accumulation > 1)
    return plan.accumulation, plan.predicted_bytes


def test_a_cpu_takes_a_large_batch_in_parts_until_its_temporaries_are_small():
    accumulation, needed = parts_of(16384)
    assert accumulation > 1 and ROOMY / 4 < needed < 1.5 * ROOMY
    assert parts_of(128)[0] == 1


def test_no_part_is_so_small_that_adding_gradients_shows(monkeypatch):
    monkeypatch.setattr("aurora_train.plan.planner.ROOMY", 1000)
    accumulation, _ = parts_of(512)
    assert 512 // accumulation * LENGTH >= 1000 > 512 // (4 * accumulation) * LENGTH  # tokens
    assert parts_of(32)[0] == 1


def test_a_cpu_leaves_a_batch_whole_where_that_was_asked_for_or_the_loss_needs_it():
    assert parts_of(4096, sections={"memory": {"accumulation": 1}})[0] == 1
    assert parts_of(4096, couples="microbatch")[0] == 1
    assert parts_of(4096)[0] > 1
