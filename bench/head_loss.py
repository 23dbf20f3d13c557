"""How many tokens' logits should the head's loss hold at once on a CPU?

    python bench/head_loss.py

Forward and backward of `linear_cross_entropy` in bf16 at the widths of bench/train_throughput.py, every chunk size in
turn. `CPU_CHUNK` (tael.train.losses) is 512 because of this table. Writes results/head_loss.json.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import interleave, machine, print_table, spread, write_results

from tael.train import losses

SHAPES = ((2048, 256, 8192), (4096, 384, 4096))
CHUNKS = (128, 256, 512, 1024, 2048)


def step(vocabulary: int, width: int, tokens: int, chunk: int) -> Callable[[], None]:
    """A function that computes the loss and its gradients once, `chunk` tokens at a time."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)

    def run() -> None:
        losses.CPU_CHUNK = chunk
        losses.linear_cross_entropy(hidden, weight, targets).backward()
        hidden.grad = weight.grad = None

    return run


def main() -> None:
    described, rows = machine(), []
    for vocabulary, width, tokens in SHAPES:
        work = {str(chunk): step(vocabulary, width, tokens, chunk) for chunk in CHUNKS}
        seconds = interleave(work, rounds=9, warmup=2)
        shape = f"{tokens:,} tokens, width {width}, vocabulary {vocabulary:,}"
        rows.append([shape, *(f"{1e3 * spread(times)['median']:.1f}" for times in seconds.values())])
    columns = ["shape", *(f"{chunk:,} at once, ms" for chunk in CHUNKS)]
    title = "The head's loss, forward and backward in bf16 on a CPU"
    print_table(title, columns, rows)
    table = {"columns": columns, "rows": rows, "notes": ["Medians of 9 interleaved rounds."]}
    content = {"title": title, "command": "python bench/head_loss.py", "machine": described, "tables": [table]}
    write_results("head_loss", content)


if __name__ == "__main__":
    main()
