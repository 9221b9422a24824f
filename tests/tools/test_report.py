"""The report is one file that needs nothing else, shows what was saved, and says what was not."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from aurora_train.errors import UserError
from aurora_train.record.metrics import EventLog, MetricsLog
from aurora_train.tools.chart import running_mean, thin
from aurora_train.tools.report import write_report

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.texts, self.attributes = [], [], [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._note(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._note(attrs)

    def _note(self, attrs):
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny-00000000"
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text("recipe: language_model\ntrain: {steps: 40}\n")
    with MetricsLog(folder / "metrics.jsonl") as log:
        for step in range(1, 41):
            record = {"step": step, "loss": 3 / step, "tokens": 100, "lr": 1e-3, "grad_norm": 1.0, "skipped": 0}
            if step == 7:
                record["loss"] = float("nan")
            if step % 10 == 0:
                record |= {"tokens_per_s": 1e4, "mfu": None, "memory_bytes": 10**9, "seconds": step / 10}
                log.write({"step": step, "evaluation": {"loss": 3.1 / step}})
            log.write(record)
    with EventLog(folder / "events.jsonl") as log:
        log.event("start", 0)
        for step in range(1, 40):
            log.event("save", step)
        log.event("resume", 20)
        log.event("finish", 40)
    scores = {
        "headline": "bits_per_byte",
        "score": {"bits_per_byte": 1.5, "share_<parses>": 0.25},
        "baselines": {"xz": 1.594, "gzip": {"bits_per_byte": 1.712}, "other": {"measure": 3}},
        "tables": [{"title": "Per document", "columns": ["name", "bytes"], "rows": [["<i>a</i>.py", 12]]}],
        "notes": ["held out by path"],
        "step": 40,
    }
    provenance = {"data": {"licence": "PSF-2.0"}, "machine": {"device": "AMD & Co"}, "versions": {"jax": "0.10.2"}}
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "provenance.json").write_text(json.dumps(provenance))
    sample = [{"prompt": "<script>alert(1)</script>", "text": '"><img src=http://evil.example/x>\x00\ud800'}, {"n": 1}]
    (folder / "samples" / "step-40.json").write_text(json.dumps(sample))
    return folder


@pytest.fixture(scope="module")
def html(run):
    return write_report(run).read_text()


def test_the_report_fetches_nothing_and_runs_nothing(html):
    assert not re.search(r"<script|@import|<link|<iframe|<img|javascript:", html, re.IGNORECASE)
    fetching = ("src", "href", "xlink:href", "srcset", "action")
    assert not [value for name, value in Page(html).attributes if name in fetching]
    assert not re.search(r"url\(", html)


def test_the_report_is_well_formed_and_its_ids_are_unique(html):
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 5  # loss, learning rate, gradient norm, rate, memory


def test_what_the_model_wrote_is_shown_as_text(html):
    page = Page(html)
    text = "".join(page.texts)
    assert "<script>alert(1)</script>" in text and "<img src=http://evil.example/x>" in text
    assert "<i>a</i>.py" in text and "AMD & Co" in text


def test_score_stands_beside_its_baselines(html):
    text = " ".join("".join(Page(html).texts).split())
    for told in ("bits per byte", "1.500", "1.594", "1.712", "this run", "held out by path", "PSF-2.0", "resumed once"):
        assert told in text, told


def test_the_same_files_give_the_same_report(run, html):
    assert write_report(run).read_text() == html


def test_a_run_that_has_just_begun_says_what_is_not_recorded(tmp_path):
    (tmp_path / "config.yaml").write_text("recipe: x\n")
    page = Page(write_report(tmp_path).read_text())
    assert sum("not recorded" in text for text in page.texts) >= 5


def test_a_folder_that_is_no_run_is_one_clear_message(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)
    for name in ("arm", ".tmp.0a1b"):  # the second is what a killed export leaves
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("recipe: x\n")
    with pytest.raises(UserError) as told:
        write_report(tmp_path / "arn")
    assert told.value.hint == "runs there: arm"


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("recipe: x\n")
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(UserError, match="scores.json"):
        write_report(tmp_path)


def test_a_long_curve_is_thinned_without_moving_it():
    steps = np.arange(1, 100_001, dtype=float)
    x, y = thin(steps, steps * 2)
    assert len(x) < 600 and x[-1] == steps[-1]
    np.testing.assert_allclose(y, 2 * x)


def test_a_running_mean_skips_what_is_not_finite():
    values = np.array([1.0, np.nan, 3.0, 5.0])
    np.testing.assert_allclose(running_mean(values, 2), [1.0, 2.0, 4.0, 4.0])
