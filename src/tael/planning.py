"""`tael plan`, as the command line takes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tael import shell
from tael.errors import TaelError
from tael.shell import Json

if TYPE_CHECKING:
    from tael.cost.plan_request import Request

_RUN, _CHIP, _SERVING = "The run", "What if the chip were different", "Serving"


def plan(
    target: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL|RECIPE]", help="A published model (--list), a config.json, or a recipe."),
    ] = None,
    chip: Annotated[str, typer.Option(help="Which chip; --list names them.", rich_help_panel=_RUN)] = "H800",
    chips: Annotated[
        int | None, typer.Option(help="How many; enough for two months unless given.", rich_help_panel=_RUN)
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Training tokens; the model's own unless given.", rich_help_panel=_RUN)
    ] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens of a sequence.", rich_help_panel=_RUN)] = None,
    batch_tokens: Annotated[float | None, typer.Option(help="Tokens of one batch.", rich_help_panel=_RUN)] = None,
    precision: Annotated[
        str | None, typer.Option(help="bf16, fp8 or fp4: type of the matrix products.", rich_help_panel=_RUN)
    ] = None,
    price: Annotated[
        float | None, typer.Option(metavar="DOLLARS", help="What an hour of a chip costs.", rich_help_panel=_RUN)
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=N,...", help="Use this layout: data, tensor, pipeline, ... as --json names them.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(metavar="GB/S", help="The link's speed, one direction, whatever it is.", rich_help_panel=_CHIP),
    ] = None,
    cut_link: Annotated[
        float | None, typer.Option(metavar="GB/S", help="Cut the link, one direction.", rich_help_panel=_CHIP)
    ] = None,
    cap_tpp: Annotated[
        float | None, typer.Option(metavar="TPP", help="Cap total processing performance.", rich_help_panel=_CHIP)
    ] = None,
    without: Annotated[
        str | None, typer.Option(metavar="PRECISION", help="Take out fp8 or fp4.", rich_help_panel=_CHIP)
    ] = None,
    limits: Annotated[
        bool, typer.Option("--limits", help="What export limits cost, what DeepSeek's answers buy back.",
                           rich_help_panel=_CHIP),
    ] = False,
    serving_chips: Annotated[
        int | None, typer.Option(help="Chips of one serving unit.", rich_help_panel=_SERVING)
    ] = None,
    context: Annotated[float, typer.Option(help="Mean tokens in the cache.", rich_help_panel=_SERVING)] = 4096.0,
    speed: Annotated[
        float, typer.Option(help="Tokens a second that each reader gets at least.", rich_help_panel=_SERVING)
    ] = 20.0,
    price_list: Annotated[
        str | None,
        typer.Option(metavar="INPUT/OUTPUT", help="Dollars a million tokens you charge.", rich_help_panel=_SERVING),
    ] = None,
    measure_here: Annotated[
        bool, typer.Option("--measure-here", help="Recipe: time its steps on this machine for a minute first.")
    ] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Recipe: change a value of it.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="The models and chips known by name.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Predict time, memory and money of a training run, and of serving the model, before it costs anything."""
    from tael.cost import plan_views
    from tael.cost.plan_request import Request

    if listed:
        _say(plan_views.known(), plan_views.known_tables(), as_json)
        return
    if target is None:
        raise TaelError("plan what? Name a model (tael plan --list), a config.json or a recipe (recipes/demo.toml)")
    if target.endswith(".toml"):
        if chips is not None or tokens is not None:
            raise TaelError("a recipe says itself how much it trains, and runs here: --chips and --tokens do not go")
        _recipe(Path(target), overrides or [], measure_here, price, as_json)
        return
    if overrides or measure_here:
        raise TaelError("--set and --measure-here go with a recipe (a .toml file)")
    request = Request(
        target=target, chip=chip, chips=chips, tokens=tokens, sequence=sequence, batch_tokens=batch_tokens,
        precision=precision, price=price, layout=layout, link=link, cut_link=cut_link, cap_tpp=cap_tpp,
        without=without, serving_chips=serving_chips, context=context, speed=speed, price_list=price_list,
    )  # fmt: skip
    if limits:
        _limits(request, as_json)
        return
    answer = request.answer()
    _say(answer, plan_views.plan_tables(answer), as_json)


def _limits(request: Request, as_json: bool) -> None:
    from tael.cost import plan_views
    from tael.cost.what_if import answers, export_limits

    run = request.run()
    limits, bought = export_limits(run), answers(run)
    table = {"limits": [case.to_dict() for case in limits], "answers": [case.to_dict() for case in bought]}
    _say(
        {"model": run.shape.name, "chip": run.chip.name, **table},
        plan_views.limit_tables(run, limits, bought),
        as_json,
    )


def _recipe(path: Path, overrides: list[str], measured: bool, price: float | None, as_json: bool) -> None:
    from tael.cost import plan_views
    from tael.recipe import load_recipe

    recipe = load_recipe(path, overrides)
    import torch  # slow: check the recipe first

    from tael.cost.here import plan_recipe
    from tael.cost.kept import keep, price_now
    from tael.cost.prediction import Machine
    from tael.preparation import check_recipe, processor_name

    check_recipe(recipe)
    per_hour = price_now(recipe) if price is None else price
    plans = plan_recipe(recipe, measured=measured)
    kept = keep(recipe, plans, measured, Machine(processor_name(), torch.get_num_threads()))
    stages = [stage.to_dict(per_hour, recipe.price.watts) for stage in plans]
    answer = plan_views.recipe_answer(recipe.name, stages, per_hour, measured)
    _say({**answer, "kept": kept}, [plan_views.recipe_table(answer)], as_json)
    if kept and not as_json:
        shell.console().print("kept: the run's report will show it beside what is measured", highlight=False)


def _say(answer: dict[str, Any], tables: list[Any], as_json: bool) -> None:
    if as_json:
        shell.print_json(answer)
        return
    console = shell.console()
    for table in tables:
        console.print(table, highlight=False)
