"""Numbers as people read them: three significant digits and a unit, for tables and the report."""

from __future__ import annotations

MISSING = "–"


def _scaled(value: float, units: tuple[str, ...], whole: bool = False) -> str:
    index = 0
    while abs(value) >= 999.5 and index < len(units) - 1:
        value /= 1000
        index += 1
    digits = 0 if whole and index == 0 else max(0, 3 - len(str(int(abs(value)))))
    return f"{value:.{digits}f}{units[index]}"


def count(value: float | None) -> str:
    """1234567 -> 1.23M."""
    return MISSING if value is None else _scaled(value, ("", "K", "M", "B", "T"), whole=True)


def flops(value: float | None) -> str:
    """3.2e15 -> 3.20P."""
    return MISSING if value is None else _scaled(value, ("", "K", "M", "G", "T", "P", "E", "Z", "Y"), whole=True)


def size(value: float | None) -> str:
    """Bytes: 1.5e9 -> 1.50 GB (powers of 1000)."""
    return MISSING if not value else _scaled(value, (" B", " kB", " MB", " GB", " TB", " PB"), whole=True)


def percent(fraction: float | None) -> str:
    """0.214 -> 21%; 0.021 -> 2.1%."""
    if fraction is None:
        return MISSING
    return f"{fraction:.1%}" if 0 < fraction < 0.0995 else f"{fraction:.0%}"


def duration(seconds: float | None) -> str:
    """Seconds: 564 -> 9.4 min."""
    if seconds is None:
        return MISSING
    for limit, divisor, unit in ((99.5, 1, "s"), (5970, 60, "min"), (356400, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.{1 if seconds / divisor < 99.95 else 0}f} {unit}"
    return f"{seconds / 86400:.1f} d"


def money(dollars: float | None) -> str:
    """0.01234 -> $0.012; 5576000 -> $5,576,000."""
    if dollars is None:
        return MISSING
    if dollars == 0 or dollars >= 1000:
        return f"${dollars:,.0f}"
    if dollars >= 0.0995:
        return f"${dollars:.2f}"
    return f"${dollars:.3f}" if dollars >= 0.00995 else f"${dollars:.2g}" if dollars >= 1e-4 else "<$0.0001"


def energy(joules: float | None, estimated: bool = False, partial: bool = False) -> str:
    """Joules as watt hours: 19800 -> 5.50 Wh; `~` marks an estimate, `≥` a sum with parts unknown."""
    if joules is None:
        return MISSING
    return (
        f"{'≥' if partial else ''}{'~' if estimated else ''}{_scaled(joules / 3600, (' Wh', ' kWh', ' MWh', ' GWh'))}"
    )
