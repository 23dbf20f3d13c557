"""`tael costs`, as the command line takes it: runs from the ledger, requests from the server's file, in one table."""

from __future__ import annotations

from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tael import shell
from tael.errors import TaelError
from tael.shell import Json

if TYPE_CHECKING:
    from tael.cost.tables import Line, Span
    from tael.serve.store import Spending

RUNS = Path("runs")


class By(StrEnum):
    """What costs are added up by; keys and models are those of served requests."""

    run = "run"
    stage = "stage"
    day = "day"
    key = "key"
    model = "model"


def costs(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's name or directory; all runs if none.")
    ] = None,
    by: Annotated[
        By | None, typer.Option(help="A line for each; run unless given, stage for one run.", show_default=False)
    ] = None,
    ledger: Annotated[Path | None, typer.Option(help="The ledger's file; runs/ledger.sqlite unless given.")] = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the server keeps its state; ~/.local/share/tael unless given."),
    ] = None,
    since: Annotated[str | None, typer.Option(metavar="DATE", help="From this UTC day on.")] = None,
    until: Annotated[str | None, typer.Option(metavar="DATE", help="To this UTC day, included.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead.")] = False,
    as_json: Json = False,
) -> None:
    """What training, evaluation and serving cost: tokens, FLOPs, time, energy and dollars."""
    from tael.cost.tables import Span, line_csv, line_rows, line_table

    if as_csv and as_json:
        raise TaelError("give --csv or --json, not both")
    if run is not None and by is not None and by in (By.key, By.model):
        raise TaelError(f"--by {by.value}: a run has no {by.value}s; leave out '{run}', or go by stage or day")
    chosen = by or (By.run if run is None else By.stage)
    span = Span(_day("--since", since), _day("--until", until))
    lines, name = _run_lines(run, chosen, ledger, span)
    if run is None and (ledger is None or state is not None):  # a ledger of one's own is looked at alone
        lines = lines + _served_lines(chosen, state, span)
    if as_json:
        shell.print_json(line_rows(lines, chosen.value))
    elif as_csv:
        print(line_csv(lines, chosen.value), end="")
    else:
        console = shell.console()
        title = f"Costs{f' of {name}' if name else ''} by {chosen.value}{f' {span}' if str(span) else ''}"
        empty = f"nothing {span}" if str(span) else "nothing in the ledger yet, and nothing served"
        console.print(line_table(lines, chosen.value, title, console.width) if lines else f"{title}: {empty}")


def _run_lines(run: str | None, by: By, path: Path | None, span: Span) -> tuple[list[Line], str | None]:
    """Lines of the ledger, and the run's name in it."""
    from tael.cost.ledger import Ledger
    from tael.cost.rundata import run_name
    from tael.cost.tables import ledger_lines

    if path is not None and not path.is_file():
        raise TaelError(f"{path}: no such ledger")
    book, name = path or RUNS / "ledger.sqlite", run
    directory = next((d for d in (Path(run or ""), RUNS / (run or "")) if run and d.is_dir()), None)
    if directory is not None:
        book, name = path or directory.resolve().parent / "ledger.sqlite", run_name(directory)
    if by in (By.key, By.model):
        return [], name
    grouping: Literal["run", "stage", "day"] = by.value  # type: ignore[assignment]
    return ledger_lines(Ledger(book), grouping, name, span), name


def _served_lines(by: By, state: Path | None, span: Span) -> list[Line]:
    """Lines of what was served; where the state was not named, there may be none."""
    from tael.serve.store import FILE, Store, default_state

    file = (state or default_state()) / FILE
    if not file.is_file():
        if state is not None:
            raise TaelError(f"{file}: no such file; nothing was served with this --state")
        return []
    grouping: Literal["key", "day", "model"] = by.value if by in (By.key, By.day) else "model"  # type: ignore[assignment]
    days = {"since": span.since, "until": span.until}
    store = Store(file)
    try:
        found = store.spending(grouping, **{name: day.isoformat() for name, day in days.items() if day is not None})
    finally:
        store.close()
    return [_line(each) for each in found]


def _line(each: Spending) -> Line:
    from tael.cost.ledger import Total
    from tael.cost.tables import Answers, Line

    total = Total(
        key=each.group,
        entries=each.requests,
        steps=0,
        tokens=each.hit_tokens + each.miss_tokens + each.output_tokens,
        flops=each.flops,
        utilisation=None,
        seconds=each.engine_seconds,
        peak_memory_bytes=0,
        joules=each.joules,
        joules_estimated=each.joules is not None,
        joules_partial=each.joules is not None and each.unweighed > 0,
        price_per_hour=None,
        dollars=each.machine_dollars,
    )
    answers = Answers(each.charged, each.hit_tokens, each.miss_tokens, each.output_tokens, each.untimed)
    return Line("serving", total, answers)


def _day(option: str, text: str | None) -> date | None:
    if text is None:
        return None
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise TaelError(f"{option} {text}: must be a day, such as 2025-02-26") from None
