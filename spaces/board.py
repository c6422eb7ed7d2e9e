"""The leaderboard's committed CSV (benchmarks/leaderboard), mean and spread over seeds, as a table and as points to plot."""
from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent
PLACES = (HERE / "leaderboard", HERE.parent / "benchmarks" / "leaderboard")      # a pushed Space carries a copy; a clone has the original
MISSING = "No leaderboard has been measured in this copy. `python benchmarks/leaderboard/run.py` makes one; its CSV then shows here."
# column of the CSV -> what it is called here; the first four are what can be plotted as quality
QUALITY = {"kid_efflite0": "kid_efflite0 (lower is better)", "diversity": "diversity", "recall": "recall", "precision": "precision"}
COST = {"training_calls": "network calls of training", "training_seconds": "seconds of training"}
SPREAD = "_spread"           # column + SPREAD: standard deviation over seeds
TABLE = {"who": "model", "family": "family", "sampler": "sampler", "calls": "calls", "kid_efflite0": "kid_efflite0", "kid_efflite0" + SPREAD: "± over seeds", "precision": "precision", "recall": "recall",
         "coverage": "coverage", "agreement": "agreement", "diversity": "diversity", "training_calls": "training calls", "training_seconds": "training s", "seeds": "seeds", "warnings": "health warnings"}
FAMILIES = ("trajectory", "the teacher", "distribution matching", "adversarial", "training-free solver", "before training")      # in the order of their marks
TEXT = ("who", "kind", "family", "sampler", "warnings", "error")


def boards() -> dict[str, Path]:
    """CSV files by the name of their folder."""
    for place in PLACES:
        found = {p.parent.name: p for p in sorted(place.glob("*/leaderboard.csv"))}
        if found:
            return found
    return {}


def _said(path: Path) -> dict:
    """What the board's rows share, {} when that is not recorded."""
    try:
        return json.loads((path.parent / "board.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _budget(said: dict) -> str:
    return f"{said['max_calls']:,} network calls" if said.get("max_calls") else f"{said.get('time_budget', 0):g} s"


def label(path: Path) -> str:
    """What a board is called in the list of boards."""
    said = _said(path)
    return f"{said['teacher']}, {_budget(said)}" if said.get("teacher") else path.parent.name


def telling_cost(path: Path) -> str:
    """The column of COST in which the board's rows differ: the other one was the budget of all."""
    return "training_seconds" if _said(path).get("max_calls") else "training_calls"


def facts(path: Path) -> str:
    """What the board was measured on, in a line."""
    said = _said(path)
    if not said:
        return ""
    return f"Teacher {said.get('teacher', '')}; every method trained for {_budget(said)}; {said.get('samples', '?')} samples a row; {said.get('hardware', '')}."


def rows(path: Path) -> list[dict]:
    """Rows of the CSV without errors, numbers as floats, best first. What differs in the seed alone is one row: the mean, `seeds`, and
    for each number the standard deviation over seeds under its name + SPREAD (None for one seed).

    Raises ValueError when the file is no leaderboard."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"who", "calls", "kid_efflite0"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path.name} has no columns who, calls and kid_efflite0")
        read = [r for r in reader if not r.get("error") and r.get("kid_efflite0")]
    groups: dict[tuple, list[dict]] = {}
    for r in read:
        groups.setdefault((r["who"], r.get("sampler"), r.get("steps"), r["calls"]), []).append(r)
    out = []
    for group in groups.values():
        mean: dict = {k: group[0].get(k) or "" for k in TEXT}
        mean["warnings"] = ", ".join(sorted({w.strip() for r in group for w in (r.get("warnings") or "").split(";") if w.strip()}))
        for key in group[0]:
            if key not in TEXT and key != "seed":
                values = [float(r[key]) for r in group if r[key] not in ("", None)]
                mean[key] = statistics.fmean(values) if values else None
                mean[key + SPREAD] = statistics.stdev(values) if len(values) > 1 else None
        mean["family"] = mean["family"] or {"teacher": "the teacher", "solver": "training-free solver", "untrained": "before training"}.get(mean["kind"], "")
        out.append(mean | {"seeds": len(group)})
    return sorted(out, key=lambda r: r["kid_efflite0"])


def table(found: list[dict]) -> tuple[list[str], list[list]]:
    """Headers and cells for a sortable table, without the columns that are empty on this board."""
    def cell(key, value):
        if value is None:
            return None
        if isinstance(value, float):
            return int(value) if key in ("calls", "training_calls", "training_seconds") else round(value, 1 if key.startswith("kid_efflite0") else 3)
        return value
    shown = [k for k in TABLE if any(r.get(k) not in (None, "") for r in found)]
    return [TABLE[k] for k in shown], [[cell(k, r.get(k)) for k in shown] for r in found]


def against_calls(found: list[dict], quality: str) -> dict[str, list[tuple]]:
    """Points (network calls, quality, model, spread over seeds or 0) by family."""
    out: dict[str, list] = {}
    for r in found:
        if r.get(quality) is not None and r.get("calls"):
            name = r["who"] + (f" ({r['sampler']})" if r.get("sampler") else "")
            out.setdefault(r["family"], []).append((r["calls"], r[quality], name, r.get(quality + SPREAD) or 0.0))
    return out


def against_cost(found: list[dict], quality: str, cost: str, most_calls: int = 4) -> dict[str, list[tuple]]:
    """Points (cost of training, best quality at no more than `most_calls` calls, model, spread over seeds or 0) by family."""
    best: dict[str, dict] = {}
    lower = quality == "kid_efflite0"
    for r in found:
        if r["kind"] == "method" and r.get(quality) is not None and r.get(cost) and r["calls"] <= most_calls:
            known = best.get(r["who"])
            if known is None or (r[quality] < known[quality]) == lower and r[quality] != known[quality]:
                best[r["who"]] = r
    out: dict[str, list] = {}
    for r in best.values():
        out.setdefault(r["family"], []).append((r[cost], r[quality], r["who"], r.get(quality + SPREAD) or 0.0))
    return out
