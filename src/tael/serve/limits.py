"""Who may come in now: requests and tokens a minute and requests at once of each key, and room in the house.

A minute is any 60 seconds, not one of the clock's: what was let in leaves the count 60 seconds later, so that no
60 seconds ever hold more than the limit, and Retry-After is the moment at which the count has fallen far enough.
(A token bucket needs less memory, but lets in twice its limit in the first minute.)
"""

from __future__ import annotations

import itertools
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from tael.errors import TaelError
from tael.serve.caller import Caller
from tael.serve.errors import ApiError

MINUTE = 60_000_000
"""Times are whole microseconds: with floats, now + (then - now) may fall short of then."""
_GRAIN = MINUTE // 1024
_MOST = 10**15


@dataclass(frozen=True)
class KeyLimits:
    """What a key may use; None is no limit. Raises TaelError for what is no limit at all."""

    budget_dollars: float | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and answers."""
    concurrent: int | None = None

    def __post_init__(self) -> None:
        if self.budget_dollars is not None and not 0 <= self.budget_dollars <= _MOST:
            raise TaelError(f"budget is {self.budget_dollars} dollars; it must be 0 or more, and finite")
        for name in ("requests_per_minute", "tokens_per_minute", "concurrent"):
            value = getattr(self, name)
            if value is not None and not (1 <= value <= _MOST and value == int(value)):
                raise TaelError(f"{name} is {value}; it must be a whole number from 1 on")


@dataclass
class _Slot:
    """What came within one 1024th of a minute; all of it leaves the count when the last of it does."""

    first: int
    last: int
    amount: int


class _Window:
    """The sum of the last minute, in about a thousand slots at most, however much comes."""

    def __init__(self) -> None:
        self._slots: deque[_Slot] = deque()
        self._sum = 0

    def add(self, now: int, amount: int) -> None:
        self._forget(now)
        self._sum += amount
        if self._slots and now - self._slots[-1].first < _GRAIN:
            self._slots[-1].last = now
            self._slots[-1].amount += amount
        else:
            self._slots.append(_Slot(now, now, amount))

    def wait(self, now: int, amount: int, limit: int) -> int:
        """Microseconds until `amount`, at most `limit`, fits beside what is there; 0: it fits now."""
        self._forget(now)
        over = self._sum + amount - limit
        for slot in self._slots:
            if over <= 0:
                break
            over -= slot.amount
            if over <= 0:
                return slot.last + MINUTE - now
        return 0

    def _forget(self, now: int) -> None:
        while self._slots and self._slots[0].last + MINUTE <= now:
            self._sum -= self._slots.popleft().amount


@dataclass
class _Account:
    """What one caller has had of late."""

    requests: _Window = field(default_factory=_Window)
    tokens: _Window = field(default_factory=_Window)
    open: int = 0
    used: int = 0
    """When it was last of use."""


class Gate:
    """Lets requests in, or raises ApiError 429. Not for use from several threads: it belongs to the event loop.

    `max_queue` requests may be in the house; with `max_running` (what the engines run at once), these may wait and
    as many as that run beside them. `clock` gives seconds.
    """

    def __init__(
        self, max_queue: int, max_running: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if max_queue < 0 or (max_running or 0) < 0 or max_queue + (max_running or 0) < 1:
            raise TaelError(f"a queue of {max_queue} lets nobody in; it must have room for 1 request or more")
        self.places = max_queue + (max_running or 0)
        self.inside = 0
        """Requests let in and not closed yet."""
        self._clock = clock
        self._accounts: OrderedDict[str, _Account] = OrderedDict()
        self._stay = 0.0
        """Seconds that a request stays, smoothed over the last ten or so."""

    def enter(self, caller: Caller, limits: KeyLimits, tokens: int) -> Lease:
        """Let in a request with a prompt of `tokens` tokens; close the lease when it is over.

        Raises ApiError 429 when the house is full or one of the caller's limits is reached; what is turned away
        counts nowhere. `retry_after` is exact for limits a minute, else a guess from how long requests stay. It is
        None for a prompt that is larger than the limit by itself.
        """
        now = self._now()
        self._forget(now)
        if self.inside >= self.places:
            raise self._refusal("the server is busy; try again later", "queue_full", self._guess(self.places))
        account = self._accounts.get(caller.owner) or _Account()
        if limits.concurrent is not None and account.open >= limits.concurrent:
            most = _number(limits.concurrent, "request")
            raise self._refusal(f"this key may have {most} running at once", retry_after=self._guess(account.open))
        self._check_rates(account, limits, tokens, now)
        account.requests.add(now, 1)
        account.tokens.add(now, tokens)
        account.open, account.used = account.open + 1, now
        self._accounts[caller.owner] = account
        self._accounts.move_to_end(caller.owner)
        self.inside += 1
        return Lease(self, caller.owner, now)

    def _check_rates(self, account: _Account, limits: KeyLimits, tokens: int, now: int) -> None:
        """Raise the refusal that lasts longest, if there is one."""
        waits: list[tuple[int, str]] = []
        if (limit := limits.requests_per_minute) is not None:
            wait = account.requests.wait(now, 1, limit)
            waits.append((wait, f"this key may send {_number(limit, 'request')} a minute"))
        if (limit := limits.tokens_per_minute) is not None:
            if tokens > limit:
                raise self._refusal(f"the prompt has {tokens} tokens; this key may use {limit} a minute")
            wait = account.tokens.wait(now, tokens, limit)
            waits.append((wait, f"this key may use {_number(limit, 'token')} a minute"))
        wait, message = max(waits, default=(0, ""))
        if wait:
            raise self._refusal(f"{message}; try again in {math.ceil(wait / 1e6)} s", retry_after=wait / 1e6)

    @staticmethod
    def _refusal(message: str, code: str = "rate_limit_exceeded", retry_after: float | None = None) -> ApiError:
        return ApiError(429, message, code=code, retry_after=retry_after)

    def _guess(self, places: int) -> float:
        """Seconds until one of so many requests is over, if they end evenly."""
        return min(60.0, max(1.0, self._stay / places))

    def _spend(self, owner: str, tokens: int) -> None:
        now = self._now()
        account = self._accounts.setdefault(owner, _Account())
        account.tokens.add(now, tokens)
        account.used = now
        self._accounts.move_to_end(owner)

    def _leave(self, owner: str, entered: int) -> None:
        now = self._now()
        self.inside -= 1
        account = self._accounts[owner]
        account.open, account.used = account.open - 1, now
        self._accounts.move_to_end(owner)
        seconds = (now - entered) / 1e6
        self._stay = seconds if not self._stay else 0.9 * self._stay + 0.1 * seconds

    def _forget(self, now: int) -> None:
        """Drop who has not been here for a minute; two at most, as only one can come with each request."""
        for owner in list(itertools.islice(self._accounts, 2)):
            account = self._accounts[owner]
            if account.used + MINUTE > now:
                return  # all others were used later
            if account.open:
                account.used = now
                self._accounts.move_to_end(owner)
            else:
                del self._accounts[owner]

    def _now(self) -> int:
        return round(self._clock() * 1e6)


class Lease:
    """A request's place in the house; a context manager, to be closed once the answer is over."""

    def __init__(self, gate: Gate, owner: str, entered: int) -> None:
        self._gate, self._owner, self._entered = gate, owner, entered
        self._closed = False

    def spend(self, tokens: int) -> None:
        """Count tokens of the answer; the limit holds for who comes next, the answer itself goes on."""
        self._gate._spend(self._owner, tokens)

    def close(self) -> None:
        """Give the place back; a second time does nothing."""
        if not self._closed:
            self._closed = True
            self._gate._leave(self._owner, self._entered)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _number(value: float, thing: str) -> str:
    return f"{value} {thing}{'' if value == 1 else 's'}"
