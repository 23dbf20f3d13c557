"""Parts of the runs page as HTML; every text in it is escaped, for names, samples and logs are not to be trusted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup, escape
from nicegui.element import Element

from tael.cost import units
from tael.cost.report import Pair, bits_per_byte, reasoning
from tael.cost.rundata import Sample, number
from tael.evals.statistics import Accuracy
from tael.progress import clock
from tael.serve.run_views import RunHead, RunView, StageView

SHOWN_CHARACTERS = 4000


def say(element: Element, words: str | Markup) -> None:
    """Put `words` into an element that `widgets.html` or `text` made, if it does not hold them already."""
    content = legible(str(escape(words)))
    if element.content != content:  # type: ignore[attr-defined]
        element.set_content(content)  # type: ignore[attr-defined]


def ago(moment: float, now: float | None = None) -> str:
    """As in `12 s ago`."""
    return f"{units.duration(max(0.0, (time.time() if now is None else now) - moment))} ago" if moment else "never"


def join(parts: Iterable[str]) -> Markup:
    """One after the other."""
    return Markup("").join(parts)


def badge(head: RunHead) -> Markup:
    """The run's state."""
    return Markup('<span class="badge {0}">{0}</span>').format(head.state)


def bar(share: float, words: str) -> Markup:
    """A progress bar with a name."""
    return Markup('<progress max="1" value="{:.4f}" aria-label="{}">{:.0%}</progress>').format(share, words, share)


def row(head: RunHead) -> Markup:
    """The run in the list."""
    words = f"{head.stage} · " if head.stage and head.state != "finished" else ""
    progress = bar(head.progress, f"{head.name}: progress") if head.state == "running" else ""
    return Markup("<b>{}</b> {}<small>{}{} · {}</small>{}").format(
        head.name, badge(head), words, units.money(head.dollars), ago(head.updated), progress
    )


def summary(view: RunView) -> Markup:
    """Headline, reason, notes and tiles."""
    head = view.head
    lines = [Markup("<p>{}</p>").format(head.headline)]
    if description := view.record.recipe.get("description"):
        lines.append(Markup('<p class="small">{}</p>').format(str(description)))
    if head.reason:
        kind = "alert" if head.state == "failed" else "small"
        lines.append(Markup('<p class="{}">{}: {}</p>').format(kind, head.state.capitalize(), head.reason))
    lines += [Markup('<p class="small">{}</p>').format(note) for note in view.notes]
    tiles = [Markup("<div><dt>{}</dt><dd>{}</dd><small>{}</small></div>").format(*tile) for tile in _tiles(view)]
    return join(lines) + Markup('<dl class="tiles">{}</dl>').format(join(tiles))


def _tiles(view: RunView) -> list[tuple[str, str, str]]:
    head, told = view.head, view.prediction
    done = head.state == "finished"
    rate = f"at {units.money(view.price_per_hour)} an hour, {units.duration(view.whole.seconds)}"
    tiles = [("Cost" if done else "Cost so far", units.money(view.whole.dollars), rate)]
    if not done:
        least = "at least " if told.unknown else ""
        total = "not known yet" if told.dollars is None else least + units.money(told.dollars)
        left = "not known yet" if told.seconds_left is None else least + clock(told.seconds_left)
        missing = f"without {', '.join(told.unknown)}" if told.unknown and told.dollars is not None else ""
        tiles.append(("Whole run, predicted", total, missing))
        heard = f"last heard of {ago(head.updated)}" if head.state == "running" else ""
        tiles.append(("Time left" if head.state == "running" else "Time left when resumed", left, heard))
    speeds = [s.series["tokens_per_second"] for s in view.stages if "tokens_per_second" in s.series]
    if speeds and head.state == "running":
        tiles.append(("Speed", units.count(speeds[-1].values[-1]), "tokens a second, last step"))
    bits = bits_per_byte(view.record)
    if bits is not None:
        tiles.append(("Held-out text", f"{bits:.3f}", "bits per byte, lower is better"))
    before, after = reasoning(view.record)
    last = after or before
    if last is not None:
        low, high = last.interval()
        tiles.append(("Reasoning, held out", f"{last.share:.0%}", f"95%: {low:.0%} to {high:.0%}"))
    return tiles


def stage_table(view: RunView) -> Markup:
    """Every stage with its progress, times and cost."""
    heads = ("Stage", "Progress", "Steps", "Taken", "Left", "Cost")
    rows = [_stage_row(stage) for stage in view.stages]
    basis = Markup('<p class="small">{}</p>').format(view.prediction.basis)
    return table("Stages", heads, rows, numbers=(2, 3, 4, 5)) + basis


def _stage_row(stage: StageView) -> list[str]:
    steps = f"{stage.step:,}" if stage.steps is None else f"{stage.step:,} / {stage.steps:,}"
    left = "not known" if stage.seconds_left is None else "" if not stage.seconds_left else clock(stage.seconds_left)
    taken = clock(stage.seconds) if stage.state != "waiting" else ""
    return [
        stage.name,
        bar(stage.progress, f"{stage.name}: progress"),
        steps,
        taken,
        "done" if stage.state == "finished" else left,
        units.money(stage.dollars) if stage.state != "waiting" else "",
    ]


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> Markup:
    """A table whose first column names its rows; cells that are no Markup are escaped."""

    def cell(tag: str, column: int, content: str, scope: str = "") -> Markup:
        return Markup("<{0}{1}{2}>{3}</{0}>").format(
            tag,
            Markup(' scope="{}"').format(scope) if scope else "",
            Markup(' class="number"') if column in numbers else "",
            content,
        )

    top = join(cell("th", i, head, "col") for i, head in enumerate(heads))
    body = join(
        Markup("<tr>{}</tr>").format(
            join(cell("td" if i else "th", i, content, "" if i else "row") for i, content in enumerate(cells))
        )
        for cells in rows
    )
    return Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{0}"><table><caption class="unseen">{0}</caption>'
        "<thead><tr>{1}</tr></thead><tbody>{2}</tbody></table></div>"
    ).format(caption, top, body)


def sample_cards(view: RunView) -> Markup:
    """The same prompts before and after."""
    parts = []
    for stage, count, pairs in view.samples:
        words = f"Samples of {stage}" + (f" ({len(pairs)} of {count})" if count > len(pairs) else "")
        cards = join(_card(pair) for pair in pairs)
        parts.append(Markup("<details><summary>{}</summary>{}</details>").format(words, cards))
    return join(parts)


def _card(pair: Pair) -> Markup:
    expected = (
        "" if pair.expected is None else Markup('<p class="small">expected: {}</p>').format(clip(pair.expected))
    )
    sides = [("before", pair.before), ("after", pair.after)]
    shown = join(_side(label, sample) for label, sample in sides if sample is not None)
    return Markup(
        '<article class="pair"><p class="small">{}</p><pre>{}</pre>{}<div class="sides">{}</div></article>'
    ).format(pair.mode, clip(pair.prompt), expected, shown)


def _side(label: str, sample: Sample) -> Markup:
    verdict = "" if sample.correct is None else ", right" if sample.correct else ", wrong"
    thought = Markup('<pre class="thought">{}</pre>').format(clip(sample.reasoning)) if sample.reasoning else ""
    return Markup("<div><h4>{}{}</h4>{}<pre>{}</pre></div>").format(
        label, verdict or "", thought, clip(sample.answer)
    )


def legible(text: str) -> str:
    """The text without what no browser can be sent: lone surrogates, which models and JSON may hold."""
    return text.encode("utf-8", "replace").decode()


def clip(text: str) -> str:
    """A text of bearable length."""
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " […]"


# -------------------------------------------------------------------- comparing


def comparison_table(views: Sequence[RunView]) -> Markup:
    """Final (or latest) figures of several runs side by side; a row that no run can fill is left out."""
    rows: list[tuple[str, Callable[[RunView], str]]] = [
        ("state", lambda v: v.head.state),
        ("cost", lambda v: units.money(v.whole.dollars)),
        ("time", lambda v: units.duration(v.whole.seconds)),
        ("tokens", lambda v: units.count(v.whole.tokens)),
        ("held-out text, bits a byte", lambda v: _number(bits_per_byte(v.record), ".4f")),
        ("reasoning before RL", lambda v: _share(reasoning(v.record)[0])),
        ("reasoning after RL", lambda v: _share(reasoning(v.record)[1])),
        ("last reward", lambda v: _last(v, "reward", ".1%")),
        ("last loss, nats a token", lambda v: _last(v, "loss", ".4f")),
        ("busiest expert, max over mean", lambda v: _last(v, "load_max_over_mean", ".2f")),
        ("parameters", lambda v: units.count(_model(v, "parameters_total"))),
        ("active a token", lambda v: units.count(_model(v, "parameters_active"))),
        ("cache a token", lambda v: units.size(_model(v, "cache_bytes_per_token"))),
        ("device", lambda v: str(v.record.summary.get("device") or units.MISSING)),
    ]
    filled = [(name, [read(view) for view in views]) for name, read in rows]
    shown = [[name, *cells] for name, cells in filled if any(cell != units.MISSING for cell in cells)]
    return table("Figures side by side", ("", *(view.head.name for view in views)), shown)


def _number(value: float | None, form: str) -> str:
    return units.MISSING if value is None else format(value, form)


def _share(accuracy: Accuracy | None) -> str:
    return units.MISSING if accuracy is None else f"{accuracy.share:.1%} ({accuracy.correct} / {accuracy.total})"


def _last(view: RunView, name: str, form: str) -> str:
    wanted = [stage for stage in view.stages if name in stage.series and (name != "loss" or stage.kind != "rl")]
    return _number(wanted[-1].series[name].values[-1], form) if wanted else units.MISSING


def _model(view: RunView, key: str) -> float | None:
    model = view.record.summary.get("model")
    return number(model.get(key)) if isinstance(model, dict) else None
