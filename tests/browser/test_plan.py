"""The plan page in a real browser: sliders move figures, an address is a plan, and what cannot be is one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from tiny_recipe import tiny_recipe  # noqa: E402

expect = api.expect
ANSWERED = """() => document.querySelector('.status-line')?.textContent.includes(' days')
  || document.querySelector('.alert')?.textContent"""
SMALL = "/plan?model=deepseek-v2-lite&chips=64"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, start_server: Callable[..., Any]) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("plans")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "tiny.toml").write_text(tiny_recipe(folder / "book.txt", 40), encoding="utf-8")
    with start_server("runs_server.py", str(folder)) as server:
        yield server


@pytest.fixture
def open_page(site: Any, contexts: Callable[..., Any]) -> Callable[..., Any]:
    def make(path: str = SMALL, **options: Any) -> Any:
        page = contexts(site.base, **options).new_page()
        page.goto(path)
        page.wait_for_function(ANSWERED)
        return page

    return make


def tile(page: Any, name: str) -> Any:
    return page.locator(".results > div > .tiles > div", has=page.locator(f"dt:text-is('{name}')")).first.locator(
        "dd"
    )


def number(text: str) -> float:
    found = re.search(r"[\d,.]+", text)
    assert found is not None, text
    return float(found[0].replace(",", ""))


def test_a_plan_is_shown(open_page):
    page = open_page("/plan?model=deepseek-v3&chips=2048&price=2")
    expect(page.locator(".status-line")).to_contain_text("deepseek-v3 on 2,048 H800: 55 days, 2.72M chip-hours")
    expect(tile(page, "Dollars")).to_have_text(re.compile(r"^\$5,\d{3},\d{3}$"))
    picture = page.get_by_role("img", name=re.compile("^2,048 chips = 128 copies of the model"))
    expect(picture).to_be_visible()
    assert "experts of a layer are spread over 64 copies" in (picture.get_attribute("aria-label") or "")
    for name in ("Where a step's time goes", "What a chip's memory holds", "What a token's arithmetic is"):
        expect(page.get_by_role("img", name=re.compile(f"^{name}: "))).to_be_visible()
    expect(page.locator("code", has_text="tael plan deepseek-v3 --chips 2048 --price 2")).to_be_visible()


def test_a_slider_moves_the_figures(open_page):
    page = open_page()
    before, dollars = number(tile(page, "Time").inner_text()), number(tile(page, "Dollars").inner_text())
    chips = page.get_by_role("slider", name="Chips, slider")
    chips.focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label("Chips", exact=True)).to_have_value("128")
    expect(chips).to_have_attribute("aria-valuetext", "128")
    expect(page.locator(".status-line")).to_contain_text("128 H800")
    assert number(tile(page, "Time").inner_text()) < before
    expect(page).to_have_url(re.compile("chips=128"))
    price = page.get_by_role("slider", name="Price, $ a chip-hour, slider")
    price.focus()
    page.keyboard.press("Home")
    expect(tile(page, "Dollars").locator("xpath=../small")).to_contain_text("$0.050")
    assert number(tile(page, "Dollars").inner_text()) < dollars
    link = page.get_by_role("slider", name=re.compile("^Link"))
    link.focus()
    page.keyboard.press("Home")
    expect(page.get_by_label("Link, GB/s one way", exact=True)).to_have_value("20")
    expect(page).to_have_url(re.compile("link=20"))


def test_an_exact_value_is_typed(open_page):
    page = open_page()
    box = page.get_by_label("Training tokens", exact=True)
    box.fill("2.5T")
    box.press("Enter")
    expect(page.locator("code", has_text="--tokens 2.5e+12")).to_be_visible()
    box.fill("many")
    box.press("Enter")
    expect(page.get_by_role("alert").first).to_have_text(re.compile("number of tokens: 'many' is not a number"))
    expect(page.locator(".results")).to_be_visible()  # the plan before stands


def test_another_model_is_found_by_typing(open_page):
    page = open_page()
    field = page.get_by_label("Model", exact=True)
    assert page.locator("datalist option").count() > 15
    field.fill("llama-2-7b")
    field.press("Enter")
    expect(page.locator(".status-line")).to_contain_text("llama-2-7b on ")
    expect(page).to_have_url(re.compile(r"model=llama-2-7b$"))
    field.fill("lama-2-7b")
    field.press("Enter")
    expect(page.get_by_role("alert").first).to_contain_text("did you mean 'llama-2-7b'?")
    page.get_by_label("Chip", exact=True).select_option("H20")
    expect(page.locator(".status-line")).to_contain_text("H20")


def test_a_plan_is_linked_and_reloaded(open_page):
    page = open_page("/plan?model=deepseek-v2-lite&chip=H100&chips=32&price=3.5&link=90&tokens=1e12&precision=bf16")
    told = page.locator(".status-line").inner_text()
    assert "32 H100" in told
    for label, value in (("Chips", "32"), ("Price, $ a chip-hour", "3.5"), ("Training tokens", "1.00T")):
        expect(page.get_by_label(label, exact=True)).to_have_value(value)
    address = page.url
    page.reload()
    expect(page.locator(".status-line")).to_have_text(told)
    assert page.url == address


def test_what_cannot_be_is_one_line(open_page):
    page = open_page("/plan?model=deepseek-v2-lite&chips=64&layout=data%3D3")
    expect(page.get_by_role("alert").first).to_have_text(re.compile("^layout: data 3 x .* not the 64 there are$"))
    expect(page.locator(".results")).to_be_hidden()
    page.get_by_text("Layout of your own").click()
    layout = page.get_by_label("Layout", exact=True)
    expect(layout).to_have_value("data=3")
    layout.fill("expert=2")
    layout.press("Enter")
    expect(page.locator(".results")).to_be_visible()
    expect(page.locator(".alert").first).to_have_text("")
    page = open_page("/plan?model=deepseek-v3&chips=8")
    expect(page.get_by_role("alert").first).to_contain_text("deepseek-v3 does not fit")


def test_strange_addresses_do_no_harm(open_page):
    page = open_page("/plan?model=/etc/passwd&chips=<script>window.pwned=1</script>&layout=<img src=x>")
    alert = page.get_by_role("alert").first
    expect(alert).to_contain_text("<script>window.pwned=1</script>")
    assert page.evaluate("window.pwned") is None and page.locator("img").count() == 0


def test_curves_and_their_words(open_page):
    page = open_page()
    for name in (
        "Days over chips",
        "Dollars over chips",
        "Days over the link's speed",
        "Dollars over the link's speed",
    ):
        plot = page.get_by_role("img", name=re.compile(f"^{name}: From "))
        plot.locator(".scatterlayer .trace").first.wait_for(state="attached")
    expect(page.get_by_text(re.compile("^From .* now .* at 64;"))).to_have_count(2)


def test_export_limits_are_told_when_they_are_asked_for(open_page):
    page = open_page()
    page.get_by_text("Export limits, and what the answers to them buy").click()
    expect(page.get_by_role("row", name=re.compile("^H20: TPP 2368"))).to_be_visible(timeout=60_000)
    expect(page.get_by_role("row", name=re.compile("^without MLA"))).to_be_visible()


def test_a_recipe_is_predicted_on_this_machine(open_page):
    page = open_page()
    page.get_by_role("button", name="Predict").click()
    expect(page.get_by_role("row", name=re.compile("^pretrain"))).to_contain_text("40", timeout=60_000)
    expect(page.get_by_text(re.compile("tiny.toml: rough, "))).to_be_visible()


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_on_a_telephone_everything_is_reached_by_scrolling_down(open_page, scheme):
    page = open_page(
        "/plan?model=deepseek-v3&chips=2048", viewport={"width": 390, "height": 800}, color_scheme=scheme
    )
    page.get_by_role("img", name=re.compile("^Days over chips")).wait_for()
    assert page.evaluate("document.querySelector('main').scrollWidth") <= 390
    svg = page.locator(".layout .scroll")
    assert svg.evaluate("each => each.scrollWidth >= each.clientWidth")


def test_every_control_has_a_name(open_page):
    page = open_page()
    unnamed = """[...document.querySelectorAll('main input, main select, main button')].filter(each =>
      !each.labels?.length && !each.getAttribute('aria-label') && !each.textContent.trim()).length"""
    assert page.evaluate(unnamed) == 0
