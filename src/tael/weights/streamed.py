"""A model folder quantised while it is read: a tensor at a time, so that the float model is never held.

    model, report = load_quantized("path/to/folder", "int4")

Beside the quantised model, memory holds one tensor of the folder as floats (and what rounding it takes, about
100 MB), so a 16B model in bf16 or FP8 loads in little more than its int4 size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tael.model.moe import Experts
from tael.model.transformer import Transformer
from tael.weights.gptq import Grid
from tael.weights.huggingface import assign, fill, open_folder, present_slots
from tael.weights.quantize import (
    Progress,
    QuantizationReport,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    Scheme,
    Tally,
    Target,
    targets,
)


def load_quantized(
    folder: str | Path,
    scheme: Scheme,
    group: int = 32,
    mixed: Mapping[str, str] | None = None,
    asymmetric: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> tuple[Transformer, QuantizationReport]:
    """Read a model folder into a Transformer quantised as by `quantize_model`, with the same bits.

    What stays float is in `dtype`. `progress` is told a line a layer. Raises TaelError as `load_model` and
    `quantize_model` do.
    """
    device = torch.device(device)
    model, files = open_folder(folder, dtype)
    plan = targets(model, scheme, group, mixed)
    tally = Tally(model, plan)
    expected = model.state_dict()
    order = list(present_slots(model, files))  # of the float model: its names are the folder's
    state: dict[str, Tensor] = {}
    places = _empty(model, plan, Grid(group, asymmetric), device)
    layer = ""
    for slot in order:
        tensor = files.read(slot.name)
        place = places.get(slot.parameter)
        if place is None:
            fill(state, expected, slot, tensor, device)
        else:
            _fill_codes(place, slot.part, tensor)
        if progress is not None and (now := _layer_of(slot.parameter)) != layer:
            layer = now
            progress(f"reading and quantising {layer}")
    assign(model, state, device)
    model.requires_grad_(False)
    return model, tally.report(scheme, group)


def _layer_of(parameter: str) -> str:
    parts = parameter.split(".")
    return ".".join(parts[:2]) if parts[0] in ("layers", "mtp") else parts[0]


def _empty(
    model: Transformer, plan: list[Target], grid: Grid, device: torch.device
) -> dict[str, QuantizedLinear | QuantizedEmbedding]:
    """Put quantised modules with room for their codes into `model`; returns them by the parameter they stand for."""
    places: dict[str, QuantizedLinear | QuantizedEmbedding] = {}
    for name, _, scheme, _ in plan:
        if scheme is None:
            continue
        old = model.get_submodule(name)
        if isinstance(old, Experts):
            up, down = (_room(w, scheme, grid, device) for w in (old.gate_up_proj, old.down_proj))
            places[f"{name}.gate_up_proj"], places[f"{name}.down_proj"] = up, down
            new: nn.Module = QuantizedExperts(up, down)
        elif isinstance(old, nn.Embedding):
            room = _room(old.weight, "int8", grid, device)
            new = places[f"{name}.weight"] = QuantizedEmbedding(room.codes, room.scales, grid.group, old.weight.dtype)
        elif name == "lm_head" and model.config.tie_word_embeddings:
            assert isinstance(model.embed_tokens, QuantizedEmbedding)
            new = model.embed_tokens.head(scheme)
        else:
            assert isinstance(old, nn.Linear)
            new = places[f"{name}.weight"] = _room(old.weight, scheme, grid, device, old.bias)
        model.set_submodule(name, new)
    return places


def _room(
    weight: Tensor, scheme: Scheme, grid: Grid, device: torch.device, bias: Tensor | None = None
) -> QuantizedLinear:
    """A layer with uninitialised codes for `weight` [.., out, in]; the bias stays where it is, to be assigned."""
    columns = weight.shape[-1]
    kind, width = (torch.uint8, columns // 2) if scheme == "int4" else (torch.int8, columns)
    codes = torch.empty(*weight.shape[:-1], width, dtype=kind, device=device)
    scales = torch.empty(*weight.shape[:-1], columns // grid.group, dtype=torch.float16, device=device)
    minimums = torch.empty_like(scales) if grid.asymmetric and scheme == "int4" else None
    return QuantizedLinear(scheme, codes, scales, minimums, bias, grid.group)


def _fill_codes(place: QuantizedLinear | QuantizedEmbedding, part: tuple[int | slice, ...], tensor: Tensor) -> None:
    scheme = place.scheme if isinstance(place, QuantizedLinear) else "int8"
    asymmetric = isinstance(place, QuantizedLinear) and place.minimums is not None
    rounded = QuantizedLinear.from_float(tensor, scheme, place.group, asymmetric)
    for name, new in rounded.named_buffers():
        kept = getattr(place, name)
        (kept[part] if part else kept).copy_(new)
