"""The chat page in a browser: asking, thinking, stopping, branches, tools, files, settings."""

from __future__ import annotations

import re

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


def ask(page, question: str) -> None:
    page.fill("#message", question)
    page.press("#message", "Enter")


def answer(page):
    return page.locator("article.assistant").last


def done(page):
    """The last answer, once it is finished."""
    expect(answer(page).locator("[data-act=again]")).to_be_visible()
    return answer(page)


def test_a_question_is_answered_and_kept(page):
    ask(page, "Good morning")
    expect(done(page)).to_contain_text("Echo: Good morning")
    expect(page).to_have_url(re.compile(r"/c/\d+$"))
    expect(page.locator("h1")).to_have_text("Good morning")
    expect(page.locator(".side-list li.current")).to_contain_text("Good morning")
    page.reload()
    expect(done(page)).to_contain_text("Echo: Good morning")
    expect(page.locator("article.user")).to_contain_text("Good morning")


def test_waiting_reading_and_thinking_are_seen_as_they_happen(page, server):
    ask(
        page,
        "progress:2,0,0 gate:w1 progress:0,512,1024 gate:w2 think:Hmm_let_me_see. gate:w3 say:Yes. gate:w4 say:_No.",
    )
    status, thoughts = answer(page).locator(".status"), answer(page).locator("details.thoughts")
    expect(status).to_contain_text("waiting, 2 ahead")
    server.open("w1")
    expect(status).to_contain_text("reading 512 of 1,024 tokens")
    expect(page.locator(".gauge")).to_contain_text("of 1,000 tokens")
    server.open("w2")
    expect(thoughts.locator(".prose")).to_have_text("Hmm let me see.")
    expect(thoughts).to_have_attribute("open", "")
    expect(thoughts.locator("summary")).to_contain_text("Thinking")
    server.open("w3")
    expect(answer(page).locator("[data-part=said]")).to_have_text("Yes.")
    expect(thoughts).not_to_have_attribute("open", re.compile(".*"))
    expect(thoughts.locator("summary")).to_have_text(re.compile(r"Thought for [\d.]+ m?s · 3 tokens"))
    expect(status).to_contain_text("tokens")
    thoughts.locator("summary").click()
    server.open("w4")
    expect(done(page).locator("[data-part=said]")).to_have_text("Yes. No.")
    expect(thoughts).to_have_attribute("open", "")  # opened by hand, it stays open
    expect(status).to_be_empty()


def test_the_line_under_an_answer_has_its_figures(page):
    ask(page, "think:abcde say:abcdefghij")
    line = done(page).locator(".figures")
    for part in ("3 tokens", "41 tok/s", "first after 0.2 s", "prompt 100, 64 cached", "$0.000012"):
        expect(line).to_contain_text(part)
    expect(page.locator(".gauge")).to_contain_text("context 103 of 1,000 tokens")


def test_stopping_keeps_what_was_said_and_continue_goes_on_from_there(page, server):
    ask(page, "say:Once_upon_a_time gate:never say:never")
    expect(answer(page).locator("[data-part=said]")).to_contain_text("Once upon a time")
    page.get_by_label("Stop", exact=True).click()
    expect(done(page)).to_contain_text("Stopped.")
    expect(page.get_by_label("Send", exact=True)).to_be_visible()
    done(page).get_by_text("Continue").click()
    expect(done(page).locator("[data-part=said]")).to_have_text("Once upon a time and so on.")
    expect(page.locator("article.assistant")).to_have_count(1)
    prefix = server.bodies()[-1]["messages"][-1]
    assert prefix == {"role": "assistant", "content": "Once upon a time", "prefix": True}


def test_stopped_before_the_first_word_it_can_be_asked_again_in_place(page, server):
    ask(page, "gate:silent say:Now_then.")
    expect(answer(page).locator(".status")).to_have_text("starting")
    page.get_by_label("Stop", exact=True).click()
    expect(done(page)).to_contain_text("Stopped.")
    server.open("silent")
    done(page).get_by_text("Continue").click()
    expect(done(page).locator("[data-part=said]")).to_have_text("Now then.")
    expect(page.locator("article.assistant .places")).to_have_count(0)
    assert server.bodies()[-1]["messages"][-1]["role"] == "user"


def test_escape_stops(page):
    ask(page, "say:Hello gate:never")
    expect(answer(page).locator("[data-part=said]")).to_contain_text("Hello")
    page.keyboard.press("Escape")
    expect(done(page)).to_contain_text("Stopped.")


def test_an_answer_cut_at_the_limit_says_so(page):
    ask(page, "say:Half_a length")
    expect(done(page)).to_contain_text("The limit of tokens was reached")


def test_a_failure_is_one_line_and_can_be_tried_again(page):
    ask(page, "say:Half_an_answer fail:the_model_is_gone,_try_later")
    expect(done(page).get_by_role("alert")).to_have_text("the model is gone, try later")
    expect(done(page)).to_contain_text("Half an answer")
    done(page).locator("[data-act=again]").click()
    expect(done(page).locator(".places")).to_contain_text("2/2")


def test_answers_and_questions_have_branches_that_are_kept(page):
    ask(page, "First question")
    done(page).locator("[data-act=again]").click()
    expect(done(page).locator(".places")).to_contain_text("2/2")
    page.locator("article.user [data-act=edit]").click()
    field = page.get_by_role("textbox", name="Edit the question")
    expect(field).to_have_value("First question")
    field.fill("Other question")
    field.press("Control+Enter")
    expect(done(page)).to_contain_text("Echo: Other question")
    question = page.locator("article.user")
    expect(question.locator(".places")).to_contain_text("2/2")
    expect(answer(page).locator(".places")).to_have_count(0)
    question.get_by_label("Earlier version").click()
    expect(page.locator("article.user .bubble")).to_have_text("First question")
    expect(done(page).locator(".places")).to_contain_text("2/2")
    answer(page).get_by_label("Earlier version").click()
    expect(done(page).locator(".places")).to_contain_text("1/2")
    page.reload()
    expect(page.locator("article.user .places")).to_contain_text("1/2")
    expect(done(page).locator(".places")).to_contain_text("1/2")


def test_an_edit_can_be_dropped(page):
    ask(page, "Keep me")
    done(page)
    page.locator("article.user [data-act=edit]").click()
    page.get_by_role("textbox", name="Edit the question").fill("something else")
    page.get_by_role("textbox", name="Edit the question").press("Escape")
    expect(page.locator("article.user .bubble")).to_have_text("Keep me")


def test_an_answer_goes_on_after_a_reload_and_in_a_second_tab(page, server):
    ask(page, "say:One. gate:r1 say:_Two. gate:r2 say:_Three.")
    expect(answer(page).locator("[data-part=said]")).to_have_text("One.")
    other = page.context.new_page()
    other.goto(page.url)
    expect(answer(other).locator("[data-part=said]")).to_have_text("One.")
    page.reload()
    server.open("r1")
    for each in (page, other):
        expect(answer(each).locator("[data-part=said]")).to_have_text("One. Two.")
        expect(each.get_by_label("Stop", exact=True)).to_be_visible()
    server.open("r2")
    for each in (page, other):
        expect(done(each).locator("[data-part=said]")).to_have_text("One. Two. Three.")
    ask(other, "And then?")  # what is asked in one tab is seen in the other
    expect(done(page)).to_contain_text("Echo: And then?")


def test_an_answer_goes_on_with_no_page_open(page, server):
    ask(page, "say:One. gate:away say:_Two.")
    expect(answer(page).locator("[data-part=said]")).to_have_text("One.")
    url, context = page.url, page.context
    page.close()
    server.open("away")
    later = context.new_page()
    later.goto(url)
    expect(done(later).locator("[data-part=said]")).to_have_text("One. Two.")


def test_tool_calls_are_cards_and_results_go_back_to_the_model(page, server):
    ask(page, 'call:add:{"a":1,"b":2} call:now:{}')
    done(page)
    card = page.locator("section.call")
    expect(card).to_have_count(2)
    expect(card.first).to_contain_text("add")
    expect(card.first.locator("pre")).to_have_text('{\n  "a": 1,\n  "b": 2\n}')
    for place, result in enumerate(("3", "say:It_is_3.")):
        form = card.nth(place)
        form.get_by_label("Result of this call").fill(result)
        form.get_by_text("Give the result").click()
        expect(card.nth(place)).to_contain_text(result)
    expect(done(page).locator("[data-part=said]")).to_have_text("It is 3.")
    sent = server.bodies()[-1]["messages"]
    assert [m["role"] for m in sent] == ["user", "assistant", "tool", "tool"]
    assert [m["tool_call_id"] for m in sent[2:]] == ["call_0", "call_1"]
    assert sent[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a":1,"b":2}'}
    page.reload()
    expect(page.locator("section.call").nth(1)).to_contain_text("say:It_is_3.")


def test_the_exact_text_can_be_seen(page):
    ask(page, "think:*secret* say:**bold**")
    done(page).get_by_label("Show the exact text").click()
    expect(answer(page).locator("pre.raw")).to_have_text("<think>\n*secret*\n</think>\n\n**bold**")
    answer(page).get_by_label("Show the exact text").click()
    expect(answer(page).locator("pre.raw")).to_have_count(0)


def test_copying(page, server):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page, "say:A_**bold**_word\\n\\n```python\\nx_=_1\\n```")
    done(page).get_by_label("Copy the answer").click()
    page.wait_for_function("async () => (await navigator.clipboard.readText()).startsWith('A **bold** word')")
    answer(page).get_by_label("Copy this python code").click()
    expect(answer(page).locator("[data-copy]")).to_have_text("Copied")
    page.wait_for_function("async () => (await navigator.clipboard.readText()).trim() === 'x = 1'")


def test_shift_enter_makes_a_line_and_an_empty_question_is_not_sent(page):
    page.press("#message", "Enter")
    page.fill("#message", "one")
    page.press("#message", "Shift+Enter")
    page.type("#message", "two")
    page.press("#message", "Enter")
    expect(page.locator("article.user .bubble")).to_have_text("one\ntwo", use_inner_text=True)
    expect(page.locator("article.user")).to_have_count(1)
    expect(page.locator("#message")).to_have_value("")
