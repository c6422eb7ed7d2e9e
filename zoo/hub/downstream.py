"""What people do with a student besides the plain call, measured on the exported folder with stock pipelines: image to image, and a LoRA
made for its teacher.

    python -m zoo.hub.downstream outputs/dmd-emoji/student                       # image to image
    python -m zoo.hub.downstream outputs/dmd-emoji/student --lora style.safetensors

The rows are kept in the folder's record and shown on its card."""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..errors import UserError
from .card import refresh
from .record import RECORD, read_record

STRENGTHS = (0.5, 0.75)
SCALES = (0.5, 1.0)
MANY = 25            # teacher steps of the reference
SEEDS = 8


def measure(folder: str | Path, teacher: str | Path, prompts: list[str], guidance: float, lora: str | Path = "", device: str = "cpu") -> list[dict]:
    """Rows of uses at each step count of the student: `distance` to the teacher's many-step result of the same call on the same noise (mean
    absolute difference of pictures in [0, 1]) beside that of the teacher with as few steps, or why the stock pipeline refuses.

    teacher: its stock folder or Hub id; lora: a LoRA file made for the teacher, at scales 0.5 and 1: `follows` is the cosine between what it
    changes in the student's pictures and in the teacher's. Raises UserError for a student that is no Stable Diffusion pipeline."""
    from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionImg2ImgPipeline

    folder = Path(folder)
    contract, record = read_record(folder)
    if record["family"] != "sd":
        raise UserError(f"{folder} is a student of the {record['family']} family: these uses are measured on Stable Diffusion pipelines")
    quiet = lambda pipe: (pipe.set_progress_bar_config(disable=True), pipe.to(device))[1]
    student = quiet(DiffusionPipeline.from_pretrained(folder, use_safetensors=True))
    master = quiet(DiffusionPipeline.from_pretrained(teacher, use_safetensors=True))
    master.scheduler = DDIMScheduler.from_config(master.scheduler.config, timestep_spacing="trailing")
    own = {"guidance_scale": contract.guidance} if contract.guidance_range else {}

    rows = []
    start = _draw(master, prompts, num_inference_steps=MANY, guidance_scale=guidance)
    few, many = (StableDiffusionImg2ImgPipeline(**{k: v for k, v in p.components.items()}, requires_safety_checker=False) for p in (student, master))
    for pipe in (few, many):
        pipe.set_progress_bar_config(disable=True)
    turned = prompts[1:] + prompts[:1]           # every picture is asked to become the next prompt's
    for strength in STRENGTHS:
        goal = _draw(many, turned, start, strength=strength, num_inference_steps=MANY, guidance_scale=guidance)
        for k in contract.steps:
            row = {"use": f"image to image, strength {strength:g}", "steps": k}
            try:
                got = _draw(few, turned, start, strength=strength, num_inference_steps=k, **own)
            except (ValueError, RuntimeError):      # so few steps leave none of this strength
                rows.append(row | {"stock call": "refused"})
                continue
            as_few = _draw(many, turned, start, strength=strength, num_inference_steps=max(k, round(1 / strength)), guidance_scale=guidance)
            rows.append(row | {"stock call": "runs", "distance": _distance(got, goal), "teacher, as few steps": _distance(as_few, goal)})
    if lora:
        rows += _lora(student, master, prompts, contract, guidance, own, Path(lora))
    return rows


def _draw(pipe, prompts, images=None, **call):
    """Pictures [P, S, H, W, 3] in [0, 1], the same noise at every call."""
    import numpy as np
    import torch
    out = []
    for i, prompt in enumerate(prompts):
        generators = [torch.Generator().manual_seed(1000 * i + s) for s in range(SEEDS)]
        given = {} if images is None else {"image": torch.from_numpy(images[i]).permute(0, 3, 1, 2)}
        out.append(pipe([prompt] * SEEDS, generator=generators, output_type="np", **given, **call).images)
    return np.stack(out)


def _distance(a, b) -> float:
    return float(abs(a - b).mean())


def _lora(student, master, prompts, contract, guidance, own, path: Path) -> list[dict]:
    if not path.is_file():
        raise UserError(f"--lora {path} is not a file: give a safetensors file made for the teacher")
    most = max(contract.knots)
    calls = {"student": (student, {"num_inference_steps": most, **own}), "teacher": (master, {"num_inference_steps": MANY, "guidance_scale": guidance})}
    before = {name: _draw(pipe, prompts, **call) for name, (pipe, call) in calls.items()}
    for pipe, _ in calls.values():
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="style")
    rows = []
    for scale in SCALES:
        moved = {}
        for name, (pipe, call) in calls.items():
            pipe.set_adapters(["style"], [scale])
            moved[name] = (_draw(pipe, prompts, **call) - before[name]).ravel()
        length = {name: float((v**2).sum()) ** 0.5 for name, v in moved.items()}
        rows.append({"use": f"LoRA {path.stem}, scale {scale:g}", "steps": most, "stock call": "runs",
                     "follows": float(moved["student"] @ moved["teacher"]) / max(length["student"] * length["teacher"], 1e-12),
                     "size beside the teacher's": length["student"] / max(length["teacher"], 1e-12)})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m zoo.hub.downstream", description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--teacher", default="", help="its folder or Hub id (default: what the record names)")
    parser.add_argument("--guidance", type=float, default=0.0, help="teacher guidance scale (default: the teacher's own)")
    parser.add_argument("--prompts", nargs="*", default=[])
    parser.add_argument("--lora", default="", help="LoRA file made for the teacher")
    args = parser.parse_args(argv)
    from ..backbones import ASSETS, BUILT_IN
    record = read_record(args.folder)[1]
    known = BUILT_IN.get(args.teacher or record["teacher"], {})
    teacher = str(ASSETS / known["folder"]) if known else args.teacher or record["teacher"]
    refresh(args.folder)                       # a record without facts gets them before a row is added
    data = json.loads((Path(args.folder) / RECORD).read_text(encoding="utf-8"))
    prompts = args.prompts or (data["card"].get("prompts") or ["fluent red heart"])[:4]
    rows = measure(args.folder, teacher, prompts, args.guidance or known.get("guidance", 7.5), args.lora)
    data["card"]["downstream"] = rows
    (Path(args.folder) / RECORD).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(refresh(args.folder))
    for row in rows:
        print("  " + "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
