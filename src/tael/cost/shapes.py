"""What a model costs by its shape: parameters, FLOPs by part, cache and memory traffic of one token.

A `Shape` is wider than `ModelConfig`, which holds what Tael itself can run: it also describes models that are only
planned for (sparse attention, experts beside grouped-query attention, two-matrix feed-forwards), as a row of blocks.
`shape_of(config)` makes one from a ModelConfig; a test holds both to the same counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from tael.model.config import ModelConfig


@dataclass(frozen=True)
class Attention:
    """One attention module, reduced to the sizes that cost something."""

    matrices: int
    """Parameters of its projections."""
    heads: int
    qk: int
    v: int
    """Widths of a head's query (and key) and value, in training and prefill."""
    cache: int
    """Values one token leaves in the cache."""
    kv_heads: int
    vectors: int = 0
    """Norms and biases."""
    decode_qk: int | None = None
    decode_v: int | None = None
    """The same widths while decoding from the cache, where they differ: absorbed MLA reads the latent itself."""
    window: int | None = None
    """Never attends to more keys than this."""
    compress: int = 1
    """Keys (and cache entries) a so many tokens."""
    top_k: int | None = None
    """Attends to so many keys that the indexer chooses."""
    index_heads: int = 0
    index_dim: int = 0
    index_parameters: int = 0

    def attended(self, context: float) -> float:
        """Keys a query meets when `context` tokens stand before it."""
        keys = context / self.compress
        if self.top_k is not None:
            keys = min(keys, self.top_k)
        return min(keys, self.window or keys) if self.compress == 1 else keys + min(self.window or 0, context)

    def score_flops(self, context: float, *, decode: bool = False) -> float:
        """Forward FLOPs of scores and weighted sum for one query: 2 H (qk + v) a key."""
        widths = (self.decode_qk or self.qk) + (self.decode_v or self.v) if decode else self.qk + self.v
        return 2.0 * self.heads * widths * self.attended(context)

    def index_flops(self, context: float) -> float:
        """Forward FLOPs of the lightning indexer for one query (V3.2 report, equation 1)."""
        scores = 2.0 * self.index_heads * self.index_dim * context / self.compress
        return scores + 2.0 * self.index_parameters

    def cache_values(self) -> float:
        """Values a token leaves, its indexer key included."""
        return (self.cache + (self.index_dim if self.index_heads else 0)) / self.compress


@dataclass(frozen=True)
class Block:
    """`count` equal layers."""

    count: int
    attention: Attention
    dense_width: int = 0
    """Width of the feed-forward that every token passes; 0 for none."""
    experts: int = 0
    chosen: int = 0
    shared: int = 0
    expert_width: int = 0
    shared_width: int | None = None
    matrices: int = 3
    """Matrices of a feed-forward: 3 gated (SwiGLU), 2 plain (GELU)."""
    vectors: int = 2
    """Norm vectors of width hidden a layer."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token by part (2 a multiply-add)."""

    projections: float
    scores: float
    indexer: float
    dense: float
    experts: float
    router: float
    head: float
    mtp: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def times(self, factor: float) -> Flops:
        return Flops(**{key: value * factor for key, value in vars(self).items()})


@dataclass(frozen=True)
class Shape:
    """A decoder-only model."""

    name: str
    hidden: int
    vocab: int
    blocks: tuple[Block, ...]
    tied: bool = False
    mtp: int = 0
    """Multi-token prediction modules; each is one more of the last block, with a projection of 2 d to d."""
    node_limit: int | None = None
    """A token's experts lie on at most so many nodes (node-limited routing); none: anywhere."""
    tables: int | None = None
    """Parameters of further tables (positions), if any."""

    @property
    def layers(self) -> int:
        return sum(block.count for block in self.blocks)

    @property
    def experts(self) -> int:
        return max((block.experts for block in self.blocks), default=0)

    def expert_parameters(self) -> int:
        """Parameters of all routed experts: what expert parallelism spreads (MTP's included)."""
        routed = sum(
            block.count * block.experts * block.matrices * self.hidden * block.expert_width for block in self.blocks
        )
        last = self.blocks[-1]
        return routed + self.mtp * last.experts * last.matrices * self.hidden * last.expert_width

    def parameters(self, *, active: bool = False, mtp: bool = True) -> int:
        """All parameters, or those one token passes through. `mtp`: with the MTP modules."""
        total = sum(block.count * self._layer_parameters(block, active) for block in self.blocks)
        if mtp:
            last = self._layer_parameters(self.blocks[-1], active)
            total += self.mtp * (last + 2 * self.hidden**2 + 3 * self.hidden)
        tables = self.vocab * self.hidden * (1 if self.tied else 2) + (self.tables or 0)
        return total + tables + self.hidden

    def _layer_parameters(self, block: Block, active: bool) -> int:
        attention = block.attention
        width = block.matrices * self.hidden
        experts = (block.chosen if active else block.experts) * block.expert_width
        shared = block.shared * (block.shared_width or block.expert_width)
        feed_forward = width * (block.dense_width + experts + shared) + self.hidden * block.experts
        own = attention.matrices + attention.vectors + attention.index_parameters
        return own + feed_forward + block.vectors * self.hidden

    def flops(self, context: float, *, training: bool = True) -> Flops:
        """FLOPs of one token at a mean of `context` tokens before it; training: forward and backward, with MTP.

        Each matrix that a token meets costs 2 a parameter forward and 4 backward (Kaplan et al. 2020, section 2.1).
        """
        parts = [self._layer_flops(block, context) for block in self.blocks]
        whole = {
            key: sum(block.count * part[key] for block, part in zip(self.blocks, parts, strict=True))
            for key in parts[0]
        }
        head = 2.0 * self.vocab * self.hidden
        mtp = self.mtp * (self.mtp_flops(context).total) if training else 0.0
        return Flops(**whole, head=head, mtp=mtp).times(3 if training else 1)

    def mtp_flops(self, context: float) -> Flops:
        """Forward FLOPs of one MTP module by part: a block of the last kind, the joining projection, the head."""
        part = self._layer_flops(self.blocks[-1], context)
        part["projections"] += 4.0 * self.hidden**2
        return Flops(**part, head=2.0 * self.vocab * self.hidden, mtp=0.0)

    def _layer_flops(self, block: Block, context: float) -> dict[str, float]:
        width = 2.0 * block.matrices * self.hidden
        shared = block.shared * (block.shared_width or block.expert_width)
        return {
            "projections": 2.0 * block.attention.matrices,
            "scores": block.attention.score_flops(context),
            "indexer": block.attention.index_flops(context) if block.attention.index_heads else 0.0,
            "dense": width * block.dense_width,
            "experts": width * (block.chosen * block.expert_width + shared),
            "router": 2.0 * self.hidden * block.experts,
        }

    def decode_flops(self, context: float) -> Flops:
        """FLOPs of one new token while decoding with `context` tokens in the cache."""
        forward = self.flops(context, training=False)
        scores = sum(block.count * block.attention.score_flops(context, decode=True) for block in self.blocks)
        return Flops(**{**vars(forward), "scores": scores})

    def traffic_values(self) -> float:
        """Values a token's forward pass reads and writes in memory beside the weights, over all layers.

        Counted from the operators, each reading its inputs and writing its outputs once: two norms and two residual
        sums (12 d), the projections' ends, rotary embedding, the feed-forward's ends and its product, and for
        experts the copies to and from them.
        """
        return sum(block.count * self._layer_traffic(block) for block in self.blocks) + 2.0 * self.vocab

    def _layer_traffic(self, block: Block) -> float:
        d, attention = self.hidden, block.attention
        q, kv = attention.heads * attention.qk, attention.kv_heads * (attention.qk + attention.v)
        mixer = 2.0 * d + 4.0 * q + 4.0 * kv + 3.0 * attention.heads * attention.v
        chosen_width = block.chosen * block.expert_width
        shared = block.shared * (block.shared_width or block.expert_width)
        widths = block.dense_width + chosen_width + shared
        copies = 4.0 * block.chosen * d if block.chosen else 0.0
        return 12.0 * d + mixer + 2.0 * block.matrices * widths + copies

    def cache_bytes(self, bytes_per_value: float = 2.0) -> float:
        """Bytes one token leaves in the cache of all main layers; a window's entries do not grow with the text."""
        return bytes_per_value * sum(
            block.count * block.attention.cache_values()
            for block in self.blocks
            if block.attention.compress > 1 or block.attention.window is None
        )


# ----------------------------------------------------------------------- attention kinds


def grouped(hidden: int, heads: int, kv_heads: int, head_dim: int | None = None, *, vectors: int = 0) -> Attention:
    """Grouped-query attention; kv_heads = heads is plain multi-head attention."""
    dim = head_dim or hidden // heads
    matrices = hidden * dim * (2 * heads + 2 * kv_heads)
    return Attention(matrices, heads, dim, dim, 2 * kv_heads * dim, kv_heads, vectors=vectors)


def latent(
    hidden: int, heads: int, *, kv_rank: int, nope: int, rope: int, v: int, q_rank: int | None, vectors: int = 0
) -> Attention:
    """Multi-head latent attention (V2 report, section 2.1): full heads in training, the latent while decoding."""
    q_out = heads * (nope + rope)
    q = hidden * q_out if q_rank is None else q_rank * (hidden + q_out)
    kv = hidden * (kv_rank + rope) + kv_rank * heads * (nope + v)
    return Attention(
        matrices=q + kv + heads * v * hidden,
        heads=heads,
        qk=nope + rope,
        v=v,
        cache=kv_rank + rope,
        kv_heads=heads,
        vectors=vectors + kv_rank + (q_rank or 0),
        decode_qk=kv_rank + rope,
        decode_v=kv_rank,
    )


def shape_of(config: ModelConfig, name: str = "model") -> Shape:
    """The shape of a model Tael can run."""
    c = config
    if c.is_mla:
        attention = latent(
            c.hidden_size,
            c.num_attention_heads,
            kv_rank=c.kv_lora_rank,
            nope=c.qk_nope_head_dim,
            rope=c.qk_rope_head_dim,
            v=c.v_head_dim,
            q_rank=c.q_lora_rank,
        )
    else:
        attention = grouped(c.hidden_size, c.num_attention_heads, c.kv_heads, c.gqa_head_dim)
    # ModelConfig counts biases and norms of every kind; what its matrices leave over is vectors.
    vectors = c.attention_parameters() - attention.matrices
    attention = Attention(**{**vars(attention), "vectors": vectors})
    moe = sum(c.is_moe_layer(index) for index in range(c.num_hidden_layers))
    blocks = [Block(c.num_hidden_layers - moe, attention, dense_width=c.intermediate_size)]
    if moe or (c.num_nextn_predict_layers and c.is_moe_layer(c.num_hidden_layers)):
        experts, shared = c.n_routed_experts or 0, c.n_shared_experts or 0
        blocks.append(
            Block(
                moe,
                attention,
                experts=experts,
                chosen=c.num_experts_per_tok,
                shared=shared,
                expert_width=c.moe_intermediate_size,
            )
        )
    return Shape(
        name=name,
        hidden=c.hidden_size,
        vocab=c.vocab_size,
        blocks=tuple(block for block in blocks if block.count or block is blocks[-1]),
        tied=c.tie_word_embeddings,
        mtp=c.num_nextn_predict_layers,
        node_limit=c.topk_group if (c.n_group or 1) > 1 else None,
    )
