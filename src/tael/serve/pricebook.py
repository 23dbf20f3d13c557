"""What the server's tokens cost its clients, and what its machine costs its keeper, at the time of asking."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tael.cost.prices import PriceList, TokenPrices, energy, flat, load_prices
from tael.errors import TaelError
from tael.serve.prices import Price

if TYPE_CHECKING:
    from tael.serve.settings import ModelSpec, ServeSettings


def _now() -> datetime:
    return datetime.now(UTC)


class PriceBook:
    """Prices as settings and their price list have them. Raises TaelError where the list lacks one."""

    def __init__(self, settings: ServeSettings, clock: Callable[[], datetime] = _now) -> None:
        prices = load_prices(settings.prices) if settings.prices is not None else None
        self._clock, self._watts = clock, settings.watts
        self._hourly = flat(settings.dollars_per_hour)
        if prices is not None and settings.machine is not None:
            self._hourly = prices.hour(settings.machine)
        self._listed = {spec.name: _listed(spec, prices) for spec in settings.models}
        self._hourly.at(clock())  # what has no price yet is said now, not to the first who asks
        for spec in settings.models:
            self.price(spec)

    def price(self, spec: ModelSpec) -> Price:
        """Of the model's tokens, for a request that comes now."""
        listed = self._listed.get(spec.name)
        if listed is None:
            return spec.price
        found = listed.at(self._clock())
        return Price(found.hit, found.miss, found.output)

    def machine_dollars(self, seconds: float) -> float:
        """What `seconds` of the machine cost that have just passed."""
        return self._hourly.at(self._clock()) * seconds / 3600

    def joules(self, seconds: float) -> float | None:
        """What it drew in that time, by its average; None where that is not known."""
        return energy(seconds, self._watts)


def _listed(spec: ModelSpec, prices: PriceList | None) -> TokenPrices | None:
    """The list's prices for a model; None where its own `price` holds."""
    if spec.priced_as is not None:
        if prices is None:
            raise TaelError(
                f"model '{spec.name}': priced_as is a name in a price list, and no list is given (--prices)"
            )
        return prices.tokens(spec.priced_as)
    if prices is None or "price" in spec.model_fields_set or not prices.has_tokens(spec.name):
        return None
    return prices.tokens(spec.name)
