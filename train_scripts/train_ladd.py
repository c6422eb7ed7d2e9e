"""LADD: Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation
Axel Sauer, Frederic Boesel, Tim Dockhorn, Andreas Blattmann, Patrick Esser, Robin Rombach
SIGGRAPH Asia 2024 -- https://arxiv.org/abs/2403.12015

    G: few-step student    F_k: features of the frozen teacher at depth k    D_k: a small head on F_k, for each k
    repeat
        x = G(y_s, s),  y ~ data, s ~ student times (s = 1 is pure noise);  t = sigmoid(N(m, 1));  x_t, y_t: both noised to t
        D  <-  min  sum_k  sp(-D_k(F_k(y_t))) + sp(D_k(F_k(x_t))) + gamma |D_k(F_k(y_t)) - D_k(F_k(y_t + a n))|^2
        G  <-  min  sum_k  sp(-D_k(F_k(x_t)))                                    through the teacher to x
    where sp is softplus. Nothing else: no distillation loss. With --synthetic N the data is N samples of the guided teacher
    itself (the paper's way). With --student_times 1 --freeze_convolutions it is the setting of GDD-I (Zheng & Yang,
    https://arxiv.org/abs/2405.20750): a one-step student whose convolutions keep the teacher's weights.

Departures from the paper: the loss is softplus, steadier here (--adversarial hinge is the paper's); real and generated samples
share t and noise; the heads see neither t nor the pooled prompt, which the teacher's features carry, but are told s: else only
the mixture of samples over all s is matched, and the late times drift; features are those of a UNet's down and middle blocks,
where the pass through the teacher ends (the paper's: every block of a transformer); the approximate R1 term is FastGen's, its
weight ours; for the first --easy_steps the late times are drawn, then mostly s = 1 (the weights and the paper's 500 such steps
were read in a public re-implementation, github.com/vionwinnie/Z-Image-LADD-distillation, TRAINING_GUIDE.md, not in the paper).
Of GDD: the discriminator is LADD's, not a projected GAN on ImageNet features. The default is the quick start: batch 32, no
first moment in Adam, larger rates.

    accelerate launch train_scripts/train_ladd.py                                      # the embedded teacher, minutes on a CPU
    accelerate launch train_scripts/train_ladd.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --data prompts.txt --synthetic 20000
    python train_scripts/train_ladd.py --teacher toy --steps 400                       # seconds
"""
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from zoo import backbones, critics, times
from zoo.data.pairs import stored
from zoo.errors import UserError
from zoo.process import RectifiedFlow
from zoo.run import Run, RunConfig, cli

# What GDD-I freezes, in the names of diffusers: convolutions and projections, but not norms, time and skip layers, queries, keys, values.
CONVOLUTIONS = r"conv_in|conv1|conv2|(down|up)samplers|proj_in|proj_out|to_out"
LOSSES = {"hinge": (critics.hinge_discriminator, critics.hinge_generator), "softplus": (critics.discriminator, critics.generator)}


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "ladd"
    recipes: ClassVar[dict] = {
        "fastgen": dict(source="NVIDIA FastGen, LADD of Wan 1.3B (rates, softplus, approximate R1); easy steps: see above", lr=2e-6, critic_lr=4e-6,
                        adversarial="softplus", r1=0.1, easy_steps=500, betas=(0.9, 0.999), time_budget=0.0),
        "gdd-ffhq": dict(source="Zheng & Yang 2024, train.sh (FFHQ 64, 10M images: Adam (0, .99), 2e-5 and 4e-5, softplus), with LADD's discriminator",
                         batch=256, lr=2e-5, critic_lr=4e-5, betas=(0.0, 0.99), adversarial="softplus", student_times=(1.0,), time_weights=(1.0,),
                         easy_steps=0, freeze_convolutions=True, time_budget=0.0, steps=39_000),
    }
    steps: int = 1000
    time_budget: float = 150.0
    lr: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.99)
    critic_lr: float = 4e-4
    adversarial: Literal["softplus", "hinge"] = "softplus"
    r1: float = 1.0                        # gamma of the approximate R1 term
    r1_noise: float = 0.1                  # a
    mean: float = 1.0                      # m, std: logit-normal of the discriminator's flow time; lower looks at texture, higher at layout
    std: float = 1.0
    student_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    time_weights: tuple[float, ...] = (0.7, 0.1, 0.1, 0.1)       # how often each is drawn
    tell_critic: bool = True               # the heads are told the student time a sample was made at
    easy_steps: int = 50                   # for the first steps only the later half of the times
    synthetic: int = 0                     # train on so many stored samples of the guided teacher instead of images
    synthetic_steps: int = 25              # sampling steps of each
    freeze_convolutions: bool = False      # GDD-I


def chosen(u, weights):
    """Indices [B] drawn with the given weights from uniform numbers u [B]."""
    total = torch.tensor(weights, dtype=torch.float64, device=u.device).cumsum(0)
    return torch.searchsorted(total / total[-1], u.double(), right=True).clamp(max=len(weights) - 1)


def adversarial_loss(loss, *logits):
    """`loss` of the logits of each depth (lists over k), averaged over depths."""
    return torch.stack([loss(*depth) for depth in zip(*logits, strict=True)]).mean()


def approximate_r1(logits, moved):
    """|D(y) - D(y + a n)|^2, averaged over positions and depths: a finite-difference R1."""
    return torch.stack([(a - b).square().mean() for a, b in zip(logits, moved, strict=True)]).mean()


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    process, knots = model.process, torch.tensor(cfg.student_times) * model.process.t_max
    G = run.train("student", model.make("student", lora=cfg.lora, init=cfg.init_student, gradient_checkpointing=cfg.gradient_checkpointing,
                                        frozen=CONVOLUTIONS if cfg.freeze_convolutions else ""), cfg.lr)
    D = run.train("critic", model.discriminator(cfg.tell_critic), cfg.critic_lr)
    run.watch(G, knots, follows_teacher=cfg.synthetic > 0)
    data = stored(run, model.teacher, cfg.synthetic, cfg.synthetic_steps, model.guidance) if cfg.synthetic else model.batches(images=True)
    weights = cfg.time_weights[: len(knots)]
    if len(weights) < len(knots):
        raise UserError(f"{len(knots)} student times and {len(weights)} weights: give --time_weights one number for each")
    late = [w * (k >= len(knots) // 2) for k, w in enumerate(weights)]
    for_critic, for_student = LOSSES[cfg.adversarial]

    def sample(batch):
        s = knots.to(batch.x0)[chosen(batch.rand(), late if run.step < cfg.easy_steps else weights)]
        return G(process.noise(batch.x0, batch.randn(), s), s, batch.cond), s

    def judging(batch, s):
        """D of clean samples (moved by `shift` when noised), all of one batch at the same times and noise."""
        t = process.time(RectifiedFlow().angle(times.logit_normal(batch.rand(), cfg.mean, cfg.std))).clamp(max=process.t_max)
        eps, at = batch.randn(), s if cfg.tell_critic else None
        return lambda x, shift=0: D.net.judge(process.noise(x, eps, t) + shift, t, batch.cond, at)

    def critic_loss(batch):
        with torch.no_grad():
            x, s = sample(batch)
        judge = judging(batch, s)
        real, fake = judge(batch.x0), judge(x)
        loss = adversarial = adversarial_loss(for_critic, real, fake)
        if cfg.r1:
            loss = loss + cfg.r1 * approximate_r1(real, judge(batch.x0, cfg.r1_noise * batch.randn()))
        return {"loss": loss, "adversarial": adversarial, "real": real[-1].mean(), "fake": fake[-1].mean()}

    def student_loss(batch):
        x, s = sample(batch)
        return {"loss": adversarial_loss(for_student, judging(batch, s)(x))}

    for _ in run.loop():
        run.minimize(D, critic_loss, data)
        run.minimize(G, student_loss, data)
    return run


if __name__ == "__main__":
    cli(main, Config)
