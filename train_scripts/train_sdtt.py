"""SDTT: Beyond Autoregression: Fast LLMs via Self-Distillation Through Time
Justin Deschenaux, Caglar Gulcehre
ICLR 2025 -- https://arxiv.org/abs/2410.21035

    q: student, log q(x_l | z) per masked position    p: teacher of the round, at first the given masked diffusion model
    repeat
        x0 ~ data;  t ~ U(0, 1);  z_t = x0 with each token masked with probability t
        z = z_t;  m = 2 times, from t down:  log p(. | z) is the target of every token masked in z;  z = ancestral step of dt
        q  <-  min  mean over the tokens masked in z_t of  KL( q(. | z_t) || target )
        every `round_steps` updates:  p <- q,  dt <- 2 dt                               512, 256, ... down to `last` steps
    so a token's target comes from the sub-step that reveals it, or from the last one, and a student step does the work of two.

With --target shared_noise the target is that of masked consistency distillation (MCD, "Latent Shadows: The Gaussian-Discrete
Duality in Masked Diffusion", https://arxiv.org/abs/2602.00792): z_s, s = t - dt, masks x0 by the same uniform numbers as z_t, as
one Gaussian noise shared over all times would; p sees z_s once, and a token revealed between s and t has x0 itself as target.

The best student under the forward KL (--divergence forward) is the teacher: what few steps need is the sharpening of the reverse
KL, which costs entropy. Judge bits per character beside the entropy, never alone.

Departures from the paper: alpha(t) = 1 - t without the official offset of 1e-3 at the ends, so n steps are n network calls; target
log-probabilities are cut at log `floor`; sub-steps start at t and t - dt (the official code's start elsewhere); times are
independent draws, not strata; the last round goes on until the run ends, and its student stands for `last` steps. MCD's losses are a
reconstruction from its abstract: cross entropy on revealed tokens, the chosen KL on the others, rounds as here.
The default is the quick start: characters, 64 -> 8 steps, larger rates.

    accelerate launch train_scripts/train_sdtt.py                                      # the embedded text teacher, minutes on a CPU
    accelerate launch train_scripts/train_sdtt.py --teacher dllm-hub/ModernBERT-base-chat-v0.1 --data text.txt --length 512 --recipe owt
    python train_scripts/train_sdtt.py --teacher toy --first 8 --last 2 --round_steps 100 --lr 0.02 --steps 300     # seconds
"""
import math
import sys
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from zoo.backbones import text
from zoo.errors import UserError
from zoo.process import per_sample
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "sdtt"
    recipes: ClassVar[dict] = {
        "owt": dict(source="Deschenaux & Gulcehre 2025: 1024 -> 8 steps in 7 rounds of 10K updates, batch 128, reverse KL, EMA 0.9999; warm-up and clipping "
                           "of the official configuration, whose default rate is 3e-4; 6e-5 is that of related distillations",
                    batch=128, lr=6e-5, warmup=2500, max_grad_norm=1.0, ema=0.9999, first=512, last=8, round_steps=10_000, steps=70_000, time_budget=0.0),
    }
    teacher: str = "text"           # text, toy, or a masked language model trained on all mask rates (transformers folder or Hub id)
    data: str = ""                  # a text file (.txt, .txt.gz); default: the teacher's own
    steps: int = 900                # of all rounds together; more go to the last one
    time_budget: float = 150.0
    lr: float = 5e-4
    measure_every: int = 100
    sample_every: int = 100
    length: int = 0                 # tokens of a sequence (0: the teacher's longest)
    target: Literal["teacher", "shared_noise"] = "teacher"       # SDTT, or masked consistency
    divergence: Literal["reverse", "forward"] = "reverse"        # KL(student || target), or KL(target || student)
    first: int = 32                 # steps of the first round's student, whose teacher takes twice as many
    last: int = 8                   # steps of the last round's student
    round_steps: int = 300          # updates of a round
    substeps: int = 2               # m: teacher sub-steps in a student step, and by how much a round divides the steps
    floor: float = 1e-6             # target probabilities are cut here: a reverse KL against zero is infinite


def rounds(step, first, last, updates, m):
    """(steps of the round's student, first update of the round): a pure function of the step."""
    n, begin = first, 0
    while n > last and step >= begin + updates:
        n, begin = n // m, begin + updates
    return n, begin


@torch.no_grad()
def teacher_targets(p, z, t, dt, m, cond, draw):
    """Target log-probabilities [B, L, V]: p's at the sub-step that reveals a token, or at the last one (Sec. 3)."""
    targets = None
    for _ in range(m):
        s = (t - dt).clamp(min=0)
        log_p = p(z, t, cond)
        hidden = (z == p.process.mask_id)[..., None]
        targets = log_p if targets is None else torch.where(hidden, log_p, targets)
        z, t = p.process.step(z, log_p, t, s, draw()), s
    return targets


@torch.no_grad()
def shared_noise_targets(p, x0, u, t, dt, cond):
    """Target log-probabilities [B, L, V] of MCD, p's at z_s, s = t - dt, whose masks share their noise u with z_t; and z_s itself."""
    s = (t - dt).clamp(min=0)
    z = p.process.mask(x0, u, s)
    return p(z, s, cond), z


def kl(log_q, targets, floor, direction):
    """KL [B, L] between student and target, whose probabilities are cut at `floor`."""
    log_p = targets.clamp(min=math.log(floor))
    return (log_q.exp() * (log_q - log_p)).sum(-1) if direction == "reverse" else (log_p.exp() * (log_p - log_q)).sum(-1)


def cross_entropy(log_q, x0):
    """-log q(x0) [B, L]."""
    return -log_q.gather(-1, x0[..., None])[..., 0]


def masked_mean(each, hidden, share=None):
    """Mean of `each` [B, L] over the tokens that are masked in z_t; visible ones never count. share: masked tokens that a part of B sequences
    has on average in the global batch, so that the mean over equal parts is the mean over all masked tokens (None: it is the only part)."""
    return torch.where(hidden, each, 0).sum() / (hidden.sum() if share is None else share).clamp(min=1)


def main(cfg: Config) -> Run:
    model = text.load(cfg.teacher, cfg.data, cfg.guidance, cfg.length)
    process, data, m = model.process, model.batches(), cfg.substeps
    where = lambda step: rounds(step, cfg.first, cfg.last, cfg.round_steps, m)
    if m < 2 or cfg.last < 1 or cfg.first not in {cfg.last * m**i for i in range(20)}:
        raise UserError(f"--first {cfg.first} does not come down to --last {cfg.last} in divisions by --substeps {m}: "
                        f"make it 1, {m}, {m * m}, ... times as large")
    run = Run(cfg, model)
    q = run.train("student", model.make("student", lora=cfg.lora, init=cfg.init_student, gradient_checkpointing=cfg.gradient_checkpointing), cfg.lr)
    p = run.train("round_teacher", model.make("round_teacher", lora=cfg.lora), 0.0)      # never minimised; a trainee, so that checkpoints hold it
    run.watch(q, 1 - torch.arange(cfg.first) / cfg.first, "unmask", multiple_of=cfg.last)

    def loss(batch):
        n, _ = where(run.step)
        t, u, dt = batch.rand(), batch.rand(*model.shape, dtype=torch.float64), 1 / (m * n)
        z = process.mask(batch.x0, u, t)
        log_q = q(z, t, batch.cond)
        if cfg.target == "teacher":
            draw = lambda: batch.rand(*model.shape, dtype=torch.float64)
            each = kl(log_q, teacher_targets(p, z, t, dt, m, batch.cond, draw), cfg.floor, cfg.divergence)
        else:
            targets, z_s = shared_noise_targets(p, batch.x0, u, t, dt, batch.cond)
            revealed = z_s != process.mask_id
            each = torch.where(revealed, cross_entropy(log_q, batch.x0), kl(log_q, targets, cfg.floor, cfg.divergence))
        hidden, everyone = z == process.mask_id, batch.whole()
        all_t, all_u = everyone.rand(), everyone.rand(*model.shape, dtype=torch.float64)
        share = (all_u >= per_sample(process.alpha(all_t), all_u)).sum() * (len(t) / len(all_t))
        entropy = -(log_q.exp() * log_q).sum(-1)
        return {"loss": masked_mean(each, hidden, share), "entropy": masked_mean(entropy, hidden, share), "student_steps": n}

    for step in run.loop():
        if step and step == where(step)[1]:
            for mine, theirs in zip(p.params.values(), q.params.values()):
                mine.data.copy_(theirs.data)
        run.minimize(q, loss, data)
    if run.step and where(run.step - 1)[0] != cfg.last:
        print(f"ended before the round of {cfg.last} steps: raise --steps or --time_budget and run the same command to go on", file=sys.stderr)
    return run


if __name__ == "__main__":
    cli(main, Config)
