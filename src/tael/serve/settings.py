"""How the server is set up: options of `tael serve` over a TOML file.

[server]
port = 8000
share_prefixes = false
prices = "recipes/prices/list.toml"
machine = "H100"

[[models]]
name = "assistant"
model = "runs/demo"
aliases = ["deepseek-chat", "gpt-4o-mini"]
price = "0.028/0.28/0.42"
"""

from __future__ import annotations

import ipaddress
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tael.errors import TaelError, did_you_mean
from tael.recipe import PriceSettings
from tael.serve.prices import DEFAULT_PRICE, Price

Thinking = Literal["on", "off", "auto"]
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\s\x00-\x1f]+$")]


class ModelSpec(BaseModel):
    """A model that may be served, and how it runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: Name
    model: str
    """What `tael chat` takes: a folder, a .gguf file, a run, a checkpoint's name."""
    aliases: tuple[Name, ...] = ()
    price: Price = DEFAULT_PRICE
    """Dollars a million tokens: "hit/miss/output". Holds over a price list."""
    priced_as: str | None = None
    """Its name among the [[tokens]] of the price list; the model's own name unless said."""
    thinking: Thinking = "on"
    """Where a request says nothing; models that cannot think never do."""
    effort_in_prompt: bool = False
    """Tell the model of the reasoning effort, as DeepSeek's V4 checkpoints expect; else it sets a budget."""
    context: int | None = Field(None, ge=16)
    """Tokens of prompt and answer; the model's, but at most 8,192, unless said."""
    sequences: int = Field(4, ge=1, le=1024)
    """Contexts the cache has room for, memory permitting; more run while their prompts are short."""
    device: str = "auto"
    quantize: str | None = None
    backend: str = "auto"
    speculate: str | None = None
    map_experts: bool = False
    preload: bool = True
    """Load it when the server starts; else at the first request."""

    @field_validator("price", mode="before")
    @classmethod
    def _price(cls, value: Any) -> Any:
        return Price.parse(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_price(self) -> ModelSpec:
        if self.priced_as is not None and "price" in self.model_fields_set:
            raise ValueError("give price or priced_as, not both")
        return self


class ServeSettings(BaseModel):
    """What holds for the whole server. Sizes in bytes, times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    models: tuple[ModelSpec, ...] = ()
    state: Path | None = None
    """Where keys, requests and conversations are kept; ~/.local/share/tael unless said."""
    runs: Path = Path("runs")
    recipes: Path = Path("recipes")
    prices: Path | None = None
    """A price list (docs/cost.md): what tokens cost by model, date and time of day, and what this machine costs."""
    machine: str | None = None
    """This machine's name among the list's [[hour]]."""
    dollars_per_hour: float = Field(PriceSettings().dollars_per_hour, ge=0, le=1e15, allow_inf_nan=False)
    """What an hour of this machine costs, where no `machine` says so."""
    watts: float | None = Field(None, gt=0, le=1e12, allow_inf_nan=False)
    """Average draw in watts while it works, for an estimate of energy."""
    memory: int | None = Field(None, ge=1)
    """Bytes that loaded models and their caches may take; three quarters of the machine's memory unless said."""
    max_queue: int = Field(256, ge=1)
    """Requests in the house; more are sent away with 429."""
    max_body: int = Field(16 * 1024 * 1024, ge=1024)
    max_choices: int = Field(16, ge=1)
    """Largest `n`."""
    keep_alive: float = Field(10.0, gt=0)
    """After so many seconds without a token a stream carries a comment, so that nobody hangs up."""
    grace: float = Field(15.0, ge=0)
    """When the server stops, running answers have so long to finish; then they are returned as they are."""
    share_prefixes: bool = False
    """Let all keys share the prefix cache: cheaper, but who times answers can learn what others asked."""
    log_contents: bool = False
    allow_origins: tuple[str, ...] = ()
    """Other web pages that may call the API from a browser."""
    pages: bool = True

    @property
    def is_local(self) -> bool:
        """Only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check(self) -> None:
        """Raise TaelError where names collide, or two settings say the same."""
        if self.machine is not None and self.prices is None:
            raise TaelError("serve: machine is a name in a price list, and no list is given (--prices)")
        if self.machine is not None and "dollars_per_hour" in self.model_fields_set:
            raise TaelError("serve: give machine or dollars_per_hour, not both")
        seen: dict[str, str] = {}
        for spec in self.models:
            for name in (spec.name, *spec.aliases):
                if seen.setdefault(name, spec.name) != spec.name:
                    raise TaelError(f"serve: two models answer to the name '{name}'")


def load_settings(path: Path | None, **options: Any) -> ServeSettings:
    """The file's settings with `options` (None: not given) put over them. Raises TaelError naming the key."""
    values: dict[str, Any] = {}
    if path is not None:
        try:
            with path.open("rb") as file:
                read = tomllib.load(file)
        except OSError as error:
            raise TaelError(f"{path}: {error.strerror or error}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise TaelError(f"{path}: is not TOML: {error}") from None
        for key in read:
            if key not in ("server", "models"):
                raise TaelError(f"{path}: unknown table [{key}]{did_you_mean(key, ('server', 'models'))}")
        values = {**read.get("server", {}), "models": tuple(read.get("models", ()))}
    values |= {key: value for key, value in options.items() if value is not None}
    try:
        settings = ServeSettings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        known = (*ServeSettings.model_fields, *ModelSpec.model_fields)
        hint = did_you_mean(str(first["loc"][-1]), known) if first["type"] == "extra_forbidden" else ""
        message = first["msg"].removeprefix("Value error, ")
        raise TaelError(f"{path or 'serve'}: {where}: {message}{hint}") from None
    except TaelError as error:
        raise TaelError(f"{path or 'serve'}: {error}") from None
    settings.check()
    return settings
