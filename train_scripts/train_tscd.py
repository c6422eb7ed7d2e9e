"""Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis
Yuxi Ren, Xin Xia, Yanzuo Lu, Jiacheng Zhang, Jie Wu, Pan Xie, Xing Wang, Xuefeng Xiao
NeurIPS 2024 -- https://arxiv.org/abs/2404.13686

    X(x_t, t -> s): DDIM step of the student from t to s    X-: of its moving average    real_w: guided teacher
    for k = 8, 4, 2, 1 segments of [0, 1], each started from the one before
        repeat
            x0 ~ data;  t ~ grid of N times;  r = the time before t on the grid;  x_t = alpha x0 + sigma eps
            x_r = DDIM step of real_w from x_t to r;   s ~ grid between the lower edge of t's segment and r
            X  <-  min  d( X(x_t, t -> s), sg[ X-(x_r, r -> s) ] ) + w_G sp(-D(.)),  d = pseudo-Huber       Sec. 3.1
            D  <-  min  sp(D(X noised to g)) + sp(-D(X- noised to g)),  s < g < the segment's upper edge    with --gan
    and sampling is deterministic: DDIM over any even grid that holds the segments' edges.

With --phases k the same loss is the Phased Consistency Model (Fu-Yun Wang et al., NeurIPS 2024, https://arxiv.org/abs/2405.18407): k segments
throughout and s always the lower edge, sampled by DDIM in exactly k steps.

Departures from the paper: trajectory segmented consistency alone, without the reward learning (Sec. 3.2) and the score distillation of
the one-step student (Sec. 3.3; see train_dmd.py); one distance d at every stage (the paper goes from squared error to an adversarial one); the GAN is off by
default, its weight is constant, its discriminator is a trainable copy of the teacher with a head, its loss is non-saturating and not a
hinge, and samples are noised by the exact transition from s to g; the one-step student starts at t = 1 and not at 0.8. One (x0, eps) must serve every s,
so that a segment's longest jump is a compromise: one step of the last stage is soft (the paper's Sec. 3.3 is for it). Of PCM: a fixed guidance
scale, the target is a moving average (--target_decay 0: the student itself, as there).

    accelerate launch train_scripts/train_tscd.py                                       # the embedded teacher, minutes on a CPU
    accelerate launch train_scripts/train_tscd.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --data user/images --recipe pcm-sd15
    python train_scripts/train_tscd.py --teacher toy --steps 400 --stage_steps 100      # seconds
"""
from dataclasses import dataclass
from typing import ClassVar

import torch

from zoo import backbones, critics, losses
from zoo.errors import UserError
from zoo.process import per_sample
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "tscd"
    recipes: ClassVar[dict] = {
        "hyper-sd": dict(source="Ren et al. 2024 (LoRA rank 64, batch 512, lr 1e-6; iterations are not given: choose --stage_steps, --steps)",
                         batch=512, lr=1e-6, lora=64, time_budget=0.0),
        "pcm-sd15": dict(source="Wang et al. 2024; official SD1.5 script with GAN (batch 20, lr 5e-6, 10K iterations, 2 phases, w in [5, 6], GAN 0.1)",
                         batch=20, lr=5e-6, weight_decay=1e-3, lora=64, phases=2, grid=50, target_decay=0.0, huber_c=1e-3, gan=0.1, critic_lr=1e-5,
                         guidance=5.5, steps=10_000, time_budget=0.0),
        "pcm-sdxl": dict(source="Wang et al. 2024; official SDXL script (batch 10, lr 2e-6, 20K iterations, 4 phases of 40 times, w in [7, 8], GAN 0.1)",
                         batch=10, lr=2e-6, weight_decay=1e-3, lora=64, phases=4, grid=40, target_decay=0.0, huber_c=1e-3, gan=0.1, critic_lr=1e-5,
                         guidance=7.5, steps=20_000, time_budget=0.0),
    }
    steps: int = 2000
    time_budget: float = 150.0
    lr: float = 2e-4
    grid: int = 40                         # N: times of the training grid; the skip is 1000 / N teacher steps
    segments: int = 8                      # of the first stage; halved at every stage
    final_segments: int = 1                # of the last stage: the fewest steps the student serves
    stage_steps: int = 100                 # student steps of every stage but the last, which goes on to the end
    phases: int = 0                        # PCM: that many segments throughout, s their lower edge (0: the stages above)
    student_steps: int = 4                 # steps of the exported student, and those of its divisors that hold the final segments; with phases: these
    target_decay: float = 0.95             # of the moving average X-; 0: the student itself
    huber_c: float = 1.0                   # of d: at 1 the squared error, as the paper's first stages; PCM's is 1e-3
    gan: float = 0.0                       # weight of the student's GAN loss
    critic_lr: float = 4e-4


def segments_at(step, first, last, stage_steps):
    """Segments in force at a student step: first, first / 2, ... down to last."""
    return max(first >> (step // stage_steps), last)


def grid_times(i, u, n, segments, phased):
    """Grid indices (k, k - 1, s, upper) of t, its predecessor, the target and the segment's upper edge; i in [0, n), u in [0, 1).

    s is uniform between the segment's lower edge and k - 1, or with `phased` the lower edge itself."""
    size = n // segments
    edge = i // size * size
    s = edge if phased else torch.minimum(edge + (u * (i + 1 - edge)).long(), i)
    return i + 1, i, s, edge + size


def jump(net, x, t, s, cond):
    """X(x_t, t -> s): the student's (x0, eps) at x_t, composed at time s."""
    return net.process.step(*net.process.pair(net(x, t, cond, to="v"), x, t, "v"), s)


def segment_target(target, real, x_t, t, r, s, cond, uncond, w):
    """sg X-(x_r, r -> s), x_r one DDIM step of the guided teacher; X-(x, s -> s) = x exactly."""
    with torch.no_grad():
        x_r = real.process.step(*real.process.pair(losses.guided(real, x_t, t, cond, uncond, w, to="v"), x_t, t, "v"), r)
        return torch.where(per_sample(r > s, x_r), jump(target, x_r, r.clamp(min=1e-3), s, cond), x_r)


def noised(process, x, s, g, eps):
    """Exact transition of the process from time s to a later g."""
    (a_s, s_s, _, _), (a_g, s_g, _, _) = process.coeffs(s), process.coeffs(g)
    keep = a_g / a_s
    return per_sample(keep, x) * x + per_sample((s_g**2 - (keep * s_s) ** 2).clamp(min=0).sqrt(), x) * eps


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    real, process = model.teacher, model.process
    first, last, steps = (cfg.phases,) * 3 if cfg.phases else (cfg.segments, cfg.final_segments, cfg.student_steps)
    if cfg.grid % first or first % last or steps % last or cfg.grid % steps:
        raise UserError(f"a grid of {cfg.grid} times in {first} segments falling to {last} does not serve {steps} steps: let the segments and the steps divide "
                        "--grid, and the final segments divide both (such as --grid 40, 8 segments to 1, 4 steps)")
    G = run.train("student", model.make("student", lora=cfg.lora, init=cfg.init_student,
                                        gradient_checkpointing=cfg.gradient_checkpointing), cfg.lr)
    run.watch(G, process.t_max * (1 - torch.arange(steps) / steps), rule="ode", multiple_of=last)
    target = run.average(G, cfg.target_decay)
    if cfg.gan:
        D = run.train("critic", model.make("critic", lora=cfg.lora, head=True, gradient_checkpointing=cfg.gradient_checkpointing), cfg.critic_lr)
    data = model.batches(images=True)

    def both_sides(batch):
        segments = segments_at(run.step, first, last, cfg.stage_steps)
        t, r, s, top = (process.t_max * k / cfg.grid for k in grid_times(batch.randint(cfg.grid), batch.rand(), cfg.grid, segments, cfg.phases))
        x_t = process.noise(batch.x0, batch.randn(), t)
        y = segment_target(target, real, x_t, t, r, s, batch.cond, batch.uncond, model.guidance)
        return jump(G, x_t, t, s, batch.cond), y, s, top

    def judged(batch, s, top, *samples):
        g = torch.maximum(s + batch.rand() * (top - s), torch.full_like(s, 1e-3))
        eps = batch.randn()
        return critics.logits(D, [(noised(process, x, s, g, eps), g) for x in samples], batch.cond)

    def critic_loss(batch):
        with torch.no_grad():
            x, y, s, top = both_sides(batch)
        return {"loss": critics.discriminator(*judged(batch, s, top, y, x))}

    def consistency_loss(batch):
        x, y, s, top = both_sides(batch)
        loss = consistency = losses.pseudo_huber(x, y, cfg.huber_c)
        if cfg.gan:
            loss = consistency + cfg.gan * critics.generator(*judged(batch, s, top, x))
        return {"loss": loss, "consistency": consistency}

    for _ in run.loop():
        if cfg.gan:
            run.minimize(D, critic_loss, data)
        run.minimize(G, consistency_loss, data)
    return run


if __name__ == "__main__":
    cli(main, Config)
