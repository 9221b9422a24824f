"""Mixtures: exact shares, every source in epochs of its own, one store for all, and what may not be asked of one."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from corpora import config, text, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import Aurora, losses

from aurora_train.check.inspection import inspect_batch
from aurora_train.data.batches import read_batch
from aurora_train.data.order import Part, mixed, slots
from aurora_train.errors import UserError
from language.prepare import prepare
from language.rows import TokenSource
from language.settings import MixedSourceConfig

STRETCH = 65_536
THREE = (Part(5.0, 0, 1000), Part(1.0, 1000, 7), Part(2.0, 1007, 300))
GOLDEN = [1004, 913, 681, 1155, 1019, 462, 422, 1160, 1002, 812, 470, 266]


def stream(seed, parts, length, batch=1024):
    return np.concatenate([mixed(seed, step, batch, parts) for step in range(-(-length // batch))])[:length]


def test_the_order_of_a_mixture_is_the_one_that_every_earlier_version_gave():
    assert mixed(3, 100, 12, THREE).tolist() == GOLDEN


def test_every_stretch_has_exact_shares_and_every_source_its_own_epochs():
    chosen = stream(0, THREE, 2 * STRETCH)
    for half in (chosen[:STRETCH], chosen[STRETCH:]):
        counts = [np.count_nonzero((half >= part.first) & (half < part.first + part.count)) for part in THREE]
        assert counts == slots(THREE).tolist() == [40960, 8192, 16384]
    for part in THREE:  # in its own order of turns, an epoch has each example once, so no count is two from another
        mine = chosen[(chosen >= part.first) & (chosen < part.first + part.count)] - part.first
        seen = np.bincount(mine, minlength=part.count)
        assert seen.max() - seen.min() <= 1


def test_the_shares_hold_in_every_hundred_batches_too():
    chosen = stream(1, THREE, 100 * 64)
    share = np.mean(chosen < 1000)
    assert abs(share - 5 / 8) < 5 * np.sqrt(5 / 8 * 3 / 8 / len(chosen))
    firsts = [tuple(mixed(seed, 0, 8, THREE)) for seed in range(20)]
    assert len(set(firsts)) == 20


PARTS = st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(1, 500)), min_size=1, max_size=5)


@settings(max_examples=10, deadline=None)
@given(PARTS, st.integers(0, 2**40), st.integers(1, 100), st.integers(0, 2000), st.integers(1, 6))
def test_a_batch_of_a_mixture_is_the_same_at_once_or_in_parts(sizes, seed, batch, step, cut):
    ends = np.cumsum([count for _, count in sizes])
    parts = tuple(Part(weight, int(end - count), count) for (weight, count), end in zip(sizes, ends, strict=True))
    counts = slots(parts)
    assert slots((Part(1e-6, 0, 9), Part(1e-6, 9, 9), Part(1.0, 18, 9))).tolist() == [1, 1, STRETCH - 2]
    assert counts.sum() == STRETCH and counts.min() >= 1
    whole = mixed(seed, step, batch * cut, parts)
    assert np.array_equal(whole, np.concatenate([mixed(seed, step * cut + i, batch, parts) for i in range(cut)]))
    assert whole.min() >= 0 and whole.max() < ends[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("mixture")
    write_folder(here / "code", 40)
    for i in range(15):
        (here / "notes").mkdir(exist_ok=True)
        (here / "notes" / f"{i}.txt").write_text(text(1000 + i, 12))
    return here


def mixture(folder, **weights):
    parts = {name: MixedSourceConfig(source=str(folder / name), weight=weight) for name, weight in weights.items()}
    return config("python-stdlib", mix=parts)


def test_sources_lie_one_after_the_other_in_one_store_and_the_weights_do_not_change_it(folder):
    store = prepare(mixture(folder, notes=3.0, code=1.0), folder / "cache")
    names = store.names("train")
    assert {name.split("/")[0] for name in names} == {"code", "notes"} and names == sorted(names, key=by_source)
    assert store.manifest["mix"]["train"] == {
        name: sum(n.startswith(f"{name}/") for n in names) for name in ("code", "notes")
    }
    again = prepare(mixture(folder, code=9.0, notes=1.0), folder / "cache")  # in another order as well
    assert again.fingerprint == store.fingerprint and again.folder == store.folder


def by_source(name):
    return name.split("/")[0]


def test_rows_come_from_each_source_by_its_weight_and_other_weights_are_other_data(folder):
    store = prepare(mixture(folder, notes=3.0, code=1.0), folder / "cache")
    source = TokenSource(store, "train", 32, {"notes": 3.0, "code": 1.0})
    code, notes = source.mixture
    assert (code.first, code.first + code.count) == (0, notes.first) and notes.first + notes.count == len(source)
    for index in (0, notes.first - 1, notes.first + 1, len(source) - 1):
        begins_in = by_source(source.documents_of(index)[0])
        assert begins_in == ("code" if index < notes.first else "notes")
    batches = [read_batch(source, 0, 32, step) for step in range(60)]
    from_notes = [by_source(source.documents_of(i)[0]) == "notes" for step in range(60) for i in chosen(source, step)]
    assert np.mean(from_notes) == pytest.approx(0.75, abs=0.05)
    taken = source.take(np.array(chosen(source, 7)))
    assert all(np.array_equal(batches[7][name], array) for name, array in taken.items())
    prints = {TokenSource(store, "train", 32, {"notes": n, "code": 1.0}).fingerprint for n in (1.0, 2.0, 3.0)}
    assert len(prints | {TokenSource(store, "train", 32).fingerprint}) == 4


def chosen(source, step):
    return inspect_batch(source, "train", 0, 32, step, 0)["indices"]


def test_a_batch_of_a_mixture_says_where_it_comes_from(folder):
    store = prepare(mixture(folder, notes=3.0, code=1.0), folder / "cache")
    facts = inspect_batch(TokenSource(store, "train", 32, {"notes": 3.0, "code": 1.0}), "train", 0, 32, 100, 0)
    mix = facts["mix"]
    assert mix["notes"]["share"] == 0.75 and mix["notes"]["in_batch"] + mix["code"]["in_batch"] == 32
    assert mix["notes"]["passes"] == pytest.approx(3200 * 0.75 / mix["notes"]["rows"])


def test_a_source_with_less_than_a_row_is_named(folder):
    (folder / "small").mkdir(exist_ok=True)
    (folder / "small" / "one.txt").write_text("a line of its own\n")
    store = prepare(mixture(folder, code=1.0, small=1.0), folder / "cache")
    with pytest.raises(UserError, match=r"data\.mix\.small: the source small has less than one row of 512 tokens"):
        TokenSource(store, "train", 512, {"code": 1.0, "small": 1.0})


@pytest.mark.release
def test_the_mixture_of_the_documentation_trains_is_scored_by_source_and_comes_back(folder, tmp_path):
    (yaml,) = re.findall(r"```yaml\n(.*?)```", (Path(__file__).parents[3] / "docs/data.md").read_text(), flags=re.S)
    for name in ("code", "notes"):
        shutil.copytree(folder / name, tmp_path / name)
    (tmp_path / "mix.yaml").write_text(yaml)
    aurora = Aurora(tmp_path, tmp_path / "cache")
    short = ("train.steps=12", "checkpoint.every=5", "data.holdout_test=0.2", "optimizer.schedule.name=constant")
    short += ("evaluate.baselines=false",)
    aurora.good("train", "mix.yaml", *short, "--run", "whole", "--quiet")
    scores = json.loads((tmp_path / "whole/scores.json").read_text())["score"]
    assert scores["bits_per_byte_code"] > 0 and scores["bits_per_byte_notes"] > 0
    aurora.good("train", "mix.yaml", "train.steps=7", *short[1:], "--run", "cut", "--quiet")
    aurora.good("resume", "cut", "train.steps=12", "--quiet")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    refused = aurora("resume", "cut", "train.steps=14", "data.mix.code.weight=1", "--quiet")
    assert refused.returncode == 2 and "data.mix" in refused.stderr
    assert "code: 75.00% of the rows" in aurora.good("inspect-batch", "cut", "3").stdout


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"source": "somewhere", "mix": {"a": MixedSourceConfig(source="python-stdlib")}}, "sources in data.mix alone"),
        ({"mix": {"a/b": MixedSourceConfig(source="python-stdlib")}}, "cannot be called 'a/b'"),
        ({"mix": {"a": MixedSourceConfig(source="no/place")}}, r"data\.mix\.a\.source: there is no file or folder"),
        ({"mix": {"a": MixedSourceConfig(source="hub:x/y")}}, r"mix\.a\.source: hub:x/y is on the network"),
    ],
)
def test_what_a_mixture_may_not_be(settings, said, tmp_path):
    wanted = config(settings.pop("source", "python-stdlib"), **settings)
    with pytest.raises(UserError, match=said):
        prepare(wanted, tmp_path)
