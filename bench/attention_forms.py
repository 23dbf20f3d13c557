"""Which form of attention trains faster on a CPU: the plain product or torch's fused kernel?

    python bench/attention_forms.py

Forward and backward in bf16, causal, with document masks, at the demo's shape (4 heads; key width 48, value width 32)
and sequence lengths from 64 to 1024, both forms in turn. `attend` (tael.model.attention) takes the plain form up to
1024 tokens because of this table. Writes results/attention_forms.json.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import interleave, machine, print_table, ratios, spread, write_results
from torch import Tensor

TOKENS, HEADS, KEY, VALUE = 4096, 4, 48, 32
LENGTHS = (64, 128, 256, 512, 1024)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The form `attend` takes on a CPU: the mask added in place, softmax, product."""
    scores = (q * KEY**-0.5) @ k.transpose(-1, -2)
    forbidden = torch.zeros(mask.shape, dtype=scores.dtype).masked_fill_(~mask, torch.finfo(scores.dtype).min)
    return scores.add_(forbidden).softmax(-1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def step(form, length: int):
    """A function that runs `form` forward and backward once."""
    generator = torch.Generator().manual_seed(length)
    batch = TOKENS // length
    q, k = (torch.randn(batch, HEADS, length, KEY, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    v = torch.randn(batch, HEADS, length, VALUE, generator=generator).bfloat16().requires_grad_()
    document = torch.arange(length) // max(length // 3, 1)
    mask = (document[:, None] == document[None, :]).tril().expand(batch, 1, length, length)

    def run() -> None:
        out = form(q, k, v, mask)
        out.backward(torch.ones_like(out))
        q.grad = k.grad = v.grad = None

    return run


def main() -> None:
    described, rows = machine(), []
    for length in LENGTHS:
        seconds = interleave({"plain": step(plain, length), "fused": step(fused, length)}, rounds=15, warmup=2)
        ratio = ratios(seconds["fused"], seconds["plain"])
        rows.append(
            [
                length,
                f"{1e3 * spread(seconds['plain'])['median']:.1f}",
                f"{1e3 * spread(seconds['fused'])['median']:.1f}",
                f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})",
            ]
        )
    columns = ["tokens a sequence", "plain, ms", "fused, ms", "plain is faster by"]
    title = "Attention forward and backward in bf16 on a CPU, 4,096 tokens"
    print_table(title, columns, rows)
    table = {
        "columns": columns,
        "rows": rows,
        "notes": ["Medians of 15 interleaved rounds; in brackets the quartiles."],
    }
    write_results(
        "attention_forms",
        {"title": title, "command": "python bench/attention_forms.py", "machine": described, "tables": [table]},
    )


if __name__ == "__main__":
    main()
