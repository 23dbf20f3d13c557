"""`tael serve`, as the command line takes it."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tael import shell
from tael.errors import TaelError
from tael.shell import Backend, BackendOption, Context, Device, MapExperts, Quantize, SpeculateOption

if TYPE_CHECKING:
    from tael.serve.running import Server
    from tael.serve.service import Service
    from tael.serve.settings import ModelSpec, ServeSettings

_WHO, _LIMITS, _PRICES = "Who may ask", "Limits", "Prices"


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="What to serve, or NAME=MODEL; all models of this machine if none."
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; this machine alone unless given.", rich_help_panel=_WHO)
    ] = None,
    port: Annotated[int | None, typer.Option(help="8000 unless given; 0: any that is free.")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with these settings and more.")] = None,
    state: Annotated[
        Path | None, typer.Option(help="Where keys, requests and conversations are kept.", show_default=False)
    ] = None,
    price: Annotated[
        str | None,
        typer.Option(
            metavar="HIT/MISS/OUTPUT",
            help="Dollars a million tokens.",
            show_default=False,
            rich_help_panel=_PRICES,
        ),
    ] = None,
    prices: Annotated[
        Path | None,
        typer.Option(help="A price list: tokens by model, date and time of day; hours.", rich_help_panel=_PRICES),
    ] = None,
    machine: Annotated[
        str | None, typer.Option(help="This machine among the list's hours.", rich_help_panel=_PRICES)
    ] = None,
    dollars_per_hour: Annotated[
        float | None,
        typer.Option(min=0, help="What an hour of this machine costs; 0.08 unless given.", rich_help_panel=_PRICES),
    ] = None,
    watts: Annotated[
        float | None,
        typer.Option(min=0, help="Its draw while it works, to estimate energy.", rich_help_panel=_PRICES),
    ] = None,
    thinking: Annotated[str | None, typer.Option(help="on, off or auto, where a request does not say.")] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.1, help="GB for models and caches.", rich_help_panel=_LIMITS)
    ] = None,
    max_queue: Annotated[
        int | None, typer.Option(min=1, help="Requests in the house; more get 429.", rich_help_panel=_LIMITS)
    ] = None,
    share_prefixes: Annotated[
        bool, typer.Option("--share-prefixes", help="One prefix cache for all keys.", rich_help_panel=_WHO)
    ] = False,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="A web page elsewhere that may ask.", rich_help_panel=_WHO)
    ] = None,
    log: Annotated[bool, typer.Option("--log/--no-log", help="A line of JSON a request on stderr.")] = True,
    log_contents: Annotated[bool, typer.Option("--log-contents", help="With what was asked and answered.")] = False,
    pages: Annotated[bool, typer.Option("--pages/--no-pages", help="Chat, runs and plan in the browser.")] = True,
    open_page: Annotated[bool, typer.Option("--open", help="Open the browser.")] = False,
    context: Context = None,
    device: Device = "auto",
    quantize: Quantize = None,
    backend: BackendOption = Backend.auto,
    speculate: SpeculateOption = None,
    map_experts: MapExperts = False,
) -> None:
    """Serve models to programs (DeepSeek's, OpenAI's and Anthropic's APIs) and people (pages)."""
    from tael.serve.journal import Journal
    from tael.serve.running import serve as run
    from tael.serve.settings import load_settings

    how = {
        "context": context,
        "device": device if device != "auto" else None,
        "quantize": quantize.value if quantize else None,
        "backend": backend.value if backend != Backend.auto else None,
        "speculate": speculate.value if speculate else None,
        "map_experts": map_experts or None,
        "price": price,
        "thinking": thinking,
    }
    options = {
        "host": host,
        "port": port,
        "state": state,
        "prices": prices,
        "machine": machine,
        "dollars_per_hour": dollars_per_hour,
        "watts": watts,
        "memory": int(memory * 1e9) if memory else None,
        "max_queue": max_queue,
        "share_prefixes": share_prefixes or None,
        "allow_origins": tuple(allow_origin) if allow_origin else None,
        "log_contents": log_contents or None,
        "pages": None if pages else False,
        "models": _specs(models, config, {key: value for key, value in how.items() if value is not None}),
    }
    settings = load_settings(config, **options)
    if not settings.models:
        raise TaelError(
            "there is no model to serve: name one, as in `tael serve smollm2-135m`, or train one with `make demo`"
        )
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    def started(service: Service, server: Server, port: int) -> None:
        _greet(settings, service, port)
        if open_page:
            import webbrowser

            webbrowser.open(_url(settings, port))

    asyncio.run(run(settings, journal=Journal(sys.stderr if log else None), started=started))


def _specs(models: list[str] | None, config: Path | None, how: dict[str, Any]) -> tuple[dict[str, Any], ...] | None:
    """What is to be served; None: what the file says. Raises TaelError for options that would be passed over."""
    if config is not None and not models:
        if how:
            option = "--" + next(iter(how)).replace("_", "-")
            raise TaelError(f"{option}: with --config it belongs to a model; put it into [[models]] of {config}")
        return None
    return tuple(spec | how for spec in (named(models) if models else everything()))


def named(models: list[str]) -> list[dict[str, Any]]:
    """Specs of what the command line names: MODEL or NAME=MODEL."""
    specs = []
    for each in models:
        name, _, source = each.rpartition("=")
        specs.append({"name": name or _short(source), "model": source})
    return specs


def everything() -> list[dict[str, Any]]:
    """Specs of the finished runs, newest first, and of pulled checkpoints; the first is loaded at once."""
    from tael.weights.store import CHECKPOINTS, RUNS, available, is_pulled

    runs = sorted(available(RUNS), key=lambda name: -(RUNS / name).stat().st_mtime)
    pulled = [name for name, checkpoint in CHECKPOINTS.items() if is_pulled(checkpoint)]
    return [{"name": name, "model": name, "preload": place == 0} for place, name in enumerate([*runs, *pulled])]


def _short(source: str) -> str:
    """runs/demo -> demo, model.gguf -> model."""
    path = Path(source)
    return path.stem if path.suffix == ".gguf" else path.name or source


def _url(settings: ServeSettings, port: int) -> str:
    host = "localhost" if settings.is_local or settings.host in ("0.0.0.0", "::") else settings.host
    return f"http://{host}:{port}"


def _greet(settings: ServeSettings, service: Service, port: int) -> None:
    """Where it is, what it serves, and how to ask."""
    url = _url(settings, port)
    service.host.notify = shell.remark
    if settings.pages:
        shell.remark(f"chat:  {url}")
    shell.remark(f"API:   {url}/v1 (OpenAI, DeepSeek), {url}/anthropic (Anthropic)")
    for spec in settings.models:
        shell.remark(f"model: {_line(spec)}")
    if not settings.is_local:
        shell.remark("keys:  needed; `tael keys list` shows them")
    shell.remark("Ctrl-C stops it.")


def _line(spec: ModelSpec) -> str:
    also = f" (also {', '.join(spec.aliases)})" if spec.aliases else ""
    return f"{spec.name}{also}{'' if spec.preload else ', loaded when asked for'}"
