"""What `tael plan` and the plan page are asked for, turned into a run and its answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tael.cost.chips import BITS, Chip, find_chip, set_link
from tael.cost.layout import Layout
from tael.cost.named import NamedModel, find_model
from tael.cost.planner import Run, plan_training
from tael.cost.serving import Service, plan_serving
from tael.cost.shapes import shape_of
from tael.cost.what_if import GB, changed_chip
from tael.errors import TaelError, did_you_mean
from tael.model.config import ModelConfig

TOKENS_A_PARAMETER = 20.0
"""Training tokens for an active parameter where nobody says (Hoffmann et al. 2022)."""
DAYS = 55.0
"""Without --chips: as many as finish in about so long at 40% utilisation (V3's pre-training took 54 days)."""


@dataclass(frozen=True)
class Request:
    """A question to the planner, in the words of the command line."""

    target: str
    chip: str = "H800"
    chips: int | None = None
    tokens: float | None = None
    sequence: int | None = None
    batch_tokens: float | None = None
    precision: str | None = None
    price: float | None = None
    layout: str | None = None
    link: float | None = None
    cut_link: float | None = None
    cap_tpp: float | None = None
    without: str | None = None
    serving_chips: int | None = None
    context: float = 4096.0
    speed: float = 20.0
    price_list: str | None = None

    def model(self) -> NamedModel:
        """The named model, or one made of a config.json with what is usual filled in."""
        path = Path(self.target)
        if self.target.endswith(".json") or path.is_dir():
            config = ModelConfig.load(path)
            shape = shape_of(config, path.parent.name if path.suffix else path.name)
            active = shape.parameters(active=True, mtp=False)
            batch = 4e6 if active > 1e9 else 5e5
            tokens = TOKENS_A_PARAMETER * active
            source = f"{path}; tokens: {TOKENS_A_PARAMETER:g} an active parameter"
            return NamedModel(shape, tokens, 4096, batch, "bf16", source, float(shape.parameters()))
        return find_model(self.target)

    def hardware(self) -> Chip:
        chip = find_chip(self.chip)
        if self.link is not None:
            if self.cut_link is not None:
                raise TaelError("--link and --cut-link both say how fast the link is; give one")
            if not 0 < self.link < 1e9:
                raise TaelError(f"--link must be above 0 GB/s, not {self.link:g}")
            chip = set_link(chip, self.link * GB)
        return changed_chip(chip, self.cut_link, self.cap_tpp, self.without)

    def run(self) -> Run:
        """The run with every blank filled; raises TaelError for what cannot be."""
        model, chip = self.model(), self.hardware()
        precision = model.precision if self.precision is None else self.precision
        if precision not in BITS:
            raise TaelError(f"unknown precision '{precision}'{did_you_mean(precision, BITS)}")
        tokens = _positive("tokens", model.tokens if self.tokens is None else self.tokens)
        sequence = int(_positive("sequence", model.sequence if self.sequence is None else self.sequence))
        batch = _positive("batch-tokens", model.batch_tokens if self.batch_tokens is None else self.batch_tokens)
        devices = _usual_chips(model, chip, tokens) if self.chips is None else self.chips
        if devices < 1:
            raise TaelError(f"--chips must be 1 or more, not {devices}")
        if self.price is not None and not 0 <= self.price < 1e9:
            raise TaelError(f"--price must be 0 or more dollars an hour, not {self.price:g}")
        return Run(model.shape, tokens, sequence, batch, precision, chip, devices, self.price)

    def answer(self) -> dict[str, Any]:
        """The plan as one table of figures, with serving under `serving` (None and a note where that cannot be)."""
        run = self.run()
        chosen = None if self.layout is None else parse_layout(self.layout, run.devices)
        answer = plan_training(run, layout=chosen).to_dict()
        return {**answer, "source": self.model().source, "chip_source": run.chip.source, **self._serving(run)}

    def _serving(self, run: Run) -> dict[str, Any]:
        prices = None if self.price_list is None else parse_prices(self.price_list)
        devices = self.serving_chips or _serving_unit(run)
        if devices < 1:
            raise TaelError(f"--serving-chips must be 1 or more, not {devices}")
        service = Service(run.shape, run.chip, devices, self.context, self.speed, run.precision)
        try:
            serving = plan_serving(service)
        except TaelError as error:
            return {"serving": None, "serving_note": str(error)}
        table = serving.to_dict(run.price)
        if prices is not None and run.price is not None:
            costs = serving.dollars_per_million(run.price)
            table["margin_input"], table["margin_output"] = (
                None if asked == 0 else 1 - cost / asked for asked, cost in zip(prices, costs, strict=True)
            )
        return {"serving": table, "serving_note": ""}


def parse_layout(text: str, devices: int) -> Layout:
    """`data=128,pipeline=16,expert=64` -> Layout; data is what is left unless given."""
    values: dict[str, Any] = {}
    names = list(Layout.__dataclass_fields__)
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key not in names:
            raise TaelError(f"--layout: unknown '{key}'{did_you_mean(key, names)}")
        if key == "recompute":
            if value not in ("none", "selective", "full"):
                raise TaelError(f"--layout: recompute is none, selective or full, not '{value}'")
            values[key] = value
        elif value.isascii() and value.isdigit() and 0 < int(value[:12]) < 10**9:
            values[key] = int(value)
        else:
            raise TaelError(f"--layout: {key} must be a whole number of 1 or more, not '{value}'")
    if values.get("shard", 1) not in (1, 2, 3):
        raise TaelError(f"--layout: shard is 1, 2 or 3, not {values['shard']}")
    others = math.prod(values.get(key, 1) for key in ("tensor", "pipeline", "context"))
    values.setdefault("data", max(1, devices // others))
    return Layout(**values)


def parse_prices(text: str) -> tuple[float, float]:
    """`0.55/2.19` -> dollars a million tokens of input and output."""
    try:
        asked = [float(part) for part in text.split("/")]
    except ValueError:
        asked = []
    if len(asked) != 2 or not all(0 <= value < 1e6 for value in asked):
        raise TaelError(
            f"--price-list: write dollars a million tokens as INPUT/OUTPUT, as in 0.55/2.19, not '{text}'"
        )
    return asked[0], asked[1]


def _positive(name: str, value: float) -> float:
    if not 0 < value < 1e24:
        raise TaelError(f"--{name} must be above 0, not {value:g}")
    return value


def _usual_chips(model: NamedModel, chip: Chip, tokens: float) -> int:
    flops = model.shape.flops(model.sequence / 2).total * tokens
    enough = flops / (0.4 * chip.peaks.get("bf16", chip.peaks["fp32"]) * DAYS * 86400)
    fits = 18.0 * model.shape.parameters() / (0.6 * chip.memory_bytes)
    return 8 * 2 ** max(0, round(math.log2(max(enough, fits, 1.0) / 8)))


def _serving_unit(run: Run) -> int:
    """Chips of a serving unit: enough for the weights in half their memory, a domain's at least with experts."""
    weights = run.shape.parameters(mtp=False) * BITS[run.chip.best_precision(run.precision)] / 8
    least = max(1, math.ceil(weights / (0.5 * run.chip.memory_bytes)))
    unit = 2 ** math.ceil(math.log2(least))
    return max(unit, min(8, run.chip.domain)) * (8 if run.shape.experts > 64 else 1)
