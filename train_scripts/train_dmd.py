"""DMD2: Improved Distribution Matching Distillation for Fast Image Synthesis
Tianwei Yin, Michael Gharbi, Taesung Park, Richard Zhang, Eli Shechtman, Fredo Durand, William T. Freeman
NeurIPS 2024 -- https://arxiv.org/abs/2405.14867

    G: few-step student    real: frozen teacher    fake, D: the critic, a score of G's own samples with a GAN head
    repeat
        k times   x = G(z);  fake, D  <-  min  |fake(x_t, t) - x|^2 + w_D [ sp(D(x_t)) + sp(-D(y_t)) ],  y ~ data
        once      x = G(z);  G        <-  min  < x, sg[fake(x_t, t) - real_w(x_t, t)] > / |x - real_w|_1 + w_G sp(-D(x_t))
    where z is noise, or G's own re-noised output at a later student time (backward simulation, Sec. 4.5), real_w is the
    guided teacher, and sp is softplus.

Departures from the paper: each of the critic's k updates draws samples of its own (--share_sample, set in the recipes: the first
takes the student's, as the official code does, which saves one sampling of k + 1); the critic's denoising loss is a v-MSE,
finite at both ends of zero-terminal-SNR schedules; one student serves 1, 2 and 4 steps, so each sample has a student time of
its own, the earlier of two uniform draws, and the critic is told it (--tell_critic: one score for the mixture of all times lets
late steps overshoot what early ones lack); the student is averaged (EMA); the discriminator's real and generated samples carry
the same prompts. The default is the quick start: batch 32, two critic updates, no GAN (no real data), larger rates; recipes are
the paper's.

    accelerate launch train_scripts/train_dmd.py                                       # the embedded teacher, minutes on a CPU
    accelerate launch train_scripts/train_dmd.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --lora 64 --data prompts.txt
    python train_scripts/train_dmd.py --teacher toy --steps 400                        # seconds
"""
from dataclasses import dataclass
from typing import ClassVar

import torch

from zoo import backbones, critics, losses, rollout, times
from zoo.health import critic_fit
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "dmd"
    recipes: ClassVar[dict] = {
        # The scripts in tianweiy/DMD2 experiments/: 64 GPUs x 32 and x 2. Their iterations train the critic each time and the student in one of 10 or 5
        # (39,000, 2,000 and 19,000 of them), steps are student updates; their warm-up, counted once per GPU, is over after 8 iterations and left out.
        "sd15": dict(source="Yin et al. 2024; official script laion6.25_sd_baseline_8node_guidance1.75_lr1e-5_seed10_dfake10_from_scratch.sh",
                     batch=2048, lr=1e-5, critic_lr=1e-5, critic_updates=10, guidance=1.75, student_times=(1.0,), share_sample=True,
                     betas=(0.9, 0.999), weight_decay=0.01, time_budget=0.0, steps=3900),
        "sd15-gan": dict(source="Yin et al. 2024; its continuation with a GAN, ..._lr5e-7_seed10_dfake10_diffusion1000_gan1e-3_noode_resume_fixdata.sh: give "
                                "--init_student", batch=2048, lr=5e-7, critic_lr=5e-7, critic_updates=10, gan=1e-3, guidance=1.75, student_times=(1.0,),
                         share_sample=True, betas=(0.9, 0.999), weight_decay=0.01, time_budget=0.0, steps=200),
        "sdxl-4step": dict(source="Yin et al. 2024, Sec. 5.2; official SDXL script", batch=128, lr=5e-7, critic_lr=5e-7, critic_updates=5,
                           gan=5e-3, guidance=8.0, share_sample=True, betas=(0.9, 0.999), weight_decay=0.01, time_budget=0.0, steps=3800),
        "sdxl-4step-lora": dict(source="DMD2, official SDXL LoRA script ..._lr5e-5_denoising4step_..._scratch_lora.sh (its critic has full weights, its LoRA "
                                       "counts an eighth: alpha 8; its length is not published)", batch=128, lr=5e-5, critic_lr=5e-5, critic_updates=5,
                                gan=5e-3, guidance=8.0, share_sample=True, lora=64, betas=(0.9, 0.999), weight_decay=0.01, time_budget=0.0),
    }
    steps: int = 1000
    time_budget: float = 150.0
    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.99)
    critic_lr: float = 2e-4
    critic_updates: int = 2                # per student update: two time-scale update rule, Sec. 4.2 (the paper's is 5)
    gan: float = 0.0                       # weight of the student's GAN loss, Sec. 4.3; > 0 needs images
    gan_critic: float = 1e-2               # weight of the discriminator loss beside the denoising loss
    student_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)    # Sec. 4.4; 1.0 alone trains a one-step student
    share_sample: bool = False             # the critic's first update trains on the sample of the student's: one sampling less
    tell_critic: bool = True               # the critic is given the student time its sample was made at, where the network takes a second scalar
    t_min: float = 0.02                    # range of the student's renoising times
    t_max: float = 0.98


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    real, process = model.teacher, model.process
    tell = cfg.tell_critic and model.takes_second_scalar
    G = run.train("student", model.make("student", lora=cfg.lora, init=cfg.init_student,
                                        gradient_checkpointing=cfg.gradient_checkpointing), cfg.lr)
    fake = run.train("critic", model.make("critic", lora=cfg.lora, head=cfg.gan > 0, two_time=tell,
                                          gradient_checkpointing=cfg.gradient_checkpointing), cfg.critic_lr)
    data = model.batches(images=cfg.gan > 0)
    knots = torch.tensor(cfg.student_times) * process.t_max
    run.watch(G, knots)

    def student_input(batch):
        depth = torch.minimum(batch.randint(len(knots)), batch.randint(len(knots)))
        return rollout.backward_simulation(G, batch.randn(), batch.cond, knots, depth, batch.randn)

    def renoised(batch, x):
        t = times.uniform(batch.rand(), cfg.t_min, cfg.t_max) * process.t_max
        return process.noise(x, batch.randn(), t), t

    def critic_loss(batch):
        x, at = getattr(batch, "made", (None, None))
        if x is None:
            z, at = student_input(batch)
            with torch.no_grad():
                x = G(z, at, batch.cond)
        at = at if tell else None
        t = batch.rand().clamp(min=1e-3) * process.t_max
        loss = denoise = critics.denoising(fake, x, batch.randn(), t, batch.cond, at)
        if cfg.gan:
            x_t, t = renoised(batch, x)
            y_t, s = renoised(batch, batch.x0)
            adversarial = critics.discriminator(*critics.logits(fake, [(y_t, s), (x_t, t)], batch.cond, at))
            loss = denoise + cfg.gan_critic * adversarial
            return {"loss": loss, "denoising": denoise, "adversarial": adversarial}
        return {"loss": loss, "denoising": denoise}

    def student_loss(batch):
        z, at = student_input(batch)
        x = G(z, at, batch.cond)
        if cfg.share_sample:
            batch.made = x.detach(), at
            shared.append(batch)
        at = at if tell else None
        x_t, t = renoised(batch, x)
        score, logit = fake(x_t, t, batch.cond, r=at, logits=True) if cfg.gan else (fake, None)         # one call for both
        direction, x_real, x_fake = losses.dmd_direction(x, x_t, t, batch.cond, batch.uncond, real, score, model.guidance, at)  # eq. 2
        loss = losses.along(x, direction)
        if cfg.gan:
            loss = loss + cfg.gan * critics.generator(logit)
        return {"loss": loss, **critic_fit(x, x_real, x_fake)}

    for _ in run.loop():
        shared = []
        if cfg.share_sample:
            run.minimize(G, student_loss, data)
        for k in range(cfg.critic_updates):
            run.minimize(fake, critic_loss, shared if shared and k == 0 else data)
        if not cfg.share_sample:
            run.minimize(G, student_loss, data)
    return run


if __name__ == "__main__":
    cli(main, Config)
