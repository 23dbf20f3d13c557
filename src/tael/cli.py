"""Every command of `tael`, thin: parse, call, print.

Each command imports what it needs when it is called, so that `tael --help` does not wait for torch. What goes wrong
is said by `tael.failures` in one line on stderr, exit code 1; wrong usage is typer's, exit code 2.
"""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import tael
from tael import comparing, costing, planning, shell, using
from tael.errors import TaelError, did_you_mean
from tael.failures import one_line
from tael.interrupts import interruptible
from tael.serve import commands, keys
from tael.shell import Json

if TYPE_CHECKING:
    from rich.console import Console

    from tael.data import Tokenizer

RUNS = Path("runs")


class Group(TyperGroup):
    """The commands, with every failure the user can act on turned into one line."""

    def invoke(self, ctx: Any) -> Any:
        with one_line():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A complete, small DeepSeek-style language-model system: train, reason, check, with every step priced.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tael {tael.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which Tael.")
    ] = False,
) -> None: ...


# ------------------------------------------------------------------------ runs


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file, as in recipes/.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a value of the recipe.")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where the run lives; runs/NAME unless given.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again; an older run is moved aside.")] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe to its end. The same command goes on after Ctrl-C, a crash or a restart."""
    try:
        _run(recipe, overrides or [], run_dir, fresh, as_json)
    except KeyboardInterrupt:
        raise TaelError("stopped; the same command goes on from there") from None


def _run(path: Path, overrides: list[str], run_dir: Path | None, fresh: bool, as_json: bool) -> None:
    from tael.progress import make_reporter
    from tael.recipe import load_recipe

    recipe = load_recipe(path, overrides)
    console = shell.console(stderr=as_json)
    from tael.pipeline import default_run_directory, run_recipe  # brings in torch: check the recipe first

    directory = run_dir or default_run_directory(recipe)
    if os.environ.get("RANK", "0") != "0":  # one of several under torchrun: the first one does the talking
        console.quiet = True
    with interruptible(), make_reporter(console, recipe.stages) as reporter:
        summary = run_recipe(recipe, directory, reporter, fresh=fresh)
    if not console.quiet:
        _show_end(console, directory, summary, as_json)


def _show_end(console: Console, directory: Path, summary: dict[str, Any], as_json: bool) -> None:
    from tael.cost.compared import compare, summary_line
    from tael.cost.ledger import Ledger
    from tael.cost.prediction import read_prediction
    from tael.cost.report import headline
    from tael.cost.runcosts import stage_totals, sum_totals
    from tael.cost.rundata import read_run
    from tael.cost.tables import cost_rows, cost_table

    ledger, record = Ledger(_ledger_beside(directory)), read_run(directory)
    name, report_page = summary["name"], directory / "report.html"
    if as_json:
        costs = cost_rows(ledger, name)
        shell.print_json(
            {"directory": str(directory), "summary": summary, "costs": costs, "report": str(report_page)}
        )
        return
    console.print(cost_table(ledger, name, console.width))
    prediction, _ = read_prediction(directory)
    console.print(headline(record, sum_totals(stage_totals(record, ledger))), style="bold", highlight=False)
    if prediction is not None and (line := summary_line(compare(record, ledger, prediction), prediction)):
        console.print(line, highlight=False, markup=False)
    console.print(f"report: {report_page}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"talk to it: tael chat {directory}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"in the browser: tael serve {directory}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory or name.")],
) -> None:
    """Write a run's report, one HTML page that needs nothing else, at any point of the run."""
    from tael.cost.ledger import Ledger
    from tael.cost.report import write_report

    directory = Path(run) if Path(run).is_dir() else RUNS / run
    if not directory.is_dir():
        known = ", ".join(sorted(path.parent.name for path in RUNS.glob("*/recipe.toml"))) or "none"
        raise TaelError(f"{run}: no such run; runs under {RUNS}/: {known}")
    with interruptible():
        page = write_report(directory, Ledger(_ledger_beside(directory)))
    print(page)


# ------------------------------------------------------------- data and models


@app.command()
def models(as_json: Json = False) -> None:
    """What can be trained on (named text), and talked to (checkpoints, runs with a model); `tael pull` fetches."""
    from tael.data import SOURCES
    from tael.weights import CHECKPOINTS, available, is_pulled, location, resolve

    sources = [
        {
            "name": name,
            "description": info.description,
            "licence": info.licence,
            "credit": info.credit,
            "package": info.package.pin if info.package else None,
            "dialogues": info.dialogues is not None,
        }
        for name, info in SOURCES.items()
    ]
    runs = [{"name": name, "model": str(resolve(name))} for name in available()]
    checkpoints = [
        {
            "name": named.name,
            "description": named.description,
            "licence": named.licence,
            "credit": named.credit,
            "origin": named.pin,
            "parameters": named.parameters,
            "disk_bytes": named.disk_bytes,
            "memory_bytes": named.memory_bytes(),
            "pulled": is_pulled(named),
            "path": str(location(named)),
        }
        for named in CHECKPOINTS.values()
    ]
    if as_json:
        shell.print_json({"sources": sources, "checkpoints": checkpoints, "models": runs})
        return
    text = _table("Text to train on (data.sources)", "Name", "What it is", "Licence and credit")
    for source in sources:
        text.add_row(source["name"], source["description"], f"{source['licence']}; {source['credit']}")
    mine = _table("Models of your runs", "Name", "Folder")
    for row in runs:
        mine.add_row(row["name"], row["model"])
    known = _table("Checkpoints to talk to", "Name", "What it is", "Disk", "Pulled", "Licence")
    known.columns[0].min_width = max(map(len, CHECKPOINTS))
    for row in checkpoints:
        pulled = "yes" if row["pulled"] else "no"
        known.add_row(row["name"], row["description"], f"{row['disk_bytes'] / 1e9:.1f} GB", pulled, row["licence"])
    shell.console().print(text)
    shell.console().print(known)
    shell.console().print(mine if runs else "No run under runs/ has a model yet: tael run recipes/demo.toml")


@app.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A checkpoint or a source that `tael models` lists.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Fetch a large checkpoint without asking.")] = False,
) -> None:
    """Fetch a named checkpoint or text into the cache, checked against its known checksum."""
    from tael.data import SOURCES, fetch
    from tael.loading import pull_model
    from tael.weights import CHECKPOINTS

    if name in CHECKPOINTS:
        place, named = pull_model(name, yes), CHECKPOINTS[name]
        shell.console(stderr=True).print(
            f"{name}: {named.description}; {named.licence}; {named.credit}", highlight=False, soft_wrap=True
        )
        print(place)
        return
    if name not in SOURCES:
        raise TaelError(f"unknown name '{name}'{did_you_mean(name, [*SOURCES, *CHECKPOINTS])}")
    console = shell.console(stderr=True)
    with interruptible(), console.status(f"looking for {name}") as status:
        folder = fetch(name, lambda line: status.update(line) if console.is_terminal else console.print(line))
    info = SOURCES[name]
    console.print(f"{name}: {info.description}; {info.licence}; {info.credit}", highlight=False, soft_wrap=True)
    print(folder)


class Layout(StrEnum):
    """Forms a model can be written in."""

    hf = "hf"
    gguf = "gguf"


class Precision(StrEnum):
    """Types weights can be stored in."""

    bf16 = "bf16"
    fp32 = "fp32"


class Quant(StrEnum):
    """Types of a GGUF file's matrices."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder, a .gguf file, a run, or a checkpoint.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder, or the .gguf file, to write.")],
    to: Annotated[Layout, typer.Option(help="hf: config.json, safetensors, tokenizer.json. gguf: for llama.cpp.")],
    dtype: Annotated[
        Precision | None, typer.Option(help="hf: type of the weights; as they are unless given.")
    ] = None,
    quant: Annotated[Quant | None, typer.Option(help="gguf: type of the matrices; f16 unless given.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
) -> None:
    """Write a model in a layout other tools read."""
    from tael.data import load_gguf_tokenizer, load_tokenizer
    from tael.loading import find_model
    from tael.weights import is_gguf

    place = find_model(source)
    if (quant if to is Layout.hf else dtype) is not None:
        raise TaelError(f"--{'quant' if to is Layout.hf else 'dtype'} does not go with --to {to.value}")
    if target.exists() and not overwrite:
        raise TaelError(f"{target}: is there already; name another place, or --overwrite to replace it")
    if is_gguf(place):
        tokenizer = load_gguf_tokenizer(place)
    else:
        tokenizer = load_tokenizer(place) if (place / "tokenizer.json").is_file() else None
    with interruptible():
        if to is Layout.gguf:
            _write_gguf(place, target, tokenizer, quant or Quant.f16)
        else:
            _write_folder(place, target, tokenizer, dtype)
    print(target)


def _write_gguf(place: Path, target: Path, tokenizer: Tokenizer | None, quant: Quant) -> None:
    from tael.weights import save_gguf

    if target.suffix.lower() != ".gguf" or target.is_dir():
        raise TaelError(f"{target}: must be a file that ends in .gguf")
    if tokenizer is None:
        raise TaelError(f"{place}: has no tokenizer.json, without which llama.cpp loads no model")
    save_gguf(tael.load_model(place), target, tokenizer, quant.value)


def _write_folder(place: Path, target: Path, tokenizer: Tokenizer | None, dtype: Precision | None) -> None:
    import torch

    from tael.weights import is_gguf, save_model

    if dtype is None and not is_gguf(place):
        stored = json.loads((place / "config.json").read_text(encoding="utf-8"))
        dtype = Precision.bf16 if (stored.get("torch_dtype") or stored.get("dtype")) == "bfloat16" else None
    kind = torch.bfloat16 if dtype is Precision.bf16 else torch.float32
    save_model(tael.load_model(place, dtype=kind), target, tokenizer, kind)


# ------------------------------------------------------------------ using them

app.command()(using.complete)
app.command()(using.chat)
app.command()(using.bench)
app.command("eval")(using.evaluate)
app.command()(commands.serve)
app.add_typer(keys.app, name="keys")
app.command()(planning.plan)
app.command()(costing.costs)
app.command()(comparing.compare)


# --------------------------------------------------------------------- helpers


def _table(title: str, *columns: str):
    from rich import box
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))


def _ledger_beside(run: Path) -> Path:
    return run.resolve().parent / "ledger.sqlite"
