"""DMD: One-step Diffusion with Distribution Matching Distillation
Tianwei Yin, Michael Gharbi, Richard Zhang, Eli Shechtman, Fredo Durand, William T. Freeman, Taesung Park
CVPR 2024 -- https://arxiv.org/abs/2311.18828

    G: one-step student    real_w: guided frozen teacher    fake: the critic, a score of G's own samples
    before: stored pairs (z', c', y'), y' = the endpoint of real_w's deterministic sampler from noise z'
    repeat
        x = G(z), z ~ N(0, 1);  x' = G(z')
        G     <-  min  < x, sg[ alpha_t (fake(x_t, t) - real_w(x_t, t)) ] > / |x - real_w|_1 + lambda d(x', y')    eq. 7-9
        fake  <-  min  |fake(x_t, t) - sg[x]|^2                                                                   eq. 6
    The gradient of the Kullback-Leibler divergence matches the distributions; the regression keeps every mode.

Departures from the paper: d is the mean square in the student's own space by default; --metric perceptual is the
paper's LPIPS with the blocks of another network (EfficientNet-Lite0, no learnt weights; LPIPS where installed), on decoded samples at 96 pixels;
the critic's denoising loss is a v-MSE, finite at both ends of zero-terminal-SNR schedules; the critic steps first, on samples
of its own (--share_sample, set in the recipe: second, on the student's, as in the paper's Alg. 1); the pairs come from DDIM
(the paper: Heun, PNDM); the student is averaged (EMA). The default is the quick start: batch 32, a few hundred pairs, no first
moment in Adam, larger rates; the recipe is the paper's.

    accelerate launch train_scripts/train_dmd_pairs.py                                 # the embedded teacher, minutes on a CPU
    accelerate launch train_scripts/train_dmd_pairs.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --data prompts.txt --recipe sd15
    python train_scripts/train_dmd_pairs.py --teacher toy --steps 400                  # seconds
"""
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from zoo import backbones, critics, losses, rollout, times
from zoo.data import pairs
from zoo.health import critic_fit
from zoo.process import per_sample
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "dmd_pairs"
    recipes: ClassVar[dict] = {
        "sd15": dict(source="Yin et al. 2023, Sec. 4 and App. (batch 2304, lr 1e-5, w = 3, 20K steps, 500K pairs of 50 sampling steps, LPIPS)",
                     batch=2304, lr=1e-5, critic_lr=1e-5, guidance=3.0, regression=0.25, metric="perceptual", pairs=500_000, pair_steps=50, share_sample=True,
                     betas=(0.9, 0.999), weight_decay=0.01, time_budget=0.0, steps=20_000),
    }
    steps: int = 1000
    time_budget: float = 150.0             # of training: the pairs are made before it
    lr: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.99)
    critic_lr: float = 4e-4
    pairs: int = 512                       # stored teacher pairs
    pair_steps: int = 12                   # sampling steps of the teacher for a pair
    pairs_dir: str = ""                    # a store of make_pairs.py to read instead
    regression: float = 0.25               # lambda, weight of the regression on the pairs
    metric: Literal["mse", "perceptual"] = "mse"    # its distance d
    share_sample: bool = False             # the critic trains on the student's sample: one sampling less
    t_min: float = 0.02                    # range of the student's renoising times
    t_max: float = 0.98


def matching_direction(x, x_t, t, cond, uncond, real, fake, guidance):
    """Eq. 7 with the weight of eq. 8, on x0: ascent of log p_real - log p_fake, alpha_t (D_real - D_fake) / mean |x - D_real|."""
    direction, x_real, x_fake = losses.dmd_direction(x, x_t, t, cond, uncond, real, fake, guidance)
    return per_sample(real.process.coeffs(t)[0], x) * direction, critic_fit(x, x_real, x_fake)


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    real, process = model.teacher, model.process
    G = run.train("student", model.make("student", lora=cfg.lora, init=cfg.init_student,
                                        gradient_checkpointing=cfg.gradient_checkpointing), cfg.lr)
    fake = run.train("critic", model.make("critic", lora=cfg.lora, gradient_checkpointing=cfg.gradient_checkpointing), cfg.critic_lr)
    run.watch(G, [process.t_max])
    distance = pairs.distance(model, cfg.metric)
    prompts, stored = model.batches(), pairs.stored(run, real, cfg.pairs, cfg.pair_steps, model.guidance, cfg.pairs_dir)
    data = backbones.Source(max(len(prompts), len(stored)), lambda index: prompts.get(index % len(prompts)) | {"pair": stored.get(index % len(stored))},
                            prompts.order)

    def generate(z, cond):
        t = rollout.expand(process.t_max, z)
        return G(rollout.start(process, z, t), t, cond)

    def critic_loss(batch):
        x = getattr(batch, "made", None)
        if x is None:
            with torch.no_grad():
                x = generate(batch.randn(), batch.cond)
        t = batch.rand().clamp(min=1e-3) * process.t_max
        loss = critics.denoising(fake, x, batch.randn(), t, batch.cond)
        return {"loss": loss, "denoising": loss}

    def student_loss(batch):
        x = generate(batch.randn(), batch.cond)
        if cfg.share_sample:
            batch.made = x.detach()
            shared.append(batch)
        t = times.uniform(batch.rand(), cfg.t_min, cfg.t_max) * process.t_max
        x_t = process.noise(x, batch.randn(), t)
        direction, health = matching_direction(x, x_t, t, batch.cond, batch.uncond, real, fake, model.guidance)
        regression = distance(generate(batch.pair["z"], batch.pair["cond"]), batch.pair["x0"]).mean()
        return {"loss": losses.along(x, direction) + cfg.regression * regression, "regression": regression, **health}

    for _ in run.loop():
        shared = []
        if cfg.share_sample:
            run.minimize(G, student_loss, data)
        run.minimize(fake, critic_loss, shared or data)
        if not cfg.share_sample:
            run.minimize(G, student_loss, data)
    return run


if __name__ == "__main__":
    cli(main, Config)
