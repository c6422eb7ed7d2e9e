"""Self Forcing: Bridging the Train-Test Gap in Autoregressive Video Diffusion
Xun Huang, Zhengqi Li, Guande He, Mingyuan Zhou, Eli Shechtman
NeurIPS 2025 -- https://arxiv.org/abs/2506.08009

    G: causal few-step student with a key-value cache    real: frozen bidirectional teacher    fake: critic, a score of G's own videos
    first, a few steps: G(x_t, t) <- min |G(x_t, t) - x_0|^2 on the teacher's ODE paths, each chunk at its own t, block-causal mask
    repeat
        rollout   s ~ U{1 .. T};  cache <- empty;  for every chunk: T - s + 1 student steps, x_t re-noised from each prediction, all
                  reading the cache, only the last one with a gradient; then one pass over sg[x] at t = 0 writes it to the cache
        k times   x = rollout;  fake  <-  min  |v_fake(x_t, t) - (eps - x)|^2
        once      x = rollout;  G     <-  min  < x, sg[fake(x_t, t) - real_w(x_t, t)] > / |x - real_w|_1          (Alg. 1, DMD form)
    where a video is one sample: one t for all its frames, one scale |.|_1, one s.

Departures from the paper: only the distribution-matching form (its SiD and GAN forms are not here); teacher and critic start from one
network (the paper's teacher is the 14B model and its critic the 1.3B one; --teacher names both here); the ODE initialisation, there a
stored set of 16K paths, is drawn anew at every step and shares the student's optimiser; videos are as long as the teacher's clips,
so no gradient is masked; the first frame is a frame like any other, not an image latent. The default is the quick start: toy clips,
chunks of two frames, two critic updates, no first moment in Adam, larger rates; the recipe is the paper's.

    accelerate launch train_scripts/train_self_forcing.py                              # closed-form clips, minutes on a CPU
    accelerate launch train_scripts/train_self_forcing.py --teacher Wan-AI/Wan2.1-T2V-1.3B-Diffusers --data prompts.txt --recipe wan
    python train_scripts/train_self_forcing.py --teacher toy-video --steps 60          # seconds
    python train_scripts/train_self_forcing.py --teacher outputs/video-teacher         # a teacher of make_video_teacher.py
"""
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from zoo import UserError, backbones, losses, rollout_causal, times
from zoo.health import critic_fit
from zoo.process import per_sample
from zoo.rollout import expand
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "self_forcing"
    recipes: ClassVar[dict] = {
        "wan": dict(source="Huang et al. 2025, official DMD config: batch 64, 600 iterations (read as student updates), guidance 3 written "
                           "D_c + s (D_c - D_u), so w = 4; 3000 initialisation steps as CausVid's",
                    batch=64, lr=2e-6, critic_lr=4e-7, critic_updates=5, betas=(0.0, 0.999), weight_decay=0.01, ema=0.99, guidance=4.0,
                    chunk=3, shift=5.0, ode_steps=3000, steps=3600, time_budget=0.0),
    }
    teacher: str = "toy-video"             # toy-video, a folder of make_video_teacher.py, or a Wan 2.1 text-to-video model
    steps: int = 1000                      # those of the initialisation included
    time_budget: float = 150.0
    lr: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.99)
    critic_lr: float = 4e-4
    critic_updates: int = 2                # per student update (the paper's is 5)
    chunk: int = 2                         # frames generated at once (the paper: 3, or 1)
    sink: int = 0                          # first frames that stay in the cache for good
    window: int = 0                        # frames in sight, the chunk's own included; 0: all
    slots: bool = False                    # rotary positions count within what is in sight (see rollout_causal.Layout)
    student_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)    # before the shift
    shift: float = 1.0                     # moves student and score times towards noise
    t_min: float = 0.02                    # range of the score's times, after the shift
    t_max: float = 0.98
    ode_steps: int = 150                   # optimiser steps of the initialisation
    ode_substeps: int = 4                  # Euler steps of the teacher between two student times


def ode_path(real, noise, cond, uncond, w, knots, substeps):
    """The teacher's ODE by Euler steps: its states at the knots, and its end as the last."""
    states, x = [], noise
    with torch.no_grad():
        for t, r in zip(knots, [*knots[1:], 0 * knots[0]]):
            states.append(x)
            for i in range(substeps):
                now = expand(t + (r - t) * i / substeps, x)
                x = x + (r - t) / substeps * losses.guided(real, x, now, cond, uncond, w, to="velocity")
    return [*states, x]


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    if model.family == "wan":
        model = model.causal()
    if model.family != "video":
        raise UserError(f"--teacher {model.name} makes no video: give toy-video, a folder of make_video_teacher.py or a Wan 2.1 model")
    run = Run(cfg, model)
    real, process = model.teacher, model.process
    layout = rollout_causal.Layout(cfg.chunk, cfg.sink, cfg.window, cfg.slots)
    options = dict(lora=cfg.lora, gradient_checkpointing=cfg.gradient_checkpointing)
    G = run.train("student", model.make("student", layout=layout, init=cfg.init_student, **options), cfg.lr)
    fake = run.train("critic", model.make("critic", **options), cfg.critic_lr)
    data = model.batches()
    knots = times.shifted(torch.tensor(cfg.student_times), cfg.shift)
    run.watch(G, knots, "causal", layout=layout)

    def rollout(batch):
        return rollout_causal.clip(G, batch.cond, knots, layout, batch.randn, run.choose(len(knots)))

    def renoised(batch, x):
        t = times.shifted(batch.rand(), cfg.shift).clamp(cfg.t_min, cfg.t_max)
        eps = batch.randn()
        return process.noise(x, eps, t), t, eps

    def ode_loss(batch):
        *states, x0 = ode_path(real, batch.randn(), batch.cond, batch.uncond, model.guidance, knots, cfg.ode_substeps)
        at = (batch.rand(x0.shape[1] // cfg.chunk) * len(knots)).long().repeat_interleave(cfg.chunk, 1)      # [B, F], equal within chunks
        x_t = sum(state * per_sample(at == k, state) for k, state in enumerate(states))
        return {"loss": F.mse_loss(G(x_t, knots.to(at.device)[at], batch.cond), x0)}

    def critic_loss(batch):
        with torch.no_grad():
            x = rollout(batch)
        x_t, t, eps = renoised(batch, x)
        loss = F.mse_loss(fake(x_t, t, batch.cond, to="velocity"), process.velocity(x, eps, t))
        return {"loss": loss, "denoising": loss}

    def student_loss(batch):
        x = rollout(batch)
        x_t, t, _ = renoised(batch, x)
        direction, x_real, x_fake = losses.dmd_direction(x, x_t, t, batch.cond, batch.uncond, real, fake, model.guidance)
        return {"loss": losses.along(x, direction), **critic_fit(x, x_real, x_fake)}

    for step in run.loop():
        if step < cfg.ode_steps:
            run.minimize(G, ode_loss, data)
        else:
            for _ in range(cfg.critic_updates):
                run.minimize(fake, critic_loss, data)
            run.minimize(G, student_loss, data)
    return run


if __name__ == "__main__":
    cli(main, Config)
