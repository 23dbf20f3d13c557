"""The planner's answers as tables for the terminal, and `tael plan --list` as rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from tael.cost import units
from tael.cost.chips import CHIPS
from tael.cost.named import MODELS
from tael.cost.planner import Run
from tael.cost.prediction import MEMORY_NOTE
from tael.cost.what_if import Case


def known() -> dict[str, Any]:
    """Models and chips by name."""
    models = [
        {
            "name": m.name,
            "parameters_total": m.shape.parameters(mtp=False),
            "parameters_active": m.shape.parameters(active=True, mtp=False),
            "tokens": m.tokens,
            "cache_bytes_per_token": m.shape.cache_bytes(),
            "precision": m.precision,
            "source": m.source,
        }
        for m in MODELS.values()
    ]
    chips = [
        {
            "name": c.name,
            "peaks": c.peaks,
            "memory_bytes": c.memory_bytes,
            "memory_bandwidth": c.memory_bandwidth,
            "link_bandwidth": c.link_bandwidth,
            "domain": c.domain,
            "network_bandwidth": c.network_bandwidth,
            "watts": c.watts,
            "tpp": c.total_processing_performance,
            "dollars_per_hour": c.dollars_per_hour,
            "price_source": c.price_source,
            "source": c.source,
            "date": c.date,
            "note": c.note,
        }
        for c in CHIPS.values()
    ]
    return {"models": models, "chips": chips}


def known_tables() -> list[Table]:
    listed = known()
    models = _table("Models", "Name", "Total", "Active", "Tokens", "Cache a token", "Trained in")
    for m in listed["models"]:
        total, active = units.count(m["parameters_total"]), units.count(m["parameters_active"])
        cache = units.size(m["cache_bytes_per_token"])
        models.add_row(m["name"], total, active, units.count(m["tokens"]), cache, m["precision"])
    chips = _table("Chips (--json has sources)", "Name", "bf16", "fp8", "Memory", "Mem/s", "Link/s", "Net/s", "$/h")
    for c in listed["chips"]:
        peaks = c["peaks"]
        chips.add_row(
            c["name"],
            units.flops(peaks.get("bf16")),
            units.flops(peaks.get("fp8")),
            units.size(c["memory_bytes"]),
            *(units.size(c[key]) for key in ("memory_bandwidth", "link_bandwidth", "network_bandwidth")),
            units.money(c["dollars_per_hour"]),
        )
    return [models, chips]


def plan_tables(answer: dict[str, Any]) -> list[Any]:
    """A plan in three parts: the run, where its time and memory go, serving."""
    run = _pairs(
        f"{answer['model']} on {answer['chips']} {answer['chip']}",
        [
            ("parameters", f"{units.count(answer['parameters_total'])}, active "
                           f"{units.count(answer['parameters_active'])}"),
            ("tokens", f"{units.count(answer['tokens'])} in batches of {units.count(answer['batch_tokens'])}"),
            ("layout", answer["layout"]["text"]),
            ("products in", answer["precision"]),
            ("step", f"{answer['step_seconds']:.3g} s, {units.count(answer['tokens_per_second_per_device'])} "
                     "tokens/s a chip"),
            ("utilisation", f"{units.percent(answer['utilisation'])} of the bf16 peak"),
            ("chip-hours", units.count(answer["gpu_hours"])),
            ("time", f"{answer['days']:.3g} days"),
            ("price", f"{units.money(answer['dollars'])} at {units.money(answer['price_per_hour'])} an hour"),
            ("energy", units.energy(answer["joules"], estimated=True)),
        ],
    )  # fmt: skip
    where = _table("Where it goes", "FLOPs", "share", "Step", "share", "Memory", "a chip")
    flops, step, memory = answer["flops_by_part"], answer["step_by_part"], answer["memory_by_part"]
    parts = [(key, value) for key, value in step.items() if key != "hidden_communication"]
    for row in range(max(len(flops), len(parts), len(memory))):
        where.add_row(
            *_share(list(flops.items()), row, answer["flops_per_token"]),
            *_share(parts, row, answer["step_seconds"]),
            *_cells([(key, units.size(value)) for key, value in memory.items()], row),
        )
    return [run, where, _serving(answer)]


def _serving(answer: dict[str, Any]) -> Any:
    serving = answer["serving"]
    if serving is None:
        return Text(f"Serving: {answer['serving_note']}\n")
    rows = [
        ("unit", f"{serving['devices']} chips, {serving['readers']:,} readers, "
                 f"limited by {serving['limited_by']}"),
        ("output", f"{serving['decode_tokens_per_second_per_device']:,.0f} tokens/s a chip, "
                   f"{1 / serving['seconds_per_token']:.1f} a reader"),
        ("input", f"{serving['prefill_tokens_per_second_per_device']:,.0f} tokens/s a chip"),
        ("cache", f"{units.size(serving['cache_bytes_per_token'])} a token"),
    ]  # fmt: skip
    if "dollars_per_million_output" in serving:
        costs = (serving["dollars_per_million_input"], serving["dollars_per_million_output"])
        rows.append(("cost", f"{units.money(costs[0])} in, {units.money(costs[1])} out a million tokens"))
    if serving.get("margin_output") is not None:
        rows.append(("margin", f"{units.percent(serving['margin_input'])} in, "
                               f"{units.percent(serving['margin_output'])} out"))  # fmt: skip
    return _pairs("Serving it", rows)


def limit_tables(run: Run, limits: Sequence[Case], bought: Sequence[Case]) -> list[Table]:
    """Two tables: chips under limits against the first, then the run without each answer against the run."""
    whole = (
        f"{run.shape.name}, {units.count(run.tokens)} tokens, {run.devices} chips, {units.money(run.price)} an hour"
    )
    return [
        _cases(f"What the limits cost: {whole}", "Chip", limits),
        _cases(f"What each answer buys, on {run.chip.name}", "Run", bought),
    ]


def _cases(title: str, first: str, cases: Sequence[Case]) -> Table:
    table = _table(title, first, "Chip-hours", "Days", "Dollars", "More", "Output $/M")
    base = cases[0].gpu_hours
    for case in cases:
        more = "" if not base or case.gpu_hours is None else f"{case.gpu_hours / base - 1:+.1%}"
        days = units.MISSING if case.days is None else f"{case.days:.1f}"
        cells = (units.count(case.gpu_hours), days, units.money(case.dollars), more, units.money(case.output_dollars))
        table.add_row(case.name, *cells)
    return table


def recipe_answer(name: str, stages: list[dict[str, Any]], per_hour: float, measured: bool) -> dict[str, Any]:
    """A recipe's plan: its stages and their sums."""
    sums = {key: sum(stage[key] for stage in stages) for key in ("tokens", "flops", "seconds", "dollars")}
    memory = max(stage["memory_bytes"] for stage in stages)
    head = {"recipe": name, "measured_here": measured, "price_per_hour": per_hour, "stages": stages}
    return {**head, **sums, "memory_bytes": memory}


def recipe_table(answer: dict[str, Any]) -> Table:
    how = "steps timed here" if answer["measured_here"] else "rough: --measure-here times its steps"
    table = _table(
        f"{answer['recipe']} on this machine ({how})", "Stage", "Steps", "Tokens", "FLOPs", "Time", "Memory", "Cost"
    )
    for stage in answer["stages"]:
        table.add_row(stage["name"], str(stage["steps"]), *_costs(stage))
    table.add_section()
    table.add_row("total", "", *_costs(answer))
    table.caption, table.caption_justify = Text(MEMORY_NOTE), "left"
    return table


def _costs(row: dict[str, Any]) -> tuple[str, ...]:
    time = units.duration(row["seconds"])
    memory = units.size(row["memory_bytes"])
    return units.count(row["tokens"]), units.flops(row["flops"]), time, memory, units.money(row["dollars"])


def _share(pairs: list[tuple[str, float]], row: int, whole: float) -> tuple[str, str]:
    return _cells([(key, f"{value / whole:.1%}") for key, value in pairs], row)


def _cells(pairs: list[tuple[str, str]], row: int) -> tuple[str, str]:
    return pairs[row] if row < len(pairs) else ("", "")


def _pairs(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(
        title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), show_header=False
    )  # fmt: skip
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    return table
