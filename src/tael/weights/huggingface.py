"""Model folders in the Hugging Face layout: config.json, safetensors, DeepSeek's (Llama's, Qwen2's) tensor names.

One table, `slots`, says which tensor of the folder is which part of which parameter; saving reads it in one
direction, loading in the other. Two things differ between folder and model:

| folder                                                        | model                                             |
|---------------------------------------------------------------|---------------------------------------------------|
| `mlp.experts.E.{gate,up}_proj.weight`, one tensor an expert   | `mlp.experts.gate_up_proj` [E, 2F, D], stacked     |
| `model.layers.{L+k}.{enorm,hnorm,eh_proj,shared_head.norm}`   | `mtp.k.{enorm,hnorm,eh_proj,norm}`                |
| `model.layers.{L+k}.{embed_tokens,shared_head.head}`          | the model's own embedding and head, shared        |

The last row is written as in the released V3 (vLLM's MTP reads those copies), and left out where the embeddings
are tied; on loading they may be missing, and have to equal the main ones where they are there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tael.errors import TaelError
from tael.files import sync
from tael.model.config import ModelConfig
from tael.model.transformer import Transformer
from tael.weights.reader import FP8_BLOCK, Files

SHARD_BYTES = 4 * 1000**3
"""Weights beyond this many bytes are split over several files."""

_BIAS = "e_score_correction_bias"
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


class SavesItself(Protocol):
    """A tokenizer, as far as saving a model folder goes."""

    def save(self, folder: Path) -> None: ...


class Slot(NamedTuple):
    """One tensor of the folder: `name`, and the part of `parameter` it holds (all of it when `part` is empty)."""

    name: str
    parameter: str
    part: tuple[int | slice, ...]


# ------------------------------------------------------------------ names


def slots(model: Transformer) -> list[Slot]:
    """Every tensor a model folder must hold for `model`, in the order of the model's state; MTP copies left out."""
    found: list[Slot] = []
    for parameter in model.state_dict():
        if parameter == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        name = _folder_name(parameter, model.config.num_hidden_layers)
        stem, _, leaf = name.rpartition(".experts.")
        if leaf not in ("gate_up_proj", "down_proj"):
            found.append(Slot(name, parameter, ()))
            continue
        width = model.config.moe_intermediate_size
        for expert in range(model.config.n_routed_experts or 0):
            if leaf == "down_proj":
                found.append(Slot(f"{stem}.experts.{expert}.down_proj.weight", parameter, (expert,)))
                continue
            found.append(Slot(f"{stem}.experts.{expert}.gate_proj.weight", parameter, (expert, slice(0, width))))
            found.append(Slot(f"{stem}.experts.{expert}.up_proj.weight", parameter, (expert, slice(width, None))))
    return found


def _folder_name(parameter: str, layers: int) -> str:
    if parameter.startswith("lm_head."):
        return parameter
    if not parameter.startswith("mtp."):
        return f"model.{parameter}"
    _, depth, rest = parameter.split(".", 2)
    rest = f"shared_head.{rest}" if rest == "norm.weight" else rest.removeprefix("block.")
    return f"model.layers.{layers + int(depth)}.{rest}"


def mtp_copies(config: ModelConfig) -> dict[str, str]:
    """Names of the MTP layers' copies of embedding and head, and which main tensor each must equal."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    copies: dict[str, str] = {}
    for depth in range(config.num_nextn_predict_layers):
        layer = f"model.layers.{config.num_hidden_layers + depth}"
        copies[f"{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"{layer}.shared_head.head.weight"] = head
    return copies


def to_hugging_face(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything in a model folder; the tensors are detached views of the model's own memory."""
    state = model.state_dict()
    named: dict[str, Tensor] = {}
    for name, parameter, part in slots(model):
        tensor = state[parameter]
        named[name] = tensor[part] if part else tensor
        yield name, named[name]
    if not model.config.tie_word_embeddings:
        for copy, original in mtp_copies(model.config).items():
            yield copy, named[original]


# ------------------------------------------------------------------ saving


def save_model(
    model: Transformer,
    folder: str | Path,
    tokenizer: SavesItself | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `model` (and `tokenizer`) as a Hugging Face model folder at `folder`.

    `dtype` casts the weights (None: as they are); the selection bias stays fp32, as in the released checkpoints.
    The folder is written beside its place and renamed, so that `folder` is whole or not there; one that is there
    already is replaced as a whole. Raises TaelError when `folder` is something other than a model folder.
    """
    folder = Path(folder).absolute()
    with torch.device("meta"):
        whole = Transformer(model.config).state_dict().keys()
    if whole != model.state_dict().keys():
        raise TaelError(
            f"{folder}: a quantised or memory-mapped model cannot be saved; load it in float and save that"
        )
    if folder.exists() and not _may_replace(folder):
        raise TaelError(f"{folder}: is there already and is no model folder; give another place to save to")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        _write_config(model.config, beside, dtype or model.embed_tokens.weight.dtype)
        _write_weights(model, beside, dtype)
        if tokenizer is not None:
            tokenizer.save(beside)
        for path in beside.rglob("*"):
            sync(path)
        sync(beside)
        _put_in_place(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _may_replace(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "config.json").exists() or not any(folder.iterdir()))


def _put_in_place(beside: Path, folder: Path) -> None:
    """Rename `beside` to `folder`; an older folder steps aside first, and comes back should the rename fail."""
    aside = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    replaced = folder.exists()
    if replaced:
        folder.rename(aside)
    try:
        beside.rename(folder)
    except BaseException:
        if replaced:
            aside.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _write_json(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_config(config: ModelConfig, folder: Path, dtype: torch.dtype) -> None:
    _write_json(folder / "config.json", {**config.to_dict(), "torch_dtype": str(dtype).removeprefix("torch.")})
    stops = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id")}
    if any(value is not None for value in stops.values()):
        _write_json(folder / "generation_config.json", {k: v for k, v in stops.items() if v is not None})


def _write_weights(model: Transformer, folder: Path, dtype: torch.dtype | None) -> None:
    def final(name: str, tensor: Tensor) -> torch.dtype:
        return tensor.dtype if dtype is None or name.endswith(_BIAS) else dtype

    shards: list[dict[str, Tensor]] = [{}]
    total = used = 0
    for name, tensor in to_hugging_face(model):
        size = tensor.numel() * final(name, tensor).itemsize
        if shards[-1] and used + size > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used, total = used + size, total + size
    places: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        ready: dict[str, Tensor] = {}
        for name, tensor in shard.items():
            # MTP copies share memory with the original, which safetensors refuses.
            fresh = name.endswith(("embed_tokens.weight", "head.weight")) and name.startswith("model.layers.")
            ready[name] = tensor.to("cpu", final(name, tensor), copy=fresh).contiguous()
            places[name] = file
        save_file(ready, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places}
        )


# ------------------------------------------------------------------ loading


def load_model(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """Read a model folder into a Transformer on `device` with parameters in `dtype` (the selection bias stays fp32).

    Reads fp32, fp16 and bf16 safetensors, single or sharded, and DeepSeek's FP8 blocks. The files are memory-mapped
    and read a tensor at a time. MTP layers that config.json names and the files lack altogether are left out, as
    transformers writes such folders.

    Raises TaelError, one line naming file and tensor, for a folder that is no model, damaged or incomplete files,
    tensors that are missing, unexpected or misshapen, and pickles (.bin, .pt), which are never opened.
    """
    model, files = open_folder(folder, dtype)
    state: dict[str, Tensor] = {}
    expected = model.state_dict()
    for slot in present_slots(model, files):
        fill(state, expected, slot, files.read(slot.name), torch.device(device))
    assign(model, state, torch.device(device))
    return model


def open_folder(folder: str | Path, dtype: torch.dtype) -> tuple[Transformer, Files]:
    """A model on the meta device, parameters in `dtype`, and the files to fill it from. Raises as `load_model`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise TaelError(f"{folder}: no such model folder; it must hold config.json and model.safetensors")
    config = ModelConfig.load(folder)
    files = Files(folder, _check_config_file(folder / "config.json"))
    with torch.device("meta"):
        model = Transformer(_without_absent_mtp(config, files))
    for name, parameter in model.named_parameters():
        if not name.endswith(_BIAS):
            parameter.data = parameter.data.to(dtype)
    return model, files


def _check_config_file(path: Path) -> tuple[int, int]:
    """Refuse settings that would change the numbers and that ModelConfig does not know; return the FP8 block."""
    table = json.loads(path.read_text(encoding="utf-8"))
    rope = table.get("rope_parameters")
    flat = {**rope, **table} if isinstance(rope, dict) else table
    for key, harmless in (("use_sliding_window", False), ("mlp_bias", False), ("partial_rotary_factor", 1)):
        if flat.get(key) not in (None, harmless):
            raise TaelError(f"{path}: {key} = {json.dumps(flat[key])} is not supported, only {json.dumps(harmless)}")
    quantization = table.get("quantization_config")
    if not isinstance(quantization, dict):
        return FP8_BLOCK, FP8_BLOCK
    method = quantization.get("quant_method")
    if method != "fp8":
        raise TaelError(f"{path}: weights quantised by '{method}' are not supported; take the bf16 or fp8 release")
    block = quantization.get("weight_block_size") or [FP8_BLOCK, FP8_BLOCK]
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(b, int) and b >= 1 for b in block)):
        raise TaelError(f"{path}: weight_block_size must be two whole numbers, not {json.dumps(block)}")
    return block[0], block[1]


def _without_absent_mtp(config: ModelConfig, files: Files) -> ModelConfig:
    """Leave out the MTP depths of which the files hold nothing (transformers drops them and keeps the config)."""
    prefixes = [
        f"model.layers.{config.num_hidden_layers + depth}." for depth in range(config.num_nextn_predict_layers)
    ]
    present = [any(name.startswith(prefix) for name in files.file_of) for prefix in prefixes]
    if any(present) or not prefixes:
        return config
    return dataclasses.replace(config, num_nextn_predict_layers=0)


def present_slots(model: Transformer, files: Files) -> Iterator[Slot]:
    """The slots of `model` to be read, each checked against the files; a selection bias may be missing (it is 0)."""
    config, expected = files.folder / "config.json", model.state_dict()
    wanted = slots(model)
    _refuse_unexpected(model.config, files, {slot.name for slot in wanted})
    for slot in wanted:
        name, parameter, part = slot
        shape = tuple(expected[parameter][part].shape if part else expected[parameter].shape)
        if name not in files:
            if name.endswith(_BIAS):
                continue
            raise TaelError(
                f"{files.folder}: tensor '{name}' is missing from the safetensors files; "
                f"fetch the model again or correct {config}"
            )
        if files.shape(name) != shape:
            raise TaelError(
                f"{files.file_of[name]}: tensor '{name}' has shape {list(files.shape(name))}, expected {list(shape)} "
                f"by {config}; the two belong to different models"
            )
        yield slot


def fill(
    state: dict[str, Tensor], expected: dict[str, Tensor], slot: Slot, tensor: Tensor, device: torch.device
) -> None:
    """Put `tensor` into its part of `state`; a parameter gets room, as in `expected`, when its first part comes."""
    if slot.parameter not in state:
        state[slot.parameter] = torch.empty_like(expected[slot.parameter], device=device)
    (state[slot.parameter][slot.part] if slot.part else state[slot.parameter]).copy_(tensor)


def assign(model: Transformer, state: dict[str, Tensor], device: torch.device) -> None:
    """Give `model`, still on the meta device, the tensors of `state`; what lies elsewhere already may be missing."""
    model.load_state_dict(state, strict=False, assign=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta and name == _BIAS:  # trained without: as after initialisation
                setattr(module, name, torch.zeros_like(buffer, device=device))
    if model.config.tie_word_embeddings and isinstance(model.lm_head, nn.Linear):
        model.lm_head.weight = model.embed_tokens.weight
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if left:  # a slip of ours, not the user's: `slots` forgot a tensor
        raise RuntimeError(f"parameters never assigned: {left}")


def _refuse_unexpected(config: ModelConfig, files: Files, wanted: set[str]) -> None:
    """Every tensor must be known; second copies of embedding and head must equal the first."""
    copies = mtp_copies(config)
    if config.tie_word_embeddings:
        copies["lm_head.weight"] = "model.embed_tokens.weight"
    for name, path in files.file_of.items():
        if name in wanted or _IGNORED.search(name) or name.removesuffix("_scale_inv") in wanted:
            continue
        if name not in copies:
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            beyond = layer is not None and int(layer[1]) >= config.num_hidden_layers
            hint = "set num_nextn_predict_layers" if beyond else "correct it or take another folder"
            raise TaelError(
                f"{path}: unexpected tensor '{name}', for which {files.folder / 'config.json'} has no place; {hint}"
            )
        original = copies[name]
        if original in files and not torch.equal(files.read(name), files.read(original)):
            raise TaelError(f"{path}: tensor '{name}' differs from '{original}'; Tael shares the two and takes one")
