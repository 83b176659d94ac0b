"""Run all benchmarks and put their tables into docs/performance.md.

    python -m benchmarks [--only NAME] [--device cuda] [--quick] [--json FILE] [--docs FILE]

Each table stands between two markers in the document; the words around it stay. Programs that are compared alternate in
one run, and the fastest step counts. Tables of a GPU are written beside those of the CPU when there is one.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks import dpsgd, growth, overhead, ranks, releases, sinkhorn, teachers
from benchmarks.tables import Table, conditions, write_between_markers

DOCUMENT = Path("docs/performance.md")


def benchmarks_of(device: str) -> dict[str, Callable[[bool], Table]]:
    """Return the benchmarks of a device, by name, in the order in which they run."""
    return {
        "teachers": lambda quick: teachers.run(quick=quick, device=device),
        "releases": lambda quick: releases.run(quick=quick, device=device),
        "dpsgd": lambda quick: dpsgd.run(quick=quick, device=device),
        "sinkhorn": lambda quick: sinkhorn.run(quick=quick, device=device),
        "growth": lambda quick: growth.run(quick=quick, device=device),
        "overhead": lambda quick: overhead.run(quick=quick, device=device),
    }


def devices() -> list[str]:
    """Return cpu, and cuda where there is one."""
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def main(arguments: list[str] | None = None) -> int:
    """Run benchmarks; the exit code is 1 when one fails or a target is missed."""
    names = [*benchmarks_of("cpu"), "ranks"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", action="append", choices=names, help="run this one; may be given several times")
    parser.add_argument("--device", action="append", choices=("cpu", "cuda"), help="on this one (all that are there)")
    parser.add_argument("--quick", action="store_true", help="short runs of the smaller sizes, a few minutes in all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    parser.add_argument(
        "--docs", type=Path, metavar="FILE", default=DOCUMENT, help="the document (docs/performance.md)"
    )
    options = parser.parse_args(arguments)
    tables: list[Table] = []
    failed: list[str] = []
    wanted = options.only or names
    for device in options.device or devices():
        for name, run in benchmarks_of(device).items():
            if name not in wanted:
                continue
            print(f"{name} ({device})", file=sys.stderr, flush=True)
            try:
                table = run(options.quick)
            except Exception:  # hours may lie before and behind it
                traceback.print_exc()
                failed.append(name)
                continue
            text = table.markdown(conditions(device, quick=options.quick))
            write_between_markers(options.docs, table, text)
            print(text, flush=True)
            tables.append(table)
    if options.json:
        options.json.write_text(json.dumps([table.to_dict() for table in tables], indent=2) + "\n")
    if "ranks" in wanted and "cpu" in (options.device or ["cpu"]):
        ranks.main(["--write", str(options.docs), *["--quick"] * options.quick])
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed) or not all(is_met for table in tables for is_met in table.targets.values()))


if __name__ == "__main__":
    raise SystemExit(main())
