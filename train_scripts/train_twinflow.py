"""TwinFlow: Realizing One-step Generation on Large Models with Self-adversarial Flows
Zhenglin Cheng, Peng Sun, Jianguo Li, Tao Lin
ICLR 2026 -- https://arxiv.org/abs/2512.05150

    F(x_t, t, r): one network. 0 <= r <= t: average velocity of the data's flow over [r, t];  r = -t: velocity of the flow of
    F's own one-step samples, its twin ("negative time")    F-: moving average of F, giving first and later legs their targets
    repeat, each sample one of four kinds (t, r): (1, 0), a short jump, any jump, the twin (t, -t)
        real:  x_t = (1 - t) x0 + t eps,  v = eps - x0 + (1 - 1/w) [ F-(x_t, t, t | c) - F-(x_t, t, t) ]       guided by itself
               R = [ (t - r) F - d v - integral of F- from t - d to r, along its own N jumps ] / d             RCGM
               F  <-  min  d( F, sg[ F - clamp(R) ] )
        twin:  x = z - F(z, 1, 0) detached;  F  <-  min  d( F(x_t, t, -t), eps - x )
        one step, x = z - F(z, 1, 0):  F  <-  min  d( F, sg[ F - clamp( F(x_t, t, -t) - F(x_t, t, t) ) ] )       rectification
    No network but F: no frozen teacher, no critic, no discriminator. The teacher given is only where F starts.

Departures from the paper: the paper feeds (-t, -t); here the first time stays t and the sign is in the second one, whose
embedding is added at zero to the teacher's network, so that both branches start as the teacher's velocity; a sample's kind is
drawn (the official code splits a batch of at least 4 in quarters); w is the scale the self-guidance converges to, since an average
that is guided by itself amplifies (the official ratio .8 is w = 5), and a tenth of the prompts is dropped to keep the
unconditional branch it needs; the mode with a frozen copy instead of the average and the image-free mode are left out; the first leg is
min(d, t - r) long (the official code moves d even then). The default is the quick start: batch 32, larger rate.

    accelerate launch train_scripts/train_twinflow.py                                  # the embedded teacher, minutes on a CPU
    accelerate launch train_scripts/train_twinflow.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --data user/images
    python train_scripts/train_twinflow.py --teacher toy --steps 600                   # seconds
"""
import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from zoo import backbones, losses, rollout
from zoo.process import RectifiedFlow, per_sample, view
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "twinflow"
    two_times: ClassVar[bool] = True
    recipes: ClassVar[dict] = {
        "sd35": dict(source="official sd_task configuration (SD3.5, lr 1e-5, enhanced ratio .8, order 2, average .99)", lr=1e-5, guidance=5.0,
                     order=2, target_decay=0.99, rectify=0.5, time_budget=0.0),
    }
    steps: int = 2000
    time_budget: float = 150.0
    lr: float = 2e-4
    order: int = 2                         # N: jumps that integrate F- after the first leg
    leg: float = 0.01                      # d: the first leg
    target_decay: float = 0.99             # of the average F-
    short: float = 0.05                    # longest short jump, as a fraction of t
    rectify: float = 0.5                   # weight of the rectification
    drop: float = 0.1                      # fraction of samples without their prompt, when guided
    student_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)


def distance(x, y, c=1e-3):
    """Squared error e of each sample as e / sg(sqrt(e + c^2)) (Barron's loss at alpha = 1): its gradient does not shrink with e. [B]"""
    e = (x - y).square().flatten(1).mean(1)
    return e / (e.detach() + c * c).sqrt()


def time_weight(gap):
    """tan((1 - gap) pi / 2.5) + 1 of the jump's length [B]: four times more for instantaneous velocities."""
    return torch.tan((1 - gap) * math.pi / 2.5) + 1


def self_guided(v, cond, uncond, w):
    """v + (1 - 1/w)(cond - uncond): where cond is what it trains, the fixed point is uncond + w (v - uncond)."""
    return v + (1 - 1 / w) * (cond - uncond)


def integral_target(F, u, v, x_t, t, r, order, leg):
    """F - clamp(R), detached (RCGM): `leg` of v, then `order` equal jumps of u(x, t, r), must add up to (t - r) F."""
    with torch.no_grad():
        here = torch.maximum(t - leg, r)
        x, length, total = x_t - per_sample(t - here, v) * v, (here - r) / order, 0
        for _ in range(order):
            jump = per_sample(length, v) * u(x, here, here - length)
            x, here, total = x - jump, here - length, total + jump
        residual = per_sample(((t - r) / leg).clamp(min=1), F) * F - total / leg - v
        return F - residual.clamp(-1, 1)


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    flow, w = RectifiedFlow(), model.guidance
    top = flow.time(model.process.angle(torch.tensor(model.process.t_max, dtype=torch.float64))).item()    # 1, or where the network's noise ends
    net = model.make("student", lora=cfg.lora, two_time=True, init=cfg.init_student, gradient_checkpointing=cfg.gradient_checkpointing)
    G = run.train("student", view(net, flow), cfg.lr)
    run.watch(G, torch.tensor(cfg.student_times) * model.process.t_max, two_time=True)
    average = run.average(G, cfg.target_decay)
    data = model.batches(images=True)

    def one_step(z, cond):
        t = rollout.expand(top, z)
        x = rollout.start(flow, z, t)
        return x - top * G(x, t, cond, r=0 * t, to="velocity")

    def real_target(F, v, x_t, t, r, cond, uncond):
        velocity = lambda x, t, r: average(x, t, cond, r=r, to="velocity")
        if w != 1:
            v = self_guided(v, velocity(x_t, t, t), average(x_t, t, uncond, r=t, to="velocity"), w)
        return integral_target(F, velocity, v, x_t, t, r, cfg.order, cfg.leg)

    def rectified(F, x, eps, t, cond):
        x_t = flow.noise(x, eps, t)
        twin, real = (G(x_t, t, cond, r=sign * t, to="velocity") for sign in (-1, 1))
        return F - (twin - real).clamp(-1, 1)

    def twin_flow_loss(batch):
        dropped = batch.rand() < cfg.drop * (w != 1)
        kind, cond = batch.randint(4), losses.without_prompt(batch.cond, batch.uncond, dropped)
        one, twin = kind == 0, kind == 3
        rows = lambda mask: {k: c[mask] for k, c in cond.items()}
        t, u = torch.where(one, 1, batch.rand().clamp(min=1e-3)) * top, batch.rand()
        r = torch.stack([0 * t, t - cfg.short * u * t, t - u * t, -t]).gather(0, kind[None])[0]
        x0, eps, z, again, s = batch.x0.clone(), batch.randn(), batch.randn(), batch.randn(), batch.rand().clamp(min=1e-3) * top
        with torch.no_grad():
            if twin.any():
                x0[twin] = one_step(z[twin], rows(twin)).to(x0)
            x_t, v = flow.noise(x0, eps, t), flow.velocity(x0, eps, t)
        F = G(x_t, t, cond, r=r, to="velocity")
        with torch.no_grad():
            y, real = v.clone(), ~twin
            if real.any():
                uncond = {k: c[real] for k, c in batch.uncond.items()}
                y[real] = real_target(F[real], v[real], x_t[real], t[real], r[real], rows(real), uncond)
        loss = base = (distance(F, y) * torch.where(twin, 1, time_weight(t - r))).mean()
        if one.any():
            with torch.no_grad():
                x = (x_t - per_sample(t, F) * F)[one]
                y = rectified(F[one], x, again[one], s[one], rows(one))
            loss = loss + cfg.rectify * 4 * distance(F[one], y).sum() / len(F)        # the mean over a quarter of the batch
        return {"loss": loss, "flow": base, "rectification": loss - base}

    for _ in run.loop():
        run.minimize(G, twin_flow_loss, data)
    return run


if __name__ == "__main__":
    cli(main, Config)
