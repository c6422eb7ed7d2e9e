"""Watching a student while it trains: grids beside the teacher on the same noise, measurement on fixed noise, health, export.

Score (the rule by which the best student is chosen): mean over the contract's step counts of the conditional kernel distance between
the student's samples and the teacher's many-step samples, prompt by prompt, in one named feature space. Lower is better."""
from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch

from . import losses, metrics, rollout, sharding
from .errors import UserError
from .grid import grid
from .health import Health, guidance_strength, saturation

TEACHER_STEPS = 25
PROMPTS, SEEDS = 16, 4


def conditional_kid(x: torch.Tensor, y: torch.Tensor) -> metrics.Interval:
    """Mean over prompts of the unbiased squared MMD (x 1000, kernel (x . y / d + 1)^3 as in KID) between the seeds of one prompt.

    x, y: features [P, S, D]. Comparing prompt by prompt measures adherence too, and stays unbiased where pooled KID, which
    assumes independent samples, would count each prompt's own likeness. The interval is 1.96 standard errors over prompts."""
    x, y = x.double(), y.double()
    kernel = lambda a, b: (a @ b.transpose(1, 2) / a.shape[2] + 1) ** 3
    off = lambda k: (k.sum((1, 2)) - k.diagonal(dim1=1, dim2=2).sum(1)) / (k.shape[1] * (k.shape[1] - 1))
    each = 1000 * (off(kernel(x, x)) + off(kernel(y, y)) - 2 * kernel(x, y).mean((1, 2)))
    error = 1.96 * each.std().item() / len(each) ** 0.5 if len(each) > 1 else float("nan")       # one prompt has no spread over prompts
    return metrics.Interval(each.mean().item(), each.mean().item() - error, each.mean().item() + error)


class FirstTimeZero:
    """A two-time net read as a consistency student: r = 0 always (what the exported fold is)."""

    def __init__(self, net):
        self.net, self.process = net, net.process

    def __call__(self, x, t, cond, *, to="x0", logits=False):
        return self.net(x, t, cond, r=torch.zeros_like(t), to=to)


class Watcher:
    """Made by `Run.watch`. times: times the student is sampled at, noise to data, on the exported network's own path (a student seen
    through a view is sampled at the times of equal angle); rule: see rollout.sample; two_time: the student is a two-time net, watched and exported through
    its r = 0 fold; follows_teacher: its target is the guided teacher (False: data, or a teacher whose guidance cancels), so that its guidance can be read off
    samples."""

    opened_by = "DiffusionPipeline.from_pretrained"
    cell = 64           # pixels of a picture in the grid

    def __init__(self, run, student, times, rule: str, two_time: bool = False, guidance: float = 1.0,
                 guidance_range: tuple[float, float] | None = None, multiple_of: int = 1, follows_teacher: bool = True):
        from .hub.contract import contract_for
        self.run, self.student, self.rule, self.two_time, self.guidance = run, student, rule, two_time, guidance
        self.follows_teacher = follows_teacher
        self.net = run.average(student, run.cfg.ema)
        base, process = getattr(student.net, "net", student.net).process, student.process
        self.base_times = torch.as_tensor(times, dtype=torch.float64)
        self.times = self.base_times if process is base else process.time(base.angle(self.base_times))
        self.contract = contract_for(run.model, self.base_times.tolist(), rule, guidance=guidance, guidance_range=guidance_range, multiple_of=multiple_of)
        self.trained = {k: self.times[:: len(self.times) // k] for k in self.contract.knots}
        self.health = Health()
        self.last: dict = {}

    # ------------------------------------------------------------------------------------------------ sampling
    def _noise(self, n: int, seed: int = 2026):
        g = torch.Generator().manual_seed(seed)
        fixed = [torch.randn(n, *self.run.model.shape, generator=g).to(self.run.device) for _ in range(1 + len(self.times))]
        return fixed[0], lambda steps=iter(fixed[1:]): next(steps)

    def _conditions(self, n: int, examples):
        part = lambda d: {k: v[:n].to(self.run.device) for k, v in d.items()}
        cond = part(examples.cond)
        if getattr(self.student.net, "slot", None) == "guidance":
            cond["guidance"] = torch.full((n,), self.guidance, device=self.run.device)
        return cond, part(examples.uncond)

    def sample(self, k: int, n: int, examples) -> torch.Tensor:
        """Student samples [n, *shape] with k steps, fixed noise."""
        noise, fresh = self._noise(n)
        net = FirstTimeZero(self.net) if self.two_time else self.net
        with self.run.accelerator.autocast():
            return rollout.sample(net, noise, self._conditions(n, examples)[0], self.trained[k], self.rule, fresh)

    def teach(self, steps: int, n: int, examples, guidance: float | None = None, seed: int = 2026) -> torch.Tensor:
        """Teacher samples [n, *shape] by the ODE in `steps` steps, fixed noise; guidance 0 samples the unconditional."""
        w = self.run.model.guidance if guidance is None else guidance
        cond, uncond = self._conditions(n, examples)
        cond.pop("guidance", None)
        times = self.run.model.process.t_max * (1 - torch.arange(steps, dtype=torch.float64) / steps)
        with self.run.accelerator.autocast():
            return rollout.sample(self.run.model.teacher, self._noise(n, seed)[0], cond, times, "ode", uncond=uncond, guidance=w)

    # ------------------------------------------------------------------------------------------------ the run's calls
    def begin(self):
        """Teacher references, once per process."""
        run, model = self.run, self.run.model
        if not run.takes_part:
            return
        name = "flat" if len(model.shape) == 1 else "fashionnet" if model.name == "fashion" else metrics.default_feature_space()
        self.space, self.features = name, metrics.feature_space(name)
        prompts, self.seeds = model.watched or (PROMPTS, 64 if name == "flat" else SEEDS)      # points are cheap, and their kernel distance needs many
        self.examples = model.examples(prompts, self.seeds)
        self.n = len(self.examples.names)
        # The score compares with teacher samples of other noise: shared noise would make the kernel distance negative.
        reference = self.teach(TEACHER_STEPS, self.n, self.examples, seed=2027)
        self.reference = self._pictures(reference)
        self.reference_features = self.features(self.reference)
        self.reference_diversity = metrics.diversity(self._by_prompt(reference))
        # On the student's own noise: the grid's rows, and the ruler of the guidance health rule.
        half = self.half = max(1, len(self.examples.names) // self.seeds // 2) * self.seeds
        self.latents = self.teach(TEACHER_STEPS, half, self.examples)
        self.guides = [self.teach(TEACHER_STEPS, half, self.examples, w) for w in (1.0, 0.0)] if model.guidance > 1 and self.follows_teacher else None
        if model.guidance != 1 and getattr(model.teacher, "guide", None) is None:      # another rule of guidance has no scale to read off
            self.warn(self.health.applied(run.step, *self._guided_once(), model.guidance))
        if hasattr(model, "pipe"):
            from .backbones.checks import look_at_noise
            n = min(2, self.n)
            with run.accelerator.autocast():
                look_at_noise(model, self._noise(n)[0], {k: v for k, v in self._conditions(n, self.examples)[0].items() if k != "guidance"})
        self.shown = list(range(0, half, self.seeds))[:8]
        self.rows = [self._row("teacher", TEACHER_STEPS, self.latents), self._row("teacher", 1, self.teach(1, half, self.examples))]

    @torch.no_grad()
    def _guided_once(self):
        """The teacher's guided, conditional and unconditional estimates at one noisy batch, for the health rule on the convention."""
        teacher = self.run.model.teacher
        n = min(8, self.n)
        x, t = self._noise(n)[0], torch.full((n,), 0.7 * teacher.process.t_max, device=self.run.device)
        cond, uncond = self._conditions(n, self.examples)
        return losses.guided(teacher, x, t, cond, uncond, self.run.model.guidance), teacher(x, t, cond), teacher(x, t, uncond)

    def _pictures(self, latents):
        return latents.float() if self.space == "flat" else self.run.model.decode(latents)

    @property
    def distance_name(self) -> str:
        return f"conditional_kid_{self.space}"

    def distance(self, pictures) -> metrics.Interval:
        """Conditional kernel distance of n pictures to the teacher's many-step samples."""
        return conditional_kid(self._by_prompt(self.features(pictures)), self._by_prompt(self.reference_features))

    def _by_prompt(self, latents):
        return latents.reshape(-1, self.seeds, *latents.shape[1:])

    def step(self):
        """Called after every student step."""
        run = self.run
        due = [f for f in ("sample", "measure") if run._due(getattr(run.cfg, f"{f}_every"))]
        if due and run.takes_part:
            latents = {k: self.sample(k, self.n, self.examples) for k in self.trained}
            if "sample" in due:
                self.draw(latents)
            if "measure" in due:
                self.measure(latents)
        if due:
            run.accelerator.wait_for_everyone()

    def _row(self, who: str, steps: int, latents):
        """A row of a picture: its name, and the shown samples as images."""
        return f"{who} {steps} step{'s' * (steps > 1)}", self.run.model.decode(latents[self.shown])

    def draw(self, latents):
        rows = self.rows + [self._row("student", k, x) for k, x in latents.items()]
        if self.run.rank == 0:
            grid(rows, self.run.out / "samples" / f"step-{self.run.step:07d}.png", [self.examples.names[i] for i in self.shown], self.cell)

    def measure(self, latents) -> float:
        """Score, log, health; keep the weights when they are the best so far."""
        run = self.run
        rows = {}
        for k, x in latents.items():
            pictures = self._pictures(x)
            rows[k] = {self.distance_name: self.distance(pictures).value,
                       "diversity": metrics.diversity(self._by_prompt(x)) / self.reference_diversity,
                       "saturation": saturation(pictures), **self.extra(x)}
        score = sum(r[self.distance_name] for r in rows.values()) / len(rows)
        values = {f"measure/{name}@{k}": v for k, r in rows.items() for name, v in r.items()}
        readings = {k: self._reading(x) for k, x in latents.items()} if self.guides else {}
        values |= {f"measure/guidance@{k}": r.value for k, r in readings.items() if r}
        run.log(values | {"measure/score": score})
        self.last = {"score": score, "step": run.step, "rows": rows}
        most = latents[max(latents)]
        by = lambda x: self._by_prompt(self._pictures(x))
        if self.space != "flat":
            self.warn(self.health.samples(run.step, by(most), self._by_prompt(self.reference)))
        if self.guides:
            self.warn(self.health.guidance(run.step, list(readings.values()), run.model.guidance))
        self.warn(self.health.moved(run.step, most, self.latents))
        self.keep(score)
        return score

    def _reading(self, latents):
        """The guidance that a step count's samples look like (health.Reading), or None."""
        four = (self._by_prompt(x[: self.half]) for x in (latents, self.latents, *self.guides))
        return guidance_strength(*four, self.run.model.guidance)

    def extra(self, latents) -> dict[str, float]:
        """Further measures of n samples, for the log and the table."""
        return {}

    def keep(self, score: float):
        """Store the student's weights when they are the best so far."""
        run = self.run
        if run.sharded:
            score = run._agree(score)            # ranks draw the same samples; should a last bit differ, they still decide alike
        if score < run.best[0]:
            run.best = (score, run.step)
            weights = self.student.whole(self.weights())
            if run.rank == 0:
                from .run import save_tensors
                (run.out / "best").mkdir(exist_ok=True)
                save_tensors(weights, self._best())

    def _best(self) -> Path:
        """Weights of the best student so far, by its step: a checkpoint names its own, whatever was measured after it."""
        return self.run.out / "best" / f"step-{self.run.best[1]:07d}.safetensors"

    def losses(self, means: dict):
        """Scalars of a logging step, for the health rules that need no samples."""
        if "student/gap" in means:
            self.warn(self.health.scalars(self.run.step, critic_loss=means["critic/denoising"],
                                          **{k: means[f"student/{k}"] for k in ("gap", "relative", "misfit")}))

    def warn(self, warnings):
        for w in warnings:
            self.run.log({"warning": w.name, "remedy": w.remedy})
            if self.run.rank == 0:
                print(f"\nwarning: {w}", file=sys.stderr)

    def weights(self) -> dict[str, torch.Tensor]:
        """What would be exported now: the average, or the student's own parameters."""
        values = self.student.averages[0][1] if self.student.averages else self.student.own
        return {n: v.detach() for n, v in values.items() if not n.startswith("head.")}

    def summary(self) -> dict:
        score = {"score": f"{self.last['score']:.3g}@{self.last['step']}"} if self.last else {}
        return score | {"health": ", ".join(sorted(self.health.active)) or "ok"}

    def state(self):
        return {"last": self.last, "health": self.health.state_dict()}

    def restore(self, state):
        if state:
            self.last = state["last"]
            self.health.load_state_dict(state["health"])
        if self.run.best[1] > 0 and not self._best().exists():        # somebody went back to an older checkpoint
            self.run.best = (math.inf, -1)

    # ------------------------------------------------------------------------------------------------ the end
    def finish(self):
        """Choose the student, measure it beside the teacher, export folder and card, push if asked."""
        run, cfg = self.run, self.run.cfg
        if run.takes_part:
            if cfg.measure_every and self.last.get("step") != run.step:
                latents = {k: self.sample(k, self.n, self.examples) for k in self.trained}
                self.draw(latents)
                self.measure(latents)
            weights, step = self.weights(), run.step
            if cfg.export == "best" and run.best[1] > 0:
                from safetensors.torch import load_file
                run.accelerator.wait_for_everyone() if run.sharded else None       # the first rank has written it
                best = self.student.rows(load_file(self._best()))
                weights, step = {n: v.to(run.device) for n, v in best.items()}, run.best[1]
            self.net = self.student.net.reading(weights)
            self.export(step)
        run.accelerator.wait_for_everyone()

    def table(self) -> list[dict]:
        """Teacher and student at their step counts: kernel distance to the teacher's many-step samples, diversity, time."""
        rows = []
        def row(who, steps, calls, make):
            began = time.perf_counter()
            latents = make()
            pictures = self._pictures(latents)
            seconds = (time.perf_counter() - began) / self.n
            kid = self.distance(pictures)
            rows.append({"who": who, "steps": steps, "calls": calls, self.distance_name: kid.value,
                         **({"low": kid.low, "high": kid.high} if kid.low == kid.low else {}),           # one prompt alone has no interval
                         "diversity": metrics.diversity(self._by_prompt(latents)) / self.reference_diversity, **self.extra(latents),
                         "seconds_per_image": seconds})
        per_step = 1 if self.run.model.guidance == 1 else 2
        for steps in sorted({*self.trained, 8, TEACHER_STEPS}, reverse=True):
            row("teacher", steps, steps * per_step, lambda: self.teach(steps, self.n, self.examples))
        for k in self.trained:
            row("student", k, k, lambda: self.sample(k, self.n, self.examples))
        return rows

    def export(self, step: int):
        run = self.run
        measured = self.table()
        latents = {k: self.sample(k, self.n, self.examples) for k in self.trained}
        few = [self._row("teacher", k, self.teach(k, self.half, self.examples)) for k in sorted({8, *self.trained}, reverse=True)]
        rows = [self.rows[0], *few, *(self._row("student", k, x) for k, x in latents.items())]
        picture = grid(rows, columns=[self.examples.names[i] for i in self.shown], cell=self.cell)
        facts = {"measured": measured, "space": self.space, "prompts": [self.examples.names[i] for i in self.shown]}
        if hasattr(run.model, "pipe"):
            from . import report
            facts["report"] = report.go_no_go(self, measured, latents)
            if run.rank == 0:
                from .hub.card import verdict
                (run.out / "report.md").write_text(f"# {run.out.name}\n\n{verdict(facts['report'])}\n", encoding="utf-8")
                print(f"\n{facts['report']['verdict']}", file=sys.stderr)
        self.leave(step, facts, lambda folder: picture.save(folder / "grid.png"))

    def leave(self, step: int, facts: dict, extra):
        """Write measured.json and the student's folder with its card (and what extra(folder) adds), push if asked."""
        from .hub.card import write_card
        from .hub.export import export_student
        run = self.run
        net = sharding.assembled(self.net, run.rank == 0) if run.sharded else self.net
        if run.rank:
            return
        score = run.best[0] if step == run.best[1] else self.last["score"] if self.last.get("step") == step else None
        facts |= {"samples": self.n, "exported_step": step, "score": score, "seconds": run.elapsed, "steps": run.step, "calls": run.calls,
                  "trained": {n: sum(map(sharding.count, t.params.values())) for n, t in run.trainees.items() if t.updates},
                  "peak_memory_gb": peak_memory_gb(run.device),
                  "energy": run.energy}
        (run.out / "measured.json").write_text(json.dumps(facts, indent=1))
        facts |= {"method": run.cfg.method, "config": run.describe(), "contract": self.contract, "lora": run.cfg.lora,
                  "command": command(run.cfg.method), "device": device_name(run.device), "chain": chain(run.cfg.init_student)}

        def card(folder):
            extra(folder)
            write_card(folder, run.model, facts)
        with sharding.outlined(run.model):
            folder = export_student(run.model, net, run.out / "student", self.contract, lora_rank=run.cfg.lora, extra=card,
                                    facts={k: facts[k] for k in ("method", "chain", "exported_step", "steps")})
        opened_by = f"\n  {self.opened_by}({str(folder)!r})" if (folder / "model_index.json").exists() else ""      # a toy is bare weights
        print(f"student (step {step}) -> {folder}{opened_by}", file=sys.stderr)
        if run.cfg.push_to_hub:
            if url := self.pusher.finish(folder):
                print(f"pushed: {url}", file=sys.stderr)
            shutil.rmtree(run.out / "pushing", ignore_errors=True)

    # ------------------------------------------------------------------------------------------------ the Hub, while it trains
    @property
    def pusher(self):
        if "_pusher" not in self.__dict__:
            from .hub.background import Pusher
            self._pusher = Pusher(self.run.cfg.push_to_hub, lambda text: self.run.log({"warning": "push", "remedy": text}))
        return self._pusher

    def checkpointed(self):
        """Called after every checkpoint: students that were the best before are dropped; with --push_to_hub the student as it is leaves
        in the background, for the branch `training`, unless the last one is still on its way. Only writing the folder takes time of the
        loop; no failure ends the run."""
        run = self.run
        if run.rank == 0:
            for file in (run.out / "best").glob("step-*.safetensors"):
                if file != self._best():
                    file.unlink()
        if run.rank or run.sharded or not run.cfg.push_to_hub or not self.pusher.idle:      # a cut network is put together once, at the end
            return
        from .hub.card import write_card
        from .hub.export import export_student
        measured = [{"who": "student", "steps": k, "calls": k, **row} for k, row in self.last.get("rows", {}).items()]
        facts = {"method": run.cfg.method, "measured": measured, "seconds": run.elapsed, "steps": run.step, "exported_step": run.step, "calls": run.calls,
                 "command": command(run.cfg.method), "device": device_name(run.device), "chain": chain(run.cfg.init_student), "config": run.describe()}
        net = self.student.net.reading({n: v.clone() for n, v in self.weights().items()})
        try:
            folder = export_student(run.model, net, run.out / "pushing", self.contract, lora_rank=run.cfg.lora, extra=lambda f: write_card(f, run.model, facts),
                                    facts={k: facts[k] for k in ("method", "chain", "exported_step", "steps")})
            self.pusher.offer(folder)
        except UserError as error:
            run.log({"warning": "push", "remedy": str(error)})


def command(method: str) -> str:
    """The line that repeats this run, without paths of this machine; empty when it was started from Python."""
    import shlex
    script = f"train_{method}.py"
    return f"accelerate launch train_scripts/{script} {shlex.join(sys.argv[1:])}".strip() if sys.argv[0].endswith(script) else ""


def device_name(device) -> str:
    """The hardware as a person would name it."""
    import os
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"


def peak_memory_gb(device) -> float:
    """The most this process has held: memory of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1024**3
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**3 if sys.platform == "darwin" else 1024**2)


def chain(folder: str) -> list[str]:
    """Methods and folders of the students this one was started from, oldest first."""
    if not folder:
        return []
    from .hub.export import read_record
    record = read_record(Path(folder))[1]
    return [*record.get("chain", []), f"{record.get('method', 'student')} ({folder})"]
