"""Write the tables of README.md and docs/routers.md from benchmarks/results: `python benchmarks/render.py`."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PEERS = ["F.grouped_mm", "ModuleList loop", "brute-force loop", "dense MLP"]


def speed_table(result: dict) -> str:
    """How one layer's speed compares, with the machine under it."""
    lines = [
        "| T, E, D, H, K | dtype | pass | fastmoe, ms | " + " | ".join(PEERS) + " |",
        "|---|---|---|--:|" + "--:|" * len(PEERS),
    ]
    for row in result["rows"]:
        shape = ", ".join(str(size) for size in row["shape"].values())
        for mode in ("forward", "forward+backward"):
            ratios = " | ".join(f"{_ratio(row[mode][peer]['times_ours'])}" for peer in PEERS)
            lines.append(f"| {shape} | {row['dtype']} | {mode} | {row[mode]['fastmoe']['median_ms']:.1f} | {ratios} |")
    lines += [
        "",
        f"{_machine(result['machine'])}, {result['rounds']} rounds. "
        "A ratio above 1 means that ours is faster. Figures: [layer_cpu.json](benchmarks/results/layer_cpu.json).",
    ]
    return "\n".join(lines)


def router_table(result: dict) -> str:
    """What each router did on the same training run, with the machine under it."""
    lines = [
        "| router | K | bits per byte: training | held out | load CV | drop rate | unrouted tokens | step / topk |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for label, row in result["rows"].items():
        name = label if row["causal"] else f"{label} (not causal)"
        lines.append(
            f"| {name} | {row['top_k'] if row['router'] != 'soft' else '-'} | {row['train_bits_per_byte']:.3f} "
            f"| {row['valid_bits_per_byte']:.3f} | {row['load_cv']:.3f} | {row['drop_rate']:.1%} "
            f"| {row['unrouted_tokens']:.1%} | {row['times_topk']:.2f} |"
        )
    m = result["machine"]
    lines += [
        "",
        f"{result['corpus']}, {result['steps']} steps of 8 x 128 bytes; load and drops of the last {result['window']}. "
        f"{_machine(m)}; one step with topk took {result['rows']['topk']['median_step_ms']:.0f} ms. "
        "`python benchmarks/routers.py`; figures: [routers.json](../benchmarks/results/routers.json).",
    ]
    return "\n".join(lines)


def _machine(m: dict) -> str:
    amx = ", AMX-BF16" if m["amx_bf16"] else ""
    return (
        f"{m['cpu']} ({m['capability']}{amx}), {m['threads']} threads, torch {m['torch']}, Python {m['python']}, "
        f"commit {m['commit']}, {m['date']}"
    )


def _ratio(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


TABLES = [
    ("layer_cpu", ROOT / "README.md", speed_table),
    ("routers", ROOT / "docs" / "routers.md", router_table),
]


def main() -> None:
    for name, page, table in TABLES:
        result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        start, end = f"<!-- {name} table -->", f"<!-- end of {name} table -->"
        text = f"{start}\n\n{table(result)}\n\n{end}"
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.S)
        page.write_text(pattern.sub(lambda _, text=text: text, page.read_text()))


if __name__ == "__main__":
    main()
