"""The go/no-go report at the end of a run: quality against the teacher, diversity of each prompt, and whether a LoRA student stacks with the
style LoRA of its teacher; one verdict by a rule that is printed beside it. Written to report.md of the run and to the student's card.

The thresholds are this project's own, chosen to be passed by a student one would show to a colleague and failed by one that lost half of what
it was to keep; they are no published standard, and the numbers stand beside them."""
from __future__ import annotations

import math

import torch

from . import metrics
from .hub.downstream import SCALES, follows

CLOSED = 0.5             # of the way from the teacher with as few steps to the teacher with many
SPREAD, LOST, LOST_SHARE = 0.6, 0.3, 0.25      # of the teacher's spread: mean over prompts; a prompt below LOST has collapsed; how many may
FOLLOWS, SIZES = 0.5, (0.5, 2.0)               # cosine between what the LoRA changes, and how much beside the teacher
STACKED = 16             # samples of the stacking measurement
RULE = (f"Rule: quality, at the most steps the student closes at least {CLOSED:g} of the way between the teacher with as few steps and the teacher with many "
        "(or is within the interval of the latter); diversity, the spread over seeds of a prompt is on average at least "
        f"{SPREAD:g} of the teacher's, and below {LOST:g} for at most {LOST_SHARE:.0%} of the prompts; stacking, with the teacher's style LoRA at scales "
        f"{' and '.join(f'{s:g}' for s in SCALES)} what it changes in the student's pictures has a cosine of at least {FOLLOWS:g} with what it changes in the "
        f"teacher's, and between {SIZES[0]:g} and {SIZES[1]:g} times its size. GO needs all that apply.")


# ------------------------------------------------------------------------------------------------------------- the three questions
def quality(rows: list[dict], distance: str) -> dict:
    """From the rows of the measured table (who, steps, `distance`, low, high): {"ok", "text"} at the student's most steps."""
    student = max((r for r in rows if r["who"] == "student"), key=lambda r: r["steps"])
    teacher = {r["steps"]: r for r in rows if r["who"] == "teacher"}
    k, most = student["steps"], max(teacher)
    few, many, mine = teacher[k][distance], teacher[most], student[distance]
    closed = (few - mine) / (few - many[distance]) if few > many[distance] else -math.inf
    inside = mine <= many.get("high", -math.inf)             # one prompt alone has no interval
    text = f"{k} steps: distance {mine:.4g}, the teacher's {few:.4g} with as few and {many[distance]:.4g} with {most}"
    return {"ok": bool(inside or closed >= CLOSED), "closed": None if math.isinf(closed) else closed, "within": bool(inside),
            "text": text + (f"; {closed:.2f} of the way closed" if math.isfinite(closed) else "; as few steps lose nothing here: only its interval counts")
            + (", within the teacher's interval" if inside else "")}


def diversity(student: torch.Tensor, teacher: torch.Tensor, names: list[str]) -> dict:
    """From features [P, S, D] of both, the spread over the seeds of each prompt beside the teacher's."""
    each = []
    for mine, theirs in zip(student, teacher):
        spread = metrics.diversity(theirs[None])
        each.append(metrics.diversity(mine[None]) / spread if spread else None)
    seen = [(x, name) for x, name in zip(each, names) if x is not None and math.isfinite(x)]
    if not seen:
        return {"ok": False, "mean": None, "per_prompt": {}, "text": "the teacher's own samples of a prompt do not differ: nothing to compare with"}
    mean, lost, lowest = sum(x for x, _ in seen) / len(seen), sum(x < LOST for x, _ in seen), min(seen)
    return {"ok": bool(mean >= SPREAD and lost <= LOST_SHARE * len(seen)), "mean": mean, "per_prompt": {name: x for x, name in seen},
            "text": f"{mean:.2f} of the teacher's spread over {len(seen)} prompts, lowest {lowest[0]:.2f} ({lowest[1]!r}), {lost} below {LOST:g}"}


def compare(student: torch.Tensor, teacher: torch.Tensor) -> tuple[float, float]:
    """(cosine, size of the first beside the second) of two changes of pictures."""
    return follows(student.double(), teacher.double()), float(student.norm() / teacher.norm().clamp(min=1e-12))


@torch.no_grad()
def stacking(watcher) -> dict | None:
    """Pictures of student and teacher on the same noise with the style at 0 and at SCALES of the scale it was trained with; None where there
    is no style, or the student is no adapter on the same weights. The weights are as before afterwards."""
    from .watch import TEACHER_STEPS
    run, model = watcher.run, watcher.run.model
    net = getattr(watcher.net, "net", watcher.net)
    if model.style is None or getattr(net, "module", None) is not model.module or getattr(run, "sharded", False):
        return None
    n, k, seen = min(STACKED, watcher.half), max(watcher.trained), {}
    try:
        for scale in (0.0, *SCALES):
            model.style.set(model, scale * model.style.scale)
            examples = _examples(model, watcher.examples, n)
            seen[scale] = [watcher._pictures(x) for x in (watcher.sample(k, n, examples), watcher.teach(TEACHER_STEPS, n, examples))]
    finally:
        model.style.set(model, model.style.scale)
    rows = [{"scale": s, **dict(zip(("follows", "size"), compare(*(now - before for now, before in zip(seen[s], seen[0.0])))))} for s in SCALES]
    ok = all(r["follows"] >= FOLLOWS and SIZES[0] <= r["size"] <= SIZES[1] for r in rows)
    return {"ok": bool(ok), "rows": rows,
            "text": "; ".join(f"at scale {r['scale']:g} cosine {r['follows']:.2f}, size {r['size']:.2f} of the teacher's" for r in rows)}


def _examples(model, examples, n: int):
    """The first n examples, encoded again where the style changes an encoder."""
    from .backbones import Examples
    part = lambda fields: {k: v[:n] for k, v in fields.items()}
    if set(model.style.parts) <= {model.part}:
        return Examples(examples.names[:n], part(examples.cond), part(examples.uncond))
    with model.texts._awake():                # past the cache, which knows one scale alone
        cond, empty = model.conditions(examples.names[:n]), model.unconditional()
    return Examples(examples.names[:n], cond, {k: v.expand(n, *v.shape[1:]) for k, v in empty.items()})


# ------------------------------------------------------------------------------------------------------------- the verdict
def go_no_go(watcher, measured: list[dict], latents: dict[int, torch.Tensor]) -> dict:
    """The report of a run: {"verdict", "parts": {name: {"ok", "text", ...}}}. measured: the watcher's table; latents: the student's samples
    [P * S, ...] at each step count, on fixed noise."""
    names = watcher.examples.names[:: watcher.seeds]
    features = watcher.features(watcher._pictures(latents[max(latents)]))
    parts = {"quality": quality(measured, watcher.distance_name),
             "diversity": diversity(watcher._by_prompt(features), watcher._by_prompt(watcher.reference_features), names)}
    stacked = stacking(watcher)
    if stacked:
        parts["stacking"] = stacked
    failed = [f"{name} ({part['text']})" for name, part in parts.items() if not part["ok"]]
    return {"verdict": "GO" if not failed else f"NO-GO: {'; '.join(failed)}", "parts": parts, "rule": RULE, "stacked": _why_not(watcher) if not stacked else ""}


def _why_not(watcher) -> str:
    model = watcher.run.model
    if model.style is None:
        return "no --teacher_lora was given"
    return "its networks were cut over ranks" if getattr(watcher.run, "sharded", False) else "a student of full weights holds the style: do not add it again"
