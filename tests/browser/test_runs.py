"""The pages of runs and of the plan in a real browser: live, compared, started and stopped, and safe to look at."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from tiny_recipe import tiny_recipe  # noqa: E402

from tael.serve.pages.plots import COLOURS, DASHES  # noqa: E402
from tael.serve.run_process import read_process  # noqa: E402

expect = api.expect
HOSTILE = "</pre><script>window.pwned = 1</script><img src=https://evil.example/x onerror=window.pwned=2>{{ 1 + 1 }}"
STAGES = """name = "made"
description = "{hostile}"
[price]
dollars_per_hour = 36.0
[stages.pretrain]
kind = "pretrain"
steps = 100
batch_size = 2
sequence_length = 32
[stages.rl]
kind = "rl"
steps = 40
"""


def lines(path: Path, *values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def step(number: int, **more: float) -> dict:
    where = {"tokens": number * 64, "seconds": number * 2.0, "tokens_per_second": 32.0}
    return {"kind": "step", "step": number, "learning_rate": 1e-3, **where, **more}


def make_run(directory: Path, loss: float = 8.0) -> None:
    metrics = directory / "pretrain" / "metrics.jsonl"
    lines(metrics, *(step(i, loss=loss / i) for i in range(1, 51)))
    lines(metrics, {"kind": "eval", "step": 50, "bits_per_byte": 2.5})
    lines(metrics, {"kind": "load", "step": 40, "layers": [[0.5, 0.25, 0.25, 0.0], [0.25] * 4]})
    (directory / "recipe.toml").write_text(STAGES.format(hostile=HOSTILE.replace('"', "'")), encoding="utf-8")


def make_taught(directory: Path) -> None:
    make_run(directory)
    accuracy = {mode: {"correct": 3, "total": 4} for mode in ("free", "think", "direct")}
    lines(
        directory / "rl" / "metrics.jsonl", *(step(i, reward=i / 40, think_rate=0.5, loss=0.1) for i in range(1, 41))
    )
    lines(directory / "rl" / "metrics.jsonl", {"kind": "eval", "step": 40, "accuracy": accuracy})
    texts = {"mode": "free", "prompt": HOSTILE, "reasoning": HOSTILE, "expected": HOSTILE}
    before = {"label": "before", "answer": "an answer", "correct": False, **texts}
    lines(
        directory / "rl" / "samples.jsonl", before, {**before, "label": "after", "answer": HOSTILE, "correct": True}
    )
    summary = {"device": f"\ud800{HOSTILE}", "model": {"parameters_total": 5}}
    (directory / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    lines(directory / "rl" / "samples.jsonl", {"label": "after", "prompt": "lone", "answer": f"\ud800{HOSTILE}"})
    (directory / "output.log").write_text(f"$ tael run made.toml\n{HOSTILE}\ntael: {HOSTILE}\n", encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "runs" / "made")
    make_run(folder / "runs" / "steeper", loss=6.0)
    make_taught(folder / "runs" / "taught")
    words = [f"{word}{i % 7}" for i, word in enumerate(("the", "quick", "fox", "says", "it", "is", "38") * 3)]
    text = [" ".join(words[(i * j) % len(words)] for j in range(1, 40)) for i in range(1, 300)]
    (folder / "book.txt").write_text("\n\n".join(text), encoding="utf-8")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "tiny.toml").write_text(tiny_recipe(folder / "book.txt", 4000), encoding="utf-8")
    (folder / "recipes" / "wrong.toml").write_text("name = 3", encoding="utf-8")
    yield folder
    for place in (folder / "runs").iterdir():
        process = read_process(place)
        found = process.find() if process is not None else None
        if found is not None:
            found.kill()
            psutil.wait_procs([found], timeout=30)


@pytest.fixture(scope="module")
def site(folder: Path, start_server: Callable[..., Any]) -> Iterator[Any]:
    with start_server("runs_server.py", str(folder)) as server:
        yield server


@pytest.fixture
def open_page(site: Any, contexts: Callable[..., Any]) -> Callable[..., Any]:
    def make(path: str = "/runs", **options: Any) -> Any:
        page = contexts(site.base, **options).new_page()
        page.goto(path)
        page.wait_for_selector("h1")
        return page

    return make


def plotted(page: Any, title: str) -> Any:
    """The plot `title`, once it is drawn."""
    plot = page.get_by_role("img", name=re.compile(f"^{title}: "))
    plot.locator(".scatterlayer .trace").first.wait_for(state="attached")
    return plot


def test_a_run_is_shown(open_page):
    page = open_page("/runs?run=made")
    expect(page.get_by_role("heading", name="made", level=2)).to_be_visible()
    expect(page.get_by_text("text: 2.50 bits per byte; total $1.00, 1.7 min so far")).to_be_visible()
    row = page.get_by_role("row", name=re.compile("pretrain"))
    expect(row).to_contain_text("50 / 100")
    expect(row.get_by_role("progressbar")).to_have_attribute("value", "0.5000")
    expect(row).to_contain_text("1:40")
    expect(page.get_by_role("row", name=re.compile("^rl"))).to_contain_text("not known")
    expect(page.get_by_text("at least $2.00")).to_be_visible()
    assert plotted(page, "Loss").locator(".scatterlayer .trace").count() == 1
    assert plotted(page, "Expert balance").locator(".scatterlayer .trace").count() == 2
    expect(plotted(page, "Loss")).to_contain_text("nats a token")
    box = plotted(page, "Loss").locator(".scatterlayer .js-line").first.bounding_box()
    assert box is not None and box["width"] > 200 and box["height"] > 100


def test_what_a_run_writes_appears_by_itself(open_page, folder):
    make_run(folder / "runs" / "growing")
    page = open_page("/runs?run=growing")
    plotted(page, "Loss")
    page.evaluate("window.same = true")
    lines(folder / "runs" / "growing" / "pretrain" / "metrics.jsonl", step(75, loss=0.05))
    expect(page.get_by_role("row", name=re.compile("pretrain"))).to_contain_text("75 / 100")
    expect(page.get_by_text("training loss from 8 to 0.05")).to_be_visible()
    last = "document.querySelector('.js-plotly-plot').data[0].x.at(-1)"
    page.wait_for_function(f"{last} === 75")
    make_run(folder / "runs" / "arrived")
    expect(page.get_by_role("button", name=re.compile("^arrived"))).to_be_visible()
    assert page.evaluate("window.same")  # the same page all the time


def test_curves_stand_over_steps_tokens_time_and_dollars(open_page):
    page = open_page("/runs?run=made")
    plot = plotted(page, "Loss")
    for choice, words in (("tokens", "tokens"), ("seconds", "time in the stage (seconds)"), ("dollars", "dollars")):
        page.get_by_label("Curves over").select_option(choice)
        expect(plot.locator(".xtitle")).to_have_text(words)
    assert page.evaluate("document.querySelector('.js-plotly-plot').data[0].x.at(-1)") == pytest.approx(1.0)


def test_reward_and_accuracy_of_a_taught_run(open_page):
    page = open_page("/runs?run=taught")
    assert plotted(page, "Reward and thinking").locator(".scatterlayer .trace").count() == 2
    accuracy = plotted(page, "Held-out accuracy")
    assert accuracy.locator(".scatterlayer .trace").count() == 3
    expect(accuracy.locator(".legendtext").first).to_have_text("free to think")


def test_nothing_of_a_model_or_a_log_is_taken_for_html(open_page):
    page = open_page("/runs?run=taught")
    page.get_by_text("Samples of rl").click()
    expect(page.get_by_role("heading", name="after, right")).to_be_visible()
    expect(page.locator("article.pair pre").first).to_have_text(HOSTILE)
    page.get_by_text("What it says").click()
    expect(page.locator("pre.log")).to_contain_text(HOSTILE)
    expect(page.locator(".alert", has_text="Failed")).to_contain_text(HOSTILE)
    plotted(page, "Reward and thinking")
    page.get_by_label("Mark made").check()
    page.get_by_label("Mark taught").check()
    page.get_by_role("button", name="Compare marked runs").click()
    expect(page.get_by_role("row", name=re.compile("^device"))).to_contain_text(f"?{HOSTILE}")
    assert page.evaluate("window.pwned") is None and page.locator("img").count() == 0


def test_runs_are_compared(open_page):
    page = open_page()
    compare = page.get_by_role("button", name="Compare marked runs")
    expect(compare).to_be_disabled()
    for name in ("made", "steeper"):
        page.get_by_label(f"Mark {name} to compare it").check()
    compare.click()
    expect(page.get_by_role("heading", name="2 runs compared")).to_be_visible()
    expect(page.get_by_role("columnheader")).to_have_text(["", "made", "steeper"])
    row = page.get_by_role("row", name=re.compile("last loss"))
    expect(row.get_by_role("cell")).to_have_text(["0.1600", "0.1200"])
    plot = plotted(page, "pretrain: training loss")
    expect(plot.locator(".legendtext")).to_have_text(["made", "steeper"])
    page.get_by_label("Curve", exact=True).select_option("pretrain|bits_per_byte")
    expect(plotted(page, "pretrain: held-out text").locator(".ytitle")).to_have_text("bits a byte")
    page.get_by_label("Curves over").select_option("tokens")
    expect(page.locator(".xtitle")).to_have_text("tokens")
    page.reload()  # the address says what is shown
    expect(page.get_by_role("heading", name="2 runs compared")).to_be_visible()
    page.get_by_role("button", name=re.compile("^taught")).click()
    expect(page.get_by_role("heading", name="taught", level=2)).to_be_visible()
    expect(page).to_have_url(re.compile(r"/runs\?run=taught$"))


def test_a_run_is_started_stopped_and_resumed(open_page, folder):
    page = open_page()
    page.get_by_role("button", name="Start a run").click()
    sheet = page.get_by_role("dialog")
    expect(sheet.get_by_text("A few steps")).to_be_visible()
    expect(sheet.get_by_text("wrong.toml: ")).to_be_visible()
    expect(sheet.get_by_label("stages.pretrain.steps")).to_have_value("4000")
    start = sheet.get_by_role("button", name="Start")

    for label, value, complaint in (
        ("Name", "../x", "use up to 40 of"),
        ("More changes", "data.path=/etc/passwd", "names files or models"),
        ("More changes", "seed", "write key.path=value"),
        ("stages.pretrain.steps", "many", "stages.pretrain.steps"),
    ):
        field = sheet.get_by_label(label)
        before = field.input_value()
        field.fill(value)
        start.click()
        expect(sheet.get_by_role("alert")).to_contain_text(complaint)
        field.fill(before)
    assert not (folder / "runs" / "x").exists() and not (folder / "x").exists()

    sheet.get_by_label("Name").fill("try-1")
    sheet.get_by_label("stages.pretrain.batch_size").fill("1")
    start.click()
    expect(page.get_by_role("heading", name="try-1", level=2)).to_be_visible()
    head = page.locator(".run-head")
    expect(head).to_contain_text("running")
    process = read_process(folder / "runs" / "try-1")
    assert process is not None and process.overrides == ["stages.pretrain.batch_size=1"]
    page.locator("td", has_text=re.compile(r"[1-9]\d* / 4,000")).first.wait_for(timeout=120_000)
    expect(page.get_by_text("Time left", exact=True)).to_be_visible()

    head.get_by_role("button", name="Stop").click()
    expect(head).to_contain_text("stopped", timeout=60_000)
    expect(page.get_by_text(re.compile("Stopped: stopped at step"))).to_be_visible()
    head.get_by_role("button", name="Resume").click()
    expect(head).to_contain_text("running", timeout=60_000)
    page.get_by_text("What it says").click()
    expect(page.locator("pre.log")).to_contain_text("going on after step", timeout=120_000)
    head.get_by_role("button", name="Stop").click()
    expect(head).to_contain_text("stopped", timeout=60_000)


def test_who_may_only_look_finds_nothing_to_press(open_page):
    page = open_page("/look?run=made")
    expect(page.get_by_role("heading", name="made", level=2)).to_be_visible()
    for name in ("Start a run", "Stop", "Resume"):
        expect(page.get_by_role("button", name=name, exact=True)).to_have_count(0)
    expect(open_page("/runs?run=made").get_by_role("button", name="Resume")).to_be_visible()


def test_the_report_opens(open_page, site):
    page = open_page("/runs?run=made")
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="Report").click()
    expect(opened.value).to_have_title(re.compile("made"))
    hostile = page.request.get(f"{site.base}/runs/taught/report")
    assert hostile.ok and "&lt;script&gt;window.pwned" in hostile.text() and HOSTILE not in hostile.text()
    answer = page.request.get(f"{site.base}/runs/nope/report")
    assert answer.status == 404 and "no such run" in answer.text()
    stranger = page.request.get(f"{site.base}/runs/made/report?stranger", max_redirects=0)
    assert stranger.status == 303


def test_by_keyboard(open_page, folder):
    page = open_page("/runs?run=made")
    target = page.get_by_role("button", name=re.compile("^steeper"))
    target.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="steeper", level=2)).to_be_visible()
    expect(target).to_have_attribute("aria-current", "true")
    lines(folder / "runs" / "steeper" / "pretrain" / "metrics.jsonl", step(60, loss=0.1))
    expect(page.get_by_role("row", name=re.compile("pretrain"))).to_contain_text("60 / 100")
    expect(target).to_be_focused()  # the list was changed in place


@pytest.mark.parametrize("path", ["/runs?run=taught", "/runs?compare=made,taught", "/plan"])
def test_a_telephone_scrolls_only_down(open_page, path):
    page = open_page(path, viewport={"width": 390, "height": 800})
    page.wait_for_selector("table")
    assert page.evaluate("document.querySelector('main').scrollWidth") <= 390


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_words_of_plots_are_legible(open_page, scheme):
    page = open_page("/runs?run=made", color_scheme=scheme)
    plotted(page, "Loss")
    ink = page.evaluate("getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    ground = page.evaluate("getComputedStyle(document.querySelector('.charts figure')).backgroundColor")
    assert contrast(colour(ink), colour(ground)) >= 4.5
    assert all(contrast(hexadecimal(each), colour(ground)) >= 3 for each in COLOURS)


def test_no_two_lines_are_told_apart_by_colour_alone():
    assert len(set(DASHES)) == len(DASHES) == len(COLOURS) == len(set(COLOURS))


def test_an_unknown_run_and_wrong_addresses(open_page):
    for query in ("run=nope", "run=../..", "compare=a,b", "compare=made", "run=<script>"):
        expect(open_page(f"/runs?{query}").get_by_role("heading", level=2)).to_be_visible()


def test_the_plan_page_counts_the_recipes(open_page):
    page = open_page("/plan")
    row = page.get_by_role("row", name=re.compile("tiny.toml"))
    expect(row.get_by_role("cell").nth(0)).to_have_text("38.7K")
    expect(row.get_by_role("cell").nth(6)).to_have_text("256K")
    expect(page.get_by_text(re.compile("wrong.toml: "))).to_be_visible()


Colour = tuple[float, ...]


def colour(css: str) -> Colour:
    return tuple(float(part) / 255 for part in re.findall(r"[\d.]+", css)[:3])


def hexadecimal(text: str) -> Colour:
    return tuple(int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))


def contrast(one: Colour, other: Colour) -> float:
    """WCAG's contrast ratio."""

    def luminance(rgb: Colour) -> float:
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
