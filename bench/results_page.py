"""Write docs/results.md from results/*.json: every figure in the documentation comes from a benchmark's file.

    python bench/results_page.py

A result file holds `title`, `command`, `machine`, and `tables`, each with `columns`, `rows` and notes; it may name
`pictures`, files under docs/.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def markdown_table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join(["---"] + ["---:"] * (len(columns) - 1)) + "|"]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def section(result: dict[str, Any]) -> list[str]:
    """One benchmark as Markdown lines."""
    machine = result["machine"]
    lines = [f"## {result['title']}", ""]
    for table in result["tables"]:
        lines += [*markdown_table(table["columns"], table["rows"]), ""]
        lines += [f"{note}" for note in table.get("notes", [])] + [""]
    for picture in result.get("pictures", []):
        lines += [f"![{result['title']}]({picture})", ""]
    where = f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}"
    load = machine.get("load_at_start")
    return [
        *lines,
        f"`{result['command']}` on {where}" + (f", load at start {load}." if load is not None else "."),
        "",
    ]


def main() -> None:
    lines = [
        "# Measured results",
        "",
        "Made by `python bench/results_page.py` from `results/*.json`; do not edit by hand.",
        "",
    ]
    for path in sorted((ROOT / "results").glob("*.json")):
        lines += section(json.loads(path.read_text(encoding="utf-8")))
    (ROOT / "docs" / "results.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
