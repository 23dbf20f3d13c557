"""The commands that use a model: complete, chat, bench, eval. `tael.cli` hangs them into the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tael import shell
from tael.errors import TaelError
from tael.interrupts import interruptible
from tael.shell import (
    Backend,
    BackendOption,
    Budget,
    Choice,
    Context,
    Device,
    Json,
    JsonObject,
    JsonSchema,
    MapExperts,
    MinP,
    Model,
    Penalty,
    Price,
    Quantize,
    Regex,
    Seed,
    SpeculateOption,
    Stop,
    Temperature,
    TopK,
    TopP,
)

if TYPE_CHECKING:
    from tael.cost.bookkeeping import StageCosts
    from tael.engine.constrain import Constraint
    from tael.evals.suites import Origin


def constraint(
    json_object: bool, json_schema: str | None, regex: str | None, choice: list[str] | None
) -> Constraint | None:
    """The one constraint that the options name; raises TaelError for two, and for one that is malformed."""
    from tael.engine.constrain import Constraint

    given = [json_object, json_schema is not None, regex is not None, bool(choice)]
    if sum(given) > 1:
        raise TaelError("give one of --json-object, --json-schema, --regex and --choice, not several")
    if json_object:
        return Constraint.json_object()
    if json_schema is not None:
        return Constraint.json_schema(shell.text_or_file(json_schema))
    if regex is not None:
        return Constraint.regex(regex)
    return Constraint.choice(choice) if choice else None


def complete(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from; - reads standard input.")],
    max_tokens: Annotated[int | None, typer.Option(min=1, help="At most this many tokens; 128 unless given.")] = None,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    thinking_budget: Budget = None,
    json_object: JsonObject = False,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    choice: Choice = None,
    device: Device = "auto",
    quantize: Quantize = None,
    backend: BackendOption = Backend.auto,
    speculate: SpeculateOption = None,
    map_experts: MapExperts = False,
    context: Context = None,
    price: Price = shell.PRICE,
    as_json: Json = False,
) -> None:
    """Go on from a text, as the model would."""
    from tael.chat import Reply
    from tael.engine import SamplingParams
    from tael.loading import load

    text = sys.stdin.read() if prompt == "-" else prompt
    form = constraint(json_object, json_schema, regex, choice)
    options = {"device": device, "quantize": quantize, "backend": backend.value, "map_experts": map_experts}
    loaded = load(model, **options, speculate=speculate, notify=shell.remark)
    tokenizer = loaded.tokenizer
    ids = [*tokenizer.start_ids, *tokenizer.encode(text)]
    most = loaded.model.config.max_position_embeddings
    room = (loaded.context(context) if context else most) - len(ids)
    params = SamplingParams(
        max_tokens or max(1, min(128, room)),
        temperature,
        top_p,
        seed,
        tokenizer.stop_ids,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        thinking_budget=thinking_budget,
        loop_guard=True,
        constraint=form,
    )
    if context and params.max_tokens > room:
        raise TaelError(f"the prompt has {len(ids)} tokens; with --max-tokens that is more than --context {context}")
    engine = loaded.engine(min(most, len(ids) + params.max_tokens))  # it will say what does not fit
    reply, pieces = Reply(), []
    with interruptible():
        if not as_json:
            shell.write(text)
        for event in reply.follow(engine.stream(ids, params)):
            pieces.append(event.text)
            if not as_json:
                shell.write(event.text)
    if not as_json:
        shell.write("\n")
        shell.remark(reply.line(price))
        return
    answer = {"text": "".join(pieces), "tokens": reply.tokens, "finish_reason": reply.ending}
    shell.print_json({"model": model, "prompt": text, **answer, **reply.figures(price)})


def chat(
    model: Model,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; 512, or half the context.")] = None,
    system: Annotated[str, typer.Option(help="What the model is told before the conversation.")] = "",
    think: Annotated[str, typer.Option(help="on, off, or auto: as the model likes.")] = "auto",
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    thinking_budget: Budget = None,
    json_object: JsonObject = False,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    choice: Choice = None,
    device: Device = "auto",
    quantize: Quantize = None,
    backend: BackendOption = Backend.auto,
    speculate: SpeculateOption = None,
    map_experts: MapExperts = False,
    context: Context = None,
    price: Price = shell.PRICE,
) -> None:
    """Talk to a model in the terminal; lines on standard input work too."""
    from tael.chat import Conversation, Screen, command, talk
    from tael.engine import SamplingParams
    from tael.loading import load

    form = constraint(json_object, json_schema, regex, choice)
    options = {"device": device, "quantize": quantize, "backend": backend.value, "map_experts": map_experts}
    loaded = load(model, **options, speculate=speculate, notify=shell.remark)
    size = loaded.context(context)
    params = SamplingParams(
        max_tokens or min(512, size // 2),
        temperature,
        top_p,
        seed,
        loaded.tokenizer.stop_ids,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        thinking_budget=thinking_budget,
        loop_guard=True,
        constraint=form,
    )
    engine, tokenizer = loaded.engine(size), loaded.tokenizer
    conversation = Conversation(engine, tokenizer, params, system=system, context=size, dollars_per_hour=price)
    command(conversation, f"/think {think}")
    out = shell.console()
    with interruptible():
        screen = Screen(out, out if out.is_terminal else shell.console(stderr=True))
        talk(conversation, screen, f"{loaded.greeting}. /help lists the commands, Ctrl-D leaves.")


def bench(
    model: Model,
    rounds: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="A round of short passes: a first impression.")] = False,
    device: Device = "auto",
    quantize: Quantize = None,
    backend: BackendOption = Backend.auto,
    map_experts: MapExperts = False,
    context: Context = None,
    as_json: Json = False,
) -> None:
    """Measure a model's speed here: prefill, decode, drafts, cache, and how near memory's own speed it comes."""
    from tael.benchmark import Plan, measure, results_table
    from tael.loading import load

    options = {"device": device, "quantize": quantize, "backend": backend.value, "map_experts": map_experts}
    loaded = load(model, **options, speculate="off", notify=shell.remark)
    plan = Plan.of(loaded.context(context), rounds, quick)
    console = shell.console(stderr=True)
    with interruptible(), console.status("measuring") as status:
        found = measure(
            loaded.model,
            loaded.tokenizer,
            loaded.settings,
            plan,
            progress=lambda line: status.update(line) if console.is_terminal else None,
            warn=shell.remark,
        )
    if as_json:
        shell.print_json({"model": model, "path": str(loaded.place), **found.as_dict()})
    else:
        shell.console().print(results_table(found, f"{model}"))


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
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """Measure a model: exact accuracy on held-out problems, bits per byte on held-out text."""
    import tael
    from tael.evals import suites
    from tael.loading import find_model, load_transformer

    names = [name for given in suite or suites.SUITES for name in given.split(",")]
    suites.check_suites(names)
    tasks = [suites.parse_task(each) for each in task or []]
    folder = find_model(model)
    transformer = load_transformer(folder, device, quantize, notify=shell.remark)
    tokenizer = tael.load_tokenizer(folder)
    origin = suites.find_origin(folder)
    books = _books(folder, origin)
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
            with books.evaluation() as spent:
                found, work = suites.reasoning_rows(transformer, tokenizer, asked, problems, chosen, length)
                spent.tokens, spent.flops = work
        else:
            length = origin.pretraining().sequence_length if origin else 256
            read = _text_to_read(model, text, origin)
            with books.evaluation() as spent:
                found, work = suites.text_rows(transformer, tokenizer, read, length)
                spent.tokens, spent.flops = work
        rows += found
    if as_json:
        shell.print_json(rows)
    else:
        title = f"{folder}, {quantize.value}" if quantize else f"{folder}"
        shell.console().print(suites.results_table(rows, title))


def _books(folder: Path, origin: Origin | None) -> StageCosts:
    """Where the evaluation goes down: with its run's costs, or under the model's own name in runs/."""
    import torch

    from tael.cost.bookkeeping import Costs
    from tael.cost.ledger import EVALUATION, Ledger
    from tael.cost.rundata import run_name
    from tael.preparation import LEDGER
    from tael.recipe import PriceSettings
    from tael.train import Parallel

    name = run_name(origin.directory) if origin else folder.stem
    runs = origin.directory.parent if origin else Path("runs")
    price = origin.recipe.price if origin else PriceSettings()
    return Costs(price, name, Ledger(runs / LEDGER), Parallel(torch.device("cpu"))).stage("eval", EVALUATION, 0.0)


def _text_to_read(model: str, path: str | None, origin: Origin | None) -> list[Any]:
    from tael.data import documents
    from tael.recipe import DataSettings

    found = list(documents(DataSettings(path=path))) if path else (origin.held_out() if origin else [])
    if not found:
        raise TaelError(f"{model}: no run kept text out for it; name some with --text FILE")
    return found
