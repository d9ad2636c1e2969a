"""`fastmoe bench` on a GPU machine that may have PyTorch alone: `python benchmarks/bench_gpu.py gpu fastmoe-paper`."""

import argparse
import dataclasses
import importlib.util
from pathlib import Path

from fastmoe.bench.presets import PRESETS
from fastmoe.bench.run import Settings, run, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="+", choices=PRESETS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    for name in arguments.presets:
        preset = dataclasses.replace(PRESETS[name], device="cuda")
        path = arguments.out / f"cuda-{name}.json"
        result = run(preset, Settings(arguments.rounds, arguments.seconds), lambda r, path=path: show(r, path))
        if importlib.util.find_spec("matplotlib") is None:
            print("no picture: matplotlib is not installed")
        else:
            from fastmoe.bench.plot import plot

            plot(result, path.with_suffix(".png"))


def show(result: dict, path: Path) -> None:
    row = result["rows"][-1]
    for mode, found in row["modes"].items():
        times = ", ".join(f"{name} {figure['median_ms']:.2f}" for name, figure in found["contenders"].items())
        print(
            f"{row['shape']} {row['dtype']} {row['activation']} {mode}: floor {found['floor_ms']:.2f} ms; {times}",
            flush=True,
        )
    save(result, path)


if __name__ == "__main__":
    main()
