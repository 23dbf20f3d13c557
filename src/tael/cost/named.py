"""Published models by name: shape, how each was trained where that is known, and where it is written.

Sizes come from the models' own reports and config.json files, read from memory of them and checked against the
published parameter counts (tests/cost/test_plan_shapes.py); V4-Flash follows transformers' deepseek_v4 defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tael.cost.shapes import Attention, Block, Shape, grouped, latent
from tael.errors import TaelError, did_you_mean


@dataclass(frozen=True)
class NamedModel:
    """A shape with the training its makers describe; `batch_tokens` is the final global batch."""

    shape: Shape
    tokens: float
    sequence: int
    batch_tokens: float
    precision: str
    source: str
    published_parameters: float
    published_active: float | None = None

    @property
    def name(self) -> str:
        return self.shape.name


def find_model(name: str) -> NamedModel:
    """A model by name or alias; raises TaelError with the nearest name."""
    plain = name.lower().replace("_", "-")
    known = MODELS.get(_ALIASES.get(plain, plain))
    if known is None:
        raise TaelError(f"unknown model '{name}'{did_you_mean(plain, [*MODELS, *_ALIASES])}")
    return known


# -------------------------------------------------------------------------- makers


def _dense(
    name: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    width: int,
    vocab: int,
    *,
    head_dim: int | None = None,
    matrices: int = 3,
    tied: bool = False,
) -> Shape:
    block = Block(layers, grouped(hidden, heads, kv_heads, head_dim), dense_width=width, matrices=matrices)
    return Shape(name, hidden, vocab, (block,), tied=tied)


def _deepseek(
    name: str,
    *,
    layers: int,
    dense: int,
    hidden: int,
    vocab: int,
    attention: Attention,
    dense_width: int,
    experts: tuple[int, int, int, int],
    mtp: int = 0,
    node_limit: int | None = None,
) -> Shape:
    """`experts`: routed, chosen, shared, width."""
    routed, chosen, shared, width = experts
    blocks = (
        Block(dense, attention, dense_width=dense_width),
        Block(layers - dense, attention, experts=routed, chosen=chosen, shared=shared, expert_width=width),
    )
    return Shape(name, hidden, vocab, blocks, mtp=mtp, node_limit=node_limit)


def _mixture(
    name: str, layers: int, hidden: int, attention: Attention, vocab: int, experts: tuple[int, int, int, int]
) -> Shape:
    routed, chosen, shared, width = experts
    block = Block(layers, attention, experts=routed, chosen=chosen, shared=shared, expert_width=width)
    return Shape(name, hidden, vocab, (block,))


_V3_ATTENTION = latent(7168, 128, kv_rank=512, nope=128, rope=64, v=128, q_rank=1536)
_V2_ATTENTION = latent(5120, 128, kv_rank=512, nope=128, rope=64, v=128, q_rank=1536)
_LITE_ATTENTION = latent(2048, 16, kv_rank=512, nope=128, rope=64, v=128, q_rank=None)
_KIMI_ATTENTION = latent(7168, 64, kv_rank=512, nope=128, rope=64, v=128, q_rank=1536)
_DSA = replace(
    _V3_ATTENTION,
    top_k=2048,
    index_heads=64,
    index_dim=128,
    index_parameters=1536 * 64 * 128 + 7168 * 128 + 7168 * 64,
)


def _v3(name: str, attention: Attention) -> Shape:
    return _deepseek(
        name, layers=61, dense=3, hidden=7168, vocab=129280, attention=attention, dense_width=18432,
        experts=(256, 8, 1, 2048), mtp=1, node_limit=4,
    )  # fmt: skip


def _v4_flash() -> Shape:
    """CSA (1 key a 4 tokens, indexer, top 512) and HCA (1 a 128) in turn, each with a window of 128 tokens."""
    d, heads, dim, rank, groups = 4096, 64, 512, 1024, 8
    q = rank * (d + heads * dim)
    out = heads * dim * rank + groups * rank * d
    compressor = 2 * d * dim
    matrices = q + d * dim + out + compressor
    base = Attention(
        matrices, heads, dim, dim, cache=dim, kv_heads=1, window=128, vectors=rank + dim + heads,
        decode_qk=dim, decode_v=dim,
    )  # fmt: skip
    indexer = rank * 64 * 128 + d * 64 + 2 * d * 128
    sparse = replace(base, compress=4, top_k=512, index_heads=64, index_dim=128, index_parameters=indexer)
    heavy = replace(base, compress=128)
    moe = {"experts": 256, "chosen": 6, "shared": 1, "expert_width": 2048}
    return Shape("deepseek-v4-flash", d, 129280, (Block(22, heavy, **moe), Block(21, sparse, **moe)), mtp=1)


def _maverick() -> Shape:
    attention = grouped(5120, 40, 8, 128)
    return Shape(
        "llama-4-maverick",
        5120,
        202048,
        (
            Block(24, attention, dense_width=16384),
            Block(24, attention, experts=128, chosen=1, shared=1, expert_width=8192),
        ),
    )


_V2_REPORT, _V3_REPORT = "DeepSeek-V2 report, arXiv 2405.04434", "DeepSeek-V3 report, arXiv 2412.19437"
_LLAMA1, _LLAMA2 = "LLaMA, arXiv 2302.13971, tables 2 and 15", "Llama 2, arXiv 2307.09288, tables 1 and 2"
_LLAMA3, _LLAMA4 = "Llama 3.1 model card; arXiv 2407.21783", "Llama 4 model card, 2025-04"
_QWEN25, _QWEN3 = "Qwen2.5 report, arXiv 2412.15115", "Qwen3 report, arXiv 2505.09388"
_T = 1e12


def _all() -> tuple[NamedModel, ...]:
    lite = _deepseek(
        "deepseek-v2-lite", layers=27, dense=1, hidden=2048, vocab=102400, attention=_LITE_ATTENTION,
        dense_width=10944, experts=(64, 6, 2, 1408),
    )  # fmt: skip
    v2 = _deepseek(
        "deepseek-v2", layers=60, dense=1, hidden=5120, vocab=102400, attention=_V2_ATTENTION,
        dense_width=12288, experts=(160, 6, 2, 1536), node_limit=3,
    )  # fmt: skip
    kimi = _deepseek(
        "kimi-k2", layers=61, dense=1, hidden=7168, vocab=163840, attention=_KIMI_ATTENTION,
        dense_width=18432, experts=(384, 8, 1, 2048),
    )  # fmt: skip
    qwen30 = _mixture("qwen3-30b-a3b", 48, 2048, grouped(2048, 32, 4, 128), 151936, (128, 8, 0, 768))
    qwen235 = _mixture("qwen3-235b-a22b", 94, 4096, grouped(4096, 64, 4, 128), 151936, (128, 8, 0, 1536))
    scout = _mixture("llama-4-scout", 48, 5120, grouped(5120, 40, 8, 128), 202048, (16, 1, 1, 8192))
    n = NamedModel
    return (
        n(lite, 5.7 * _T, 4096, 4608 * 4096, "bf16", _V2_REPORT, 15.7e9, 2.66e9),
        n(v2, 8.1 * _T, 4096, 9216 * 4096, "bf16", _V2_REPORT, 236e9, 21e9),
        n(_v3("deepseek-v3", _V3_ATTENTION), 14.8 * _T, 4096, 15360 * 4096, "fp8", _V3_REPORT, 671e9, 37e9),
        n(_v3("deepseek-v3.2", _DSA), 14.8 * _T, 4096, 15360 * 4096, "fp8", "V3.2 report, 2025-12", 671e9, 37e9),
        n(_v4_flash(), 32 * _T, 4096, 64e6, "fp8", "transformers deepseek_v4; tokens 2nd hand", 284e9, 13e9),
        n(
            _dense("deepseek-67b", 95, 8192, 64, 8, 22016, 102400),
            2 * _T, 4096, 4608 * 4096, "bf16", "DeepSeek LLM, arXiv 2401.02954", 67e9,
        ),
        n(_dense("llama-1-7b", 32, 4096, 32, 32, 11008, 32000), 1 * _T, 2048, 4e6, "bf16", _LLAMA1, 6.7e9),
        n(_dense("llama-1-13b", 40, 5120, 40, 40, 13824, 32000), 1 * _T, 2048, 4e6, "bf16", _LLAMA1, 13e9),
        n(_dense("llama-1-33b", 60, 6656, 52, 52, 17920, 32000), 1.4 * _T, 2048, 4e6, "bf16", _LLAMA1, 32.5e9),
        n(_dense("llama-1-65b", 80, 8192, 64, 64, 22016, 32000), 1.4 * _T, 2048, 4e6, "bf16", _LLAMA1, 65.2e9),
        n(_dense("llama-2-7b", 32, 4096, 32, 32, 11008, 32000), 2 * _T, 4096, 4e6, "bf16", _LLAMA2, 6.7e9),
        n(_dense("llama-2-13b", 40, 5120, 40, 40, 13824, 32000), 2 * _T, 4096, 4e6, "bf16", _LLAMA2, 13e9),
        n(_dense("llama-2-34b", 48, 8192, 64, 8, 22016, 32000), 2 * _T, 4096, 4e6, "bf16", _LLAMA2, 34e9),
        n(_dense("llama-2-70b", 80, 8192, 64, 8, 28672, 32000), 2 * _T, 4096, 4e6, "bf16", _LLAMA2, 69e9),
        n(_dense("llama-3.1-8b", 32, 4096, 32, 8, 14336, 128256), 15 * _T, 8192, 16e6, "bf16", _LLAMA3, 8.03e9),
        n(_dense("llama-3.1-70b", 80, 8192, 64, 8, 28672, 128256), 15 * _T, 8192, 16e6, "bf16", _LLAMA3, 70.6e9),
        n(
            _dense("llama-3.1-405b", 126, 16384, 128, 8, 53248, 128256),
            15.6 * _T, 8192, 16e6, "bf16", _LLAMA3, 405.9e9,
        ),
        n(scout, 40 * _T, 8192, 16e6, "fp8", _LLAMA4, 109e9, 17e9),
        n(_maverick(), 22 * _T, 8192, 16e6, "fp8", _LLAMA4, 400e9, 17e9),
        n(_dense("qwen2.5-7b", 28, 3584, 28, 4, 18944, 152064), 18 * _T, 4096, 4e6, "bf16", _QWEN25, 7.62e9),
        n(_dense("qwen2.5-72b", 80, 8192, 64, 8, 29568, 152064), 18 * _T, 4096, 16e6, "bf16", _QWEN25, 72.7e9),
        n(qwen30, 36 * _T, 4096, 16e6, "bf16", _QWEN3, 30.5e9, 3.3e9),
        n(qwen235, 36 * _T, 4096, 32e6, "bf16", _QWEN3, 235e9, 22e9),
        n(kimi, 15.5 * _T, 4096, 67e6, "bf16", "Kimi K2 report, arXiv 2507.20534", 1.04e12, 32.6e9),
        n(
            _dense("bloom-176b", 70, 14336, 112, 112, 4 * 14336, 250880, matrices=2, tied=True),
            0.366 * _T, 2048, 2048 * 2048, "bf16", "BLOOM, arXiv 2211.05100", 176.2e9,
        ),
        n(
            _dense("falcon-180b", 80, 14848, 232, 8, 4 * 14848, 65024, head_dim=64, matrices=2, tied=True),
            3.5 * _T, 2048, 2048 * 2048, "bf16", "Falcon series, arXiv 2311.16867", 180e9,
        ),
        n(
            _dense("smollm3-3b", 36, 2048, 16, 4, 11008, 128256, tied=True),
            11.2 * _T, 4096, 2359296, "bf16", "SmolLM3 blog and training configs, 2025-07", 3.08e9,
        ),
    )  # fmt: skip


MODELS = {model.name: model for model in _all()}
_ALIASES = {
    "v3": "deepseek-v3", "v2": "deepseek-v2", "v2-lite": "deepseek-v2-lite", "v3.2": "deepseek-v3.2",
    "deepseek-r1": "deepseek-v3", "deepseek-v3.1": "deepseek-v3", "v4-flash": "deepseek-v4-flash",
    "llama-3-8b": "llama-3.1-8b", "llama-3-70b": "llama-3.1-70b", "falcon": "falcon-180b", "bloom": "bloom-176b",
}  # fmt: skip
