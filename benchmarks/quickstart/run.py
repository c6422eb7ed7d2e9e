"""Quick start, measured: distil the embedded teacher with the default command and compare student and teacher.

    python benchmarks/quickstart/run.py                        # both built-in teachers, everything below
    python benchmarks/quickstart/run.py --teachers fashion --samples 500

For each teacher: the main job in a child process (wall time, peak memory), then the teacher at 50, 25, 8, 4, 2, 1 steps and the
student at 4, 2, 1 on the same noise and conditions: kernel distance to real images in the named feature space with its 95 %
interval, retrieval (emoji) or class accuracy (fashion), per-prompt diversity, time per image. A guided teacher step is two network calls.
gap closed(k) = (KID teacher at k - KID student at k) / (KID teacher at k - KID teacher at 50).

Writes results-<teacher>.json here (the log), docs/quickstart.png, and the table between the results markers of README.md.
Stages already in the log are not repeated unless --fresh; --install also times `pip install` in a new environment."""
from __future__ import annotations

import functools
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TEACHER_STEPS, STUDENT_STEPS = (50, 25, 8, 4, 2, 1), (4, 2, 1)


@dataclass
class Config:
    teachers: tuple[str, ...] = ("emoji", "fashion")
    samples: int = 2000
    time_budget: float = 150.0     # seconds of training of the main job
    output_dir: str = "outputs/quickstart"
    student: str = ""              # measure this exported student instead of training (its rows are named by --label)
    label: str = "student"
    fresh: bool = False
    install: bool = False


def hardware() -> str:
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor()) if os.path.exists("/proc/cpuinfo") else platform.processor()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, {model}"
    return f"{device}; torch {torch.__version__.split('+')[0]}"


def main_job(teacher: str, cfg: Config) -> dict:
    """The README's command in a child process: wall seconds, peak resident memory, where the student is."""
    out = Path(cfg.output_dir) / teacher
    began = time.time()
    subprocess.run(["accelerate", "launch", str(ROOT / "train_scripts/train_dmd.py"), "--teacher", teacher, "--output_dir", str(out),
                    "--time_budget", str(cfg.time_budget)], check=True, cwd=ROOT)
    steps = json.loads((out / "measured.json").read_text())
    return {"seconds": round(time.time() - began, 1), "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2, 2),
            "training_seconds": round(steps["seconds"], 1), "student_steps": steps["steps"], "exported_step": steps["exported_step"], "folder": str(out / "student"),
            "own": own_measure(steps)}


def own_measure(measured: dict) -> dict:
    """Gap closed in the run's own measure (conditional kernel distance to the teacher's many-step samples), by steps, with its values."""
    key = f"conditional_kid_{measured['space']}"
    value = {(row["who"], row["steps"]): row[key] for row in measured["measured"]}
    most = max(k for who, k in value if who == "teacher")
    closed = {str(k): round((value["teacher", k] - value["student", k]) / (value["teacher", k] - value["teacher", most]), 2) for k in STUDENT_STEPS if ("student", k) in value}
    return {"name": key, "samples": measured["samples"], "reference_steps": most, "gap_closed": closed,
            "values": {f"{who} {k}": round(v) for (who, k), v in sorted(value.items())}}


def install() -> dict:
    """Seconds of the README's install line in a new virtual environment (package index and cache of this machine)."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        began = time.time()
        subprocess.run([f"{folder}/bin/pip", "install", "-q", "-c", "constraints.txt", "-e", "."], check=True, cwd=ROOT)
        return {"install_seconds": round(time.time() - began, 1)}


class Bench:
    """Fixed conditions, noise and real features of one teacher."""

    def __init__(self, teacher: str, n: int):
        from zoo import backbones, data, metrics
        self.model, self.n, self.metrics, self.teacher = backbones.load(teacher), n, metrics, teacher
        self.net = self.model.teacher                          # one object: it alone is guided
        self.features = metrics.feature_space("efflite0")
        g = torch.Generator().manual_seed(11)
        if teacher == "fashion":
            self.label = torch.arange(n) % 10
            self.cond, self.uncond = {"label": self.label}, {"label": torch.full((n,), 10)}
            real = data.images(data.fashion("test"), 32, 1)
            self.real_images = real[torch.randperm(len(real), generator=g)[: max(n, 2000)]]
        else:
            table = data.emoji("all")
            train = [i for i, s in enumerate(table["split"]) if s == "train"]
            self.target = torch.tensor(train)[torch.randperm(len(train), generator=g)[:n]]
            captions = [table["caption"][i] for i in self.target.tolist()]
            self.cond = {"prompt": self.model.encode_prompts(captions)}
            self.uncond = {"prompt": self.model.encode_prompts([""]).expand(len(captions), -1, -1)}
            self.real_images = data.images(table, 64, 3)      # all of them: retrieval ranks among the whole set
            self.n = len(captions)
        self.noise = torch.randn(self.n, *self.model.shape, generator=g)
        self.generator = g

    @functools.cached_property
    def real(self) -> torch.Tensor:
        return self.features(self.real_images)

    def part(self, d, i):
        return {k: v[i] for k, v in d.items()}

    @torch.no_grad()
    def sample(self, net, steps: int, rule: str, index: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Decoded images for conditions `index`; the teacher alone is guided."""
        from zoo import rollout
        times = 1 - torch.arange(steps, dtype=torch.float64) / steps
        fresh = torch.Generator().manual_seed(5)
        out = []
        for at in torch.arange(len(index)).split(100):
            i = index[at]
            guided = {"uncond": self.part(self.uncond, i), "guidance": self.model.guidance} if net is self.net else {}
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.model.bf16_on_cpu):      # teacher and student alike
                x = rollout.sample(net, noise[at], self.part(self.cond, i), times, rule,
                                   lambda: torch.randn(len(at), *self.model.shape, generator=fresh), **guided)
            out.append(self.model.decode(x))
        return torch.cat(out)

    def row(self, who: str, net, steps: int, rule: str) -> dict:
        images = self.sample(net, steps, rule, torch.arange(self.n), self.noise)
        feats = self.features(images)
        kid = self.metrics.kid(feats, self.real)
        row = {"who": who, "steps": steps, "calls": steps * (2 if net is self.net and self.model.guidance != 1 else 1), "samples": self.n,
               "kid_efflite0": round(kid.value, 2), "low": round(kid.low, 2), "high": round(kid.high, 2)}
        if self.teacher == "fashion":
            row["class_accuracy"] = round(self.metrics.class_accuracy(images, self.label), 4)
        else:
            found = self.metrics.retrieval(feats, self.real, self.target, (1, 5))
            row |= {k: round(v, 4) for k, v in found.items()}
        prompts = torch.arange(24)
        index, seeds = prompts.repeat_interleave(4), torch.randn(96, *self.model.shape, generator=torch.Generator().manual_seed(3))
        many = self.sample(net, steps, rule, index, seeds)
        row["diversity"] = round(self.metrics.diversity(many.reshape(24, 4, *many.shape[1:])), 4)
        row["ms_per_image"] = round(1e3 * self.metrics.wall_time_per_image(lambda: self.sample(net, steps, rule, prompts[:16], self.noise[:16]), 16, 3), 2)
        return row


def student_net(model, folder: str):
    """The exported student's own network, from its folder alone."""
    from diffusers import DiffusionPipeline

    from zoo.denoiser import Denoiser
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    return Denoiser(pipe.unet.eval(), model.process, model.pred, model.forward)


def gap_closed(rows: list[dict], label: str) -> dict[str, float]:
    kid = {(r["who"], r["steps"]): r["kid_efflite0"] for r in rows}
    return {str(k): round((kid["teacher", k] - kid[label, k]) / (kid["teacher", k] - kid["teacher", 50]), 3) for k in STUDENT_STEPS if (label, k) in kid}


def bench(teacher: str, cfg: Config) -> dict:
    from zoo.hub.record import read_record
    log = HERE / f"results-{teacher}.json"
    state = json.loads(log.read_text()) if log.exists() and not cfg.fresh else {"teacher": teacher, "hardware": hardware(), "rows": [], "jobs": {}, "gap_closed": {}}
    save = lambda: log.write_text(json.dumps(state, indent=1) + "\n")
    if cfg.student:
        state["rows"] = [r for r in state["rows"] if r["who"] != cfg.label]
        card = Path(cfg.student).parent / "measured.json"
        known = json.loads(card.read_text()) if card.exists() else {}
        state["jobs"][cfg.label] = {"folder": cfg.student, **{k: known[k] for k in ("seconds", "steps", "exported_step") if k in known}, **({"own": own_measure(known)} if known else {})}
    elif cfg.label not in state["jobs"]:
        state["jobs"][cfg.label] = main_job(teacher, cfg)
        save()
    elif "own" not in state["jobs"][cfg.label] and (left := Path(cfg.output_dir) / teacher / "measured.json").exists():
        known = json.loads(left.read_text())
        if known["steps"] == state["jobs"][cfg.label]["student_steps"]:                   # the run of this row
            state["jobs"][cfg.label]["own"] = own_measure(known)
    b = Bench(teacher, cfg.samples)
    state |= {"samples": b.n, "guidance": b.model.guidance, "sampling_precision": "bf16 autocast" if b.model.bf16_on_cpu else "float32"}
    net = student_net(b.model, state["jobs"][cfg.label]["folder"])
    rule = read_record(state["jobs"][cfg.label]["folder"])[0].sampler
    plan = [(cfg.label, net, k, rule) for k in STUDENT_STEPS] + [("teacher", b.net, k, "ode") for k in reversed(TEACHER_STEPS)]
    for who, n, steps, rule in plan:
        if any((r["who"], r["steps"]) == (who, steps) for r in state["rows"]):
            continue
        state["rows"].append(b.row(who, n, steps, rule))
        print(state["rows"][-1], flush=True)
        save()
    state["rows"].sort(key=lambda r: (r["who"] != "teacher", r["who"], -r["steps"]))
    state["gap_closed"][cfg.label] = gap_closed(state["rows"], cfg.label)
    save()
    if cfg.label == "student":
        picture(b, net, rule, teacher)
    return state


def picture(b: Bench, net, rule: str, teacher: str):
    from zoo.grid import grid
    count = 12
    index = torch.arange(count)
    noise = b.noise[:count]
    rows = [("teacher 50 steps", b.sample(b.net, 50, "ode", index, noise)), ("teacher 1 step", b.sample(b.net, 1, "ode", index, noise)),
            ("student 1 step", b.sample(net, 1, rule, index, noise)), ("student 4 steps", b.sample(net, 4, rule, index, noise))]
    names = None
    if teacher == "emoji":
        from zoo import data
        names = [data.emoji("all")["caption"][i] for i in b.target[:count].tolist()]
    grid(rows, ROOT / "docs" / ("quickstart.png" if teacher == "emoji" else f"quickstart-{teacher}.png"), names)


def readme(states: list[dict]):
    """The results block of README.md, from the logs."""
    lines = []
    if (log := HERE / "install.json").exists():
        took = json.loads(log.read_text())
        lines += [f"Install into a new environment: {took['install_seconds']:.0f} s ({took['hardware']}; packages from an index close by, a download takes longer).", ""]
    for s in (s for s in states if s["rows"]):
        own = "class_accuracy" if s["teacher"] == "fashion" else "retrieval@5"
        job = s["jobs"].get("student", {})
        lines += [f"**{s['teacher']}** ({s['hardware']}; {s['samples']} samples a row, sampled in {s['sampling_precision']}, teacher guidance {s['guidance']:g}; main job {job.get('seconds', '-')} s in all, "
                  f"{job.get('training_seconds', '-')} s of training, {job.get('student_steps', '-')} student steps, peak {job.get('peak_memory_gb', '-')} GB)", "",
                  f"| model | steps | network calls | kid_efflite0 (95 %) | {own} | diversity | ms/image | gap closed |", "|---|---|---|---|---|---|---|---|"]
        for r in s["rows"]:
            gap = s["gap_closed"].get(r["who"], {}).get(str(r["steps"]), "")
            lines.append(f"| {r['who']} | {r['steps']} | {r['calls']} | {r['kid_efflite0']:.0f} ({r['low']:.0f} to {r['high']:.0f}) | {r[own]:.3f} | {r['diversity']:.3f} | {r['ms_per_image']:.1f} | {gap} |")
        missing = [k for k in TEACHER_STEPS if not any((r["who"], r["steps"]) == ("teacher", k) for r in s["rows"])]
        if missing:
            lines += ["", f"Not measured yet: teacher at {', '.join(map(str, missing))} steps{', and so the gap closed' * (50 in missing)}."]
        for label, job in s["jobs"].items():
            if own := job.get("own"):
                lines += ["", f"`{label}`, gap closed in the run's own measure (`{own['name']}`, {own['samples']} samples, to the teacher's {own['reference_steps']} steps): "
                          + ", ".join(f"{v:.2f} at {k}" for k, v in sorted(own["gap_closed"].items())) + "."]
        lines.append("")
    path = ROOT / "README.md"
    block = "<!-- results:begin -->\n" + "\n".join(lines) + "<!-- results:end -->"
    path.write_text(re.sub(r"<!-- results:begin -->.*<!-- results:end -->", lambda _: block, path.read_text(), flags=re.S))


if __name__ == "__main__":
    import tyro
    sys.path.insert(0, str(ROOT))
    cfg = tyro.cli(Config, description=__doc__)
    states = [bench(t, cfg) for t in cfg.teachers]
    if cfg.install:
        (HERE / "install.json").write_text(json.dumps({"hardware": hardware(), **install()}, indent=1) + "\n")
    readme([json.loads(p.read_text()) for p in sorted(HERE.glob("results-*.json"))])
