"""Messages as HTML. What people and models wrote is escaped, or goes through `markdown`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from tael.serve.history import Node
from tael.serve.pages.figures import figures_line, thought_line
from tael.serve.pages.icons import icon
from tael.serve.pages.markdown import render
from tael.serve.pages.wishes import split_files

_ENDS = {
    "stopped": "Stopped.",
    "interrupted": "Interrupted: the server ended while this was being written.",
}


def turn(node: Node, place: int, places: int, last: bool, results: Sequence[Node] = ()) -> str:
    """One message. `place` of `places`: which of the branches there; `last`: the conversation ends here;
    `results`: the tool messages that answer its calls."""
    if node.role == "user":
        return _question(node, place, places)
    if node.role == "tool":
        return Markup('<article class="turn tool" data-node="{}" hidden></article>').format(node.id)
    return _answer(node, place, places, last, results)


def _question(node: Node, place: int, places: int) -> str:
    return Markup(
        '<article class="turn user" data-node="{}" aria-label="You">'
        '<div class="bubble" data-part="said">{}</div><div class="actions">{}{}{}</div></article>'
    ).format(
        node.id,
        question_text(node.content),
        _places(place, places, "question"),
        _action("copy", "Copy the question", "copy"),
        _action("edit", "Edit the question", "edit"),
    )


def question_text(content: str) -> Markup:
    """What was asked, its files folded."""
    words, files = split_files(content)
    parts = [Markup("<p>{}</p>").format(words)] if words.strip() else []
    for file in files:
        lines = file.text.count("\n") + 1
        parts.append(
            Markup('<details class="file"><summary>{} · {} {}</summary><pre tabindex="0">{}</pre></details>').format(
                file.name, f"{lines:,}", "line" if lines == 1 else "lines", file.text
            )
        )
    return Markup("").join(parts)


def edit_form(content: str) -> Markup:
    """In place of a question that is being edited."""
    return Markup(
        '<div class="form" data-form><textarea rows="3" aria-label="Edit the question">{}</textarea>'
        '<div class="buttons"><button type="button" class="plain" data-act="unedit" data-cancel>Cancel</button>'
        '<button type="button" class="main-button" data-act="save" data-main>Send</button></div></div>'
    ).format(content)


def _answer(node: Node, place: int, places: int, last: bool, results: Sequence[Node]) -> str:
    running = node.state == "running"
    figures = node.figures or {}
    thoughts = thought_line(figures.get("thought_seconds"), figures.get("reasoning_tokens"))
    return Markup(
        '<article class="turn assistant" data-node="{node}" aria-label="Answer of {model}" aria-busy="{busy}">'
        '<p class="who">{model}</p>'
        '<details class="thoughts" data-part="thoughts"{hidden}>'
        '<summary data-part="thought-line">{thoughts}</summary>'
        '<div class="prose" data-part="thought">{reasoning}</div></details>'
        '<div class="prose" data-part="said">{content}</div>'
        '<div data-part="calls">{calls}</div><div data-part="raw"></div>'
        '<div class="status" data-part="status"></div>'
        '<div data-part="foot">{foot}</div></article>'
    ).format(
        node=node.id,
        model=node.model or "Assistant",
        busy="true" if running else "false",
        hidden=Markup("") if node.reasoning and not running else Markup(" hidden"),
        thoughts=thoughts,
        reasoning="" if running else _block(node.reasoning or ""),
        content="" if running else _block(node.content),
        calls="" if running else calls(node.tool_calls, results),
        foot="" if running else foot(node, place, places, last),
    )


def _block(text: str) -> Markup:
    return Markup('<div class="block">{}</div>').format(Markup(render(text))) if text else Markup("")


def foot(node: Node, place: int, places: int, last: bool) -> Markup:
    """Under an answer: how it ended, its figures, what can be done with it."""
    figures = node.figures or {}
    line = Markup("").join(Markup("<span>{}</span>").format(part) for part in figures_line(figures))
    actions = [
        _places(place, places, "answer"),
        _action("copy", "Copy the answer", "copy"),
        _action("again", "Answer again", "again"),
    ]
    if last and not node.tool_calls:
        actions.append(_action("on", "Continue this answer", "on", "Continue"))
    actions.append(_action("raw", "Show the exact text", "raw"))
    return Markup('{}<div class="foot"><p class="figures">{}</p><div class="actions">{}</div></div>').format(
        _end(node, figures), line, Markup("").join(actions)
    )


def _end(node: Node, figures: dict[str, Any]) -> Markup:
    if node.state == "error":
        return Markup('<p class="problem" role="alert">{}</p>').format(node.error or "something went wrong")
    words = _ENDS.get(node.state)
    if words is None and figures.get("finish_reason") == "length":
        words = "The limit of tokens was reached; Continue goes on from here."
    return Markup('<p class="note">{}</p>').format(words) if words else Markup("")


def calls(tool_calls: Sequence[dict[str, Any]], results: Sequence[Node], whole: bool = True) -> Markup:
    """A card for each tool call: name, arguments, and the result or, once the calls are `whole`, a field for it."""
    by_id = {node.tool_calls[0].get("id"): node for node in results if node.tool_calls}
    cards = []
    for number, call in enumerate(tool_calls):
        function = call.get("function") or {}
        result = by_id.get(call.get("id"))
        cards.append(
            Markup(
                '<section class="call" aria-label="Tool call {name}"><h3>{icon}{name}</h3>'
                '<h4>Arguments</h4><pre tabindex="0">{arguments}</pre>{result}</section>'
            ).format(
                icon=icon("tool"),
                name=str(function.get("name", "")),
                arguments=_arguments(str(function.get("arguments", ""))),
                result=_result(result, number) if whole else "",
            )
        )
    return Markup("").join(cards)


def _result(result: Node | None, number: int) -> Markup:
    if result is not None:
        return Markup('<h4>Result</h4><pre tabindex="0">{}</pre>').format(result.content)
    return Markup(
        '<h4>Result</h4><div class="form" data-form><textarea rows="2" aria-label="Result of this call"'
        ' placeholder="What the tool returned"></textarea><div class="buttons"><button type="button" class="plain"'
        ' data-act="result" data-arg="{}" data-main>Give the result</button></div></div>'
    ).format(number)


def _arguments(text: str) -> str:
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


def raw_text(node: Node) -> Markup:
    """The exact text of an answer, thoughts too, with nothing made of it."""
    parts = [Markup('<pre class="raw" tabindex="0" aria-label="The exact text">')]
    if node.reasoning:
        parts.append(Markup("{}").format(f"<think>\n{node.reasoning}\n</think>\n\n"))
    parts.append(Markup("{}").format(node.content))
    for call in node.tool_calls:
        parts.append(Markup("\n{}").format(json.dumps(call, ensure_ascii=False)))
    return Markup("").join(parts) + Markup("</pre>")


def _action(act: str, words: str, picture: str, shown: str = "") -> Markup:
    return Markup(
        '<button type="button" class="quiet" data-act="{}" aria-label="{}" title="{}">{}{}</button>'
    ).format(act, words, words, icon(picture), shown)


def _places(place: int, places: int, what: str) -> Markup:
    """`‹ 2/3 ›` where there are branches."""
    if places < 2:
        return Markup("")
    return Markup(
        '<span class="places" role="group" aria-label="Version {0} of {1} of this {2}">'
        '<button type="button" data-act="branch" data-arg="-1" aria-label="Earlier version"{3}>‹</button>{0}/{1}'
        '<button type="button" data-act="branch" data-arg="1" aria-label="Later version"{4}>›</button></span>'
    ).format(
        place,
        places,
        what,
        Markup(" disabled") if place == 1 else Markup(""),
        Markup(" disabled") if place == places else Markup(""),
    )
