"""The numbers of an answer: what is kept of them, and how they read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tael.serve.pages.answering import Running

_SUMS = ("completion_tokens", "reasoning_tokens", "seconds", "cost", "thought_seconds")


def figures_of(running: Running, now: float) -> dict[str, Any]:
    """What to keep of an answer that ended; without `usage` (it was stopped) tokens are counted by pieces."""
    figures: dict[str, Any] = {"finish_reason": running.finish_reason}
    if running.thought_seconds is not None:
        figures["thought_seconds"] = round(running.thought_seconds, 3)
    usage = running.usage
    if usage is None:
        if running.pieces:
            figures |= {
                "estimated": True,
                "prompt_tokens": running.prompt_tokens or None,
                "completion_tokens": running.pieces,
                "reasoning_tokens": running.thought_pieces,
                "tokens_per_second": running.tokens_per_second,
                "seconds": round(now - running.started, 3),
            }
        return {name: value for name, value in figures.items() if value is not None}
    speed = usage.get("tael") or {}
    figures |= {
        "prompt_tokens": usage.get("prompt_tokens"),
        "cached_tokens": usage.get("prompt_cache_hit_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "reasoning_tokens": (usage.get("completion_tokens_details") or {}).get("reasoning_tokens"),
        "cost": usage.get("cost"),
        "seconds": speed.get("seconds"),
        "first_token_seconds": speed.get("first_token_seconds"),
        "tokens_per_second": speed.get("tokens_per_second") or None,  # of a single token there is none
    }
    return {name: value for name, value in figures.items() if value is not None}


def add_figures(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Of an answer that went on: its amounts add up, the rest is of the latest part."""
    total = before | after
    for name in _SUMS:
        if name in before and name in after:
            total[name] = before[name] + after[name]
    if "context_tokens" not in after and "prompt_tokens" in after:
        total["context_tokens"] = after["prompt_tokens"] + after.get("completion_tokens", 0)
    if after and "estimated" not in after and before.get("estimated"):
        total["estimated"] = True
    return total


def number(value: float | None) -> str:
    """`1,024`; nothing for None."""
    return "" if value is None else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """`49 ms`, `0.4 s`, `12 s`, `3 min 5 s`."""
    if seconds < 0.1:
        return f"{max(1, round(seconds * 1000))} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def speed(tokens_per_second: float | None) -> str:
    """`41 tok/s`; a digit more below ten."""
    if tokens_per_second is None:
        return ""
    return f"{tokens_per_second:.1f} tok/s" if tokens_per_second < 10 else f"{tokens_per_second:,.0f} tok/s"


def money(dollars: float) -> str:
    """Dollars with two digits that say something: `$0.000013`, `$1.20`."""
    if dollars == 0:
        return "$0"
    if dollars >= 0.1:
        return f"${dollars:,.2f}"
    if dollars < 1e-9:
        return "under $0.000000001"
    places = 1
    while dollars * 10**places < 10:
        places += 1
    return f"${dollars:.{places}f}"


def figures_line(figures: dict[str, Any]) -> list[str]:
    """The line under an answer, in its parts."""
    about = "about " if figures.get("estimated") else ""
    parts = []
    if figures.get("completion_tokens") is not None:
        parts.append(f"{about}{number(figures['completion_tokens'])} tokens")
    if figures.get("tokens_per_second"):
        parts.append(speed(figures["tokens_per_second"]))
    if figures.get("first_token_seconds") is not None:
        parts.append(f"first after {duration(figures['first_token_seconds'])}")
    if figures.get("prompt_tokens"):
        cached = figures.get("cached_tokens")
        parts.append(f"prompt {number(figures['prompt_tokens'])}" + (f", {number(cached)} cached" if cached else ""))
    if figures.get("cost") is not None:
        parts.append(money(figures["cost"]))
    return parts


def thought_line(seconds: float | None, tokens: int | None) -> str:
    """`Thought for 3.2 s · 128 tokens`."""
    words = "Thought" if seconds is None else f"Thought for {duration(seconds)}"
    return f"{words} · {number(tokens)} tokens" if tokens else words
