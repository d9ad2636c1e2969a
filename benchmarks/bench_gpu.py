"""One GPU preset of `fastmoe bench`, with PyTorch alone: `python benchmarks/bench_gpu.py gpu-large --out FOLDER`.

FOLDER/PRESET.json holds all that is measured so far, at any time. `--dry` rehearses it with toy shapes on a CPU, and
writes FOLDER/PRESET-dry.json.
"""

import argparse
import sys
from pathlib import Path

from fastmoe.bench.presets import PRESETS, toy
from fastmoe.bench.run import Settings, run, save
from fastmoe.bench.targets import targets

VERDICTS = {True: "met", False: "MISSED", None: "NOT MEASURED"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=[name for name in PRESETS if name.startswith("gpu-")])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one contender and problem")
    parser.add_argument("--budget", type=float, help="seconds after which no other problem is begun")
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    name = arguments.preset
    path = arguments.out / f"{name}{'-dry' if arguments.dry else ''}.json"
    preset = toy(PRESETS[name]) if arguments.dry else PRESETS[name]
    rounds = 1 if arguments.dry else arguments.rounds
    settings = Settings(rounds, arguments.seconds, budget=arguments.budget, go_on=True, dry=arguments.dry)

    def keep(result: dict) -> None:
        save(result | {"targets": [] if arguments.dry else targets(name, result)}, path)

    def done(result: dict) -> None:
        keep(result)
        if result["rows"]:
            show(result["rows"][-1])

    result = run(preset, settings, done)
    keep(result)
    for target in targets(name, result):
        verdict = "rehearsed" if arguments.dry else VERDICTS[target["met"]]
        value = "none" if target["value"] is None else f"{target['value']:.2f}"
        sign = ">=" if target["at_least"] else "<="
        print(f"{verdict}: {target['what']}: {value}, wanted {sign} {target['limit']:.2f}")
    for word in ("skipped", "failed", "left"):
        for case in result[word]:
            print(f"{word}: {case['shape']} {case['dtype']} {case['activation']}: {case.get('reason', 'no time')}")
    return int(bool(result["failed"] or result["skipped"] or result["left"]))


def show(row: dict) -> None:
    for mode, found in row["modes"].items():
        times = ", ".join(f"{name} {figure['median_ms']:.3f}" for name, figure in found["contenders"].items())
        case = f"{row['shape']} {row['dtype']} {row['activation']} {mode}"
        print(f"{case}: floor {found['floor_ms']:.3f} ms; {times}; left out: {row['left_out']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
