"""The Hub matrix, run whole and timed: every way a push goes wrong, on LFS and Xet, for five kinds of folders (tests/hub/test_matrix.py).

    python benchmarks/hub/matrix.py                # writes matrix.json here; exit code 1 when a cell fails or the whole takes 3 minutes

Each cell is run as its test runs it: the real client in processes of its own against the loopback Hub, one cell after the other. Cells that
would repeat another one request for request are not run, and stand in the log with the reason."""
from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "hub")]
import test_matrix as matrix  # noqa: E402
from loopback import Loopback  # noqa: E402

LOG = Path(__file__).with_name("matrix.json")
LIMIT = 180.0          # seconds


def run(storage: str, kind: str, row: str) -> dict:
    """One cell: {"state": passed or failed, "seconds"}."""
    began = time.perf_counter()
    state, why = "passed", {}
    with tempfile.TemporaryDirectory() as temp, Loopback(xet=storage == "xet") as hub:
        try:
            matrix.ROWS[row](matrix.Cell(Path(temp), storage, kind, hub))
        except Exception:
            state, why = "failed", {"why": traceback.format_exc().strip().splitlines()[-1]}
            traceback.print_exc()
    return {"state": state, "seconds": round(time.perf_counter() - began, 2)} | why


def main() -> int:
    began, cells = time.perf_counter(), {}
    for storage, kind, row in matrix.all_cells():
        reason = matrix.not_run(storage, kind, row)
        cell = cells[f"{storage} / {kind} / {row}"] = {"state": "meaningless", "why": reason} if reason else run(storage, kind, row)
        print(f"{storage:4} {kind:9} {row:15} {cell['state']:12} {cell.get('seconds', '')}", flush=True)
    seconds = time.perf_counter() - began
    states = Counter(cell["state"] for cell in cells.values())
    hardware = f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} core(s), {platform.machine()}"
    versions = {name: version(name) for name in ("huggingface_hub", "hf-xet")}
    LOG.write_text(json.dumps({"seconds": round(seconds, 1), "limit": LIMIT, "states": dict(states), "hardware": hardware, "versions": versions,
                               "cells": cells}, indent=1) + "\n")
    print(f"{seconds:.0f} s of at most {LIMIT:.0f}: {', '.join(f'{n} {state}' for state, n in states.items())} -> {LOG}")
    return int(bool(states["failed"]) or seconds > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
