"""The step of a difference in time: the methods that take one, on both teachers, at a short and a long step, everything else as on the boards.

    python benchmarks/leaderboard/steps.py             # what is missing in steps/; then the tables in README.md
    python benchmarks/leaderboard/steps.py --table     # the tables alone

teachers.json: how stiff the teachers are (calculus.stiffness), and how far differences are from forward mode. The long step's rows
are the boards' own where `calculus.time_step` chooses it. Each row is that of run.py: same budget, noise, samples, seed 0."""
from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(HERE)]
TEACHERS = HERE / "steps" / "teachers.json"
LONG = {"TrigFlow": "1e-2", "RectifiedFlow": "5e-3"}          # of the methods that read a teacher so
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


def look() -> list[dict]:
    """Per teacher and reading of it: stiffness, and the largest relative error of a difference over five times, beside forward mode."""
    from zoo import backbones, calculus, process
    rows = []
    for teacher in SAMPLES:
        model = backbones.load(teacher)
        cond = model.examples(2).cond
        for name, long in LONG.items():
            flow = getattr(process, name)()
            net = process.view(model.teacher, flow)
            states = calculus.along_the_flow(net, flow, cond, model.shape)
            apart = lambda h: max(float((calculus.total_derivative(*s, "fd", h)[1] - exact).norm() / exact.norm()) for s, exact in
                                  ((s, calculus.total_derivative(*s, "jvp")[1]) for s in states))
            rows.append({"teacher": teacher, "read as": name, "stiffness": calculus.stiffness(net, flow, cond, model.shape, float(long)), "long": long,
                         "long_error": apart(float(long)), "short_error": apart(calculus.FINE)})
    return rows


def teachers() -> str:
    lines = ["| teacher | read as | stiffness | long step | its error | error at 2e-4 |", "|---|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {r['teacher']} | {r['read as']} | {r['stiffness']:.2f} | {r['long']} | {r['long_error']:.0%} | {r['short_error']:.1%} |"
                              for r in json.loads(TEACHERS.read_text())])


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
    if not parser.parse_args().table:
        TEACHERS.parent.mkdir(exist_ok=True)
        TEACHERS.write_text(json.dumps(look(), indent=1) + "\n")
        for case in CASES:
            if not kept(*case).exists():
                train(*case)
    from pages import between
    between(HERE / "README.md", "stiffness", teachers())
    between(HERE / "README.md", "steps", table())


if __name__ == "__main__":
    main()
