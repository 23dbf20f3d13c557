"""GGUF files out: a Transformer of floats, with its tokenizer, in a form llama.cpp loads.

    save_gguf(model, "model.gguf", tokenizer, "q8_0")

Matrices are stored in the chosen type; norms, biases and the router in fp32, as llama.cpp wants them. A matrix whose
rows do not divide into blocks of 32 stays fp16. Tensors are converted and written one at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from gguf import GGUFWriter, quants
from gguf.constants import GGML_QUANT_SIZES, GGUFValueType, LlamaFileType
from gguf.constants import GGMLQuantizationType as Kind
from torch import Tensor

from tael.data.gguf_tokenizer import gguf_tokenizer_metadata
from tael.data.tokenizer import Tokenizer
from tael.errors import TaelError
from tael.files import sync
from tael.model.transformer import Transformer
from tael.weights.gguf_layout import llama3_divisors, sources, to_pairs, write_config

GGUFType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
GGUF_TYPES: tuple[str, ...] = get_args(GGUFType)

_KINDS = {
    "f32": (Kind.F32, LlamaFileType.ALL_F32),
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Kind.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
_BLOCK = 32


class _Out(NamedTuple):
    """A tensor of the file; with `pairs` (RoPE's width) its rows are still to be put into the order of pairs."""

    name: str
    kind: Kind
    tensor: Tensor
    pairs: int = 0


def save_gguf(
    model: Transformer, path: str | Path, tokenizer: Tokenizer | None = None, kind: GGUFType = "f16", name: str = ""
) -> None:
    """Write `model` to `path`, beside it first and renamed when it is whole.

    MTP modules are left out: llama.cpp does not use them. The embedding and the head go as q8_0 under "q4_0". Raises
    TaelError for a model or a tokenizer GGUF cannot express, and for one with quantised modules.
    """
    if kind not in _KINDS:
        raise TaelError(f"unknown GGUF type '{kind}'; valid are: {', '.join(GGUF_TYPES)}")
    if any(buffer.dtype in (torch.uint8, torch.int8) for buffer in model.buffers()):
        raise TaelError("this model is quantised already: write it from its floats")
    path = Path(path).absolute()
    arch, table = write_config(model.config)
    if tokenizer is not None:
        table |= gguf_tokenizer_metadata(tokenizer, model.config.vocab_size)
    else:
        table |= _special_ids(model)
    outputs = list(_outputs(model, _KINDS[kind][0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        writer = GGUFWriter(partial, arch)
        writer.add_string("general.name", name or path.stem)
        writer.add_uint32("general.file_type", int(_KINDS[kind][1]))
        writer.add_uint32("general.quantization_version", 2)
        for key, value in table.items():
            _add(writer, key, value)
        for out in outputs:
            _announce(writer, out)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for out in outputs:
            writer.write_tensor_data(_data(out))
        writer.close()
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _special_ids(model: Transformer) -> dict[str, Any]:
    ids = {"bos": model.config.bos_token_id, "eos": model.config.eos_token_id}
    known = {f"tokenizer.ggml.{key}_token_id": value for key, value in ids.items() if value is not None}
    return {"tokenizer.ggml.model": "none", **known}


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:
        kind = GGUFValueType.STRING if isinstance(value[0], str) else GGUFValueType.INT32
        writer.add_key_value(key, value, GGUFValueType.ARRAY, kind)


def _outputs(model: Transformer, kind: Kind) -> Iterator[_Out]:
    """Every tensor of the file; views of the model's memory wherever it can be."""
    config, state = model.config, model.state_dict()
    if config.rope_scaling and config.rope_scaling.get("rope_type", config.rope_scaling.get("type")) == "llama3":
        yield _Out("rope_freqs.weight", Kind.F32, llama3_divisors(config))
    for source in sources(config):
        tensor = state[source.parameter].detach()
        if source.form == "gate_up":
            parts = list(tensor.chunk(2, dim=1))
        elif source.form == "kv_b":
            split = (config.qk_nope_head_dim, config.v_head_dim)
            k, v = tensor.unflatten(0, (config.num_attention_heads, -1)).split(split, dim=1)
            parts = [k.transpose(1, 2), v]
        else:
            parts = [tensor]
        for name, part in zip(source.names, parts, strict=True):
            yield _Out(name, _kind(name, part, kind), part, config.gqa_head_dim if source.form == "pairs" else 0)


def _kind(name: str, tensor: Tensor, kind: Kind) -> Kind:
    if tensor.dim() == 1 or name.endswith("ffn_gate_inp.weight"):
        return Kind.F32
    if kind is Kind.Q4_0 and name in ("token_embd.weight", "output.weight"):
        kind = Kind.Q8_0
    if kind in (Kind.Q8_0, Kind.Q4_0) and tensor.shape[-1] % _BLOCK:
        return Kind.F16
    return kind


def _announce(writer: GGUFWriter, out: _Out) -> None:
    block, size = GGML_QUANT_SIZES[out.kind]
    rows = out.tensor.numel() // out.tensor.shape[-1]
    row = out.tensor.shape[-1] // block * size
    shape = (
        (*out.tensor.shape[:-1], row) if out.kind in (Kind.BF16, Kind.Q8_0, Kind.Q4_0) else tuple(out.tensor.shape)
    )
    numbers = {Kind.F32: np.float32, Kind.F16: np.float16}.get(out.kind, np.uint8)
    writer.add_tensor_info(out.name, shape, np.dtype(numbers), rows * row, raw_dtype=out.kind)


def _data(out: _Out) -> np.ndarray:
    tensor = to_pairs(out.tensor, out.pairs) if out.pairs else out.tensor
    values = tensor.to("cpu", torch.float32).contiguous().numpy()
    return np.ascontiguousarray(quants.quantize(values, out.kind))
