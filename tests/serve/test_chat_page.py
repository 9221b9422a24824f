"""The chat page in a real browser without a window."""

from __future__ import annotations

import os
from pathlib import Path

import browser
import pytest
from serving import TOKEN, server, write_model

pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(browser.FOUND is None, reason="needs Chromium: apt-get install chromium"),
]  # fmt: skip
PICTURES = os.environ.get("AURORA_PICTURES")  # a folder for screenshots, to be looked at


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("served"))


def picture(page, name: str) -> None:
    if PICTURES:
        page.picture(Path(PICTURES) / f"{name}.png")


def write(page, text: str) -> None:
    page.js("document.getElementById('text').focus()")
    page.type(text)
    page.press("Enter", 13, "\r")


def test_a_conversation_is_streamed_stopped_and_begun_anew(model):
    with server(model, length=8192) as (started, _), browser.page() as page:
        page.go(f"{started.url}/")
        page.wait("document.getElementById('name').textContent === 'tiny'")
        picture(page, "empty")
        page.js("document.getElementById('temperature').value = '0'")
        page.js("document.getElementById('max_tokens').value = '12'")
        write(page, "Hello")
        page.wait("document.querySelector('.assistant .note')?.textContent.includes('12 tokens')")
        assert page.js("document.querySelector('.user').textContent") == "Hello"
        answer = "document.querySelectorAll('.assistant')[%d].firstChild?.textContent"
        first = page.js(answer % 0)
        assert first and page.js("messages.length") == 2 and page.js("messages[1].content") == first
        page.js("document.getElementById('max_tokens').value = ''")  # as many as fit, which takes a while
        write(page, "And then?\nMore.")
        page.wait(f"({answer % 1} ?? '').length > 20")
        assert page.js("document.getElementById('send').textContent") == "Stop"
        picture(page, "writing")
        page.js("document.getElementById('send').click()")
        page.wait("document.querySelectorAll('.note')[1]?.textContent === 'stopped'")
        assert page.js("messages.length") == 4 and page.js("document.getElementById('send').textContent") == "Send"
        page.scheme("dark")
        page.js("document.getElementById('show').click()")
        picture(page, "dark")
        page.js("document.getElementById('anew').click()")
        assert page.js("messages.length") == 0 and page.js("document.querySelectorAll('.turn').length") == 0


def test_the_page_asks_for_the_token_and_shows_what_the_server_refuses(model):
    with server(model, TOKEN) as (started, _), browser.page() as page:
        page.go(f"{started.url}/", width=420, scheme="dark")
        page.wait("document.querySelector('.fault')?.textContent.includes('wants its token')")
        assert page.js("document.activeElement.id") == "token"
        picture(page, "token")
        page.type(TOKEN)
        page.press("Tab", 9)
        page.wait("document.getElementById('name').textContent === 'tiny'")
        page.js("document.getElementById('max_tokens').value = '9000'")
        write(page, "<img src=x onerror=alert(1)> <|im_end|>")
        page.wait("document.querySelector('.fault')?.textContent.includes('control token')")
        assert page.js("document.querySelectorAll('#talk img').length") == 0, "what is written is never read as HTML"
        assert page.js("document.getElementById('text').value").startswith("<img"), "and is not lost"
        picture(page, "refused")
