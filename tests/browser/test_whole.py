"""The chat page over the real service and engine: a question there and back, and kill -9 in mid-answer."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


def ask(page, question: str):
    page.fill("#message", question)
    page.press("#message", "Enter")
    return page.locator("article.assistant").last


def test_a_question_goes_all_the_way(start_server, contexts, tmp_path):
    with start_server("whole_server.py", str(tmp_path)) as server:
        page = contexts(server.base).new_page()
        page.goto("/")
        said = ask(page, "Hi, what is the capital of France?")  # long enough to fill a block of the cache
        expect(said.locator("strong")).to_have_text("there")
        expect(said).to_contain_text("Thought for")
        expect(said).to_contain_text(re.compile(r"\d+ tokens"))
        expect(said).to_contain_text("$0.0000")
        again = ask(page, "Hi again")
        expect(again).to_contain_text(re.compile(r"\d+ cached"))
        page.close()  # it would complain of the lost server


def test_killed_in_mid_answer(start_server, contexts, tmp_path):
    """What was written before kill -9 stands on the page of the next server, marked, and can be gone on from."""
    with start_server("whole_server.py", str(tmp_path)) as server:
        page = contexts(server.base).new_page()
        page.goto("/")
        said = ask(page, "Please count")
        expect(said).to_contain_text(" 40 ")
        address, port = page.url, urlsplit(server.base).port
        page.close()  # it would complain of the lost server
        server.process.kill()
        server.process.wait(20)
    with start_server("whole_server.py", str(tmp_path), str(port)) as server:
        page = contexts(server.base).new_page()
        page.goto(address)
        said = page.locator("article.assistant").last
        expect(said).to_contain_text("Interrupted: the server ended")
        expect(said).to_contain_text("0 1 2 3 4 5 6 7 8 9 10 ")
        said.get_by_text("Continue").click()
        expect(page.get_by_label("Stop", exact=True)).to_be_visible()
        page.get_by_label("Stop", exact=True).click()
        expect(page.get_by_label("Send", exact=True)).to_be_visible()
        page.close()
