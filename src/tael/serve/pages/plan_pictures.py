"""Pictures of a plan as HTML: stacked bars of time, memory and FLOPs. Each says in words what it shows.

A bar's parts have a colour and a hatching of their own, and stand in a list beside it with their figures, so that
nobody needs to tell colours apart. Everything that is text here is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tael.cost import units
from tael.serve.pages.run_parts import join

LEAST_SHARE = 0.002
"""Parts of less are not drawn; they stand in the list."""

STEP_PARTS = {"compute": "compute", "bubble": "pipeline bubbles", "optimiser": "optimiser"}
COMMUNICATION = {
    "tensor": "tensor parallelism", "expert": "experts' dispatch and combine", "pipeline": "between stages",
    "context": "keys and values of other parts", "data": "gradients and weights",
}  # fmt: skip
MEMORY_PARTS = {
    "weights": "weights", "gradients": "gradients", "optimiser": "optimiser", "activations": "activations",
    "logits": "logits", "reserve": "kept in reserve",
}  # fmt: skip
FLOPS_PARTS = {
    "projections": "attention's projections", "scores": "attention's scores", "indexer": "indexer",
    "dense": "dense feed-forward", "experts": "experts", "router": "router", "head": "head", "mtp": "MTP",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One piece of a bar. `look` names its class in the style sheet; `figure` is its value as it is read."""

    name: str
    value: float
    look: str
    figure: str

    def share(self, whole: float) -> float:
        return self.value / whole if whole > 0 else 0.0


@dataclass(frozen=True)
class Bar:
    """Parts of a `whole` (of which some may be left empty), and what they say together."""

    title: str
    parts: tuple[Part, ...]
    whole: float
    summary: str
    behind: tuple[Part, ...] = ()
    """Drawn under the bar on the same scale: what goes on at the same time and is no part of the whole."""

    def words(self) -> str:
        """The text alternative: every part with its figure and share."""
        listed = ", ".join(f"{part.name} {part.figure} ({percent(part.share(self.whole))})" for part in self.parts)
        hidden = ", ".join(f"{part.name} {part.figure}" for part in self.behind)
        return f"{self.summary} {listed}." + (f" At the same time: {hidden}." if hidden else "")


def percent(share: float) -> str:
    return "under 0.1%" if 0 < share < 0.001 else f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"


def draw(bar: Bar) -> Markup:
    """The bar, what is behind it, and the list of its parts."""
    behind = _stretch(bar.behind, bar.whole, "stack behind") if bar.behind else Markup("")
    listed = join(_entry(part, percent(part.share(bar.whole))) for part in bar.parts)
    listed += join(_entry(part, "at the same time") for part in bar.behind)
    return Markup(
        '<figure class="bar"><h4>{}</h4><div role="img" aria-label="{}">{}{}</div><figcaption>{}</figcaption>'
        '<ul class="key">{}</ul></figure>'
    ).format(
        bar.title, f"{bar.title}: {bar.words()}", _stretch(bar.parts, bar.whole, "stack"), behind, bar.summary, listed
    )


def _stretch(parts: Iterable[Part], whole: float, classes: str) -> Markup:
    drawn = join(
        Markup('<span class="{}" style="width:{:.2f}%" title="{}"></span>').format(
            part.look, 100 * part.share(whole), f"{part.name}: {part.figure}"
        )
        for part in parts
        if part.share(whole) >= LEAST_SHARE
    )
    return Markup('<div class="{}">{}</div>').format(classes, drawn)


def _entry(part: Part, share: str) -> Markup:
    return Markup('<li><i class="{}"></i><span>{}</span> <b>{}</b> <small>{}</small></li>').format(
        part.look, part.name, part.figure, share
    )


# ------------------------------------------------------------------- a plan's bars


def step_bar(answer: dict[str, Any]) -> Bar:
    """The step's time: what stands on the critical path, and what is hidden behind compute."""
    step, kinds, whole = answer["step_by_part"], answer["communication_by_kind"], answer["step_seconds"]
    parts = [Part("compute", step["compute"], "compute", seconds(step["compute"]))]
    parts += [
        Part(f"{words}, exposed", kinds[kind]["exposed"], kind, seconds(kinds[kind]["exposed"]))
        for kind, words in COMMUNICATION.items()
        if kinds[kind]["exposed"] > 0
    ]
    parts += [
        Part(STEP_PARTS[key], step[key], key, seconds(step[key])) for key in ("bubble", "optimiser") if step[key] > 0
    ]
    behind = tuple(
        Part(f"{words}, hidden", kinds[kind]["hidden"], kind, seconds(kinds[kind]["hidden"]))
        for kind, words in COMMUNICATION.items()
        if kinds[kind]["hidden"] > 0
    )
    rate = units.count(answer["tokens_per_second_per_device"])
    summary = (
        f"{seconds(whole)} a step of {units.count(answer['batch_tokens'])} tokens: {rate} tokens a second a chip."
    )
    if behind:
        summary += " The thin line is communication that runs behind compute and costs nothing."
    return Bar("Where a step's time goes", tuple(parts), whole, summary, behind)


def memory_bar(answer: dict[str, Any], capacity: float) -> Bar:
    """One chip's memory by part; what is left empty is free."""
    parts = _parts(answer["memory_by_part"], MEMORY_PARTS, units.size)
    used, left = answer["memory_bytes_per_device"], capacity - answer["memory_bytes_per_device"]
    summary = f"{units.size(used)} of the {units.size(capacity)} on the fullest chip; {units.size(left)} free."
    return Bar("What a chip's memory holds", parts, capacity, summary)


def flops_bar(answer: dict[str, Any]) -> Bar:
    """The FLOPs of one training token by part."""
    parts = _parts(answer["flops_by_part"], FLOPS_PARTS, units.flops)
    whole = answer["flops_per_token"]
    summary = (
        f"{units.flops(whole)} FLOPs a token, forward and backward; "
        f"{units.flops(whole * answer['tokens'])} FLOPs for the whole training."
    )
    return Bar("What a token's arithmetic is", parts, whole, summary)


def _parts(values: dict[str, float], names: dict[str, str], show: Any) -> tuple[Part, ...]:
    """Parts that are there, largest first; a part the table of names does not know keeps its own name."""
    known = sorted(((key, value) for key, value in values.items() if value > 0), key=lambda pair: -pair[1])
    looks = _looks([key for key, _ in known], list(names))
    return tuple(Part(names.get(key, key), value, looks[key], show(value)) for key, value in known)


def _looks(keys: Sequence[str], order: Sequence[str]) -> dict[str, str]:
    """A class for each: the same part looks the same in every plan."""
    return {key: f"p{order.index(key) if key in order else len(order)}" for key in keys}


def seconds(value: float) -> str:
    """Seconds of a step: 11.2 s, 0.34 s, 12 ms, 40 us."""
    if value >= 0.1:
        return units.duration(value) if value >= 99.5 else f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-4 else f"{value * 1e6:.3g} us"
