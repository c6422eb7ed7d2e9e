"""MeanFlow: Mean Flows for One-step Generative Modeling
Zhengyang Geng, Mingyang Deng, Xingjian Bai, J. Zico Kolter, Kaiming He
NeurIPS 2025 -- https://arxiv.org/abs/2505.13447

    u(x_t, t, r): average velocity of the flow over [r, t], a network with two times    v: velocity of the guided teacher
    repeat
        x0 ~ data;  (t, r) ordered draws, r = t for a fraction of them;  x_t = (1 - t) x0 + t eps
        u  <-  min  w | u(x_t, t, r) - sg[ v - (t - r) du/dt ] |^2,   du/dt = total derivative along (v, 1, 0)     eq. 6-11
    where w = 1 / sg(|.|^2 + c)^p, and one step is x_r = x_t - (t - r) u(x_t, t, r).

Departures from the paper: distilled, v is the (marginal, guided) velocity of a frozen teacher and not eps - x0, which removes
the target's variance and the classifier-free mixing of Sec. 4.2; the student is the teacher's network read as a rectified
flow, with a second time added at zero; a quarter of the pairs have r = t (the paper trains from scratch with 75 %); the
derivative is a central difference by default (--derivative jvp is exact, for networks that have forward mode), its step chosen by how
stiff in time the teacher is (calculus.time_step); t stays h away from the ends.

    accelerate launch train_scripts/train_meanflow.py                                  # the embedded teacher, minutes on a CPU
    accelerate launch train_scripts/train_meanflow.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --data user/images
    python train_scripts/train_meanflow.py --teacher toy --derivative jvp --steps 400  # seconds
"""
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from zoo import backbones, calculus, losses, times
from zoo.process import RectifiedFlow, per_sample, view
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "meanflow"
    two_times: ClassVar[bool] = True
    recipes: ClassVar[dict] = {
        "imagenet-b4": dict(source="Geng et al. 2025, Tab. 1 and App. A (batch 256, lr 1e-4, logit-normal(-0.4, 1), p = 1, 75 % r = t)",
                            batch=256, lr=1e-4, betas=(0.9, 0.95), equal=0.75, mean=-0.4, std=1.0, power=1.0, constant=1e-3, ema=0.9999, time_budget=0.0,
                            steps=400_000),
    }
    steps: int = 2000
    time_budget: float = 150.0
    lr: float = 2e-4
    mean: float = -0.4                     # logit-normal of both times
    std: float = 1.0
    equal: float = 0.25                    # fraction of pairs with r = t
    power: float = 1.0                     # p of the adaptive weight
    constant: float = 1e-3                 # c of the adaptive weight
    derivative: Literal["fd", "jvp"] = "fd"
    h: float = 0.0                         # step of the central difference, and distance kept from t = 0 and 1; 0: 2e-4, or 5e-3 for a stiff teacher
    student_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)


def average_velocity_target(u, v, x_t, t, r, how, h):
    """v - (t - r) du/dt (eq. 10), detached; u(x, t, r) a function, v [B, ...] the velocity at (x_t, t)."""
    du = calculus.derivative(u, (x_t, t, r), (v, torch.ones_like(t), torch.zeros_like(r)), how, h)
    return (v - per_sample(t - r, v) * du).detach()


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    flow = RectifiedFlow()
    real = view(model.teacher, flow)
    net = model.make("student", lora=cfg.lora, two_time=True, init=cfg.init_student, gradient_checkpointing=cfg.gradient_checkpointing)
    G = run.train("student", view(net, flow), cfg.lr)
    run.watch(G, cfg.student_times, two_time=True)
    data = model.batches(images=True)
    h = calculus.time_step(run, flow, cfg.h, coarse=5e-3)

    def mean_flow_loss(batch):
        a, b = (times.logit_normal(batch.rand(), cfg.mean, cfg.std) for _ in range(2))
        t, r = times.ordered_pair(a, b, batch.rand(), cfg.equal)
        t = t.clamp(h, 1 - h)
        r = torch.minimum(r, t)
        x_t = flow.noise(batch.x0, batch.randn(), t)
        with torch.no_grad():
            v = losses.guided(real, x_t, t, batch.cond, batch.uncond, model.guidance, to="velocity")
        u = lambda x, t, r: G(x, t, batch.cond, r=r, to="velocity")
        target = average_velocity_target(u, v, x_t, t, r, cfg.derivative, h)
        squared = (u(x_t, t, r) - target).pow(2).flatten(1).sum(1)
        return {"loss": losses.adaptive(squared, cfg.power, cfg.constant), "squared": squared.mean()}

    for _ in run.loop():
        run.minimize(G, mean_flow_loss, data)
    return run


if __name__ == "__main__":
    cli(main, Config)
