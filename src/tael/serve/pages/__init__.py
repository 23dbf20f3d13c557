"""The pages for people: chat, side by side, runs, plan, and the login where keys are required.

    add_pages(app, service, history, answering, runbook, authenticate, keys_required, state)

NiceGUI builds them, inside the same FastAPI app as the API; no page asks another host for anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse
from nicegui import app as pages_app
from nicegui import ui
from starlette.responses import Response

from tael.errors import TaelError
from tael.serve.caller import Caller
from tael.serve.history import History
from tael.serve.pages.answering import Answering, ChatService
from tael.serve.pages.chat import ChatPage
from tael.serve.pages.frame import frame, serve_static
from tael.serve.pages.login import Authenticate, add_login, caller_of, storage_secret

SESSION_DAYS = 30


def add_pages(
    app: FastAPI,
    service: ChatService,
    history: History,
    answering: Answering,
    runbook: Any,
    authenticate: Authenticate,
    keys_required: bool,
    state: Path,
) -> None:
    """Register the pages with `app`, last of all routes (NiceGUI takes whatever no other route takes).

    Answers that an earlier process left running are marked interrupted; those that run when this one ends, too.
    Raises TaelError when `state` cannot be written.
    """
    secret = storage_secret(state)
    pages_app.storage.path = state / "browsers"
    history.recover()
    pages_app.on_shutdown(answering.close)
    serve_static()
    add_login(authenticate)
    who = _Who(authenticate, keys_required)
    _add_chat(service, history, answering, who)
    _add_others(service, history, runbook, who)
    ui.run_with(
        app,
        title="Tael",
        dark=None,
        tailwind=False,
        storage_secret=secret,
        session_middleware_kwargs={"max_age": SESSION_DAYS * 86400, "same_site": "lax"},
        show_welcome_message=False,
        reconnect_timeout=30.0,
    )


class _Who:
    """Finds who asks for a page."""

    def __init__(self, authenticate: Authenticate, keys_required: bool):
        self._authenticate = authenticate
        self._required = keys_required

    def asks(self, request: Request) -> Caller | None:
        return caller_of(request, self._authenticate, self._required)

    def name(self, caller: Caller) -> str:
        """What the page shows of the caller: nothing where no keys are required."""
        return "" if caller.key_id is None else caller.name


def _add_chat(service: ChatService, history: History, answering: Answering, who: _Who) -> None:
    def show(request: Request, conversation: int | None) -> Response | None:
        caller = who.asks(request)
        if caller is None:
            return RedirectResponse("/login", 303)
        try:
            head = history.head(caller.owner, conversation) if conversation is not None else None
        except TaelError:
            return RedirectResponse("/", 303)
        with frame(head.title if head else "", "/", who.name(caller), plain=False):
            ChatPage(service, history, answering, caller, lambda: who.asks(request) == caller, conversation)
        return None

    @ui.page("/")
    def new(request: Request) -> Response | None:
        return show(request, None)

    @ui.page("/c/{conversation}")
    def kept(request: Request, conversation: int) -> Response | None:
        return show(request, conversation)


def _add_others(service: ChatService, history: History, runbook: Any, who: _Who) -> None:
    @contextmanager
    def page(title: str, path: str, caller: Caller) -> Iterator[None]:
        with frame(title, path, who.name(caller)):
            yield

    def shown(request: Request, title: str, path: str, build: Callable[[Caller], None]) -> Response | None:
        caller = who.asks(request)
        if caller is None:
            return RedirectResponse("/login", 303)
        with page(title, path, caller):
            build(caller)
        return None

    @ui.page("/compare")
    def compare(request: Request) -> Response | None:
        from tael.serve.pages.compare import compare_page

        return shown(request, "Compare", "/compare", lambda caller: compare_page(service, history, caller))

    @ui.page("/runs")
    def runs(request: Request) -> Response | None:
        from tael.serve.pages.runs import runs_page

        return shown(request, "Runs", "/runs", lambda caller: runs_page(runbook, caller))

    from tael.serve.pages.runs import add_reports

    add_reports(runbook, who.asks)

    @ui.page("/plan")
    def plan(request: Request) -> Response | None:
        from tael.serve.pages.plan import plan_page

        return shown(request, "Plan", "/plan", lambda caller: plan_page())
