"""A picture of a layout: stages of the pipeline across, copies of the model down, chips as squares, experts coloured.

picture(spread_of(answer, shape, domain))       SVG with a text alternative, and the same in sentences under it
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tael.cost import units
from tael.cost.layout import Layout, rounds
from tael.cost.shapes import Shape
from tael.serve.pages.run_parts import join

MOST_COLUMNS, MOST_ROWS, MOST_SQUARES = 8, 5, 8
GROUP_COLOURS = 4
SQUARE, GAP = 9, 3
LEFT, TOP, ROW = 74, 40, 30


@dataclass(frozen=True)
class Spread:
    """What the picture needs: degrees of parallelism, and how much of the model each cuts up."""

    layout: Layout
    layers: int
    experts: int
    mtp: int
    rounds: int
    """Pieces of a stage's layers: micro-batches go round the pipeline so many times."""
    sequences: float
    """Of a batch."""
    domain: int
    """Chips joined by fast links."""

    @property
    def cell(self) -> int:
        """Chips that together hold one stage of one copy."""
        return self.layout.tensor * self.layout.context

    @property
    def group(self) -> int:
        """Copies among which the experts are spread."""
        return max(1, self.layout.expert // self.layout.context)

    @property
    def stage_layers(self) -> int:
        return math.ceil(self.layers / self.layout.pipeline)


def spread_of(answer: dict[str, Any], shape: Shape, domain: int) -> Spread:
    """Read off a plan's answer and its model."""
    table = {key: value for key, value in answer["layout"].items() if key != "text"}
    layout = Layout(**table)
    turns = rounds(shape, layout.pipeline)
    sequences = answer["batch_tokens"] / answer["sequence"]
    return Spread(layout, shape.layers, shape.experts, shape.mtp, turns, sequences, domain)


# ----------------------------------------------------------------------------- words


def sentences(spread: Spread) -> list[str]:
    """What the layout does, one sentence for each way of dividing; the picture's text alternative."""
    layout = spread.layout
    factors = (
        (layout.data, "copies of the model"), (layout.pipeline, "pipeline stages"),
        (layout.tensor, "ways of tensor parallelism"), (layout.context, "parts of each sequence"),
    )  # fmt: skip
    product = (
        " x ".join(f"{size:,} {words}" for size, words in factors if size > 1) or "one chip with the whole model"
    )
    found = [f"{layout.devices:,} chips = {product}." if layout.devices > 1 else "One chip holds the whole model."]
    found += _pipeline(spread) + _within(spread) + _experts(spread) + _data(spread)
    kinds = {
        "none": "Nothing is computed again for the backward pass.",
        "selective": "Norms, SwiGLU's product and up-projections are computed again for the backward pass.",
        "full": "Every layer is computed again for the backward pass.",
    }
    return [*found, kinds[layout.recompute]]


def _pipeline(spread: Spread) -> list[str]:
    layout = spread.layout
    if layout.pipeline == 1:
        return []
    pieces = f", in {spread.rounds} pieces that micro-batches pass in turn" if spread.rounds > 1 else ""
    return [f"A stage holds at most {spread.stage_layers} of the {spread.layers} layers{pieces}."]


def _within(spread: Spread) -> list[str]:
    layout, found = spread.layout, []
    if layout.tensor > 1:
        found.append(f"Every matrix is cut over {layout.tensor} chips that fast links join ({spread.domain} do).")
    if layout.context > 1:
        found.append(f"Every sequence is cut into {layout.context} parts, each on chips of its own.")
    return found


def _experts(spread: Spread) -> list[str]:
    layout = spread.layout
    if not spread.experts:
        return []
    if layout.expert == 1:
        return [f"Every chip holds all {spread.experts} experts of its layers."]
    each, groups = spread.experts // layout.expert, max(1, layout.data // spread.group)
    same = f"; the {groups:,} groups hold the same" if groups > 1 else ""
    among = f"{spread.group:,} copies" if spread.group > 1 else f"{layout.expert} chips"
    return [f"The {spread.experts} experts of a layer are spread over {among}: {each} on a chip{same}."]


def _data(spread: Spread) -> list[str]:
    layout = spread.layout
    micros = max(1, math.ceil(spread.sequences / (layout.data * layout.micro_batch) - 1e-9))
    each = (
        f"{units.count(spread.sequences / layout.data)} of the {units.count(spread.sequences)} sequences of a batch"
    )
    if layout.data == 1:
        return [f"A batch of {units.count(spread.sequences)} sequences is read in {micros:,} micro-batches."]
    shards = {
        1: "the optimiser's state is divided among the copies (ZeRO-1)",
        2: "gradients and the optimiser's state are divided among the copies (ZeRO-2)",
        3: "weights, gradients and the optimiser's state are divided among the copies (FSDP)",
    }
    return [f"Each copy reads {each}, in {micros:,} micro-batches; {shards[layout.shard]}."]


# --------------------------------------------------------------------------- picture


def shown_columns(count: int) -> list[int | None]:
    """Which of `count` are drawn; None stands for those left out."""
    if count <= MOST_COLUMNS:
        return list(range(count))
    return [*range(MOST_COLUMNS - 2), None, count - 1]


def shown_rows(copies: int, group: int) -> list[int | None]:
    """Which copies are drawn: the first ones, the border between two groups where there is one, the last."""
    if copies <= MOST_ROWS:
        return list(range(copies))
    marks = {0, 1, copies - 1} | ({group - 1, group} if 1 < group < copies else {2})
    rows: list[int | None] = []
    for index in sorted(marks):
        if rows and rows[-1] is not None and index > rows[-1] + 1:
            rows.append(None)
        rows.append(index)
    return rows


def picture(spread: Spread) -> Markup:
    """The drawing with its sentences."""
    columns = shown_columns(spread.layout.pipeline)
    rows = shown_rows(spread.layout.data, spread.group)
    squares = min(spread.cell, MOST_SQUARES)
    width = max(62, squares * (SQUARE + GAP) + 14 + (30 if spread.cell > MOST_SQUARES else 0))
    step = width + 8
    grouped = spread.experts and spread.layout.expert > 1 and spread.group > 1
    across, down = LEFT + len(columns) * step + (120 if grouped else 0), TOP + len(rows) * ROW + 4
    parts = [_heads(columns, step, width, spread)]
    parts += [_row(index, place, columns, step, width, spread) for place, index in enumerate(rows)]
    if grouped:
        parts.append(_groups(rows, LEFT + len(columns) * step, spread))
    told = sentences(spread)
    return Markup(
        '<figure class="layout"><h4>Which chip holds what</h4><div class="scroll" tabindex="0" role="region" '
        'aria-label="Picture of the layout"><svg role="img" aria-label="{}" viewBox="0 0 {} {}" '
        'style="width:{}px;height:{}px">{}</svg></div><figcaption>A square is a chip; a row is a copy of the model, '
        "whose stages stand side by side.</figcaption><ul>{}</ul></figure>"
    ).format(
        " ".join(told), across, down, across, down, join(parts), join(Markup("<li>{}</li>").format(s) for s in told)
    )


def _heads(columns: Sequence[int | None], step: int, width: int, spread: Spread) -> Markup:
    def head(place: int, index: int | None) -> Markup:
        x = LEFT + place * step + width / 2
        if index is None:
            return Markup('<text class="gap" x="{}" y="24" text-anchor="middle">…</text>').format(x)
        words = "all layers" if spread.layout.pipeline == 1 else _stage_words(index, spread)
        name = "the model" if spread.layout.pipeline == 1 else f"stage {index + 1}"
        return Markup(
            '<text x="{0}" y="13" text-anchor="middle">{1}</text>'
            '<text class="small" x="{0}" y="28" text-anchor="middle">{2}</text>'
        ).format(x, name, words)

    return join(head(place, index) for place, index in enumerate(columns))


def _stage_words(index: int, spread: Spread) -> str:
    """As many layers as an even division gives this stage."""
    layers, stages = spread.layers, spread.layout.pipeline
    count = (index + 1) * layers // stages - index * layers // stages
    return f"{count} layer{'' if count == 1 else 's'}"


def _row(
    index: int | None, place: int, columns: Sequence[int | None], step: int, width: int, spread: Spread
) -> Markup:
    y = TOP + place * ROW
    if index is None:
        return Markup('<text class="gap" x="{}" y="{}" text-anchor="middle">⋮</text>').format(
            LEFT + width / 2, y + 19
        )
    look = f"g{index // spread.group % GROUP_COLOURS}" if spread.layout.expert > 1 else "g0"
    name = Markup('<text x="0" y="{}">copy {}</text>').format(y + 18, f"{index + 1:,}")
    cells = join(
        _cell(LEFT + at * step, y, width, look, spread.cell)
        for at, column in enumerate(columns)
        if column is not None
    )
    return name + cells


def _cell(x: int, y: int, width: int, look: str, chips: int) -> Markup:
    squares = min(chips, MOST_SQUARES)
    taken = squares * (SQUARE + GAP) - GAP + (30 if chips > MOST_SQUARES else 0)
    begin = x + (width - taken) / 2
    drawn = join(
        Markup('<rect class="chip" x="{}" y="{}" width="{}" height="{}" rx="2"/>').format(
            begin + i * (SQUARE + GAP), y + 8, SQUARE, SQUARE
        )
        for i in range(squares)
    )
    more = Markup("")
    if chips > MOST_SQUARES:
        more = Markup('<text class="small" x="{}" y="{}">x {}</text>').format(
            begin + squares * (SQUARE + GAP) + 2, y + 17, f"{chips:,}"
        )
    box = Markup('<rect class="cell" x="{}" y="{}" width="{}" height="25" rx="5"/>').format(x, y, width)
    return Markup('<g class="{}">{}{}{}</g>').format(look, box, drawn, more)


def _groups(rows: Sequence[int | None], x: int, spread: Spread) -> Markup:
    """A bracket beside the rows of each group of experts."""
    found: dict[int, list[int]] = {}
    for place, index in enumerate(rows):
        if index is not None:
            found.setdefault(index // spread.group, []).append(place)
    each = spread.experts // spread.layout.expert

    def bracket(group: int, places: list[int]) -> Markup:
        top, bottom = TOP + places[0] * ROW + 1, TOP + places[-1] * ROW + 24
        lines = (
            (f"all {spread.experts} experts,", f"{each} a chip") if len(places) > 1 else (f"group {group + 1:,}", "")
        )
        middle = (top + bottom) / 2
        return Markup(
            '<path class="bracket" d="M{0} {1}h6V{2}h-6"/><text class="small" x="{3}" y="{4}">{5}</text>'
            '<text class="small" x="{3}" y="{6}">{7}</text>'
        ).format(x, top, bottom, x + 12, middle if lines[1] else middle + 4, lines[0], middle + 14, lines[1])

    return join(bracket(group, places) for group, places in found.items())
