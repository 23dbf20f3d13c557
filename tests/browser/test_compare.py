"""The side-by-side page in a real browser: two answers at once, blind until the vote, votes kept and downloaded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tael.serve.history import History

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
DEADLINE = 30.0


@dataclass
class Site:
    """The server of compare_server.py, and what may be asked of it."""

    url: str
    path: Path

    def state(self) -> Any:
        return httpx.get(f"{self.url}/state").json()

    def post(self, path: str) -> None:
        httpx.post(self.url + path).raise_for_status()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def site(start_server, tmp_path_factory) -> Iterator[Site]:
    path = tmp_path_factory.mktemp("compare") / "conversations.sqlite"
    with start_server("compare_server.py", str(path)) as server:
        yield Site(server.base, path)


@pytest.fixture
def page(site, contexts) -> Iterator[Any]:
    site.post("/hold")
    page = contexts(site.url, viewport={"width": 1200, "height": 900}).new_page()
    page.goto("/compare")
    # A page takes clicks once its socket is up.
    page.wait_for_function("window.socket && window.socket.connected")
    yield page
    site.post("/go")


def expect(locator: Any) -> Any:
    return playwright.expect(locator)


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def ask(page: Any, prompt: str, **models: str) -> None:
    for label, model in models.items():
        page.get_by_label({"one": "One model", "other": "The other"}[label], exact=True).select_option(model)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    press(page, "Ask both")


def answers(page: Any) -> tuple[Any, Any]:
    return page.get_by_label("Left answer", exact=True), page.get_by_label("Right answer", exact=True)


def votes(site: Site) -> list[Any]:
    history = History(site.path)
    try:
        return history.votes("local")
    finally:
        history.close()


def test_two_answers_stream_at_once_and_a_blind_vote_tells_which_was_which(site, page):
    ask(page, "Sum 2+2. It")
    sides = answers(page)
    for side in sides:  # both have begun, and neither has ended
        expect(side).to_contain_text("Sum 2+2. It begins")
        expect(side).not_to_contain_text("says")
    thinking = next(side for side in sides if side.locator("details.thoughts").is_visible())
    expect(thinking.locator("details.thoughts")).to_have_attribute("open", "")
    expect(thinking).to_contain_text("Thinking…")
    expect(page.get_by_role("button", name="Tie")).to_be_disabled()
    site.post("/go")
    for side in sides:
        expect(side.locator("strong")).to_have_text("done")
        assert not side.locator(".figures").is_visible()  # its speed would tell
        assert side.locator("h2").inner_text() in ("Left answer", "Right answer")
    expect(thinking.locator("details.thoughts")).not_to_have_attribute("open", "")
    expect(thinking.locator("summary")).to_have_text("Thought")

    before = len(votes(site))
    left_is_big = "Big" in sides[0].inner_text()
    press(page, "Left is better")
    winner, loser = ("big", "small") if left_is_big else ("small", "big")
    expect(sides[0].locator("h2")).to_have_text(f"Left answer: {winner}")
    expect(sides[1].locator("h2")).to_have_text(f"Right answer: {loser}")
    expect(page.get_by_text(f"Kept: {winner} over {loser}.")).to_be_visible()
    expect(thinking.locator(".figures")).to_have_text("12 tokens8.0 tok/sfirst after 0.2 sprompt 7, 4 cached$0.00012")
    for name in ("Left is better", "Tie", "Right is better"):
        expect(page.get_by_role("button", name=name)).to_be_disabled()
    *_, vote = votes(site)
    assert len(votes(site)) == before + 1
    assert (vote.chosen_model, vote.rejected_model, vote.tie, vote.note) == (winner, loser, False, "blind, left")
    assert vote.prompt == [{"role": "user", "content": "Sum 2+2. It"}]
    assert f"{winner.title()} says **done**" in vote.chosen and f"{loser.title()} says **done**" in vote.rejected
    assert "Let me see" not in vote.chosen + vote.rejected


def test_open_comparison_ties_and_the_download(site, page):
    page.get_by_label("Blind", exact=False).uncheck()
    page.get_by_text("System prompt and sampling").click()
    page.get_by_label("System prompt", exact=True).fill("Be brief")
    page.get_by_label("Temperature").fill("0.5")
    ask(page, "First", one="big", other="small")
    left, right = answers(page)
    expect(left.locator("h2")).to_have_text("Left answer: big")
    site.post("/go")
    expect(right.locator(".figures")).to_contain_text("34 tokens")
    bodies = {body["model"]: body for body in site.state()["bodies"][-2:]}
    assert set(bodies) == {"big", "small"} and all(body["temperature"] == 0.5 for body in bodies.values())
    assert bodies["big"]["messages"] == bodies["small"]["messages"]
    assert bodies["big"]["messages"][0] == {"role": "system", "content": "Be brief"}
    press(page, "Right is better")
    expect(page.get_by_text("Kept: small over big.")).to_be_visible()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("First")  # what was typed stays

    ask(page, "Second")
    expect(page.get_by_role("button", name="Tie")).to_be_enabled()
    press(page, "Tie")
    expect(page.get_by_text("Kept: big and small are even.")).to_be_visible()
    expect(page.locator(".tally tbody tr").first).to_be_visible()
    with page.expect_download() as caught:
        press(page, "Download preferences (JSONL)")
    assert caught.value.suggested_filename == "preferences.jsonl"
    rows = [json.loads(line) for line in Path(caught.value.path()).read_text(encoding="utf-8").splitlines()]
    assert len(rows) == sum(not vote.tie for vote in votes(site)) and votes(site)[-1].tie
    assert rows[-1]["prompt"] == bodies["big"]["messages"]
    assert (
        rows[-1]["chosen"][0]["content"].startswith("First begins\n\nSmall says")
        and rows[-1]["chosen_model"] == "small"
    )
    assert rows[-1]["rejected_model"] == "big"


def test_stopped_and_failed_answers_are_told_and_cannot_be_voted_on(site, page):
    ask(page, "Go on")
    left, right = answers(page)
    expect(left).to_contain_text("begins")
    assert site.state()["open"] == 2
    press(page, "Stop")
    for side in (left, right):
        expect(side).to_contain_text("Stopped.")
    until(lambda: site.state()["open"] == 0)  # the models were told
    expect(page.get_by_text("No vote on these")).to_be_visible()
    expect(page.get_by_role("button", name="Left is better")).to_be_disabled()

    site.post("/go")
    ask(page, "Again", one="broken", other="small")
    expect(page.locator(".problem")).to_have_text("the model is out of <b>memory</b>")
    expect(page.locator(".answer strong")).to_have_text("done")
    expect(page.get_by_role("button", name="Tie")).to_be_disabled()


def test_what_models_are_called_and_write_is_no_html(site, page):
    site.post("/go")
    evil = next(each for each in page.locator("option").all_inner_texts() if "script" in each)
    ask(page, f"Show {evil}", one=evil, other="small")
    for side in answers(page):
        expect(side.locator("strong").first).to_have_text("done")
    press(page, "Tie")
    expect(page.get_by_text("are even.")).to_be_visible()
    expect(page.locator(".tally")).to_contain_text(evil)
    assert page.title() == "Compare · Tael"
    assert page.locator(".answer script, .answer img, .ballot script, .tally img").count() == 0


def test_wrong_input_is_one_line_and_asks_nobody(site, page):
    asked = len(site.state()["bodies"])
    press(page, "Ask both")
    expect(page.get_by_role("alert")).to_have_text("there is no prompt to send")
    page.get_by_text("System prompt and sampling").click()
    page.get_by_label("Temperature").fill("7")
    ask(page, "x")
    expect(page.get_by_role("alert")).to_contain_text("temperature")
    assert len(site.state()["bodies"]) == asked


def test_keys_send_and_stop_and_closing_the_page_ends_the_answers(site, page):
    page.get_by_label("Prompt", exact=True).fill("By keys")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(answers(page)[0]).to_contain_text("begins")
    page.get_by_label("Prompt", exact=True).press("Escape")
    expect(answers(page)[0]).to_contain_text("Stopped.")
    press(page, "Ask both")
    until(lambda: site.state()["open"] == 2)
    page.close()
    until(lambda: site.state()["open"] == 0)


@pytest.mark.parametrize("width", [390, 800, 1200, 1600])
def test_it_fits_any_width(site, page, width):
    page.set_viewport_size({"width": width, "height": 800})
    site.post("/go")
    ask(page, "x" * 300)
    for side in answers(page):
        expect(side.locator("strong")).to_be_visible()
    assert page.evaluate("document.querySelector('.main').scrollWidth <= document.querySelector('.main').clientWidth")
    left, right = (side.bounding_box() for side in answers(page))
    assert (left["x"] == right["x"]) == (width < 700)
