"""What the plan page asks and draws, without a browser: addresses, commands, bars that add up, pictures' words."""

from __future__ import annotations

import html
import itertools
import json
import re
import shlex
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tael.cli import app
from tael.cost.named import MODELS, find_model
from tael.cost.plan_request import Request
from tael.cost.what_if import Case
from tael.errors import TaelError
from tael.serve.pages.plan_answers import Curves, Limits, Point, curves, plan, seconds_a_token
from tael.serve.pages.plan_curves import curve_charts, summary
from tael.serve.pages.plan_inputs import Scale
from tael.serve.pages.plan_layout import Spread, picture, sentences, shown_columns, shown_rows, spread_of
from tael.serve.pages.plan_parts import command_part, limits_part, plan_sentence, plan_tiles, serving_part, tiles
from tael.serve.pages.plan_pictures import Bar, Part, draw, flops_bar, memory_bar, step_bar
from tael.serve.pages.plan_question import FIRST, Question, parse_number, read_question

HOSTILE = "</b><script>window.pwned = 1</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    return Request("deepseek-v2-lite", chips=64).answer()


# ------------------------------------------------------------------------ questions

numbers = st.floats(1e-2, 1e20).map(lambda value: float(f"{value:.6g}"))
questions = st.builds(
    Question,
    model=st.sampled_from(sorted(MODELS)),
    chip=st.sampled_from(["H100", "H800", "Ascend 910B", "RTX 4090"]),
    chips=st.none() | st.integers(1, 10**6).map(float),
    tokens=st.none() | numbers,
    price=st.none() | numbers,
    link=st.none() | numbers,
    precision=st.none() | st.sampled_from(["bf16", "fp8", "fp4"]),
    layout=st.none() | st.sampled_from(["pipeline=16,expert=64", "tensor=8,recompute=full"]),
    sequence=st.none() | st.integers(1, 10**6).map(float),
    batch_tokens=st.none() | numbers,
    context=st.none() | numbers,
    speed=st.none() | numbers,
)


@given(questions)
def test_an_address_says_the_same_again(question: Question) -> None:
    assert read_question(dict(parse_qsl(urlsplit(question.address()).query))) == (question, [])


@given(questions)
def test_the_command_asks_the_same(question: Question) -> None:
    words = shlex.split(question.command())
    assert words[:3] == ["tael", "plan", question.model]
    given_ = dict(zip(words[3::2], words[4::2], strict=True))
    for name, value in given_.items():
        own = getattr(question, name.removeprefix("--").replace("-", "_"))
        assert own == (value if isinstance(own, str) else float(value))
    chosen = [v for k, v in vars(question).items() if k != "model" and v is not None and v != getattr(FIRST, k)]
    assert len(given_) == len(chosen)


def test_the_command_gives_the_pages_plan() -> None:
    question, problems = read_question({"model": "deepseek-v2-lite", "chips": "64", "price": "2", "link": "40"})
    assert problems == []
    result = CliRunner().invoke(app, [*shlex.split(question.command())[1:], "--json"])
    assert json.loads(result.stdout) == json.loads(json.dumps(plan(question).table))


def test_the_link_moves_both_ways() -> None:
    hours = [Request("deepseek-v3", chips=2048, link=link).answer()["gpu_hours"] for link in (20.0, 200.0, 2000.0)]
    assert hours == sorted(hours, reverse=True) and hours[0] > hours[2]
    assert hours[1] == Request("deepseek-v3", chips=2048).answer()["gpu_hours"]
    for wrong in (Request("deepseek-v3", link=0.0), Request("deepseek-v3", link=9.0, cut_link=3.0)):
        with pytest.raises(TaelError, match="link"):
            wrong.run()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model", "/etc/passwd", "unknown model"),
        ("model", "config.json", "unknown model"),
        ("model", HOSTILE, "unknown model"),
        ("chip", "H80", "did you mean 'H800'"),
        ("chips", "many", "is not a number"),
        ("chips", "-3", "must be above 0"),
        ("chips", "2.5", "whole number"),
        ("chips", "1e12", "at most a billion"),
        ("tokens", "0", "must be above 0"),
        ("tokens", "nan", "is not a number"),
        ("price", "-1", "must be above 0"),
        ("precision", "fp9", "unknown precision"),
        ("layout", "tensr=8", "did you mean 'tensor'"),
        ("layout", HOSTILE, "unknown"),
        ("link", "1e99", "must be above 0"),
    ],
)
def test_what_cannot_be_read_is_said_and_left_out(key: str, value: str, said: str) -> None:
    question, problems = read_question({key: value, "speed": "30"})
    assert len(problems) == 1 and said in problems[0] and "\n" not in problems[0]
    assert question == Question(speed=30.0)


@given(st.dictionaries(st.sampled_from(sorted(vars(FIRST))), st.text(max_size=300), max_size=6))
def test_no_address_breaks_the_page(query: dict[str, str]) -> None:
    question, _ = read_question(query)
    assert question.model in MODELS
    question.address()


def test_another_model_takes_its_own_tokens_and_chips() -> None:
    question = Question(chips=64.0, tokens=1e9, price=3.0, layout="tensor=2")
    assert question.with_value("model", "llama-2-7b") == Question(model="llama-2-7b", price=3.0)
    assert question.with_value("chip", "h100").price is None
    assert question.with_value("chips", " ").chips is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("2,048", 2048), ("14.8T", 14.8e12), ("14.8e12", 14.8e12), ("$2", 2), ("7 b", 7e9), ("1_000", 1000)],
)
def test_numbers_as_people_write_them(text: str, number: float) -> None:
    assert parse_number(text) == pytest.approx(number)


@given(st.floats(1e-3, 1e6), st.floats(1.5, 1e9), st.integers(2, 300), st.data())
def test_a_slider_goes_there_and_back(low: float, span: float, steps: int, data: st.DataObject) -> None:
    scale = Scale(low, low * span, steps)
    assert scale.place(low) == 0 and scale.place(low * span) == steps
    one, other = sorted(data.draw(st.tuples(st.integers(0, steps), st.integers(0, steps))))
    assert scale.value(one) <= scale.value(other)


def test_chips_are_powers_of_two() -> None:
    scale = Scale(1, 2**17, 17, whole=True)
    assert [scale.value(place) for place in range(18)] == [2.0**n for n in range(18)]


# ------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "llama-2-70b", "qwen3-30b-a3b"])
def test_bars_add_up(name: str) -> None:
    table = Request(name, chips=64).answer()
    for bar in (step_bar(table), flops_bar(table)):
        assert sum(part.value for part in bar.parts) == pytest.approx(bar.whole, rel=1e-9)
    memory = memory_bar(table, 80e9)
    assert (
        sum(part.value for part in memory.parts) == pytest.approx(table["memory_bytes_per_device"])
        and memory.whole == 80e9
    )
    hidden = sum(part.value for part in step_bar(table).behind)
    assert hidden == pytest.approx(table["step_by_part"]["hidden_communication"])
    assert hidden <= table["step_by_part"]["compute"] * 1.0001  # it is drawn under compute


def test_a_bar_says_every_part(answer: dict[str, Any]) -> None:
    drawn = draw(step_bar(answer))
    told = re.search(r'role="img" aria-label="([^"]+)"', drawn)
    assert told is not None
    for part in step_bar(answer).parts:
        assert f"{part.name} {part.figure}" in html.unescape(told[1])
        assert f"<span>{part.name}</span>" in html.unescape(drawn)
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", drawn.partition("stack behind")[0])]
    assert 95 < sum(widths) <= 100.1


def test_nothing_in_a_picture_is_taken_for_html(answer: dict[str, Any]) -> None:
    bar = Bar(HOSTILE, (Part(HOSTILE, 1.0, HOSTILE, HOSTILE),), 1.0, HOSTILE, (Part(HOSTILE, 1.0, "x", HOSTILE),))
    limits = Limits(
        HOSTILE, (Case(HOSTILE, None, None, None, None, HOSTILE),), (Case(HOSTILE, 1.0, 1.0, 1.0, 1.0, HOSTILE),)
    )
    strange = answer | {"model": HOSTILE, "chip": HOSTILE, "serving": None, "serving_note": HOSTILE}
    made = [draw(bar), limits_part(limits), tiles(plan_tiles(strange)), serving_part(strange), command_part(HOSTILE)]
    for each in made:
        assert "<script" not in each and "<img" not in each and "&lt;script&gt;" in each
    assert HOSTILE in plan_sentence(strange)  # a sentence is text, and is escaped where it is shown


def spread(**more: Any) -> Spread:
    answer = Request("deepseek-v3", chips=2048, layout="pipeline=16,expert=64,recompute=selective").answer()
    shape = find_model("deepseek-v3").shape
    found = spread_of(answer, shape, 8)
    return found if not more else Spread(**{**vars(found), **more})


def test_the_layout_in_words() -> None:
    told = sentences(spread())
    assert told[0] == "2,048 chips = 128 copies of the model x 16 pipeline stages."
    assert "A stage holds at most 4 of the 61 layers, in 3 pieces that micro-batches pass in turn." in told
    assert "The 256 experts of a layer are spread over 64 copies: 4 on a chip; the 2 groups hold the same." in told
    drawn = picture(spread())
    assert all(sentence in html.unescape(drawn) for sentence in told)
    assert "stage 16" in drawn and "copy 128" in drawn and "copy 64" in drawn and "copy 3<" not in drawn
    assert len(re.findall('class="cell"', drawn)) == 5 * 7  # copies 1, 2, 64, 65, 128 by stages 1 to 6 and 16


def test_one_chip_and_dense_models_are_drawn_too() -> None:
    for name, chips in (("qwen3-0.6b", 1), ("llama-2-7b", 8), ("llama-2-70b", 64)):
        if name not in MODELS:
            continue
        answer = Request(name, chips=chips).answer()
        drawn = picture(spread_of(answer, find_model(name).shape, 8))
        assert 'class="chip"' in drawn and "experts of a layer" not in drawn


@given(st.integers(1, 10**5), st.integers(1, 512))
def test_rows_and_columns_that_are_drawn(count: int, group: int) -> None:
    for shown in (shown_columns(count), shown_rows(count, group)):
        known = [index for index in shown if index is not None]
        assert known == sorted(set(known)) and known[0] == 0 and known[-1] == count - 1 and len(shown) <= 9
        for before, after in itertools.pairwise(shown):
            assert before is None or after is None or after == before + 1  # a gap is always marked


# --------------------------------------------------------------------------- curves


def test_curves_of_a_plan() -> None:
    question = Question("llama-2-7b", "H100", chips=64.0, tokens=2e12, price=2.0)
    found = curves(question, lambda: True)
    assert found is not None and found.chips == 64 and found.link == 450
    here = next(point for point in found.over_chips if point.at == 64)
    table = plan(question).table
    assert table is not None
    assert here.days == pytest.approx(table["days"]) and here.dollars == pytest.approx(table["dollars"])
    assert any(point.at == 450 and point.days == pytest.approx(table["days"]) for point in found.over_link)
    times = [point.days for point in found.over_chips if point.days is not None]
    assert times == sorted(times, reverse=True)
    assert [chart.key for chart in curve_charts(found)] == [
        "days-chips",
        "dollars-chips",
        "days-link",
        "dollars-link",
    ]


def test_curves_end_when_nobody_wants_them() -> None:
    seconds_a_token.cache_clear()
    asked = iter([True, True, False])
    assert curves(Question("llama-2-7b", "H100", chips=64.0), lambda: next(asked)) is None
    assert seconds_a_token.cache_info().currsize == 2
    assert (
        curves(Question("deepseek-v3", layout="x"), lambda: True) is not None
    )  # a layout of one's own plays no part


def test_words_of_a_curve() -> None:
    points = (Point(8, None, None), Point(64, 400.0, 5e6), Point(512, 60.0, 6e6))
    assert summary(points, "days", "chips", 64) == (
        "From 400 days at 64 chips to 60 days at 512; now 400 days at 64; least 60 days at 512; not possible at 8."
    )
    assert summary(points[:1], "days", "chips", 8) == "Nothing can be planned there."
    charts = curve_charts(Curves(points, points[:1], 64, 1))
    assert [chart.key for chart in charts] == ["days-chips", "dollars-chips"]
