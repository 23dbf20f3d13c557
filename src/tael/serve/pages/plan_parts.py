"""Tiles and tables of a plan as HTML; every text in them is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from tael.cost import units
from tael.cost.what_if import Case
from tael.serve.pages.plan_answers import Limits
from tael.serve.pages.run_parts import join, table

Tile = tuple[str, str, str]


def tiles(rows: Iterable[Tile]) -> Markup:
    """Label, value, note."""
    made = [Markup("<div><dt>{}</dt><dd>{}</dd><small>{}</small></div>").format(*tile) for tile in rows]
    return Markup('<dl class="tiles">{}</dl>').format(join(made))


def plan_tiles(answer: dict[str, Any]) -> list[Tile]:
    """The run in eight figures."""
    price = answer["price_per_hour"]
    return [
        ("Dollars", units.money(answer["dollars"]), f"at {units.money(price)} a chip's hour"),
        ("Chip-hours", units.count(answer["gpu_hours"]), f"{answer['chips']:,} {answer['chip']}"),
        ("Time", days(answer["days"]), f"{units.count(answer['steps'])} steps of {answer['step_seconds']:.3g} s"),
        ("Utilisation", units.percent(answer["utilisation"]), "of the bf16 peak, interruptions counted"),
        ("Energy", units.energy(answer["joules"], estimated=True), "with host and cooling: an order of magnitude"),
        ("Speed", units.count(answer["tokens_per_second_per_device"]), "tokens a second a chip"),
        ("Parameters", units.count(answer["parameters_total"]), f"{units.count(answer['parameters_active'])} active"),
        ("Training", units.count(answer["tokens"]), f"tokens, products in {answer['precision']}"),
    ]


def plan_sentence(answer: dict[str, Any]) -> str:
    """The plan in one line, for those who hear the page."""
    return (
        f"{answer['model']} on {answer['chips']:,} {answer['chip']}: {days(answer['days'])}, "
        f"{units.count(answer['gpu_hours'])} chip-hours, {units.money(answer['dollars'])}."
    )


def serving_part(answer: dict[str, Any]) -> Markup:
    """What serving the model costs, or why it cannot be on this chip."""
    serving = answer["serving"]
    if serving is None:
        return Markup("<p>{}</p>").format(answer["serving_note"])
    limit = {"memory": "as many as memory holds", "latency": "as many as keep the readers' speed"}
    rows = [
        ("Output", f"{serving['decode_tokens_per_second_per_device']:,.0f}", "tokens a second a chip"),
        ("Input", f"{serving['prefill_tokens_per_second_per_device']:,.0f}", "tokens a second a chip"),
        ("A reader gets", f"{1 / serving['seconds_per_token']:.1f}", "tokens a second"),
        ("Readers at once", f"{serving['readers']:,}",
         f"on {serving['devices']:,} chips; {limit.get(serving['limited_by'], serving['limited_by'])}"),
        ("Cache a token", units.size(serving["cache_bytes_per_token"]),
         f"{serving['context']:,.0f} tokens in the mean"),
    ]  # fmt: skip
    if "dollars_per_million_output" in serving:
        input, output = serving["dollars_per_million_input"], serving["dollars_per_million_output"]
        rows[:0] = [
            ("A million tokens out", units.money(output), f"at {units.percent(serving['occupancy'])} occupancy"),
            ("A million tokens in", units.money(input), "without cache hits"),
        ]
    return tiles(rows)


def limits_part(limits: Limits) -> Markup:
    """What export limits cost, then what each answer to them buys back."""
    return (
        Markup("<h4>What the limits cost</h4>")
        + _cases("Chips under limits", "Chip", limits.limits)
        + Markup("<h4>What each answer buys, on {}</h4>").format(limits.chip)
        + _cases("The run without each answer", "Run", limits.bought)
    )


def _cases(caption: str, first: str, cases: Sequence[Case]) -> Markup:
    heads = (first, "Chip-hours", "Days", "Dollars", "More", "Output, $ a million")
    rows = [_case(case, cases[0].gpu_hours) for case in cases]
    return table(caption, heads, rows, numbers=range(1, len(heads)))


def _case(case: Case, base: float | None) -> list[str]:
    if case.gpu_hours is None:
        return [f"{case.name}: {case.note}", *[units.MISSING] * 5]
    more = f"{case.gpu_hours / base - 1:+.1%}" if base and case.gpu_hours != base else ""
    taken = units.MISSING if case.days is None else f"{case.days:,.1f}"
    hours, dollars, output = units.count(case.gpu_hours), units.money(case.dollars), units.money(case.output_dollars)
    return [f"{case.name} ({case.note})" if case.note else case.name, hours, taken, dollars, more, output]


def command_part(command: str) -> Markup:
    """The same in a terminal, with a button that copies it."""
    return Markup(
        '<div class="code"><div class="code-head"><span>The same in a terminal</span>'
        '<button type="button" class="quiet" data-copy>Copy</button></div>'
        '<pre tabindex="0"><code>{}</code></pre></div>'
    ).format(command)


def days(value: float) -> str:
    """400 days, 55 days, 9.4 days, 3.1 h."""
    if value < 1:
        return units.duration(value * 86400)
    return f"{value:,.0f} days" if value >= 10 else f"{value:.2g} days"
