"""Who is at the page: a key, asked for once, kept in the browser's signed session cookie (the server keeps none)."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from fastapi import Form, Request
from fastapi.responses import RedirectResponse
from nicegui import app, ui
from starlette.responses import Response

from tael.errors import TaelError
from tael.serve.caller import LOCAL, Caller
from tael.serve.pages.frame import bare
from tael.serve.pages.widgets import html

Authenticate = Callable[[str], Caller | None]
_FORM = """<form method="post" action="/login" class="sheet">
<h1>Tael</h1>{problem}
<div class="field"><label for="key">Key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus spellcheck="false">
<small>You get one from whoever runs this server (tael keys add NAME).</small></div>
<div class="buttons"><button class="main-button">Enter</button></div></form>"""
_PROBLEM = '<p class="problem" role="alert">That is no valid key here.</p>'


def storage_secret(state: Path) -> str:
    """What cookies are signed with: made once, readable by the owner alone. Raises TaelError."""
    path = state / "cookie-secret"
    try:
        state.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            kept = path.read_text(encoding="ascii").strip()
            if len(kept) < 32:
                raise TaelError(f"{path}: damaged; remove it, and everyone logs in again") from None
            return kept
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            secret = secrets.token_urlsafe(48)
            file.write(secret)
        return secret
    except (OSError, UnicodeDecodeError) as error:
        raise TaelError(f"{path}: {error}") from None


def caller_of(request: Request, authenticate: Authenticate, keys_required: bool) -> Caller | None:
    """Who asks for a page; None: a key is needed. Read at every page, so a revoked key ends."""
    key = request.session.get("key")
    found = authenticate(key) if isinstance(key, str) and key else None
    return found if found or keys_required else LOCAL


def add_login(authenticate: Authenticate) -> None:
    """The page /login, and what its form and /logout are sent to (NiceGUI's app: it knows the session)."""

    @ui.page("/login")
    def login(failed: str = "") -> None:
        with bare("Enter"):
            html(_FORM.replace("{problem}", _PROBLEM if failed else ""), "login")

    @app.post("/login", include_in_schema=False)
    def enter(request: Request, key: str = Form(default="", max_length=400)) -> Response:
        if authenticate(key.strip()) is None:
            return RedirectResponse("/login?failed=1", 303)
        request.session["key"] = key.strip()
        return RedirectResponse("/", 303)

    @app.post("/logout", include_in_schema=False)
    def leave(request: Request) -> Response:
        request.session.pop("key", None)
        return RedirectResponse("/login", 303)
