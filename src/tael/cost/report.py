"""One self-contained page about a run: what it learned, how, and what it cost.

The page makes no request to anywhere: plotly.js stands in it, and a content security policy forbids all loading
and every script but the page's own two (by hash). Texts of models and data are escaped by jinja2; figures are
JSON in data blocks with `<` escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tael.cost import charts, units
from tael.cost.compared import Compared, compare
from tael.cost.ledger import Ledger, Total
from tael.cost.prediction import MEMORY_NOTE, Prediction, read_prediction
from tael.cost.runcosts import evaluation_total, stage_totals, sum_totals
from tael.cost.rundata import MODES, RunRecord, Sample, StageRecord, number, read_accuracy, read_run
from tael.cost.tables import cost_cells
from tael.errors import TaelError
from tael.evals.statistics import Accuracy
from tael.files import write_whole

MAX_PAIRS = 12
MAX_CHARACTERS = 4000


@dataclass(frozen=True)
class Figure:
    """A chart with its words: `summary` is the text alternative and stands under the chart."""

    id: str
    title: str
    summary: str
    json: Markup
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fact:
    """One tile: a label, the value and a note below it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Pair:
    """The same prompt before and after training; either side may be missing."""

    mode: str
    prompt: str
    expected: str | None
    before: Sample | None
    after: Sample | None


@dataclass(frozen=True)
class CostLine:
    """One row of the cost table."""

    name: str
    status: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Predicted:
    """The section of what was predicted: how and when, its rows, and a chart of times once there is one."""

    how: str
    stages: list[Compared]
    figure: Figure | None
    memory_note: str = MEMORY_NOTE


def write_report(run_directory: Path, ledger: Ledger | None) -> Path:
    """Write `report.html` into the run directory and return its path; works at any point of a run.

    Costs come from `ledger`; for stages it does not hold yet (or when it is None) from the run's own files.
    Raises TaelError when the directory is missing or cannot be written.
    """
    run_directory = Path(run_directory)
    page = render(read_run(run_directory), ledger)
    target = run_directory / "report.html"
    try:
        write_whole(target, page)
    except OSError as error:
        raise TaelError(f"{target}: cannot be written: {error.strerror}") from None
    return target


def render(run: RunRecord, ledger: Ledger | None) -> str:
    """The page as text."""
    totals = stage_totals(run, ledger)
    whole = sum_totals(totals)
    prediction, prediction_note = read_prediction(run.directory)
    template_folder = files("tael.cost") / "templates"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((template_folder / "report.html.j2").read_text(encoding="utf-8"))
    plotly, script = _plotly(), (template_folder / "report.js").read_text(encoding="utf-8")
    palette = json.dumps(charts.PALETTE)
    return template.render(
        run=run,
        description=str(run.recipe.get("description") or ""),
        headline=headline(run, whole),
        facts=facts(run, whole),
        sections=figures(run),
        pairs=sample_pairs(run),
        costs=[CostLine(total.key, _status(run, total), cost_cells(total)) for total in totals],
        whole=cost_cells(whole),
        cost_note=_cost_note(whole, evaluation_total(run, ledger)),
        predicted=predicted(run, ledger, prediction),
        prediction_note=prediction_note,
        environment=sorted((str(key), _shown(value)) for key, value in run.environment.items()),
        plotly=Markup(plotly),
        script=Markup(script),
        palette=Markup(palette),
        hashes=[_hash(plotly), _hash(script)],
        clip=_clip,
    )


def headline(run: RunRecord, whole: Total) -> str:
    """As in `text: 1.70 bits per byte; reasoning: 31% after SFT → 89% after RL; total $0.012, 9.4 min`."""
    parts = []
    bits = bits_per_byte(run)
    if bits is not None:
        parts.append(f"text: {bits:.2f} bits per byte")
    before, after = reasoning(run)
    if before and after:
        parts.append(f"reasoning: {before.share:.0%} after SFT → {after.share:.0%} after RL")
    elif before or after:
        parts.append(f"reasoning: {(before or after or Accuracy(0, 1)).share:.0%} after {'SFT' if before else 'RL'}")
    parts.append(f"total {units.money(whole.dollars)}, {units.duration(whole.seconds)}")
    return "; ".join(parts) + ("" if run.finished else " so far")


def bits_per_byte(run: RunRecord) -> float | None:
    """Held-out bits per byte: the summary's, else the last evaluation's."""
    found = number(run.summary.get("bits_per_byte"))
    lines = [line for stage in run.of_kind("pretrain") for line in stage.evals]
    known = [value for value in (number(line.get("bits_per_byte")) for line in lines) if value is not None]
    return found if found is not None else (known[-1] if known else None)


def reasoning(run: RunRecord, mode: str = "free") -> tuple[Accuracy | None, Accuracy | None]:
    """Held-out accuracy (after SFT, after RL): the summary's, else the last evaluation's of those stages."""
    table = run.summary.get("accuracy")
    table = table if isinstance(table, dict) else {}
    found = [read_accuracy(table.get(side), mode) for side in ("before", "after")]
    for index, kind in enumerate(("sft", "rl")):
        lines = [value for stage in run.of_kind(kind) for _, value in stage.accuracies(mode)]
        if found[index] is None and lines:
            found[index] = lines[-1]
    return found[0], found[1]


def facts(run: RunRecord, whole: Total) -> list[Fact]:
    """The tiles under the title; those that are not known yet are left out."""
    tiles = []
    bits = bits_per_byte(run)
    if bits is not None:
        tiles.append(Fact("Held-out text", f"{bits:.2f}", "bits per byte, lower is better"))
    before, after = reasoning(run)
    last = after or before
    if last:
        low, high = last.interval()
        change = f"from {before.share:.0%} after SFT; " if before and after else ""
        tiles.append(Fact("Reasoning, held out", f"{last.share:.0%}", f"{change}95%: {low:.0%} to {high:.0%}"))
    tiles.extend(_model_facts(run.summary.get("model")))
    note = f"{units.duration(whole.seconds)} of training"
    return [*tiles, Fact("Cost" if run.finished else "Cost so far", units.money(whole.dollars), note)]


def _model_facts(model: Any) -> list[Fact]:
    model = model if isinstance(model, dict) else {}
    total, active = number(model.get("parameters_total")), number(model.get("parameters_active"))
    cache, plain = number(model.get("cache_bytes_per_token")), number(model.get("mha_cache_bytes_per_token"))
    tiles = []
    if total:
        tiles.append(
            Fact("Parameters", units.count(total), f"{units.count(active)} active a token" if active else "")
        )
    if cache:
        note = f"{plain / cache:.1f}× smaller than plain MHA ({units.size(plain)})" if plain else ""
        tiles.append(Fact("Cache a token", units.size(cache), note))
    return tiles


def figures(run: RunRecord) -> list[tuple[str, list[Figure]]]:
    """(section title, its figures) for all that has begun."""
    accuracy = _figure(
        "accuracy", "Held-out accuracy through training", charts.accuracy_figure(run), _accuracy_words(run)
    )
    losses = {
        kind: [_loss(stage, title) for stage in run.of_kind(kind)]
        for kind, title in (("pretrain", "Loss and held-out text"), ("sft", "Fine-tuning loss"))
    }
    rewards = [_reward(stage) for stage in run.of_kind("rl")]
    sections = [
        ("Reasoning", [*rewards, accuracy]),
        ("Pretraining", losses["pretrain"]),
        ("Supervised fine-tuning", losses["sft"]),
        ("Expert balance", _balance(run)),
    ]
    known = [(title, [figure for figure in group if figure]) for title, group in sections]
    return [(title, group) for title, group in known if group]


def _figure(name: str, title: str, figure: charts.Figure | None, summary: str, switch: bool = False) -> Figure | None:
    if figure is None:
        return None
    text = json.dumps(figure, allow_nan=False).replace("<", "\\u003c")
    return Figure(f"figure-{name}", title, summary, Markup(text), ("minutes", "tokens", "steps") if switch else ())


def _loss(stage: StageRecord, title: str) -> Figure | None:
    known = [value for value in charts.column(stage.steps, "loss") if value is not None]
    words = f"{stage.name}: training loss from {known[0]:.2f} to {known[-1]:.2f} nats a token" if known else ""
    bits = [value for value in charts.column(stage.evals, "bits_per_byte") if value is not None]
    if bits:
        span = f"from {bits[0]:.2f} to {bits[-1]:.2f}" if len(bits) > 1 else f"{bits[0]:.2f}"
        words += f"; held-out text {span} bits a byte"
    return _figure(f"loss-{_slug(stage.name)}", title, charts.loss_figure(stage), f"{words}.", switch=True)


def _reward(stage: StageRecord) -> Figure | None:
    def span(key: str, form: str) -> str:
        known = [value for value in charts.column(stage.steps, key) if value is not None]
        return f"from {known[0]:{form}} to {known[-1]:{form}}" if known else "unknown"

    words = (
        f"{stage.name}: reward {span('reward', '.0%')}, completion length {span('completion_tokens', '.0f')} tokens, "
        f"share of answers that think {span('think_rate', '.0%')}."
    )
    return _figure(f"reward-{_slug(stage.name)}", "Reward and length of thought", charts.reward_figure(stage), words)


def _accuracy_words(run: RunRecord) -> str:
    parts = []
    for mode in MODES:
        values = [value for stage in run.stages for _, value in stage.accuracies(mode)]
        if values:
            parts.append(f"{mode} {values[0].share:.0%} → {values[-1].share:.0%}")
    return f"First to last evaluation: {', '.join(parts)}. Bands are Wilson 95% intervals."


def _balance(run: RunRecord) -> list[Figure | None]:
    result: list[Figure | None] = []
    loaded = [stage for stage in run.stages if charts.expert_loads(stage)]
    if loaded:
        stage = loaded[-1]
        rows = charts.expert_loads(stage)
        words = (
            f"{stage.name}, last measurement: the busiest expert gets {max(map(max, rows)):.2f}×, the quietest "
            f"{min(map(min, rows)):.2f}× its fair share of tokens."
        )
        result.append(_figure("balance", "Load of each expert", charts.balance_figure(stage), words))
    words = "1 would be perfect balance; stages stand end to end."
    result.append(_figure("imbalance", "Busiest expert over time", charts.imbalance_figure(run), words))
    return result


def predicted(run: RunRecord, ledger: Ledger | None, prediction: Prediction | None) -> Predicted | None:
    """What plan.json says beside what was measured; None where there is none."""
    if prediction is None:
        return None
    stages = compare(run, ledger, prediction)
    begun = [(s.name, s.predicted.seconds, s.measured.seconds) for s in stages if s.measured is not None]
    words = "; ".join(
        f"{name} {units.duration(one)} predicted, {units.duration(other)} measured" for name, one, other in begun
    )
    figure = _figure("predicted", "Time, predicted and measured", charts.prediction_figure(begun), f"{words}.")
    return Predicted(prediction.how, stages, figure)


def sample_pairs(run: RunRecord) -> list[tuple[str, int, list[Pair]]]:
    """(stage, how many there are, the first MAX_PAIRS) of samples joined by mode and prompt, in file order."""
    groups = []
    for stage in run.stages:
        joined: dict[tuple[str, str], dict[str, Sample]] = {}
        for sample in stage.samples:
            joined.setdefault((sample.mode, sample.prompt), {})[sample.label] = sample
        pairs = [
            Pair(mode, prompt, next(iter(sides.values())).expected, sides.get("before"), sides.get("after"))
            for (mode, prompt), sides in joined.items()
        ]
        if pairs:
            groups.append((stage.name, len(pairs), pairs[:MAX_PAIRS]))
    return groups


def _status(run: RunRecord, total: Total) -> str:
    status = next((stage.status for stage in run.stages if stage.name == total.key), "finished")
    notes = [] if status == "finished" else [status]
    if total.entries > 1:
        notes.append(f"{total.entries} sittings")
    return ", ".join(notes)


def _cost_note(whole: Total, evaluation: Total | None) -> str:
    price = (
        "prices differ between entries"
        if whole.price_per_hour is None
        else (f"at {units.money(whole.price_per_hour)} an hour")
    )
    estimate = "; energy is estimated from average watts (~)" if whole.joules_estimated else ""
    part = ""
    if evaluation is not None:
        part = f"; {units.duration(evaluation.seconds)} and {units.money(evaluation.dollars)} of it are evaluation"
    return f"{price}{part}{estimate}; utilisation is against the matrix peak measured on this machine"


def _clip(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " […]"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _slug(text: str) -> str:
    return "".join(character if character.isascii() and character.isalnum() else "-" for character in text)


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _plotly() -> str:
    from plotly.offline import get_plotlyjs  # not needed to import this module, and slow to

    return get_plotlyjs()
