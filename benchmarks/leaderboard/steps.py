"""The step of a difference in time: the methods that take one, on both teachers, at a short and a long step, everything else as on the boards.

    python benchmarks/leaderboard/steps.py             # what is missing in steps/; then the table in README.md
    python benchmarks/leaderboard/steps.py --table     # the table alone

The long step's rows are the boards' own where `calculus.time_step` chooses it. Each row is that of run.py: same budget, noise, samples, seed 0."""
from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- steps:begin -->", "<!-- steps:end -->"
CALLS, SAMPLES = 60_000, {"fashion": 2000, "emoji": 1000}
CASES = [(teacher, method, h) for teacher in SAMPLES for method, long in (("scm", "1e-2"), ("rcm", "1e-2"), ("meanflow", "5e-3"), ("flow_map", "5e-3"))
         for h in (long, "2e-4")]


def kept(teacher: str, method: str, h: str) -> Path:
    return HERE / "steps" / f"{teacher}-{method}-{h}.json"


def train(teacher: str, method: str, h: str) -> None:
    """One case through run.py, its row copied to steps/."""
    results = ROOT / "outputs/leaderboard" / f"steps-{teacher}-{method}-{h}"
    subprocess.run([sys.executable, str(HERE / "run.py"), "--teacher", teacher, "--seeds", "0", "--samples", str(SAMPLES[teacher]), "--max_calls", str(CALLS),
                    "--methods", method, "--results", str(results), "--work", f"{results}-work", f"--flags=--h {h}"], check=True)
    kept(teacher, method, h).parent.mkdir(exist_ok=True)
    shutil.copy(results / f"rows/{method}-seed0.json", kept(teacher, method, h))


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def table() -> str:
    lines = ["| teacher | method | step | " + " | ".join(f"{k} {'call' if k == 1 else 'calls'}" for k in (1, 2, 4)) + " |", "|---|---|---|---|---|---|"]
    for teacher, method, h in CASES:
        path = kept(teacher, method, h)
        if not path.exists():
            continue
        rows = json.loads(path.read_text())["rows"]
        for sampler in sorted({r["sampler"] for r in rows}, reverse=True):
            cells = []
            for calls in (1, 2, 4):
                found = [r for r in rows if r["sampler"] == sampler and r["calls"] == calls]
                cells.append(f"{found[0]['kid_efflite0']:.0f} / {number(found[0]['kid_teacher'])}" if found else "")
            lines.append(f"| {teacher} | {method}{' (jump)' if sampler == 'jump' else ''} | {h} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="train nothing, write the table")
    for case in [] if parser.parse_args().table else CASES:
        if not kept(*case).exists():
            train(*case)
    page = HERE / "README.md"
    head, rest = page.read_text().split(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
