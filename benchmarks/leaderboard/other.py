"""The small tables: text (SDTT and its shared-noise target) and video (Self Forcing), each with its own teacher and measures.

    python benchmarks/leaderboard/other.py                       # all three, 120 s of training each
    python benchmarks/leaderboard/other.py --rows sdtt --max_calls 50000

Each row is one run of the script's own command; what it measured at its end (measured.json: teacher and student on the same random
numbers, at several step counts) is kept in other/<row>.json, and the tables of README.md are made from those. Rows that are there
are not repeated unless --fresh."""
from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(HERE)]
ROWS = {"sdtt": ("train_sdtt.py",), "sdtt-shared-noise": ("train_sdtt.py", "--target", "shared_noise"), "self_forcing": ("train_self_forcing.py",)}
KINDS = {"text": ("sdtt", "sdtt-shared-noise"), "video": ("self_forcing",)}


@dataclass
class Config:
    rows: tuple[str, ...] = tuple(ROWS)
    time_budget: float = 120.0
    max_calls: int = 0               # > 0: network calls instead of seconds
    work: str = "outputs/leaderboard/other"
    fresh: bool = False


def run(name: str, cfg: Config) -> dict:
    """Train one row in a child process; what it measured and what it cost."""
    from run import curve, hardware      # benchmarks/leaderboard/run.py
    script, *flags = ROWS[name]
    out = ROOT / cfg.work / name
    budget = ["--max_calls", str(cfg.max_calls), "--time_budget", "0"] if cfg.max_calls else ["--time_budget", str(cfg.time_budget)]
    command = [f"train_scripts/{script}", *flags, *budget]
    subprocess.run([sys.executable, *command, "--output_dir", str(out), "--export", "last"], check=True, cwd=ROOT)
    facts = json.loads((out / "measured.json").read_text())
    return {"command": " ".join(["python", *command]), "hardware": hardware(), **{k: facts[k] for k in ("seconds", "steps", "calls", "measured")},
            "curve": curve([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])}


def table(names: tuple[str, ...]) -> str:
    """One block per kind: the teacher's rows once, then each student's."""
    lines, seen, columns = [], [], None
    for name in names:
        path = HERE / "other" / f"{name}.json"
        if not path.exists():
            continue
        entry = json.loads(path.read_text())
        seen.append(f"{name}: `{entry['command']}`, {entry['steps']} steps, "
                    f"{entry['calls'] / 1e6:.2f} M calls in {entry['seconds']:.0f} s ({entry['hardware']})")
        rows = entry["measured"]
        if columns is None:
            columns = [k for k in rows[-1] if k not in ("who", "steps", "calls", "low", "high")]
            lines += ["| model | steps | network calls | " + " | ".join(columns) + " |", "|" + "---|" * (3 + len(columns))]
        for row in (r for r in rows if r["who"] == "student" or len(seen) == 1):
            cells = [f"{row[k]:.4g}" if isinstance(row.get(k), float) else str(row.get(k, "")) for k in columns]
            who = name if row["who"] == "student" else row["who"]
            lines.append(f"| {who} | {row['steps'] or ''} | {row['calls']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *("- " + s for s in seen)]) if seen else "Not measured yet."


def main(cfg: Config):
    from pages import between
    (HERE / "other").mkdir(exist_ok=True)
    for name in cfg.rows:
        path = HERE / "other" / f"{name}.json"
        if cfg.fresh or not path.exists():
            path.write_text(json.dumps(run(name, cfg), indent=1) + "\n")
    for kind, names in KINDS.items():
        between(HERE / "README.md", kind, table(names))


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Config, description=__doc__))
