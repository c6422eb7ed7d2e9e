"""Few-Step Diffusion via Score identity Distillation (SiD)
Mingyuan Zhou, Yi Gu, Zhendong Wang
arXiv 2025 -- https://arxiv.org/abs/2505.12674

    G: few-step student    real: frozen teacher    fake: the critic, one score of the uniform mixture of all steps' outputs
    D^k = D_empty + k (D_prompt - D_empty): a score network read at guidance scale k
    repeat
        x = G(z);  fake  <-  min  |fake^k1(x_t, t) - x|^2                                                prompts dropped at 10 %
        x = G(z);  G     <-  min  w (real^k4 - fake^k2)^T [ (real^k4 - x) - alpha (real^k4 - fake^k2) ],  w = 1 / sg|x - real^k4|_1
    where z is noise or G's own re-noised output at a random one of the student times, without gradient between steps, and the
    gradient of the second line flows through real(x_t) and fake(x_t) to x: with alpha = 1/2 it is that of the Fisher
    divergence, with alpha = 1 that of the Fisher divergence under a frozen law of x_t.
    --cfg long-short: k1 = k2 = k4 = guidance.  zero: k1 = k2 = 0 (empty prompt), k4 = 1.  anti: k1 = 1, k2 = anti_scale < 0, k4 = 1.

Departures from the paper: data-free, without the adversarial term of its image-supervised variant (the paper gives zero and anti
real images; here they are the pure score losses, whose guidance is implicit and finite); the student starts at the noisiest
time and not at timestep 625, so that stock schedulers serve it; all guidance scales are counted as D_empty + k (D_prompt -
D_empty); the loss is a mean over elements (the official code: 100 x the sum); the critic's denoising loss is a v-MSE; the
student is averaged. The default is the quick start: batch 32, four critic updates per student update, larger rates.

    accelerate launch train_scripts/train_sid.py                                       # the embedded teacher, minutes on a CPU
    accelerate launch train_scripts/train_sid.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --lora 64 --data prompts.txt --guidance 2
    python train_scripts/train_sid.py --teacher toy --steps 400                        # seconds
"""
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from zoo import backbones, losses, rollout, times
from zoo.health import critic_fit
from zoo.process import per_sample
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "sid"
    recipes: ClassVar[dict] = {
        "sd15": dict(source="Zhou et al. 2025, which keeps SiD-LSG's settings (arXiv 2406.01561, official code: guidance 1.5, 2, 3 or 4.5); "
                            "the length of training is not stated: give --steps",
                     batch=512, lr=1e-6, critic_lr=1e-6, critic_updates=1, betas=(0.0, 0.999), alpha=1.0, guidance=1.5, ema=0.993, time_budget=0.0),
    }
    steps: int = 1000
    time_budget: float = 150.0
    lr: float = 1e-4                       # a fifth of the critic's: the student follows the critic's slope as well as its value
    betas: tuple[float, float] = (0.0, 0.99)
    critic_lr: float = 5e-4
    critic_updates: int = 4                # per student update (the paper's is 1)
    alpha: float = 1.0
    cfg: Literal["long-short", "zero", "anti"] = "long-short"
    anti_scale: float = -0.5               # the critic's guidance scale with --cfg anti
    prompt_drop: float = 0.1               # fraction of the critic's prompts that are dropped
    student_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)    # 1.0 alone trains a one-step student
    t_min: float = 0.02                    # range of the student's renoising times
    t_max: float = 0.98


def scales(cfg, guidance: float) -> tuple[float, float, float]:
    """Guidance scales (k1, k2, k4) of the critic in training, of the critic and of the teacher in the student's loss."""
    return {"long-short": (guidance, guidance, guidance), "zero": (0.0, 0.0, 1.0), "anti": (1.0, cfg.anti_scale, 1.0)}[cfg.cfg]


def at_scale(net, x_t, t, cond, uncond, k, to="x0"):
    """A score network read at guidance scale k; 0 is the empty prompt alone."""
    return net(x_t, t, uncond, to=to) if k == 0 else losses.guided(net, x_t, t, cond, uncond, k, to=to)


def score_identity(x, x_real, x_fake, alpha):
    """SiD's loss element by element, without its weight. x, x_real and x_fake carry gradients."""
    delta = x_real - x_fake
    return delta * ((x_real - x) - alpha * delta)


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    real, process = model.teacher, model.process
    G = run.train("student", model.make("student", lora=cfg.lora, init=cfg.init_student,
                                        gradient_checkpointing=cfg.gradient_checkpointing), cfg.lr)
    fake = run.train("critic", model.make("critic", lora=cfg.lora, gradient_checkpointing=cfg.gradient_checkpointing), cfg.critic_lr)
    data = model.batches()
    knots = torch.tensor(cfg.student_times) * process.t_max
    run.watch(G, knots, follows_teacher=cfg.cfg == "long-short")
    k1, k2, k4 = scales(cfg, model.guidance)

    def student_input(batch):
        return rollout.backward_simulation(G, batch.randn(), batch.cond, knots, batch.randint(len(knots)), batch.randn)

    def critic_loss(batch):
        with torch.no_grad():
            x = G(*student_input(batch), batch.cond)
        t, eps = batch.rand().clamp(min=1e-3) * process.t_max, batch.randn()
        cond = losses.without_prompt(batch.cond, batch.uncond, batch.rand() < cfg.prompt_drop)
        v = at_scale(fake, process.noise(x, eps, t), t, cond, batch.uncond, k1, to="v")
        loss = F.mse_loss(v.float(), process.read(x, eps, t, "v").float())
        return {"loss": loss, "denoising": loss}

    def student_loss(batch):
        x = G(*student_input(batch), batch.cond)
        t = times.uniform(batch.rand(), cfg.t_min, cfg.t_max) * process.t_max
        x_t = process.noise(x, batch.randn(), t)
        x_real = at_scale(real, x_t, t, batch.cond, batch.uncond, k4)
        x_fake = at_scale(fake, x_t, t, batch.cond, batch.uncond, k2)
        scale = losses.per_sample_mean((x - x_real).abs()).clamp(min=1e-5).detach()
        loss = (score_identity(x.float(), x_real.float(), x_fake.float(), cfg.alpha) / per_sample(scale, x)).mean()
        # With zero and anti the critic is no denoiser of x given its prompt, so the ratios of critic_fit say nothing about it.
        return {"loss": loss} | (critic_fit(x, x_real, x_fake) if cfg.cfg == "long-short" else {})

    for _ in run.loop():
        for _ in range(cfg.critic_updates):
            run.minimize(fake, critic_loss, data)
        run.minimize(G, student_loss, data)
    return run


if __name__ == "__main__":
    cli(main, Config)
