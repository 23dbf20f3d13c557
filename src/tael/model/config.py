"""The shape of a model, with the keys of Hugging Face's config.json, and what that shape costs.

Shape legend, used in trailing comments everywhere in Tael:
    B batch   T query tokens   S key tokens   D hidden_size   H heads   V vocab_size
    R kv_lora_rank   N qk_nope_head_dim   P qk_rope_head_dim   E experts   K experts per token   F expert width

`ModelConfig` is frozen; `from_dict` checks it and names the first thing that cannot be. Costs live here, on
the shape: parameters (total, active), FLOPs a token, bytes of cache a token.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tael.errors import TaelError, did_you_mean

MODEL_TYPES = ("deepseek_v3", "deepseek_v2", "dots1", "llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelConfig:
    """One model's shape. The defaults are a small DeepSeek-V3; see DeepSeek-V3 (2024) section 4.2 for the real one.

    `model_type` llama, qwen2 and qwen3 mean grouped-query attention and dense layers; the MLA and MoE keys are then
    unused. dots1 has V3's experts on grouped-query attention; it and qwen3 normalise each head's queries and keys.
    """

    model_type: str = "deepseek_v3"
    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    # MLA
    q_lora_rank: int | None = None
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    # MoE
    n_routed_experts: int | None = 8
    n_shared_experts: int | None = 1
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    first_k_dense_replace: int = 1
    n_group: int | None = None
    topk_group: int | None = None
    topk_method: str | None = None
    scoring_func: str | None = None
    norm_topk_prob: bool | None = None
    routed_scaling_factor: float = 1.0
    # MTP
    num_nextn_predict_layers: int = 0
    # the rest
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)
    rope_interleave: bool = True
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    hidden_act: str = "silu"
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    @property
    def is_mla(self) -> bool:
        return self.model_type.startswith("deepseek")

    @property
    def can_have_experts(self) -> bool:
        return self.is_mla or self.model_type == "dots1"

    @property
    def has_v3_router(self) -> bool:
        return self.model_type in ("deepseek_v3", "dots1")

    @property
    def has_qk_norm(self) -> bool:
        """RMSNorm over each head's query and key, before they are rotated (Henry et al. 2020; Qwen3)."""
        return self.model_type in ("qwen3", "dots1")

    @property
    def qk_head_dim(self) -> int:
        """Width of one query head: N + P for MLA, head_dim for GQA."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.is_mla else self.gqa_head_dim

    @property
    def gqa_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def scoring(self) -> str:
        """How gate logits become scores: sigmoid (V3) or softmax (V2)."""
        return self.scoring_func or ("sigmoid" if self.has_v3_router else "softmax")

    @property
    def uses_selection_bias(self) -> bool:
        """Auxiliary-loss-free balance: a bias takes part in choosing experts, not in weighing them (V3 eq. 16)."""
        return self.has_v3_router

    @property
    def normalises_gates(self) -> bool:
        """Whether chosen gates are scaled to sum to one; transformers' V2 ignores norm_topk_prob, and so do we."""
        return self.has_v3_router and (self.norm_topk_prob is None or self.norm_topk_prob)

    def is_moe_layer(self, index: int) -> bool:
        return self.can_have_experts and bool(self.n_routed_experts) and index >= self.first_k_dense_replace

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers with experts; MTP blocks come after the main layers."""
        return [i for i in range(self.num_hidden_layers + self.num_nextn_predict_layers) if self.is_moe_layer(i)]

    # ------------------------------------------------------------------ costs

    def attention_parameters(self) -> int:
        """Parameters of one attention module, its latent norms included."""
        d, h = self.hidden_size, self.num_attention_heads
        if not self.is_mla:
            width, kv = h * self.gqa_head_dim, self.kv_heads * self.gqa_head_dim
            bias = width + 2 * kv if self.has_qkv_bias else 0
            bias += d if self.has_output_bias else 0
            return d * (2 * width + 2 * kv) + bias + (2 * self.gqa_head_dim if self.has_qk_norm else 0)
        q_out = h * self.qk_head_dim
        q = d * q_out if self.q_lora_rank is None else self.q_lora_rank * (d + 1 + q_out)
        kv = d * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
        kv += self.kv_lora_rank * h * (self.qk_nope_head_dim + self.v_head_dim)
        bias = 0
        if self.attention_bias:
            bias = (self.q_lora_rank or 0) + self.kv_lora_rank + self.qk_rope_head_dim + d
        return q + kv + h * self.v_head_dim * d + bias

    @property
    def has_qkv_bias(self) -> bool:
        return self.model_type == "qwen2" or (not self.is_mla and self.attention_bias)

    @property
    def has_output_bias(self) -> bool:
        """On grouped-query attention's o_proj; Qwen2 has biases on query, key and value alone."""
        return not self.is_mla and self.model_type != "qwen2" and self.attention_bias

    def feed_forward_parameters(self, index: int, *, active: bool) -> int:
        """Parameters of layer `index`'s feed-forward part; `active` counts what one token passes through."""
        d = self.hidden_size
        if not self.is_moe_layer(index):
            return 3 * d * self.intermediate_size
        experts = self.num_experts_per_tok if active else self.n_routed_experts or 0
        shared = self.n_shared_experts or 0
        return 3 * d * self.moe_intermediate_size * (experts + shared) + d * (self.n_routed_experts or 0)

    def parameters(self, *, active: bool = False, embedding: bool = True, mtp: bool = True) -> int:
        """Number of parameters, biases of the router's selection left out (they are no weights).

        `active`: only what one token passes through. `embedding`: with the input table. `mtp`: with the MTP modules.
        """
        d = self.hidden_size
        layers = self.num_hidden_layers + (self.num_nextn_predict_layers if mtp else 0)
        total = sum(
            self.attention_parameters() + self.feed_forward_parameters(i, active=active) + 2 * d
            for i in range(layers)
        )
        total += (layers - self.num_hidden_layers) * (2 * d * d + 3 * d)
        table = self.vocab_size * d
        head = 0 if self.tie_word_embeddings and embedding else table
        return total + d + head + (table if embedding else 0)

    def flops_per_token(self, context: float, *, training: bool = True) -> float:
        """Floating-point operations a token at a mean of `context` attended tokens (2 a multiply-add).

        Matrix parameters that a token meets cost 2 each forward and 4 backward (Kaplan et al. 2020, section 2.1);
        attention adds 2 H (qk_head_dim + v_head_dim) a key and layer. The shared head runs once more per MTP depth.
        Training counts forward and backward.
        """
        layers = self.num_hidden_layers + (self.num_nextn_predict_layers if training else 0)
        mtp = layers - self.num_hidden_layers
        matrices = (
            self.parameters(active=True, embedding=False, mtp=bool(mtp)) + mtp * self.vocab_size * self.hidden_size
        )
        v_dim = self.v_head_dim if self.is_mla else self.gqa_head_dim
        attention = layers * 2 * self.num_attention_heads * (self.qk_head_dim + v_dim) * context
        return (3 if training else 1) * (2 * matrices + attention)

    def cache_values_per_token(self) -> int:
        """Values one token leaves in one layer's cache: R + P for MLA, keys and values for GQA (V2 table 1)."""
        if self.is_mla:
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.kv_heads * self.gqa_head_dim

    def cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes of cache a token over all main layers."""
        return self.num_hidden_layers * self.cache_values_per_token() * bytes_per_value

    def mha_cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """The same for plain multi-head attention of this shape (every head keeps its key and value)."""
        v_dim = self.v_head_dim if self.is_mla else self.gqa_head_dim
        return self.num_hidden_layers * self.num_attention_heads * (self.qk_head_dim + v_dim) * bytes_per_value

    # ------------------------------------------------------------ in and out

    @classmethod
    def from_dict(cls, table: dict[str, Any], *, strict: bool = True, where: str = "model") -> ModelConfig:
        """Check a table of Hugging Face keys. `strict` refuses unknown keys (recipes); config.json files carry many.

        Raises TaelError naming the key for an unknown model_type or key, or a shape that cannot be.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        table = _translate(dict(table))
        if strict and (unknown := sorted(set(table) - names)):
            raise TaelError(f"{where}: unknown key '{unknown[0]}'{did_you_mean(unknown[0], names)}")
        optional = {f.name for f in dataclasses.fields(cls) if str(f.type).endswith("None")}
        known: dict[str, Any] = {k: v for k, v in table.items() if k in names and (v is not None or k in optional)}
        model_type = known.get("model_type", "deepseek_v3" if strict else None)
        if model_type not in MODEL_TYPES:
            raise TaelError(
                f"{where}: model_type '{model_type}' is not supported; use one of {', '.join(MODEL_TYPES)}"
            )
        if not strict:
            known = {**_HUGGING_FACE_DEFAULTS[model_type], **known}
        config = cls(**known)
        _check(config, where)
        return config

    @classmethod
    def load(cls, path: str | Path) -> ModelConfig:
        """Read a folder's config.json (or the file itself); raises TaelError when it is missing or no config."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise TaelError(f"{path}: no such file; a model folder holds config.json and model.safetensors") from None
        except (ValueError, RecursionError) as error:
            raise TaelError(f"{path}: not a JSON config: {error}") from None
        if not isinstance(table, dict):
            raise TaelError(f"{path}: not a model config: expected a JSON object")
        return cls.from_dict(table, strict=False, where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The table for config.json, readable by transformers."""
        table = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        table["num_key_value_heads"] = self.kv_heads
        if self.can_have_experts:
            self._write_experts(table)
        if self.is_mla:
            table.pop("head_dim", None)
            table["q_lora_rank"] = self.q_lora_rank
        else:
            keep_out = {"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
            keep_out |= {"rope_interleave", "topk_method", "scoring_func"}
            if not self.can_have_experts:
                keep_out |= _EXPERT_KEYS
            table = {key: value for key, value in table.items() if key not in keep_out}
            table["head_dim"] = self.gqa_head_dim
            if not self.num_nextn_predict_layers:
                table.pop("num_nextn_predict_layers")
        names = {
            "deepseek_v3": "DeepseekV3ForCausalLM",
            "deepseek_v2": "DeepseekV2ForCausalLM",
            "llama": "LlamaForCausalLM",
            "dots1": "Dots1ForCausalLM",
            "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM",
        }
        table["architectures"] = [names[self.model_type]]
        return table

    def _write_experts(self, table: dict[str, Any]) -> None:
        table["n_group"], table["topk_group"] = self.n_group or 1, self.topk_group or 1
        limited = "group_limited_greedy" if table["n_group"] > 1 else "greedy"
        table["topk_method"] = self.topk_method or ("noaux_tc" if self.uses_selection_bias else limited)
        table["scoring_func"] = self.scoring
        table["norm_topk_prob"] = self.normalises_gates
        table["n_shared_experts"] = self.n_shared_experts or 0
        if not self.n_routed_experts:
            table["first_k_dense_replace"] = self.num_hidden_layers + self.num_nextn_predict_layers


_EXPERT_KEYS = {
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace",
    "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
}  # fmt: skip

# What transformers assumes when an original config.json leaves a key out; only where it differs from ours.
_HUGGING_FACE_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5},
    "deepseek_v2": {"n_shared_experts": 2, "first_k_dense_replace": 0, "topk_method": "greedy"},
    "dots1": {"norm_topk_prob": False, "first_k_dense_replace": 0},
    "llama": {"rms_norm_eps": 1e-6},
    "qwen2": {"rms_norm_eps": 1e-6},
    "qwen3": {"rms_norm_eps": 1e-6, "head_dim": 128},
}


def _translate(table: dict[str, Any]) -> dict[str, Any]:
    """Bring newer spellings (rope_parameters, num_mtp_layers) to the original DeepSeek ones."""
    rope = table.pop("rope_parameters", None)
    if isinstance(rope, dict):
        rope = dict(rope)
        table.setdefault("rope_theta", rope.pop("rope_theta", 10000.0))
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            table["rope_scaling"] = table.get("rope_scaling") or rope
    if "num_mtp_layers" in table:
        table.setdefault("num_nextn_predict_layers", table.pop("num_mtp_layers"))
    for key in ("eos_token_id", "bos_token_id"):
        if isinstance(table.get(key), list):
            table[key] = next(iter(table[key]), None)
    return table


def _check(config: ModelConfig, where: str) -> None:
    """Refuse what cannot be built; the message names the key and what would do."""

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise TaelError(f"{where}: {message}")

    _check_kinds(config, need)
    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    if config.is_mla:
        sizes += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
    if config.can_have_experts and config.n_routed_experts:
        sizes += ["num_experts_per_tok", "moe_intermediate_size"]
    for key in sizes:
        need(getattr(config, key) >= 1, f"{key} must be a whole number >= 1, not {getattr(config, key)}")
    need(config.hidden_act == "silu", f"hidden_act '{config.hidden_act}' is not supported, only 'silu'")
    rotary = config.qk_rope_head_dim if config.is_mla else config.gqa_head_dim
    need(
        rotary % 2 == 0,
        f"{'qk_rope_head_dim' if config.is_mla else 'head_dim'} {rotary} must be even: RoPE rotates pairs",
    )
    if not config.is_mla:
        need(
            config.head_dim is not None or config.hidden_size % config.num_attention_heads == 0,
            f"hidden_size {config.hidden_size} is no multiple of num_attention_heads {config.num_attention_heads}",
        )
        need(
            config.num_attention_heads % config.kv_heads == 0,
            f"num_attention_heads {config.num_attention_heads} is no multiple of "
            f"num_key_value_heads {config.kv_heads}",
        )
    if config.can_have_experts and config.n_routed_experts:
        _check_experts(config, need)
    if config.rope_scaling:
        _check_rope_scaling(config.rope_scaling, need)


_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "int": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
    "bool": ("true or false", (bool,)),
    "str": ("a string", (str,)),
    "dict[str, Any]": ("a table", (dict,)),
}
_AT_LEAST_ONE = ("num_key_value_heads", "head_dim", "q_lora_rank", "n_group", "topk_group", "max_position_embeddings")
_NOT_NEGATIVE = ("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers")


def _check_kinds(config: ModelConfig, need: Any) -> None:
    """Each value of its field's type and within bounds: a config.json is a stranger's file."""
    for field_ in dataclasses.fields(config):
        value, name = getattr(config, field_.name), field_.name
        if value is None:
            continue  # only where the field allows it, see from_dict
        words, types = _KINDS[str(field_.type).removesuffix(" | None")]
        shown = repr(value) if len(repr(value)) <= 40 else repr(value)[:37] + "..."
        need(
            isinstance(value, types) and (bool in types or not isinstance(value, bool)),
            f"{name} must be {words}, not {shown}",
        )
        if isinstance(value, int | float):
            need(-1e30 < value < (2**31 if types == (int,) else 1e30), f"{name} is out of range: {shown}")
        if name in _AT_LEAST_ONE:
            need(value >= 1, f"{name} must be 1 or more, not {shown}")
        if name in _NOT_NEGATIVE or name in ("rms_norm_eps", "initializer_range"):
            need(value >= 0, f"{name} must not be negative: {shown}")
    need(config.rope_theta > 1, f"rope_theta must be more than 1, not {config.rope_theta}")
    methods = (None, "noaux_tc", "greedy", "group_limited_greedy")
    need(
        config.topk_method in methods,
        f"topk_method '{config.topk_method}' is none of {', '.join(map(str, methods[1:]))}",
    )


def _check_rope_scaling(scaling: dict[str, Any], need: Any) -> None:
    kind = scaling.get("rope_type", scaling.get("type"))
    need(
        kind in ("yarn", "llama3", "linear"),
        f"rope_scaling type {kind!r} is not supported; use yarn, llama3 or linear",
    )
    required = ["factor"]
    if kind == "llama3":
        required += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for key in required:
        need(scaling.get(key) is not None, f"rope_scaling lacks '{key}'")
    optional = ["original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"]
    for key in [*required, *optional, "mscale", "mscale_all_dim"]:
        value = scaling.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fine = value is None or (number and (0 < value < 1e30 or (value == 0 and key.startswith("mscale"))))
        need(fine, f"rope_scaling: {key} must be a number above 0, not {value!r}")


def _check_experts(config: ModelConfig, need: Any) -> None:
    experts, groups, kept = config.n_routed_experts or 0, config.n_group or 1, config.topk_group or 1
    need(config.scoring in ("sigmoid", "softmax"), f"scoring_func '{config.scoring}' must be sigmoid or softmax")
    need(experts % groups == 0, f"n_routed_experts {experts} is no multiple of n_group {groups}")
    need(kept <= groups, f"topk_group {kept} is more than n_group {groups}")
    need(
        config.num_experts_per_tok <= kept * (experts // groups),
        f"num_experts_per_tok {config.num_experts_per_tok} is more than the {kept * (experts // groups)} experts "
        "that topk_group leaves",
    )
    if config.uses_selection_bias and groups > 1:
        need(experts // groups >= 2, f"n_group {groups}: a group needs 2 experts or more (its score is a top-2 sum)")
