"""`tael compare`, as the command line takes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tael import shell
from tael.errors import TaelError
from tael.interrupts import interruptible
from tael.shell import Json

if TYPE_CHECKING:
    from rich.table import Table

    from tael.compare import Contestant, Curve, Point, Standings
    from tael.evals.statistics import Spread
    from tael.recipe import Recipe

DOCUMENTS = 64


def compare(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE RECIPE...", help="Two recipes or more.")],
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Trainings of each, with seeds 0, 1, ...")] = 3,
    baseline: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose last quality is the target; the first's unless given.")
    ] = None,
    target: Annotated[
        float | None, typer.Option(min=0, metavar="BITS", help="The target itself, in held-out bits per byte.")
    ] = None,
    documents: Annotated[int, typer.Option(min=1, help="Held-out documents of an evaluation.")] = DOCUMENTS,
    threads: Annotated[
        int, typer.Option(min=1, help="1 counts processor time, which other work hardly moves; more need idle cores.")
    ] = 1,
    price: Annotated[
        float | None, typer.Option(min=0, metavar="DOLLARS", help="An hour of the machine; as the first recipe says.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a value of every recipe.")
    ] = None,
    run_dir: Annotated[
        Path, typer.Option(help="Where finished trainings are kept; a rerun goes on from there.")
    ] = Path("runs/compare"),
    as_json: Json = False,
) -> None:  # fmt: skip
    """Train recipes in turns on one text, and say what each spent to reach the first one's quality."""
    from tael.compare.recipes import check_comparable
    from tael.preparation import check_recipe
    from tael.recipe import load_recipe

    loaded = [load_recipe(path, overrides or []) for path in recipes]
    check_comparable(loaded)
    names = [recipe.name for recipe in loaded]
    if baseline is not None and baseline not in names:
        from tael.errors import did_you_mean

        raise TaelError(f"--baseline: no recipe is named '{baseline}'{did_you_mean(baseline, names)}")
    for recipe in loaded:
        check_recipe(recipe)
    with interruptible():
        curves = _curves(loaded, list(range(seeds)), documents, threads, run_dir)
    _say(curves, loaded, baseline or (names[0] if target is None else None), target, price, run_dir, as_json)


def _curves(recipes: list[Recipe], seeds: list[int], documents: int, threads: int, run_dir: Path) -> list[Curve]:
    """Every recipe's training with every seed; those in the folder's record are not run again."""
    import torch

    from tael.compare import Record, race
    from tael.compare.recipes import RecipeContestant, corpus_folder, setup_of
    from tael.preparation import prepare
    from tael.train.parallel import Parallel

    torch.set_num_threads(threads)
    record = Record(run_dir / "curves.jsonl")
    prepared = prepare(recipes[0], corpus_folder(run_dir, recipes[0]), Parallel(torch.device("cpu")), shell.remark)
    held_out = prepared.held_out()[:documents]

    def known(recipe: Recipe, seed: int) -> Curve | None:
        return record.find(recipe.name, seed, setup_of(recipe, len(held_out), threads))

    for seed in seeds:
        missing = [recipe for recipe in recipes if known(recipe, seed) is None]
        if missing:
            shell.remark(f"seed {seed}: {', '.join(recipe.name for recipe in missing)} in turns")
            folder = run_dir / "trainings"
            contestants = [
                RecipeContestant(recipe, seed, prepared, held_out, folder / f"{recipe.name}-{seed}")
                for recipe in missing
            ]
            record.add(race(contestants, _progress))
    found = [known(recipe, seed) for recipe in recipes for seed in seeds]
    return [curve for curve in found if curve is not None]


def _progress(contestant: Contestant, point: Point) -> None:
    speed = f"{point.tokens / point.seconds:,.0f} tokens/s" if point.seconds else ""
    shell.remark(
        f"{contestant.name} {point.step}/{contestant.steps}: {point.bits_per_byte:.3f} bits per byte, "
        f"{point.seconds:.0f} s, {speed}"
    )


def _say(
    curves: list[Curve], recipes: list[Recipe], baseline: str | None, target: float | None, price: float | None,
    run_dir: Path, as_json: bool,
) -> None:  # fmt: skip
    import os

    from tael.compare import standings
    from tael.compare.picture import curves_picture
    from tael.cost.kept import price_now
    from tael.files import write_whole

    hour = price_now(recipes[0]) if price is None else price
    share = min(1.0, curves[0].threads / (os.cpu_count() or 1))
    result = standings(curves, hour * share, baseline, target)
    picture = run_dir / "compare.svg"
    write_whole(picture, curves_picture(curves, result.target))
    if as_json:
        shell.print_json(result.to_dict() | {"picture": str(picture)})
        return
    console = shell.console()
    console.print(standings_table(result), highlight=False)
    console.print(f"curves: {picture}", highlight=False, soft_wrap=True, markup=False)


def standings_table(result: Standings) -> Table:
    """What each spent to the target, as a table for the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from tael.cost import units

    named = f"where {result.baseline} ends" if result.baseline else "given"
    clock = "processor time, one thread" if result.clock == "processor" else f"{result.threads} threads"
    title = f"To {result.target:.3f} bits per byte ({named})\n{clock}; {units.money(result.dollars_per_hour)} an hour"
    table = Table(
        title=Text(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    heads = ("Recipe", "Size", "Speed", "Ends at", "Time", "Tokens", "Cost", "Cheaper", "Cache\na token")
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index == 0 else "right")
    for row in result.rows:
        missed = f"{row.reached} of {row.seeds}"
        size = units.count(row.parameters_total)
        if row.parameters_active != row.parameters_total:
            size += f" ({units.count(row.parameters_active)})"
        table.add_row(
            Text(row.name),
            size,
            units.count(row.tokens_per_second) + "/s",
            spread(row.final, "{:.3f}"),
            missed if row.seconds is None else spread(row.seconds, "{:.0f} s"),
            "" if row.tokens is None else units.count(row.tokens.median),
            "" if row.dollars is None else units.money(row.dollars),
            "" if row.cheaper is None else spread(row.cheaper, "{:.1f}x"),
            units.size(row.cache_bytes_per_token),
        )
    return table


def spread(values: Spread, form: str) -> str:
    """The median and, where there is one, the range on a line of its own."""
    middle = form.format(values.median)
    if form.format(values.low) == form.format(values.high):
        return middle
    return f"{middle}\n{form.format(values.low).rstrip(' sx')}-{form.format(values.high).rstrip(' sx')}"
