"""Reference curves: what losses, scores and critics looked like in the runs of a leaderboard.

    python benchmarks/leaderboard/curves.py                       # the first board of this folder -> docs/curves.png
    python benchmarks/leaderboard/curves.py --results DIR --out curves.png

One row per method, seeds in one colour each, against the network calls of training: the student's loss, the score (conditional kernel
distance to the teacher, lower is better) and, for methods with a critic, gap and misfit (zoo.health.critic_fit). Read from the
`curve` of rows/*.json, which is the run's metrics.jsonl, thinned. The picture is linked between the curves markers of
docs/symptoms.md."""
from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(HERE)]
PANELS = (("student/loss", "student loss"), ("measure/score", "score"), ("student/gap", "gap"), ("student/misfit", "misfit"))


@dataclass
class Config:
    results: str = ""                       # a board's folder
    out: str = ""                           # default: docs/curves.png
    methods: tuple[str, ...] = ()           # default: all that have a curve


def curves(entries: list[dict], methods: tuple[str, ...] = ()) -> dict[str, dict[str, list]]:
    """method -> series -> [[calls, values] of each seed]."""
    out: dict[str, dict[str, list]] = {}
    for e in sorted(entries, key=lambda e: (e["who"], e["seed"] or 0)):
        for key, points in e.get("curve", {}).items():
            if not methods or e["who"] in methods:
                out.setdefault(e["who"], {}).setdefault(key, []).append([[p[1] for p in points], [p[2] for p in points]])
    return out


def draw(series: dict[str, dict[str, list]], path: Path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = [(key, title) for key, title in PANELS if any(key in s for s in series.values())]
    figure, axes = plt.subplots(len(series), len(panels), figsize=(3.2 * len(panels), 1.7 * len(series)), squeeze=False, sharex="row")
    for row, (name, own) in zip(axes, series.items()):
        for axis, (key, title) in zip(row, panels):
            if key not in own:
                axis.axis("off")
                continue
            for calls, values in own[key]:
                axis.plot([c / 1e6 for c in calls], values, lw=1)
            if key in ("student/loss", "measure/score") and min(v for _, values in own[key] for v in values) > 0:
                axis.set_yscale("log")
            axis.set_title(f"{name}: {title}", fontsize=8)
            axis.tick_params(labelsize=6)
    for axis in axes[-1]:
        axis.set_xlabel("million network calls", fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(cfg: Config):
    import pages

    from zoo.errors import UserError
    folder = Path(cfg.results) if cfg.results else next((p.parent for p in sorted(HERE.glob("*/board.json"))), None)
    if folder is None or not (folder / "board.json").exists():
        raise UserError("no board to draw: run benchmarks/leaderboard/run.py first, or give --results")
    series = curves([json.loads(p.read_text()) for p in sorted((folder / "rows").glob("*.json"))], cfg.methods)
    if not series:
        raise UserError(f"{folder} has no trained rows yet: run benchmarks/leaderboard/run.py first")
    draw(series, Path(cfg.out or ROOT / "docs/curves.png"))
    if not cfg.out:
        facts = json.loads((folder / "board.json").read_text())
        pages.between(ROOT / "docs/symptoms.md", "curves", f"![reference curves](curves.png)\n\nRuns of the leaderboard `{folder.name}` ({facts['hardware']}).")


if __name__ == "__main__":
    import tyro

    from zoo.errors import UserError
    try:
        main(tyro.cli(Config, description=__doc__))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2)
