"""Prices with a date and a time of day: worked by hand, summed by minutes, split anywhere; lists that are wrong."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tael.cost.prices import Hourly, HourPrice, PriceList, Tariff, dollars, energy, flat, hourly, load_prices
from tael.errors import TaelError
from tael.recipe import PriceSettings, load_recipe, parse_recipe

EXAMPLE = Path(__file__).parents[2] / "recipes" / "prices" / "list.toml"
NIGHT = '[[tariff]]\nname = "gpu"\nfrom = 2025-01-01\nwindow = "16:30-00:30"\nfactor = 0.5\n'
LIST = f"""
[[hour]]
name = "gpu"
from = 2025-01-01
dollars_per_hour = 2
source = "a quotation"
[[hour]]
name = "gpu"
from = 2025-02-01T12:00:00Z
dollars_per_hour = 3
[[hour]]
name = "box"
from = 2025-01-01
dollars_per_hour = 1.5
{NIGHT}
"""


@pytest.fixture
def prices(tmp_path: Path) -> PriceList:
    return load_prices(write(tmp_path, LIST))


def write(folder: Path, text: str) -> Path:
    path = folder / "prices.toml"
    path.write_text(text, encoding="utf-8")
    return path


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_seconds_to_dollars_and_joules() -> None:
    assert dollars(1800, 0.08) == pytest.approx(0.04)
    assert energy(10, 30) == 300 and energy(10, None) is None
    assert flat(0.08).over(at("2025-01-01"), 1800) == flat(0.08).over(at("1999-01-01"), 1800)


@pytest.mark.parametrize(
    ("start", "hours", "paid"),
    [
        ("2025-01-10T10:00", 2.0, 4.0),  # by day
        ("2025-01-10T17:00", 2.0, 2.0),  # by night
        ("2025-01-10T16:00", 1.0, 0.5 * 2 + 0.5 * 1),  # into the window
        ("2025-01-10T23:00", 2.0, 1.5 * 1 + 0.5 * 2),  # over midnight, out of it
        ("2025-01-10T12:00", 24.0, 16 * 2 + 8 * 1),  # a day
        ("2025-02-01T11:30", 1.0, 0.5 * 2 + 0.5 * 3),  # a new price at noon
        ("2025-02-01T10:00", 24.0, 2 * 2 + 4.5 * 3 + 8 * 1.5 + 9.5 * 3),  # both
        ("2025-01-10T16:29:59", 0.0, 0.0),
    ],
)
def test_worked_by_hand(prices: PriceList, start: str, hours: float, paid: float) -> None:
    charge = prices.hour("gpu").over(at(start), hours * 3600)
    assert charge.dollars == pytest.approx(paid)
    assert charge.per_hour == pytest.approx(paid / hours if hours else 2.0)


def test_windows_include_their_beginning_and_not_their_end(prices: PriceList) -> None:
    gpu = prices.hour("gpu")
    moments = ("2025-01-10T16:29:59", "2025-01-10T16:30", "2025-01-11T00:29:59", "2025-01-11T00:30")
    assert [gpu.at(at(moment)) for moment in moments] == [2.0, 1.0, 1.0, 2.0]
    assert [gpu.at(at(f"2025-02-01T{time}")) for time in ("11:59:59", "12:00")] == [2.0, 3.0]
    assert prices.hour("box").at(at("2025-01-10T17:00")) == 1.5  # the tariff is of another name


def test_a_tariff_has_days_and_an_end(tmp_path: Path) -> None:
    text = LIST.replace(NIGHT, NIGHT + 'days = ["fri"]\nuntil = 2025-01-17T20:00:00Z\n')
    gpu = load_prices(write(tmp_path, text)).hour("gpu")
    friday, saturday, next_friday = "2025-01-10", "2025-01-11", "2025-01-17"
    assert gpu.at(at(f"{friday}T17:00")) == 1.0 and gpu.at(at(f"{saturday}T00:10")) == 1.0  # it began on Friday
    assert gpu.at(at(f"{saturday}T17:00")) == 2.0
    assert gpu.at(at(f"{next_friday}T19:59")) == 1.0 and gpu.at(at(f"{next_friday}T20:00")) == 2.0
    assert gpu.over(at(f"{next_friday}T19:30"), 3600).dollars == pytest.approx(0.5 * 1 + 0.5 * 2)


def test_no_price_before_the_first(prices: PriceList) -> None:
    with pytest.raises(
        TaelError, match=r"no price of 'gpu' for 2024-12-31 23:00 UTC; the first one is from 2025-01-01"
    ):
        prices.hour("gpu").over(at("2024-12-31T23:00"), 7200)


# ----------------------------------------------------------------------- properties

MINUTES = st.integers(0, 20 * 24 * 60)
RATES = st.floats(0, 100, allow_nan=False)
BEGIN = at("2025-03-01")


@st.composite
def schedules(draw: st.DrawFn) -> Hourly:
    """A few prices and, mostly, a tariff; everything at whole minutes of twenty days."""
    times = draw(st.lists(MINUTES, max_size=3, unique=True))
    entries = [
        HourPrice.model_validate(
            {"name": "m", "from": BEGIN + timedelta(minutes=minute), "dollars_per_hour": draw(RATES)}
        )
        for minute in [0, *(time for time in times if time)]
    ]
    tariffs = []
    if draw(st.booleans()):
        first, last = draw(st.lists(st.integers(0, 24 * 60 - 1), min_size=2, max_size=2, unique=True))
        window = "-".join(f"{minute // 60:02}:{minute % 60:02}" for minute in (first, last))
        days = draw(st.lists(st.sampled_from(["mon", "wed", "sun"]), min_size=1, unique=True))
        since, length = BEGIN + timedelta(minutes=draw(MINUTES)), timedelta(minutes=1 + draw(MINUTES))
        values = {"name": "m", "from": since, "until": since + length, "factor": draw(st.floats(0, 4))}
        tariffs.append(Tariff.model_validate(values | {"window": window, "days": days}))
    return Hourly("list", "m", entries, tariffs)


@settings(max_examples=60, deadline=None)
@given(schedules(), MINUTES, st.integers(0, 3 * 24 * 60))
def test_it_is_the_sum_of_its_minutes(schedule: Hourly, start: int, length: int) -> None:
    moments = [BEGIN + timedelta(minutes=start + minute) for minute in range(length)]
    charge = schedule.over(BEGIN + timedelta(minutes=start), 60.0 * length)
    assert charge.dollars == pytest.approx(sum(schedule.at(moment) for moment in moments) / 60, rel=1e-9, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(schedules(), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_split_anywhere_the_parts_add_up(schedule: Hourly, start: int, first: int, second: int) -> None:
    begin = BEGIN + timedelta(seconds=start)
    whole = schedule.over(begin, first + second)
    parts = schedule.over(begin, first), schedule.over(begin + timedelta(seconds=first), second)
    assert sum(part.dollars for part in parts) == pytest.approx(whole.dollars, rel=1e-9, abs=1e-9)
    low, high = min(part.per_hour for part in parts), max(part.per_hour for part in parts)
    assert low - 1e-6 <= whole.per_hour <= high + 1e-6 or not first or not second


# ------------------------------------------------------------------------- the list


def test_the_example_is_what_deepseek_asked() -> None:
    prices = load_prices(EXAMPLE)

    def asked(name: str, moment: str) -> tuple[float, float, float]:
        found = prices.tokens(name).at(at(moment))
        return found.hit, found.miss, found.output

    assert asked("deepseek-chat", "2025-03-01T12:00") == (0.07, 0.27, 1.10)
    assert asked("deepseek-chat", "2025-03-01T17:00") == pytest.approx((0.035, 0.135, 0.55))
    assert asked("deepseek-reasoner", "2025-03-01T17:00") == pytest.approx((0.035, 0.135, 0.55), rel=0.02)
    assert asked("deepseek-chat", "2025-09-05T15:59") == (0.07, 0.27, 1.10)
    assert asked("deepseek-chat", "2025-09-05T17:00") == (0.07, 0.56, 1.68)  # no discount any more
    assert asked("deepseek-reasoner", "2026-01-01T17:00") == (0.028, 0.28, 0.42)
    assert prices.hour("H800").at(at("2025-06-01")) == 2.0
    assert all(entry.source for entry in (*prices.hours, *prices.token_prices, *prices.tariffs))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("gpu", "gpu"), None),
        (('name = "box"', 'nam = "box"'), "[[hour]] 3: 'name' is missing"),
        (("dollars_per_hour = 1.5", "dollars_per_hour = -1.5"), "[[hour]] 3 'box': dollars_per_hour: "),
        (("dollars_per_hour = 1.5", "dollars_per_hour = nan"), "[[hour]] 3 'box': dollars_per_hour: "),
        (("dollars_per_hour = 1.5", "dollar_per_hour = 1.5"), "[[hour]] 3 'box': 'dollars_per_hour' is missing"),
        (('source = "a', 'sorce = "a'), "[[hour]] 1 'gpu': unknown key 'sorce'; did you mean 'source'?"),
        (("from = 2025-02-01T12:00:00Z", "from = 2025"), "[[hour]] 2 'gpu': from: must be a date such as"),
        (("from = 2025-02-01T12:00:00Z", 'from = "soon"'), "[[hour]] 2 'gpu': from: must be a date such as"),
        (("2025-02-01T12:00:00Z", "0001-01-01T00:00:00+10:00"), "[[hour]] 2 'gpu': from: must be a date such as"),
        (("2025-02-01T12:00:00Z", "2025-01-01"), "[[hour]] 'gpu' has two prices from 2025-01-01"),
        (("16:30-00:30", "16:30"), "window: must be two times of the day in UTC"),
        (("16:30-00:30", "24:00-01:00"), "window: must be two times of the day in UTC"),
        (("16:30-00:30", "16:30-16:30"), "window: is empty"),
        (("factor = 0.5", 'factor = "half"'), "[[tariff]] 1 'gpu': factor: "),
        (("factor = 0.5", 'factor = 0.5\ndays = ["funday"]'), "[[tariff]] 1 'gpu': days.0: "),
        (("factor = 0.5", "factor = 0.5\ndays = []"), "[[tariff]] 1 'gpu': days: "),
        (("factor = 0.5", "factor = 0.5\nuntil = 2024-01-01"), "[[tariff]] 'gpu' ends before it begins"),
        (('[[tariff]]\nname = "gpu"', '[[tariff]]\nname = "gpus"'), "of no entry in the list; did you mean 'gpu'?"),
        (("[[tariff]]", "[[tarif]]"), "unknown table 'tarif'; did you mean 'tariff'?"),
        (("[[tariff]]", "[tariff]"), "'tariff' must be written [[tariff]]"),
        (("[[tariff]]", "[[tariff"), "not a TOML file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: tuple[str, str], line: str | None) -> None:
    path = write(tmp_path, LIST.replace(*change))
    if line is None:
        load_prices(path)
        return
    with pytest.raises(TaelError) as caught:
        load_prices(path)
    assert str(caught.value).startswith(f"{path}: ") and line in str(caught.value)
    assert "\n" not in str(caught.value).split("not a TOML file")[0]


@pytest.mark.parametrize(
    ("other", "meets"),
    [
        ("from = 2025-03-01\nwindow = '00:00-00:31'", True),  # the first goes on over midnight
        ("from = 2025-03-01\nwindow = '00:30-16:30'", False),
        ("from = 2025-03-01\nwindow = '12:00-16:31'", True),
        ("from = 2025-03-01", True),  # the whole day
        ("from = 2024-01-01\nuntil = 2025-01-01", False),
    ],
)
def test_two_tariffs_never_hold_at_once(tmp_path: Path, other: str, meets: bool) -> None:
    path = write(tmp_path, f'{LIST}\n[[tariff]]\nname = "gpu"\nfactor = 2.0\n{other}\n')
    if not meets:
        load_prices(path)
        return
    with pytest.raises(TaelError, match="two tariffs of 'gpu' hold at once"):
        load_prices(path)


def test_names_that_are_not_there(prices: PriceList, tmp_path: Path) -> None:
    with pytest.raises(TaelError, match=r"no \[\[hour\]\] is named 'gpus'; did you mean 'gpu'"):
        prices.hour("gpus")
    with pytest.raises(TaelError, match=r"no \[\[tokens\]\] is named 'gpu'; it has none at all"):
        prices.tokens("gpu")
    with pytest.raises(TaelError, match="price list cannot be read: No such file"):
        load_prices(tmp_path / "none.toml")
    with pytest.raises(TaelError, match="price list cannot be read: Is a directory"):
        load_prices(tmp_path)


# ---------------------------------------------------------------------- in a recipe


def test_a_recipe_names_a_list_and_an_entry(prices: PriceList) -> None:
    settings = PriceSettings(prices=str(prices.path), entry="gpu", watts=300)
    assert hourly(settings).at(at("2025-01-10T17:00")) == 1.0
    assert hourly(PriceSettings(dollars_per_hour=0.5)).at(at("2025-01-10T17:00")) == 0.5
    again = PriceSettings.model_validate(settings.model_dump(exclude_none=True))
    assert again == settings and "dollars_per_hour" not in settings.model_dump()


@pytest.mark.parametrize(
    ("price", "line"),
    [
        ({"prices": "list.toml"}, "price: prices and entry go together"),
        ({"prices": "list.toml", "entry": "gpu", "dollars_per_hour": 1.0}, "price: give dollars_per_hour, or prices"),
        ({"price": "list.toml"}, "unknown key 'price.price'; did you mean 'prices'?"),
    ],
)
def test_a_recipe_has_one_price(price: dict[str, object], line: str) -> None:
    table = {"name": "x", "price": price, "stages": {}}
    with pytest.raises(TaelError, match=line):
        parse_recipe(table)


def test_the_recipes_prices_are_in_the_list() -> None:
    demo = load_recipe(EXAMPLE.parents[1] / "demo.toml")
    assert load_prices(EXAMPLE).hour("2 shared vCPUs").at(at("2026-01-01")) == demo.price.dollars_per_hour
