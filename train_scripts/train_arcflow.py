"""ArcFlow: Unleashing 2-Step Text-to-Image Generation via High-Precision Non-Linear Flow Distillation
Zihan Yang, Shuyuan Tu, Licheng Zhang, Qi Dai, Yu-Gang Jiang, Zuxuan Wu
arXiv 2026 -- https://arxiv.org/abs/2602.09014

    One call at the start t_s of a segment [t_e, t_s] gives a velocity for all of it, a mixture of K momentum processes,
        v(t) = sum_k a_k gamma_k^(t_s - t),   gamma_1 = 1,   whose mean over [b, a] is closed:
        sum_k a_k gamma_k^(t_s - a) phi((a - b) log gamma_k),   phi(z) = (e^z - 1) / z.
    repeat
        x_s: noise, or the student's own output at the end of the segment before;  policy <- student(x_s, t_s);  x = x_s
        J times   x moves along sg[policy] for a random while, to time a;   v_a = v(x, a), the guided teacher's velocity
                  policy  <-  min  | mean of the policy over [b - window, a] - v_a |^2
                  x moves along v_a for a random while, to time b             a share rho of the way is the teacher's; rho: 1 -> 0
    (imitation on the policy's own states, after pi-Flow, https://arxiv.org/abs/2510.14974). A sampling step is
    x_e = x_s - (t_s - t_e) u with u the policy's mean over the whole segment.

Departures from the paper: gamma_k are K learned numbers, not outputs for every 2x2 pixels. Then the gates p_k and components v_k
enter as a_k = p_k v_k alone, and with phi_k the mean of gamma_k^(t_s - t) over the segment
        v(t) = u + sum_{k>1} a_k (gamma_k^(t_s - t) - phi_k),
the same policies in another basis. The network's ordinary output is u, a head on its last layer gives a_2 .. a_K (zero at start:
the first student is the teacher's Euler step), and the exported student is the ordinary network alone, sampled by Euler (DDIM)
steps in any stock pipeline, exactly, for the one number of steps it was trained for. One segment per update, not the whole chain,
started where the student's own steps end (in the official code where the mixed walk through the segment before ended); times are
uniform in flow time without a shift; no component dropout; the loss is not scaled by 30. The default is the quick start, 2 states
and a short warm-up; the recipe has the official numbers.

    accelerate launch train_scripts/train_arcflow.py                                   # the embedded teacher, minutes on a CPU
    accelerate launch train_scripts/train_arcflow.py --teacher Qwen/Qwen-Image --recipe qwen-image --data prompts.txt
    python train_scripts/train_arcflow.py --teacher toy --steps 400                    # seconds
"""
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from zoo import UserError, backbones, losses, rollout
from zoo.process import RectifiedFlow, per_sample, view
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "arcflow"
    recipes: ClassVar[dict] = {
        # pnotp/ArcFlow configs/: README.md (4 GPUs x 4 images), _ddp_train.py (AdamW in 8 bits: --optimizer adamw8bit; clipping at 50 of a loss 30 times
        # ours) and the named file (LoRA on fewer layers than ours)
        "qwen-image": dict(source="pnotp/ArcFlow configs/qwen/arcqwen_2nfe_k16.py, _ddp_train.py, README.md", batch=16, lr=1e-4, betas=(0.9, 0.95),
                           warmup=100, max_grad_norm=1.67, lora=256, guidance=4.0, flow_shift=3.2, components=16, states=4, teacher_steps=1000,
                           student_times=(1.0, 0.5), time_budget=0.0, steps=15_000),
        "flux": dict(source="pnotp/ArcFlow configs/flux/arcflux_2nfe_k16.py, _ddp_train.py, README.md", batch=16, lr=1e-4, betas=(0.9, 0.95),
                     warmup=100, max_grad_norm=1.67, lora=256, guidance=3.5, flow_shift=3.2, components=16, states=4, teacher_steps=2000,
                     student_times=(1.0, 0.5), time_budget=0.0, steps=10_000),
    }
    steps: int = 2000
    time_budget: float = 150.0
    lr: float = 2e-4
    components: int = 16                   # K
    states: int = 2                        # J, teacher calls per segment (the paper's is 4)
    window: float = 3 / 128                # length of flow time over which the policy's velocity is compared
    teacher_steps: int = 50                # updates over which rho falls from 1 to 0 (official: 1000 of 15,000 on Qwen-Image, 2000 of 10,000 on FLUX)
    student_times: tuple[float, ...] = (1.0, 0.5)      # starts of the segments; the student serves this number of steps only


class Momenta(nn.Module):
    """Amplitudes a_2 .. a_K, of `width` channels each, from what enters a network's last `layer` (zero at start), and log gamma_2 .. log gamma_K."""

    def __init__(self, layer: nn.Module, width: int, components: int):
        super().__init__()
        self.n = components - 1
        if hasattr(layer, "kernel_size"):
            self.out = nn.Conv2d(layer.in_channels, width * self.n, layer.kernel_size, padding=layer.padding)
        else:
            self.out = nn.Linear(layer.in_features, width * self.n)
        for p in self.out.parameters():
            nn.init.zeros_(p)
        self.register_buffer("start", torch.linspace(math.log(0.2), math.log(4.0), self.n))
        self.shift = nn.Parameter(torch.zeros(self.n))

    def forward(self, features):
        return self.out(features.float())

    def log_gamma(self):
        """Under Adam the factor is the paper's: a tenth of the learning rate."""
        return self.start + 0.1 * self.shift


def phi(z):
    """(e^z - 1) / z, 1 at 0."""
    small = z.abs() < 1e-4
    safe = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, 1 + z / 2 + z * z / 6, torch.expm1(safe) / safe)


def mean_power(log_gamma, t_s, a, b):
    """Mean of gamma_k^(t_s - t) over t in [b, a]: [B, K - 1]; times [B]."""
    return torch.exp(log_gamma * (t_s - a)[:, None]) * phi(log_gamma * (a - b)[:, None])


def mean_velocity(policy, a, b):
    """Mean over [b, a] of the policy (u, amplitudes, log_gamma, t_s, t_e); its velocity at a when b = a."""
    u, amplitudes, log_gamma, t_s, t_e = policy
    shape = mean_power(log_gamma, t_s, a, b) - mean_power(log_gamma, t_s, t_s, t_e)
    return u + (per_sample(shape, amplitudes) * amplitudes).sum(1)


def intervals(student, teacher, length, rho):
    """Alternating stretches of policy and teacher, each [B, J], at random: together at most (1 - rho) and exactly rho of `length` [B].

    student: uniforms [B, J]; teacher: uniforms [B, J - 1]."""
    teacher = torch.cat([teacher, torch.ones_like(student[:, :1])], 1)
    gaps = (torch.diff(s.sort(1).values, dim=1, prepend=torch.zeros_like(s[:, :1])) for s in (student, teacher))
    return [gap * (share * length[:, None]) for gap, share in zip(gaps, (1 - rho, rho))]


def imitation(policy, velocity, x, stretches, window):
    """Mean over J states of |mean policy velocity - teacher velocity|^2, the states visited by policy and teacher in turn."""
    constant = [p.detach() for p in policy]
    t, terms = policy[3], []
    for mine, teachers in zip(*(s.unbind(1) for s in stretches)):
        a, b = t - mine, t - mine - teachers
        x = x - per_sample(mine, x) * mean_velocity(constant, t, a)
        v = velocity(x, a)
        terms.append((mean_velocity(policy, a, b - window) - v).pow(2).mean())
        x, t = x - per_sample(teachers, x) * v, b
    return torch.stack(terms).mean()


def main(cfg: Config) -> Run:
    if cfg.components < 2 or cfg.states < 1:
        raise UserError("--components must be at least 2 (one alone is a straight path) and --states at least 1")
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    flow = RectifiedFlow()
    real = view(model.teacher, flow)
    net = model.make("student", lora=cfg.lora, head=lambda layer, width: Momenta(layer, width, cfg.components), init=cfg.init_student,
                     gradient_checkpointing=cfg.gradient_checkpointing)
    G = run.train("student", view(net, flow), cfg.lr)
    n = len(cfg.student_times)
    knots = run.watch(G, torch.tensor(cfg.student_times) * model.process.t_max, "ode", multiple_of=n).times.float()
    data = model.batches()

    def arcflow_loss(batch):
        i = run.choose(n)
        x, cond = batch.randn(), batch.cond
        t_s, t_e = (rollout.expand(t, x) for t in (knots[i], knots[i + 1] if i + 1 < n else 0.0))
        with torch.no_grad():
            x = rollout.start(flow, x, rollout.expand(knots[0], x))
            for j in range(i):
                t = rollout.expand(knots[j], x)
                x = x - (knots[j] - knots[j + 1]) * G(x, t, cond, to="velocity")
        u, amplitudes = G(x, t_s, cond, to="velocity", logits=True)
        policy = (u, amplitudes, net.head.log_gamma(), t_s, t_e)
        window = torch.clamp(t_s - t_e, max=cfg.window)
        rho = max(0.0, 1 - run.step / cfg.teacher_steps) if cfg.teacher_steps else 0.0
        uniforms = batch.rand(cfg.states), batch.rand(cfg.states - 1)
        velocity = torch.no_grad()(lambda x, t: losses.guided(real, x, t, cond, batch.uncond, model.guidance, to="velocity"))
        return {"loss": imitation(policy, velocity, x, intervals(*uniforms, t_s - t_e - window, rho), window), "rho": rho}

    for _ in run.loop():
        run.minimize(G, arcflow_loss, data)
    return run


if __name__ == "__main__":
    cli(main, Config)
