"""What do quantised weights cost in quality? Held-out bits per byte of float, int8, w8a8 and int4 models.

    python bench/int4_quality.py                    a few minutes on two idle cores
    python bench/int4_quality.py --only smol        one of the two models; writes nothing

Two models: SmolLM2-135M-Instruct and, where runs/demo exists, its pretrained model. SmolLM2's released GGUF holds
4-bit codes with minimums in groups of 32: they are made floats first and then rounded anew, to another format. int4
with minimums and group 32 would give the file's own codes back without any loss, which says nothing of the scheme: it
is not in the table.
int4 is rounded to nearest or with calibration on other text of the same kind, its layers' activations in int8. All
candidates of a model read the same held-out text; the recipe was chosen on it, so SmolLM2 also reads a fresh one.
Writes results/int4_quality.json.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from common import machine, print_table, write_results

from tael.data import Document, Tokenizer, documents, load_tokenizer, split
from tael.data.gguf_tokenizer import load_gguf_tokenizer
from tael.evals.perplexity import bits_per_byte
from tael.model import Transformer
from tael.recipe import DataSettings, load_recipe
from tael.weights import load_gguf, load_model, pull
from tael.weights.gptq import calibration_rows
from tael.weights.quantize import Scheme, quantize_model

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "runs" / "demo" / "pretrain" / "model"


@dataclass(frozen=True)
class Subject:
    """A float model, its held-out text, and text to calibrate on."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    held_out: list[Document]
    fresh: list[Document]
    training: list[Document]
    rows: int
    length: int


@dataclass(frozen=True)
class Candidate:
    """One way to quantise."""

    name: str
    scheme: Scheme
    group: int = 32
    calibrated: bool = False


CANDIDATES = (
    Candidate("int8", "int8"),
    Candidate("w8a8", "w8a8"),
    Candidate("int4, to nearest, group 32", "int4"),
    Candidate("int4, calibrated, group 32", "int4", 32, True),
    Candidate("int4, calibrated, group 64", "int4", 64, True),
)


def tael_subject() -> Subject | None:
    """The demo's pretrained model; None where the demo has not been run."""
    if not DEMO.is_dir():
        print("runs/demo is missing: only SmolLM2 is measured", flush=True)
        return None
    text = list(documents(DataSettings(sources=["chitchat"])))
    recipe = load_recipe(ROOT / "recipes" / "demo.toml")
    training, held_out = split(text, recipe.data.holdout if recipe.data else 0.02)
    return Subject(
        "demo", load_model(DEMO), load_tokenizer(DEMO), list(up_to(held_out, 30_000)), [], training, 64, 256
    )


def smol_subject() -> Subject:
    """SmolLM2 on Wikipedia and on small talk; calibrated on other Wikipedia articles and other talk."""
    path = pull("smollm2-135m")
    wiki = documents(DataSettings(sources=["wikitext-2-valid"]))
    chat, other_chat = split(documents(DataSettings(sources=["chitchat"])), 0.5)
    held_out = [Document(d.text[:1000], d.source) for d in wiki][:6] + list(up_to(chat, 3_000))
    pairs = zip(documents(DataSettings(sources=["wikitext-2"])), other_chat, strict=False)
    training = [d if len(d.text) < 4000 else Document(d.text[:4000], d.source) for d in chain.from_iterable(pairs)]
    model, tokenizer = load_gguf(path), load_gguf_tokenizer(path)
    fresh = [Document(d.text[:1000], d.source) for d in documents(DataSettings(sources=["wikitext-2-test"]))][:12]
    return Subject("SmolLM2-135M-Instruct", model, tokenizer, held_out, fresh, training, 28, 256)


def _progress(line: str) -> None:
    print(f"  {line}", flush=True)


def up_to(found: list[Document], size: int) -> Iterator[Document]:
    """Documents until `size` bytes are reached."""
    for document in found:
        if size <= 0:
            return
        size -= len(document.text.encode())
        yield document


def measure(subject: Subject) -> list[list[str]]:
    """One row a candidate, the float model first."""

    def evaluate(model: Transformer, text: list[Document]) -> float:
        batch = 32 if subject.model.config.vocab_size < 10_000 else 4  # logits of a batch: V fp32 numbers a token
        return bits_per_byte(model, subject.tokenizer, text, subject.length, batch).bits_per_byte

    size = sum(p.numel() for p in subject.model.parameters()) * 4
    before = evaluate(subject.model, subject.held_out)
    fresh = evaluate(subject.model, subject.fresh) if subject.fresh else None
    print(f"{subject.name}: {before:.4f} bits per byte in float", flush=True)
    rows = [[subject.name, "float (fp32)", "32.00", f"{size / 1e6:.1f}", f"{before:.4f}", "", "", ""]]
    calibration = calibration_rows(subject.tokenizer, subject.training, subject.rows, subject.length)
    for candidate in CANDIDATES:
        model = copy.deepcopy(subject.model)
        began = time.perf_counter()
        rows_used = calibration if candidate.calibrated else None
        report = quantize_model(model, candidate.scheme, candidate.group, None, rows_used, progress=_progress)
        seconds = time.perf_counter() - began
        after = evaluate(model, subject.held_out)
        rows.append(
            [
                subject.name,
                candidate.name,
                f"{report.bits_per_weight:.2f}",
                f"{report.bytes_after / 1e6:.1f}",
                f"{after:.4f}",
                f"{100 * (after / before - 1):+.2f}",
                f"{100 * (evaluate(model, subject.fresh) / fresh - 1):+.2f}" if fresh else "",
                f"{seconds:.1f}",
            ]
        )
        print(*rows[-1], sep="  ", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=("tael", "smol"), help="one model; nothing is written")
    only = parser.parse_args().only
    described, rows, notes = machine(), [], []
    for make in (smol_subject, tael_subject):
        if only is None or make.__name__.startswith(only):
            subject = make()
            if subject is None:
                notes.append("No runs/demo here: the demo's model was left out.")
                continue
            rows += measure(subject)
            size = sum(len(d.text.encode()) for d in subject.held_out)
            tokens = subject.rows * subject.length
            notes.append(f"{subject.name}: {size:,} bytes held out, calibrated on {tokens:,} tokens of other text.")
    columns = ["model", "weights", "bits a weight", "MB", "bits per byte", "loss, %", "on fresh text, %"]
    columns.append("seconds to quantise")
    title = "Held-out bits per byte of quantised models"
    print_table(title, columns, rows)
    notes.append("Bits a weight count everything: scales, int8 embedding and head, norms, routers.")
    table: dict[str, Any] = {"columns": columns, "rows": rows, "notes": notes}
    if only is None:
        content = {"title": title, "command": "python bench/int4_quality.py", "machine": described, "tables": [table]}
        write_results("int4_quality", content)


if __name__ == "__main__":
    main()
