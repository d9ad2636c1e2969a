"""Expert parallelism on one machine: how it scales, what memory it takes, and what overlap and suppression save.

    python benchmarks/parallel.py [--quick] [--only scaling memory links]     # writes benchmarks/results/parallel.json

- scaling: 1, 2 and 4 processes of one thread, each with as many tokens and experts as the others.
- memory: peak of each process while the model grows with their number.
- links: two processes in two network namespaces with a link of 100 Mbit/s or 1 Gbit/s and 1 ms each way between them;
  needs Linux and root.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from parallel_hosts import missing, two_hosts
from parallel_launch import Place, launch
from parallel_links import WAYS
from parallel_show import show_links, show_memory, show_scaling

from fastmoe.bench.machine import machine

SIZES = (1, 2, 4)
LINKS = {100: 2048, 1000: 8192}  # Mbit/s, and tokens of each process
DELAY_MS = 1.0
LAYER = {"d_model": 256, "top_k": 2}
SUPPRESSED = ("plain", "suppress", "suppress, chunks=4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, small sizes: to see that it runs")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "parallel.json")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that namespaces are removed
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.only:
        result[name] = {"conditions": conditions(args.quick), **PARTS[name](args.quick)}
        result[name]["conditions"]["load_average_after"] = os.getloadavg()[0]
        if "left_out" not in result[name] or not args.out.exists():
            args.out.write_text(json.dumps(result, indent=1) + "\n")


def conditions(quick: bool) -> dict:
    """Each part's own: they may be measured one at a time."""
    autogroup = Path("/proc/self/autogroup")  # Linux shares a busy processor out between sessions
    return {
        "machine": machine() | {"threads": 1},
        "cores": os.cpu_count(),
        "quick": quick,
        "autogroup": autogroup.read_text().strip() if autogroup.exists() else "",
        "load_average_before": os.getloadavg()[0],
    }


def scaling(quick: bool) -> dict:
    job = LAYER | {"d_hidden": 1024, "experts": 8, "tokens": 2048, "rounds": 15, "sizes": SIZES}
    if quick:
        job |= {"tokens": 512, "rounds": 3}
    found = launch("parallel_scaling.py", job, [Place()] * max(SIZES))[0]
    show_scaling(found["sizes"], os.cpu_count() or 1)
    return {"job": job, **found}


def memory(quick: bool) -> dict:
    if not Path("/proc/self/clear_refs").exists():
        print("memory: left out, peaks are read from Linux's /proc")
        return {"left_out": "no /proc/self/clear_refs"}
    job = LAYER | {"d_hidden": 1024 if quick else 4096, "experts": 8, "tokens": 2048}
    sizes = {str(size): launch("parallel_memory.py", job, [Place()] * size)[0] for size in SIZES}
    show_memory(sizes)
    return {"job": job, "sizes": sizes}


def links(quick: bool) -> dict:
    reason = missing()
    if reason:
        print(f"links: left out: {reason}")
        return {"left_out": reason}
    found = {}
    for megabits, tokens in LINKS.items():
        job = LAYER | {"experts": 16, "tokens": tokens // 8 if quick else tokens, "cases": cases(quick)}
        with two_hosts(megabits, DELAY_MS) as hosts:
            found[str(megabits)] = {"job": job, **launch("parallel_links.py", job, hosts.places)[0]}
            found[str(megabits)]["link"]["cpu_seconds"] = hosts.relay_seconds()
        show_links(megabits, found[str(megabits)])
    return {"delay_ms": DELAY_MS, "links": found}


def cases(quick: bool) -> list[dict]:
    more = [{"top_k": K, "ways": SUPPRESSED, "rounds": 3 if quick else 5} for K in (4, 8)]
    return [{"top_k": 2, "ways": list(WAYS), "rounds": 3 if quick else 9}, *more]


PARTS: dict[str, Callable[[bool], dict]] = {"scaling": scaling, "memory": memory, "links": links}


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
