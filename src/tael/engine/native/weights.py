"""A Transformer's weights as the operator reads them: floats where they lie, quantised ones packed into panels.

Packing is done once a model; float weights are shared with the model, so that what training changes in place is seen.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tael.errors import TaelError
from tael.model.attention import GroupedQueryAttention, MultiHeadLatentAttention
from tael.model.config import ModelConfig
from tael.model.moe import Experts, FeedForward, MixtureOfExperts
from tael.model.mtp import MTPModule
from tael.model.rope import softmax_scale
from tael.model.transformer import Block, Transformer
from tael.weights.quantize import QuantizedEmbedding, QuantizedExperts, QuantizedLinear

LATENT_EPS = 1e-6
"""Of the latent norms, as in tael.model.attention."""


@dataclass
class NativeWeights:
    """The operator with a model's weights in it.

    `model_bytes` counts all that passes may read, shared memory once; `step_bytes` what one token's pass reads: of
    the experts as many as it is routed to, no row of the embedding, no MTP module.
    """

    operator: Any
    model_bytes: int
    step_bytes: int
    addresses: tuple[int, ...]


_PACKED: weakref.WeakKeyDictionary[Transformer, NativeWeights] = weakref.WeakKeyDictionary()


def native_weights(
    model: Transformer, library: ModuleType, threads: int, mtp: bool = True, release: bool = False
) -> NativeWeights:
    """The weights of `model` in the operator; packed at the first call, and again when its tensors are others.

    `release` frees the codes of every layer once they are packed, so that the weights are held once (at most a layer
    twice): only runners of this `mtp` and these `threads` can use the model from then on, and its own `forward`
    cannot. Raises TaelError when the model's shape is not for the operator, or its codes are gone.
    """
    check_shape(model.config)
    held = _PACKED.get(model)
    if held is None or held.addresses != _addresses(model, threads, mtp):
        if any(isinstance(m, QuantizedLinear) and not m.codes.numel() for m in model.modules()):
            raise TaelError("this model's codes were given up for another runner (release); load it anew")
        held = _PACKED[model] = _Builder(model, library, threads, mtp, release).weights()
        held.addresses = _addresses(model, threads, mtp)
    return held


def _addresses(model: Transformer, threads: int, mtp: bool) -> tuple[int, ...]:
    return threads, int(mtp), *(t.data_ptr() for t in model.state_dict().values())


def _release(module: nn.Module) -> None:
    """Free the codes below `module`."""
    for each in module.modules():
        if isinstance(each, QuantizedLinear | QuantizedEmbedding):
            each.codes, each.scales = each.codes.new_empty(0), each.scales.new_empty(0)
        if isinstance(each, QuantizedLinear):
            each.minimums = None if each.minimums is None else each.minimums.new_empty(0)
            each._weight = None


def check_types(model: Transformer) -> None:
    """Raise TaelError for experts in a form that the operator does not read."""
    for block in model.modules():
        if isinstance(block, Block) and isinstance(block.mlp, MixtureOfExperts):
            experts = block.mlp.experts
            if not isinstance(experts, Experts | QuantizedExperts):
                _views(experts)(0)


def _views(experts: nn.Module) -> Any:
    views = getattr(experts, "expert", None)
    if views is None:
        raise TaelError(f"the C++ operator does not know experts of type {type(experts).__name__}")
    return views


def check_shape(config: ModelConfig) -> None:
    """Raise TaelError for a width the operator's eight lanes do not divide, and for what it does not know."""
    if config.has_qk_norm:
        raise TaelError("the C++ operator does not normalise queries and keys (qwen3, dots1); use backend = 'torch'")
    names = ["hidden_size", "intermediate_size"]
    if config.is_mla:
        names += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
        names += ["q_lora_rank"] if config.q_lora_rank else []
        names += ["moe_intermediate_size"] if config.n_routed_experts else []
    widths = {name: getattr(config, name) for name in names}
    if not config.is_mla:
        widths["head_dim"] = config.gqa_head_dim
        if config.num_attention_heads // config.kv_heads > 64:
            raise TaelError("the C++ operator takes up to 64 query heads a key head; use backend = 'torch'")
    for name, width in widths.items():
        if width % 8:
            raise TaelError(
                f"the C++ operator needs {name} to be a multiple of 8, not {width}; use backend = 'torch'"
            )


class _Builder:
    def __init__(self, model: Transformer, library: ModuleType, threads: int, mtp: bool, release: bool) -> None:
        self.model, self.library, self.release = model, library, release
        self.bytes = self.idle = 0
        """Bytes of all weights, and those that one token's pass does not read."""
        self.operator = library.Model(self._shape(model.config), threads)
        self.modules = [m for m in model.mtp if isinstance(m, MTPModule)] if mtp else []

    def weights(self) -> NativeWeights:
        model, first = self.model, self.model.config.num_hidden_layers
        for block in model.layers:
            self._add_layer(block)
        main, idle = self.bytes, self.idle
        for module in self.modules:
            self._add_layer(module.block)
        self.idle = idle + self.bytes - main
        before = self.bytes
        embedding = self._embedding()
        self.idle += 0 if model.config.tie_word_embeddings else self.bytes - before
        tied = model.config.tie_word_embeddings
        quantised = isinstance(model.embed_tokens, QuantizedEmbedding)
        head = embedding if tied and not quantised else self._matrix(model.lm_head)
        if tied and quantised and isinstance(model.lm_head, QuantizedLinear):
            embedding = head  # one packed copy serves both
        self.operator.set_ends(embedding, head, _vector(model.norm.weight))
        for index, module in enumerate(self.modules):
            before = self.bytes
            self.operator.add_draft(
                _vector(module.enorm.weight),
                _vector(module.hnorm.weight),
                _vector(module.norm.weight),
                self._matrix(module.eh_proj),
                first + index,
            )
            self.idle += self.bytes - before
        if self.release:
            _release(model)
        return NativeWeights(self.operator, self.bytes, self.bytes - self.idle, ())

    def _shape(self, config: ModelConfig) -> Any:
        shape = self.library.Shape()
        shape.hidden, shape.heads = config.hidden_size, config.num_attention_heads
        shape.eps, shape.latent_eps, shape.scale = config.rms_norm_eps, LATENT_EPS, softmax_scale(config)
        shape.mla, shape.interleaved = config.is_mla, config.is_mla and config.rope_interleave
        if not config.is_mla:
            shape.kv_heads, shape.head_dim = config.kv_heads, config.gqa_head_dim
            return shape
        shape.rank, shape.nope = config.kv_lora_rank, config.qk_nope_head_dim
        shape.rope, shape.value = config.qk_rope_head_dim, config.v_head_dim
        router = next((m.gate for m in self.model.modules() if isinstance(m, MixtureOfExperts)), None)
        if router is not None:
            shape.experts, shape.chosen, shape.groups = router.experts, router.k, router.groups
            shape.kept_groups, shape.group_top = router.kept_groups, router.group_top
            shape.limits_groups, shape.sigmoid = router.limits_groups, router.scoring == "sigmoid"
            shape.normalises, shape.routed_scale = router.normalises, router.scale
        return shape

    def _add_layer(self, block: nn.Module) -> None:
        assert isinstance(block, Block)
        layer, attention, mlp = self.library.Layer(), block.self_attn, block.mlp
        vectors = {
            "input_norm": _vector(block.input_layernorm.weight),
            "post_norm": _vector(block.post_attention_layernorm.weight),
        }
        layer.o = self._matrix(attention.o_proj)
        if isinstance(attention, GroupedQueryAttention):
            layer.q, layer.k, layer.v = (
                self._matrix(m) for m in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
        else:
            assert isinstance(attention, MultiHeadLatentAttention)
            vectors |= self._add_latent(layer, attention)
        if isinstance(mlp, MixtureOfExperts):
            vectors |= self._add_experts(layer, mlp)
            mlp = getattr(mlp, "shared_experts", None)
        if isinstance(mlp, FeedForward):
            layer.gate, layer.up, layer.down = (self._matrix(m) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.operator.add_layer(layer, vectors)
        if self.release:
            _release(block)

    def _add_latent(self, layer: Any, attention: MultiHeadLatentAttention) -> dict[str, Tensor]:
        vectors = {"kv_norm": _vector(attention.kv_a_layernorm.weight)}
        if hasattr(attention, "q_proj"):
            layer.q = self._matrix(attention.q_proj)
        else:
            layer.q_a, layer.q = self._matrix(attention.q_a_proj), self._matrix(attention.q_b_proj)
            vectors["q_norm"] = _vector(attention.q_a_layernorm.weight)
        layer.kv_a = self._matrix(attention.kv_a_proj_with_mqa)
        layer.kv_b = self._matrix(attention.kv_b_proj)
        if isinstance(attention.kv_b_proj, QuantizedLinear):
            # W_UK is summed over its rows: a copy of floats in rows, 2 bytes a value.
            up = attention.kv_b_proj.dequantize(torch.float16).view(attention.heads, -1, attention.rank)
            layer.key_up = self._floats(up[:, : attention.nope].reshape(-1, attention.rank).contiguous(), None)
        else:
            layer.key_up = layer.kv_b
        return vectors

    def _add_experts(self, layer: Any, mlp: MixtureOfExperts) -> dict[str, Tensor]:
        vectors = {}
        layer.router = self._floats(_vector(mlp.gate.weight), None)
        if hasattr(mlp.gate, "e_score_correction_bias"):
            vectors["router_bias"] = _vector(mlp.gate.e_score_correction_bias)
        before = self.bytes
        for expert in range(mlp.gate.experts):
            layer.add_expert(*self._expert(mlp.experts, expert))
        self.idle += (self.bytes - before) * (mlp.gate.experts - mlp.gate.k) // mlp.gate.experts
        return vectors

    def _expert(self, experts: nn.Module, index: int) -> tuple[Any, Any, Any]:
        """Gate, up and down of one expert."""
        if isinstance(experts, Experts):
            gate, up = experts.gate_up_proj.detach()[index].chunk(2)
            return (
                self._floats(gate, None),
                self._floats(up, None),
                self._floats(experts.down_proj.detach()[index], None),
            )
        if isinstance(experts, QuantizedExperts):
            both, half = experts.gate_up.expert(index), experts.gate_up.out_features // 2
            gate, up = (self._packed(both, rows) for rows in (slice(0, half), slice(half, None)))
            return gate, up, self._packed(experts.down.expert(index))
        gate, up, down = _views(experts)(index)
        return self._floats(gate, None), self._floats(up, None), self._floats(down, None)

    def _matrix(self, module: nn.Module) -> Any:
        if isinstance(module, QuantizedLinear):
            return self._packed(module)
        assert isinstance(module, nn.Linear)
        return self._floats(module.weight, None if module.bias is None else _vector(module.bias))

    def _embedding(self) -> Any:
        table = self.model.embed_tokens
        if isinstance(table, QuantizedEmbedding):
            if self.model.config.tie_word_embeddings:
                return None
            return self._packed(table.head("w8a8"))
        return self._floats(table.weight, None)

    def _floats(self, weight: Tensor, bias: Tensor | None) -> Any:
        self.bytes += weight.nbytes
        return self.library.float_matrix(weight.detach(), bias)

    def _packed(self, module: QuantizedLinear, rows: slice = slice(None)) -> Any:
        codes, scales = module.codes[rows].contiguous(), module.scales[rows].contiguous()
        minimums = None if module.minimums is None else module.minimums[rows].contiguous()
        packed = self.library.pack(module.scheme, codes, scales, minimums)
        self.bytes += packed.nbytes
        bias = None if module.bias is None else _vector(module.bias)
        return self.library.packed_matrix(
            module.scheme, packed, codes.shape[0], module.in_features, minimums is not None, bias
        )


def _vector(tensor: Tensor) -> Tensor:
    """fp32 and contiguous; the same memory where it is that already."""
    return tensor.detach().to(torch.float32).contiguous()
