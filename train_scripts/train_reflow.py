"""Reflow: Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow
Xingchao Liu, Chengyue Gong, Qiang Liu
ICLR 2023 -- https://arxiv.org/abs/2209.03003

    v: velocity of a rectified flow    before: stored pairs (z, c, x0), x0 = the endpoint of the guided teacher's ODE from noise z
    repeat
        t ~ p(t);  x_t = (1 - t) x0 + t z                              the straight line between the two ends of a pair
        v  <-  min  (1 - t) H( v(x_t, t), z - x0 )  +  P( x_t - t v(x_t, t), x0 ) / t
    H pseudo-Huber, P perceptual distance, p(t) U-shaped: rf++; H the mean square and p uniform: the paper above.
    --init_student DIR  starts from that student and takes the pairs from its ODE: k-reflow.
    --stage distill     one step of it: v <- min d( z - v(z, 1), x0 ), InstaFlow's last stage.

Two more papers: InstaFlow (Liu, Zhang, Ma, Peng, Liu, ICLR 2024 -- https://arxiv.org/abs/2309.06380) guides the teacher and
distils; rf++ (Lee, Lin, Fanti, NeurIPS 2024 -- https://arxiv.org/abs/2405.20320) finds one reflow enough with p(t), H and P.
Departures from the papers: the student is the teacher's network read as a rectified flow, so that its weights start right and
the stock DDIM rule on the teacher's own schedule is exactly Euler's; where that schedule stops short of pure noise, t ends
there and the line ends at the sampler's start; pairs come from DDIM (the papers: RK45, Heun, DPM-Solver); P is off by default
and H then unweighted (--perceptual 1 is rf++; P is EfficientNet-Lite0's blocks without learnt weights, on decoded samples at 96
pixels, for LPIPS, or LPIPS where it is installed); a 2-reflow student is sampled without guidance; no real pairs by inversion, no re-use of the first noise.

    accelerate launch train_scripts/train_reflow.py                                    # the embedded teacher, minutes on a CPU
    accelerate launch train_scripts/train_reflow.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --data prompts.txt --pairs 100000
    python train_scripts/train_reflow.py --teacher toy --steps 400                     # seconds
"""
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from zoo import backbones, rollout, times
from zoo.data import pairs
from zoo.process import RectifiedFlow, per_sample, view
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "reflow"
    recipes: ClassVar[dict] = {
        "cifar10": dict(source="Liu et al. 2022, official configuration (batch 128, Adam 2e-4, warm-up 5000, 300K updates, 1M pairs; 127 calls of RK45)",
                        batch=128, lr=2e-4, steps=300_000, warmup=5000, ema=0.999999, pairs=1_000_000, pair_steps=127, metric="mse", u_shape=0.0,
                        time_budget=0.0),
        "cifar10-rf++": dict(source="Lee et al. 2024, official code (batch 512, lr 2e-4, 800K updates, 1M pairs of 18 Heun steps, U-shaped times, LPIPS-Huber)",
                             batch=512, lr=2e-4, steps=800_000, ema=0.9999, pairs=1_000_000, pair_steps=35, perceptual=1.0, time_budget=0.0),
    }
    steps: int = 2000
    time_budget: float = 150.0             # of training: the pairs are made before it
    lr: float = 2e-4
    stage: Literal["reflow", "distill"] = "reflow"
    pairs: int = 1024                      # stored pairs
    pair_steps: int = 12                   # sampling steps of the ODE for a pair
    pairs_dir: str = ""                    # a store of the teacher's pairs (make_pairs.py) to read instead
    pairs_from: Literal["start", "teacher"] = "start"    # whose ODE: the network the student starts as, or the guided teacher
    u_shape: float = 4.0                   # a of the density exp(a t) + exp(-a t) about 1/2; 0: uniform
    metric: Literal["huber", "mse"] = "huber"            # of velocities, and of samples in --stage distill
    perceptual: float = 0.0                # weight of P
    student_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)    # times the exported student is sampled at; --stage distill has the first alone


def straight_line(x0, x_top, t, top):
    """(x_t, velocity) on the line from x0 at t = 0 to x_top at t = top; for top = 1, (1 - t) x0 + t z and z - x0."""
    velocity = (x_top - x0) / top
    return x0 + per_sample(t, x0) * velocity, velocity


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    flow, base = RectifiedFlow(), model.process
    net = model.make("student", lora=cfg.lora, init=cfg.init_student, gradient_checkpointing=cfg.gradient_checkpointing)
    v = run.train("student", view(net, flow), cfg.lr)
    one_step = cfg.stage == "distill"
    run.watch(v, torch.tensor(cfg.student_times[:1] if one_step else cfg.student_times) * base.t_max, "ode")
    top = float(flow.time(base.angle(torch.tensor(base.t_max, dtype=torch.float64))))       # 1, or where the teacher's schedule stops
    distance = pairs.distance(model, cfg.metric)
    perceptual = pairs.distance(model, "perceptual") if cfg.perceptual else None
    own = cfg.init_student and cfg.pairs_from == "start" and not cfg.pairs_dir
    data = pairs.stored(run, net if own else model.teacher, cfg.pairs, cfg.pair_steps, 1.0 if own else model.guidance, cfg.pairs_dir)

    def reflow_loss(batch):
        u = batch.rand()
        u = times.u_shaped(u, cfg.u_shape) if cfg.u_shape else u
        u = torch.ones_like(u) if one_step else times.uniform(u, 1e-5, 1 - 1e-5)
        t = top * u
        x_t, velocity = straight_line(batch.x0, rollout.start(flow, batch.z, torch.full_like(t, top)), t, top)
        guess = v(x_t, t, batch.cond, to="velocity")
        x0 = x_t - per_sample(t, x_t) * guess
        plain = distance(x0, batch.x0) if one_step else distance(guess, velocity)
        if perceptual is None:
            return {"loss": plain.mean()}
        seen = perceptual(x0, batch.x0) / t
        weight = 1 if one_step or cfg.metric == "mse" else 1 - t
        return {"loss": (weight * plain + cfg.perceptual * seen).mean(), "plain": plain.mean(), "perceptual": seen.mean()}

    for _ in run.loop():
        run.minimize(v, reflow_loss, data)
    return run


if __name__ == "__main__":
    cli(main, Config)
