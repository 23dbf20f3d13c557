"""The pages where keys are required, and what is left of an answer when the server ends."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


@pytest.fixture(scope="module")
def locked(tmp_path_factory, start_server) -> Iterator:
    with start_server("pages_server.py", str(tmp_path_factory.mktemp("locked")), "--keys") as started:
        yield started


def enter(contexts, server, key: str):
    page = contexts(server.base).new_page()
    page.goto("/")
    expect(page).to_have_url(re.compile(r"/login$"))
    page.get_by_label("Key").fill(key)
    page.get_by_role("button", name="Enter").click()
    return page


def test_a_key_is_asked_for_and_remembered(locked, contexts):
    page = enter(contexts, locked, "tael-wrong")
    expect(page.get_by_role("alert")).to_have_text("That is no valid key here.")
    page.get_by_label("Key").fill("tael-anna")
    page.get_by_role("button", name="Enter").click()
    expect(page.locator("#message")).to_be_visible()
    page.reload()
    expect(page.locator("#message")).to_be_visible()
    page.get_by_label("Forget the key anna in this browser").click()
    expect(page).to_have_url(re.compile(r"/login$"))
    page.goto("/")
    expect(page).to_have_url(re.compile(r"/login$"))


def test_one_key_does_not_see_the_conversations_of_another(locked, contexts):
    anna = enter(contexts, locked, "tael-anna")
    anna.fill("#message", "A secret")
    anna.press("#message", "Enter")
    expect(anna.locator("article.assistant")).to_contain_text("Echo: A secret")
    ben = enter(contexts, locked, "tael-ben")
    expect(ben.locator(".side-list")).to_contain_text("No conversations yet.")
    ben.goto(anna.url)
    expect(ben).to_have_url(re.compile(r"/$"))
    expect(ben.locator("body")).not_to_contain_text("secret")


def test_other_pages_want_the_key_too(locked, contexts):
    page = contexts(locked.base).new_page()
    for path in ("/c/1", "/runs", "/plan", "/compare"):
        page.goto(path)
        expect(page).to_have_url(re.compile(r"/login$"))


def test_an_answer_that_ran_when_the_server_ended_is_kept_as_interrupted(tmp_path, start_server, contexts):
    with start_server("pages_server.py", str(tmp_path)) as first:
        page = contexts(first.base).new_page()
        page.goto("/")
        page.fill("#message", "say:Half_of gate:never say:_it")
        page.press("#message", "Enter")
        expect(page.locator("article.assistant")).to_contain_text("Half of")
        path = page.url.removeprefix(first.base)
        page.close()
    with start_server("pages_server.py", str(tmp_path)) as second:
        page = contexts(second.base).new_page()
        page.goto(path)
        expect(page.locator("article.assistant")).to_contain_text("Half of")
        expect(page.locator("article.assistant")).to_contain_text("Interrupted")
        assert (tmp_path / "cookie-secret").stat().st_mode & 0o777 == 0o600
