"""Write the README's speed table from benchmarks/results/layer_cpu.json: `python benchmarks/render.py`."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PEERS = ["F.grouped_mm", "ModuleList loop", "brute-force loop", "dense MLP"]


def table(result: dict) -> str:
    """The table in Markdown, with the machine under it."""
    lines = [
        "| T, E, D, H, K | dtype | pass | fastmoe, ms | " + " | ".join(PEERS) + " |",
        "|---|---|---|--:|" + "--:|" * len(PEERS),
    ]
    for row in result["rows"]:
        shape = ", ".join(str(size) for size in row["shape"].values())
        for mode in ("forward", "forward+backward"):
            ratios = " | ".join(f"{_ratio(row[mode][peer]['times_ours'])}" for peer in PEERS)
            lines.append(f"| {shape} | {row['dtype']} | {mode} | {row[mode]['fastmoe']['median_ms']:.1f} | {ratios} |")
    m = result["machine"]
    amx = ", AMX-BF16" if m["amx_bf16"] else ""
    lines += [
        "",
        f"{m['cpu']} ({m['capability']}{amx}), {m['threads']} threads, torch {m['torch']}, Python {m['python']}, "
        f"commit {m['commit']}, {m['date']}, {result['rounds']} rounds. "
        "A ratio above 1 means that ours is faster. Figures: [layer_cpu.json](benchmarks/results/layer_cpu.json).",
    ]
    return "\n".join(lines)


def _ratio(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def main() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "layer_cpu.json").read_text())
    readme = ROOT / "README.md"
    start, end = "<!-- layer_cpu table -->", "<!-- end of layer_cpu table -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.S)
    readme.write_text(pattern.sub(lambda _: f"{start}\n\n{table(result)}\n\n{end}", readme.read_text()))


if __name__ == "__main__":
    main()
