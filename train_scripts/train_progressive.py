"""Progressive Distillation for Fast Sampling of Diffusion Models
Tim Salimans, Jonathan Ho
ICLR 2022 -- https://arxiv.org/abs/2202.00512

    D: student, samples x0 from x_t    real_w: guided teacher    phase 0, guided distillation (Meng et al.), then one phase per halving
    phase 0 (--guided_steps updates)
        t ~ U(0, 1);  D  <-  min  W_t | D(x_t) - real_w(x_t) |^2            one call instead of two
    phases N = first, first / 2, ..., last (--phase_steps updates each, twice as many for N <= 2)
        E = copy of D, frozen;  t = i / N, i ~ {1 .. N};  x_r = two DDIM steps of E from x_t, over t - 1/2N to r = t - 1/N
        x~: the prediction whose one DDIM step from x_t to r is x_r;  D  <-  min  W_t | D(x_t) - x~ |^2
    with W = max(1, SNR), x_t = alpha x0 + sigma eps, x0 ~ data. The student takes `last` DDIM steps, on the last phase's grid only.
    With --guidance_range LO HI the scale w is drawn per sample and given to the student as an embedding (Meng et al., Sec. 3.1).

Phase 0 is of a second paper: On Distillation of Guided Diffusion Models (Meng, Rombach, Gao, Kingma, Ermon, Ho, Salimans,
CVPR 2023 -- https://arxiv.org/abs/2210.03142).
Departures from the papers: W is written on v, where it is bounded at both ends; the grid is even in the teacher's own time;
guidance counts as D_u + w (D_c - D_u), one more than theirs, and is fixed by default; no stochastic sampler. The default is the
quick start: two halvings to 4 steps, a hundred updates a phase instead of tens of thousands.

    accelerate launch train_scripts/train_progressive.py                               # the embedded teacher, minutes on a CPU
    accelerate launch train_scripts/train_progressive.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --data user/images --guidance_range 3 15
    python train_scripts/train_progressive.py --teacher toy --steps 400                # seconds
"""
import sys
from dataclasses import dataclass
from typing import ClassVar

import torch

from zoo import backbones, losses, times
from zoo.errors import UserError
from zoo.process import per_sample
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "progressive"
    recipes: ClassVar[dict] = {
        "cifar10": dict(source="Salimans & Ho 2022, official configuration (8192 -> 1 steps, 50K updates a phase, batch 128, lr 5e-5 annealed to 0)",
                        batch=128, lr=5e-5, max_grad_norm=1.0, guided_steps=0, first=4096, last=1, phase_steps=50_000, steps=750_000, time_budget=0.0),
    }
    steps: int = 260                       # of all phases together; more go to the last one
    time_budget: float = 150.0
    lr: float = 2e-4                       # falls to 0 over each phase
    ema: float = 0.0                       # the paper averages nothing
    guided_steps: int = 100                # updates of phase 0; left out when there is no guidance
    first: int = 8                         # N of the first halving, whose teacher takes 2N steps
    last: int = 4                          # N of the last one: what the student is exported for
    phase_steps: int = 80                  # updates of a halving
    guidance_range: tuple[float, float] = (0.0, 0.0)    # draw w from it and embed it; (0, 0): one fixed scale, no embedding


def phase(step, guided, first, last, updates):
    """(N, first update, updates) of the phase of an update, N = 0 for guided distillation: a pure function of the step."""
    if step < guided:
        return 0, 0, guided
    n, begin, length = first, guided, updates * (2 if first <= 2 else 1)
    while n > last and step >= begin + length:
        n, begin = n // 2, begin + length
        length = updates * (2 if n <= 2 else 1)
    return n, begin, length


def one_step_target(net, x_t, t, m, r, cond):
    """(x0, eps) [double] whose single DDIM step from x_t, t to r lands where two steps of `net`, to m and then to r, do."""
    process, x = net.process, x_t.double()
    for here, there in ((t, m), (m, r)):
        v = net(x.to(x_t), here, cond, to="v").double()
        x = process.step(*process.pair(v, x, here.double(), "v"), there.double())
    (a, s, _, _), (a_r, s_r, _, _) = ([per_sample(c, x) for c in process.coeffs(time.double())] for time in (t, r))
    det = a * s_r - a_r * s
    return (s_r * x_t - s * x) / det, (a * x - a_r * x_t) / det


def weighted(process, v, target, t):
    """max(1, SNR) |x0 - x0~|^2 (the larger of the errors in x0 and in eps), from two v at one x_t."""
    alpha, sigma, _, _ = process.coeffs(t)
    weight = torch.maximum(alpha, sigma) ** 2 / (alpha**2 + sigma**2) ** 2
    return (weight * losses.per_sample_mean((v - target) ** 2)).mean()


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    real, process = model.teacher, model.process
    low, high = cfg.guidance_range
    ratio = cfg.first / cfg.last if cfg.last > 0 else 0
    if ratio < 1 or ratio != 2 ** (int(ratio).bit_length() - 1):
        raise UserError(f"--first {cfg.first} does not come down to --last {cfg.last} by halving: make it 1, 2, 4, ... times as large")
    guided = cfg.guided_steps if model.guidance != 1 or high > low else 0
    where = lambda step: phase(step, guided, cfg.first, cfg.last, cfg.phase_steps)
    roles = dict(lora=cfg.lora, guidance_embedding=high > low)
    D = run.train("student", model.make("student", init=cfg.init_student, gradient_checkpointing=cfg.gradient_checkpointing, **roles), cfg.lr)
    E = run.train("phase_teacher", model.make("phase_teacher", **roles), 0.0)      # never minimised; a trainee, so that checkpoints hold it
    warm = D.lr
    def annealed(step):
        _, begin, length = where(step)
        return warm(step) * max(1 - (step - begin) / length, 1 / length)
    D.lr = annealed
    run.watch(D, process.t_max * (1 - torch.arange(cfg.last) / cfg.last), "ode", multiple_of=cfg.last, guidance=model.guidance if high > low else 1.0,
              guidance_range=cfg.guidance_range if high > low else None)
    data = model.batches(images=True)

    def drawn(batch):
        w = times.uniform(batch.rand(), low, high) if high > low else model.guidance
        return w, batch.cond | ({"guidance": w} if high > low else {})

    def guided_loss(batch):
        w, cond = drawn(batch)
        t = batch.rand().clamp(min=1e-3) * process.t_max
        x_t = process.noise(batch.x0, batch.randn(), t)
        with torch.no_grad():
            target = losses.guided(real, x_t, t, batch.cond, batch.uncond, w, to="v")
        return {"loss": weighted(process, D(x_t, t, cond, to="v"), target, t)}

    def halving_loss(batch):
        n, _, _ = where(run.step)
        i = batch.randint(n) + 1
        t, m, r = (process.t_max * (i - back) / n for back in (0, 0.5, 1))
        _, cond = drawn(batch)
        x_t = process.noise(batch.x0, batch.randn(), t)
        with torch.no_grad():
            target = process.read(*one_step_target(E, x_t, t, m, r, cond), t.double(), "v").to(x_t)
        return {"loss": weighted(process, D(x_t, t, cond, to="v"), target, t), "student_steps": n}

    for step in run.loop():
        n, begin, _ = where(step)
        if step == begin:
            for mine, theirs in zip(E.params.values(), D.params.values()):
                mine.data.copy_(theirs.data)
            D.optimizer.state.clear()
        run.minimize(D, halving_loss if n else guided_loss, data)
    if run.step and where(run.step - 1)[0] != cfg.last:
        print(f"ended before the phase of {cfg.last} steps: raise --steps or --time_budget and run the same command to go on", file=sys.stderr)
    return run


if __name__ == "__main__":
    cli(main, Config)
