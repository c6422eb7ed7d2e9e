"""Leaderboard: train any methods on one teacher with one budget, and measure all of them on the same noise.

    python benchmarks/leaderboard/run.py                                   # every image method, Fashion-MNIST, 120 s of training, 3 seeds
    python benchmarks/leaderboard/run.py --teacher emoji --methods dmd lcm --seeds 0 --max_calls 2_000_000
    python benchmarks/leaderboard/run.py --quick                           # the guard: two methods, one seed, minutes; fails loudly
    python benchmarks/leaderboard/run.py --world avatars --teacher FOLDER   # a teacher of one's own; or --world cifar10 --data ... --test ...

The budget is seconds of training (--time_budget) or network calls (--max_calls: samples x (forward 1, forward and backward 3,
forward-mode derivative 2), the teacher's included). Everything else is the script's own default, or in --flags. Each student is
sampled as its exported folder's contract says, at 1, 2, 4 and 8 network calls where it serves them; one that serves 4 also at 8, spaced as
its own times are, and marked as more than it was trained for. README.md beside this file says what is measured.

Writes <results>/rows/*.json (one file per student, row by row), leaderboard.csv, samples.png, plot.png, and the tables between the
leaderboard markers. What is there is not repeated: the same command continues a run that was stopped. A method that fails is a row
with its error; --retry tries it again. Runs themselves stay in outputs/leaderboard/."""
from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(HERE)]
import measures  # noqa: E402
import pages  # noqa: E402
import worlds  # noqa: E402

from zoo import metrics, registry, rollout  # noqa: E402
from zoo import process as processes  # noqa: E402
from zoo.errors import UserError  # noqa: E402
from zoo.hub.export import read_record  # noqa: E402

COUNTS = (1, 2, 4, 8)             # network calls a student is measured at
SOLVERS = {"dpmsolver++": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}
BUILT_IN = ("fashion", "emoji")
CHUNK, SHOWN = 100, 8             # images sampled at once; images of a row in the picture
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass
class Config:
    teacher: str = "fashion"            # fashion or emoji; with --world a teacher's folder
    world: str = ""                     # avatars or cifar10 (worlds.py): what a teacher of one's own was trained on
    data: str = ""                      # of a world: its training pictures (default for avatars: those that ship)
    test: str = ""                      # of cifar10: its test pictures
    guidance: float = 0.0               # of a world's teacher (0: 2, as the shipped teachers have)
    methods: tuple[str, ...] = ()       # default: every image method
    seeds: tuple[int, ...] = (0, 1, 2)
    time_budget: float = 120.0          # seconds of training per student
    max_calls: int = 0                  # > 0: network calls per student instead of seconds
    samples: int = 2000
    teacher_steps: tuple[int, ...] = (50, 8, 4, 2, 1)    # the first is the reference
    solver_steps: tuple[int, ...] = (4, 8)
    measure_every: int = 50             # the curve of each run, in student steps
    flags: str = ""                     # more flags for every script, such as "--batch 64"
    results: str = ""                   # default: a folder beside this file, named after teacher and budget
    work: str = ""                      # default: outputs/leaderboard/<that name>
    retry: bool = False                 # try failed rows again
    quick: bool = False


def settle(cfg: Config) -> Config:
    """Defaults filled in. Raises UserError for what cannot work."""
    if cfg.quick and cfg.world:
        raise UserError(f"--quick is about the shipped Fashion-MNIST teacher: leave out --world {cfg.world}, or give it a small --max_calls")
    if cfg.quick:
        # Test images train here, because they ship: fine for a guard, not for a table.
        cfg = replace(cfg, teacher="fashion", methods=cfg.methods or ("dmd", "lcm"), seeds=(0,), samples=100, time_budget=0, max_calls=12_000,
                      teacher_steps=(8, 1), solver_steps=(4,), measure_every=0, flags=f"--data fashion:test {cfg.flags}".strip())
    if cfg.world:
        if cfg.world not in worlds.WORLDS:
            raise UserError(f"--world {cfg.world}: there are {' and '.join(worlds.WORLDS)}")
        if not (Path(cfg.teacher) / "model_index.json").is_file():
            raise UserError(f"--teacher {cfg.teacher}: no folder of a pipeline; make one of {cfg.world} first, as {HERE.name}/gpu.sh does")
        place, test = worlds.settle(cfg.world, cfg.data, cfg.test)
        cfg = replace(cfg, teacher=str(Path(cfg.teacher).resolve()), data=place, test=test, guidance=cfg.guidance or 2.0)
    elif cfg.teacher not in BUILT_IN:
        raise UserError(f"--teacher {cfg.teacher}: the leaderboard knows the test data of {' and '.join(BUILT_IN)}; "
                        f"of a folder say --world {' or '.join(worlds.WORLDS)}")
    elif given := [f"--{name}" for name in ("data", "test", "guidance") if getattr(cfg, name)]:
        raise UserError(f"{' and '.join(given)} belong to --world: {cfg.teacher} has its own")
    if cfg.samples % 10 or cfg.samples < 20:
        raise UserError(f"--samples {cfg.samples}: give a multiple of 10, at least 20")
    rows = {m.name: m for m in registry.methods() if m.modality == "image" and m.path.is_file()}
    for name in cfg.methods:
        if registry.method(name).name not in rows:
            raise UserError(f"{name} is a {registry.method(name).modality} method: this table is about images")
    budget = f"{cfg.max_calls / 1e6:g}Mcalls" if cfg.max_calls else f"{cfg.time_budget:g}s"
    name = f"{cfg.world or cfg.teacher}-{budget}"
    parent = Path(tempfile.mkdtemp()) if cfg.quick else None
    results, work = cfg.results or (parent or HERE) / name, cfg.work or (parent / "runs" if parent else ROOT / "outputs/leaderboard" / name)
    return replace(cfg, methods=cfg.methods or tuple(rows), time_budget=0.0 if cfg.max_calls else cfg.time_budget,
                   results=str(Path(results).resolve()), work=str(Path(work).resolve()))


# ------------------------------------------------------------------------------------------------------- what is on disk
class Board:
    """A folder of results: board.json (what all rows share) and rows/<who>.json, each
    {who, kind, family, seed, job: cost of training | None, rows: [...], error?: text, curve?: ...}."""

    def __init__(self, cfg: Config):
        self.folder = Path(cfg.results)
        (self.folder / "rows").mkdir(parents=True, exist_ok=True)
        mine = {"teacher": cfg.world or cfg.teacher, "samples": cfg.samples, "time_budget": cfg.time_budget, "max_calls": cfg.max_calls,
                "reference_steps": cfg.teacher_steps[0], "flags": cfg.flags, "weights": fingerprint(cfg.teacher)}
        if cfg.world:
            mine |= {"guidance": cfg.guidance, "data": " ".join(worlds.digest(place) for place in (cfg.data, cfg.test) if place)}
        path = self.folder / "board.json"
        self.facts = json.loads(path.read_text()) if path.exists() else mine | {"hardware": hardware()}
        diff = [f"{k}: {self.facts.get(k)!r} -> {v!r}" for k, v in mine.items() if self.facts.get(k) != v]
        if diff:
            raise UserError(f"{self.folder} holds rows of another comparison ({'; '.join(diff)}): repeat its flags, or give another --results and --work")
        self.know()

    def know(self, **facts):
        self.facts |= facts
        write(self.folder / "board.json", self.facts)

    def path(self, who: str, seed: int | None) -> Path:
        return self.folder / "rows" / f"{who}{'' if seed is None else f'-seed{seed}'}.json"

    def load(self, who: str, kind: str, family: str = "", seed: int | None = None) -> dict:
        path = self.path(who, seed)
        return json.loads(path.read_text()) if path.exists() else {"who": who, "kind": kind, "family": family, "seed": seed, "job": None, "rows": []}

    def save(self, entry: dict):
        write(self.path(entry["who"], entry["seed"]), entry)

    def entries(self) -> list[dict]:
        return [json.loads(p.read_text()) for p in sorted((self.folder / "rows").glob("*.json"))]


def write(path: Path, data: dict):
    """Written beside and renamed: a kill leaves the old file or the new one."""
    temp = path.with_name(f"{path.name}.{os.getpid()}.tmp")         # several commands may fill one board
    temp.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(temp, path)


def hardware() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads, {model}"
    return f"{device}; torch {torch.__version__.split('+')[0]}"


@functools.cache
def fingerprint(teacher: str) -> str:
    """Of the weights of a teacher, built-in or in a folder: rows of another version of it do not compare."""
    files = sorted((ROOT / "zoo/assets" / teacher / "teacher" if teacher in BUILT_IN else Path(teacher)).rglob("*.safetensors"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def even(steps: int) -> torch.Tensor:
    """Times evenly spaced from 1, as fractions of t_max."""
    return 1 - torch.arange(steps, dtype=torch.float64) / steps


# ------------------------------------------------------------------------------------------------------- the same for all
class World:
    """Conditions, noise, real images and the teacher's endpoints that every row shares. The first n samples are measured; `groups`
    [P, S] are those of one class or prompt, for diversity."""

    def __init__(self, cfg: Config):
        from zoo import backbones, data
        self.cfg, self.n, self.work = cfg, cfg.samples, Path(cfg.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = backbones.load(cfg.teacher).to(self.device)
        g = torch.Generator().manual_seed(11)
        if cfg.world:
            self.own = worlds.WORLDS[cfg.world](self, g)             # which refuses a teacher that cannot be guided
            self.model.guidance = cfg.guidance
            for part in ("cond", "uncond", "names", "groups", "real_images"):
                setattr(self, part, getattr(self.own, part))
        elif cfg.teacher == "fashion":
            self.label = torch.arange(self.n) % 10
            self.names = [f"class {i}" for i in self.label[:SHOWN].tolist()]
            self.cond, self.uncond = {"label": self.label}, {"label": torch.full((self.n,), 10)}
            real = data.images(data.fashion("test"), 32, 1)
            self.real_images = real[torch.randperm(len(real), generator=g)[: max(self.n, 2000)]]
            self.groups = torch.arange(self.n).reshape(-1, 10).T
        else:
            table = data.emoji("all")
            train = [i for i, s in enumerate(table["split"]) if s == "train"]
            if self.n > len(train):
                raise UserError(f"--samples {self.n}: emoji has {len(train)} training prompts, each drawn once; give at most {len(train) // 10 * 10}")
            self.target = torch.tensor(train)[torch.randperm(len(train), generator=g)[: self.n]]
            self.groups = self.n + torch.arange(96).reshape(24, 4)       # more seeds of the first prompts
            captions = [table["caption"][i] for i in self.target.tolist()]
            captions += [c for c in captions[:24] for _ in range(4)]
            self.names = captions[:SHOWN]
            self.cond = {"prompt": self.model.encode_prompts(captions)}
            self.uncond = {"prompt": self.model.encode_prompts([""]).expand(len(captions), -1, -1)}
            self.real_images = data.images(table, 64, 3)                 # all of them: retrieval ranks among the whole set
        self.noise = torch.randn(len(next(iter(self.cond.values()))), *self.model.shape, generator=g)
        self.per_step = 1 if self.model.guidance == 1 else 2             # network calls of a teacher step

    # -- sampling
    @torch.no_grad()
    def chunks(self, draw, start: int = 0):
        """Decoded images of `draw(noise, cond, uncond, fresh)`, CHUNK conditions at a time."""
        for at in range(start, len(self.noise), CHUNK):
            i = slice(at, at + CHUNK)
            cond, uncond = ({k: v[i].to(self.device) for k, v in d.items()} for d in (self.cond, self.uncond))
            g = torch.Generator().manual_seed(5 + at)
            noise = self.noise[i].to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.model.bf16_on_cpu):      # all rows alike
                x = draw(noise, cond, uncond, lambda: torch.randn(noise.shape, generator=g).to(self.device))
            yield self.model.decode(x).float().cpu()

    def images(self, draw) -> torch.Tensor:
        return torch.cat(list(self.chunks(draw)))

    def teach(self, steps: int):
        times = self.model.process.t_max * even(steps)
        return lambda noise, cond, uncond, fresh: rollout.sample(self.model.teacher, noise, cond, times, "ode", uncond=uncond, guidance=self.model.guidance)

    def solve(self, name: str, steps: int):
        """A stock solver on the guided teacher, spaced as zero-terminal-SNR schedules need it: from pure noise, trailing."""
        import diffusers

        from zoo import losses
        model, teacher = self.model, self.model.teacher

        def draw(noise, cond, uncond, fresh):
            config = dict(model.pipe.scheduler.config) | {"timestep_spacing": "trailing", "final_sigmas_type": "zero", "solver_order": 2}
            scheduler = getattr(diffusers, SOLVERS[name]).from_config(config)
            scheduler.set_timesteps(steps)
            x = noise * scheduler.init_noise_sigma
            for k in scheduler.timesteps:
                t = rollout.expand(model.process.from_timestep(k.double()), x)
                out = losses.guided(teacher, x, t, cond, uncond, model.guidance, to=model.pred)
                x = scheduler.step(out, k, x).prev_sample
            return x
        return draw

    def follow(self, net, rule: str, times: torch.Tensor):
        return lambda noise, cond, uncond, fresh: rollout.sample(net, noise, cond, times, rule, fresh)

    # -- references, kept in the work folder
    def kept(self, name: str, make) -> torch.Tensor:
        path = self.work / f"{name}-{fingerprint(self.cfg.teacher)}-{self.n}.safetensors"
        if not path.exists():
            save_file({"x": make().contiguous()}, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        return load_file(path)["x"]

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        """The teacher's many-step images from the same noise; kept chunk by chunk, because they take longest."""
        steps, parts = self.cfg.teacher_steps[0], []
        for at in range(0, len(self.noise), CHUNK):
            parts.append(self.kept(f"teacher-{steps}-{at}", lambda: next(self.chunks(self.teach(steps), at))))
        return torch.cat(parts)

    @functools.cached_property
    def real(self) -> torch.Tensor:
        return self.kept("features-real", lambda: self.features(self.real_images))

    @functools.cached_property
    def reference_features(self) -> torch.Tensor:
        return self.kept("features-teacher", lambda: self.features(self.reference[: self.n]))

    @functools.cached_property
    def reference_diversity(self) -> float:
        return metrics.diversity(self.reference[self.groups])

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return metrics.feature_space("efflite0")(images.to(self.device)).cpu()

    # -- a row
    def measure(self, images: torch.Tensor, deterministic: bool) -> dict:
        """deterministic: the first noise alone decides the sample, so that it can be compared with the teacher's."""
        feats = self.features(images[: self.n])
        kid = metrics.kid(feats, self.real)
        same = torch.equal(images, self.reference)
        row = {"kid_efflite0": kid.value, "kid_low": kid.low, "kid_high": kid.high,
               "kid_teacher": None if same else measures.paired_kid(feats, self.reference_features).value}
        if self.cfg.world:
            m = min(self.n, len(self.real))      # as many of each, which recall needs
            row |= measures.manifold(self.real[:m], feats[:m]) | self.own.agree(images[: self.n], feats)
        elif self.cfg.teacher == "fashion":
            row |= measures.manifold(self.real[: self.n], feats) | {"agreement": metrics.class_accuracy(images[: self.n], self.label)}
        else:
            row |= measures.manifold(self.real[self.target], feats) | {"agreement": metrics.retrieval(feats, self.real, self.target, (5,))["retrieval@5"]}
        row["diversity"] = metrics.diversity(images[self.groups]) / self.reference_diversity
        row["ode_error"] = measures.endpoint_error(images, self.reference, self.reference_diversity) if deterministic and not same else None
        return {k: v if v is None else round(v, 2 if k.startswith("kid") else 4) for k, v in row.items()}


# ------------------------------------------------------------------------------------------------------- training
class Failed(Exception):
    """A method that did not train; the message goes into its row."""


def command(cfg: Config, name: str, seed: int, folder: Path) -> list[str]:
    budget = {"max_calls": cfg.max_calls, "time_budget": cfg.time_budget}
    words = {"teacher": cfg.teacher, "seed": seed, "output_dir": folder, **budget, "measure_every": cfg.measure_every, "sample_every": 0, "export": "last"}
    if cfg.world:
        words |= {"data": worlds.training(cfg.world, cfg.data, Path(cfg.work)), "guidance": cfg.guidance}
    return [sys.executable, str(registry.method(name).path), *(str(w) for k, v in words.items() for w in (f"--{k}", v)), *shlex.split(cfg.flags)]


def train(cfg: Config, name: str, seed: int) -> tuple[dict, dict]:
    """Train, or go on training, in a child process; (cost, curve). Raises Failed, or SystemExit when the child was stopped."""
    folder, log = Path(cfg.work) / f"{name}-seed{seed}", Path(cfg.work) / f"{name}-seed{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    last_wish = None if LIBC is None else lambda: LIBC.prctl(1, signal.SIGTERM)      # the child stops, and saves, when this process is killed
    with open(log, "w") as out:
        child = subprocess.Popen(command(cfg, name, seed, folder), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, preexec_fn=last_wish,
                                 start_new_session=True,      # so that an interruption here reaches it once
                                 env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])})
        try:
            code = child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if code in (-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise SystemExit(f"{name} seed {seed} was stopped; the same command continues")
    if code:
        raise Failed(reason(log.read_text(errors="replace"), code))
    facts = json.loads((folder / "measured.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = facts["seconds"] + max((r["prepared_seconds"] for r in rows if "prepared_seconds" in r), default=0.0)
    contract, record = read_record(folder / "student")
    weights = load_file(folder / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    job = {"training_seconds": round(seconds, 1), "training_calls": facts["calls"], "training_steps": facts["steps"],
           "peak_memory_gb": round(facts["peak_memory_gb"], 2), "parameters": sum(v.numel() for v in weights.values()),
           "trained_parameters": sum(facts["trained"].values()),
           "budget_used": round(facts["calls"] / cfg.max_calls if cfg.max_calls else seconds / cfg.time_budget, 3),
           "warnings": sorted({r["warning"] for r in rows if "warning" in r}), "hardware": hardware(),
           "sampler": contract.sampler, "steps": contract.steps, "slot": record["slot"]}
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return job, curve(rows)


def reason(log: str, code: int) -> str:
    """One line that says why a script ended with `code`."""
    if code == -signal.SIGKILL:
        return "killed (out of memory?)"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else f"exit code {code}")[:300]


def curve(rows: list[dict], points: int = 60) -> dict[str, list]:
    """Losses and scores of a metrics.jsonl, thinned: name -> [[step, calls, value], ...]."""
    series: dict[str, list] = {}
    for row in rows:
        for key, value in row.items():
            if (key.endswith("/loss") or key in ("measure/score", "student/gap", "student/misfit")) and isinstance(value, float) and math.isfinite(value):
                series.setdefault(key, []).append([row["step"], row["calls"], float(f"{value:.4g}")])
    return {k: v if len(v) <= points else [v[round(i * (len(v) - 1) / (points - 1))] for i in range(points)] for k, v in series.items()}


# ------------------------------------------------------------------------------------------------------- rows
def variants(job: dict) -> list[tuple[str, int]]:
    """(sampler, steps) a student is measured at: what its contract serves, and where that is 4 calls also 8; a two-time student also by its
    own rule, which stock pipelines cannot follow (one step is the same in both)."""
    steps = [k for k in COUNTS if k in job["steps"] or k == 8 and 4 in job["steps"]]
    stock = "renoise" if job["sampler"] == "jump" else job["sampler"]
    return [(stock, k) for k in steps] + [("jump", k) for k in steps if job["slot"] == "r" and k > 1]


def student(world: World, folder: Path, sampler: str, steps: int):
    """The draw of an exported student, read from its folder alone."""
    contract, record = read_record(folder)
    model = world.model
    net = model.make("student", init=str(folder), two_time=sampler == "jump")
    times = contract.times_for(steps, model.process)
    if sampler == "jump":
        process = model.process if type(model.process).__name__ == record["process"] else getattr(processes, record["process"])()
        net, times = processes.view(net, process), process.t_max * even(steps)
    return world.follow(net, sampler, times)


def done(entry: dict, retry: bool = False) -> set[tuple[str, int]]:
    """(sampler, steps) that need no more work."""
    return {(r["sampler"], r["steps"]) for r in entry["rows"] if not (retry and "error" in r)}


def add_rows(board: Board, entry: dict, world, plan: list[tuple[str, int, int, object]], retry: bool, first: bool):
    """Measure what of plan = [(sampler, steps, calls, draw())] is not there yet; each row is saved as it is done."""
    for sampler, steps, calls, draw in plan:
        if (sampler, steps) in done(entry, retry):
            continue
        row = {"sampler": sampler, "steps": steps, "calls": calls}
        try:
            images = draw()
            if first:
                pages.keep_strip(world.work, entry["who"], row, images[:SHOWN])
            row |= world.measure(images, sampler in ("ode", "jump", "solver") or steps == 1)
        except Exception as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        entry["rows"] = [r for r in entry["rows"] if (r["sampler"], r["steps"]) != (sampler, steps)] + [row]
        board.save(entry)
        print(json.dumps({"who": entry["who"], "seed": entry["seed"], **row}), flush=True)


def baselines(cfg: Config, board: Board, world):
    """The teacher, solvers that need no training, and the student before it."""
    taught = lambda k: world().reference if k == cfg.teacher_steps[0] else world().images(world().teach(k))
    solved = lambda name, k: world().images(world().solve(name, k))
    untrained = lambda k: world().images(world().follow(world().model.teacher, "renoise", world().model.process.t_max * even(k)))
    plans = {("teacher", "teacher"): [("ode", k, functools.partial(taught, k)) for k in cfg.teacher_steps]}
    plans |= {(name, "solver"): [("solver", k, functools.partial(solved, name, k)) for k in cfg.solver_steps] for name in SOLVERS}
    plans |= {("untrained", "untrained"): [("renoise", k, functools.partial(untrained, k)) for k in COUNTS]}
    for (who, kind), plan in plans.items():
        entry = board.load(who, kind)
        if {(s, k) for s, k, _ in plan} - done(entry, cfg.retry):
            per = 1 if kind == "untrained" else world().per_step
            add_rows(board, entry, world(), [(s, k, k * per, draw) for s, k, draw in plan], cfg.retry, True)


def method(cfg: Config, board: Board, world, name: str, seed: int):
    """Train and measure one student; its failure is an entry with the error."""
    entry = board.load(name, "method", registry.method(name).family, seed)
    if "error" in entry and not cfg.retry:
        return
    folder = Path(cfg.work) / f"{name}-seed{seed}" / "student"
    if entry["job"] and set(variants(entry["job"])) <= done(entry, cfg.retry):
        return
    if not entry["job"] or not folder.exists():
        print(f"training {name}, seed {seed}", flush=True)
        if entry.pop("error", None):                  # what failed starts afresh
            shutil.rmtree(folder.parent, ignore_errors=True)
        try:
            entry["job"], entry["curve"] = train(cfg, name, seed)
        except Failed as error:
            entry["error"] = str(error)
        except Exception as error:
            traceback.print_exc()
            entry["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        board.save(entry)
        if "error" in entry:
            print(f"{name}, seed {seed} failed: {entry['error']}", flush=True)
            return
    draw = lambda sampler, steps: world().images(student(world(), folder, sampler, steps))
    plan = [(s, k, k, functools.partial(draw, s, k)) for s, k in variants(entry["job"])]
    add_rows(board, entry, world(), plan, cfg.retry, seed == cfg.seeds[0])


def check(entries: list[dict], methods: tuple[str, ...]):
    """What the guard asks: every measure finite, and each method ahead of the untrained student at one step. Raises SystemExit."""
    problems = [f"{e['who']}: {e['error']}" for e in entries if "error" in e]
    problems += [f"{e['who']} at {r['steps']} steps: {r['error']}" for e in entries for r in e["rows"] if "error" in r]
    good = [(e["who"], r) for e in entries for r in e["rows"] if "error" not in r]
    problems += [f"{who} at {r['steps']} steps: {k} is {v}" for who, r in good for k, v in r.items() if isinstance(v, float) and not math.isfinite(v)]
    one = {who: r["kid_efflite0"] for who, r in good if r["steps"] == 1 and r["sampler"] != "ode"}
    problems += [f"{m} was not measured at one step" for m in (*methods, "untrained") if m not in one]
    if "untrained" in one:
        problems += [f"{m} at one step has kid_efflite0 {one[m]:.0f}, the untrained student {one['untrained']:.0f}"
                     for m in methods if one.get(m, -1) >= one["untrained"]]
    if problems:
        raise SystemExit("\n".join(["the guard failed:", *problems]))


def main(cfg: Config) -> Board:
    cfg = settle(cfg)
    board = Board(cfg)
    @functools.cache
    def world():
        w = World(cfg)
        board.know(guidance=w.model.guidance, calls_per_teacher_step=w.per_step, precision="bf16 autocast" if w.model.bf16_on_cpu else "float32",
                   **(w.own.facts(w.real) if cfg.world else {}))
        return w
    report = lambda: pages.table(board.entries(), board.folder / "leaderboard.csv")
    baselines(cfg, board, world)
    report()
    for seed in cfg.seeds:
        for name in cfg.methods:
            method(cfg, board, world, name, seed)
            report()
    pages.publish(board, Path(cfg.work), HERE, ROOT)
    if cfg.quick:
        check(board.entries(), cfg.methods)
    return board


if __name__ == "__main__":
    import tyro
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))      # a child in training is told, and waited for
    try:
        main(tyro.cli(Config, description=__doc__))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2)
