"""The pages of `aurora watch` over HTTP: what they say of runs of every kind, and who may see them."""

from __future__ import annotations

import json
import os
import re
import shutil
from urllib.parse import urlencode

import pytest
from asking import served
from kit import in_process
from tools.test_report import Page
from watching import TOKEN, Browser, held, make_runs, step, trained, watching

from aurora_train.record.metrics import encode

NAMES = ["arm", "day", "failed", "foreign", "night", "stopped", "sweep/lr=0.1", "unreadable"]


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab") / "runs"
    make_runs(folder)
    return folder


@pytest.fixture(scope="module")
def ask(top):
    with held(top / "day"), watching(top) as browser:
        yield browser


def rows(text: str) -> dict[str, str]:
    """The text of each row of the list, by the run's name."""
    found = re.findall(r'<tr id="run ([^"]*)"(.*?)</tr>', text, re.DOTALL)
    return {name: " ".join(re.sub(r"<[^>]*>", " ", f"<{content}").split()) for name, content in found}


def words_of(text: str) -> str:
    page = Page(text)
    return " ".join("".join(page.texts).split())


# ---- what is shown


def test_the_list_has_every_run_with_its_state_progress_and_figures_the_training_ones_first(ask):
    text = ask.whole("/")
    found = rows(text)
    assert sorted(found) == NAMES and next(iter(found)) == "day"
    for name, said in {
        "day": ("training", "30 of 60 · 1 min 00 s left", "2.1333", "2.2333 step 30", "39.0k", "0.0339", "61.0 GB"),
        "night": ("killed", "40 of 60"), "stopped": ("stopped", "optimizer.lr=0.03"),
        "sweep/lr=0.1": ("finished", "60 of 60", "1.6250 bits per byte"), "arm": ("finished", "0.9800 success"),
        "failed": ("failed start", "it took no step"), "unreadable": ("unreadable", "0xff"), "foreign": ("1.5000",),
    }.items():  # fmt: skip
        assert all(part in found[name] for part in said), (name, found[name])
    assert "8 runs: " in text and text.count('class="spark"') == 7
    Page(text)


def test_a_row_can_be_found_by_words_and_the_best_comes_first_where_a_column_is_chosen(ask):
    assert list(rows(ask.whole("/?q=language+0.03"))) == ["stopped"]
    assert list(rows(ask.whole("/?q=KILLED"))) == ["foreign", "night"]
    assert rows(ask.whole("/?q=%3Cb%3E")) == {} and "&lt;b&gt;" in ask("/?q=%3Cb%3E").text
    assert list(rows(ask.whole("/?sort=name"))) == NAMES
    assert list(rows(ask.whole("/?sort=validation")))[2:4] == ["sweep/lr=0.1", "night"]
    assert list(rows(ask.whole("/?sort=loss")))[-1] == "failed", "what has none comes last"
    assert len(rows(ask.whole("/?sort=nonsense"))) == 8


def test_a_run_has_curves_its_score_samples_events_config_and_a_link_to_its_report(ask):
    text = ask.run("sweep/lr=0.1")
    told = words_of(text)
    for said in ("bits per byte", "1.6250", "xz", "39.0k", "0.0339", "4.58 Wh", "61.0 GB", "1 resume", "finish",
                 "finished", "step 60 of 60", "waiting for data", "power, watts", "targets per joule", "accuracy",
                 "width: 16"):  # fmt: skip
        assert said in told, said
    assert "<script>alert(1)</script>" in told and "<img src=x" in told, "and what a model wrote is text"
    assert text.count('class="chart"') == 11 and "<title>resumed at step 20</title>" in text
    assert 'href="/report/sweep/lr%3D0.1"' in text and "/report/" not in ask.run("night")
    day = words_of(ask.run("day"))
    assert "1 min 00 s left" in day and "training" in day and "process 1 on nowhere" in day


def test_a_run_shows_the_films_of_its_rollouts_and_no_other_file(ask):
    text = ask.run("arm")
    assert re.findall(r'<img [^>]*src="([^"]*)"', text) == ["/picture/arm?file=rollout-0.gif"]
    assert "Seed 0" in text and "not there any more" in text, "a link is not followed"
    film = ask("/picture/arm?file=rollout-0.gif")
    assert film.status == 200 and film.headers["content-type"] == "image/gif" and film.text.startswith("GIF89a")
    for file in ("unlisted.gif", "link.gif", "../config.yaml", "config.yaml", "", "/etc/hostname"):
        assert ask(f"/picture/arm?{urlencode({'file': file})}").status == 404, file


def test_damaged_and_foreign_files_are_said_and_hide_nothing_else(ask):
    text = ask.run("foreign")
    told = words_of(text)
    assert "3 lines of its logs cannot be read" in told and "1 value not finite" in told
    assert "cannot be shown" in told and "step-1.json" in told, "a damaged sample"
    assert told.count("loss") > 1 and "skip" in told
    told = words_of(ask.run("unreadable"))
    assert "unreadable" in told and "0xff is not UTF-8" in told and "loss" in told
    assert "nothing to draw yet" in ask.run("failed")
    assert ask("/run/nobody").status == 404 and "There is no run nobody" in ask("/run/nobody").text
    assert ask("/run/../../etc").status == 404 and ask("/nowhere").status == 404


def test_curves_are_looked_at_by_hours_by_targets_smoothed_and_on_logarithmic_axes(ask):
    plain = ask.run("night")
    assert 'data-unit="step"' in plain and 'class="raw"' not in plain
    other = ask.run("night", smooth="5", by="targets", logy="1", logx="1")
    assert 'data-unit="targets"' in other and 'class="raw"' in other
    (low, high, log), *_ = (found.split() for found in re.findall('data-x="([^"]*)"', other))
    assert (float(low), log) == (pytest.approx(4096 / 1.25 * 1.25), "1") and float(high) == pytest.approx(4096 * 40)
    assert 'value="5" selected' in other and other.count(" checked") == 2
    hours = ask.run("night", by="hours")
    assert float(re.search('data-x="[^ ]* ([^ ]*)', hours)[1]) == pytest.approx(39 * 2 / 3600)
    assert ask.run("night", smooth="-1", by="<b>", logx="x") == ask.run("night"), "and what is no view is none"


def test_runs_are_compared_in_the_same_figures_but_never_with_those_of_another_recipe(ask):
    text = ask.whole("/compare?" + urlencode({"run": ["day", "night", "arm", "nobody"]}, doseq=True))
    assert "there is no run nobody" in text and text.count("<h2>language model</h2>") == 1
    figures = re.findall(r"<figure id=\"figure loss\".*?</figure>", text, re.DOTALL)
    assert [re.findall('class="line" data-name="([^"]*)"', figure) for figure in figures] == [["day", "night"], [""]]
    told = words_of(text)
    assert "optimizer.lr" in told and "0.02" in told and "2.1333" in told
    assert "Tick runs" in ask.whole("/compare")
    many = ask.whole("/compare?" + urlencode({"run": ["day"] * 50}, doseq=True))
    assert many.count("swatch") == ask.whole("/compare?run=day").count("swatch")


def test_a_step_that_is_taken_is_in_the_next_answer_and_a_run_that_is_killed_is_said_to_be(tmp_path):
    run = trained(tmp_path / "runs" / "a", 30, 60)
    with watching(tmp_path / "runs") as ask:
        with held(run):
            assert "training" in rows(ask.whole("/"))["a"]
            with open(run / "metrics.jsonl", "ab") as log:
                log.write(encode(step(31)) + b'{"step": 32, "lo')
            assert "31 of 60" in rows(ask.whole("/"))["a"] and "step 31 of 60" in ask.run("a")
        assert "killed" in rows(ask.whole("/"))["a"], "though no file has changed"
        trained(tmp_path / "runs" / "b", 10, 60)
        assert sorted(rows(ask.whole("/"))) == ["a", "b"]
        shutil.rmtree(run)
        assert sorted(rows(ask.whole("/"))) == ["b"] and ask("/run/a").status == 404
        shutil.rmtree(tmp_path / "runs")
        assert "there is no such folder" in ask("/").text


def test_watching_changes_no_file(ask, top):
    def all_files():
        return sorted((str(path), path.lstat().st_mtime_ns, path.lstat().st_size) for path in top.rglob("*"))

    before = all_files()
    for path in ("/", "/compare?run=day&run=night", *(f"/run/{name}" for name in NAMES)):
        ask(path)
    assert all_files() == before


# ---- who may see it


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}])
def test_a_page_of_the_web_sees_nothing(ask, headers):
    answer = ask("/", **headers)
    assert answer.status == 403 and "night" not in answer.text


def test_no_page_and_no_file_of_a_run_reaches_out_or_runs_what_is_not_ours(ask):
    policy = ask("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "unsafe-inline'; script" not in policy
    for path in ("/report/sweep/lr=0.1", "/picture/arm?file=rollout-0.gif"):
        answer = ask(path)
        policy = answer.headers["content-security-policy"]
        assert answer.status == 200 and policy.startswith("sandbox; default-src 'none'")
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert ask("/report/night").status == 404


def test_only_the_token_or_the_cookie_it_becomes_opens_a_server_that_has_one(top):
    with watching(top, TOKEN) as ask:
        pages = ("/", "/run/night", "/report/sweep/lr=0.1", "/picture/arm?file=rollout-0.gif", "/compare?run=night")
        for path in pages:
            closed = ask(path)
            assert closed.status == 401 and "night" not in closed.text and 'name="token"' in closed.text, path
            assert ask(path, Authorization=f"Bearer {TOKEN}").status == 200, path
        assert ask("/health").status == 200
        for wrong in ("", "token=", "token=" + TOKEN[:-1], "token=" + "x" * 100_000):
            assert ask("/enter", "POST", wrong).status == 401
        assert ask("/enter", "POST", f"token={TOKEN}", Origin="http://evil.example").status == 403
        entered = ask("/enter", "POST", f"token={TOKEN}")
        cookie = entered.headers["set-cookie"]
        assert entered.status == 303 and TOKEN not in cookie
        assert "HttpOnly" in cookie and "samesite=lax" in cookie.lower()
        known = Browser(ask.url, Cookie=cookie.partition(";")[0])
        assert sorted(rows(known.whole("/"))) == NAMES
        for forged in ("", TOKEN, "0" * 64, "\x01; ;;="):
            assert ask("/", Cookie=f"aurora_watch={forged}").status == 401


# ---- the verb


def test_the_verb_says_where_it_listens_and_ends_at_a_signal(top, capsys):
    found = {}

    def asks(place):
        found.update(rows(Browser(f"http://{place}").whole("/")))

    assert served(["watch", str(top), "--json"], asks) == 0
    out, err = capsys.readouterr()
    assert sorted(found) == NAMES and json.loads(out)["runs"] == 8
    assert json.loads(out)["url"].startswith("http://127.0.0.1:")
    assert "8 runs in" in err and "Ctrl-C ends it" in err


def test_what_cannot_be_watched_is_refused_in_one_message(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, says in (
        (("nowhere",), "nowhere: there is no such folder"), (("--host", "0.0.0.0"), "--token-file"),
        (("--port", "99999"), "99999 is not a port"), (("--token-file", "none"), "the token cannot be read"),
    ):  # fmt: skip
        assert in_process("watch", *arguments) == 2
        assert says in capsys.readouterr().err
    with watching(None) as ask:
        assert in_process("watch", "--port", ask.url.rpartition(":")[2]) == 2
        assert "--port 0 takes a free one" in capsys.readouterr().err
        assert "There are no runs here yet" in ask.whole("/")
        trained(tmp_path / "runs" / "first", 10, 60)
        assert list(rows(ask.whole("/"))) == ["first"]
    assert not os.path.exists("nowhere")
