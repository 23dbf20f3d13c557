"""`tael keys`: who may use the assistant from elsewhere, with what limits; a running server follows at once."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tael import shell
from tael.errors import TaelError
from tael.shell import Json

if TYPE_CHECKING:
    from rich.table import Table

    from tael.serve.limits import KeyLimits
    from tael.serve.store import Key, Store

app = typer.Typer(
    no_args_is_help=True,
    help="Keys for the assistant: make, list, limit and revoke them.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_UNLIMITED = math.inf
"""What "none" on the command line stands for; None is an option that was not given."""


def _dollars(text: str) -> float:
    return _limit(text, float, "a number of dollars, 0 or more")


def _whole(text: str) -> float:
    return _limit(text, int, "a whole number from 1 on")


def _limit(text: str, read: type[float] | type[int], kind: str) -> float:
    if text == "none":
        return _UNLIMITED
    try:
        value = read(text)
    except ValueError:
        value = math.nan
    if not (0 if read is float else 1) <= value < math.inf:
        raise typer.BadParameter(f"'{text}' is not {kind}, or none")
    return value


Name = Annotated[str, typer.Argument(metavar="NAME", help="The key's name, or how its secret begins.")]
State = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where the assistant keeps its state; ~/.local/share/tael unless given."),
]
Budget = Annotated[
    float | None, typer.Option(parser=_dollars, metavar="DOLLARS|none", help="What it may spend in all.")
]
Requests = Annotated[float | None, typer.Option(parser=_whole, metavar="N|none", help="In any 60 seconds.")]
Tokens = Annotated[
    float | None, typer.Option(parser=_whole, metavar="N|none", help="Of prompts and answers, in any 60 seconds.")
]
Concurrent = Annotated[float | None, typer.Option(parser=_whole, metavar="N|none", help="Requests at once.")]


@app.command()
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call it: a person, a program.")],
    budget: Budget = None,
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    concurrent: Concurrent = None,
    state: State = None,
) -> None:
    """Make a key and print its secret, this once: only its hash is kept."""
    from tael.serve.limits import KeyLimits
    from tael.serve.store import Store

    limits = _changed(KeyLimits(), budget, requests_per_minute, tokens_per_minute, concurrent)
    key, secret = Store(_file(state)).add_key(name, limits)
    shell.remark(f"key '{key.name}' ({_in_words(limits)}); keep its secret safe, it is not shown again:")
    print(secret)


@app.command("list")
def list_keys(
    revoked: Annotated[bool, typer.Option("--revoked", help="Those that hold no longer too.")] = False,
    state: State = None,
    as_json: Json = False,
) -> None:
    """The keys, what they have spent and what is left."""
    from tael.serve.store import Store

    file = _file(state)
    rows = _rows(Store(file), revoked) if file.exists() else []
    if as_json:
        shell.print_json(rows)
    else:
        shell.console().print(_table(rows) if rows else "no keys; make one: tael keys add NAME", highlight=False)


@app.command()
def revoke(name: Name, state: State = None) -> None:
    """Let a key hold no longer; what it spent stays on record."""
    key = _existing(state).revoke(name)
    print(f"revoked '{key.name}' ({key.shown})")


@app.command()
def limit(
    name: Name,
    budget: Budget = None,
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    concurrent: Concurrent = None,
    state: State = None,
) -> None:
    """Change some of a key's limits; "none" lifts one."""
    store = _existing(state)
    before = store.named(name)
    limits = _changed(before.limits, budget, requests_per_minute, tokens_per_minute, concurrent)
    key = store.set_limits(before.shown, limits)
    print(f"'{key.name}' ({key.shown}): {_in_words(key.limits)}")


def _file(state: Path | None) -> Path:
    from tael.serve.store import FILE, default_state

    return (state or default_state()) / FILE


def _existing(state: Path | None) -> Store:
    from tael.serve.store import Store

    file = _file(state)
    if not file.exists():
        raise TaelError(f"{file}: there are no keys yet; make one: tael keys add NAME")
    return Store(file)


def _changed(
    limits: KeyLimits, budget: float | None, requests: float | None, tokens: float | None, concurrent: float | None
) -> KeyLimits:
    """`limits` with those that were given in their place."""
    given = {
        "budget_dollars": budget,
        "requests_per_minute": requests,
        "tokens_per_minute": tokens,
        "concurrent": concurrent,
    }
    values = {name: value for name, value in given.items() if value is not None}
    return replace(limits, **{name: None if value == _UNLIMITED else value for name, value in values.items()})


def _rows(store: Store, revoked: bool) -> list[dict[str, Any]]:
    totals = {total.key_id: total for total in store.totals("key")}

    def row(key: Key) -> dict[str, Any]:
        total = totals.get(key.id)
        budget, spent = key.limits.budget_dollars, total.dollars if total else 0.0
        return {
            **asdict(key),
            "requests": total.requests if total else 0,
            "hit_tokens": total.hit_tokens if total else 0,
            "miss_tokens": total.miss_tokens if total else 0,
            "output_tokens": total.output_tokens if total else 0,
            "spent": spent,
            "left": None if budget is None else budget - spent,
        }

    return [row(key) for key in store.keys(revoked)]


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from tael.cost import units
    from tael.serve.limits import KeyLimits

    table = Table(title="Keys", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("Name", overflow="fold")
    table.add_column("Secret", no_wrap=True)
    for name in ("Requests", "Spent", "Left"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("Limits")
    for row in rows:
        left = row["left"]
        state = f"revoked {row['revoked'][:10]}" if row["revoked"] else _in_words(KeyLimits(**row["limits"]))
        table.add_row(
            Text(row["name"]),  # Text, not str: rich would read [brackets] in a name as markup
            Text(row["shown"]),
            units.count(row["requests"]),
            units.money(row["spent"]),
            f"-{units.money(-left)}" if left is not None and left < 0 else units.money(left),
            Text(state, style="dim" if row["revoked"] else ""),
        )
    return table


def _in_words(limits: KeyLimits) -> str:
    from tael.cost import units

    parts = [
        (limits.budget_dollars, units.money, "budget"),
        (limits.requests_per_minute, str, "requests/min"),
        (limits.tokens_per_minute, units.count, "tokens/min"),
        (limits.concurrent, str, "at once"),
    ]
    said = [f"{form(value)} {what}" for value, form, what in parts if value is not None]
    return ", ".join(said) or "no limits"
