"""sCM: Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models
Cheng Lu, Yang Song
ICLR 2025 -- https://arxiv.org/abs/2410.11081

    TrigFlow: x_t = cos t x0 + sin t z, z ~ N(0, s^2), s = sigma_data, t in [0, pi/2]    F: student, s F its velocity
    f(x_t, t) = cos t x_t - sin t s F(x_t, t): the consistency function, f(x, 0) = x     v_w: velocity of the guided teacher
    repeat
        x0 ~ data;  s tan t ~ log-normal(P_mean, P_std);  dx/dt = v_w(x_t, t)
        g = cos t df/dt  =  - cos^2 t (s F - dx/dt) - r cos t sin t (x_t + s dF/dt),   r: 0 -> 1, tangent warm-up
        F  <-  min  | F(x_t, t) - sg[ F(x_t, t) + g / (|g| + c) ] |^2                    tangent normalisation, Alg. 1

Departures from the paper: distillation (sCD) only; the adaptive weight e^w(t) is not a network but its own minimiser for tangents of
unit length, which cancels the prior weight 1 / (s tan t) and leaves 1; the teacher's architecture is taken as it is
and read through its own time embedding by equal signal-to-noise ratio, so that the total derivative is a central difference by default (--derivative jvp
is exact, for networks that have forward mode), in float32 whatever the precision of training, its step chosen by how stiff in time the teacher is
(calculus.time_step); sigma_data = 1 fits latents; the warm-up is 100 steps and not 10 000 in the quick start.

    accelerate launch train_scripts/train_scm.py                                       # the embedded teacher, minutes on a CPU
    accelerate launch train_scripts/train_scm.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --data user/images --derivative jvp
    python train_scripts/train_scm.py --teacher toy --derivative jvp --steps 400       # seconds
"""
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from zoo import backbones, calculus, losses
from zoo.process import TrigFlow, view
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "scm"
    recipes: ClassVar[dict] = {
        "cifar10": dict(source="Lu & Song 2024, App. G; FastGen scd_cifar10 (batch 512, lr 1e-4, betas 0.9 0.99, P = (-1, 1.4), warm-up 10K)",
                        batch=512, lr=1e-4, betas=(0.9, 0.99), mean=-1.0, std=1.4, sigma_data=0.5, tangent_warmup=10_000,
                        time_budget=0.0, steps=500_000),
    }
    steps: int = 2000
    time_budget: float = 150.0
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.99)
    sigma_data: float = 1.0                # s: standard deviation of the data
    mean: float = 0.0                      # P_mean, P_std: log(s tan t), the noise over the signal, is normal
    std: float = 1.6
    tangent_warmup: int = 100              # steps over which r grows to 1
    tangent_c: float = 0.1                 # c of the tangent normalisation
    derivative: Literal["fd", "jvp"] = "fd"
    h: float = 0.0                         # step of the central difference in t, and distance kept from both ends; 0: 2e-4, or 1e-2 for a stiff teacher
    student_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)


def tangent(velocity, x_t, t, dx, ramp, how, h, value=None):
    """g = cos t df/dt along dx [B, ...] (Alg. 1), detached; velocity(x, t) is s F, value what it is at (x_t, t) where that is known."""
    v, dv = calculus.total_derivative(velocity, (x_t, t), (dx, torch.ones_like(t)), how, h, value)
    return losses.trigflow_tangent(v, dv, x_t, t, dx, ramp)


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    flow = TrigFlow(cfg.sigma_data)
    real = view(model.teacher, flow)
    net = model.make("student", lora=cfg.lora, init=cfg.init_student, gradient_checkpointing=cfg.gradient_checkpointing)
    F = run.train("student", view(net, flow), cfg.lr)
    knots = torch.tensor(cfg.student_times) * model.process.t_max
    run.watch(F, knots)
    noisiest = flow.time(model.process.angle(knots[0])).item()
    h = calculus.time_step(run, flow, cfg.h, coarse=1e-2)
    data = model.batches(images=True)

    def consistency_loss(batch):
        ratio = torch.exp(cfg.mean + cfg.std * batch.randn(1)[:, 0])
        t = torch.atan(ratio / cfg.sigma_data).clamp(h, noisiest - h)
        x_t = flow.noise(batch.x0, batch.randn(), t)
        velocity = lambda x, t: F(x, t, batch.cond, to="velocity")
        mixed = torch.is_autocast_enabled(x_t.device.type)                   # then the trained call is too coarse for the tangent
        with nullcontext() if mixed else calculus.full_precision(x_t.device.type):
            v = velocity(x_t, t)
        with torch.no_grad(), calculus.full_precision(x_t.device.type):      # differences of nearby values
            dx = losses.guided(real, x_t, t, batch.cond, batch.uncond, model.guidance, to="velocity")
            g = tangent(velocity, x_t, t, dx, min(1.0, run.step / max(cfg.tangent_warmup, 1)), cfg.derivative, h, None if mixed else v)
        loss = losses.along(v / cfg.sigma_data, losses.bounded(g, cfg.tangent_c))
        return {"loss": loss, "tangent": g.flatten(1).norm(dim=1).mean()}

    for _ in run.loop():
        run.minimize(F, consistency_loss, data)
    return run


if __name__ == "__main__":
    cli(main, Config)
