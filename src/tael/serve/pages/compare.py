"""The page of two models side by side: one prompt, two answers at once, a vote, and the votes as training data."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from markupsafe import Markup, escape
from nicegui import ui

from tael.errors import TaelError
from tael.serve.caller import Caller
from tael.serve.history import History, Node, Standing, Vote, preferences, standings
from tael.serve.pages.answering import ChatService
from tael.serve.pages.contest import Choice, Contest, Side
from tael.serve.pages.figures import figures_line, thought_line
from tael.serve.pages.frame import STATIC
from tael.serve.pages.transcript import Live
from tael.serve.pages.widgets import Field, area_field, button, choice_field, html, text, text_field, tick_field
from tael.serve.pages.wishes import MAX_QUESTION, Settings, request_body

REFRESH_SECONDS = 0.1
_THINKING = {"auto": "As the model does", "enabled": "On", "disabled": "Off"}
_VOTES: dict[Choice, str] = {"left": "Left is better", "tie": "Tie", "right": "Right is better"}
_SEND_ON_ENTER = (
    "(e) => { if (e.key === 'Enter' && (e.ctrlKey || e.metaKey)) "
    "{ e.preventDefault(); e.target.dispatchEvent(new Event('change')); emit(); } }"
)


def compare_page(service: ChatService, history: History, caller: Caller, draw: random.Random | None = None) -> None:
    """Build the page's content, inside `frame`. `draw` decides which model of a blind pair stands left.

    Answers belong to the page: once it is closed for good, what runs ends. Votes are kept.
    """
    ui.add_head_html(f"<style>{(STATIC / 'compare.css').read_text(encoding='utf-8')}</style>")
    text("Compare", "h1")
    _Page(service, history, caller, draw)


class _Page:
    """The page's elements, and what happens to them."""

    def __init__(self, service: ChatService, history: History, caller: Caller, draw: random.Random | None):
        self._service, self._history, self._caller = service, history, caller
        self._contest = Contest(service, history, caller, draw)
        ui.context.client.on_delete(self._contest.stop)
        self._form()
        self._problem = html("", "alert").props('role="alert"')
        with ui.element("div").classes("sides"):
            self._columns = [_Column("Left answer"), _Column("Right answer")]
        self._ballot()
        self._tally()
        self._timer = ui.timer(REFRESH_SECONDS, self._refresh, active=False)
        self._show()

    # ------------------------------------------------------------------ elements

    def _form(self) -> None:
        names = [card.name for card in self._service.models()]
        choices = {name: name for name in names} or {"": "There is no model yet"}
        with ui.element("form").classes("ask").props("onsubmit='return false'"):
            with ui.element("div").classes("pairs"):
                self._models = [
                    choice_field("One model", choices, names[0] if names else ""),
                    choice_field("The other", choices, names[1] if len(names) > 1 else names[0] if names else ""),
                ]
            self._prompt = _free(area_field("Prompt", rows=4))
            self._prompt.control.on("keydown", self._ask, js_handler=_SEND_ON_ENTER)
            self._blind = tick_field("Blind: which model is which is told after the vote", True)
            self._more()
            with ui.element("div").classes("buttons"):
                self._send = button("Ask both", self._ask, "main-button")
                self._stop = button("Stop", self._contest.stop)
                self._stop.props["data-shortcut"] = "stop"

    def _more(self) -> None:
        with ui.element("details"):
            text("System prompt and sampling", "summary")
            with ui.element("div").classes("ask"):
                self._system = _free(area_field("System prompt", rows=2))
                with ui.element("div").classes("pairs"):
                    self._fields = {
                        "thinking": choice_field("Thinking", _THINKING, "auto"),
                        "temperature": _free(text_field("Temperature", kind="number", min=0, max=2, step="any")),
                        "max_tokens": _free(text_field("Most tokens", kind="number", min=1)),
                        "seed": _free(text_field("Seed", kind="number", min=0)),
                    }

    def _ballot(self) -> None:
        with ui.element("section").classes("ballot").props('aria-label="Vote"'):
            self._buttons = [
                button(words, lambda choice=choice: self._vote(choice)) for choice, words in _VOTES.items()
            ]
            self._verdict = html("", tag="p").props('role="status"')

    def _tally(self) -> None:
        with ui.element("section").classes("tally"):
            text("Votes so far", "h2")
            self._standings = html("")
            self._download = button("Download preferences (JSONL)", self._export)
        self._count(self._history.votes(self._caller.owner))

    # ------------------------------------------------------------------- events

    def _ask(self) -> None:
        if self._contest.running:
            return
        try:
            bodies = [self._body(field.value) for field in self._models]
        except TaelError as error:
            self._complain(str(error))
            return
        self._complain("")
        self._contest.begin(bodies[0], bodies[1], bool(self._blind.value))
        for column, side in zip(self._columns, self._contest.sides, strict=True):
            column.begin(side)
        self._timer.activate()
        self._show()

    def _body(self, model: str) -> dict[str, Any]:
        prompt = str(self._prompt.value)
        if not prompt.strip():
            raise TaelError("there is no prompt to send")
        if len(prompt) > MAX_QUESTION:
            raise TaelError(f"the prompt has {len(prompt):,} characters, more than {MAX_QUESTION:,}")
        card = next((card for card in self._service.models() if card.name == model), None)
        if card is None:
            raise TaelError(f"there is no model {model!r}" if model else "there is no model to ask")
        settings = Settings.of_form({name: field.value for name, field in self._fields.items()})
        return request_body(model, card.thinks, str(self._system.value), settings, [Node(0, 0, None, "user", prompt)])

    async def _vote(self, choice: Choice) -> None:
        try:
            await self._contest.vote(choice)
            self._count(await asyncio.to_thread(self._history.votes, self._caller.owner))
        except TaelError as error:
            self._complain(str(error))
        self._show()

    def _export(self) -> None:
        try:
            lines = preferences(self._history.votes(self._caller.owner))
        except TaelError as error:
            self._complain(str(error))
            return
        ui.download.content(lines.encode(), "preferences.jsonl", "application/x-ndjson")

    # ------------------------------------------------------------------- display

    def _refresh(self) -> None:
        """Show what the answers have grown by; once they have ended, that they have."""
        for column in self._columns:
            column.refresh(self._contest.hidden)
        if not self._contest.running:
            self._timer.deactivate()
            self._show()

    def _show(self) -> None:
        """What can be pressed now, and what is told of the models."""
        contest = self._contest
        _enable(self._send, not contest.running)
        self._stop.set_visibility(contest.running)
        for made in self._buttons:
            _enable(made, contest.votable)
        for column in self._columns:
            column.refresh(contest.hidden)
            column.tell(contest.hidden)
        self._verdict.set_content(_verdict(contest))

    def _complain(self, problem: str) -> None:
        self._problem.set_content(Markup('<p class="problem">{}</p>').format(problem) if problem else "")

    def _count(self, votes: list[Vote]) -> None:
        ranked = standings(votes)
        ties = sum(vote.tie for vote in votes)
        self._standings.set_content(_table(ranked, ties) if ranked else '<p class="faint">None yet.</p>')
        _enable(self._download, len(votes) > ties)


class _Column:
    """One answer: thoughts folded, text, figures."""

    def __init__(self, place: str):
        self._place = place
        self._side: Side | None = None
        self._live: Live | None = None
        with ui.element("section").classes("answer").props(f'aria-label="{place}"'):
            self._name = html(place, "who", "h2")
            with ui.element("details").classes("thoughts") as self._thoughts:
                self._thought_line = html("", tag="summary")
                thought = _Blocks()
            self._blocks = {"thought": thought, "said": _Blocks()}
            self._status, self._foot = html("", "status"), html("")
        self._thoughts.set_visibility(False)

    def begin(self, side: Side) -> None:
        """This answer from now on."""
        self._side, self._live = side, Live(side.running)
        for blocks in self._blocks.values():
            blocks.clear()
        self._thoughts.set_visibility(False)

    def refresh(self, hidden: bool) -> None:
        """What there is new; `hidden`: nothing of what tells the model, such as its speed."""
        operations = self._live.operations() if self._live else None
        if self._side is None or operations is None:
            return
        for part, (first, new) in operations["blocks"].items():
            self._blocks[part].put(first, new)
        if "thoughts" in operations.get("show", ()):
            self._thoughts.set_visibility(True)
        if "thoughts" in operations["open"]:
            self._thoughts.props["open"] = operations["open"]["thoughts"]
        phase = self._side.running.phase
        lines = operations["html"]
        if hidden:
            lines["status"] = "" if phase == "ended" else f"<span>{phase}</span>"
        self._status.set_content(lines["status"])
        if "thought-line" in lines:
            line = "Thinking…" if phase == "thinking" else "Thought"
            self._thought_line.set_content(line if hidden else lines["thought-line"])

    def tell(self, hidden: bool) -> None:
        """Which model it is, and, once it has ended, its figures."""
        if self._side is None:
            return
        running = self._side.running
        self._name.set_content(escape(self._place if hidden else f"{self._place}: {self._side.model}"))
        if running.phase != "ended":
            self._foot.set_content("")
            return
        if not hidden and running.reasoning:
            seconds, tokens = running.figures.get("thought_seconds"), running.figures.get("reasoning_tokens")
            self._thought_line.set_content(thought_line(seconds, tokens))
        notes = [running.error and Markup('<p class="problem">{}</p>').format(running.error)]
        if running.state == "stopped":
            notes.append(Markup('<p class="note">Stopped.</p>'))
        elif running.figures.get("finish_reason") == "length":
            notes.append(Markup('<p class="note">Ended at its limit of tokens.</p>'))
        elif running.state == "done" and not running.content.strip():
            notes.append(Markup('<p class="note">It said nothing.</p>'))
        parts = Markup("").join(Markup("<span>{}</span>").format(part) for part in figures_line(running.figures))
        if parts and not hidden:
            notes.append(Markup('<p class="figures">{}</p>').format(parts))
        self._foot.set_content(Markup("").join(note for note in notes if note))


class _Blocks:
    """Rendered text, block by block: the browser gets those that changed."""

    def __init__(self) -> None:
        self._box = ui.element("div").classes("prose")
        self._made: list[ui.html] = []

    def put(self, first: int, new: list[str]) -> None:
        """These blocks in place of those from `first` on."""
        for block, content in zip(self._made[first:], new, strict=False):
            block.set_content(content)
        with self._box:
            self._made += [html(content, "block") for content in new[len(self._made) - first :]]
        for surplus in self._made[first + len(new) :]:
            surplus.delete()
        del self._made[first + len(new) :]

    def clear(self) -> None:
        self._box.clear()
        self._made = []


def _free(field: Field) -> Field:
    """Leave the text to the browser: a `value` from here would be put back whenever anything on the page changes,
    over what is being typed."""
    field.control.props.pop("value", None)
    return field


def _enable(made: Any, enabled: bool) -> None:
    made.props["disabled"] = not enabled


def _verdict(contest: Contest) -> str:
    """What to say beside the buttons."""
    if contest.choice is not None:
        left, right = (escape(side.model) for side in contest.sides)
        words = {
            "left": f"{left} over {right}",
            "right": f"{right} over {left}",
            "tie": f"{left} and {right} are even",
        }
        return f"Kept: {words[contest.choice]}."
    if contest.sides and not contest.running and not contest.votable:
        return "No vote on these: one of them is not a whole answer."
    return ""


def _table(ranked: list[Standing], ties: int) -> Markup:
    row = Markup("<tr><th scope='row'>{}</th><td>{}</td><td>{}</td><td>{}</td></tr>")
    rows = Markup("").join(row.format(each.model, each.won, each.lost, each.even) for each in ranked)
    note = Markup("<p class='faint'>Ties prefer nothing and are not in the download.</p>") if ties else Markup("")
    names = ("Model", "Won", "Lost", "Even")
    head = Markup("").join(Markup("<th scope='col'>{}</th>").format(name) for name in names)
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>{}").format(head, rows, note)
