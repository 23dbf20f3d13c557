"""The gate: no minute holds more than its limit, Retry-After is the moment, nothing is kept for ever."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tael.errors import TaelError
from tael.serve.caller import LOCAL, Caller
from tael.serve.errors import ApiError
from tael.serve.limits import Gate, KeyLimits

ANNA, BERT = Caller(1, "anna"), Caller(2, "bert")
FREE = KeyLimits()
GRAIN = 60 / 1024


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(clock: Clock) -> Gate:
    return Gate(100, clock=clock)


def refused(gate: Gate, caller: Caller, limits: KeyLimits, tokens: int = 1) -> ApiError:
    with pytest.raises(ApiError) as caught:
        gate.enter(caller, limits, tokens)
    assert caught.value.status == 429
    return caught.value


def test_requests_a_minute(gate: Gate, clock: Clock) -> None:
    limits = KeyLimits(requests_per_minute=2)
    gate.enter(ANNA, limits, 1).close()
    clock.now += 10
    gate.enter(ANNA, limits, 1).close()
    error = refused(gate, ANNA, limits)
    assert error.retry_after == 50 and error.code == "rate_limit_exceeded"
    assert error.message == "this key may send 2 requests a minute; try again in 50 s"
    gate.enter(BERT, limits, 1).close()  # another key has a minute of its own
    clock.now += 49.999
    assert refused(gate, ANNA, limits).retry_after == pytest.approx(0.001)
    clock.now += 0.001
    gate.enter(ANNA, limits, 1).close()
    assert refused(gate, ANNA, limits).retry_after == pytest.approx(10)


def test_tokens_a_minute_count_prompts_and_answers(gate: Gate, clock: Clock) -> None:
    limits = KeyLimits(tokens_per_minute=100)
    lease = gate.enter(ANNA, limits, 60)
    clock.now += 5
    lease.spend(30)
    gate.enter(ANNA, limits, 10).close()
    assert refused(gate, ANNA, limits, 1).retry_after == 55
    assert refused(gate, ANNA, limits, 60).retry_after == 55
    assert refused(gate, ANNA, limits, 61).retry_after == 60
    lease.spend(500)  # an answer that runs goes on, whatever the limit
    assert refused(gate, ANNA, limits, 1).retry_after == 60
    lease.close()
    lease.spend(7)
    clock.now += 60
    gate.enter(ANNA, limits, 100).close()


def test_a_prompt_above_the_limit_need_not_try_again(gate: Gate) -> None:
    error = refused(gate, ANNA, KeyLimits(tokens_per_minute=100), 101)
    assert error.retry_after is None and "101 tokens" in error.message
    assert gate.inside == 0


def test_the_longer_of_two_waits_is_told(gate: Gate, clock: Clock) -> None:
    limits = KeyLimits(requests_per_minute=2, tokens_per_minute=100)
    gate.enter(ANNA, limits, 10).close()
    clock.now += 20
    gate.enter(ANNA, limits, 85).close()
    assert refused(gate, ANNA, limits, 5).retry_after == 40
    assert refused(gate, ANNA, limits, 50).retry_after == 60


def test_requests_at_once(gate: Gate) -> None:
    limits = KeyLimits(concurrent=1)
    with gate.enter(ANNA, limits, 1) as lease:
        error = refused(gate, ANNA, limits)
        assert error.message == "this key may have 1 request running at once" and error.retry_after
        gate.enter(BERT, limits, 1).close()
    lease.close()  # a second time
    assert gate.inside == 0
    gate.enter(ANNA, limits, 1)
    refused(gate, ANNA, limits)


@pytest.mark.parametrize(("queue", "running", "places"), [(3, None, 3), (1, 2, 3), (0, 3, 3)])
def test_the_house_is_full(clock: Clock, queue: int, running: int | None, places: int) -> None:
    gate = Gate(queue, running, clock)
    leases = [gate.enter(caller, FREE, 1) for caller in (LOCAL, ANNA, BERT)]
    assert gate.inside == gate.places == places
    assert refused(gate, LOCAL, FREE).code == "queue_full"
    clock.now += 30
    leases[0].close()
    leases[0].close()
    gate.enter(LOCAL, FREE, 1)
    assert refused(gate, LOCAL, FREE).retry_after == 10  # requests stay 30 s, in 3 places


def test_what_is_turned_away_counts_nowhere(clock: Clock) -> None:
    gate = Gate(1, clock=clock)
    limits = KeyLimits(requests_per_minute=2, tokens_per_minute=10)
    lease = gate.enter(LOCAL, FREE, 1)
    for _ in range(5):
        refused(gate, ANNA, limits, 10)
    lease.close()
    gate.enter(ANNA, limits, 4).close()
    for _ in range(5):
        refused(gate, ANNA, limits, 7)
    gate.enter(ANNA, limits, 6).close()


def test_a_lease_is_closed_by_what_goes_wrong_inside(gate: Gate) -> None:
    with pytest.raises(ZeroDivisionError), gate.enter(ANNA, FREE, 1):
        raise ZeroDivisionError
    assert gate.inside == 0


def test_limits_may_change_in_between(gate: Gate) -> None:
    gate.enter(ANNA, KeyLimits(requests_per_minute=5), 1).close()
    gate.enter(ANNA, FREE, 1).close()
    refused(gate, ANNA, KeyLimits(requests_per_minute=1))
    gate.enter(ANNA, KeyLimits(requests_per_minute=3), 1).close()


def test_callers_and_tokens_that_are_over_take_no_memory(gate: Gate, clock: Clock) -> None:
    stays = gate.enter(LOCAL, FREE, 1)
    for number in range(2000):
        gate.enter(Caller(number, "passes by"), FREE, 1).close()
        clock.now += 1
    assert len(gate._accounts) < 130  # of the last minute, and LOCAL
    refused(gate, LOCAL, KeyLimits(concurrent=1))  # still known to be inside
    for _ in range(20_000):
        stays.spend(1)
        clock.now += 0.001
    assert len(gate._accounts["local"].tokens._slots) < 1100
    stays.close()
    assert gate.inside == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"requests_per_minute": 0},
        {"tokens_per_minute": -1},
        {"concurrent": 1.5},
        {"concurrent": float("nan")},
        {"requests_per_minute": float("inf")},
        {"budget_dollars": -0.01},
        {"budget_dollars": float("nan")},
        {"budget_dollars": float("inf")},
    ],
)
def test_limits_that_are_none(wrong: dict[str, float]) -> None:
    with pytest.raises(TaelError, match=next(iter(wrong)).split("_")[0]):
        KeyLimits(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("places", [(0, None), (-1, None), (0, 0), (-1, 5)])
def test_a_house_without_room(places: tuple[int, int | None]) -> None:
    with pytest.raises(TaelError, match="lets nobody in"):
        Gate(*places)


def exact_wait(log: list[tuple[int, int]], now: int, amount: int, limit: int) -> int:
    """Milliseconds until `amount` fits, tried at every moment at which something leaves the last minute."""
    for moment in sorted({now, *(t + 60_000 for t, _ in log if t + 60_000 > now)}):
        if sum(n for t, n in log if moment - 60_000 < t <= moment) + amount <= limit:
            return moment - now
    raise AssertionError("nothing fits")


EVENTS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 40), st.integers(0, 30)), max_size=40)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(EVENTS, st.integers(1, 6), st.integers(40, 120), st.sampled_from([1, 7, 100]))
def test_no_minute_holds_more_and_retry_after_is_the_moment(
    events: list[tuple[int, int, int]], most: int, limit: int, unit: int
) -> None:
    """Against a plain log of all that came; waits are exact to a slot, and altogether where events lie apart."""
    clock = Clock(0.0)
    gate = Gate(10, clock=clock)
    limits = KeyLimits(requests_per_minute=most, tokens_per_minute=limit)
    requests: list[tuple[int, int]] = []
    tokens: list[tuple[int, int]] = []
    now = 0
    for gap, prompt, answer in events:
        now += gap * unit
        clock.now = now / 1000
        exact = max(exact_wait(requests, now, 1, most), exact_wait(tokens, now, prompt, limit))
        try:
            lease = gate.enter(ANNA, limits, prompt)
        except ApiError as error:
            wait = error.retry_after
            assert wait is not None and exact / 1000 <= wait < exact / 1000 + GRAIN
            assert unit < 100 or wait == exact / 1000
            clock.now += wait - 1e-5
            assert refused(gate, ANNA, limits, prompt)
            clock.now += 1e-5
            now = -int(-clock.now * 1000 // 1)  # the log's next millisecond
            clock.now = max(clock.now, now / 1000)
            lease = gate.enter(ANNA, limits, prompt)
        else:
            assert exact == 0
        requests.append((now, 1))
        tokens.append((now, prompt))
        assert sum(n for t, n in requests if now - 60_000 < t) <= most
        assert sum(n for t, n in tokens if now - 60_000 < t) <= limit
        lease.spend(answer)
        tokens.append((now, answer))
        lease.close()
