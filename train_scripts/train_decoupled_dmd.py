"""Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield
Dongyang Liu, Peng Gao, David Liu, Ruoyi Du, Zhen Li, Qilong Wu, Xin Jin, Sihan Cao, Shifeng Zhang, Hongsheng Li, Steven Hoi
ICLR 2026 -- https://arxiv.org/abs/2511.22677

    G: few-step student    real, real_0: frozen teacher with and without its condition    fake: the critic, a score of G's own samples
    The guided DMD direction splits exactly:  fake - real_w  =  [fake - real]  -  (w - 1) [real - real_0]
    repeat
        k times   x = G(z, s);  fake  <-  min  |fake(x_t, t) - x|^2,  t over the whole range
        once      x = G(z, s);  G     <-  min  < x, sg[ DM(x_t) - CA(x_r) ] >
            DM = (fake - real)(x_t) / |x - real|_1              the shield: distribution matching,  t ~ U(0, 1)
            CA = (w - 1) (real - real_0)(x_r) / |x - real|_1    the spear: guidance augmentation,   r ~ U(0, s)
    where z is noise (s = 1) or G's own re-noised output at a later student time s (backward simulation): guidance acts only
    on noise levels that the student has yet to pass.

Departures from the paper: no training code, rates or normalisers are published. Here each term is divided by its own
|x - real| at its own time, and both times are uniform; the paper compares other schedules, which one shared time with the
guided teacher (train_dmd.py) represents here. As in train_dmd.py the critic's denoising loss is a v-MSE, the student time is
the earlier of two uniform draws since one student serves 1, 2 and 4 steps, the critic is told it, and the student is averaged
(EMA). The default is the quick start: batch 32, two critic updates, no first moment in Adam, larger rates. With guidance 1 the spear is nothing.

    accelerate launch train_scripts/train_decoupled_dmd.py                             # the embedded teacher, minutes on a CPU
    accelerate launch train_scripts/train_decoupled_dmd.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --lora 64 --data prompts.txt
    python train_scripts/train_decoupled_dmd.py --teacher toy --steps 400              # seconds
"""
from dataclasses import dataclass
from typing import ClassVar

import torch

from zoo import backbones, critics, losses, rollout, times
from zoo.health import critic_fit
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "decoupled_dmd"
    recipes: ClassVar[dict] = {
        "cdm": dict(source="CDM (arXiv 2605.06376), which trains the same two terms on SD3-M; Decoupled DMD itself publishes no settings",
                    batch=128, lr=1e-5, critic_lr=5e-6, critic_updates=2, guidance=8.0, betas=(0.9, 0.999), weight_decay=1e-4,
                    max_grad_norm=1.0, ema=0.999, time_budget=0.0, steps=4000),
    }
    steps: int = 1000
    time_budget: float = 150.0
    lr: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.99)
    critic_lr: float = 4e-4
    critic_updates: int = 2                # per student update
    student_times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)    # 1.0 alone trains a one-step student
    tell_critic: bool = True               # the critic is given the student time its sample was made at, where the network takes a second scalar
    t_min: float = 0.02                    # range of the renoising times; the spear's ends at the student time
    t_max: float = 0.98


@torch.no_grad()
def augmentation(x, x_r, r, cond, uncond, real, guidance):
    """CA, the spear: what guidance adds to the teacher at (x_r, r)."""
    x_real = real(x_r, r, cond)
    return losses.normalised((guidance - 1) * (x_real - real(x_r, r, uncond)), x, x_real)


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    real, process = model.teacher, model.process
    tell = cfg.tell_critic and model.takes_second_scalar
    G = run.train("student", model.make("student", lora=cfg.lora, init=cfg.init_student,
                                        gradient_checkpointing=cfg.gradient_checkpointing), cfg.lr)
    fake = run.train("critic", model.make("critic", lora=cfg.lora, two_time=tell,
                                          gradient_checkpointing=cfg.gradient_checkpointing), cfg.critic_lr)
    data = model.batches()
    knots = torch.tensor(cfg.student_times) * process.t_max
    run.watch(G, knots)

    def student_input(batch):
        depth = torch.minimum(batch.randint(len(knots)), batch.randint(len(knots)))
        return rollout.backward_simulation(G, batch.randn(), batch.cond, knots, depth, batch.randn)

    def critic_loss(batch):
        z, s = student_input(batch)
        with torch.no_grad():
            x = G(z, s, batch.cond)
        t = batch.rand().clamp(min=1e-3) * process.t_max
        loss = critics.denoising(fake, x, batch.randn(), t, batch.cond, s if tell else None)
        return {"loss": loss, "denoising": loss}

    def student_loss(batch):
        z, s = student_input(batch)
        x = G(z, s, batch.cond)
        low, high = cfg.t_min * process.t_max, cfg.t_max * process.t_max
        t = times.uniform(batch.rand(), low, high)
        x_t = process.noise(x, batch.randn(), t)
        direction, x_real, x_fake = losses.dmd_direction(x, x_t, t, batch.cond, batch.uncond, real, fake, 1.0, s if tell else None)   # DM, the shield
        if model.guidance != 1:
            r = times.uniform(batch.rand(), low, s.clamp(max=high))
            direction = direction + augmentation(x, process.noise(x, batch.randn(), r), r, batch.cond, batch.uncond, real, model.guidance)
        return {"loss": losses.along(x, direction), **critic_fit(x, x_real, x_fake)}

    for _ in run.loop():
        for _ in range(cfg.critic_updates):
            run.minimize(fake, critic_loss, data)
        run.minimize(G, student_loss, data)
    return run


if __name__ == "__main__":
    cli(main, Config)
