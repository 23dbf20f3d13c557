"""Training runs and throughputs that others published, against which the planner is fitted and tested.

`checked` says how a figure was checked here: "read" in the source or in a copy of it, "quoted" by pages that quote
it, "noted" in this project's notes only. Where a source does not say how many chips were used, `assumed` says what
stands in; the benchmark says how far that moves the errors. Nothing in this table is a result of the planner.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tael.cost.chips import Chip, find_chip
from tael.cost.named import find_model
from tael.cost.planner import Plan, Run, plan_training
from tael.cost.timing import Constants

_T = 1e12


@dataclass(frozen=True)
class PublishedRun:
    """One report: device-hours for a number of tokens, or (`hours` None) tokens a second of one device."""

    name: str
    model: str
    chip: str
    devices: int
    tokens: float
    hours: float | None
    source: str
    checked: str
    assumed: str = ""
    throughput: float | None = None
    precision: str | None = None
    sequence: int | None = None
    batch_tokens: float | None = None
    memory_gb: float | None = None
    network_gb: float | None = None
    """Where the machine differs from the chip's usual one: memory in GB, network in GB/s a device."""
    why: str = ""
    """What explains a large miss."""

    @property
    def reported(self) -> float:
        """Device-hours (for a throughput: those of one trillion tokens)."""
        if self.hours is not None:
            return self.hours
        assert self.throughput is not None  # one of the two is given in the table below
        return _T / self.throughput / 3600

    def hardware(self) -> Chip:
        chip = find_chip(self.chip)
        if self.memory_gb:
            chip = replace(chip, memory_bytes=self.memory_gb * 1e9)
        if self.network_gb:
            chip = replace(chip, network_bandwidth=self.network_gb * 1e9)
        return chip

    def run(self) -> Run:
        """The run as the planner takes it: no layout, nothing of what was reported."""
        model = find_model(self.model)
        return Run(
            shape=model.shape,
            tokens=self.tokens,
            sequence=self.sequence or model.sequence,
            batch_tokens=self.batch_tokens or model.batch_tokens,
            precision=self.precision or model.precision,
            chip=self.hardware(),
            devices=self.devices,
        )

    def predicted(self, plan: Plan) -> float:
        """The planner's figure for what was reported; a throughput is that of steps, without interruptions."""
        return plan.gpu_hours if self.hours is not None else _T / plan.tokens_per_second / 3600

    def predict(self, constants: Constants | None = None) -> float:
        return self.predicted(plan_training(self.run(), constants))


_V3, _V2 = "DeepSeek-V3 report, arXiv 2412.19437, table 1", "DeepSeek-V2 report, arXiv 2405.04434, section 3.2.3"
_LLAMA1, _LLAMA2 = "LLaMA, arXiv 2302.13971, table 15", "Llama 2, arXiv 2307.09288, table 2"
_LLAMA3, _LLAMA4 = "Llama 3.1 model card, 2024-07", "Llama 4 model card, 2025-04"
_BRIDGE = "NVIDIA Megatron-Bridge performance summary, 2026"
_TITAN = "PyTorch and Nebius on torchtitan, 2026-03"
_UNSAID = "number of chips"
_R = PublishedRun

RUNS = (
    _R("DeepSeek-V3 pre-training", "deepseek-v3", "H800", 2048, 14.8 * _T, 2_664_000, _V3, "quoted"),
    _R("DeepSeek-V2, 1T tokens", "deepseek-v2", "H800", 2048, 1 * _T, 172_800, _V2, "quoted", _UNSAID),
    _R("DeepSeek-67B, 1T tokens", "deepseek-67b", "H800", 1024, 1 * _T, 300_600, _V2, "quoted", _UNSAID),
    _R("Llama 1 7B", "llama-1-7b", "A100", 1024, 1 * _T, 82_432, _LLAMA1, "noted", _UNSAID),
    _R("Llama 1 13B", "llama-1-13b", "A100", 1024, 1 * _T, 135_168, _LLAMA1, "noted", _UNSAID),
    _R("Llama 1 33B", "llama-1-33b", "A100", 2048, 1.4 * _T, 530_432, _LLAMA1, "noted", _UNSAID),
    _R("Llama 1 65B", "llama-1-65b", "A100", 2048, 1.4 * _T, 1_022_362, _LLAMA1, "noted"),
    _R("Llama 2 7B", "llama-2-7b", "A100", 1024, 2 * _T, 184_320, _LLAMA2, "noted", _UNSAID),
    _R("Llama 2 13B", "llama-2-13b", "A100", 1024, 2 * _T, 368_640, _LLAMA2, "noted", _UNSAID),
    _R("Llama 2 34B", "llama-2-34b", "A100", 2048, 2 * _T, 1_038_336, _LLAMA2, "noted", _UNSAID),
    _R("Llama 2 70B", "llama-2-70b", "A100", 2048, 2 * _T, 1_720_320, _LLAMA2, "noted", _UNSAID),
    _R(
        "Llama 3.1 8B", "llama-3.1-8b", "H100", 2048, 15 * _T, 1_460_000, _LLAMA3, "quoted", f"{_UNSAID}, batch",
        why="14% of peak at 6ND, 0.4 of what the 405B of the same report reached: the hours seem to hold more than "
        "one pass over 15T tokens (Llama 3 8B took 1.3M hours for the same tokens)",
    ),
    _R("Llama 3.1 70B", "llama-3.1-70b", "H100", 8192, 15 * _T, 7_000_000, _LLAMA3, "quoted", f"{_UNSAID}, batch"),
    _R("Llama 3.1 405B", "llama-3.1-405b", "H100", 16384, 15.6 * _T, 30_840_000, _LLAMA3, "read",
       why="16M tokens on 16,384 chips leave few micro-batches: a quarter of the predicted step is bubble"),
    _R(
        "Llama 4 Scout", "llama-4-scout", "H100", 8192, 40 * _T, 5_000_000, _LLAMA4, "read",
        f"{_UNSAID}, batch, seq.",
        why="fp8 as the card says, but images are counted as tokens and their encoder is not in the shape; the stage "
        "of long contexts (256K) is in the hours too",
    ),
    _R(
        "Llama 4 Maverick", "llama-4-maverick", "H100", 8192, 22 * _T, 2_380_000, _LLAMA4, "read",
        f"{_UNSAID}, batch, seq.", why="as Scout; it also learns from a larger teacher",
    ),
    _R(
        "BLOOM 176B", "bloom-176b", "A100", 384, 0.366 * _T, 1_082_990, "BLOOM, arXiv 2211.05100, section 3.4",
        "read", network_gb=6.25, why="2022's software without fused attention, activations made again, Omni-Path",
    ),
    _R(
        "Falcon-180B", "falcon-180b", "A100", 4096, 3.5 * _T, 7_000_000, "Falcon-180B model card, 2023-09", "quoted",
        memory_gb=40, network_gb=6.25,
    ),
    _R(
        "SmolLM3 3B", "smollm3-3b", "H100", 384, 11.2 * _T, 384 * 24 * 24, "SmolLM3 blog: 384 H100, 24 days, 2025-07",
        "quoted",
    ),
)  # fmt: skip
"""Reports in device-hours: the constants are fitted on these."""

THROUGHPUTS = (
    _R(
        "V3 on 256 B200, Megatron", "deepseek-v3", "B200", 256, _T, None, _BRIDGE, "noted", "batch", throughput=3328,
        batch_tokens=2048 * 4096,
    ),
    _R(
        "V3 on 256 GB200, Megatron", "deepseek-v3", "GB200", 256, _T, None, _BRIDGE, "noted", "batch",
        throughput=4912, batch_tokens=2048 * 4096,
    ),
    _R(
        "V3 on 256 GB300, Megatron", "deepseek-v3", "GB300", 256, _T, None, _BRIDGE, "noted", "batch",
        throughput=6288, batch_tokens=2048 * 4096,
        why="what the chip's best product reaches is not measured; 0.75 of peak stands in",
    ),
    _R(
        "V3 on 256 B200, torchtitan bf16", "deepseek-v3", "B200", 256, _T, None, _TITAN, "quoted", "batch",
        throughput=651, precision="bf16", batch_tokens=2048 * 4096,
        why="a framework's first version of the model: Megatron reaches 5 times this on the same chips",
    ),
    _R(
        "V3 on 256 B200, torchtitan MXFP8", "deepseek-v3", "B200", 256, _T, None, _TITAN, "quoted", "batch",
        throughput=918, batch_tokens=2048 * 4096, why="as the row before; Megatron reaches 3.6 times this",
    ),
    _R(
        "V2-Lite's shape on 8 H100, torchtitan", "deepseek-v2-lite", "H100", 8, _T, None,
        "torchtitan, DeepSeek 16B, 20.5% MFU", "noted", "batch", throughput=11_600, batch_tokens=512 * 4096,
        why="20.5% MFU as reported: experts in a framework's general form",
    ),
)  # fmt: skip
"""Reports in tokens a second: never fitted on, only predicted."""
