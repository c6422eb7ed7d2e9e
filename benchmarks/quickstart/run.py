"""Quick start, measured: distil the embedded teachers with the default command and compare students and teachers.

    pip install -c constraints.txt -e ".[metrics]"
    python benchmarks/quickstart/run.py                  # what the results in this folder lack; nothing when they are complete
    python benchmarks/quickstart/run.py --fresh          # forget them: train, measure and install everything again
    python benchmarks/quickstart/run.py --timing         # only time every row again, in one sitting
    python benchmarks/quickstart/run.py --fresh --teachers fashion --samples 500

For each teacher: the main job in a child process (wall time, peak memory), then its student at 4, 2, 1 steps, the students of that
teacher that ship in the package, read from the package, and the teacher at 50, 25, 8, 4, 2, 1 steps, all on the same noise and
conditions: kernel distance to real images in the named feature space with its 95 % interval, retrieval (emoji) or class accuracy
(fashion), per-prompt diversity, time per image. A guided teacher step is two network calls.
gap closed(k) = (KID teacher at k - KID student at k) / (KID teacher at k - KID teacher at 50).

Writes results-<teacher>.json and install.json here (the log), the pictures in docs/, and the table between the results markers of
README.md. Every training gets a folder of its own under --output_dir: one that was cut short is trained again, for its wall time."""
from __future__ import annotations

import functools
import hashlib
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
sys.path.insert(0, str(ROOT))
from zoo.errors import UserError  # noqa: E402

TEACHER_STEPS, STUDENT_STEPS = (50, 25, 8, 4, 2, 1), (4, 2, 1)
TIMED_BATCH, TIMED_REPEATS = 16, 3
PICTURES = {"emoji": "quickstart.png", "fashion": "quickstart-fashion.png"}


@dataclass
class Config:
    teachers: tuple[str, ...] = ("emoji", "fashion")
    samples: int = 2000
    time_budget: float = 150.0     # seconds of training of the main job
    output_dir: str = "outputs/quickstart"
    fresh: bool = False            # forget what was measured, and measure all of it again
    timing: bool = False           # time every row whose network is on this machine again, and nothing else


# ------------------------------------------------------------------------------------------------------- jobs
def hardware() -> str:
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), model)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, {model}"
    return f"{device}; torch {torch.__version__.split('+')[0]}"


def named(path: Path) -> str:
    """A path as the log keeps it: relative to the clone where it is inside."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def main_job(teacher: str, cfg: Config) -> dict:
    """The README's command in a child process and a new folder: wall seconds, peak resident memory, where the student is."""
    home, tries = ROOT / cfg.output_dir, 1
    while (out := home / (teacher if tries == 1 else f"{teacher}-{tries}")).exists():
        tries += 1
    began = time.time()
    subprocess.run(["accelerate", "launch", str(ROOT / "train_scripts/train_dmd.py"), "--teacher", teacher, "--output_dir", str(out),
                    "--time_budget", str(cfg.time_budget)], check=True, cwd=ROOT)
    steps = json.loads((out / "measured.json").read_text())
    return {"seconds": round(time.time() - began, 1), "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2, 2),
            "training_seconds": round(steps["seconds"], 1), "student_steps": steps["steps"], "exported_step": steps["exported_step"],
            "folder": named(out / "student"), "own": own_measure(steps)}


def shipped(teacher: str) -> dict[str, Path]:
    """Students of a teacher that are in the package: name -> folder."""
    from zoo import registry
    return {s.name: ROOT / "zoo" / s.source for s in registry.OURS if s.kind == "shipped" and s.teacher == teacher}


def fingerprint(folder: Path) -> str:
    """Of a student's weights: rows of other weights are not its rows."""
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.rglob("*.safetensors")))).hexdigest()[:12]


def shipped_job(folder: Path) -> dict:
    """What the log keeps of a student of the package: which weights were measured, and from its card how it was made."""
    card = json.loads((folder / "fewstep.json").read_text())["card"]
    return {"folder": named(folder), "weights": fingerprint(folder), "own": own_measure(card),
            **{k: card[k] for k in ("command", "seconds", "steps", "exported_step", "device")}}


def own_measure(measured: dict) -> dict:
    """Gap closed in the run's own measure (conditional kernel distance to the teacher's many-step samples), by steps, with its values."""
    key = f"conditional_kid_{measured['space']}"
    value = {(row["who"], row["steps"]): row[key] for row in measured["measured"]}
    most = max(k for who, k in value if who == "teacher")
    closed = {str(k): round((value["teacher", k] - value["student", k]) / (value["teacher", k] - value["teacher", most]), 2)
              for k in STUDENT_STEPS if ("student", k) in value}
    return {"name": key, "samples": measured["samples"], "reference_steps": most, "gap_closed": closed,
            "values": {f"{who} {k}": round(v) for (who, k), v in sorted(value.items())}}


def install() -> dict:
    """Seconds of the README's install line in a new virtual environment (package index and cache of this machine)."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        began = time.time()
        subprocess.run([f"{folder}/bin/pip", "install", "-q", "-c", "constraints.txt", "-e", "."], check=True, cwd=ROOT)
        return {"install_seconds": round(time.time() - began, 1)}


# ------------------------------------------------------------------------------------------------------- rows
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
            if n > len(train):
                raise UserError(f"--samples {n}: emoji has {len(train)} training prompts, each drawn once; give at most so many")
            self.target = torch.tensor(train)[torch.randperm(len(train), generator=g)[:n]]
            captions = [table["caption"][i] for i in self.target.tolist()]
            self.cond = {"prompt": self.model.encode_prompts(captions)}
            self.uncond = {"prompt": self.model.encode_prompts([""]).expand(len(captions), -1, -1)}
            self.real_images = data.images(table, 64, 3)      # all of them: retrieval ranks among the whole set
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
        index, seeds = torch.arange(24).repeat_interleave(4), torch.randn(96, *self.model.shape, generator=torch.Generator().manual_seed(3))
        many = self.sample(net, steps, rule, index, seeds)
        return row | {"diversity": round(self.metrics.diversity(many.reshape(24, 4, *many.shape[1:])), 4)}

    def milliseconds(self, net, steps: int, rule: str) -> float:
        """Of one image in a batch of TIMED_BATCH, sampled and decoded."""
        index = torch.arange(TIMED_BATCH)
        once = lambda: self.sample(net, steps, rule, index, self.noise[:TIMED_BATCH])
        return round(1e3 * self.metrics.wall_time_per_image(once, TIMED_BATCH, TIMED_REPEATS), 2)

    @functools.cache
    def student(self, folder: str):
        """(network, sampling rule) of an exported student, from its folder alone."""
        from diffusers import DiffusionPipeline

        from zoo.denoiser import Denoiser
        from zoo.hub.record import read_record
        pipe = DiffusionPipeline.from_pretrained(ROOT / folder, torch_dtype=torch.float32)
        return Denoiser(pipe.unet.eval(), self.model.process, self.model.pred, self.model.forward), read_record(ROOT / folder)[0].sampler


def gap_closed(rows: list[dict], label: str) -> dict[str, float]:
    kid = {(r["who"], r["steps"]): r["kid_efflite0"] for r in rows}
    return {str(k): round((kid["teacher", k] - kid[label, k]) / (kid["teacher", k] - kid["teacher", 50]), 3) for k in STUDENT_STEPS if (label, k) in kid}


# ------------------------------------------------------------------------------------------------------- the log
def logged(teacher: str, cfg: Config) -> dict:
    """The log of one teacher, empty with --fresh."""
    path = HERE / f"results-{teacher}.json"
    if cfg.fresh or not path.exists():
        return {"teacher": teacher, "hardware": hardware(), "samples": cfg.samples, "rows": [], "jobs": {}, "gap_closed": {}}
    state = json.loads(path.read_text())
    if state["samples"] != cfg.samples:
        raise UserError(f"{path.name} holds rows of {state['samples']} samples, not {cfg.samples}: add --fresh to measure all of them again")
    return state


def save(state: dict):
    (HERE / f"results-{state['teacher']}.json").write_text(json.dumps(state, indent=1) + "\n")


def missing(state: dict, who: str) -> list[int]:
    """Step counts of a model that have no row yet."""
    return [k for k in (TEACHER_STEPS[::-1] if who == "teacher" else STUDENT_STEPS) if not any((r["who"], r["steps"]) == (who, k) for r in state["rows"])]


def forget(state: dict, who: str):
    state["rows"] = [r for r in state["rows"] if r["who"] != who]
    state["jobs"].pop(who, None)
    state["gap_closed"].pop(who, None)


def settle(state: dict, cfg: Config):
    """Give every student whose rows are wanted a folder that is here: train the main job's, forget rows of weights the package no longer ships."""
    found = shipped(state["teacher"])
    for name in [n for n in state["jobs"] if n not in found and n != "student"]:
        forget(state, name)
    for name, folder in found.items():
        if state["jobs"].get(name, {}).get("weights") != fingerprint(folder):
            forget(state, name)
            state["jobs"][name] = shipped_job(folder)
    job = state["jobs"].get("student")
    if job is None or (missing(state, "student") and not (ROOT / job["folder"]).exists()):
        forget(state, "student")
        save(state)
        state["jobs"]["student"] = main_job(state["teacher"], cfg)
    save(state)


def bench(teacher: str, cfg: Config) -> dict:
    """Measure what is missing of one teacher; its log."""
    state = logged(teacher, cfg)
    b = functools.cache(lambda: Bench(teacher, cfg.samples))          # loads models: only when something is to be done
    of = lambda who: (b().net, "ode") if who == "teacher" else b().student(state["jobs"][who]["folder"])
    if not cfg.timing:
        settle(state, cfg)
        for who in (*state["jobs"], "teacher"):
            for k in (left := missing(state, who)):
                state["rows"].append(b().row(who, of(who)[0], k, of(who)[1]))
                print(state["rows"][-1], flush=True)
                state |= {"guidance": b().model.guidance, "sampling_precision": "bf16 autocast" if b().model.bf16_on_cpu else "float32"}
                save(state)
            if who == "student" and left:
                picture(b(), *of(who), teacher)
    state["rows"].sort(key=lambda r: (r["who"] != "teacher", r["who"], -r["steps"]))
    state["gap_closed"] = {who: gap_closed(state["rows"], who) for who in state["jobs"]}
    here = {"teacher", *(who for who, job in state["jobs"].items() if (ROOT / job["folder"]).exists())}
    if cfg.timing or any(r["who"] in here and "ms_per_image" not in r for r in state["rows"]):
        for r in state["rows"]:                                       # all of them in one sitting, or they do not compare
            r.pop("ms_per_image", None)
            if r["who"] in here:
                r["ms_per_image"] = b().milliseconds(of(r["who"])[0], r["steps"], of(r["who"])[1])
                print(r["who"], r["steps"], "steps:", r["ms_per_image"], "ms", flush=True)
        state["timing"] = {"batch": TIMED_BATCH, "repeats": TIMED_REPEATS, "threads": torch.get_num_threads()}
    save(state)
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
    grid(rows, ROOT / "docs" / PICTURES[teacher], names)


# ------------------------------------------------------------------------------------------------------- the page
def table(s: dict) -> list[str]:
    """Lines of one teacher's results."""
    own = "class_accuracy" if s["teacher"] == "fashion" else "retrieval@5"
    job, timing = s["jobs"].get("student", {}), s.get("timing")
    of = lambda key: job.get(key, "-")
    timed = f"; ms/image sampled and decoded, batch of {timing['batch']}, {timing['threads']} thread{'s' * (timing['threads'] > 1)}" if timing else ""
    lines = [f"**{s['teacher']}** ({s['hardware']}; {s['samples']} samples a row, sampled in {s['sampling_precision']}, teacher guidance {s['guidance']:g}; "
             f"main job {of('seconds')} s in all, {of('training_seconds')} s of training, {of('student_steps')} student steps, peak {of('peak_memory_gb')} GB{timed})", "",
             f"| model | steps | network calls | kid_efflite0 (95 %) | {own} | diversity | ms/image | gap closed |", "|---|---|---|---|---|---|---|---|"]
    for r in s["rows"]:
        gap = s["gap_closed"].get(r["who"], {}).get(str(r["steps"]))
        gap = "" if gap is None else f"{gap:.2f}"
        milliseconds = f"{r['ms_per_image']:.1f}" if "ms_per_image" in r else ""
        kid = f"{r['kid_efflite0']:.0f} ({r['low']:.0f} to {r['high']:.0f})"
        lines.append(f"| {r['who']} | {r['steps']} | {r['calls']} | {kid} | {r[own]:.3f} | {r['diversity']:.3f} | {milliseconds} | {gap} |")
    if left := missing(s, "teacher"):
        lines += ["", f"Not measured yet: teacher at {', '.join(map(str, left))} steps{', and so the gap closed' * (50 in left)}."]
    same: dict[str, list[str]] = {}                                   # the shipped students may be those of the main job
    for label, job in s["jobs"].items():
        own = job["own"]
        text = (f", gap closed in the run's own measure (`{own['name']}`, {own['samples']} samples, to the teacher's {own['reference_steps']} steps): "
                + ", ".join(f"{v:.2f} at {k}" for k, v in sorted(own["gap_closed"].items())) + ".")
        same.setdefault(text, []).append(f"`{label}`")
    for text, labels in same.items():
        lines += ["", " and ".join(sorted(labels, reverse=True)) + text]
    made = [f"- [`{name}`](model_cards/{name}.md): `{job['command']}` ({duration(job['seconds'])} of training, {job['device']})"
            for name, job in s["jobs"].items() if "command" in job]
    return lines + ["", "In the package, and measured as it holds them (weights in half precision):", "", *made, ""] if made else lines + [""]


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def page(states: list[dict], took: dict | None) -> str:
    """The results block of README.md."""
    lines = []
    if took:
        lines += [f"Install into a new environment: {took['install_seconds']:.0f} s ({took['hardware']}; packages from an index close by, "
                  "a download takes longer).", ""]
    return "\n".join(lines + [line for s in states if s["rows"] for line in table(s)])


def logs() -> tuple[list[dict], dict | None]:
    path = HERE / "install.json"
    return [json.loads(p.read_text()) for p in sorted(HERE.glob("results-*.json"))], json.loads(path.read_text()) if path.exists() else None


def publish():
    """The results block of README.md, from the logs."""
    path = ROOT / "README.md"
    block = f"<!-- results:begin -->\n{page(*logs())}<!-- results:end -->"
    path.write_text(re.sub(r"<!-- results:begin -->.*<!-- results:end -->", lambda _: block, path.read_text(encoding="utf-8"), flags=re.S), encoding="utf-8")


def main(cfg: Config):
    if cfg.samples < 24:
        raise UserError(f"--samples {cfg.samples}: give at least 24")
    if cfg.fresh:
        (HERE / "install.json").unlink(missing_ok=True)
    for teacher in cfg.teachers:
        bench(teacher, cfg)
        publish()
    if not cfg.timing and logs()[1] is None:                          # last: it needs a package index
        (HERE / "install.json").write_text(json.dumps({"hardware": hardware(), **install()}, indent=1) + "\n")
        publish()


if __name__ == "__main__":
    import tyro
    try:
        main(tyro.cli(Config, description=__doc__))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2)
