"""Put a run's student into the package: weights in half precision, everything else as it was exported, the card rendered again.

    python benchmarks/students/ship.py outputs/dmd-emoji/student dmd.emoji-4step
    python benchmarks/students/ship.py outputs/dmd-emoji/student dmd.emoji-4step --compare     # ships nothing

Writes zoo/assets/students/<name>/, and into shipped.json here by how much halving the weights changed its pictures: greatest and mean
difference, range [0, 1], of eight pictures on one noise at every step count; --compare writes that alone. The row of the registry
(`zoo/registry.py`, OURS) is written by hand; `python -m zoo.hub.model_cards` makes the page of model_cards/, and
`python benchmarks/quickstart/run.py` measures the student as it lies in the package."""
from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
LOG = Path(__file__).resolve().parent / "shipped.json"
COMPARED = 8
sys.path.insert(0, str(ROOT))


def fingerprint(folder: Path) -> str:
    """Of a student's weights."""
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.rglob("*.safetensors")))).hexdigest()[:12]


def pictures(folder: Path, contract, prompts: list[str]):
    """[N, H, W, C] of one fixed noise at every step count."""
    import numpy as np
    from diffusers import ConsistencyModelPipeline, DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    classes = isinstance(pipe, ConsistencyModelPipeline)
    what = {"batch_size": COMPARED, "class_labels": list(range(COMPARED))} if classes else {"prompt": prompts, "guidance_scale": contract.guidance}
    return {k: np.asarray(pipe(**what, num_inference_steps=k, generator=torch.Generator().manual_seed(0), output_type="np").images) for k in contract.steps}


def compare(source: Path, target: Path, name: str) -> dict:
    """Keep in the log, and return, how far the shipped weights' pictures are from those of the exported ones."""
    from zoo.hub.record import RECORD, read_record
    contract, _ = read_record(target)
    prompts = json.loads((target / RECORD).read_text())["card"].get("prompts", [])[:COMPARED]
    before, after = pictures(source, contract, prompts), pictures(target, contract, prompts)
    apart = {k: abs(before[k] - after[k]) for k in sorted(before)}
    changed = {str(k): {"max": round(float(v.max()), 4), "mean": round(float(v.mean()), 5)} for k, v in apart.items()}
    row = {"weights": fingerprint(target), "exported_weights": fingerprint(source), "pictures": len(after[contract.steps[0]]), "changed": changed}
    log = json.loads(LOG.read_text()) if LOG.exists() else {}
    LOG.write_text(json.dumps(dict(sorted((log | {name: row}).items())), indent=1) + "\n")
    return row


def draw(folder: Path, teacher: str):
    """The card's grid again: teacher at many steps, teacher and student at few, on the noise of the run's own grid."""
    from diffusers import DiffusionPipeline

    from zoo import backbones, rollout, watch
    from zoo.denoiser import Denoiser
    from zoo.grid import grid
    from zoo.hub.record import read_record
    contract, _ = read_record(folder)
    model = backbones.load(teacher)
    examples = model.examples(watch.PROMPTS, watch.SEEDS)
    shown = list(range(0, len(examples.names) // 2, watch.SEEDS))[:8]
    part = lambda d: {k: v[shown] for k, v in d.items()}
    g = torch.Generator().manual_seed(2026)
    noise = [torch.randn(len(examples.names), *model.shape, generator=g)[shown] for _ in range(1 + max(contract.steps))]
    student = Denoiser(DiffusionPipeline.from_pretrained(str(folder)).unet.float().eval(), model.process, model.pred, model.forward)

    @torch.no_grad()
    def row(who, k):
        times, fresh = model.process.t_max * (1 - torch.arange(k, dtype=torch.float64) / k), iter(noise[1:])
        if who == "teacher":
            x = rollout.sample(model.teacher, noise[0], part(examples.cond), times, "ode", uncond=part(examples.uncond), guidance=model.guidance)
        else:
            x = rollout.sample(student, noise[0], part(examples.cond), times, contract.sampler, lambda: next(fresh))
        return f"{who} {k} step{'s' * (k > 1)}", model.decode(x)
    few = sorted({8, *contract.steps}, reverse=True)
    rows = [row("teacher", watch.TEACHER_STEPS), *(row("teacher", k) for k in few), *(row("student", k) for k in contract.steps)]
    grid(rows, folder / "grid.png", [examples.names[i] for i in shown])


def main(source: Path, name: str):
    from zoo.hub.card import refresh
    from zoo.hub.record import RECORD, read_record
    _, record = read_record(source)
    target = ROOT / "zoo" / "assets" / "students" / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    if (source.parent / "measured.json").exists() and "card" not in json.loads((source / RECORD).read_text()):
        shutil.copy(source.parent / "measured.json", target)      # of a run that did not yet keep it in the student's own record
    notice = ROOT / "zoo" / "assets" / str(record["teacher"]) / "NOTICE"
    if notice.is_file():                              # of the teacher's data: exports of older runs lack it
        shutil.copy(notice, target)
    for path in target.rglob("*.safetensors"):
        halved = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
        save_file(halved, path, metadata={"format": "pt"})
    draw(target, json.loads((target / RECORD).read_text())["student"]["teacher"])
    refresh(target)
    print(json.dumps(compare(source, target, name)))
    print(f"{target}: {sum(p.stat().st_size for p in target.rglob('*') if p.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    words = [w for w in sys.argv[1:] if w != "--compare"]
    if len(words) != 2:
        raise SystemExit(__doc__)
    if "--compare" in sys.argv:
        print(json.dumps(compare(Path(words[0]), ROOT / "zoo" / "assets" / "students" / words[1], words[1])))
    else:
        main(Path(words[0]), words[1])
