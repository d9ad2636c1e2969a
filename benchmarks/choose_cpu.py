"""Where the native backend beats the torch backend on this CPU: `python benchmarks/choose_cpu.py`.

Writes results/choose_cpu.json: for each number of rows for an expert, pair of widths and dtype, how many times native's
time torch takes. `fastmoe.kernels.native.choice` has the rule that follows: where torch is faster, native hands over.
"""

import argparse
from pathlib import Path

from fastmoe.bench.presets import Preset
from fastmoe.bench.run import Settings, run, save
from fastmoe.kernels.torch_ops import ops

ROWS = (1, 4, 16, 64, 256, 1024)
WIDTHS = ((64, 128), (256, 512), (512, 2048), (1024, 4096))
ROUTED = 8192  # rows in all, shared by as many experts as that leaves, of 2 to 128
TORCH, NATIVE = "fastmoe (torch)", "fastmoe (native)"


def shapes() -> list[tuple[int, int, int, int, int]]:
    found = []
    for rows in ROWS:
        for D, H in WIDTHS:
            experts = max(2, min(128, ROUTED // rows, (256 << 20) // (8 * D * H)))
            found.append((max(1, rows * experts // 2), experts, D, H, 2))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "choose_cpu.json")
    arguments = parser.parse_args()
    ops.hands_over = lambda *sizes: False  # native itself, everywhere
    preset = Preset(tuple(shapes()), ("float32", "bfloat16"), ("gelu",), contenders=(TORCH, NATIVE))
    rows: list[dict] = []

    def done(result: dict) -> None:
        row = result["rows"][-1]
        ratios = {
            mode: found["contenders"][TORCH]["median_ms"] / found["contenders"][NATIVE]["median_ms"]
            for mode, found in row["modes"].items()
        }
        rows.append({"shape": row["shape"], "dtype": row["dtype"], "torch_over_native": ratios})
        print(rows[-1], flush=True)
        save({"machine": result["machine"], "rounds": arguments.rounds, "rows": rows}, arguments.out)

    run(preset, Settings(arguments.rounds, 5.0, memory=False), done)


if __name__ == "__main__":
    main()
