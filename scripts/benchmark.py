"""The table of what mlmx must reach, measured beside the published recipe: python scripts/benchmark.py

    python scripts/benchmark.py --rows train_512_fp32,masking --json run.json --markdown run.md
    python scripts/benchmark.py --scaling --write-docs      # how cost grows, into docs/performance.md

Method: docs/performance.md. ``--quick`` runs all of it on tiny sizes, to test the harness; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark.bench import Bench
from benchmark.growth import growth
from benchmark.machine import machine_facts
from benchmark.report import markdown, row_record, table, write_docs
from benchmark.rows import ROWS
from benchmark.sizes import FULL, QUICK
from benchmark.workers import SIDES, WorkerError, serve

DOCS = Path(__file__).resolve().parents[1] / "docs" / "performance.md"


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; 1 where a row failed or missed what it must reach, 2 for a wrong request."""
    args = parser().parse_args(argv)
    if args.worker:
        serve(args.worker)
    names = [] if args.scaling and not args.rows else (args.rows or ",".join(ROWS)).split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown or args.repeats < 1:
        wrong = (
            f"--rows: {unknown[0]!r} is no row; choose from {', '.join(ROWS)}" if unknown else "--repeats: 1 or more"
        )
        print(f"benchmark: {wrong}", file=sys.stderr)
        return 2
    if args.quick:  # of both sides, whose figures mean nothing: threads that spin starve whatever shares the cores
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no worker and no folder behind
    run = measured(args, names)
    print(markdown(run), end="")
    for path, text in ((args.json, json.dumps(run, indent=1) + "\n"), (args.markdown, markdown(run))):
        if path:
            path.write_text(text, encoding="utf-8")
    if args.write_docs:
        write_docs(DOCS, run)
    failed = any("error" in row for row in run["rows"].values())
    return int(failed or not (args.quick or all(row["met"] for row in run["rows"].values())))


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"rows: {', '.join(ROWS)}"
    )
    described.add_argument("--rows", help="rows to measure, separated by commas; all by default")
    described.add_argument(
        "--scaling", action="store_true", help="measure how cost grows; alone unless --rows is given"
    )
    described.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    described.add_argument("--repeats", type=int, default=5, help="turns of each side; the median counts")
    described.add_argument("--quick", action="store_true", help="tiny sizes, one turn: tests the harness alone")
    described.add_argument("--json", type=Path, help="write everything that was measured")
    described.add_argument("--markdown", type=Path, help="write the table")
    described.add_argument("--write-docs", action="store_true", help="put the tables into docs/performance.md")
    described.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    return described


def measured(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Every row asked for; one that fails says so and the others go on."""
    sizes, repeats = (QUICK, 1) if args.quick else (FULL, args.repeats)
    settings = {"device": args.device, "quick": args.quick, "repeats": repeats}
    machine = machine_facts()
    with tempfile.TemporaryDirectory(prefix="mlmx-benchmark-", ignore_cleanup_errors=True) as folder:
        bench = Bench(sizes, args.device, repeats, Path(folder))
        try:
            with bench.pair() as pair:
                machine["sides"] = pair.together("facts")
            rows = {name: measured_row(bench, name) for name in names}
            found = growth(bench) if args.scaling else {}
        finally:
            bench.close()
    return {"settings": settings, "machine": machine, "rows": rows, "growth": found}


def measured_row(bench: Bench, name: str) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        record = row_record(ROWS[name], ROWS[name].measure(bench))
    except (WorkerError, RuntimeError) as error:
        record = {"what": ROWS[name].what, "error": str(error)}
    print(
        f"{table({name: record}).splitlines()[-1]}  ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True
    )
    return record


if __name__ == "__main__":
    sys.exit(main())
