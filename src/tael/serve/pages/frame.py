"""What every page has around it: the line at the top, the theme, the styles, and rules for the browser.

with frame("Runs", "/runs"):
    ...                                the page's content
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastapi.staticfiles import StaticFiles
from markupsafe import Markup
from nicegui import app, ui

from tael.errors import TaelError
from tael.serve.errors import ApiError
from tael.serve.pages.widgets import html, icon_button, text

STATIC = Path(__file__).with_name("static")
PAGES = (("/", "Chat"), ("/compare", "Compare"), ("/runs", "Runs"), ("/plan", "Plan"))
SHORTCUTS = (
    ("Enter", "send"),
    ("Shift + Enter", "new line"),
    ("Esc", "stop the answer, close what is open"),
    ("Ctrl + K", "search conversations"),
    ("Ctrl + Shift + O", "new chat"),
    ("Ctrl + Enter", "send an edited question"),
    ("?", "these shortcuts"),
)
# The browser itself then refuses whatever would ask another host, wherever it came from. NiceGUI (Vue) builds its
# templates in the browser and needs inline and evaluated scripts.
_RULES = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'"
)


@contextmanager
def frame(title: str, current: str, name: str = "", plain: bool = True) -> Iterator[None]:
    """The page `title`, its content inside; `current` is its address in the line at the top.

    `name` is the key's name where keys are required. `plain` gives the content margins and lets it scroll; a page
    that lays itself out takes the whole room, and may fill the column at its left (the element `side`).
    """
    _head(title)
    with ui.element("div").classes("app"):
        with ui.element("header").classes("top").props("role=banner"):
            html('<a class="skip" href="#main">Skip to the content</a>', tag="span")
            if not plain:
                toggle = icon_button("Conversations", "menu")
                toggle.props.update({"data-do": "sidebar", "aria-controls": "side"})
            _navigation(current)
            _tools(name)
        if plain:
            main = ui.element("main").classes("main plain").props('id="main" tabindex="-1"')
            with main, ui.element("div").classes("page"):
                yield
        else:
            yield


@contextmanager
def bare(title: str) -> Iterator[None]:
    """A page with nothing around it."""
    _head(title)
    with ui.element("main").classes("bare").props('id="main"'):
        yield


def _tell(failure: Exception) -> None:
    """What went wrong in answer to a click, in one line (the server's log has the rest)."""
    known = isinstance(failure, TaelError | ApiError)
    words = str(failure) if known else "Something went wrong inside the server; its log says what."
    ui.notify(words, type="negative", timeout=8000)


def _head(title: str) -> None:
    ui.on_exception(_tell)
    ui.dark_mode({"dark": True, "light": False}.get(_theme()))
    outer = ui.context.client.content.parent_slot
    if outer is not None:
        # Quasar's page calls itself <main>, but the line at the top is in it.
        outer.parent.props["role"] = "presentation"
    ui.page_title(f"{title} · Tael" if title else "Tael")
    version = _version()
    ui.add_head_html(
        f'<meta http-equiv="Content-Security-Policy" content="{_RULES}">'
        '<meta name="referrer" content="no-referrer">'
        f'<script src="/static/tael/tael.js?{version}"></script>'
        f'<link rel="stylesheet" href="/static/tael/tael.css?{version}">'
    )


def _version() -> str:
    """Changes with the files, so that no browser shows old ones."""
    return hashlib.sha256(b"".join((STATIC / name).read_bytes() for name in ("tael.js", "tael.css"))).hexdigest()[:12]


def _theme() -> str:
    request = ui.context.client.request
    return request.cookies.get("tael-theme", "auto")


def _navigation(current: str) -> None:
    html('<a class="brand" href="/">Tael</a>', tag="span")
    links = Markup("").join(
        Markup('<a href="{}"{}>{}</a>').format(path, Markup(' aria-current="page"') if path == current else "", words)
        for path, words in PAGES
    )
    html(links, tag="nav").props["aria-label"] = "Pages"


def _tools(name: str) -> None:
    if name:
        leave = icon_button(f"Forget the key {name} in this browser", "leave")
        leave.on("click", js_handler="() => document.getElementById('leave').submit()")
        html('<form id="leave" method="post" action="/logout"></form>', tag="span")
    theme = icon_button("Change the theme (as the system, dark, light)", "theme")
    theme.props["data-do"] = "theme"
    help = _shortcuts()
    icon_button("Keyboard shortcuts", "keys", help.open).props["data-shortcut"] = "shortcuts"


def _shortcuts() -> ui.dialog:
    with ui.dialog() as dialog, ui.element("div").classes("sheet"):
        text("Keyboard shortcuts", "h2")
        rows = Markup("").join(Markup("<dt><kbd>{}</kbd></dt><dd>{}</dd>").format(*pair) for pair in SHORTCUTS)
        html(rows, tag="dl")
    return dialog


def serve_static() -> None:
    """Make the files of `static` known to NiceGUI's app; once."""
    app.mount("/static/tael", StaticFiles(directory=STATIC), name="tael-static")
