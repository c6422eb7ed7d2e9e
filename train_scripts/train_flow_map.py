"""Flow maps: How to build a consistency model: Learning flow maps via self-distillation
Nicholas M. Boffi, Michael S. Albergo, Eric Vanden-Eijnden
NeurIPS 2025 -- https://arxiv.org/abs/2505.18825

    X(x_t, t, r) = x_t - (t - r) u(x_t, t, r): flow map from t to r, u a network with two times    v: velocity of the guided teacher
    repeat
        x0 ~ data;  r <= t uniform on the triangle, r = t for a fraction of the pairs (the diagonal);  x_t = (1 - t) x0 + t eps
        u  <-  min  | residual |^2,  by --objective:
            lsd   Lagrangian    d/dr X(x_t, t, r) - sg[ v(X, r) ]                                where the map arrives
            esd   Eulerian      u(x_t, t, r) - sg[ v(x_t, t) - (t - r) du/dt ]                   where it starts, d/dt along v
            psd   progressive   u(x_t, t, r) - sg[ u(x_t, t, q) + u(X(x_t, t, q), q, r) ] / 2    two jumps through q = (t + r) / 2
        on the diagonal all three are u(x_t, t, t) - v(x_t, t).

Departures from the paper: v comes from the frozen guided teacher; --velocity data is the paper's self-distillation (unguided):
eps - x0 on the diagonal, the student's own sg u(x, t, t) elsewhere. The student starts as the teacher read as a rectified flow,
with a second time added at zero. There is no learned weight exp(-w(t, r)); dividing each residual by its own size instead makes
PSD diverge. The Eulerian derivative is a constant (the paper's code also differentiates its time part). A quarter of the pairs,
not three, is on the diagonal, where the student starts out right. Derivatives are central differences by default (--derivative
jvp is exact, for networks that have forward mode), so t and r stay h away from the ends. PSD splits at the midpoint (uniform
splits: train_split_meanflow.py).

    accelerate launch train_scripts/train_flow_map.py                                  # the embedded teacher, minutes on a CPU
    accelerate launch train_scripts/train_flow_map.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --data user/images --objective psd
    python train_scripts/train_flow_map.py --teacher toy --derivative jvp --steps 400  # seconds
"""
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo import backbones, calculus, losses, times
from zoo.process import RectifiedFlow, per_sample, view
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "flow_map"
    two_times: ClassVar[bool] = True
    recipes: ClassVar[dict] = {
        "cifar10": dict(source="Boffi et al. 2025 (self-distillation, batch 512, 75 % of it on the diagonal; its rate of 1e-2 is for "
                               "magnitude-preserving networks and not taken over)",
                        objective="lsd", velocity="data", batch=512, diagonal=0.75, time_budget=0.0, steps=200_000),
    }
    steps: int = 2000
    time_budget: float = 150.0
    lr: float = 2e-4
    objective: Literal["lsd", "esd", "psd"] = "lsd"
    velocity: Literal["teacher", "data"] = "teacher"
    diagonal: float = 0.25                 # fraction of pairs with r = t
    derivative: Literal["fd", "jvp"] = "fd"
    h: float = 5e-3                        # step of the central difference, and distance kept from t, r = 0 and 1
    student_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)


def lagrangian(u, velocity, x_t, t, r, how, h):
    """d/dr X - sg v(X, r), with gradient through the derivative; velocity(x, t) a function."""
    X = lambda r: x_t - per_sample(t - r, x_t) * u(x_t, t, r)
    with calculus.full_precision(x_t.device.type):             # a difference of nearby values
        if how == "jvp":
            with sdpa_kernel(SDPBackend.MATH):
                x_r, dX = torch.func.jvp(X, (r,), (torch.ones_like(r),))
        else:
            ahead, behind = X(r + h), X(r - h)
            x_r, dX = (ahead + behind) / 2, (ahead - behind) / (2 * h)
    return dX - velocity(x_r.detach(), r).detach()


def eulerian(u, velocity, x_t, t, r, how, h):
    """u - sg[ v - (t - r) du/dt ], where the target is u + dX/dt along (v, 1)."""
    X = lambda x, t: x - per_sample(t - r, x) * u(x, t, r)
    dX = calculus.derivative(X, (x_t, t), (velocity(x_t, t).detach(), torch.ones_like(t)), how, h)
    average = u(x_t, t, r)
    return average - (average + dX).detach()


def progressive(u, velocity, x_t, t, r, how, h):
    """u - sg[ mean of the two half jumps ]; on the diagonal u - sg v."""
    target = torch.where(per_sample(t == r, x_t), velocity(x_t, t), losses.two_jumps(u, x_t, t, r, 0.5))
    return u(x_t, t, r) - target.detach()


RESIDUALS = {"lsd": lagrangian, "esd": eulerian, "psd": progressive}


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    flow = RectifiedFlow()
    real = view(model.teacher, flow)
    net = model.make("student", lora=cfg.lora, two_time=True, init=cfg.init_student, gradient_checkpointing=cfg.gradient_checkpointing)
    G = run.train("student", view(net, flow), cfg.lr)
    run.watch(G, cfg.student_times, two_time=True, follows_teacher=cfg.velocity == "teacher")
    data = model.batches(images=True)

    def flow_map_loss(batch):
        diagonal, a, b = batch.rand() < cfg.diagonal, batch.rand(), batch.rand()
        t, r = (times.uniform(torch.where(diagonal, a, s), cfg.h, 1 - cfg.h) for s in (torch.maximum(a, b), torch.minimum(a, b)))
        eps = batch.randn()
        x_t = flow.noise(batch.x0, eps, t)
        u = lambda x, t, r: G(x, t, batch.cond, r=r, to="velocity")

        @torch.no_grad()
        def velocity(x, t):
            if cfg.velocity == "teacher":
                return losses.guided(real, x, t, batch.cond, batch.uncond, model.guidance, to="velocity")
            return torch.where(per_sample(diagonal, x), eps - batch.x0, u(x, t, t))

        residual = RESIDUALS[cfg.objective](u, velocity, x_t, t, r, cfg.derivative, cfg.h)
        return {"loss": residual.pow(2).mean()}

    for _ in run.loop():
        run.minimize(G, flow_map_loss, data)
    return run


if __name__ == "__main__":
    cli(main, Config)
