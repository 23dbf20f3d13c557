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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tael.errors import TaelError
from tael.files import sync
from tael.model.config import ModelConfig
from tael.model.transformer import Transformer

SHARD_BYTES = 4 * 1000**3
"""Weights beyond this many bytes are split over several files."""

FP8_BLOCK = 128
"""Side of the square of weights that shares one scale in DeepSeek's FP8 checkpoints."""

_BIAS = "e_score_correction_bias"
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    folder = Path(folder)
    if not folder.is_dir():
        raise TaelError(f"{folder}: no such model folder; it must hold config.json and model.safetensors")
    config = ModelConfig.load(folder)
    block = _check_config_file(folder / "config.json")
    files = _Files(folder, block)
    config = _without_absent_mtp(config, files)
    with torch.device("meta"):
        model = Transformer(config)
    state = _read_state(model, files, torch.device(device), dtype)
    model.load_state_dict(state, strict=True, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if left:  # a slip of ours, not the user's: `slots` forgot a tensor
        raise RuntimeError(f"parameters never assigned: {left}")
    return model


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


class _Files:
    """The safetensors files of a folder as one name -> tensor table; every failure is a TaelError."""

    def __init__(self, folder: Path, block: tuple[int, int]) -> None:
        self.folder, self.block = folder, block
        self.file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in _weight_files(folder):
            try:
                handle = safe_open(path, framework="pt", device="cpu")
                names = list(handle.keys())
            except (SafetensorError, OSError, ValueError) as error:
                raise TaelError(f"{path}: damaged or incomplete safetensors file; fetch it again ({error})") from None
            self._open[path] = handle
            self.file_of.update(dict.fromkeys(names, path))

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def read(self, name: str) -> Tensor:
        """The tensor in a float type, FP8 blocks multiplied by their scales."""
        path = self.file_of[name]
        raw = self._raw(name)
        if raw.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            return self._dequantise(name, raw)
        if raw.dtype not in _FLOATS:
            kind = str(raw.dtype).removeprefix("torch.")
            raise TaelError(f"{path}: tensor '{name}' is {kind}; Tael reads fp32, fp16, bf16, and fp8 with scales")
        return raw

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open[self.file_of[name]].get_slice(name).get_shape())

    def _raw(self, name: str) -> Tensor:
        path = self.file_of[name]
        try:
            return self._open[path].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, KeyError, AttributeError) as error:
            raise TaelError(f"{path}: tensor '{name}' cannot be read; fetch the file again ({error})") from None

    def _dequantise(self, name: str, raw: Tensor) -> Tensor:
        """V3 report section 3.3.2: value = w * scale_inv of its block. raw [O, I], scale [O / rows, I / columns]."""
        path, scale_name = self.file_of[name], f"{name}_scale_inv"
        if scale_name not in self:
            raise TaelError(f"{path}: FP8 tensor '{name}' has no '{scale_name}'; fetch the release again")
        scale = self._raw(scale_name).float()
        rows, columns = self.block
        expected = tuple(-(-size // side) for size, side in zip(raw.shape, self.block, strict=False))
        if raw.dim() != 2 or tuple(scale.shape) != expected:
            raise TaelError(
                f"{self.file_of[scale_name]}: tensor '{scale_name}' has shape {list(scale.shape)}, expected "
                f"{list(expected)} for blocks of {rows} x {columns}; see weight_block_size in config.json"
            )
        spread = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return raw.float() * spread[: raw.shape[0], : raw.shape[1]]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TaelError(f"{index}: not an index of safetensors files; fetch it again") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise TaelError(f"{index}: names {name!r}, which is no safetensors file of this folder")
            if not (folder / name).is_file():
                raise TaelError(f"{folder / name}: the index names this file and it is not there; fetch it")
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise TaelError(
            f"{folder / pickles[0]}: Tael does not open pickles, they can run code; "
            "take the safetensors version of this model"
        )
    raise TaelError(f"{single}: no such file; a model folder holds config.json and model.safetensors")


def _without_absent_mtp(config: ModelConfig, files: _Files) -> ModelConfig:
    """Leave out the MTP depths of which the files hold nothing (transformers drops them and keeps the config)."""
    prefixes = [
        f"model.layers.{config.num_hidden_layers + depth}." for depth in range(config.num_nextn_predict_layers)
    ]
    present = [any(name.startswith(prefix) for name in files.file_of) for prefix in prefixes]
    if any(present) or not prefixes:
        return config
    return dataclasses.replace(config, num_nextn_predict_layers=0)


def _read_state(model: Transformer, files: _Files, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    config, expected = files.folder / "config.json", model.state_dict()
    state: dict[str, Tensor] = {}
    wanted = slots(model)
    _refuse_unexpected(model.config, files, {slot.name for slot in wanted})
    for name, parameter, part in wanted:
        shape = tuple(expected[parameter][part].shape if part else expected[parameter].shape)
        if parameter not in state:
            kind = torch.float32 if parameter.endswith(_BIAS) else dtype
            state[parameter] = torch.empty(expected[parameter].shape, dtype=kind, device=device)
        target = state[parameter][part] if part else state[parameter]
        if name not in files:
            if name.endswith(_BIAS):
                target.zero_()  # trained without: as after initialisation
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
        target.copy_(files.read(name))
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    return state


def _refuse_unexpected(config: ModelConfig, files: _Files, wanted: set[str]) -> None:
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
