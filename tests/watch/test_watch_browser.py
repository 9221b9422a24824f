"""`aurora watch` in a real browser without a window, and a real run that is killed while it is watched."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import browser
import pytest
from kit import TINY
from watching import TOKEN, held, make_runs, step, watching

from aurora_train.record.metrics import encode

pytestmark = pytest.mark.slow
in_a_browser = pytest.mark.skipif(browser.FOUND is None, reason="needs Chromium: apt-get install chromium")
PICTURES = os.environ.get("AURORA_PICTURES")  # a folder for screenshots, to be looked at


def picture(page, name: str) -> None:
    if PICTURES:
        page.picture(Path(PICTURES) / f"{name}.png")


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab") / "runs"
    make_runs(folder)
    with held(folder / "day"):
        yield folder


@in_a_browser
def test_the_list_lives_and_what_is_ticked_and_typed_stays(top):
    with watching(top) as ask, browser.page() as page:
        page.go(f"{ask.url}/", width=1440, height=900)
        page.wait("document.querySelectorAll('.runs tbody tr').length === 8")
        picture(page, "list")
        page.js("window.kept = document.getElementById('run night'); kept.querySelector('input').click()")
        with open(top / "day" / "metrics.jsonl", "ab") as log:
            log.write(encode(step(31)))
        page.wait("document.getElementById('run day').innerText.includes('31 of 60')")
        assert page.js("window.kept === document.getElementById('run night') && kept.querySelector('input').checked")
        page.js("document.querySelector('input[type=search]').focus()")
        page.type("night")
        page.wait("document.querySelectorAll('.runs tbody tr').length === 1")
        assert page.js("location.search") == "?q=night" and page.js("document.activeElement.value") == "night"
        assert page.js("document.querySelector('.runs input').checked")
        page.js("document.querySelector('button[form=compare]').click()")
        page.wait("location.pathname === '/compare' && document.querySelectorAll('figure').length > 5")
        assert page.js("document.querySelector('td .swatch').textContent") == "night"


@in_a_browser
def test_a_run_is_drawn_on_the_curves_have_readouts_and_films_run_on(top):
    with watching(top) as ask, browser.page() as page:
        page.go(f"{ask.url}/run/arm", width=1200, height=900)
        page.js("window.film = document.querySelector('img'); window.loss = document.querySelector('.line'); true")
        before = page.js("loss.getAttribute('d')")
        page.wait("film.complete && film.naturalWidth === 1")
        page.js("document.querySelector('details:last-of-type summary').click()")
        with open(top / "arm" / "metrics.jsonl", "ab") as log:
            log.write(encode(step(31, loss=9.0)))
        page.wait("loss.getAttribute('d') !== " + repr(before))
        assert page.js("window.film === document.querySelector('img') && document.querySelector('details').open")
        page.js("document.querySelector('[name=logy]').click()")
        page.wait("document.querySelector('.chart').dataset.y.endsWith(' 1')")
        assert page.js("location.search") == "?smooth=0&by=step&logy=1"
        page.js("(() => { const chart = document.querySelector('.chart'), at = chart.getBoundingClientRect();"
                " chart.dispatchEvent(new PointerEvent('pointermove', {bubbles: true, clientX: at.right - 1,"
                " clientY: at.top + 20})); })()")  # fmt: skip
        told = page.js("document.getElementById('readout').innerText")
        assert "step 31\n" in told and re.search(r"\b[89]\.\d+\s+training", told), told
        picture(page, "readout")


@in_a_browser
@pytest.mark.parametrize("path", ["/", "/run/day", "/run/sweep/lr=0.1", "/compare?run=day&run=night"])
def test_the_page_has_room_on_a_telephone_in_the_dark_and_breaks_no_rule_of_its_own(top, path):
    with watching(top) as ask, browser.page() as page:
        page.go(f"{ask.url}{path}", width=390, height=844, scheme="dark")
        page.wait("document.querySelector('svg')")
        assert page.js("document.documentElement.scrollWidth") <= 390
        picture(page, f"narrow{re.sub('[^a-z]', '-', path)}")
        page.js("window.broken = []; addEventListener('securitypolicyviolation', e => broken.push(e.blockedURI))")
        page.js("refresh()")
        assert page.js("broken") == []
        assert page.js("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
        assert page.js("document.getElementById('lost').textContent") == ""


@in_a_browser
def test_the_token_is_asked_for_once_and_a_server_that_ends_is_noticed(top):
    with browser.page() as page:
        with watching(top, TOKEN) as ask:
            page.go(f"{ask.url}/")
            assert "wants its token" in page.js("document.body.innerText")
            picture(page, "token")
            page.js("document.querySelector('[name=token]').focus()")
            page.type(TOKEN)
            page.press("Enter", 13, "\r")
            page.wait("document.querySelectorAll('.runs tbody tr').length === 8")
            page.go(f"{ask.url}/run/night")
            page.wait("document.querySelectorAll('.chart').length > 5")
        page.js("refresh()")
        page.wait("document.getElementById('lost').textContent.includes('no answer')")
        assert page.js("document.querySelectorAll('.chart').length") > 5


def test_a_real_run_is_watched_while_it_trains_is_killed_and_goes_on(aurora, corpus):
    config = aurora.folder / "tiny.yaml"
    config.write_text(TINY.format(corpus=corpus).replace("steps: 40", "steps: 4000"))
    command = ("train", config, "--run", aurora.folder / "runs" / "live", "log.every=1")
    (aurora.folder / "runs").mkdir()

    def until(said: str, path: str, seconds: float = 120) -> str:
        end = time.monotonic() + seconds
        while said not in (text := ask.whole(path)):
            assert time.monotonic() < end, text
            time.sleep(0.1)
        return text

    with watching(aurora.folder / "runs") as ask:
        process = aurora.start(*command)
        until(">training</span>", "/")
        until('data-name="validation"', "/run/live")
        assert " left" in until(">training</span>", "/run/live")
        process.kill()
        process.wait()
        until(">killed</span>", "/run/live")
        process = aurora.start(*command)
        until("1 resume", "/run/live")
        process.terminate()
        assert process.wait(60) == 75
        until(">stopped</span>", "/run/live")
        until("by SIGTERM", "/")
