"""A video teacher: a small bidirectional WanTransformer3DModel in pixel space, trained by flow matching on captioned sprites.

    repeat  x_t = (1 - t) x0 + t eps;   min over v of  | v(x_t, t, caption) - (eps - x0) |^2

Clips are drawn on the fly (zoo.data.sprites); one caption in ten is emptied for guidance. The blocks' matrices are updated by Muon,
all else by Adam. The result is a stock WanPipeline folder without autoencoder (`WanPipeline.from_pretrained(folder, vae=None)`),
replaced at every export; its scheduler's config also says which clips it was trained on.

    python train_scripts/make_video_teacher.py --minutes 40                   # 16 frames of 32x32, ten emoji; the same line resumes
    python train_scripts/make_video_teacher.py --toy --minutes 8 --ema 0.99 \\
        --out zoo/assets/toy_video --run runs/toy_video                       # for --teacher toy-video; the shipped one had 2.7 of 8 minutes
"""
from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import emoji_parts as parts
from zoo.backbones.toy_video import TOY, ClipWorld, small_pipeline, toy_clips
from zoo.backbones.video import encode_prompts
from zoo.data.sprites import Sprites
from zoo.process import RectifiedFlow


@dataclass
class Config:
    out: Path = Path("outputs/video-teacher")
    run: Path = Path("runs/video_teacher")
    """Checkpoint and log; an existing checkpoint is resumed."""
    minutes: float = 40.0
    """Training time, over all resumed parts; the learning rate falls to zero over its second half."""
    toy: bool = False
    """The network of the toy-video teacher: regresses the exact velocity of its clips. The flags from frames to guidance then have no say."""
    frames: int = 16
    size: int = 32
    side: int = 12
    patch: int = 8
    heads: int = 4
    head_dim: int = 24
    layers: int = 4
    guidance: float = 2.0
    """Scale that students are distilled at by default."""
    drop: float = 0.1
    """Share of captions replaced by the empty one."""
    batch: int = 32
    lr: float = 2e-3
    """Adam's rate and, in the same root-mean-square scale, Muon's."""
    ema: float = 0.995
    seed: int = 0


def save(cfg: Config, pipe, net, average, optimizers, step: int, seconds: float) -> None:
    """The checkpoint, written beside and renamed, and the averaged network as a pipeline folder in half precision."""
    state = {f"net.{n}": p.detach() for n, p in net.named_parameters()} | {f"ema.{n}": v for n, v in average.items()}
    names = {p: n for n, p in net.named_parameters()}
    state |= {f"{key}.{names[p]}": v for o in optimizers for p, values in o.state.items() for key, v in values.items()}
    save_file(state, cfg.run / "new", {"step": str(step), "seconds": str(seconds)})
    (cfg.run / "new").replace(cfg.run / "state.safetensors")
    copy = type(net).from_config(net.config)
    copy.load_state_dict(average)
    pipe.transformer = copy.half()
    parts.save_atomically(parts.Portable(pipe), cfg.out)


def restore(cfg: Config, net, average, optimizers) -> tuple[int, float]:
    path = cfg.run / "state.safetensors"
    if not path.exists():
        return 0, 0.0
    params = dict(net.named_parameters())
    owner = {p: o for o in optimizers for p in o.param_groups[0]["params"]}
    for full, value in load_file(path).items():
        key, name = full.split(".", 1)
        if key == "net":
            params[name].data.copy_(value)
        elif key == "ema":
            average[name].copy_(value)
        else:
            owner[params[name]].state[params[name]][key] = value
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"]), float(file.metadata()["seconds"])


def main(cfg: Config) -> None:
    flow = RectifiedFlow()
    if cfg.toy:
        sprites, clips, groups = toy_clips()
        world, pipe = ClipWorld(clips, groups), small_pipeline(sprites, **TOY)
    else:
        sprites = Sprites(frames=cfg.frames, size=cfg.size, side=cfg.side, seed=cfg.seed)
        pipe = small_pipeline(sprites, patch=cfg.patch, heads=cfg.heads, head_dim=cfg.head_dim, layers=cfg.layers, guidance=cfg.guidance)
    net = pipe.transformer.train()
    words = encode_prompts(pipe, [*sprites.captions, ""])
    hidden = [p for n, p in net.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    ids = {id(p) for p in hidden}
    optimizers = [parts.Muon(hidden, cfg.lr), torch.optim.Adam([p for p in net.parameters() if id(p) not in ids], cfg.lr, betas=(0.9, 0.99))]
    average = {n: p.detach().clone() for n, p in net.named_parameters()}
    cfg.run.mkdir(parents=True, exist_ok=True)
    step, seconds = restore(cfg, net, average, optimizers)
    stored, clock, losses = seconds, time.time(), []
    while (done := seconds / (60 * cfg.minutes)) < 1:
        g = torch.Generator().manual_seed(cfg.seed * 2**31 + step)      # every draw is a function of (seed, step)
        index = torch.randint(len(clips) if cfg.toy else len(sprites), (cfg.batch,), generator=g)
        x0, label = (clips[index], groups[index]) if cfg.toy else (sprites[index][0], index % len(sprites.captions))
        label = label.masked_fill(torch.rand(cfg.batch, generator=g) < cfg.drop, len(sprites.captions))
        t, eps = torch.sigmoid(1.2 * torch.randn(cfg.batch, generator=g)).clamp(min=1e-3), torch.randn(x0.shape, generator=g)
        x_t = flow.noise(x0, eps, t)
        target = world(x_t, t, {"label": label}, to="velocity") if cfg.toy else flow.velocity(x0, eps, t)
        v = net(x_t.transpose(1, 2), flow.timestep(t), words[label], return_dict=False)[0].transpose(1, 2)
        loss = (v - target).square().mean()
        net.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for o in optimizers:
            o.param_groups[0]["lr"] = cfg.lr * min(1.0, (step + 1) / 100) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, 2 - 2 * done)))
            o.step()
        step += 1
        torch._foreach_lerp_(list(average.values()), [p.data for p in net.parameters()], 1 - min(cfg.ema, step / (step + 10)))
        seconds, clock = seconds + time.time() - clock, time.time()
        losses.append(loss.item())
        if step % 100 == 0:
            row = json.dumps({"step": step, "minutes": round(seconds / 60, 2), "loss": round(sum(losses) / len(losses), 5)})
            losses.clear()
            print(row, flush=True)
            with open(cfg.run / "log.jsonl", "a") as file:
                file.write(row + "\n")
        if seconds - stored > 40:
            save(cfg, pipe, net, average, optimizers, step, seconds)
            stored = seconds
    save(cfg, pipe, net, average, optimizers, step, seconds)
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {step} steps, saved to {cfg.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
