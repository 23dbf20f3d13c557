"""Money and energy from time, at prices that have a date and a time of day.

    prices = load_prices(Path("recipes/prices/list.toml"))
    prices.hour("H800").over(began, seconds) -> Charge(dollars, per_hour)
    prices.tokens("deepseek-chat").at(moment) -> TokenPrice(hit, miss, output)

All times are UTC. A price holds from its moment on, until the next entry of the same name; a tariff's window includes
its beginning and not its end.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tael.errors import TaelError, did_you_mean
from tael.recipe import PriceSettings

_WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
_DAY, _WEEK = 24 * 60, 7 * 24 * 60


def dollars(seconds: float, per_hour: float) -> float:
    """Price in dollars of `seconds` on a machine that costs `per_hour` dollars an hour."""
    return seconds / 3600.0 * per_hour


def energy(seconds: float, watts: float | None) -> float | None:
    """Joules drawn in `seconds` at an average of `watts`; None when the draw is not known."""
    return None if watts is None else seconds * watts


# ----------------------------------------------------------------- the list's entries


def _moment(value: Any) -> datetime:
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if type(value) is date:
            value = datetime.combine(value, time())
        if isinstance(value, datetime):
            return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise ValueError("must be a date such as 2025-02-26, or a date and time such as 2025-09-05T16:00:00Z")


def _window(value: Any) -> tuple[int, int]:
    """Minute of the day at which it begins, and its length in minutes."""
    found = _WINDOW.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError('must be two times of the day in UTC, such as "16:30-00:30"')
    first, first_minute, last, last_minute = map(int, found.groups())
    begins = first * 60 + first_minute
    length = (last * 60 + last_minute - begins) % _DAY
    if not length:
        raise ValueError("is empty; leave the window out for the whole day")
    return begins, length


Moment = Annotated[datetime, BeforeValidator(_moment)]
Amount = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
_DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class _Dated(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    since: Moment = Field(alias="from")
    source: str = ""


class HourPrice(_Dated):
    """What an hour of a device or machine costs from a moment on."""

    dollars_per_hour: Amount


class TokenPrice(_Dated):
    """Dollars a million tokens from a moment on: of the prompt, in the cache or not, and of the answer."""

    hit: Amount
    miss: Amount
    output: Amount


class Tariff(_Dated):
    """A factor on the prices of one name, in a window of the day."""

    until: Moment | None = None
    window: Annotated[tuple[int, int], BeforeValidator(_window)] = (0, _DAY)
    days: Annotated[tuple[Day, ...], Field(min_length=1)] = _DAYS
    """On which the window begins."""
    factor: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]

    def times(self, first: datetime, last: datetime) -> Iterator[tuple[datetime, datetime]]:
        """When it holds, as (from, to), wherever that touches `first` to `last`."""
        begins, length = (timedelta(minutes=minutes) for minutes in self.window)
        day = max(first, self.since).date() - timedelta(days=1)
        while day <= last.date():
            start = datetime.combine(day, time(), UTC) + begins
            low, high = max(start, self.since), min(start + length, self.until or start + length)
            if _DAYS[day.weekday()] in self.days and low < high:
                yield low, high
            day += timedelta(days=1)

    def holds(self, moment: datetime) -> bool:
        return any(low <= moment < high for low, high in self.times(moment, moment))

    def meets(self, other: Tariff) -> bool:
        """Whether both could hold at one moment."""
        if (self.until and self.until <= other.since) or (other.until and other.until <= self.since):
            return False
        return any(
            (b - a) % _WEEK < self.window[1] or (a - b) % _WEEK < other.window[1]
            for a in self._starts()
            for b in other._starts()
        )

    def _starts(self) -> list[int]:
        return [_DAYS.index(day) * _DAY + self.window[0] for day in self.days]


# --------------------------------------------------------------------- over time


@dataclass(frozen=True)
class Charge:
    """What a stretch of time cost, and what an hour of it cost in the mean."""

    dollars: float
    per_hour: float


@dataclass(frozen=True)
class _Schedule:
    """The entries of one name, and the tariffs on them."""

    where: str
    name: str
    entries: Sequence[Any]
    tariffs: Sequence[Tariff] = ()

    def _factor(self, moment: datetime) -> float:
        return next((tariff.factor for tariff in self.tariffs if tariff.holds(moment)), 1.0)

    def _latest(self, moment: datetime) -> Any:
        held = [entry for entry in self.entries if entry.since <= moment]
        if not held:
            first = min(entry.since for entry in self.entries)
            raise TaelError(
                f"{self.where}: has no price of '{self.name}' for {moment:%Y-%m-%d %H:%M} UTC; the first one is from "
                f"{first:%Y-%m-%d}"
            )
        return max(held, key=lambda entry: entry.since)


class Hourly(_Schedule):
    """What an hour of a machine costs, at any time."""

    def at(self, moment: datetime) -> float:
        """Dollars an hour. Raises TaelError before the first price."""
        return self._latest(moment).dollars_per_hour * self._factor(moment)

    def over(self, start: datetime, seconds: float) -> Charge:
        """What `seconds` from `start` on cost, over any changes of price between. Raises TaelError as `at` does."""
        end = start + timedelta(seconds=seconds)
        edges = sorted({start, end, *(edge for edge in self._changes(start, end) if start < edge < end)})
        pieces = [((high - low).total_seconds(), self.at(low)) for low, high in pairwise(edges)]
        rates = {rate for _, rate in pieces} or {self.at(start)}
        if len(rates) == 1:
            rate = rates.pop()
            return Charge(dollars(seconds, rate), rate)
        whole = sum(dollars(length, rate) for length, rate in pieces)
        return Charge(whole, whole * 3600 / seconds)

    def _changes(self, start: datetime, end: datetime) -> Iterator[datetime]:
        yield from (entry.since for entry in self.entries)
        for tariff in self.tariffs:
            for times in tariff.times(start, end):
                yield from times


class TokenPrices(_Schedule):
    """What tokens of a model cost, at any time."""

    def at(self, moment: datetime) -> TokenPrice:
        """Dollars a million tokens, tariffs put on. Raises TaelError before the first price."""
        found, factor = self._latest(moment), self._factor(moment)
        parts = {part: getattr(found, part) * factor for part in ("hit", "miss", "output")}
        return found.model_copy(update=parts)


_ALWAYS = datetime.min.replace(tzinfo=UTC)


def flat(dollars_per_hour: float) -> Hourly:
    """One price for all times."""
    entry = HourPrice.model_construct(name="hour", since=_ALWAYS, source="", dollars_per_hour=dollars_per_hour)
    return Hourly("price", "hour", (entry,))


def hourly(settings: PriceSettings) -> Hourly:
    """What an hour costs by a recipe's [price]. Raises TaelError where its list or entry is not there."""
    if settings.prices is None or settings.entry is None:
        return flat(settings.dollars_per_hour)
    return load_prices(Path(settings.prices)).hour(settings.entry)


# ---------------------------------------------------------------------- the list


@dataclass(frozen=True)
class PriceList:
    """A price list file, read and checked."""

    path: Path
    hours: tuple[HourPrice, ...] = ()
    token_prices: tuple[TokenPrice, ...] = ()
    tariffs: tuple[Tariff, ...] = ()

    def hour(self, name: str) -> Hourly:
        """Prices of an hour under `name`. Raises TaelError with the nearest name."""
        return Hourly(str(self.path), name, self._named(name, self.hours, "hour"), self._tariffs(name))

    def tokens(self, name: str) -> TokenPrices:
        """Prices of tokens under `name`. Raises TaelError with the nearest name."""
        return TokenPrices(str(self.path), name, self._named(name, self.token_prices, "tokens"), self._tariffs(name))

    def has_tokens(self, name: str) -> bool:
        return any(entry.name == name for entry in self.token_prices)

    def _named(self, name: str, entries: Sequence[Any], table: str) -> list[Any]:
        found = [entry for entry in entries if entry.name == name]
        if not found:
            names = {entry.name for entry in entries}
            hint = did_you_mean(name, names) if names else "; it has none at all"
            raise TaelError(f"{self.path}: no [[{table}]] is named '{name}'{hint}")
        return found

    def _tariffs(self, name: str) -> list[Tariff]:
        return [tariff for tariff in self.tariffs if tariff.name == name]

    def check(self) -> None:
        """Raise TaelError for what could mean two things."""
        for table, entries in (("hour", self.hours), ("tokens", self.token_prices)):
            if twice := _first_twice((entry.name, entry.since) for entry in entries):
                raise TaelError(
                    f"{self.path}: [[{table}]] '{twice[0]}' has two prices from {twice[1]:%Y-%m-%d %H:%M}"
                )
        names = {entry.name for entry in (*self.hours, *self.token_prices)}
        for tariff in self.tariffs:
            if tariff.name not in names:
                hint = did_you_mean(tariff.name, names) if names else ""
                raise TaelError(f"{self.path}: [[tariff]] '{tariff.name}' is of no entry in the list{hint}")
            if tariff.until is not None and tariff.until <= tariff.since:
                raise TaelError(f"{self.path}: [[tariff]] '{tariff.name}' ends before it begins")
        for one, other in combinations(self.tariffs, 2):
            if one.name == other.name and one.meets(other):
                raise TaelError(
                    f"{self.path}: two tariffs of '{one.name}' hold at once (from {one.since:%Y-%m-%d} and from "
                    f"{other.since:%Y-%m-%d}); give the earlier an `until`, or part their windows"
                )


def _first_twice(keys: Iterable[tuple[str, datetime]]) -> tuple[str, datetime] | None:
    seen: set[tuple[str, datetime]] = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    return None


_TABLES: dict[str, tuple[str, type[_Dated]]] = {
    "hour": ("hours", HourPrice),
    "tokens": ("token_prices", TokenPrice),
    "tariff": ("tariffs", Tariff),
}


def load_prices(path: Path) -> PriceList:
    """Read a price list. Raises TaelError naming the table and the key that is wrong."""
    try:
        read = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TaelError(f"{path}: the price list cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TaelError(f"{path}: not a TOML file: {error}") from None
    parts: dict[str, Any] = {}
    for table, entries in read.items():
        if table not in _TABLES:
            raise TaelError(f"{path}: unknown table '{table}'{did_you_mean(table, _TABLES)}")
        if not isinstance(entries, list):
            raise TaelError(f"{path}: '{table}' must be written [[{table}]], once for each entry")
        part, kind = _TABLES[table]
        parts[part] = tuple(_entry(path, table, kind, number, values) for number, values in enumerate(entries, 1))
    prices = PriceList(path, **parts)
    prices.check()
    return prices


def _entry(path: Path, table: str, kind: type[_Dated], number: int, values: Any) -> _Dated:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = f" '{values['name']}'" if isinstance(values, dict) and isinstance(values.get("name"), str) else ""
        where = f"{path}: [[{table}]] {number}{name}"
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = [field.alias or each for each, field in kind.model_fields.items()]
            raise TaelError(f"{where}: unknown key '{key}'{did_you_mean(key, known)}") from None
        if first["type"] == "missing":
            raise TaelError(f"{where}: '{key}' is missing") from None
        raise TaelError(f"{where}: {key}: {first['msg'].removeprefix('Value error, ')}") from None
