"""Is the training well? For alternating score distillation, whose losses do not say.

`Health` turns scalars (at logging steps) and image batches (at sampling steps) into named warnings, each
with its remedy. It never touches the training. Every rule compares with the teacher or with an identity
that holds for an optimal critic, not with a number from somebody's run; thresholds are arguments and are
stated with the rules.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.metrics import diversity as seed_diversity

__all__ = ["Health", "HealthWarning", "Reading", "contrast", "critic_fit", "exploding", "guidance_applied",
           "guidance_strength", "saturation", "seed_diversity"]

REMEDIES = {
    "critic lagging": "more critic updates per student update, a higher critic or lower student rate",
    "mode collapse": "lower the student learning rate or the guidance; add the GAN or a regression loss, "
                     "or more critic updates",
    "oversaturation": "lower the guidance; check the latent scaling factor and that images are in [-1, 1]",
    "low entropy": "fewer updates per round, more steps for the last one, or a larger target floor; judge by ngram_js, not by bits",
    "frozen": "a higher learning rate; a shorter warm-up or average than the run; with fp16 look for skipped steps, or use bf16",
    "wrong guidance convention": "use D_w = D_uncond + w (D_cond - D_uncond), w = 1 meaning none: "
                                 "check w against 1 + w and the order of cond and uncond",
}


@dataclass(frozen=True)
class HealthWarning:
    name: str
    step: int
    finding: str

    @property
    def remedy(self) -> str:
        return REMEDIES[self.name]

    def __str__(self) -> str:
        return f"{self.name} (step {self.step}): {self.finding}. Remedy: {self.remedy}"


# -- what is measured -----------------------------------------------------------------------------------


def saturation(images: Tensor) -> float:
    """Share of values at the ends of the range, |x| > 0.98, of images in [-1, 1]."""
    return (images.abs() > 0.98).float().mean().item()


def contrast(images: Tensor) -> float:
    """Standard deviation of the values of an image [N, ...] clipped to [-1, 1], averaged over images."""
    return images.float().clamp(-1, 1).flatten(1).std(1).mean().item()


def critic_fit(x: Tensor, x_real: Tensor, x_fake: Tensor) -> dict[str, Tensor]:
    """Three ratios (0-d tensors) from what a student update has anyway: student samples x, and the clean-image
    estimates of teacher (guided or not) and critic at x_t, each [B, ...].

    gap       |x_fake - x_real| / |x - x_real|: how far critic and teacher disagree
    relative  |x - x_fake|^2 / |x - x_real|^2: the critic's denoising error over the teacher's, on these samples
    misfit    cosine of (x - x_fake) and (x_fake - x_real)

    An optimal critic is E[x | x_t], whose residual is orthogonal to every function of x_t: then misfit = 0 and
    gap^2 + relative = 1, whatever the teacher and the guidance. A positive misfit: the critic has yet to go on
    the way it is going; a negative one: it is stale, or overshot. Norms run over the whole batch: per-sample
    ratios would break the identity.
    """
    x, x_real, x_fake = (v.detach().float() for v in (x, x_real, x_fake))
    gap, residual, reference = x_fake - x_real, x - x_fake, x - x_real
    tiny = torch.finfo(torch.float32).tiny
    return {"gap": gap.norm() / reference.norm().clamp(min=tiny),
            "relative": residual.square().sum() / reference.square().sum().clamp(min=tiny),
            "misfit": (residual * gap).sum() / (residual.norm() * gap.norm()).clamp(min=tiny)}


class Reading(NamedTuple):
    """What `guidance_strength` reads off samples: the guidance, its standard error, and `share`, how far the
    student's means have come from the unconditional one (0) to the guided teacher's (1)."""

    value: float
    error: float
    share: float


def guidance_strength(student: Tensor, guided: Tensor, plain: Tensor, uncond: Tensor, guidance: float
                      ) -> Reading | None:
    """The guidance at which the student appears to sample, or None.

    Four batches [P, S, ...] of images or latents, P >= 4 prompts and S >= 2 seeds (one noise per seed): the
    student, the teacher at the declared guidance w, at w = 1, and without condition. With m_. the mean over
    seeds minus the unconditional mean, c = <m_student, m_guided> / <m_guided, m_guided>, summed over
    prompts; only products of different seeds enter, so neither noise nor a kept noise-to-image map biases
    it. c, the share, is 0 for unconditional samples and 1 at w; the teacher's own w = 1 batch gives a third
    point of the ruler, which is linear between and beyond.

    In a linear world a student trained with 1 + w reads w + 1, one without guidance 1, one with cond and uncond
    swapped 1 - w. Distribution matching overshoots guided sampling (w = 3 on eight separated modes reads 5 to
    8), so a high reading proves no wrong convention; a low or negative one does. The error is a jackknife over
    prompts. None: w < 1, or guidance does not move the teacher's means along one line.
    """
    prompts, seeds = student.shape[:2]
    if prompts < 4 or seeds < 2 or guidance < 1:
        return None
    base = uncond.flatten(2).double()
    s, g, p = (v.flatten(2).double() - base for v in (student, guided, plain))

    def cross(a: Tensor, b: Tensor) -> Tensor:
        return ((a.sum(1) * b.sum(1)).sum(1) - (a * b).sum((1, 2))) / (seeds * (seeds - 1))

    sums = torch.stack([cross(s, g), cross(p, g), cross(g, g)])  # [3, P]

    def read(total: Tensor) -> tuple[float, float]:
        own, one, norm = total.tolist()
        if norm <= 0:
            return math.nan, math.nan
        c, c1 = own / norm, one / norm
        if guidance == 1:
            return c, c
        if not 0.05 < c1 < 0.95:
            return math.nan, c
        return c / c1 if c < c1 else 1 + (guidance - 1) * (c - c1) / (1 - c1), c

    value, share = read(sums.sum(1))
    left_out = [read(sums.sum(1) - sums[:, i])[0] for i in range(prompts)]
    if not all(map(math.isfinite, [value, *left_out])):
        return None
    return Reading(value, ((prompts - 1) * statistics.pvariance(left_out)) ** 0.5, share)


def guidance_applied(x_real: Tensor, x_cond: Tensor, x_uncond: Tensor) -> float:
    """The w of D_w = D_uncond + w (D_cond - D_uncond) that the guided teacher output x_real was made with,
    by least squares over the batch: exact. x_cond and x_uncond are the teacher's own outputs at the same
    x_t, t."""
    direction = (x_cond - x_uncond).double()
    return (((x_real - x_uncond).double() * direction).sum() / direction.square().sum().clamp(min=1e-30)).item()


def exploding(history: Sequence[float], factor: float = 1e3, least: int = 8) -> bool:
    """Whether the last of a loss history is finite and above `factor` times the median magnitude of those
    before it (at least `least` of them)."""
    *before, last = (abs(float(v)) for v in history) if len(history) > least else (math.nan,)
    return math.isfinite(last) and last > factor * statistics.median(before)


# -- the rules ------------------------------------------------------------------------------------------


@dataclass
class Health:
    """Rules with memory. Each call returns the warnings that newly begin; `active` holds those still standing.

    critic lagging: by medians over the last `window` logged steps, any of
        |misfit| > 0.3 and critic loss > 2 x floor       its error is systematic, not noise
        relative > 0.5 and critic loss > 10 x floor      the critic knows little more than the teacher
        gap < 0.001                                      it still is the teacher
      The floor is the teacher's own denoising loss on data (same times and weights) where given, else the
      lowest critic loss so far. A high gap or a rising critic loss alone is no illness: with guidance 3 a healthy
      run has gap 0.99, and sharper samples are harder to denoise.
    mode collapse: seed diversity below 0.3 of the teacher's on the same prompts. Silent where the teacher's own
      is below 0.02 (a teacher that has memorised its prompts).
    oversaturation: a fifth of the values that the teacher leaves unsaturated are at |x| > 0.98, and contrast is
      above 1.1 x the teacher's.
    wrong guidance convention: at every step count, `guidance_strength` below the declared w by more than
      max(0.75, w / 4) and three standard errors, and a share below 0.75: swapped, missing, or (below w = 4) one
      too little. A convention is wrong at all step counts alike, while a student that is merely young loses its
      prompt with every re-noising (read on a healthy run: 0.75 at 4 steps, 2.6 at 1); and a blurred student keeps
      three quarters of the way, which is all there is between w = 1 and w where the teacher hardly heeds its
      guidance. Too much cannot be read off samples; `applied` checks the teacher's guided output itself, to within 0.05.
    frozen: samples on the fixed noise differ from those of the first measurement by less than 0.001 of the spread (standard
      deviation) of the teacher's samples, root-mean-square, at two measurements in a row after the warm-up: less than rounding to
      a grey level, so a slow start is not meant. A resumed process starts anew from its own first measurement.
    The image rules sleep for the first `warmup` steps and want two samplings in a row; collapse and too little
    guidance also want no recovery (10 %) in between, since a student starts from the teacher's blurred one-step
    images.
    """

    window: int = 10
    warmup: int = 100
    misfit: float = 0.3
    collapse: float = 0.3
    clipped: float = 0.2
    contrast: float = 1.1
    share: float = 0.75
    still: float = 1e-3
    active: set[str] = field(default_factory=set)
    _trace: list[dict[str, float]] = field(default_factory=list)
    _lowest: float = math.inf
    _before: dict[str, float] = field(default_factory=dict)
    _first: tuple[int, Tensor] | None = field(default=None, repr=False, compare=False)      # not in the state: of this process alone

    def scalars(self, step: int, *, critic_loss: float, gap: float, relative: float, misfit: float) -> list[HealthWarning]:
        """One logged step: the critic's denoising loss and `critic_fit` (as they are or averaged since the
        last)."""
        self._lowest = min(self._lowest, critic_loss)
        row = {"loss": critic_loss, "gap": gap, "relative": relative, "misfit": misfit}
        self._trace = [*self._trace, row][-self.window:]
        if len(self._trace) < self.window:
            return []
        m = {key: statistics.median(row[key] for row in self._trace) for key in self._trace[0]}
        excess = m["loss"] / max(self._lowest, 1e-12)      # its floor: the lowest it has been
        found = None
        if m["gap"] < 1e-3:
            found = f"the critic has not left the teacher (gap {m['gap']:.1e})"
        elif abs(m["misfit"]) > self.misfit and excess > 2:
            found = f"systematic error (misfit {m['misfit']:+.2f}, 0 is optimal), loss {excess:.1f} x floor"
        elif m["relative"] > 0.5 and excess > 10:
            found = f"its error is {m['relative']:.2f} of the teacher's on samples, loss {excess:.1f} x floor"
        return self._report("critic lagging", step, found)

    def samples(self, step: int, student: Tensor, teacher: Tensor) -> list[HealthWarning]:
        """One sampling: images [P prompts, S >= 2 seeds, C, H, W] of the student and of the many-step
        teacher at the declared guidance, on the same prompts."""
        if step < self.warmup:
            return []
        spread, target = seed_diversity(student), seed_diversity(teacher)
        ratio = spread / target if target > 0.02 else 1.0
        collapsed = ratio < self.collapse
        low, high = saturation(teacher), saturation(student)
        share = (high - low) / max(1 - low, 1e-6)
        strength = contrast(student.flatten(0, 1)) / max(contrast(teacher.flatten(0, 1)), 1e-6)
        clipped = share > self.clipped and strength > self.contrast
        found = {
            "mode collapse": self._twice("mode collapse", collapsed, ratio, rising_is_recovery=True)
            and f"seed diversity is {ratio:.2f} of the teacher's",
            "oversaturation": self._twice("oversaturation", clipped, share)
            and f"{high:.0%} of values at the ends of the range, teacher {low:.0%}; contrast x {strength:.2f}",
        }
        return [w for name, text in found.items() for w in self._report(name, step, text)]

    def moved(self, step: int, student: Tensor, teacher: Tensor) -> list[HealthWarning]:
        """One sampling: images or latents [N, ...] of the student, on the same noise every time, and of the many-step teacher."""
        student = student.detach().float()
        if self._first is None:
            self._first = step, student.clone()
        since, first = self._first
        if step < self.warmup or step == since:
            return []
        change = ((student - first).square().mean().sqrt() / teacher.float().std().clamp(min=1e-12)).item()
        found = self._twice("frozen", change < self.still, change)
        return self._report("frozen", step, found and f"samples have changed by {change:.1e} of the teacher's spread since step {since}")

    def applied(self, step: int, x_real: Tensor, x_cond: Tensor, x_uncond: Tensor, guidance: float
                ) -> list[HealthWarning]:
        """`guidance_applied` against the declared guidance, on any one batch; certain, so it needs no
        warm-up."""
        value = guidance_applied(x_real, x_cond, x_uncond)
        found = abs(value - guidance) > 0.05 and f"the teacher is guided by {value:.2f}, declared {guidance:g}"
        return self._report("wrong guidance convention", step, found)

    def guidance(self, step: int, readings: Sequence[Reading | None], guidance: float) -> list[HealthWarning]:
        """One sampling: `guidance_strength` at each step count, and the declared guidance."""
        known = [reading for reading in readings if reading is not None]
        if step < self.warmup or not known:
            return []
        value, error, share = max(known)
        wrong = share < self.share and guidance - value > max(0.75, guidance / 4, 3 * error)
        name = "wrong guidance convention"
        found = self._twice(name, wrong, value, rising_is_recovery=True)
        return self._report(name, step, found and f"samples look like guidance {value:.2f} +- {error:.2f}, "
                                                  f"declared {guidance:g}")

    def entropy(self, step: int, student: float, teacher: float) -> list[HealthWarning]:
        """One sampling of tokens: mean entropies of the student's samples and of the many-step teacher's. Below 0.9 of it, the
        likelihood of the samples says nothing any more."""
        low = step >= self.warmup and student < 0.9 * teacher
        return self._report("low entropy", step, low and f"samples have {student:.2f} bits of entropy, the teacher's {teacher:.2f}")

    def _twice(self, name: str, bad: bool, value: float, rising_is_recovery: bool = False) -> bool:
        """Bad now and at the sampling before, and not on the mend."""
        before = self._before.pop(name, None)
        if bad:
            self._before[name] = value
        mending = rising_is_recovery and before is not None and value - before > 0.1 * abs(before)
        return bad and before is not None and not mending

    def _report(self, name: str, step: int, found: str | bool | None) -> list[HealthWarning]:
        new = bool(found) and name not in self.active
        (self.active.add if found else self.active.discard)(name)
        return [HealthWarning(name, step, found)] if new else []

    def state_dict(self) -> dict:
        """Plain JSON values; `load_state_dict` restores them on resume."""
        return {"active": sorted(self.active), "trace": list(self._trace), "before": dict(self._before),
                "lowest": self._lowest if math.isfinite(self._lowest) else None}

    def load_state_dict(self, state: dict) -> None:
        self.active, self._trace = set(state["active"]), list(state["trace"])
        self._before = dict(state["before"])
        self._lowest = math.inf if state["lowest"] is None else state["lowest"]
