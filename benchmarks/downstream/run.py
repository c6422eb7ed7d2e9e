"""Downstream fitness, measured: image to image, a style LoRA, a ControlNet and an IP-Adapter on the shipped emoji student against its teacher.

    python benchmarks/downstream/make_adapters.py        # once: the adapters, trained on the teacher
    python benchmarks/downstream/run.py                  # minutes on one core

The prompts, the controls and the pictures that stand in for words are of the held-out split: nobody was trained on them. Writes
results.json here (the log), docs/downstream.png, and the record and card of the student; `python -m zoo.hub.model_cards` then renews
model_cards/."""
from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw

import parts
from zoo import data
from zoo.hub import downstream

HERE = Path(__file__).resolve().parent
PICTURE = parts.ROOT / "docs/downstream.png"
GUIDANCE = 2.0                # the teacher's own


@dataclass
class Config:
    student: Path = parts.STUDENT
    prompts: int = 8
    seeds: int = downstream.SEEDS
    threads: int = 1
    record: bool = True        # write the rows into the student's record and card


def held_out(n: int) -> tuple[list[str], np.ndarray]:
    """n captions and pictures [n, 64, 64, 3] in [0, 1] that no teacher saw."""
    table = data.emoji("heldout")
    rows = np.random.default_rng(5).permutation(len(table))[:n].tolist()
    return [table[i]["caption"] for i in rows], np.stack([np.asarray(table[i]["image"].convert("RGB")) for i in rows]).astype(np.float32) / 255


def hardware(threads: int) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{threads} core of {cpu}; " + ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft"))


def made() -> list[dict]:
    """The last line of each adapter's training log."""
    path = parts.MADE / "log.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return list({line["adapter"]: line for line in lines}.values())


def picture(cfg: Config, prompts: list[str], images: np.ndarray, adapters: downstream.Adapters) -> None:
    """One line for each use, one block of columns for each sampler."""
    bench = downstream.Bench(cfg.student, parts.TEACHER, prompts, GUIDANCE, seeds=1)
    steps = sorted(bench.contract.steps, reverse=True)
    who = [("teacher, 25 steps", bench.teacher, downstream.MANY), (f"teacher, {steps[0]} steps", bench.teacher, steps[0]),
           *((f"student, {k} step{'s' * (k > 1)}", bench.student, k) for k in steps)]
    plain = bench.draw(bench.teacher, downstream.MANY)
    lines = [("plain call", None, bench.draw)]
    lines += [("image to image, strength 0.75", plain[:, 0], bench.turned(plain, 0.75))]
    drawn = [(name, shown, [draw(pipe, k) for _, pipe, k in who]) for name, shown, draw in lines]
    with bench.styled(adapters.lora) as at:
        for scale in downstream.SCALES:
            drawn.append((f"LoRA, scale {scale:g}", None, [at(scale)(pipe, k) for _, pipe, k in who]))
    if adapters.controlnet:
        control = np.repeat(downstream.silhouette(images)[..., None], 3, -1).astype(np.float32)
        draw = bench.controlled(adapters.controlnet, images, words=False)
        drawn.append(("ControlNet, no words", control, [draw(pipe, k) for _, pipe, k in who]))
    if adapters.ip_adapter:
        with bench.shown(adapters.ip_adapter, images) as at:
            drawn.append(("IP-Adapter, no words", images, [at(1.0)(pipe, k) for _, pipe, k in who]))
    side, gap, left, top = 64, 14, 150, 34
    block = side * len(prompts) + gap
    sheet = Image.new("RGB", (left + block * (1 + len(who)), top + (side + 6) * len(drawn)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((left, 10), "given", fill="black")
    for j, (name, _, _) in enumerate(who):
        pen.text((left + block * (j + 1), 10), name, fill="black")
    for i, (name, shown, columns) in enumerate(drawn):
        y = top + (side + 6) * i
        pen.text((4, y + side // 2 - 6), name, fill="black")
        for j, pictures in enumerate(([shown] if shown is not None else [None]) + columns):
            for n in range(len(prompts)):
                if pictures is not None:
                    one = pictures[n] if pictures.ndim == 4 else pictures[n, 0]
                    sheet.paste(Image.fromarray((one * 255).round().astype("uint8")), (left + block * j + side * n, y))
    sheet.quantize(256).save(PICTURE, optimize=True)


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    prompts, images = held_out(cfg.prompts)
    there = lambda path, file: path if (path / file).exists() else ""
    adapters = downstream.Adapters(parts.LORA, there(parts.CONTROLNET, "config.json"), there(parts.IP_ADAPTER, downstream.IP_WEIGHTS), parts.off_style)
    began = time.time()
    rows = downstream.measure(cfg.student, parts.TEACHER, prompts, GUIDANCE, adapters, images, seeds=cfg.seeds)
    log = {"student": cfg.student.name, "hardware": hardware(cfg.threads), "seconds": round(time.time() - began, 1), "guidance": GUIDANCE,
           "prompts": prompts, "seeds": cfg.seeds, "adapters": made(), "rows": rows}
    (HERE / "results.json").write_text(json.dumps(log, indent=1) + "\n")
    for row in rows:
        print("  " + "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if v is not None))
    picture(cfg, prompts[:4], images[:4], adapters)
    if cfg.record:
        print(downstream.record(cfg.student, rows, len(prompts), cfg.seeds))


if __name__ == "__main__":
    main(tyro.cli(Config))
