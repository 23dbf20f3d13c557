"""What requests cost to serve: the engine's time is shared among them, none is lost, and prices follow the list."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from checks import check_all_free, open_stream, until, user
from conftest import script
from scripted import loader, scripted_model
from serving import Running, running

from tael.serve.settings import ModelSpec
from tael.serve.store import Served

PRICES = """
[[hour]]
name = "box"
from = 2020-01-01
dollars_per_hour = 3600
[[tokens]]
name = "tiny"
from = 2020-01-01
hit = 1
miss = 2
output = 4
[[tariff]]
name = "tiny"
from = 2020-01-01
factor = 0.5
"""


@pytest.fixture
def server(tmp_path: Path):
    (tmp_path / "prices.toml").write_text(PRICES)
    options = {"prices": tmp_path / "prices.toml", "machine": "box", "watts": 10.0}
    specs = [ModelSpec(name="tiny", model="tiny", context=1024), ModelSpec(name="other", model="tiny", context=1024)]
    with running(
        tmp_path / "state", specs, loader({"tiny": scripted_model(script, context=1024)}), **options
    ) as found:
        yield found


def chat(server: Running, text: str, **more: object) -> dict:
    with httpx.Client(base_url=server.url, timeout=30) as http:
        answer = http.post("/v1/chat/completions", json=user(text) | {"model": "tiny"} | more)
    assert answer.status_code == 200, answer.text
    return answer.json()


def rows(server: Running) -> list[Served]:
    """What is on record, all of it."""
    check_all_free(server)
    names = ", ".join(Served.model_fields)
    with server.service.store._reader.reading() as connection:
        found = connection.execute(f"SELECT {names} FROM served ORDER BY id").fetchall()
    return [Served(**dict(zip(Served.model_fields, row, strict=True))) for row in found]


def test_the_engines_time_is_shared_among_requests(server: Running) -> None:
    chat(server, "Hi")
    began = time.perf_counter()
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda place: chat(server, f"count {place}"), range(6)))
    passed = time.perf_counter() - began
    found = rows(server)
    assert len(found) == 7
    engine = server.service.host.loaded()[0].engine
    times = [each.engine_seconds or 0.0 for each in found]
    assert all(seconds > 0 for seconds in times) and sum(times[1:]) <= passed  # side by side, yet no second twice
    stats = engine.stats
    assert sum(times) == pytest.approx(stats.prefill_seconds + stats.decode_seconds)
    for each in found:
        assert each.flops and each.machine_dollars == pytest.approx(each.engine_seconds)  # a dollar a second
        assert each.joules == pytest.approx(10 * (each.engine_seconds or 0))


def test_several_choices_are_one_request(server: Running) -> None:
    one = chat(server, "count", seed=1)
    chat(server, "count on", n=3, seed=1)
    first, second = rows(server)
    assert second.completion_tokens >= 2 * one["usage"]["completion_tokens"]
    assert (second.flops or 0) > 1.5 * (first.flops or 0)


def test_who_hangs_up_has_used_what_was_computed(server: Running) -> None:
    with open_stream(server, "/v1/chat/completions", user("count")) as response:
        lines = response.iter_lines()
        for _ in range(8):
            next(lines)
        gate = server.service.host.loaded()[0].engine.pool.runner.gate
        gate.clear()  # the engine stands still, so that the answer cannot end before the server sees the client leave
    try:
        until(lambda: not server.service.visits)
    finally:
        gate.set()
    [found] = until(lambda: rows(server))
    assert found.status == 499 and (found.engine_seconds or 0) > 0 and (found.flops or 0) > 0


def test_tokens_are_priced_by_the_list_and_shown_so(server: Running) -> None:
    usage = chat(server, "Hi")["usage"]
    hit, miss = usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]
    assert usage["cost"] == pytest.approx((hit * 0.5 + miss * 1 + usage["completion_tokens"] * 2) / 1e6)
    other = chat(server, "Hi", model="other")["usage"]
    assert other["cost"] < usage["cost"]  # not in the list: the usual price
    with httpx.Client(base_url=server.url, timeout=30) as http:
        models = {each["id"]: each for each in http.get("/v1/models").json()["data"]}
    assert models["tiny"]["price"] == {"prompt_cache_hit": 0.5, "prompt_cache_miss": 1.0, "completion": 2.0}
    assert models["other"]["price"]["completion"] == 0.42
