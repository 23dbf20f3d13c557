"""GGUF files in: a Transformer of floats, or one that keeps the file's 4 and 8-bit codes as they are.

    model = load_gguf("model.gguf")                        every tensor dequantised
    model = load_gguf("model.gguf", keep_quantised=True)   Q4_0, Q4_1, Q8_0 -> QuantizedLinear and its kin, losslessly

`gguf.quants` undoes what is not kept (K-quants and others); kept codes give the same floats bit for bit. Only
kv_b_proj is rounded anew.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from gguf import quants
from torch import Tensor, nn

from tael.data.gguf_file import GGUFFile, GGUFTensor, read_gguf
from tael.errors import TaelError
from tael.model.config import ModelConfig
from tael.model.transformer import Transformer
from tael.weights.gguf_blocks import BLOCK, KEPT, Blocks, read_blocks
from tael.weights.gguf_layout import Source, read_config, sources, to_halves
from tael.weights.quantize import QuantizedEmbedding, QuantizedExperts, QuantizedLinear, is_quantized

_BIAS = "e_score_correction_bias"
_IGNORED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_STACKS = ("gate_up_proj", "down_proj")
_AT_ONCE = 1 << 24
"""Weights dequantised at a time: bounds what is held beside the model to about 100 MB."""


def load_gguf(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    keep_quantised: bool = False,
) -> Transformer:
    """Read a GGUF file of architecture llama, qwen2 or deepseek2 into a Transformer on `device`.

    Floats become `dtype` (the router's selection bias fp32). With `keep_quantised`, linear layers, the int8 embedding
    and experts stored as Q4_0, Q4_1 or Q8_0 become quantised modules with the same codes and scales; anything else is
    dequantised, except that beside kept codes kv_b_proj, which most files hold split and transposed, is rounded to
    int8. A head of int8 codes is "w8a8": llama.cpp rounds its activations too. Raises TaelError, one line naming file
    and tensor, for a file that is damaged, incomplete, of another architecture, or holds a type that cannot be
    dequantised.
    """
    file = read_gguf(path)
    divisors = _floats(file, file.tensors["rope_freqs.weight"]) if "rope_freqs.weight" in file.tensors else None
    config = read_config(file, divisors)
    with torch.device("meta"):
        model = Transformer(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    loader = _Loader(file, config, torch.device(device), dtype)
    state: dict[str, Tensor] = {}
    used: set[str] = set(_IGNORED)
    for source in sources(config):
        source = _present(source, file)
        used.update(source.names)
        loader.check(source, expected[source.parameter])
        if keep_quantised and loader.keep(model, source):
            continue
        state[source.parameter] = loader.read(source, expected[source.parameter])
    state |= loader.place_experts(model)
    if is_quantized(model):
        _round_kv_b(model, state)
    unexpected = sorted(set(file.tensors) - used)
    if unexpected and not _is_extra_layer(unexpected[0], config):
        raise TaelError(f"{file.path}: unexpected tensor '{unexpected[0]}'; this model has parts Tael does not know")
    return _assemble(model, state)


def _present(source: Source, file: GGUFFile) -> Source:
    """`source` with the tensors that are there: some files hold kv_b, or gate and up, in one piece."""
    joined = {"kv_b": ("attn_k_b", "attn_kv_b"), "gate_up": ("ffn_gate_exps", "ffn_gate_up_exps")}
    if source.form in joined and source.names[0] not in file.tensors:
        name = source.names[0].replace(*joined[source.form])
        if name in file.tensors:
            return Source(source.parameter, (name,))
    return source


def _is_extra_layer(name: str, config: ModelConfig) -> bool:
    """MTP layers after the last: Tael's GGUF models go without."""
    part = name.split(".")
    return part[0] == "blk" and part[1].isdigit() and int(part[1]) >= config.num_hidden_layers


def _floats(file: GGUFFile, tensor: GGUFTensor) -> Tensor:
    """The tensor in fp32, of its own shape."""
    try:
        values = quants.dequantize(tensor.data, tensor.kind)
    except (NotImplementedError, ValueError) as error:
        raise TaelError(f"{file.path}: tensor '{tensor.name}' cannot be dequantised ({error})") from None
    return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(tensor.shape)


class _Loader:
    """Parameters of one model from one file."""

    def __init__(self, file: GGUFFile, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.file, self.config, self.device, self.dtype = file, config, device, dtype
        self.stacks: dict[str, dict[str, Blocks]] = {}

    def check(self, source: Source, shape: tuple[int, ...]) -> None:
        """Raise TaelError unless the source's tensors are there and make a parameter of this shape."""
        for name, wanted in zip(source.names, self._shapes(source, shape), strict=True):
            tensor = self.file.tensors.get(name)
            if tensor is None:
                raise TaelError(
                    f"{self.file.path}: tensor '{name}' is missing; the file is incomplete, fetch it again"
                )
            if tensor.shape != wanted:
                raise TaelError(
                    f"{self.file.path}: tensor '{name}' has shape {list(tensor.shape)}, its metadata call for "
                    f"{list(wanted)}; the file is damaged"
                )

    def _shapes(self, source: Source, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        if source.form == "gate_up":
            half = (shape[0], shape[1] // 2, shape[2])
            return [half, half]
        if source.form == "kv_b":
            config = self.config
            heads, rank = config.num_attention_heads, config.kv_lora_rank
            return [(heads, rank, config.qk_nope_head_dim), (heads, config.v_head_dim, rank)]
        return [shape]

    def read(self, source: Source, shape: tuple[int, ...]) -> Tensor:
        """The parameter as floats."""
        kind = torch.float32 if source.parameter.endswith(_BIAS) else self.dtype
        tensors = [self.file.tensors[name] for name in source.names]
        if source.form == "plain" and len(tensors[0].data) > 1:
            return self._by_parts(tensors[0], shape, kind)
        parts = [_floats(self.file, tensor) for tensor in tensors]
        if source.form == "pairs":
            whole = to_halves(parts[0], self.config.gqa_head_dim)
        elif source.form == "kv_b":
            whole = torch.cat((parts[0].transpose(1, 2), parts[1]), dim=1).flatten(0, 1)  # [H (N + V), R]
        else:
            whole = torch.cat(parts, dim=1) if source.form == "gate_up" else parts[0]
        return whole.reshape(shape).to(self.device, kind)

    def _by_parts(self, tensor: GGUFTensor, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        out = torch.empty(shape, dtype=kind, device=self.device)
        rows, step = out.view(-1, shape[-1]), max(1, _AT_ONCE // shape[-1])
        for start in range(0, len(rows), step):
            data = tensor.data[start : start + step]
            part = GGUFTensor(tensor.name, tensor.kind, (len(data), shape[-1]), data)
            rows[start : start + step] = _floats(self.file, part)
        return out

    def keep(self, model: Transformer, source: Source) -> bool:
        """Put the file's codes in the module's place; False when the file's type, or the module, takes none."""
        tensors = [self.file.tensors[name] for name in source.names]
        where, _, leaf = source.parameter.rpartition(".")
        if source.form == "kv_b" or any(t.kind not in KEPT or t.kind != tensors[0].kind for t in tensors):
            return False
        if leaf not in (*_STACKS, "weight"):
            return False
        blocks = self._blocks(source, tensors)
        if leaf in _STACKS:
            self.stacks.setdefault(where, {})[leaf] = blocks
            return True
        module = model.get_submodule(where)
        if isinstance(module, nn.Linear):
            if where == "lm_head" and blocks.scheme == "int8":
                blocks = dataclasses.replace(blocks, scheme="w8a8")
            _replace(model, where, blocks.linear(None if module.bias is None else module.bias.detach()))
        elif isinstance(module, nn.Embedding) and blocks.scheme == "int8":
            _replace(model, where, QuantizedEmbedding(blocks.codes, blocks.scales, dtype=self.dtype))
        else:
            return False
        return True

    def _blocks(self, source: Source, tensors: list[GGUFTensor]) -> Blocks:
        parts = [read_blocks(tensor) for tensor in tensors]
        blocks = Blocks.joined(parts) if len(parts) > 1 else parts[0]
        if source.form == "pairs":
            blocks = blocks.mapped(lambda rows: to_halves(rows, self.config.gqa_head_dim))
        return blocks.mapped(lambda part: part.to(self.device))

    def place_experts(self, model: Transformer) -> dict[str, Tensor]:
        """Kept experts into their modules; where only one of the two stacks is kept, it comes back as floats."""
        floats: dict[str, Tensor] = {}
        for where, stacks in self.stacks.items():
            if len(stacks) == len(_STACKS):
                _replace(model, where, QuantizedExperts(*(stacks[leaf].linear() for leaf in _STACKS)))
            else:
                floats |= {f"{where}.{leaf}": b.linear().dequantize(self.dtype) for leaf, b in stacks.items()}
        return floats


def _replace(model: Transformer, where: str, module: nn.Module) -> None:
    parent, _, name = where.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _round_kv_b(model: Transformer, state: dict[str, Tensor]) -> None:
    """Every kv_b_proj that was read as floats, in int8: decoding reads it whole at every step."""
    for name in [name for name in state if name.endswith(".kv_b_proj.weight")]:
        if state[name].shape[1] % BLOCK == 0:
            _replace(model, name.removesuffix(".weight"), QuantizedLinear.from_float(state.pop(name), "int8", BLOCK))


def _assemble(model: Transformer, state: dict[str, Tensor]) -> Transformer:
    model.load_state_dict(state, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        table = model.embed_tokens
        if isinstance(table, QuantizedEmbedding):
            _replace(model, "lm_head", table.head("w8a8"))
        else:
            model.lm_head.weight = table.weight
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if left:  # a slip of ours: `sources` forgot a tensor
        raise RuntimeError(f"parameters never assigned: {left}")
    return model
