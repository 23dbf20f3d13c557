"""The chat page in a browser: models, thinking, settings, files, conversations, shortcuts, theme, small screens."""

from __future__ import annotations

import json
import re

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


def ask(page, question: str):
    page.fill("#message", question)
    page.press("#message", "Enter")
    expect(page.locator("article.assistant").last.locator("[data-act=again]")).to_be_visible()
    return page.locator("article.assistant").last


def drop(page, files: dict[str, bytes]) -> None:
    """Drop files on the middle of the page."""
    given = [{"name": name, "bytes": list(content)} for name, content in files.items()]
    page.evaluate(
        """(files) => {
            const data = new DataTransfer();
            for (const f of files) data.items.add(new File([new Uint8Array(f.bytes)], f.name));
            for (const type of ["dragenter", "dragover", "drop"])
                document.querySelector("#main").dispatchEvent(
                    new DragEvent(type, {bubbles: true, cancelable: true, dataTransfer: data}));
        }""",
        given,
    )


def test_thinking_effort_and_budget_go_with_the_question(page, server):
    ask(page, "plain")
    assert server.bodies()[-1]["thinking"] == {"type": "auto"}
    page.get_by_role("button", name=re.compile("^Thinking")).click()
    page.get_by_label("Thinking", exact=True).select_option("enabled")
    page.get_by_label("Effort").select_option("high")
    page.get_by_label("Budget").fill("256")
    page.get_by_label("Budget").press("Tab")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Thinking: on, high")).to_be_visible()
    ask(page, "with effort")
    body = server.bodies()[-1]
    assert body["thinking"] == {"type": "enabled", "budget_tokens": 256} and body["reasoning_effort"] == "high"
    page.reload()
    expect(page.get_by_role("button", name="Thinking: on, high")).to_be_visible()


def test_another_model_can_be_picked(page, server):
    page.get_by_role("button", name="Model: tiny").click()
    item = page.get_by_role("menuitemradio", name=re.compile("^other"))
    expect(item).to_contain_text("loads when asked · 2,048 tokens of context")
    expect(item).to_contain_text("$0.028 cached, $0.28 new, $0.42 written")
    expect(page.get_by_role("menuitemradio", name=re.compile("^tiny"))).to_contain_text("loaded")
    item.click()
    expect(page.get_by_role("button", name="Model: other")).to_be_visible()
    expect(page.get_by_role("button", name=re.compile("^Thinking"))).to_be_hidden()
    expect(ask(page, "Hello")).to_contain_text("other")
    body = server.bodies()[-1]
    assert body["model"] == "other" and "thinking" not in body


def test_sampling_and_system_prompt_belong_to_the_conversation(page, server):
    page.get_by_label("Settings of this conversation").click()
    for label, value in {
        "System prompt": "Be brief.",
        "Temperature": "0.5",
        "Top p": "0.9",
        "Top k": "40",
        "Min p": "0.05",
        "Most tokens": "64",
        "Seed": "7",
        "Stop at": "END\n\\n\\n",
        "Tools": '[{"name": "add", "parameters": {"type": "object"}}]',
    }.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("Answer in JSON").check()
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    ask(page, "Hello")
    body = server.bodies()[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 64, "seed": 7}
    assert {name: body[name] for name in wanted} == wanted
    assert body["stop"] == ["END", "\n\n"] and body["response_format"] == {"type": "json_object"}
    assert body["tools"] == [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    page.get_by_role("button", name="New chat").click()
    ask(page, "Hello again")
    assert set(server.bodies()[-1]) == {"model", "messages", "thinking"}
    page.go_back()
    expect(page.locator("h1")).to_have_text("New chat")
    page.go_back()
    expect(page.locator("article.user .bubble")).to_have_text("Hello")
    page.get_by_label("Settings of this conversation").click()
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
    expect(page.get_by_label("Stop at")).to_have_value("END\n\\n\\n")


def test_settings_that_make_no_sense_are_named(page):
    page.get_by_label("Settings of this conversation").click()
    page.get_by_label("Temperature").fill("9")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("temperature: ")
    page.get_by_label("Temperature").fill("1")
    page.get_by_label("Tools").fill("no json")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("tools: not JSON")


def test_text_files_are_put_into_the_prompt(page, server):
    drop(page, {"notes.txt": b"one\n```\ntwo", "b.py": b"x = 1"})
    expect(page.locator(".files li")).to_have_count(2)
    ask(page, "What is in there?")
    assert server.bodies()[-1]["messages"][-1]["content"] == (
        "What is in there?\n\nFile notes.txt:\n\n````\none\n```\ntwo\n````\n\nFile b.py:\n\n```\nx = 1\n```"
    )
    expect(page.locator("article.user details.file summary").first).to_have_text("notes.txt · 3 lines")
    expect(page.locator("article.user .bubble > p")).to_have_text("What is in there?")
    expect(page.locator(".files li")).to_have_count(0)


def test_binary_and_large_files_are_refused_in_a_line(page):
    drop(page, {"a.png": b"\x89PNG\x00\xff"})
    expect(page.locator(".composer .problem")).to_contain_text("a.png: not a text file")
    drop(page, {"big.txt": b"x" * 200_001})
    expect(page.locator(".composer .problem")).to_contain_text("big.txt: larger than 200 kB")
    expect(page.locator(".files li")).to_have_count(0)


def test_conversations_are_renamed_moved_searched_and_deleted(page):
    ask(page, "Quokkas are marsupials")
    page.locator("li.current").get_by_label("More about").click()
    page.get_by_label("Title").fill("Animals of the west")
    page.get_by_label("Folder").fill("Biology")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("h1")).to_have_text("Animals of the west")
    expect(page.locator(".side-list h2", has_text="Biology")).to_be_visible()
    page.keyboard.press("Control+Shift+O")
    expect(page).to_have_url(re.compile(r"/$"))
    page.keyboard.press("Control+k")
    expect(page.get_by_label("Search conversations")).to_be_focused()
    page.keyboard.type("marsupials")
    expect(page.locator(".side-list li")).to_have_count(1)
    page.locator(".side-list li a").click()
    expect(page.locator("article.user .bubble")).to_have_text("Quokkas are marsupials")
    page.get_by_label("Search conversations").fill("no such thing \"'(")
    expect(page.locator(".side-list")).to_contain_text("Nothing found.")
    page.get_by_label("Search conversations").fill("marsupials")
    page.locator("li.current").get_by_label("More about").click()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete for good").click()
    expect(page).to_have_url(re.compile(r"/$"))
    expect(page.locator(".side-list")).to_contain_text("Nothing found.")


def test_export_and_import(page, tmp_path):
    ask(page, "say:Exported_answer")
    page.locator("li.current").get_by_label("More about").click()
    with page.expect_download() as markdown:
        page.get_by_role("button", name="Export as Markdown").click()
    assert "Exported answer" in markdown.value.path().read_text(encoding="utf-8")
    with page.expect_download() as whole:
        page.get_by_role("button", name="Export as JSON").click()
    page.get_by_role("button", name="Cancel").click()
    kept = json.loads(whole.value.path().read_text(encoding="utf-8"))
    assert kept["conversations"][0]["messages"][1]["content"] == "Exported answer"
    kept["conversations"][0]["title"] = "Came back"
    file = tmp_path / "kept.json"
    file.write_text(json.dumps(kept), encoding="utf-8")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Import").click()
    chooser.value.set_files(file)
    expect(page.locator("h1")).to_have_text("Came back")
    expect(page.locator("article.assistant")).to_contain_text("Exported answer")
    with page.expect_download() as every:
        page.get_by_role("button", name="Export all").click()
    titles = [c["title"] for c in json.loads(every.value.path().read_text(encoding="utf-8"))["conversations"]]
    assert "Came back" in titles


def test_a_file_that_is_no_export_is_refused(page, tmp_path):
    file = tmp_path / "bad.json"
    file.write_text("{", encoding="utf-8")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Import").click()
    chooser.value.set_files(file)
    expect(page.locator(".q-notification")).to_contain_text("bad.json")


def test_shortcuts_are_listed(page):
    page.locator("h1").click()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("search conversations")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.locator("#message").press("?")
    expect(page.get_by_role("dialog")).to_have_count(0)


BACKGROUND = "getComputedStyle(document.body).backgroundColor"


def test_the_theme_follows_the_system_until_it_is_set(page):
    page.emulate_media(color_scheme="light")
    light = page.evaluate(BACKGROUND)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(BACKGROUND)
    assert light != dark
    theme = page.get_by_label("Change the theme")
    theme.click()  # dark
    page.emulate_media(color_scheme="light")
    assert page.evaluate(BACKGROUND) == dark
    page.reload()
    expect(page.locator("#message")).to_be_visible()
    assert page.evaluate(BACKGROUND) == dark
    expect(page.locator("body")).to_have_class(re.compile("body--dark"))
    theme.click()  # light
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(BACKGROUND) == light


def test_on_a_small_screen_the_sidebar_is_a_drawer(server, contexts):
    page = contexts(server.base, viewport={"width": 390, "height": 800}).new_page()
    page.goto("/")
    side = page.locator("#side")
    expect(side).to_be_hidden()
    ask(page, "say:A_rather_long_answer_without_breaks:_" + "x" * 300)
    width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1]
    page.get_by_label("Conversations").first.click()
    expect(side).to_be_visible()
    page.get_by_role("button", name="New chat").click()
    expect(side).to_be_hidden()
    page.get_by_label("Conversations").first.click()
    page.keyboard.press("Escape")
    expect(side).to_be_hidden()


def test_every_control_has_a_name_and_the_page_has_landmarks(page):
    ask(page, 'think:a say:b call:f:{"x":1}')
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, a, input, select, textarea, summary, meter, progress")]
            .filter((e) => !e.closest(".q-uploader") && !e.closest("[aria-hidden=true]"))
            .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length))
            .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    for role in ("main", "banner", "log"):
        expect(page.get_by_role(role)).to_have_count(1)
    expect(page.get_by_role("navigation")).to_have_count(2)
    expect(page.get_by_role("complementary")).to_have_count(1)
    expect(page.get_by_role("heading", level=1)).to_have_count(1)
    expect(page.locator("[aria-live=polite]").first).to_contain_text("Answer: b")


HOSTILE = (
    "say:<img_src=x_onerror=alert(1)><script>alert(2)</script>\\n\\n![p](https://evil.example/p.png)\\n\\n"
    "[a](javascript:alert(3))_[b](https://evil.example/?q)\\n\\n$\\href{javascript:alert(4)}{\\text{<img_src=y>}}$"
)


def test_nothing_of_a_model_or_a_person_becomes_html_and_no_other_host_is_asked(page):
    ask(page, HOSTILE)
    title = "<img src=x onerror=alert(5)>"
    page.locator("li.current").get_by_label("More about").click()
    page.get_by_label("Title").fill(title)
    page.get_by_label("Folder").fill("<b>folder</b>")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("h1")).to_have_text(title)
    page.reload()
    expect(page.locator("article.assistant")).to_contain_text("<script>alert(2)</script>")
    assert page.evaluate("document.querySelectorAll('.chat img, .chat script, .side img, .side b').length") == 0
    links = page.evaluate("[...document.querySelectorAll('article.assistant a')].map((a) => [a.href, a.rel])")
    assert links == [["https://evil.example/?q", "noopener noreferrer nofollow"]]


def test_the_browser_itself_refuses_other_hosts(server, browser):
    """Whatever got past the escaping: the page's own rules stop it."""
    context = browser.new_context(base_url=server.base)
    refused: dict[str, str | None] = {}
    context.on("requestfailed", lambda request: refused.update({request.url: request.failure}))
    page = context.new_page()
    page.goto("/")
    page.wait_for_selector("#message")
    outcome = page.evaluate(
        """async () => {
            const picture = new Image();
            const loaded = new Promise((r) => { picture.onload = () => r("yes"); picture.onerror = () => r("no"); });
            picture.src = "https://evil.example/p.png";
            const fetched = await fetch("https://evil.example/").then(() => "yes", () => "no");
            return [await loaded, fetched];
        }"""
    )
    context.close()
    assert outcome == ["no", "no"]
    assert refused["https://evil.example/p.png"] == "csp"


def test_what_fails_after_a_click_is_told_in_a_line(page):
    ask(page, "Soon gone")
    page.locator("li.current").get_by_label("More about").click()
    page.get_by_label("Title").fill("Renamed")
    other = page.context.new_page()
    other.goto(page.url)
    other.locator("li.current").get_by_label("More about").click()
    other.get_by_role("button", name="Delete").click()
    other.get_by_role("button", name="Delete for good").click()
    expect(other).to_have_url(re.compile(r"/$"))
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".q-notification")).to_contain_text("there is no conversation")
    expect(page.locator("h1")).to_have_text("New chat")  # the first tab has noticed, too


def test_what_was_being_written_outlives_a_reload(page):
    page.fill("#message", "half a thought")
    page.reload()
    expect(page.locator("#message")).to_have_value("half a thought")
    ask(page, "sent")
    page.reload()
    expect(page.locator("article.user")).to_be_visible()
    expect(page.locator("#message")).to_have_value("")
