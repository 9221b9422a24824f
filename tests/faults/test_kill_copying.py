"""A run whose model copies from the document so far comes back as any other does, and needs its data no more."""

from __future__ import annotations

import json

import pytest
from killing import assert_kills_change_no_bit
from kit import TINY, Aurora

STEPS = 40


@pytest.mark.release
def test_a_run_that_copies_is_the_run_that_was_never_killed_and_is_complete(tmp_path, corpus):
    config = tmp_path / "copying.yaml"
    config.write_text(TINY.format(corpus=corpus).replace("tied: false", "tied: false, copying: [1, 2, 3, 5]"))
    whole, killed = (Aurora(tmp_path, tmp_path / name) for name in ("cache", "other"))
    whole.good("train", config, "--run", tmp_path / "run")
    assert_kills_change_no_bit(killed, config, STEPS, ["prepare", "step"], 20261201, tmp_path / "run")
    elsewhere = Aurora(tmp_path, tmp_path / "empty")
    text = (corpus / "abc.py").read_text()
    for name, times in (("once.txt", 1), ("twice.txt", 2)):
        (tmp_path / name).write_text(text * times)
    said = [elsewhere.good("evaluate", "run", "--on", name, "--json").stdout for name in ("once.txt", "twice.txt")]
    first, second = (json.loads(one)["score"]["bits_per_byte"] for one in said)
    assert second < 0.75 * first  # what was said before is copied, though no row reaches back to it
    assert elsewhere.good("generate", "run", "--prompt", "def f(", "--max-tokens", "8").stdout
