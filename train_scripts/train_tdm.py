"""Learning Few-Step Diffusion Models by Trajectory Distribution Matching (TDM)
Yihong Luo, Tianyang Hu, Jiacheng Sun, Yujun Cai, Jing Tang
ICCV 2025 -- https://arxiv.org/abs/2503.06674

    G: K-step student, sampled by the ODE    real_w: guided teacher    fake: the critic, a score of G's trajectory between its knots
    repeat
        x_t: deterministic steps of G from noise to a random knot t;  (x, e) = G(x_t, t);  the next knot s;  a time u in (s, t)
        x_u = alpha_u x + sigma_u e',  e' = rho e + sqrt(1 - rho^2) n,  rho^2 = SNR_u / SNR_s,  n fresh
            which is G's own point x_s = alpha_s x + sigma_s e, noised by the forward process from s on to u
        fake  <-  min  |fake(x_u, u) - x|^2
        G     <-  min  d( x, sg[ x + real_w(x_u, u) - fake(x_u, u) ] ) / |x - real_w|_1,   d = pseudo-Huber
    so that each step is matched at the noise levels it crosses, and the last one (s = 0) at those down to the data. K = 1 is DMD.

Departures from the paper: the K-step student alone, without the variant that is told its number of steps; u is uniform on its
interval, the critic's loss is a v-MSE (official code: min(SNR, 5)) without that code's importance factor, the 1/N-th power of a
density ratio and so about 1; the pseudo-Huber distance is the paper's, of whole samples (the code's is per element). As in
that code fake is E[x | x_u], the score of x_u only as far as e is independent of x: on Gaussian data the inner knots come out
over-dispersed, the last law exact. The student is averaged. The default is the quick start: batch 32, two critic updates,
larger rates; the paper starts at timestep 900 of 1000, here the first knot is the noisiest time, which stock schedulers serve.
There is no recipe because the published PixArt-512 demo leaves the batch open; the rest of it is --lr 4e-6 --critic_lr 2e-5
--critic_updates 1 --betas 0 0.95 --guidance 4.5 --max_grad_norm 1 --warmup 50 --time_budget 0 --steps 500.

    accelerate launch train_scripts/train_tdm.py                                       # the embedded teacher, minutes on a CPU
    accelerate launch train_scripts/train_tdm.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --lora 64 --data prompts.txt
    python train_scripts/train_tdm.py --teacher toy --steps 400                        # seconds
"""
from dataclasses import dataclass
from typing import ClassVar

import torch

from zoo import backbones, critics, losses, rollout, sharding, times
from zoo.health import critic_fit
from zoo.process import per_sample
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "tdm"
    steps: int = 1000
    time_budget: float = 150.0
    lr: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.99)
    critic_lr: float = 4e-4
    critic_updates: int = 2                # per student update (the paper's is 1)
    student_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)    # the K knots
    huber: float = 5.4e-4                  # c of the pseudo-Huber distance, per root of the number of elements
    t_min: float = 0.02                    # range of the times u
    t_max: float = 0.98


def predict(G, x, t, cond):
    """The student's (x0, eps) at (x, t)."""
    return G.process.pair(G(x, t, cond, to="v"), x, t, "v")


@torch.no_grad()
def trajectory(G, noise, cond, knots, depth):
    """(x_t, t [B]) at knots[depth], depth [B], of the student's own deterministic trajectory from `noise`."""
    t = rollout.expand(knots[0], noise).clone()
    x = rollout.start(G.process, noise, t)
    for i, knot in enumerate(knots[1:]):
        going = depth > i
        called = sharding.called(G, going)
        if called is not None:
            x0, eps = predict(G, x[called], t[called], {k: c[called] for k, c in cond.items()})
            t[going] = knot.to(t)
            x[going] = G.process.step(x0, eps, t[going]).to(x)
    return x, t


def noised_on(process, eps, s, u, n):
    """The noise of x_u when x_s = alpha_s x + sigma_s eps is noised on from s to u: rho eps + sqrt(1 - rho^2) n."""
    (alpha_s, sigma_s, _, _), (alpha, sigma, _, _) = process.coeffs(s), process.coeffs(u)
    rho = per_sample((alpha * sigma_s / (alpha_s * sigma)).clamp(max=1), eps)
    return rho * eps + (1 - rho**2).sqrt() * n


def distance(x, y, c):
    """Pseudo-Huber distance of two samples [B]: sqrt(mean |x - y|^2 + c^2) - c."""
    return (losses.per_sample_mean((x - y) ** 2) + c * c).sqrt() - c


def student_objective(x, x_u, u, cond, uncond, real, fake, guidance, c):
    """d(x, sg[x + real_w - fake]) / mean |x - real_w|, averaged over the batch."""
    with torch.no_grad():
        x_real = losses.guided(real, x_u, u, cond, uncond, guidance)
        x_fake = fake(x_u, u, cond)
        scale = losses.per_sample_mean((x - x_real).abs()).clamp(min=1e-5)
        target = x + x_real - x_fake
    return (distance(x, target, c) / scale).mean(), critic_fit(x, x_real, x_fake)


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    real, process = model.teacher, model.process
    G = run.train("student", model.make("student", lora=cfg.lora, init=cfg.init_student,
                                        gradient_checkpointing=cfg.gradient_checkpointing), cfg.lr)
    fake = run.train("critic", model.make("critic", lora=cfg.lora, gradient_checkpointing=cfg.gradient_checkpointing), cfg.critic_lr)
    data = model.batches()
    K = len(cfg.student_times)
    knots = torch.tensor([*cfg.student_times, 0.0]) * process.t_max
    run.watch(G, knots[:K], "ode", multiple_of=K)

    def student_input(batch):
        """(x_t, t) at a random knot, the next knot s and a time u between them."""
        depth = batch.randint(K)
        x_t, t = trajectory(G, batch.randn(), batch.cond, knots[:K], depth)
        s = knots.to(t)[depth + 1]
        low, high = s.clamp(min=cfg.t_min * process.t_max), t.clamp(max=cfg.t_max * process.t_max)
        return x_t, t, s, times.uniform(batch.rand(), low, high)

    def critic_loss(batch):
        x_t, t, s, u = student_input(batch)
        with torch.no_grad():
            x, eps = predict(G, x_t, t, batch.cond)
        loss = critics.denoising(fake, x, noised_on(process, eps, s, u, batch.randn()), u, batch.cond)
        return {"loss": loss, "denoising": loss}

    def student_loss(batch):
        x_t, t, s, u = student_input(batch)
        x, eps = predict(G, x_t, t, batch.cond)
        x_u = process.noise(x, noised_on(process, eps, s, u, batch.randn()), u)
        loss, health = student_objective(x, x_u, u, batch.cond, batch.uncond, real, fake, model.guidance, cfg.huber)
        return {"loss": loss, **health}

    for _ in run.loop():
        for _ in range(cfg.critic_updates):
            run.minimize(fake, critic_loss, data)
        run.minimize(G, student_loss, data)
    return run


if __name__ == "__main__":
    cli(main, Config)
