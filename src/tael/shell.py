"""What the commands share: the types of their options, the console, JSON on standard output.

Imports neither torch nor rich before it has to, so that `tael --help` is quick.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

PRICE = 0.08
"""Dollars an hour where nobody says otherwise: that of recipes (tael.recipe.PriceSettings), which a test compares."""


class Scheme(StrEnum):
    """Types to which weights are rounded while they are read; keep: a .gguf file's own codes, whatever its size."""

    int4 = "int4"
    int8 = "int8"
    w8a8 = "w8a8"
    keep = "keep"


class Backend(StrEnum):
    """Who carries out the passes."""

    auto = "auto"
    torch = "torch"
    native = "native"


class Speculate(StrEnum):
    """Whether tokens are drafted and verified."""

    auto = "auto"
    on = "on"
    off = "off"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file, a run, or a checkpoint's name (tael models).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]

_ENGINE, _ANSWER, _SAMPLING = "How it runs", "What the answer looks like", "How it is drawn"
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=_ENGINE)]
Quantize = Annotated[
    Scheme | None,
    typer.Option(
        help="Round the weights while they are read; keep: a .gguf file's own codes.", rich_help_panel=_ENGINE
    ),
]
BackendOption = Annotated[
    Backend, typer.Option("--backend", help="native: the C++ operator; auto: where it pays.", rich_help_panel=_ENGINE)
]
SpeculateOption = Annotated[
    Speculate | None,
    typer.Option(
        "--speculate",
        help="Draft tokens and verify them; auto: while it pays. auto with MTP modules, else off.",
        rich_help_panel=_ENGINE,
        show_default=False,
    ),
]
MapExperts = Annotated[
    bool,
    typer.Option(
        "--map-experts", help="Leave experts in the file: for models larger than memory.", rich_help_panel=_ENGINE
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=16, help="Tokens of prompt and answer together; the model's unless given.", rich_help_panel=_ENGINE
    ),
]
Price = Annotated[
    float, typer.Option(min=0, metavar="DOLLARS", help="What an hour of this machine costs.", rich_help_panel=_ENGINE)
]

Temperature = Annotated[
    float,
    typer.Option(help="0 takes the likeliest token; 1 draws as the model would.", rich_help_panel=_SAMPLING),
]
TopP = Annotated[
    float,
    typer.Option(help="Draw from the likeliest tokens that hold this much probability.", rich_help_panel=_SAMPLING),
]
TopK = Annotated[int, typer.Option(help="Draw from so many of the likeliest; 0 is off.", rich_help_panel=_SAMPLING)]
MinP = Annotated[
    float,
    typer.Option(help="Draw from tokens at least this share as likely as the likeliest.", rich_help_panel=_SAMPLING),
]
Penalty = Annotated[
    float, typer.Option(help="Above 1: tokens that were there come less often.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[int, typer.Option(help="Same seed, same words.", rich_help_panel=_SAMPLING)]

Stop = Annotated[
    list[str] | None, typer.Option(help="End the answer before this text; may be repeated.", rich_help_panel=_ANSWER)
]
Budget = Annotated[
    int | None, typer.Option(min=0, help="At most so many tokens of thought.", rich_help_panel=_ANSWER)
]
JsonObject = Annotated[
    bool, typer.Option("--json-object", help="The answer is a JSON object.", rich_help_panel=_ANSWER)
]
JsonSchema = Annotated[
    str | None,
    typer.Option(metavar="FILE|JSON", help="The answer is JSON of this schema.", rich_help_panel=_ANSWER),
]
Regex = Annotated[str | None, typer.Option(help="The answer matches this expression.", rich_help_panel=_ANSWER)]
Choice = Annotated[
    list[str] | None, typer.Option(help="The answer is this, or another --choice.", rich_help_panel=_ANSWER)
]


def console(stderr: bool = False) -> Console:
    """A console of rich's for standard output or standard error."""
    from rich.console import Console

    return Console(stderr=stderr)


def remark(line: str) -> None:
    """A dim line on standard error."""
    from rich.text import Text

    console(stderr=True).print(Text(line, style="dim"), highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def write(text: str) -> None:
    """Print a piece of text at once; in a terminal without control characters a model might say."""
    from tael.chat.screen import printable

    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def text_or_file(given: str) -> str:
    """The content of the file of that name, or `given` itself where it is JSON already."""
    if given.lstrip().startswith("{"):
        return given
    from tael.errors import TaelError

    path = Path(given)
    if not path.is_file():
        raise TaelError(f"--json-schema {given}: no such file, and not JSON either")
    return path.read_text(encoding="utf-8")
