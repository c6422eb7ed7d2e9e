"""Reference curves: what losses, scores and critics looked like in the runs of a leaderboard.

    python benchmarks/leaderboard/curves.py                       # the fashion board of this folder -> docs/curves.png
    python benchmarks/leaderboard/curves.py --results DIR --out curves.png

One row per method, a colour per seed, against the network calls of training: the student's loss, the score (conditional kernel
distance to the teacher, lower is better) and, for methods with a critic, gap and misfit (zoo.health.critic_fit). Read from the
`curve` of rows/*.json, which is the run's metrics.jsonl, thinned, and of other/*.json (text and video). The picture and what can be
read off it are written between the curves markers of docs/symptoms.md; pages.py does this too."""
from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(HERE)]
PANELS = (("student/loss", "student loss"), ("measure/score", "score"), ("student/gap", "gap"), ("student/misfit", "misfit"))
REFERENCE = "fashion-0.06Mcalls"            # the board of docs/symptoms.md: three seeds


@dataclass
class Config:
    results: str = ""                       # a board's folder; default: REFERENCE
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


def constant(own: list) -> bool:
    """Whether a series says nothing: all its values, of all seeds, within a thousandth of their size."""
    values = [v for _, seed in own for v in seed]
    return max(values) - min(values) <= 1e-3 * max(map(abs, values))


def draw(series: dict[str, dict[str, list]], path: Path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from pages import digest
    panels = [(key, title) for key, title in PANELS if any(key in s for s in series.values())]
    figure, axes = plt.subplots(len(series), len(panels), figsize=(3.2 * len(panels), 1.7 * len(series)), squeeze=False)
    for row, (name, own) in zip(axes, series.items()):
        for axis, (key, title) in zip(row, panels):
            if key not in own:
                axis.axis("off")
                continue
            for calls, values in own[key]:
                axis.plot([c / 1e6 for c in calls], values, lw=1, marker="o", ms=2)         # a marker: a series of one point is no line
            flat = constant(own[key])
            spread = [v for _, values in own[key] for v in values]
            if key in ("student/loss", "measure/score") and min(spread) > 0 and max(spread) > 3 * min(spread):
                axis.set_yscale("log")
            if flat:
                axis.set_ylim(0, 1.2 * max(spread))
            axis.set_title(f"{name}: {title}" + " (constant)" * flat, fontsize=8)
            axis.set_xlim(0, 1.05 * max(c for calls, _ in own[key] for c in calls) / 1e6)
            axis.tick_params(labelsize=6, which="both")
    for axis in axes[-1]:
        axis.set_xlabel("million network calls", fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Drawn from": digest(series)})
    plt.close(figure)


def reading(series: dict[str, dict[str, list]]) -> str:
    """What the curves say, from their numbers alone."""
    falls: dict[str, list[bool]] = {}
    for name, own in series.items():
        for _, values in own.get("measure/score", ()):
            if len(values) > 1:
                falls.setdefault(name, []).append(values[-1] < values[0])
    always = [name for name, seeds in falls.items() if all(seeds)]
    rises = [f"`{name}` in {seeds.count(False)} of {len(seeds)}" for name, seeds in falls.items() if not all(seeds)]
    once = [f"`{name}`" for name, own in series.items() if own.get("measure/score") and name not in falls]
    same = [f"`{name}`" for name, own in series.items() if "student/loss" in own and constant(own["student/loss"])]
    lines = [f"From the first measurement to the last the score falls in every seed of {len(always)} of {len(falls)} methods"
             + (f"; it ends higher for {', '.join(rises)} seeds." if rises else ".")]
    if once:
        lines.append(f"{' and '.join(once)}: so few updates fit into this budget that the score was measured at the end alone, one point a seed.")
    if same:
        lines.append(f"{' and '.join(same)}: the loss is constant, because its adaptive weight divides each sample's error by itself; only the score speaks.")
    return " ".join(lines)


def without(folder: Path) -> list[str]:
    """Text and video rows that were kept without their curve."""
    return [p.stem for p in sorted(folder.glob("*.json")) if not json.loads(p.read_text()).get("curve")]


def others(folder: Path) -> list[dict]:
    """Text and video rows that have a curve, as entries."""
    return [{"who": p.stem, "seed": 0, "curve": e["curve"]} for p in sorted(folder.glob("*.json")) if (e := json.loads(p.read_text())).get("curve")]


def load(folder: Path) -> list[dict]:
    entries = [json.loads(p.read_text()) for p in sorted((folder / "rows").glob("*.json"))]
    return entries + (others(HERE / "other") if folder.parent == HERE else [])


def caption(entries: list[dict], folder: Path) -> str:
    """What stands between the markers of docs/symptoms.md."""
    facts = json.loads((folder / "board.json").read_text())
    seeds = sorted({e["seed"] for e in entries if e.get("curve")})
    text = (f"![reference curves](curves.png)\n\nRuns of the leaderboard `{folder.name}`, a line per seed ({', '.join(map(str, seeds))}); "
            f"{facts['hardware']}. {reading(curves(entries))}")
    if names := without(HERE / "other"):
        text += f" The text and video rows ({', '.join(f'`{n}`' for n in names)}) were kept without their curves; `other.py` keeps them when it trains again."
    return text


def main(cfg: Config):
    import pages

    from zoo.errors import UserError
    folder = Path(cfg.results) if cfg.results else HERE / REFERENCE
    if not (folder / "board.json").exists():
        raise UserError("no board to draw: run benchmarks/leaderboard/run.py first, or give --results")
    entries = load(folder)
    series = curves(entries, cfg.methods)
    if not series:
        raise UserError(f"{folder} has no trained rows yet: run benchmarks/leaderboard/run.py first")
    draw(series, Path(cfg.out or ROOT / "docs/curves.png"))
    if not cfg.out and not cfg.methods and folder == HERE / REFERENCE:
        pages.between(ROOT / "docs/symptoms.md", "curves", caption(entries, folder))


if __name__ == "__main__":
    import tyro

    from zoo.errors import UserError
    try:
        main(tyro.cli(Config, description=__doc__))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2)
