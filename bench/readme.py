"""``python -m bench.readme``: writes the tables of README.md from the records in ``bench/results``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECORD = Path(__file__).parent / "results" / "update-linux-cpu.json"


def update_table(record: dict[str, Any]) -> str:
    """The time of an update as a Markdown table, one row for each workload and dtype."""
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in record["update"]:
        rows.setdefault((row["workload"], row["dtype"]), {})[row["contender"]] = row
    lines = [
        "| parameters | dtype | mlx eager | mlx compiled | compiled_adam | ratio to eager | to compiled |",
        "|---|---|---|---|---|---|---|",
    ]
    for (workload, dtype), by_name in rows.items():
        eager, compiled, ours = (by_name[name] for name in ("mlx eager", "mlx compiled", "compiled_adam"))
        times = " | ".join(f"{row['median_ms']:.1f} ms" for row in (eager, compiled, ours))
        to_compiled = ours["median_ms"] / compiled["median_ms"]
        lines.append(f"| {workload} | {dtype} | {times} | {ours['ratio']:.2f} | {to_compiled:.2f} |")
    return "\n".join(lines)


def rendered(readme: str, record: dict[str, Any]) -> str:
    """``readme`` with the table between its markers replaced."""
    pattern = re.compile(r"(<!-- update table -->\n).*?(\n<!-- end -->)", re.S)
    return pattern.sub(lambda match: match[1] + update_table(record) + match[2], readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text(), json.loads(RECORD.read_text())))
