"""What the leaderboard looks like: CSV, tables, plot and pictures, all made from the entries of a board (see run.Board).

    python benchmarks/leaderboard/pages.py        # all of it again from the rows that are there, without training or measuring"""
from __future__ import annotations

import csv
import hashlib
import json
import re
import statistics
import sys
from pathlib import Path

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(HERE)]

METRICS = ("kid_efflite0", "kid_low", "kid_high", "kid_teacher", "precision", "recall", "density", "coverage", "agreement", "diversity", "ode_error")
COST = ("training_steps", "training_calls", "training_seconds", "budget_used", "peak_memory_gb", "parameters", "trained_parameters")
COLUMNS = ("who", "kind", "family", "seed", "sampler", "steps", "calls", "beyond", *METRICS, *COST, "warnings", "error")
OTHERS = {"sdtt": "ngram_js", "self_forcing": "conditional_kid_efflite0"}      # text and video: the measure beside the paper's number
MEDIANS = ("training_seconds",)      # over seeds: one run that waited for other work of the machine is no cost of the method


# ------------------------------------------------------------------------------------------------------- rows
def flat(entries: list[dict]) -> list[dict]:
    """One dict per row of the table; a method that did not train is one row with its error. beyond: more calls than the contract serves."""
    out = []
    for e in entries:
        who = {k: e[k] for k in ("who", "kind", "family", "seed")}
        job = e["job"] or {}
        cost = {k: job.get(k) for k in COST} | {"warnings": "; ".join(job.get("warnings", []))}
        out += [who | {"error": e["error"]}] if "error" in e else []
        beyond = lambda row: {"beyond": 1 if job and row["steps"] > max(job["steps"]) else None}
        out += [who | row | beyond(row) | cost for row in sorted(e["rows"], key=lambda r: (r["sampler"], -r["calls"]))]
    return out


def more(entries: list[dict]) -> list[str]:
    """Measures of this board beyond those that all have, as its rows name them."""
    return list(dict.fromkeys(k for e in entries for r in e["rows"] for k in r if k not in COLUMNS))


def table(entries: list[dict], path: Path):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *more(entries)), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in flat(entries))


def average(rows: list[dict]) -> list[dict]:
    """Mean and sample spread over seeds of rows that differ in the seed alone: each metric becomes (mean, spread | None), those of
    MEDIANS (median, None)."""
    groups: dict[tuple, list[dict]] = {}
    others = dict.fromkeys(k for row in rows for k in row if k not in COLUMNS)
    for row in rows:
        if not row.get("error"):
            groups.setdefault((row["who"], row["sampler"], row["steps"]), []).append(row)
    out = []
    for group in groups.values():
        mean = {k: group[0][k] for k in ("who", "kind", "family", "sampler", "steps", "calls", "beyond")} | {"seeds": len(group)}
        for key in (*METRICS, *COST, *others):
            values = [r[key] for r in group if r.get(key) is not None]
            if key in MEDIANS:
                mean[key] = (statistics.median(values), None) if values else None
            else:
                mean[key] = (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None) if values else None
        out.append(mean)
    return out


def by_student(rows: list[dict]) -> list[list[dict]]:
    """Averaged rows of one model and sampler, fewest calls first; best at its fewest calls first."""
    groups: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda r: r["calls"]):
        groups.setdefault((row["who"], row["sampler"]), []).append(row)
    return sorted(groups.values(), key=lambda g: (g[0]["calls"], g[0]["kid_efflite0"][0]))


# ------------------------------------------------------------------------------------------------------- tables
def nearest(group: list[dict]) -> dict:
    """The row nearest to real images, of those that the student was trained for."""
    return min((r for r in group if not r["beyond"]), key=lambda r: r["kid_efflite0"][0])


def show(value: tuple | None, digits: int = 0, scale: float = 1.0) -> str:
    """Mean and spread as text."""
    if value is None:
        return ""
    mean, spread = value
    return f"{mean * scale:.{digits}f}" + ("" if spread is None else f" ± {spread * scale:.{digits}f}")


def shown(value: tuple | None) -> str:
    """A distance: whole, or with one digit where it is small."""
    return show(value, 0 if value is None or abs(value[0]) >= 10 else 1)


def early(group: list[dict]) -> bool:
    """Whether a student's training ended at its script's own --steps, before the budget was spent."""
    return bool(group[0]["budget_used"]) and group[0]["budget_used"][0] < 0.95


def legend(groups: list[list[dict]]) -> list[str]:
    """What the marks say, of those that have one."""
    beyond = any(r["beyond"] for g in groups for r in g)
    told = ["", "° more calls than the student was trained for, spaced as its own times are."] if beyond else []
    spent = {g[0]["who"]: f"{g[0]['training_calls'][0]:,.0f} calls" for g in groups if early(g)}
    named = ", ".join(f"{who}: {n}" for who, n in spent.items())
    return ["", f"\\* reached its script's own `--steps` before the budget was spent ({named})."] * bool(spent) + told


def budget(facts: dict) -> str:
    return f"{facts['max_calls']:,} network calls" if facts["max_calls"] else f"{facts['time_budget']:g} s"


NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def seeds(entries: list[dict]) -> str:
    """How many seeds the trained students have: "two seeds", or "one to three seeds" while some are missing."""
    found: dict[str, set] = {}
    for e in entries:
        if e["kind"] == "method" and any("error" not in r for r in e["rows"]):
            found.setdefault(e["who"], set()).add(e["seed"])
    counts = sorted({len(s) for s in found.values()}) or [0]
    word = lambda n: NUMBERS[n] if n < len(NUMBERS) else str(n)
    return " to ".join(map(word, dict.fromkeys((counts[0], counts[-1])))) + (" seed" if counts[-1] == 1 else " seeds")


def machine(facts: dict) -> str:
    return re.sub(r"^1 threads", "1 thread", facts["hardware"])


def cost(entries: list[dict]) -> str:
    """What a student's training took: the middle half, because single runs waited for other work of the machine."""
    took = [e["job"]["training_seconds"] for e in entries if e["kind"] == "method" and e["job"]]
    if len(took) < 4:
        return ""
    low, _, high = statistics.quantiles(took, n=4, method="inclusive")
    return f"half of the trainings took {low:.0f} to {high:.0f} s"


def against_solvers(students: list[list[dict]], calls: int = 4) -> str:
    """Students at `calls` network calls beside the training-free solvers at the fewest calls these have. Level: their difference is
    within the 95 % interval, or within the spread over seeds where that is larger."""
    solvers = [g[0] for g in students if g[0]["kind"] == "solver"]
    if not solvers:
        return ""
    least = min(r["calls"] for r in solvers)
    kids = [r["kid_efflite0"][0] for r in solvers if r["calls"] == least]
    found: dict[str, list[str]] = {"ahead": [], "level": [], "behind": []}
    for g in students:
        for r in g:
            if g[0]["kind"] == "method" and r["calls"] == calls:
                kid, spread = r["kid_efflite0"]
                room = max(spread or 0.0, (r["kid_high"][0] - r["kid_low"][0]) / 2)
                where = "ahead" if kid + room < min(kids) else "behind" if kid - room > max(kids) else "level"
                found[where].append(g[0]["who"] + " (jump)" * (g[0]["sampler"] == "jump"))
    if not any(found.values()):
        return ""
    told = "; ".join(f"{word}: {', '.join(sorted(who)) or 'none'}" for word, who in found.items())
    beside = f"{' and '.join(sorted({r['who'] for r in solvers}))} at {least} ({' and '.join(f'{k:.0f}' for k in sorted(kids))})"
    return f"Students at {calls} calls beside {beside}: {told}."


def by_calls(students: list[list[dict]], key: str, label) -> list[str]:
    """Lines of a table: one metric at a number of network calls."""
    lines = ["| model | family | sampler | 1 | 2 | 4 | 8 | more |", "|---|---|---|---|---|---|---|---|"]
    for g in students:
        at = {r["calls"]: shown(r[key]) + "°" * bool(r["beyond"]) for r in g}
        more = ", ".join(f"{v} at {k}" for k, v in at.items() if v and k not in (1, 2, 4, 8))
        family = g[0]["family"] or {"teacher": "baseline", "solver": "training-free solver", "untrained": "the student before training"}[g[0]["kind"]]
        lines.append(f"| {label(g)} | {family} | {g[0]['sampler']} | " + " | ".join(at.get(k, "") for k in (1, 2, 4, 8)) + f" | {more} |")
    return lines


def agreement(entries: list[dict], facts: dict, students: list[list[dict]], label) -> list[str]:
    """Lines of the table of a world's own measures, under what real pictures get in them; none where a board has neither."""
    columns = ["agreement", *more(entries)]
    if len(columns) == 1 and "real" not in facts:
        return []
    row = lambda who, cells: f"| {who} | " + " | ".join(cells) + " |"
    lines = ["", f"{facts.get('agreement', 'agreement').capitalize()}, of the same rows:", "",
             row("model | calls", ["all", *(c.removeprefix("agreement_").replace("_", " ") for c in columns[1:])]), "|" + "---|" * (len(columns) + 2)]
    lines += [row(f"{who} | ", [f"{values[c]:.2f}" if c in values else "" for c in columns]) for who, values in facts.get("real", {}).items()]
    for g in students:
        r = nearest(g)
        lines.append(row(f"{label(g)} | {r['calls']}", [show(r.get(c), 2) for c in columns]))
    return lines


def markdown(entries: list[dict], facts: dict) -> str:
    """The tables of one board."""
    rows = average(flat(entries))
    students = by_student(rows)
    names = {s: sum(1 for g in students if g[0]["who"] == s) for s in {g[0]["who"] for g in students}}
    plain = lambda g: g[0]["who"] + "*" * early(g)
    label = lambda g: (f"{g[0]['who']} ({g[0]['sampler']})" if names[g[0]["who"]] > 1 else g[0]["who"]) + "*" * early(g)
    numbers = sorted({e["seed"] for e in entries if e["seed"] is not None})
    lines = [f"### {facts['teacher']}, {budget(facts)}{'' if facts['max_calls'] else ' of training'}", "",
             f"{facts['samples']} samples a row, {seeds(entries)} ({', '.join(map(str, numbers)) or 'none'}"
             f"{'; mean ± spread over them' * (len(numbers) > 1)}), teacher at guidance {facts.get('guidance', 1):g} in "
             f"{facts.get('precision', 'float32')}, reference {facts['reference_steps']} steps; {machine(facts)}."
             + (f" Flags of every script: `{facts['flags']}`." if facts["flags"] else "")]
    if spent := cost(entries):
        lines[-1] += f" {spent[0].upper()}{spent[1:]}."
    lines += ["", "`kid_efflite0` to real images, at a number of network calls:", "", *by_calls(students, "kid_efflite0", plain)]
    lines += [line for calls in (4, 8) if (told := against_solvers(students, calls)) for line in ("", told)]
    taught = [g for g in students if any(r["kid_teacher"] is not None for r in g)]
    if taught:
        lines += ["", "`kid_teacher`, the same distance to the teacher's own samples:", "", *by_calls(taught, "kid_teacher", plain)]
    own = facts.get("agreement") or ("class accuracy" if facts["teacher"] == "fashion" else "retrieval@5")
    lines += ["", "Each where it is nearest to real images:", "",
              f"| model | calls | to real | to teacher | precision | recall | coverage | {own} | diversity | ODE error | steps | Mcalls | median seconds "
              "| peak GB | M trained |", "|" + "---|" * 15]
    for g in students:
        r = nearest(g)
        follows = g[0]["kind"] != "method" or g[0]["family"] == "trajectory"
        cells = [label(g), str(r["calls"]), shown(r["kid_efflite0"]), shown(r["kid_teacher"]),
                 *(show(r[k], 2) for k in ("precision", "recall", "coverage", "agreement", "diversity")), show(r["ode_error"], 2) if follows else "",
                 show(r["training_steps"]), show(r["training_calls"], 2, 1e-6), show(r["training_seconds"]), show(r["peak_memory_gb"], 2),
                 show(r["trained_parameters"], 2, 1e-6)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += legend(students) + agreement(entries, facts, students, label)
    warned = sorted({(e["who"], w) for e in entries for w in (e["job"] or {}).get("warnings", [])})
    failed = [(e["who"], e["seed"], e["error"]) for e in entries if "error" in e]
    failed += [(e["who"], e["seed"], f"{r['steps']} steps: {r['error']}") for e in entries for r in e["rows"] if "error" in r]
    if warned:
        lines += ["", "Health warnings during training: " + ", ".join(f"{who} ({w})" for who, w in warned) + ". [What they mean](../../docs/symptoms.md)."]
    if failed:
        lines += ["", "Failed: " + "; ".join(f"{who}{'' if seed is None else f' seed {seed}'}: {error}" for who, seed, error in failed) + "."]
    return "\n".join(lines)


def papers(entries: list[dict], here: Path) -> str:
    """What each method's own paper reports, beside our best row: other data, networks and budgets, never to be compared as numbers."""
    students = sorted(by_student(average(flat(entries))), key=lambda g: -nearest(g)["kid_efflite0"][0])
    best = {g[0]["who"]: nearest(g) for g in students if g[0]["kind"] == "method"}
    with open(here / "paper_numbers.csv", encoding="utf-8", newline="") as file:
        known = {row["method"]: row for row in csv.DictReader(file)}
    ours = {who: (f"`kid_efflite0` {show(row['kid_efflite0'])}", row["calls"]) for who, row in best.items()}
    for who, measure in OTHERS.items():
        if (path := here / "other" / f"{who}.json").exists():
            row = min((r for r in json.loads(path.read_text())["measured"] if r["who"] == "student"), key=lambda r: r[measure])
            ours[who] = f"`{measure}` {row[measure]:.4g}", row["calls"]
    lines = ["| method | the paper's own number | calls | from | ours | calls |", "|---|---|---|---|---|---|"]
    for who, (value, calls) in sorted(ours.items()):
        row = known.get(who, {})
        theirs = f"{row['metric']} {row['value']}, {row['dataset']}" if row.get("metric") else "none"
        lines.append(f"| {who} | {theirs} | {row.get('calls', '')} | {row.get('source', '')} | {value} | {calls} |")
    return "\n".join(lines)


def short(entries: list[dict], facts: dict, top: int = 24) -> str:
    """The project README's table: the best students by their best row at no more than 4 calls."""
    students = [[r for r in g if r["calls"] <= 4] for g in by_student(average(flat(entries))) if g[0]["kind"] in ("method", "untrained")]
    students = sorted((g for g in students if g), key=lambda g: min(r["kid_efflite0"][0] for r in g))[:top]
    teacher = [r for r in average(flat(entries)) if r["kind"] == "teacher"]
    lines = [f"`kid_efflite0` to real images ({facts['teacher']}, lower is better) by number of network calls; every method with the same teacher, noise and "
             f"{budget(facts)} of training, {seeds(entries)}:", "", "| model | 1 | 2 | 4 |", "|---|---|---|---|"]
    for g in students:
        at = {r["calls"]: show(r["kid_efflite0"]) for r in g}
        who = g[0]["who"] + "*" * early(g) + (" (by its own two-time rule)" if g[0]["sampler"] == "jump" else "")
        lines.append(f"| {who} | " + " | ".join(at.get(k, "") for k in (1, 2, 4)) + " |")
    lines += legend(students)
    solvers = [r for r in average(flat(entries)) if r["kind"] == "solver"]
    if solvers:
        told = (f"{r['who']} {show(r['kid_efflite0'])} in {r['calls']} calls" for r in sorted(solvers, key=lambda r: (r["who"], r["calls"])))
        lines += ["", f"Without training: {', '.join(told)}."]
    told = (f"{show(r['kid_efflite0'])} in {r['calls']} calls" for r in sorted(teacher, key=lambda r: -r["calls"]))
    lines += ["", f"The teacher: {', '.join(told)}. [All of it](benchmarks/leaderboard/README.md)."]
    return "\n".join(lines)


def so_far(boards: list[tuple[str, list[dict], dict]]) -> str:
    """What stands behind the short tables: seeds, and what the budget was in seconds."""
    many = [facts["teacher"] for *_, facts in boards]
    name = lambda facts: facts["teacher"] + (f" with {budget(facts)}" if many.count(facts["teacher"]) > 1 else "")
    told = [f"{seeds(rows)} on {name(facts)}" + (f" ({spent})" if (spent := cost(rows)) else "") for _, rows, facts in boards]
    return f"So far: {', '.join(told)}; {' and '.join(sorted({machine(facts) for *_, facts in boards}))}, beside other work."


def between(path: Path, name: str, text: str) -> bool:
    """Rewrite what stands between the markers `name` of a page; False when it has none."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    if begin not in page or end not in page:
        return False
    path.write_text(re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.S), encoding="utf-8")
    return True


# ------------------------------------------------------------------------------------------------------- pictures
def strip_path(work: Path, who: str, sampler: str, steps: int) -> Path:
    return work / "pictures" / f"{who}-{sampler}-{steps}.png"


def keep_strip(work: Path, who: str, row: dict, images):
    """The first images of a row, side by side, for `picture`."""
    from PIL import Image

    from zoo.grid import to_uint8
    path = strip_path(work, who, row["sampler"], row["steps"])
    path.parent.mkdir(parents=True, exist_ok=True)
    x = to_uint8(images)
    Image.fromarray(x.transpose(1, 0, 2, 3).reshape(x.shape[1], -1, 3)).save(path)


def read_strip(path: Path):
    """[n, 3, side, side] in [-1, 1]."""
    import numpy as np
    import torch
    from PIL import Image
    x = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1).float() / 127.5 - 1
    return torch.stack(x.split(x.shape[1], 2))


def picture(entries: list[dict], work: Path, path: Path, cell: int = 48):
    """One row per model on the same noise, labelled with its network calls: in the left half its fewest, in the right half its most (a
    student with one count stands left below 4 calls, else right).

    A picture is kept as it is when strips of its rows are no longer in the work folder."""
    import torch

    from zoo.grid import grid
    have = {(r["who"], r["sampler"], r["steps"]): r["calls"] for r in flat(entries) if not r.get("error")}
    rows = []
    for label, *halves in strips(entries):
        if path.exists() and not all(strip_path(work, *h).exists() for h in halves if h in have):
            return
        found = [read_strip(strip_path(work, *h)) if h in have and strip_path(work, *h).exists() else None for h in halves]
        if any(s is not None for s in found):
            blank = torch.ones_like(next(s for s in found if s is not None))
            rows.append((label, torch.cat([blank if s is None else s for s in found])))
    if rows:
        grid(rows, path, cell=cell)


def strips(entries: list[dict]) -> list[tuple]:
    """(label, left, right) of every row of the picture; left and right are (who, sampler, steps) or None."""
    students = by_student(average(flat(entries)))
    out = []
    for g in sorted(students, key=lambda g: ("teacher", "solver", "untrained", "method").index(g[0]["kind"])):      # the order of by_student within
        who, sampler, kind = g[0]["who"], g[0]["sampler"], g[0]["kind"]
        rows = g if kind == "method" else [r for r in g if r["steps"] <= 8]
        if kind == "teacher" and g[-1] not in rows:                                # its many-step samples, alone
            out.append((f"{who}: {g[-1]['calls']} calls", (who, sampler, g[-1]["steps"]), None))
        if kind != "solver":
            rows = [r for r in rows if r["steps"] <= 4 and not r["beyond"]] or rows
        ends = [rows[0], rows[-1]] if len(rows) > 1 else [None, rows[0]] if rows and rows[0]["calls"] >= 4 else [*rows, None] if rows else []
        if ends:
            calls = " | ".join(str(r["calls"]) for r in ends if r)
            name = who if kind != "method" else f"{who} {sampler}"
            out.append((f"{name}: {calls} call{'s' * (calls != '1')}", *((who, sampler, r["steps"]) if r else None for r in ends)))
    return out


def digest(data) -> str:
    """Stands in a drawing's file for the numbers that it was drawn from, so that a stale one can be told."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def panels(students: list[list[dict]]) -> dict[str, list[list[dict]]]:
    """title -> students of each panel of the plot, few enough in each to be told apart."""
    two_time = {g[0]["who"] for g in students if g[0]["sampler"] == "jump"}
    out: dict[str, list[list[dict]]] = {}
    for g in sorted((g for g in students if g[0]["kind"] == "method"), key=lambda g: g[0]["who"]):
        if g[0]["who"] in two_time:
            title = "two times (dashed: by their own rule)"
        else:
            title = "trajectory" if g[0]["family"] == "trajectory" else "distribution matching, adversarial"
        out.setdefault(title, []).append(g)
    return dict(sorted(out.items()))


def points(students: list[list[dict]]) -> list:
    """What the plot shows."""
    return [[g[0]["who"], g[0]["sampler"], [[r["calls"], *r["kid_efflite0"]] for r in g]] for g in students]


def plot(entries: list[dict], facts: dict, path: Path) -> bool:
    """kid_efflite0 against network calls, a panel per kind of student, baselines in grey in each; False without matplotlib
    (`pip install -e ".[bench]"`)."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    students = by_student(average(flat(entries)))
    shown_in = panels(students) or {"baselines": []}
    figure, axes = plt.subplots(1, len(shown_in), figsize=(4.6 * len(shown_in), 5.6), sharey=True, squeeze=False)
    ticks = sorted({r["calls"] for g in students for r in g})
    for axis, (title, group) in zip(axes[0], shown_in.items()):
        for g in students:
            if g[0]["kind"] != "method":
                style, marker = {"teacher": ("-", "s"), "solver": (":", "v" if g[0]["who"] == "unipc" else "^"), "untrained": ("--", "D")}[g[0]["kind"]]
                axis.plot([r["calls"] for r in g], [r["kid_efflite0"][0] for r in g], style, marker=marker, ms=4, lw=1, color="0.45", label=g[0]["who"])
        looks = {who: (f"C{i}", "osv^DPX*<>"[i % 10]) for i, who in enumerate(dict.fromkeys(g[0]["who"] for g in group))}
        for i, g in enumerate(group):
            colour, marker = looks[g[0]["who"]]
            jump = g[0]["sampler"] == "jump"
            kids = [r["kid_efflite0"] for r in g]
            axis.errorbar([r["calls"] * 1.03 ** (i - len(group) / 2) for r in g], [kid for kid, _ in kids], [spread or 0 for _, spread in kids],
                          marker=marker, ms=5, lw=1.2, capsize=2, color=colour, ls="--" if jump else "-", label=g[0]["who"] + " (jump)" * jump)
        axis.set(xscale="log", yscale="log", xlabel="network calls per image", title=title)
        axis.title.set_fontsize(10)
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.minorticks_off()
        axis.legend(fontsize=7.5, loc="upper right")
    low, high = axes[0][0].get_ylim()
    marks = [m for e in range(1, 7) for m in (10**e, 1.5 * 10**e, 2 * 10**e, 3 * 10**e, 5 * 10**e, 7 * 10**e) if low <= m <= high]
    axes[0][0].set_yticks(marks, [f"{m:g}" if m < 10_000 else f"{m:,.0f}" for m in marks])
    axes[0][0].set_ylabel("kid_efflite0 to real images")
    more = "; at 8 calls students do more than they were trained for" * any(r["beyond"] for g in students for r in g)
    trained = f"{facts['max_calls']:,} training calls" if facts["max_calls"] else f"{facts['time_budget']:g} s of training"
    figure.suptitle(f"{facts['teacher']}: {trained}; bars: spread over seeds{more}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Drawn from": digest(points(students))})
    plt.close(figure)
    return True


# ------------------------------------------------------------------------------------------------------- all of it
def credit(facts: dict) -> str:
    """The notice that goes with pictures of a teacher's set: the world's own, or as the cards of its students have it."""
    from zoo.hub.card import BUILT_IN
    return facts["credit"] if "credit" in facts else BUILT_IN[facts["teacher"]][2]


def known(here: Path) -> list[tuple[str, list[dict], dict]]:
    """(folder, entries, facts) of every board of a folder."""
    return [(path.parent.name, [json.loads(p.read_text()) for p in sorted((path.parent / "rows").glob("*.json"))], json.loads(path.read_text()))
            for path in sorted(here.glob("*/board.json"))]


def tables(here: Path) -> dict[tuple[str, str], str]:
    """What stands between the markers: (page from the clone's root, name of the markers) -> text."""
    boards = known(here)
    full = "\n\n".join(f"{markdown(rows, facts)}\n\n![quality against calls]({name}/plot.png)\n\n![samples]({name}/samples.png)\n\n{credit(facts)}"
                       for name, rows, facts in boards)
    brief = "\n\n".join([*(short(rows, facts) for _, rows, facts in boards), so_far(boards)])
    page = "benchmarks/leaderboard/README.md"
    first = next((rows for _, rows, facts in boards if facts["teacher"] == "emoji"), boards[0][1])
    return {(page, "leaderboard"): full, (page, "papers"): papers(first, here), ("README.md", "leaderboard"): brief}


def draw(folder: Path, entries: list[dict], facts: dict, work: Path):
    """CSV, picture and plot of one board."""
    table(entries, folder / "leaderboard.csv")
    if not any(r for e in entries for r in e["rows"] if "error" not in r):
        return
    picture(entries, work, folder / "samples.png")
    if not plot(entries, facts, folder / "plot.png"):
        print('no plot: pip install -e ".[bench]" brings matplotlib')


def publish(board, work: Path, here: Path, root: Path):
    """Everything that is made from a board's entries. Tables go into the README files when the board is one of this folder's, else
    into table.md beside its rows."""
    entries = board.entries()
    draw(board.folder, entries, board.facts, work)
    if board.folder.resolve().parent == here:
        for (page, name), text in tables(here).items():
            between(root / page, name, text)
    elif any(r for e in entries for r in e["rows"] if "error" not in r):
        (board.folder / "table.md").write_text(markdown(entries, board.facts) + "\n", encoding="utf-8")


def main():
    for name, entries, facts in known(HERE):
        draw(HERE / name, entries, facts, ROOT / "outputs/leaderboard" / name)
    for (page, name), text in tables(HERE).items():
        between(ROOT / page, name, text)
    import curves
    curves.main(curves.Config())


if __name__ == "__main__":
    main()
