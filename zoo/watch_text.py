"""Watching a token student while it trains: texts beside the teacher's on the same random numbers, measurement, health, export.

Score (the rule by which the best student is chosen): mean over the contract's step counts of the Jensen-Shannon divergence between the
3-grams of the student's samples and of real sequences. Likelihood alone would crown a student that repeats itself."""
from __future__ import annotations

import time

import torch

from . import tokens
from .health import Health
from .watch import Watcher

SAMPLES = {"text": 128, "toy-text": 2048}
SHOWN = 4
ELEMENTS = 2**27          # of one table of log-probabilities while sampling


class TextWatcher(Watcher):
    """Made by `Run.watch` for rule "unmask". times: as many, evenly spaced, as the finest student has steps; multiple_of: its fewest."""

    opened_by = "zoo.load"

    def __init__(self, run, student, times, rule: str, multiple_of: int = 1):
        super().__init__(run, student, times, rule, multiple_of=multiple_of)
        self.health = Health()
        self.many = 2 * max(self.trained)           # steps of the first round's teacher

    def draw_tokens(self, net, knots, n: int, seed: int = 2026) -> torch.Tensor:
        """n samples [n, L] of `net` through times `knots`, from fixed random numbers."""
        (length,), device = self.run.model.shape, self.run.device
        parts = []
        for part in torch.arange(n).split(max(1, ELEMENTS // (length * self.run.model.symbols))):
            g = torch.Generator().manual_seed(seed + int(part[0]))
            fresh = lambda: torch.rand(len(part), length, generator=g, dtype=torch.float64).to(device)
            with self.run.accelerator.autocast():
                parts.append(tokens.sample(net, net.process.prior(len(part), length, device), {}, knots, fresh))
        return torch.cat(parts)

    def sample(self, k, n, examples=None):
        """Student samples [n, L] with k steps."""
        return self.draw_tokens(self.net, self._knots(k), n)

    def teach(self, steps, n, examples=None, guidance=None, seed=2026):
        """Teacher samples [n, L] with `steps` steps."""
        return self.draw_tokens(self.run.model.teacher, self._knots(steps), n, seed)

    def _knots(self, k: int) -> torch.Tensor:
        return self.trained[k] if k in self.trained else 1 - torch.arange(k, dtype=torch.float64) / k

    # ------------------------------------------------------------------------------------------------ the run's calls
    def begin(self):
        """The teacher's many-step samples, once per process."""
        if not self.run.takes_part:
            return
        self.n, self.examples = SAMPLES[self.run.model.family], None
        samples = self.teach(self.many, self.n)
        self.teacher_entropy = self.run.model.measure(samples)["entropy"]
        few = min(self.trained)
        self.rows = [(f"teacher {self.many} steps", samples[:SHOWN]), (f"teacher {few} steps", self.teach(few, SHOWN))]

    def lines(self, samples) -> str:
        """Texts of teacher and student, a block per sampler."""
        rows = self.rows + [(f"student {k} steps", x[:SHOWN]) for k, x in samples.items()]
        return "\n\n".join("\n".join([name, *("  " + text.replace("\n", " ") for text in self.run.model.decode(x))]) for name, x in rows) + "\n"

    def draw(self, samples):
        if self.run.rank:
            return
        folder = self.run.out / "samples"
        folder.mkdir(exist_ok=True)
        (folder / f"step-{self.run.step:07d}.txt").write_text(self.lines(samples), encoding="utf-8")

    def measure(self, samples) -> float:
        """Score, log, health; keep the weights when they are the best so far."""
        run = self.run
        rows = {k: run.model.measure(x) for k, x in samples.items()}
        score = sum(r["ngram_js"] for r in rows.values()) / len(rows)
        run.log({f"measure/{name}@{k}": v for k, r in rows.items() for name, v in r.items()} | {"measure/score": score})
        self.last = {"score": score, "step": run.step, "rows": rows}
        self.warn(self.health.entropy(run.step, rows[min(rows)]["entropy"], self.teacher_entropy))
        self.keep(score)
        return score

    # ------------------------------------------------------------------------------------------------ the end
    def table(self):
        """Real sequences, teacher and student, from one step to the first teacher's."""
        model, few = self.run.model, {1, 2, 4} & set(range(min(self.trained)))
        real = model.tokens[torch.randperm(len(model.tokens), generator=torch.Generator().manual_seed(5))[: self.n]]
        rows = [{"who": "data", "steps": None, "calls": 0, **model.measure(real)}]
        def row(who, steps, make):
            began = time.perf_counter()
            x = make(steps, self.n)
            seconds = (time.perf_counter() - began) / self.n
            rows.append({"who": who, "steps": steps, "calls": steps, **model.measure(x), "seconds_per_text": seconds})
        for steps in sorted({*self.trained, *few, self.many}, reverse=True):
            row("teacher", steps, self.teach)
        for steps in sorted({*self.trained, *few}, reverse=True):
            row("student", steps, self.sample)
        return rows

    def export(self, step):
        texts = self.lines({k: self.sample(k, self.n) for k in self.trained})
        self.leave(step, {"measured": self.table(), "texts": texts}, lambda folder: None)
