"""Keys and what they may do; models by name, loaded and unloaded within a limit; who may ask at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from checks import Json, price_of, until, user
from conftest import script
from scripted import ScriptedModel, loader, scripted_model
from serving import Running, running

from tael.errors import TaelError
from tael.serve.limits import KeyLimits
from tael.serve.running import open_service
from tael.serve.settings import ModelSpec, ServeSettings
from tael.serve.store import FILE, Store

LONG = "Please say hello, and be so kind to say it politely. " * 4


@pytest.fixture
def many(tmp_path: Path) -> Iterator[Running]:
    """Three models, of which two fit the memory."""
    models = {name: scripted_model(script, context=1024) for name in ("a", "b", "c")}
    how = {"context": 256, "sequences": 1, "preload": False}  # a cache whose size does not depend on the limit
    specs = [ModelSpec(name=name, model=name, aliases=(f"{name}-also",), **how) for name in models]
    size = 0
    with running(tmp_path / "sized", specs[:1], loader(models)) as one:
        with httpx.Client(base_url=one.url, timeout=30) as http:
            ask(http, "a")
        size = one.service.host.loaded()[0].bytes
    with running(tmp_path / "state", specs, loader(models), memory=int(2.5 * size)) as found:
        yield found


def ask(http: httpx.Client, model: str, key: str | None = None, text: str = "Hi", **more: object) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return http.post("/v1/chat/completions", json=user(text, **more) | {"model": model}, headers=headers)


# ------------------------------------------------------------------------ keys


def add(server: Running, name: str, **limits: float) -> str:
    return server.service.store.add_key(name, KeyLimits(**limits))[1]  # type: ignore[arg-type]


def test_unknown_and_revoked_keys(server: Running, http: httpx.Client) -> None:
    secret = add(server, "eve")
    assert ask(http, "tiny", secret).status_code == 200
    server.service.store.revoke("eve")
    for wrong in (secret, "tael-nobody"):
        answer = ask(http, "tiny", wrong)
        assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
    answer = http.post("/v1/messages", json=user("Hi", max_tokens=5), headers={"x-api-key": secret})
    assert answer.status_code == 401 and answer.json()["type"] == "error"
    assert ask(http, "tiny", "sk-whatever").status_code == 200  # clients insist on sending something


def test_a_budget_is_spent_to_its_end(server: Running, http: httpx.Client) -> None:
    secret = add(server, "anna", budget_dollars=2e-5)
    headers = {"authorization": f"Bearer {secret}"}
    assert http.get("/user/balance", headers=headers).json()["balance_infos"][0]["total_balance"] == "0.000020"
    spent = 0.0
    while (answer := ask(http, "tiny", secret)).status_code == 200:
        usage = answer.json()["usage"]
        assert usage["cost"] == pytest.approx(price_of(usage))
        spent += usage["cost"]
    assert answer.status_code == 402 and "Insufficient Balance" in answer.json()["error"]["message"]
    assert spent >= 2e-5
    balance = http.get("/user/balance", headers=headers).json()
    assert balance["is_available"] is False and balance["balance_infos"][0]["total_balance"] == "0.000000"
    total = http.get("/user/usage", headers=headers).json()
    assert total["dollars"] == pytest.approx(spent) and total["key"] == "anna"


def test_limits_a_minute_say_when_to_come_back(server: Running, http: httpx.Client) -> None:
    secret = add(server, "bob", requests_per_minute=1)
    assert ask(http, "tiny", secret).status_code == 200
    answer = ask(http, "tiny", secret)
    assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 60
    few = add(server, "carl", tokens_per_minute=5)
    assert ask(http, "tiny", few, LONG).status_code == 429


def test_keys_do_not_share_a_prefix(server: Running, http: httpx.Client) -> None:
    one, other = add(server, "dora"), add(server, "emil")

    def hits(key: str) -> int:
        return ask(http, "tiny", key, LONG).json()["usage"]["prompt_cache_hit_tokens"]

    assert hits(one) == 0 and hits(one) > 0
    assert hits(other) == 0 and hits(other) > 0


def test_shared_prefixes_where_that_is_wanted(model: ScriptedModel, tmp_path: Path) -> None:
    specs = [ModelSpec(name="tiny", model="m", context=1024)]
    with (
        running(tmp_path, specs, loader({"m": model}), share_prefixes=True) as shared,
        httpx.Client(base_url=shared.url, timeout=30) as http,
    ):
        one, other = add(shared, "one"), add(shared, "other")
        assert ask(http, "tiny", one, LONG).json()["usage"]["prompt_cache_hit_tokens"] == 0
        assert ask(http, "tiny", other, LONG).json()["usage"]["prompt_cache_hit_tokens"] > 0


def test_nobody_elsewhere_without_a_key(tmp_path: Path) -> None:
    settings = ServeSettings(host="0.0.0.0", state=tmp_path)
    with pytest.raises(TaelError, match="tael keys add"):
        open_service(settings)
    store = Store(tmp_path / FILE)
    store.add_key("anna")
    store.close()
    service = open_service(settings)
    assert service.keys_required and service.authenticate(None) is None and service.authenticate("x") is None
    service.worker.close()
    service.store.close()


# ---------------------------------------------------------------------- models


def test_models_come_and_go_within_the_memory(many: Running) -> None:
    with httpx.Client(base_url=many.url, timeout=30) as http:

        def loaded() -> list[str]:
            return [card["id"] for card in http.get("/v1/models").json()["data"] if card["loaded"]]

        assert ask(http, "a").status_code == ask(http, "b-also").status_code == 200
        assert loaded() == ["a", "b"]
        assert ask(http, "c").status_code == 200
        assert loaded() == ["b", "c"]  # a was idle for the longest time
        assert http.post("/v1/models/unload", json={"model": "c-also"}).json()["loaded"] is False
        assert http.post("/v1/models/load", json={"model": "a"}).json()["loaded"] is True
        assert loaded() == ["a", "b"]
        assert http.get("/v1/models/b-also").json()["id"] == "b"


def test_a_model_that_answers_is_not_unloaded(many: Running) -> None:
    with httpx.Client(base_url=many.url, timeout=30) as http:
        assert ask(http, "a").status_code == ask(http, "b").status_code == 200
        for hosted in many.service.host.loaded():
            hosted.users += 1
        answer = ask(http, "c")
        assert answer.status_code == 503 and "memory" in answer.json()["error"]["message"]
        assert "retry-after" in answer.headers
        assert http.post("/v1/models/unload", json={"model": "a"}).status_code == 409
        for hosted in many.service.host.loaded():
            hosted.users -= 1
        assert ask(http, "c").status_code == 200


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    def broken(spec: ModelSpec, notify: object) -> ScriptedModel:
        if spec.name == "gone":
            raise TaelError("no such model folder")
        return scripted_model(script, context=256)

    specs = [ModelSpec(name=name, model=name, context=256) for name in ("gone", "there")]
    with (
        running(tmp_path, specs, broken) as server,  # type: ignore[arg-type]
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        answer = ask(http, "gone")
        assert answer.status_code == 503 and "no such model folder" in answer.json()["error"]["message"]
        until(lambda: [each.spec.name for each in server.service.host.loaded()] == ["there"])  # nobody asked for it
        ready = http.get("/ready")
        assert ready.status_code == 503 and "gone" in ready.json()["status"]
        assert http.get("/health").status_code == 200


# ----------------------------------------------------------------------- guard


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "evil.example"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_web_pages_elsewhere_may_not_ask(http: httpx.Client, headers: Json, status: int) -> None:
    assert http.get("/v1/models", headers=headers).status_code == status
    assert http.post("/v1/chat/completions", json=user("Hi"), headers=headers).status_code == status


def test_health_metrics_and_unknown_paths(server: Running, http: httpx.Client) -> None:
    assert http.get("/health").json()["status"] == "ok"
    assert http.get("/ready").status_code == 200
    before = counter(http, 'tael_requests_total{endpoint="chat",status="200"}')
    assert ask(http, "tiny").status_code == 200
    until(lambda: counter(http, 'tael_requests_total{endpoint="chat",status="200"}') == before + 1)
    assert counter(http, 'tael_cache_blocks{model="tiny"}') > 0
    for path in ("/v1/nothing", "/anthropic/v1/nothing"):
        answer = http.post(path, json={})
        assert answer.status_code == 404 and "nothing at" in answer.text
    assert http.get("/v1/chat/completions").status_code in (404, 405)


def counter(http: httpx.Client, name: str) -> float:
    text = http.get("/metrics").text
    return next((float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name)), 0.0)


# --------------------------------------------------------------------- command


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tael", "serve", *arguments, "--state", str(tmp_path / "state")]
        environment = os.environ | {"TAEL_CACHE": str(tmp_path / "cache")}  # nothing was pulled
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, env=environment)

    (tmp_path / "serve.toml").write_text('[[models]]\nname = "x"\nmodel = "nothing"\n')
    for arguments, words in (
        (("x=nothing", "--host", "0.0.0.0", "--port", "0"), "tael keys add"),
        (("x=nothing", "--price", "cheap"), "HIT/MISS/OUTPUT"),
        (("x=nothing", "--thinking", "maybe"), "thinking"),
        (("--config", "missing.toml"), "missing.toml"),
        (("--config", "serve.toml", "--quantize", "int4"), "--quantize: with --config"),
        (("--port", "0"), "no model to serve"),
    ):
        done = run(*arguments)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
