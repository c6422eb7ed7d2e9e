"""SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation
Thuan Hoang Nguyen, Anh Tran
CVPR 2024 -- https://arxiv.org/abs/2312.05239

    G: one-step student    real: frozen teacher    fake: the teacher with a LoRA, the score of G's own samples
    repeat
        x = G(z);  G     <-  min  < x, sg[ sigma^2 (eps_real^w(x_t, t) - eps_fake^w(x_t, t)) ] >    variational score distillation
        x = G(z);  fake  <-  min  |eps_fake(x_t, t) - eps|^2,  the prompt dropped for a tenth of the samples
    where ^w is classifier-free guidance, applied to both scores: z is all the data there is (image-free).
    With --guidance_range LO HI every sample draws its own w, the same for both scores: PG-SwiftBrush
    (SNOOPI: Viet Nguyen et al., https://arxiv.org/abs/2412.02687), which broadens both and steadies the training.

Departures from the paper: guidance on both scores cancels at the fixed point of an exact critic, which is the unguided
teacher; the quick start therefore leaves the critic unguided (--critic_guidance 1, as VSD and DMD do) and the recipes guide
both; the critic draws prompts and samples of its own (--share_sample, set in sd21: it takes the student's, as the official code
does, which saves one of two samplings); its loss is a v-MSE, finite at both ends of zero-terminal-SNR
schedules (the official code weights the eps-MSE by alpha^2); its LoRA has alpha = rank (the official alpha is 108 at rank 64);
w is drawn per sample, not per iteration; SNOOPI's clamped CLIP loss is left out, and so is NASA, its negative prompts by
attention subtraction: it changes sampling, not training. The default is the quick start: batch 32, no first moment in Adam,
larger rates.

    accelerate launch train_scripts/train_swiftbrush.py                                # the embedded teacher, minutes on a CPU
    accelerate launch train_scripts/train_swiftbrush.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --data prompts.txt --recipe snoopi-sd15
    python train_scripts/train_swiftbrush.py --teacher toy --steps 400                 # seconds
"""
from dataclasses import dataclass
from typing import ClassVar

import torch

from zoo import backbones, critics, losses, rollout, times
from zoo.health import critic_fit
from zoo.process import per_sample
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "swiftbrush"
    recipes: ClassVar[dict] = {
        "sd21": dict(source="Nguyen & Tran 2024, Sec. 4.1; official script (batch 64, LoRA rank 64, guidance 4.5 on both scores)", batch=64, lr=1e-6,
                     critic_lr=1e-3, guidance=4.5, critic_guidance=0.0, share_sample=True, betas=(0.9, 0.999), max_grad_norm=1.0, time_budget=0.0,
                     steps=65_000),
        "snoopi-sd15": dict(source="Nguyen et al. 2024 (SNOOPI), Sec. 4 (batch 64, w in [0.5, 4], 60K iterations), without its CLIP loss", batch=64,
                            lr=1e-6, critic_lr=1e-3, guidance_range=(0.5, 4.0), critic_guidance=0.0, betas=(0.9, 0.999), time_budget=0.0, steps=60_000),
    }
    steps: int = 1000
    time_budget: float = 150.0
    lr: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.99)
    critic_lora: int = 64                  # rank of the critic's adapter, whatever the student trains
    critic_lr: float = 1e-3
    critic_guidance: float = 1.0           # scale of the critic's score; 0: the teacher's, as the official code
    guidance_range: tuple[float, float] = (0.0, 0.0)    # SNOOPI: draw w from it; (0, 0): one fixed scale
    drop: float = 0.1                      # fraction of the critic's samples without their prompt
    share_sample: bool = False             # the critic trains on the student's sample: one sampling instead of two
    t_min: float = 0.02                    # range of the student's renoising times
    t_max: float = 0.98


def vsd_direction(x_t, t, cond, uncond, real, fake, w, w_fake):
    """Minus the gradient of eq. 5, sigma^2 (eps_fake - eps_real) = alpha sigma (D_real - D_fake), and the two estimates."""
    with torch.no_grad():
        x_real = losses.guided(real, x_t, t, cond, uncond, w)
        x_fake = losses.guided(fake, x_t, t, cond, uncond, w_fake)
        alpha, sigma, _, _ = real.process.coeffs(t)
        return per_sample(alpha * sigma, x_t) * (x_real - x_fake), x_real, x_fake


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    real, process = model.teacher, model.process
    low, high = cfg.guidance_range
    G = run.train("student", model.make("student", lora=cfg.lora, init=cfg.init_student,
                                        gradient_checkpointing=cfg.gradient_checkpointing), cfg.lr)
    fake = run.train("critic", model.make("critic", lora=cfg.critic_lora, gradient_checkpointing=cfg.gradient_checkpointing), cfg.critic_lr)
    data = model.batches()
    run.watch(G, torch.tensor([process.t_max]), follows_teacher=cfg.critic_guidance == 1 and high <= low)      # on both scores it cancels

    def sample(batch):
        z = batch.randn()
        t = rollout.expand(process.t_max, z)
        return G(rollout.start(process, z, t), t, batch.cond)

    def student_loss(batch):
        x = sample(batch)
        if cfg.share_sample:
            batch.made = x.detach()
            shared.append(batch)
        t = times.uniform(batch.rand(), cfg.t_min, cfg.t_max) * process.t_max
        x_t = process.noise(x, batch.randn(), t)
        w = times.uniform(batch.rand(), low, high) if high > low else model.guidance
        direction, x_real, x_fake = vsd_direction(x_t, t, batch.cond, batch.uncond, real, fake, w, cfg.critic_guidance or w)
        return {"loss": losses.along(x, direction), **(critic_fit(x, x_real, x_fake) if cfg.critic_guidance == 1 else {})}

    def critic_loss(batch):
        x = getattr(batch, "made", None)
        if x is None:
            with torch.no_grad():
                x = sample(batch)
        cond = losses.without_prompt(batch.cond, batch.uncond, batch.rand() < cfg.drop)
        t = batch.rand().clamp(min=1e-3) * process.t_max
        denoise = critics.denoising(fake, x, batch.randn(), t, cond)
        return {"loss": denoise, "denoising": denoise}

    for _ in run.loop():
        shared = []
        run.minimize(G, student_loss, data)
        run.minimize(fake, critic_loss, shared or data)
    return run


if __name__ == "__main__":
    cli(main, Config)
