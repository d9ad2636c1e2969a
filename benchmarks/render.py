"""Write the tables of README.md and docs/, and the picture, from benchmarks/results: `python benchmarks/render.py`."""

import json
import re
from pathlib import Path

from fastmoe.bench.plot import plot

ROOT = Path(__file__).parents[1]
OURS, DENSE = "fastmoe", "dense MLP"
HUGGING_FACE = ("HF eager", "HF batched_mm", "HF grouped_mm")
PEERS = ["F.grouped_mm", "best of HF", "ModuleList loop", "brute-force loop"]


def speed_table(*results: dict) -> str:
    """How one layer's routed MLP compares, over all results, with the machine under it."""
    lines = [
        "| T, E, D, H, K | dtype | MLP | pass | fastmoe, ms | / floor | " + " | ".join(PEERS) + " |",
        "|---|---|---|---|--:|--:|" + "--:|" * len(PEERS),
    ]
    for row in sorted((row for result in results for row in result["rows"]), key=_place):
        shape = ", ".join(str(size) for size in row["shape"].values())
        for mode, found in row["modes"].items():
            ours = found["contenders"][OURS]
            ratios = " | ".join(_peer(found["contenders"], peer) for peer in PEERS)
            lines.append(
                f"| {shape} | {row['dtype']} | {row['activation']} | {mode} | {ours['median_ms']:.1f} "
                f"| {ours['over_floor']:.2f} | {ratios} |"
            )
    lines += [
        "",
        f"{_machine(results[0]['machine'])}, {results[0]['settings']['rounds']} rounds. Figures, with quartiles and "
        "all other contenders: " + ", ".join(f"[{name}.json](benchmarks/results/{name}.json)" for name in SPEED) + ".",
    ]
    return "\n".join(lines)


def memory_table(*results: dict) -> str:
    """Extra memory of forward and backward beside the dense MLP's."""
    lines = ["| T, E, D, H, K | dtype | MLP | fastmoe, MiB | dense MLP, MiB | ratio |", "|---|---|---|--:|--:|--:|"]
    for row in sorted((row for result in results for row in result["rows"]), key=_place):
        if row.get("extra_mib"):
            ours, dense = row["extra_mib"][OURS], row["extra_mib"][DENSE]
            shape = ", ".join(str(size) for size in row["shape"].values())
            lines.append(
                f"| {shape} | {row['dtype']} | {row['activation']} | {ours:.0f} | {dense:.0f} | {ours / dense:.2f} |"
            )
    return "\n".join(lines)


def layer_table(*results: dict) -> str:
    """Whole layers of other libraries, router included, beside ours."""
    names = ["DeepSpeed MoE", "st-moe-pytorch", "mixture-of-experts"]
    lines = ["| T, E, D, H, K | dtype | pass | `fastmoe.MoE`, ms | " + " | ".join(names) + " |"]
    lines.append("|---|---|---|--:|" + "--:|" * len(names))
    for row in sorted((row for result in results for row in result["rows"]), key=_place):
        for mode, found in row["modes"].items():
            if row["activation"] != "gelu" or not set(names) & set(found["contenders"]):
                continue
            shape = ", ".join(str(size) for size in row["shape"].values())
            ratios = " | ".join(_peer(found["contenders"], name) for name in names)
            ours = found["contenders"]["fastmoe layer"]["median_ms"]
            lines.append(f"| {shape} | {row['dtype']} | {mode} | {ours:.1f} | {ratios} |")
    return "\n".join(lines)


def hugging_face_table(*results: dict) -> str:
    """The experts of transformers' Mixtral block, ours beside its `grouped_mm`."""
    lines = [
        "| T, E, D, H, K | dtype | pass | fastmoe, ms | grouped_mm, ms | fastmoe / grouped_mm | quartiles |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for row in (row for result in results for row in result["rows"]):
        shape = ", ".join(str(size) for size in row["shape"].values())
        for mode, found in row["modes"].items():
            ours, theirs = (found["contenders"][f"HF {name}"] for name in ("fastmoe", "grouped_mm"))
            ratio, high, low = (1 / times for times in (theirs["times_ours"], *theirs["spread"]))
            lines.append(
                f"| {shape} | {row['dtype']} | {mode} | {ours['median_ms']:.1f} | {theirs['median_ms']:.1f} "
                f"| {ratio:.2f} | {low:.2f}-{high:.2f} |"
            )
    links = ", ".join(f"[{name}.json](../benchmarks/results/{name}.json)" for name in HUGGING_FACE_RESULTS)
    machine, settings = results[0]["machine"], results[0]["settings"]
    library = f"transformers {results[0]['libraries']['transformers']}"
    return "\n".join([*lines, "", f"{_machine(machine)}, {library}, {settings['rounds']} rounds. Figures: {links}."])


def _place(row: dict) -> tuple:
    sizes = row["shape"]
    return (
        len(row["modes"]) == 1, sizes["E"], sizes["T"] * sizes["D"], row["activation"], row["dtype"] != "float32"
    )  # fmt: skip


def _peer(contenders: dict, peer: str) -> str:
    names = HUGGING_FACE if peer == "best of HF" else (peer,)
    found = [contenders[name]["times_ours"] for name in names if name in contenders]
    return _ratio(min(found)) if found else "-"


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


SPEED = ["cpu", "cpu_large"]
HUGGING_FACE_RESULTS = ["hf"]
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
TABLES = [
    ("cpu", SPEED, ROOT / "README.md", speed_table),
    ("memory", SPEED, BENCHMARKS, memory_table),
    ("layers", SPEED, BENCHMARKS, layer_table),
    ("hugging face", HUGGING_FACE_RESULTS, BENCHMARKS, hugging_face_table),
    ("routers", ["routers"], ROOT / "docs" / "routers.md", router_table),
]


def main() -> None:
    for mark, names, page, table in TABLES:
        paths = [ROOT / "benchmarks" / "results" / f"{name}.json" for name in names]
        results = [json.loads(path.read_text()) for path in paths if path.exists()]
        start, end = f"<!-- {mark} table -->", f"<!-- end of {mark} table -->"
        text = f"{start}\n\n{table(*results)}\n\n{end}"
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.S)
        page.write_text(pattern.sub(lambda _, text=text: text, page.read_text()))
    merged = [json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text()) for name in SPEED]
    plot(merged[0] | {"rows": sorted((r for m in merged for r in m["rows"]), key=_place)}, ROOT / "docs/images/cpu.png")


if __name__ == "__main__":
    main()
