"""SplitMeanFlow: Interval Splitting Consistency in Few-Step Generative Modeling
Yi Guo, Wei Wang, Zhihang Yuan, Rong Cao, Kuan Chen, Zhengyang Chen, Yuanyuan Huo, Yang Zhang, Yuping Wang, Shouda Liu, Yuxuan Wang
arXiv 2025 -- https://arxiv.org/abs/2507.16884

    u(x_t, t, r): average velocity of the flow over [r, t], a network with two times    v: velocity of the guided teacher
    repeat
        x0 ~ data;  x_t = (1 - t) x0 + t eps;  with probability p
            r = t:   u  <-  min  | u(x_t, t, t) - v(x_t, t) |^2                                the boundary, else the constant wins
        else r < t uniform, lam ~ U(0, 1), q = (1 - lam) t + lam r, and x_q = x_t - (t - q) u(x_t, t, q):
                     u  <-  min  | u(x_t, t, r) - sg[ lam u(x_t, t, q) + (1 - lam) u(x_q, q, r) ] |^2     interval splitting
    since (t - r) u(x_t, t, r) is an integral, and integrals add up: no derivative of the network is needed.

Departures from the paper: its first stage, which bakes guidance into a flow-matching teacher, is the guided teacher itself,
called at the boundary; the student is the teacher's network read as a rectified flow, with a second time added at zero; the
paper's systems are for speech. The plain square is the paper's and matters: with MeanFlow's adaptive weight this loss diverges.

    accelerate launch train_scripts/train_split_meanflow.py                            # the embedded teacher, minutes on a CPU
    accelerate launch train_scripts/train_split_meanflow.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --data user/images
    python train_scripts/train_split_meanflow.py --teacher toy --steps 400             # seconds
"""
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from zoo import backbones, losses, times
from zoo.process import RectifiedFlow, per_sample, view
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "split_meanflow"
    two_times: ClassVar[bool] = True
    recipes: ClassVar[dict] = {}           # the paper's batch, rate and length are not published
    steps: int = 2000
    time_budget: float = 150.0
    lr: float = 2e-4
    equal: float = 0.5                     # p: fraction of pairs with r = t
    target_decay: float = 0.0              # moving average of u in the target; 0: u itself
    student_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    flow = RectifiedFlow()
    real = view(model.teacher, flow)
    net = model.make("student", lora=cfg.lora, two_time=True, init=cfg.init_student, gradient_checkpointing=cfg.gradient_checkpointing)
    G = run.train("student", view(net, flow), cfg.lr)
    run.watch(G, cfg.student_times, two_time=True)
    target_net = run.average(G, cfg.target_decay)
    data = model.batches(images=True)

    def split_loss(batch):
        t, r = times.ordered_pair(*(batch.rand().clamp(min=1e-3) for _ in range(2)), batch.rand(), cfg.equal)
        x_t = flow.noise(batch.x0, batch.randn(), t)
        u = lambda net: lambda x, t, r: net(x, t, batch.cond, r=r, to="velocity")
        with torch.no_grad():
            v = losses.guided(real, x_t, t, batch.cond, batch.uncond, model.guidance, to="velocity")
        target = torch.where(per_sample(t == r, v), v, losses.two_jumps(u(target_net), x_t, t, r, batch.rand()))
        return {"loss": F.mse_loss(u(G)(x_t, t, r), target)}

    for _ in run.loop():
        run.minimize(G, split_loss, data)
    return run


if __name__ == "__main__":
    cli(main, Config)
