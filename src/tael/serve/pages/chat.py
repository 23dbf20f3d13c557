"""The chat page: one conversation, its branches, and the answers that run in it.

The page holds no state of its own that matters: what is said is in the History, what is being said in Answering; it
shows both and may be closed or opened twice at any time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from markupsafe import Markup
from nicegui import ui

from tael.errors import TaelError
from tael.serve.caller import Caller
from tael.serve.history import Head, History, Node, leaf_below, path_to, siblings
from tael.serve.pages.answering import Answering, ChatService
from tael.serve.pages.chat_controls import Gauge, ModelPicker, ThinkingPicker, settings_sheet
from tael.serve.pages.chat_sidebar import Sidebar
from tael.serve.pages.composer import Composer
from tael.serve.pages.transcript import Live, Transcript
from tael.serve.pages.turns import calls, edit_form, foot, question_text, raw_text, turn
from tael.serve.pages.widgets import html, icon_button, text
from tael.serve.pages.wishes import Settings, request_body, title_of

FAST, SLOW = 0.08, 0.3
"""Seconds between looks at what has changed, while an answer runs and else."""
MAX_RESULT = 200_000


class ChatPage:
    """Builds itself where it is made; `conversation` None: a new one. `valid` says that the caller still may."""

    def __init__(
        self,
        service: ChatService,
        history: History,
        answering: Answering,
        caller: Caller,
        valid: Callable[[], bool] = lambda: True,
        conversation: int | None = None,
    ):
        self._service, self._history, self._answering = service, history, answering
        self._caller, self._owner, self._valid = caller, caller.owner, valid
        self.head: Head | None = history.head(self._owner, conversation) if conversation is not None else None
        self._nodes: list[Node] = []
        self._path: list[Node] = []
        self._live: dict[int, Live] = {}
        self._raw: set[int] = set()
        self._seen = 0
        self._system = self.head.system if self.head else ""
        self._settings = Settings.read(self.head.settings) if self.head else Settings()
        self._build()
        self._sync()

    # -------------------------------------------------------------- the page

    def _build(self) -> None:
        self._sidebar = Sidebar(self, self._history, self._owner)
        with ui.element("main").classes("main chat").props('id="main" tabindex="-1"'):
            with ui.element("div").classes("chat-head"):
                self._title = text("", "h1")
                icon_button("Settings of this conversation", "settings", self._edit_settings)
            self._hello = html(_HELLO, "hello")
            self._transcript = Transcript(self._act)
            with ui.element("div").classes("write"):
                self._composer = Composer(self._ask, self._stop)
                with self._composer:
                    self._models = ModelPicker(self._service.models, self._pick_model)
                    self._thinking = ThinkingPicker(lambda: self._settings, self._change_settings)
                    ui.element("span").classes("spring")
                with ui.element("div").classes("below"):
                    html("<kbd>Enter</kbd> sends, <kbd>Shift Enter</kbd> new line", "hint", "span")
                    self._gauge = Gauge()
        self._models.show(self._first_model())
        self._timer = ui.timer(SLOW, self._tick)

    def _sync(self) -> None:
        """Read the conversation again and show what is not yet shown."""
        if self.head is not None:
            self._seen = self._answering.changes(self.head.id)
            self.head = self._history.head(self._owner, self.head.id)
            self._nodes = self._history.nodes(self._owner, self.head.id)
            self._path = path_to(self._nodes, self.head.leaf)
        else:
            self._nodes, self._path = [], []
        self._transcript.show([self._key(node) for node in self._path], lambda i: self._item(self._path[i]))
        self._follow()
        self._show_state()

    def _follow(self) -> None:
        """Attach to the answers that run on this branch, and leave the others."""
        shown = {node.id for node in self._path}
        self._live = {node: live for node, live in self._live.items() if node in shown}
        for node in shown:
            running = self._answering.find(node)
            if running is not None and (node not in self._live or self._live[node].running is not running):
                self._live[node] = Live(running)
        self._timer.interval = FAST if self._live else SLOW

    def _show_state(self) -> None:
        title = self.head.title if self.head else ""
        self._title.set_content(Markup("{}").format(title or "New chat"))
        self._hello.set_visibility(not self._path)
        self._transcript.set_visibility(bool(self._path))
        self._composer.busy(bool(self._live))
        self._thinking.show(self._thinks())
        self._show_gauge()
        self._sidebar.refresh()

    def _show_gauge(self) -> None:
        used = 0
        for live in self._live.values():
            used = live.running.prompt_tokens + live.running.pieces
        if not used:
            answers = [node for node in self._path if node.role == "assistant" and node.figures]
            used = int(answers[-1].figures.get("context_tokens") or 0) if answers else 0
        card = self._card()
        self._gauge.show(used, card.context if card else None)

    def _tick(self) -> None:
        """What is new, some times a second."""
        if self.head is None:
            return
        for node, live in self._live.items():
            operations = live.operations()
            if operations is not None:
                self._transcript.patch(node, operations)
        if self._live:
            self._show_gauge()
        if self._answering.changes(self.head.id) != self._seen:
            try:
                self._finish_ended()
                self._sync()
            except TaelError:  # deleted in another tab
                self.new()

    def _finish_ended(self) -> None:
        """Give answers that have ended what stands under them, in place, so that opened thoughts stay open."""
        ended = [live for live in self._live.values() if live.running.state != "running"]
        for live in ended:
            del self._live[live.running.node]
            old = self._key(next(node for node in self._path if node.id == live.running.node))
            self._nodes = self._history.nodes(self._owner, live.running.conversation)
            self._path = path_to(self._nodes, self._path[-1].id)
            node = next(node for node in self._path if node.id == live.running.node)
            place, places = self._place(node)
            last = node.id == self._path[-1].id
            bottom = {"foot": foot(node, place, places, last), "calls": calls(node.tool_calls, self._results(node))}
            self._transcript.patch(node.id, {"html": bottom, "done": True})
            self._transcript.adopt(old, self._key(node))
            self._transcript.say(f"Answer: {node.content}" if node.state == "done" else f"Answer {node.state}")

    # ------------------------------------------------------------ what is shown

    def _key(self, node: Node) -> str:
        """Two messages with one key look the same."""
        place, places = self._place(node)
        last = bool(self._path) and node.id == self._path[-1].id
        results = [result.id for result in self._results(node)]
        return json.dumps(
            [node.id, node.state, place, places, last, results, len(node.content) * (node.state != "running")]
        )

    def _item(self, node: Node) -> str:
        place, places = self._place(node)
        return turn(node, place, places, node.id == self._path[-1].id, self._results(node))

    def _place(self, node: Node) -> tuple[int, int]:
        others = [other.id for other in siblings(self._nodes, node)]
        return others.index(node.id) + 1, len(others)

    def _results(self, node: Node) -> list[Node]:
        """The tool messages on this branch that answer the calls of `node`."""
        if not node.tool_calls or node.role != "assistant":
            return []
        after = self._path[self._path.index(node) + 1 :]
        found = []
        for other in after:
            if other.role != "tool":
                break
            found.append(other)
        return found

    def _card(self, name: str = "") -> Any | None:
        name = name or self._models.value
        return next((card for card in self._service.models() if name == card.name or name in card.aliases), None)

    def _thinks(self) -> bool | None:
        card = self._card()
        return card.thinks if card else None

    def _first_model(self) -> str:
        cards = self._service.models()
        wanted = self._card(self.head.model) if self.head and self.head.model else None
        loaded = [card for card in cards if card.loaded]
        card = wanted or next(iter(loaded + list(cards)), None)
        return card.name if card else ""

    # ------------------------------------------------------------- conversations

    def open(self, conversation: int) -> None:
        """Show another conversation."""
        self._enter(self._history.head(self._owner, conversation))

    def new(self) -> None:
        """Show an empty page; the conversation is made with its first question."""
        self._enter(None)

    def _enter(self, head: Head | None) -> None:
        self.head, self._live, self._raw = head, {}, set()
        self._system = head.system if head else ""
        self._settings = Settings.read(head.settings) if head else Settings()
        self._models.show(self._first_model())
        self._sync()
        self._address()
        self._composer.run_method("focus")

    def _address(self) -> None:
        path = f"/c/{self.head.id}" if self.head else "/"
        title = f"{self.head.title} · Tael" if self.head and self.head.title else "Tael"
        ui.run_javascript(
            f"document.title = {json.dumps(title)}; "
            f"if (location.pathname !== '{path}') history.pushState(null, '', '{path}')"
        )

    def renamed(self, head: Head) -> None:
        """The sidebar has changed a conversation."""
        if self.head is not None and head.id == self.head.id:
            self.head = head
            self._show_state()

    def deleted(self, conversation: int) -> None:
        """Delete a conversation, with what runs in it."""
        for running in self._answering.of(conversation):
            self._answering.stop(running.node)
        self._history.delete(self._owner, conversation)
        self._answering.changed(conversation)
        if self.head is not None and conversation == self.head.id:
            self.new()

    def runs(self, conversation: int) -> bool:
        """An answer runs in it."""
        return bool(self._answering.of(conversation))

    # ------------------------------------------------------------------ settings

    def _pick_model(self, name: str) -> None:
        self._models.show(name)
        if self.head is not None:
            self.head = self._history.change(self._owner, self.head.id, model=name)
        self._show_state()

    def _change_settings(self, settings: Settings) -> None:
        self._settings = settings
        if self.head is not None:
            kept = settings.model_dump(exclude_defaults=True)
            self.head = self._history.change(self._owner, self.head.id, settings=kept)
        self._thinking.show(self._thinks())

    def _edit_settings(self) -> None:
        def save(system: str, settings: Settings) -> None:
            self._system = system
            if self.head is not None:
                self.head = self._history.change(self._owner, self.head.id, system=system)
            self._change_settings(settings)

        settings_sheet(self._system, self._settings, save)

    # ------------------------------------------------------------ asking, answering

    def _ask(self, question: str) -> None:
        """A question at the end of the branch. Raises TaelError."""
        self._may_start()
        if self.head is None:
            settings = self._settings.model_dump(exclude_defaults=True)
            self.head = self._history.create(
                self._owner, self._models.value, title_of(question), system=self._system, settings=settings
            )
            self._address()
        parent = self._path[-1].id if self._path else None
        self._answer(self._history.add(self._owner, self.head.id, parent, "user", question))

    def _answer(self, node: Node, onto: Node | None = None) -> None:
        """Let the model answer what stands in `node`, or go on with `onto`."""
        begun = onto is not None and (onto.content or onto.reasoning)
        end = onto if onto is not None and begun else node
        path = path_to(self._history.nodes(self._owner, node.conversation), end.id)
        body = request_body(self._models.value, self._thinks(), self._system, self._settings, path)
        running = self._answering.start(self._caller, node.conversation, body, node.id, onto)
        card = self._card()
        if card is not None and not card.loaded:
            running.note = f"loading {card.name}"
        self._sync()
        self._transcript.say("Asked")

    def _may_start(self) -> None:
        if not self._valid():
            raise TaelError("this key is no longer valid; reload the page and enter another")
        if self._live:
            raise TaelError("an answer is still being written: wait for it, or stop it")
        if not self._models.value:
            raise TaelError("no model is served")
        self._settings.functions()  # before anything is kept

    def _stop(self) -> None:
        for node in list(self._live):
            self._answering.stop(node)

    def _act(self, given: Any) -> None:
        """Someone pressed a button of a message; what comes from a browser may be anything."""
        given = given if isinstance(given, dict) else {}
        node = next((node for node in self._path if node.id == given.get("node")), None)
        act = _ACTS.get(str(given.get("act")))
        if node is None or act is None:
            return
        try:
            act(self, node, given)
        except TaelError as error:
            ui.notify(str(error), type="negative")

    def _copy(self, node: Node, _: dict[str, Any]) -> None:
        self._transcript.run_method("copy", node.content)
        ui.notify("Copied", timeout=1200)

    def _show_raw(self, node: Node, _: dict[str, Any]) -> None:
        self._raw ^= {node.id}
        content = raw_text(self._history.node(self._owner, node.id)) if node.id in self._raw else ""
        self._transcript.patch(node.id, {"html": {"raw": content}})

    def _again(self, node: Node, _: dict[str, Any]) -> None:
        self._may_start()
        self._answer(self._before(node))

    def _continue(self, node: Node, _: dict[str, Any]) -> None:
        self._may_start()
        self._answer(self._before(node), onto=self._history.node(self._owner, node.id))

    def _before(self, node: Node) -> Node:
        if node.role != "assistant" or node.parent is None:
            raise TaelError("there is no question before this")
        return self._history.node(self._owner, node.parent)

    def _branch(self, node: Node, given: dict[str, Any]) -> None:
        others = siblings(self._nodes, node)
        place = [other.id for other in others].index(node.id) + (1 if given.get("arg") == "1" else -1)
        if 0 <= place < len(others):
            leaf = leaf_below(self._nodes, others[place])
            self._history.change(self._owner, node.conversation, leaf=leaf.id)
            self._answering.changed(node.conversation)
            self._sync()

    def _edit(self, node: Node, _: dict[str, Any]) -> None:
        self._transcript.patch(node.id, {"html": {"said": edit_form(node.content)}})
        self._transcript.run_method("focus", node.id, "textarea")

    def _unedit(self, node: Node, _: dict[str, Any]) -> None:
        self._transcript.patch(node.id, {"html": {"said": question_text(node.content)}})

    def _save(self, node: Node, given: dict[str, Any]) -> None:
        self._may_start()
        question = str(given.get("text") or "").strip()
        if not question:
            raise TaelError("write something first")
        self._answer(self._history.add(self._owner, node.conversation, node.parent, "user", question))

    def _give_result(self, node: Node, given: dict[str, Any]) -> None:
        """What a tool returned; when every call has its result, the model goes on."""
        self._may_start()
        number, result = str(given.get("arg")), str(given.get("text") or "")
        if not number.isdecimal() or int(number) >= len(node.tool_calls) or len(result) > MAX_RESULT:
            raise TaelError("that is no result for this call")
        call = {"id": node.tool_calls[int(number)].get("id", "")}
        last = [node, *self._results(node)][-1]
        added = self._history.add(self._owner, node.conversation, last.id, "tool", result, tool_calls=[call])
        self._answering.changed(node.conversation)
        self._sync()
        if len(self._results(node)) == len(node.tool_calls):
            self._answer(added)


_HELLO = "<h2>What shall we work on?</h2><p>Everything stays on this server.</p>"
_ACTS: dict[str, Callable[[ChatPage, Node, dict[str, Any]], None]] = {
    "copy": ChatPage._copy,
    "raw": ChatPage._show_raw,
    "again": ChatPage._again,
    "on": ChatPage._continue,
    "branch": ChatPage._branch,
    "edit": ChatPage._edit,
    "unedit": ChatPage._unedit,
    "save": ChatPage._save,
    "result": ChatPage._give_result,
}
