"""LCM: Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference
Simian Luo, Yiqin Tan, Longbo Huang, Jian Li, Hang Zhao
arXiv 2023 -- https://arxiv.org/abs/2310.04378

    f: student, f(x_t, t) = x0-prediction, f(x, 0) = x    f-: its moving average    real_w: guided teacher
    repeat
        x0 ~ data;  t ~ grid of N times;  r = the time before t on the grid;  x_t = alpha x0 + sigma eps
        x_r = DDIM step of real_w from x_t to r                        one skip of 1000/N teacher steps, eq. 14-15
        f  <-  min  d( f(x_t, t), sg[ f-(x_r, r) ] ),  d = pseudo-Huber
        f- <-  mu f- + (1 - mu) f
    With --guidance_range LO HI the scale w is drawn per sample and given to the student as an embedding (Sec. 4.2).

Departures from the paper: the grid's first time is exactly clean (t = 0), so f(x, 0) = x is imposed there instead of through
c_skip, which in the official code is below 1e-5 at every other grid time; with --lora the average is kept too (the official
LoRA script drops it); guidance scales are counted as D_u + w (D_c - D_u), one more than the paper's w. The default trains
at the one scale of the teacher: a fixed scale needs no embedding and works with every stock pipeline.

    accelerate launch train_scripts/train_lcm.py                                       # the embedded teacher, minutes on a CPU
    accelerate launch train_scripts/train_lcm.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --data user/images --recipe sd15
    python train_scripts/train_lcm.py --teacher toy --steps 400                        # seconds
"""
from dataclasses import dataclass
from typing import ClassVar

import torch

from zoo import backbones, losses, times
from zoo.process import per_sample
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "lcm"
    recipes: ClassVar[dict] = {
        "sd15": dict(source="Luo et al. 2023, Sec. 5.1 (batch 72, 100K iterations, lr 8e-6, w in [2, 14], skip 20)", batch=72, lr=8e-6,
                     steps=100_000, grid=50, target_decay=0.95, guidance_range=(3.0, 15.0), time_budget=0.0),
    }
    steps: int = 2000
    time_budget: float = 150.0
    lr: float = 2e-4
    grid: int = 50                         # N: times of the training grid; the skip is 1000 / N teacher steps
    target_decay: float = 0.95             # mu
    huber_c: float = 1e-3
    guidance_range: tuple[float, float] = (0.0, 0.0)    # draw w from it and embed it; (0, 0): one fixed scale, no embedding
    student_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)    # times the exported student is sampled at


def consistency_target(target, real, x_t, t, r, cond, uncond, w):
    """sg f-(x_r, r), x_r one DDIM step of the guided teacher; the boundary f(x, 0) = x exactly."""
    with torch.no_grad():
        v = losses.guided(real, x_t, t, {k: c for k, c in cond.items() if k != "guidance"}, uncond, w, to="v")
        x_r = real.process.step(*real.process.pair(v, x_t, t, "v"), r)
        return torch.where(per_sample(r, x_r) > 0, target(x_r, r.clamp(min=1e-3), cond), x_r)


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    real, process = model.teacher, model.process
    low, high = cfg.guidance_range
    f = run.train("student", model.make("student", lora=cfg.lora, init=cfg.init_student, guidance_embedding=high > low,
                                        gradient_checkpointing=cfg.gradient_checkpointing), cfg.lr)
    run.watch(f, torch.tensor(cfg.student_times) * process.t_max, guidance=model.guidance, guidance_range=cfg.guidance_range if high > low else None)
    target = run.average(f, cfg.target_decay)
    data = model.batches(images=True)

    def consistency_loss(batch):
        k = batch.randint(cfg.grid) + 1
        t, r = (process.t_max * (k - i) / cfg.grid for i in (0, 1))
        w, cond = model.guidance, batch.cond
        if high > low:
            w = times.uniform(batch.rand(), low, high)
            cond = cond | {"guidance": w}
        x_t = process.noise(batch.x0, batch.randn(), t)
        y = consistency_target(target, real, x_t, t, r, cond, batch.uncond, w)
        return {"loss": losses.pseudo_huber(f(x_t, t, cond), y, cfg.huber_c)}

    for _ in run.loop():
        run.minimize(f, consistency_loss, data)
    return run


if __name__ == "__main__":
    cli(main, Config)
