"""Chips, as far as the planner's arithmetic needs them, each with its source and date, and changes to try on them.

Peaks are dense (without sparsity) FLOP/s; bandwidths are bytes a second; link and network bandwidth count one
direction of one device. `reached` is the fraction of peak that the best matrix product was measured to reach, where
somebody published a measurement: it is a property of the chip (clocks fall under load), not of a run.

Prices are list prices or, where `price_source` says so, a house assumption: give your own with --price.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tael.errors import TaelError, did_you_mean

BITS = {"fp32": 32, "bf16": 16, "fp8": 8, "fp4": 4}
"""Precisions, by the bits of an operand. bf16 stands for any 16-bit type (fp16 on V100)."""

UNMEASURED = 0.75
"""`reached` where nobody measured it: the middle of what is known (0.51 to 0.87, see CHIPS)."""

_ASSUMED = "house assumption 2026-11, not a quotation"
_MAMF = "measured: ml-engineering, table of maximum achievable matmul FLOPS, 2025"


@dataclass(frozen=True)
class Chip:
    """One accelerator as its data sheet has it."""

    name: str
    peaks: dict[str, float] = field(hash=False)
    """Precision -> dense FLOP/s; a precision that is not there is not supported."""
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float
    """To a neighbour in the same domain (NVLink, HCCS, xGMI), one direction."""
    domain: int
    """Devices joined by that link."""
    network_bandwidth: float
    """Out of the domain, for each device, one direction."""
    watts: float
    dollars_per_hour: float | None
    source: str
    date: str
    """When the source was published or read, ISO month."""
    reached: dict[str, float] = field(default_factory=dict, hash=False)
    price_source: str = _ASSUMED
    note: str = ""

    def supports(self, precision: str) -> bool:
        return precision in self.peaks

    def best_precision(self, wanted: str) -> str:
        """`wanted`, or the next wider one this chip multiplies."""
        wider = [name for name in ("fp4", "fp8", "bf16", "fp32") if BITS[name] >= BITS[wanted]]
        return next((name for name in wider if name in self.peaks), "fp32")

    def sustained(self, precision: str) -> float:
        """FLOP/s that a good matrix product reaches: peak times `reached`."""
        known = self.reached.get(precision, self.reached.get("bf16", UNMEASURED))
        return self.peaks[self.best_precision(precision)] * known

    @property
    def total_processing_performance(self) -> float:
        """TPP of the export rules (ECCN 3A090): the largest of TFLOP/s times bits of the operand."""
        return max(peak / 1e12 * BITS[name] for name, peak in self.peaks.items())


def find_chip(name: str) -> Chip:
    """A chip by name, case and dashes aside; raises TaelError with the nearest name."""
    for chip in CHIPS.values():
        if _plain(chip.name) == _plain(name):
            return chip
    raise TaelError(f"unknown chip '{name}'{did_you_mean(name.upper(), CHIPS)}")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


# ------------------------------------------------------------------------- what if


def cut_link(chip: Chip, bandwidth: float) -> Chip:
    """The chip with its link at `bandwidth` bytes a second each way, if that is less (A800, H800: 200 GB/s)."""
    return replace(chip, name=f"{chip.name} (link cut)", link_bandwidth=min(chip.link_bandwidth, bandwidth))


def set_link(chip: Chip, bandwidth: float) -> Chip:
    """The chip with its link at `bandwidth` bytes a second each way, less or more than it has."""
    return replace(chip, name=f"{chip.name} (link {bandwidth / 1e9:g} GB/s)", link_bandwidth=bandwidth)


def cap_performance(chip: Chip, tpp: float) -> Chip:
    """The chip slowed so that its total processing performance is at most `tpp`; memory and links stay."""
    if tpp <= 0:
        raise TaelError(f"a cap on total processing performance must be above 0, not {tpp:g}")
    factor = min(1.0, tpp / chip.total_processing_performance)
    peaks = {name: peak * factor for name, peak in chip.peaks.items()}
    return replace(chip, name=f"{chip.name} (TPP {tpp:g})", peaks=peaks)


def without(chip: Chip, precision: str) -> Chip:
    """The chip without a precision."""
    if precision not in BITS:
        raise TaelError(f"unknown precision '{precision}'{did_you_mean(precision, BITS)}")
    if precision in ("fp32", "bf16"):
        raise TaelError(f"a chip without {precision} trains nothing; take out fp8 or fp4")
    left = {name: peak for name, peak in chip.peaks.items() if name != precision}
    return replace(chip, name=f"{chip.name} (no {precision})", peaks=left)


# --------------------------------------------------------------------------- table


def _chip(
    name: str,
    tflops: tuple[float, float, float | None, float | None],
    memory: tuple[float, float],
    links: tuple[float, int, float],
    watts: float,
    price: float | None,
    source: str,
    date: str,
    **more: object,
) -> Chip:
    """Figures in data sheet units: TFLOP/s (fp32 or tf32, 16 bit, fp8, fp4), GB and TB/s, GB/s each way."""
    peaks = {key: value * 1e12 for key, value in zip(BITS, tflops, strict=True) if value}
    return Chip(
        name=name,
        peaks=peaks,
        memory_bytes=memory[0] * 1e9,
        memory_bandwidth=memory[1] * 1e12,
        link_bandwidth=links[0] * 1e9,
        domain=links[1],
        network_bandwidth=links[2] * 1e9,
        watts=watts,
        dollars_per_hour=price,
        source=source,
        date=date,
        **more,  # type: ignore[arg-type]
    )


_HOPPER = {"bf16": 0.803, "fp8": 0.709}
_AMPERE = {"bf16": 0.869}
_IB400 = 50.0
_TABLE = (
    _chip(
        "V100", (15.7, 125, None, None), (32, 0.9), (150, 8, 12.5), 300, 0.6, "NVIDIA V100 data sheet", "2020-01",
        note="16 bit is fp16; no bf16",
    ),
    _chip(
        "A100", (156, 312, None, None), (80, 2.039), (300, 8, 25), 400, 1.3, "NVIDIA A100 80GB SXM data sheet",
        "2021-06", reached=_AMPERE, note=_MAMF,
    ),
    _chip(
        "A800", (156, 312, None, None), (80, 2.039), (200, 8, 25), 400, 1.2, "NVIDIA A800 80GB SXM data sheet",
        "2022-11", reached=_AMPERE, note="an A100 with NVLink at 400 GB/s both ways; reached as A100",
    ),
    _chip(
        "H100", (494.5, 989, 1979, None), (80, 3.35), (450, 8, _IB400), 700, 2.2, "NVIDIA H100 SXM data sheet",
        "2023-03", reached=_HOPPER, note=_MAMF,
    ),
    _chip(
        "H800", (494.5, 989, 1979, None), (80, 3.35), (200, 8, _IB400), 700, 2.0,
        "DeepSeek-V3 report, section 3 (links); H100 data sheet (the rest)", "2024-12", reached=_HOPPER,
        price_source="DeepSeek-V3 report, table 1: $2 an hour", note="an H100 with NVLink at 400 GB/s both ways",
    ),
    _chip(
        "H20", (74, 148, 296, None), (96, 4.0), (450, 8, _IB400), 400, 1.2,
        "SemiAnalysis on the H20, 2023-11, and press; NVIDIA publishes no sheet", "2023-11",
        reached={"bf16": 0.9, "fp8": 0.9}, note="reached is assumed: far below its power limit",
    ),
    _chip(
        "H200", (494.5, 989, 1979, None), (141, 4.8), (450, 8, _IB400), 700, 2.5, "NVIDIA H200 SXM data sheet",
        "2024-06", reached=_HOPPER, note="reached as H100",
    ),
    _chip(
        "GH200", (494.5, 989, 1979, None), (96, 4.0), (450, 4, 25), 900, 2.2, "NVIDIA GH200 data sheet", "2023-11",
        reached={"bf16": 0.836, "fp8": 0.776}, note=f"{_MAMF}; network as on Alps (Slingshot, 200 Gbit/s a chip)",
    ),
    _chip(
        "B200", (1125, 2250, 4500, 9000), (180, 8.0), (900, 8, _IB400), 1000, 4.0,
        "NVIDIA DGX B200 data sheet", "2024-03", note="reached is not measured: 0.75",
    ),
    _chip(
        "GB200", (1250, 2500, 5000, 10000), (186, 8.0), (900, 72, _IB400), 1200, 4.5,
        "NVIDIA GB200 NVL72 data sheet", "2024-03", note="one of a superchip's two GPUs; reached is not measured",
    ),
    _chip(
        "GB300", (1250, 2500, 5000, 15000), (279, 8.0), (900, 72, 100), 1400, 5.5,
        "NVIDIA GB300 NVL72 data sheet", "2025-03", note="one GPU of NVL72; reached is not measured",
    ),
    _chip(
        "MI300X", (653.7, 1307, 2614, None), (192, 5.3), (448, 8, _IB400), 750, 2.0, "AMD MI300X data sheet",
        "2023-12", reached={"bf16": 0.514}, note=_MAMF,
    ),
    _chip(
        "Ascend 910B", (94, 313, None, None), (64, 1.6), (196, 8, 25), 400, 0.9,
        "Huawei gives no sheet; press, 313 to 376 TFLOP/s by version (unverified)", "2024-06",
        note="figures differ between reports: take them as +-20%",
    ),
    _chip(
        "Ascend 910C", (188, 752, None, None), (128, 3.2), (392, 384, 50), 700, 1.8,
        "Serving LLMs on Huawei CloudMatrix384 (2025), section 3", "2025-06",
        note="two dies; int8 but no fp8; watts from press",
    ),
    _chip(
        "RTX 4090", (82.6, 165.2, 330.3, None), (24, 1.008), (32, 8, 3), 450, 0.35,
        "NVIDIA Ada whitepaper (fp32 accumulation)", "2022-10", note="no NVLink: PCIe 4; 25 Gbit/s network assumed",
    ),
    _chip(
        "RTX 5090", (104.8, 209.5, 419, 1676), (32, 1.792), (64, 8, 3), 575, 0.6,
        "NVIDIA RTX Blackwell whitepaper (fp32 accumulation)", "2025-01", note="no NVLink: PCIe 5",
    ),
    _chip(
        "M2 Ultra", (27.2, 27.2, None, None), (192, 0.8), (1.25, 1, 1.25), 200, 0.2,
        "Apple (memory, bandwidth); peak by press from clocks", "2023-06", note="network: 10 Gbit/s Ethernet",
    ),
    _chip(
        "M4 Max", (18.4, 18.4, None, None), (128, 0.546), (1.25, 1, 1.25), 120, 0.15,
        "Apple (memory, bandwidth); peak by press from clocks", "2024-10", note="network: 10 Gbit/s by an adapter",
    ),
)  # fmt: skip
CHIPS = {chip.name: chip for chip in _TABLE}
"""Every chip known by name. `this` (see tael.cost.here) is measured, not listed."""
