"""Evaluate the saved emoji teacher on 40 fixed prompts with the stock pipeline.

    python benchmarks/teacher/evaluate.py                   # figures of results.json and grid.png
    python benchmarks/teacher/evaluate.py --scan            # also guidance 1, 1.5, 3, 5, 7.5
    python benchmarks/teacher/evaluate.py --group smileys   # 40 prompts of one group, results_smileys.json
    python benchmarks/teacher/evaluate.py --draw            # writes prompts.txt (once, before any training)

retrieval@k: share of samples whose prompted image is among the k data images nearest in centred cosine of
EfficientNet-Lite0 features at 96 pixels. style: share whose nearest data image has the prompted style.
nearest_train_cosine: mean cosine of a sample to its nearest training image, beside the same figure of the
held-out data images (a memorising teacher's is higher). reconstruction: the autoencoder alone.
"""
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from diffusers import DiffusionPipeline

from zoo.metrics.efflite0 import features

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "train_scripts"))
from emoji_parts import load_images, to_unit  # noqa: E402


@dataclass
class Config:
    teacher: Path = Path("zoo/assets/emoji/teacher")
    data: Path = Path("zoo/assets/emoji/emoji.parquet")
    steps: int = 50
    guidance: float = 2.0
    seed: int = 0
    scan: bool = False
    draw: bool = False
    group: str = ""
    """Use 40 prompts drawn from this group alone."""
    train_prompts: int = 34
    heldout_prompts: int = 6


def draw(columns: dict[str, list], cfg: Config) -> list[str]:
    """A stratified draw: training prompts in turn over groups and styles, held-out ones over styles."""
    rng = random.Random(cfg.seed)
    cells: dict[tuple, list[str]] = {}
    for caption, style, group, split in zip(*(columns[k] for k in ("caption", "style", "group", "split"))):
        cells.setdefault((split, style, group if split == "train" else ""), []).append(caption)
    prompts = []
    for split, count in (("train", cfg.train_prompts), ("heldout", cfg.heldout_prompts)):
        keys = sorted(k for k in cells if k[0] == split)
        rng.shuffle(keys)
        prompts += [rng.choice(cells[keys[i % len(keys)]]) for i in range(count)]
    return prompts


def sample(pipe, prompts: list[str], cfg: Config, guidance: float) -> torch.Tensor:
    out = pipe(prompts, num_inference_steps=cfg.steps, guidance_scale=guidance, output_type="pt",
               generator=[torch.Generator().manual_seed(cfg.seed + i) for i in range(len(prompts))])
    return out.images * 2 - 1


def score(images: torch.Tensor, prompts: list[str], data: torch.Tensor, columns: dict[str, list]) -> dict:
    """`data`: features [N, 1280] of the whole set, in the order of `columns`."""
    centre = data.mean(dim=0)
    unit = lambda x: F.normalize(x - centre, dim=1)
    order = (unit(features(images)) @ unit(data).T).sort(dim=1, descending=True)
    row = {caption: i for i, caption in enumerate(columns["caption"])}
    result = {}
    for split in ("train", "heldout"):
        mine = [i for i, p in enumerate(prompts) if columns["split"][row[p]] == split]
        rank = [order.indices[i].tolist().index(row[prompts[i]]) for i in mine]
        style = [columns["style"][order.indices[i, 0]] == prompts[i].split()[0] for i in mine]
        result[split] = {"n": len(mine), "retrieval@1": sum(r < 1 for r in rank) / len(mine),
                         "retrieval@5": sum(r < 5 for r in rank) / len(mine), "style": sum(style) / len(mine)}
    in_train = torch.tensor([s == "train" for s in columns["split"]])
    near = lambda x: (unit(x) @ unit(data[in_train]).T).amax(dim=1).mean().item()
    result["nearest_train_cosine"] = {"samples": near(features(images)),
                                      "heldout data": near(data[~in_train])}
    n = len(prompts)
    result["all"] = {k: sum(result[s][k] * result[s]["n"] for s in ("train", "heldout")) / n
                     for k in ("retrieval@1", "retrieval@5", "style")}
    return result


def grid(images, real, prompts, heldout, path: Path) -> None:
    """Pairs of data image (left) and sample (right); held-out prompts in red."""
    figure, axes = plt.subplots(8, 5, figsize=(13, 13))
    for i, axis in enumerate(axes.flat):
        pair = torch.cat([real[i], images[i]], dim=2).clamp(-1, 1) / 2 + 0.5
        axis.imshow(pair.permute(1, 2, 0).numpy())
        title = prompts[i] if len(prompts[i]) < 34 else prompts[i][:32] + "..."
        axis.set_title(title + " (held out)" * heldout[i], fontsize=7, color="red" if heldout[i] else "black")
        axis.axis("off")
    figure.suptitle("left: data, right: teacher. Noto Emoji (Google, Apache-2.0), Twemoji (Twitter and "
                    "contributors, CC-BY-4.0), Fluent Emoji (Microsoft, MIT); resized", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main(cfg: Config) -> None:
    raw, columns = load_images(cfg.data)
    if cfg.draw:
        (HERE / "prompts.txt").write_text("\n".join(draw(columns, cfg)) + "\n")
        return
    prompts, suffix = (HERE / "prompts.txt").read_text().splitlines(), ""
    if cfg.group:
        wanted = [c for c, g in zip(columns["caption"], columns["group"]) if g == cfg.group]
        prompts, suffix = random.Random(cfg.seed).sample(wanted, len(prompts)), f"_{cfg.group}"
    pipe = DiffusionPipeline.from_pretrained(cfg.teacher)
    pipe.set_progress_bar_config(disable=True)
    start = time.time()
    images = sample(pipe, prompts, cfg, cfg.guidance)
    seconds = time.time() - start
    data = features(to_unit(raw))
    results = {"steps": cfg.steps, "guidance": cfg.guidance, "seconds": round(seconds, 1),
               **score(images, prompts, data, columns)}
    row = {caption: i for i, caption in enumerate(columns["caption"])}
    picked = [row[p] for p in prompts]
    with torch.no_grad():
        decoded = pipe.vae(to_unit(raw[picked])).sample
    results["reconstruction"] = score(decoded, prompts, data, columns)["all"]
    if cfg.scan:
        results["guidance_scan"] = {}
        for w in (1.0, 1.5, 3.0, 5.0, 7.5):
            figures = score(sample(pipe, prompts, cfg, w), prompts, data, columns)
            results["guidance_scan"][str(w)] = figures["all"]
    heldout = [columns["split"][i] == "heldout" for i in picked]
    grid(images, to_unit(raw[picked]), prompts, heldout, HERE / f"grid{suffix}.png")
    (HERE / f"results{suffix}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config))
