"""rCM: Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency
Kaiwen Zheng, Yuji Wang, Qianli Ma, Huayu Chen, Jintao Zhang, Yogesh Balaji, Jianfei Chen, Ming-Yu Liu, Jun Zhu, Qinsheng Zhang
ICLR 2026 -- https://arxiv.org/abs/2510.08431

    TrigFlow: x_t = cos t x0 + sin t z    F: student, f(x_t, t) = cos t x_t - sin t F its consistency function
    real_w: guided teacher, v_w its velocity    fake: the critic, a score of the student's own samples
    repeat
        k times   G = rollout;   fake  <-  min  |fake(x_t, t) - G|^2 / sin^2 t
        once      g = cos t df/dt along dx/dt = v_w,  at x_t of data                                     forward divergence: sCM
                  d = (real_w(x_t, t) - fake(x_t, t)) / |G - real_w|_1,  at x_t of G = rollout         reverse divergence: DMD
                  F  <-  min  | F - sg[ F + g / (|g| + c) ] |^2  +  lambda | G - sg[ G + d ] |^2
    where rollout is f after 1 to 4 steps from noise at random falling times, re-noised in between, the last step alone graded.

Departures from the paper: the teacher's network is any, read as TrigFlow by equal signal-to-noise ratio; the derivative of F is by default
the discrete form of the official code, one step of 1e-4 back along the circle, or of 1e-2 for teachers that are stiff in time
(calculus.time_step; --derivative jvp is exact, for networks that have forward mode), in float32 whatever the precision of training; no
tangent warm-up; lambda is larger in the quick start, where samples have a thousandth of a video's elements: |g| does not grow with their
number N and |d| grows like its square root; constant decay of the average; the critic's times keep 0.02 from both ends of the flow.

    accelerate launch train_scripts/train_rcm.py                                       # the embedded teacher, minutes on a CPU
    accelerate launch train_scripts/train_rcm.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --lora 64 --data user/images
    python train_scripts/train_rcm.py --teacher toy --derivative jvp --steps 400       # seconds
"""
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from zoo import backbones, calculus, critics, losses, rollout, times
from zoo.health import critic_fit
from zoo.process import RectifiedFlow, TrigFlow, view
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "rcm"
    recipes: ClassVar[dict] = {
        "wan-1.3b": dict(source="Zheng et al. 2025; official Wan2.1 1.3B configuration (lr 2e-6, critic 4e-7, lambda 0.01, P = (0.7, 1.6), shift 5, w = 5)",
                         lr=2e-6, critic_lr=4e-7, betas=(0.0, 0.999), weight_decay=0.01, mean=0.7, std=1.6, shift=5.0, critic_updates=4, dmd=0.01,
                         dmd_after=1000, guidance=5.0, time_budget=0.0, steps=100_000),
    }
    steps: int = 1000
    time_budget: float = 150.0
    lr: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.99)
    critic_lr: float = 4e-4
    critic_updates: int = 2                # per student update (the paper's is 4)
    dmd: float = 0.3                       # lambda
    dmd_after: int = 0                     # steps of sCM alone before the critic and its term begin
    rollout_steps: int = 4                 # longest rollout
    mean: float = 0.0                      # log(tan t) of the consistency term is normal
    std: float = 1.6
    shift: float = 3.0                     # times of the score term and of rollouts: uniform flow times, shifted towards noise
    tangent_c: float = 0.1                 # c of the tangent normalisation
    derivative: Literal["fd", "jvp"] = "fd"
    h: float = 0.0                         # step of the difference in t, and distance kept from both ends; 0: 1e-4, or 1e-2 for a stiff teacher
    student_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)


def step_back(velocity, x_t, t, dx, h, value=None):
    """(F, dF/dt along dx) from one step back on the circle: exact for a fixed pair (x0, eps), else O(h). value: F where it is known."""
    v = velocity(x_t, t) if value is None else value.detach()
    x_b = torch.cos(h) * x_t - torch.sin(h) * dx
    return v, (torch.cos(h) * v - velocity(x_b, t - h)) / torch.sin(h)


def tangent(velocity, x_t, t, dx, how, h, value=None):
    """g = cos t df/dt along dx [B, ...], detached; value: velocity(x_t, t) where it is known."""
    with torch.no_grad():
        if how == "jvp":
            v, dv = calculus.total_derivative(velocity, (x_t, t), (dx, torch.ones_like(t)), how)
        else:
            v, dv = step_back(velocity, x_t, t, dx, torch.tensor(h, dtype=t.dtype, device=t.device), value)
        return losses.trigflow_tangent(v, dv, x_t, t, dx)


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    flow = TrigFlow()
    real = view(model.teacher, flow)
    make = lambda role: view(model.make(role, lora=cfg.lora, init=cfg.init_student if role == "student" else "",
                                        gradient_checkpointing=cfg.gradient_checkpointing), flow)
    F = run.train("student", make("student"), cfg.lr)
    fake = run.train("critic", make("critic"), cfg.critic_lr)
    knots = torch.tensor(cfg.student_times) * model.process.t_max
    run.watch(F, knots)
    noisiest = flow.time(model.process.angle(knots[0])).item()
    h = calculus.time_step(run, flow, cfg.h, coarse=1e-2, fine=1e-4)
    data = model.batches(images=True)

    def score_time(batch):
        return RectifiedFlow().angle(times.shifted(times.uniform(batch.rand(), 0.02, 0.98), cfg.shift)).clamp(max=noisiest)

    def rollout_input(batch):
        depth = run.choose(cfg.rollout_steps)
        draws = [torch.full_like(batch.rand(), noisiest), *(score_time(batch) for _ in range(depth))]
        falling = torch.stack(draws).cummin(0).values                              # [depth + 1, B]
        return rollout.backward_simulation(F, batch.randn(), batch.cond, falling, depth, batch.randn)

    def critic_loss(batch):
        with torch.no_grad():
            x = F(*rollout_input(batch), batch.cond)
        loss = critics.denoising(fake, x, batch.randn(), score_time(batch), batch.cond)
        return {"loss": loss, "denoising": loss}

    def student_loss(batch):
        t = torch.atan(torch.exp(cfg.mean + cfg.std * batch.randn(1)[:, 0])).clamp(h, noisiest - h)
        x_t = flow.noise(batch.x0, batch.randn(), t)
        velocity = lambda x, t: F(x, t, batch.cond, to="velocity")
        mixed = torch.is_autocast_enabled(x_t.device.type)                   # then the trained call is too coarse for the tangent
        with nullcontext() if mixed else calculus.full_precision(x_t.device.type):
            v = velocity(x_t, t)
        with torch.no_grad(), calculus.full_precision(x_t.device.type):      # differences of nearby values
            dx = losses.guided(real, x_t, t, batch.cond, batch.uncond, model.guidance, to="velocity")
            g = tangent(velocity, x_t, t, dx, cfg.derivative, h, None if mixed else v)
        loss = consistency = losses.along(v, losses.bounded(g, cfg.tangent_c))
        logged = {"consistency": consistency, "tangent": g.flatten(1).norm(dim=1).mean()}
        if run.step >= cfg.dmd_after:
            x = F(*rollout_input(batch), batch.cond)
            s = score_time(batch)
            x_s = flow.noise(x.detach(), batch.randn(), s)
            direction, x_real, x_fake = losses.dmd_direction(x, x_s, s, batch.cond, batch.uncond, real, fake, model.guidance)
            loss = loss + cfg.dmd * losses.along(x, direction)
            logged |= critic_fit(x, x_real, x_fake)
        return {"loss": loss, **logged}

    for step in run.loop():
        if step >= cfg.dmd_after:
            for _ in range(cfg.critic_updates):
                run.minimize(fake, critic_loss, data)
        run.minimize(F, student_loss, data)
    return run


if __name__ == "__main__":
    cli(main, Config)
