"""The column at the left: conversations by folder, search, and what can be done with one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from markupsafe import Markup
from nicegui import run, ui

from tael.errors import TaelError
from tael.serve.history import Head, History, read_export, to_json, to_markdown
from tael.serve.pages.icons import icon
from tael.serve.pages.widgets import button, html, text, text_field

MAX_LISTED = 300
_CLICKED = """(e) => {
  const found = e.target.closest('[data-open], [data-more]');
  if (!found || e.ctrlKey || e.metaKey || e.shiftKey || e.button) return;
  e.preventDefault();
  emit(found.dataset.more ? 'more' : 'open', Number(found.dataset.more || found.dataset.open));
}"""


class Room(Protocol):
    """What the sidebar needs of the page."""

    head: Head | None

    def open(self, conversation: int) -> None: ...

    def new(self) -> None: ...

    def renamed(self, head: Head) -> None: ...

    def deleted(self, conversation: int) -> None: ...

    def runs(self, conversation: int) -> bool: ...


class Sidebar:
    """Builds itself where it is made."""

    def __init__(self, room: Room, history: History, owner: str):
        self._room = room
        self._history = history
        self._owner = owner
        self._search = ""
        with ui.element("aside").classes("side").props('id="side" aria-label="Conversations"'):
            self._top()
            self._list = html("", "side-list", "nav")
            self._list.props["aria-label"] = "Conversations"
            self._list.on("click", self._clicked, js_handler=_CLICKED)
            self._foot()
        backdrop = ui.element("div").classes("backdrop")
        backdrop.props["data-do"] = "close-sidebar"
        self._sheet = ui.dialog()
        self.refresh()

    def refresh(self) -> None:
        """Read the conversations again."""
        heads = self._history.heads(self._owner, search=self._search)
        content = list_of(heads, self._room.head, self._room.runs, self._search)
        if content != self._list.content:
            self._list.set_content(content)

    def _top(self) -> None:
        with ui.element("div").classes("side-top"):
            new = button("New chat", self._room.new, picture="plus")
            new.props.update({"data-shortcut": "new", "data-closes": True})
            search = ui.element("input")
            search.props.update(
                {
                    "type": "search",
                    "placeholder": "Search",
                    "aria-label": "Search conversations",
                    "data-shortcut": "search",
                    "maxlength": 200,
                }
            )
            search.on("input", self._searched, js_handler="(e) => emit(e.target.value)", throttle=0.2)

    def _foot(self) -> None:
        with ui.element("div").classes("side-foot"):
            upload = ui.upload(on_upload=self._import, auto_upload=True, multiple=True, max_file_size=50_000_000)
            upload.classes("hidden").props('accept=".json,.md,.markdown,.txt"')
            upload.on("rejected", lambda: ui.notify("That file is larger than 50 MB, or no JSON or Markdown."))
            bring = button("Import", None, "quiet", "in")
            bring.props["title"] = "Conversations from JSON or Markdown, also ChatGPT's"
            bring.on("click", js_handler=f"() => getElement({upload.id}).$refs.qRef.pickFiles()")
            button("Export all", self._export_all, "quiet", "out")

    def _searched(self, event: Any) -> None:
        self._search = str(event.args or "")[:200]
        self.refresh()

    def _clicked(self, event: Any) -> None:
        what, conversation = event.args if isinstance(event.args, list) and len(event.args) == 2 else ("", 0)
        try:
            if what == "open":
                self._room.open(int(conversation))
            elif what == "more":
                self._more(self._history.head(self._owner, int(conversation)))
        except (TaelError, ValueError, TypeError) as error:
            ui.notify(str(error), type="negative")

    def _more(self, head: Head) -> None:
        self._sheet.clear()
        with self._sheet, ui.element("div").classes("sheet"):
            text("Conversation", "h2")
            title = text_field("Title", head.title, maxlength=200)
            folder = text_field("Folder", head.folder, "Empty: in none.", list="folders", maxlength=80)
            options = Markup("").join(
                Markup('<option value="{}"></option>').format(name) for name in self._history.folders(self._owner)
            )
            html(options, tag="datalist").props["id"] = "folders"
            with ui.element("div").classes("buttons"):
                button("Export as Markdown", lambda: self._export(head, "md"), picture="out")
                button("Export as JSON", lambda: self._export(head, "json"), picture="out")
            with ui.element("div").classes("buttons"):
                button("Delete", lambda: self._ask_delete(head), "plain danger left")
                button("Cancel", self._sheet.close)
                button("Save", lambda: self._save(head, title.value, folder.value), "main-button")
        self._sheet.open()

    def _save(self, head: Head, title: str, folder: str) -> None:
        title, folder = " ".join(title.split())[:200], " ".join(folder.split())[:80]
        self._room.renamed(self._history.change(self._owner, head.id, title=title or head.title, folder=folder))
        self._sheet.close()
        self.refresh()

    def _ask_delete(self, head: Head) -> None:
        self._sheet.clear()
        with self._sheet, ui.element("div").classes("sheet").props('role="alertdialog"'):
            text("Delete this conversation?", "h2")
            text(f"“{head.title or 'Untitled'}” and all its branches will be gone for good.")
            with ui.element("div").classes("buttons"):
                button("Keep it", self._sheet.close)
                button("Delete for good", lambda: self._delete(head), "main-button")

    def _delete(self, head: Head) -> None:
        self._sheet.close()
        self._room.deleted(head.id)
        self.refresh()

    def _export(self, head: Head, kind: str) -> None:
        nodes = self._history.nodes(self._owner, head.id)
        content = to_markdown(head, nodes) if kind == "md" else to_json([head], nodes)
        ui.download.content(content.encode("utf-8", "replace"), f"{file_name(head.title)}.{kind}")

    def _export_all(self) -> None:
        heads = self._history.heads(self._owner)
        nodes = [node for head in heads for node in self._history.nodes(self._owner, head.id)]
        day = datetime.now(UTC).date().isoformat()
        ui.download.content(to_json(heads, nodes).encode("utf-8", "replace"), f"tael-conversations-{day}.json")

    async def _import(self, event: Any) -> None:
        try:
            trees = await run.io_bound(read_export, await event.file.read())
            heads = await run.io_bound(self._history.insert, self._owner, trees or []) or []
        except TaelError as error:
            ui.notify(f"{event.file.name}: {error}", type="negative", timeout=8000)
            return
        self.refresh()
        ui.notify(f"{len(heads)} conversation{'' if len(heads) == 1 else 's'} imported", type="positive")
        if len(heads) == 1:
            self._room.open(heads[0].id)


def list_of(heads: Sequence[Head], current: Head | None, runs: Callable[[int], bool], search: str) -> str:
    """The conversations as HTML: those in no folder, then folder by folder."""
    if not heads:
        return Markup('<p class="none">{}</p>').format("Nothing found." if search else "No conversations yet.")
    groups: dict[str, list[Head]] = {"": []}
    for head in heads[:MAX_LISTED]:
        groups.setdefault(head.folder, []).append(head)
    parts = []
    for folder in sorted(groups, key=str.casefold):
        rows = Markup("").join(_row(head, current, runs(head.id)) for head in groups[folder])
        if rows:
            parts.append(Markup("<h2>{}</h2><ul>{}</ul>").format(folder or "Recent", rows))
    if len(heads) > MAX_LISTED:
        parts.append(Markup('<p class="none">… and {} more; search finds them.</p>').format(len(heads) - MAX_LISTED))
    return Markup("").join(parts)


def _row(head: Head, current: Head | None, running: bool) -> Markup:
    is_current = current is not None and current.id == head.id
    title = head.title or "Untitled"
    return Markup(
        '<li{0}>{1}<a href="/c/{2}" data-open="{2}" data-closes title="{3}"{4}>{3}</a>'
        '<button type="button" class="icon" data-more="{2}" aria-label="More about {3}" aria-haspopup="dialog">{5}'
        "</button></li>"
    ).format(
        Markup(' class="current"') if is_current else Markup(""),
        Markup('<span class="dot" title="Answering"></span>') if running else Markup(""),
        head.id,
        title,
        Markup(' aria-current="page"') if is_current else Markup(""),
        icon("more"),
    )


def file_name(title: str) -> str:
    """A title as the name of a file."""
    return re.sub(r"[^\w-]+", "-", title).strip("-")[:60] or "conversation"
