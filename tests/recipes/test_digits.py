"""The tutorial recipe: it reads digits it has never seen, and comes back from a kill to the bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from kit import events, final_hash, losses

from aurora_train.config import load
from aurora_train.train.rehearsal import make_recipe


@pytest.fixture(scope="module")
def recipe():
    return make_recipe(load("vision/digits")).ready(lambda *_: None)


def test_no_image_is_in_two_splits_and_an_images_own_hash_decides(recipe):
    splits = {name: recipe.data(name) for name in ("train", "validation", "test")}
    seen = [image.tobytes() for source in splits.values() for image in source.images]
    assert len(seen) == 1797 and len(set(seen)) == len(seen)
    assert 0.15 < len(splits["test"]) / 1797 < 0.25 and 0.06 < len(splits["validation"]) / 1797 < 0.14
    assert recipe.known == {"mean": pytest.approx(4.88, abs=0.05), "deviation": pytest.approx(6.0, abs=0.1)}


def test_the_rivals_of_the_score_are_of_the_same_test_images(recipe, tmp_path):
    rivals = recipe.baselines(tmp_path, lambda *_: None)
    assert 0.85 < rivals["nearest_mean"] < 0.95 < 0.97 < rivals["three_nearest"] <= 1
    source = recipe.data("test")
    perfect = recipe.score(lambda batch: source.labels, "test", None, tmp_path, lambda *_: None)
    assert perfect["accuracy"] == 1 and np.trace([row[1:] for row in perfect["tables"][0]["rows"]]) == len(source)


def killed_and_moved(aurora, tmp_path):
    """`aurora recipes copy vision/digits`, as docs/extend.md has it; then trained, killed, moved and resumed."""
    aurora.good("recipes", "copy", "vision/digits", "mine")
    victim = aurora.start("train", "mine/digits.yaml", "--run", "killed")
    for line in victim.stderr:
        if "saved step 100" in line:
            break
    victim.kill()
    assert victim.wait() == -9
    victim.stderr.close()
    (tmp_path / "killed").rename(tmp_path / "moved")
    aurora.good("resume", "moved")
    assert events(tmp_path / "moved", "resume")[0]["step"] >= 100
    scores = json.loads((tmp_path / "moved" / "scores.json").read_text())
    assert scores["score"]["accuracy"] >= 0.98 and scores["score"]["images"] == 361


@pytest.mark.slow
def test_a_copy_of_it_reads_digits_although_it_was_killed_and_moved(aurora, tmp_path):
    killed_and_moved(aurora, tmp_path)
    assert [step for step, _ in losses(tmp_path / "moved")] == list(range(1, 601))


@pytest.mark.release
def test_a_copy_of_it_comes_back_from_a_kill_to_the_bit(aurora, tmp_path):
    killed_and_moved(aurora, tmp_path)
    aurora.good("train", "mine/digits.yaml", "--run", "whole")
    assert losses(tmp_path / "moved") == losses(tmp_path / "whole")
    assert final_hash(tmp_path / "moved") == final_hash(tmp_path / "whole")
