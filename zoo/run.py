"""`Run`: the one stateful object. It owns devices, trainees, randomness, checkpoints and logs; a script owns its loop.

    run = Run(cfg, model)
    G = run.train("student", net, lr=cfg.lr)         # a trainee is a set of parameters behind a Net
    for step in run.loop():
        run.minimize(G, loss, data)                  # loss(batch) -> {"loss": ..., **logged}

Randomness is indexed by global sample number: every draw of a batch is made for the global batch from (seed, tick) and then
sliced by rank and micro-batch. One rank, two ranks and accumulation therefore see the same numbers, and resume is exact."""
from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, ClassVar, Iterator, Literal

import torch
from torch import Tensor

from . import compiled, deepspeed, optimizers, quantized, sharding
from .data.ahead import Ahead
from .data.cache import Storage
from .denoiser import CALLS
from .energy import Meter
from .errors import UserError

# What may differ between a run and its resumption; everything else is part of what the run *is*.
FREE_TO_CHANGE = {"steps", "time_budget", "output_dir", "checkpoint_every", "keep_checkpoints", "sample_every", "measure_every",
                  "report_to", "export", "push_to_hub", "dry_run", "recipe", "log_every", "max_calls", "cache", "cache_gb", "offload_averages", "compile"}


@dataclass
class RunConfig:
    """Flags every script has."""
    teacher: str = "emoji"          # emoji, fashion, toy, toy-video, a diffusers folder or a Hub id
    output_dir: str = ""            # default: outputs/<method>-<teacher>
    data: str = ""                  # prompts (txt, csv, jsonl, parquet) or images (folder, parquet, tar shards, Hub set); default: the teacher's own
    cache: str = ""                 # folder where encoded prompts and pictures are kept (docs/data.md); none: in memory, up to 4 GB of each
    cache_gb: float = 100.0         # its limit
    steps: int = 1000               # student optimiser steps
    time_budget: float = 0.0        # stop after this many seconds of training (0: no limit)
    max_calls: int = 0              # stop after this many network calls: samples x (forward 1, forward and backward 3, forward-mode derivative 2)
    batch: int = 32                 # global batch, over all ranks and micro-batches
    accumulate: int = 1             # micro-batches per rank and optimiser step
    lr: float = 1e-4                # student learning rate
    warmup: int = 0                 # linear warm-up, steps
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 10.0
    ema: float = 0.98               # decay of the averaged student that is sampled, measured and exported (0: none)
    lora: int = 0                   # LoRA rank; 0 trains full weights
    base_bits: Literal[0, 16, 8, 4] = 0    # keep the frozen base of a --lora run in so few bits (docs/many_devices.md); 0: as loaded
    teacher_lora: str = ""          # a style LoRA that makes the teacher: file, folder, Hub id, or user/name/file.safetensors
    teacher_lora_scale: float = 1.0
    flow_shift: float = 0.0         # times of a flow teacher are moved towards noise by times.shifted (0: as its own scheduler moves them; 1: not at all)
    distilled_teacher: bool = False # train on a teacher that looks like a few-step student already
    init_student: str = ""          # start from another run's exported student
    guidance: float = 0.0           # teacher guidance scale w in D_u + w (D_c - D_u); 0: the teacher's own default
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"    # auto: bf16 on a GPU, and on a CPU that has it where the family gains by it
    gradient_checkpointing: bool = False
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"    # 8-bit states (bitsandbytes), or factored ones without momentum
    compile: bool = False           # torch.compile the networks' repeated blocks: faster steps on a GPU after minutes of compiling
    offload_averages: bool = False  # keep averaged weights on the CPU: less GPU memory, slower steps
    seed: int = 0
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    log_every: int = 10
    sample_every: int = 50          # sample grid every n steps (0: never)
    measure_every: int = 50         # measurement on fixed noise every n steps (0: never)
    export: Literal["best", "last"] = "best"   # which student leaves: the best measured one or the last
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    push_to_hub: str = ""           # user/name
    recipe: str = ""                # a published preset of this script, or auto: of the teacher's family; flags given beside it win
    dry_run: bool = False           # print the resolved plan and stop

    method: ClassVar[str] = ""
    recipes: ClassVar[dict[str, dict]] = {}
    two_times: ClassVar[bool] = False          # its student has two times, which are counted unshifted


class Batch:
    """One micro-batch: `cond`, `uncond`, maybe `x0` and `path` as attributes, and random numbers indexed by global sample."""

    def __init__(self, fields: dict, shape: tuple[int, ...], seed: tuple[int, int], size: int, window: slice, device):
        self.__dict__.update(fields)
        self.shape, self._seed, self._size, self._window, self._device, self._count = shape, seed, size, window, torch.device(device), 0
        self._pin = self._device.type == "cuda"        # numbers are drawn in pinned memory there, and copied while the GPU goes on

    def _generator(self):
        self._count += 1
        mixed = (self._seed[0] * 1_000_003 + self._seed[1]) * 1_000_003 + self._count
        return torch.Generator().manual_seed(mixed % (2**63 - 1))

    def randn(self, *shape: int) -> Tensor:
        """Standard normal [B, *shape]; by default of the model's sample shape."""
        return self._mine(torch.randn(self._size, *(shape or self.shape), generator=self._generator(), pin_memory=self._pin))

    def rand(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform [B, *shape] in [0, 1)."""
        return self._mine(torch.rand(self._size, *shape, generator=self._generator(), dtype=dtype, pin_memory=self._pin))

    def randint(self, n: int) -> Tensor:
        """Integers [B] in [0, n)."""
        return self._mine(torch.randint(n, (self._size,), generator=self._generator(), pin_memory=self._pin))

    def whole(self) -> Batch:
        """The random numbers of the global batch, from its first draw on, without items: for what a loss must know of all samples."""
        return Batch({}, self.shape, self._seed, self._size, slice(0, self._size), self._device)

    def _mine(self, drawn: Tensor) -> Tensor:
        """This micro-batch's rows of a global draw, where it trains."""
        return _to(drawn[self._window], self._device)


class Trainee:
    """Parameters with an optimiser, behind a Net; call it as the Net."""

    def __init__(self, name: str, net, lr: Callable[[int], float]):
        self.name, self.net, self.lr, self.optimizer = name, net, lr, None
        self.params: dict[str, torch.nn.Parameter] = net.trainable()
        # What the optimiser steps: the parameters, or under FSDP this rank's rows of them.
        self.own = {n: p if sharding.own(p) is p else torch.nn.Parameter(sharding.own(p)) for n, p in self.params.items()}
        self.averages: list[tuple[float, dict[str, Tensor]]] = []
        self.updates = 0
        self.process = net.process

    def __call__(self, *args, **kwargs):
        return self.net(*args, **kwargs)

    def take_gradients(self):
        """Move what FSDP left on the cut parameters to this rank's rows."""
        for n, p in self.params.items():
            if self.own[n] is not p and p.grad is not None:
                self.own[n].grad, p.grad = sharding.own(p.grad), None

    def whole(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors from this rank's part of each. Under FSDP all ranks call it."""
        return {n: sharding.whole(v, self.params[n]) for n, v in values.items()}

    def rows(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of whole tensors."""
        return {n: sharding.rows(v, self.params[n]) for n, v in values.items()}


class Run:
    """See the module. `cfg` a RunConfig, `model` a Backbone."""

    def __init__(self, cfg: RunConfig, model):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import AutocastKwargs, set_seed

        from .backbones.checks import refuse_distilled, refuse_precision
        from .backbones.style import add_style
        from .recipes import suggest
        self.cfg, self.model = cfg, model
        self.fsdp = sharding.settings(cfg.method) if sharding.asked() else None
        self.zero = deepspeed.asked()        # 0, or the stage of ZeRO: one network is stepped in parts, by `engine`
        self.engine: deepspeed.Engine | None = None
        if self.zero:
            deepspeed.check(cfg)
        on_cpu = not torch.cuda.is_available()
        if on_cpu and os.environ.get("OMP_NUM_THREADS") == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ:
            # `accelerate launch` exports OMP_NUM_THREADS=1 for a single CPU process, nearly halving its speed.
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        self.out = Path(cfg.output_dir or f"outputs/{cfg.method}-{Path(str(model.name)).name}")
        precision = cfg.mixed_precision
        if precision == "auto":
            precision = "bf16" if (model.bf16_on_cpu and _cpu_has_bf16() if on_cpu else torch.cuda.is_bf16_supported()) else "no"
        refuse_precision(precision)
        refuse_distilled(model, cfg.distilled_teacher)
        if cfg.base_bits:
            quantized.check(cfg, model, bool(self.fsdp or self.zero))
        if cfg.teacher_lora:                 # before any role is made and before anything is moved or cut
            add_style(model, cfg.teacher_lora, cfg.teacher_lora_scale)
        # A script with a shift of its own (rcm, self_forcing) or with two times is not moved unless it is asked for.
        own = model.shift if getattr(model, "takes_shift", False) and not cfg.two_times and not hasattr(cfg, "shift") else 1.0
        self.flow_shift = cfg.flow_shift or own
        if self.flow_shift != 1 or getattr(model, "moved", False):
            model.shift_times(self.flow_shift)
        suggest(cfg, model)
        trackers = None if cfg.report_to == "none" else cfg.report_to
        if trackers and not importlib.util.find_spec(trackers):        # accelerate would log nowhere, with a warning
            raise UserError(f"--report_to {trackers}: it is not installed: pip install {trackers}")
        if (self.fsdp or self.zero) and precision == "fp16":
            raise UserError("--mixed_precision fp16 scales its losses for one network: under FSDP and DeepSpeed use bf16 or no")
        # Gathered weights must not outlive their block, nor be mistaken for an average's: under FSDP autocast keeps no copies of them.
        handlers = [AutocastKwargs(cache_enabled=False)] if self.fsdp or self.zero == 3 else []
        if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
            AcceleratorState._reset_state()        # an earlier run of this process had another
        with deepspeed.hidden():
            self.accelerator = Accelerator(mixed_precision=precision, log_with=trackers, project_dir=str(self.out), cpu=on_cpu, kwargs_handlers=handlers)
        self.device, self.rank, self.world = self.accelerator.device, self.accelerator.process_index, self.accelerator.num_processes
        if cfg.compile:
            compiled.check(cfg, bool(self.fsdp or self.zero), self.device)
        for name, least in {"batch": 1, "accumulate": 1, "keep_checkpoints": 1, "log_every": 0, "checkpoint_every": 0, "sample_every": 0,
                            "measure_every": 0}.items():
            if getattr(cfg, name) < least:
                raise UserError(f"--{name} {getattr(cfg, name)}: give {least} or more")
        if cfg.batch % (self.world * cfg.accumulate):
            raise UserError(f"--batch {cfg.batch} is not divisible by {self.world} ranks x {cfg.accumulate} micro-batches")
        set_seed(cfg.seed)
        self.ahead = Ahead() if self.device.type == "cuda" else None      # on a CPU the thread would take its time from the training
        self.sharded = (self.fsdp is not None or self.zero == 3) and self.world > 1
        self.takes_part = self.rank == 0 or self.sharded      # in sampling and measuring: cut networks are called on all ranks together
        quantized.quantize(model, cfg.base_bits, self.device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32))
        if cfg.base_bits and self.rank == 0:
            print(quantized.said(model), file=sys.stderr)
        model.to(self.device)
        self.trainees: dict[str, Trainee] = {}
        self.step = self.tick = 0
        self.elapsed = 0.0                   # seconds of training, over all resumptions
        self.calls = 0                       # network calls of training, over all ranks and resumptions (denoiser.Calls)
        self._seen, self._opened = CALLS.total, time.perf_counter()
        self.meter = Meter(self.device, cpu=self.accelerator.is_local_main_process)
        self.energy: dict = {}               # of all ranks together, known after the last step: see _energy
        self.best = (math.inf, -1)           # (score, step)
        self.watcher = None
        self._stop: int | None = None
        self._logged: dict[str, list[float]] = {}
        self._history: dict[str, list[float]] = {}
        self._open_folder()
        model.storage = Storage("", rank=self.rank) if cfg.dry_run else Storage(cfg.cache, cfg.cache_gb, self.out / "data", self.rank, self.world)

    # ------------------------------------------------------------------------------------------------ set-up
    def _open_folder(self):
        record = self.out / "config.json"
        mine = self.describe()
        self.resume_from = self._latest()
        if record.exists():
            theirs = json.loads(record.read_text())
            # Runs from before these flags.
            theirs = {"optimizer": "adamw", "teacher_lora": "", "teacher_lora_scale": 1.0, "distilled_teacher": False, "flow_shift": 0.0, "base_bits": 0,
                      "share_sample": False, "perceptual_network": mine.get("perceptual_network")} | theirs
            diff = [f"{k}: {theirs.get(k)!r} -> {v!r}" for k, v in mine.items() if k not in FREE_TO_CHANGE and theirs.get(k) != v]
            if theirs.get("method") != mine["method"]:
                raise UserError(f"{self.out} holds a run of another method ({theirs.get('method')}): give another --output_dir")
            if diff:
                raise UserError(f"{self.out} holds a run with another configuration ({'; '.join(diff)}): repeat its flags to resume it, "
                                "or give another --output_dir")
        elif self.out.exists() and any(self.out.iterdir()) and not self.cfg.dry_run:
            raise UserError(f"{self.out} exists and is not a run of ours: give another --output_dir")
        if self.cfg.dry_run:
            return
        self.accelerator.wait_for_everyone()
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            _write(record, json.dumps(mine, indent=1))
            # Killed before its first checkpoint, a run begins anew, and so do its rows.
            self._log_file = open(self.out / "metrics.jsonl", "a" if self.resume_from else "w")
        if self.accelerator.log_with:
            self.accelerator.init_trackers("fewstep", config={k: v for k, v in mine.items() if isinstance(v, (int, float, str, bool))})

    def describe(self) -> dict:
        """The resolved configuration as plain data; a teacher given as an object is named, not stored."""
        cfg = {f.name: getattr(self.cfg, f.name) for f in dataclasses.fields(self.cfg)}
        cfg = {k: v if isinstance(v, (int, float, str, bool, tuple, list, type(None))) else str(getattr(v, "name", type(v).__name__)) for k, v in cfg.items()}
        if cfg.get("metric") == "perceptual" or cfg.get("perceptual"):
            from . import metrics
            cfg["perceptual_network"] = metrics.perceptual_name()           # part of the loss, and another one where LPIPS is installed
        cfg["flow_shift"] = 0.0 if self.flow_shift == 1 else self.flow_shift          # what was used: a run from before goes on with --flow_shift 1
        return json.loads(json.dumps({"method": self.cfg.method, **cfg}))

    # ------------------------------------------------------------------------------------------------ verbs
    def train(self, name: str, net, lr: float, **options) -> Trainee:
        """Register trainable parameters under --optimizer. `options` go to the optimiser (betas, weight_decay ...)."""
        cfg = self.cfg
        if self.zero:
            deepspeed.refuse_second(cfg.method, [*(n for n, t in self.trainees.items() if t.lr(0)), *[name] * bool(lr)])
        warm = lambda step: lr * min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else lr      # a pure function of the step
        if getattr(net, "head", None) is not None:
            net.head.to(self.device)
        params = net.trainable()
        for p in params.values():
            p.requires_grad_(True)
        if self.world > 1:
            for p in params.values():
                torch.distributed.broadcast(p.data, 0)
        if self.sharded and self.fsdp and net.module is not self.model.module:
            sharding.cut(net.module, self.fsdp, self.device)
        trainee = self.trainees[name] = Trainee(name, net, warm)
        settings = {"betas": cfg.betas, "weight_decay": cfg.weight_decay} | options
        trainee.optimizer = optimizers.make(cfg.optimizer, trainee, self.device, lr=lr, **settings)
        return trainee

    def average(self, trainee: Trainee, decay: float):
        """Exponential moving average of a trainee, as a Net; decay is ramped up over the first updates. decay 0: the trainee itself."""
        if not decay:
            return trainee.net
        values = {n: p.detach().to("cpu" if self.cfg.offload_averages else p.device, copy=True) for n, p in trainee.own.items()}
        trainee.averages.append((decay, values))
        return trainee.net.reading(values)

    def choose(self, n: int) -> int:
        """An integer in [0, n), equal on all ranks and for all micro-batches of one minimize."""
        g = torch.Generator().manual_seed((self.cfg.seed * 7_919 + self.tick) * 104_729 + 17)
        return int(torch.randint(n, (1,), generator=g))

    @contextmanager
    def only(self, trainee: Trainee):
        """Inside, every other trainee is a constant."""
        others = [p for o in self.trainees.values() if o is not trainee for p in o.params.values() if p.requires_grad]
        for p in others:
            p.requires_grad_(False)
        self._settle()
        try:
            yield
        finally:
            for p in others:
                p.requires_grad_(True)
            self._settle()

    def minimize(self, trainee: Trainee, loss: Callable[[Batch], dict], data) -> dict:
        """One optimiser step of `trainee` on loss(batch)["loss"], over the micro-batches; the other trainees are constants.

        data: from `model.batches`, or a list of micro-batches of this step that another loss has seen."""
        self.tick += not isinstance(data, list)
        logged: dict[str, Tensor] = {}
        with self.only(trainee):
            for batch in self.micro_batches(data):
                with self.accelerator.autocast():
                    out = loss(batch)
                self.backward(out["loss"] / self.cfg.accumulate, trainee)
                for k, v in out.items():
                    v = v.detach().float() if torch.is_tensor(v) else torch.tensor(float(v))
                    logged[k] = logged.get(k, 0) + v / self.cfg.accumulate
        self.apply(trainee)
        for k, v in logged.items():
            self._logged.setdefault(f"{trainee.name}/{k}", []).append(v)
        return logged

    def backward(self, loss: Tensor, trainee: Trainee):
        if self._engined(trainee):
            return self.engine.backward(loss)
        if self.accelerator.scaler is not None:
            loss = self.accelerator.scaler.scale(loss)
        loss.backward()

    def apply(self, trainee: Trainee):
        """Average gradients over ranks, clip, step, clear, update averages. Raises at a non-finite gradient."""
        norm = self.engine.step(trainee.lr(self.step)) if self._engined(trainee) else self._step(trainee)
        if not torch.isfinite(norm) and self.accelerator.scaler is None:
            raise UserError(self._last_words(f"gradient of the {trainee.name} is not finite at step {self.step}"))
        trainee.updates += 1
        for decay, values in trainee.averages:
            d = min(decay, (1 + trainee.updates) / (4 + trainee.updates))
            torch._foreach_lerp_(list(values.values()), [trainee.own[n].data.to(v.device) for n, v in values.items()], 1 - d)
        self._logged.setdefault(f"{trainee.name}/grad_norm", []).append(norm.detach())

    def _step(self, trainee: Trainee) -> Tensor:
        """`apply` up to the averages; returns the gradient's norm before clipping. Leaves the parameters where it is not finite."""
        if self.sharded:
            trainee.take_gradients()
        grads = [p.grad for n, p in trainee.own.items() if p.grad is not None and p is trainee.params[n]]      # cut ones were averaged by FSDP
        if self.world > 1 and grads:
            flat = torch.cat([g.flatten() for g in grads])
            torch.distributed.all_reduce(flat)
            flat /= self.world
            for g, part in zip(grads, flat.split([g.numel() for g in grads])):
                g.copy_(part.view_as(g))
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(trainee.optimizer)
        if self.sharded:
            norm = sharding.norm({n: p.grad for n, p in trainee.own.items() if p.grad is not None}, trainee.params)
            torch.nn.utils.clip_grads_with_norm_(list(trainee.own.values()), self.cfg.max_grad_norm, norm)
        else:
            norm = torch.nn.utils.clip_grad_norm_(list(trainee.params.values()), self.cfg.max_grad_norm)
        if not torch.isfinite(norm) and scaler is None:
            return norm
        for group in trainee.optimizer.param_groups:
            group["lr"] = trainee.lr(self.step)
        if scaler is not None:
            scaler.step(trainee.optimizer)
            scaler.update()
        else:
            trainee.optimizer.step()
        trainee.optimizer.zero_grad(set_to_none=True)
        return norm

    def micro_batches(self, data) -> Iterator[Batch]:
        """This rank's micro-batches of the current global batch."""
        cfg = self.cfg
        if isinstance(data, list):
            yield from data
            return
        for micro in range(cfg.accumulate):
            now = data, self.tick, micro
            later = data, self.tick + (micro + 1) // cfg.accumulate, (micro + 1) % cfg.accumulate
            fields = _to(self.ahead(now, later, self._items) if self.ahead else self._items(*now), self.device)
            window = self._window(micro)
            shape = tuple(fields["x0"].shape[1:]) if "x0" in fields else self.model.shape       # buckets: of this batch
            yield Batch(fields, shape, (cfg.seed, self.tick), cfg.batch, window, self.device)

    def _window(self, micro: int) -> slice:
        """Which samples of a global batch are this rank's in a micro-batch."""
        size = self.cfg.batch // (self.world * self.cfg.accumulate)
        lo = (self.rank * self.cfg.accumulate + micro) * size
        return slice(lo, lo + size)

    def _items(self, data, tick: int, micro: int) -> dict:
        """What `data` gives for a micro-batch of the global batch of `tick`."""
        window = self._window(micro)
        numbers, order = tick * self.cfg.batch + torch.arange(window.start, window.stop), getattr(data, "order", None)
        return data.get(order(numbers, self.cfg.seed, self.cfg.batch) if order else _epoch_indices(len(data), numbers, self.cfg.seed))

    def watch(self, student, times, rule: str = "renoise", **contract):
        """Name the student that leaves: `student` (a Trainee) is averaged, sampled beside the teacher, measured and exported.

        times: times it is sampled at, noise to data; rule: its sampling rule (see watch.Watcher and rollout.sample; "unmask" for
        tokens, watch_text.TextWatcher; "causal" for video chunk by chunk, watch_video.VideoWatcher)."""
        if rule == "unmask":
            from .watch_text import TextWatcher as Watcher
        elif rule == "causal":
            from .watch_video import VideoWatcher as Watcher
        else:
            from .watch import Watcher
        self.watcher = Watcher(self, student, times, rule, **contract)
        return self.watcher

    def loop(self) -> Iterator[int]:
        """Steps of the student until --steps, --time_budget or --max_calls; resumes, logs, checkpoints, measures, exports at the end.
        SIGINT (Ctrl-C) and SIGTERM end it after the step under way: a checkpoint, then exit code 128 + signal (130, 143)."""
        cfg = self.cfg
        from .plan import plan
        self._count()                        # what the script prepared before its loop, such as stored pairs
        if self.sharded and self.fsdp and not sharding.is_cut(self.model.module):
            adapters = {p for t in self.trainees.values() if t.net.module is self.model.module for p in t.params.values()}
            sharding.cut(self.model.module, self.fsdp, self.device, whole=adapters & set(self.model.module.parameters()))
        if self.zero and self.world > 1:
            for t in [t for t in self.trainees.values() if t.lr(0)]:        # one: `train` refused a second
                self.engine = deepspeed.ENGINES[self.zero](t, cfg.batch // (self.world * cfg.accumulate), cfg.accumulate, cfg.max_grad_norm, self.model.module)
        estimate = self.estimate = plan(self)
        if cfg.dry_run:
            self._leave()
            return
        estimate.refuse_if_too_large()
        if cfg.compile:
            compiled.networks(self)
        self.meter.start()
        if self.resume_from:
            self.load(self.resume_from)
        elif self.calls:
            self.log({"prepared_seconds": round(time.perf_counter() - self._opened, 3)})
        if self.watcher:
            self.watcher.begin()
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)} if _main_thread() else {}
        from tqdm import tqdm
        total = None if cfg.time_budget or cfg.max_calls else cfg.steps        # known after a step
        bar = tqdm(total=total, initial=self.step, disable=self.rank != 0, dynamic_ncols=True, mininterval=1.0, desc=cfg.method)
        begun = self.step, self.elapsed, self.calls
        try:
            self._saved = self.step if self.resume_from else -1
            while self.step < cfg.steps and not self._out_of_time() and not (cfg.max_calls and self.calls >= cfg.max_calls):
                began, self._seen = time.perf_counter(), CALLS.total
                yield self.step
                self.step += 1
                self.elapsed += time.perf_counter() - began
                self._count()
                bar.total = self._last_step(*begun)
                bar.update()
                self._housekeeping(bar)
                if self._stopping():
                    self._save_once()
                    bar.close()
                    if self.rank == 0:
                        print(f"stopped at step {self.step}; checkpoint saved, the same command resumes", file=sys.stderr)
                    raise SystemExit(128 + (self._stop or signal.SIGTERM))
            self._save_once()
            bar.close()
            self.energy = self._energy()
            if self.watcher:
                self.watcher.finish()
        except BaseException:
            for tracker in self.accelerator.trackers:        # they write behind, and what they hold would be lost
                tracker.finish()
            raise
        finally:
            bar.close()
            for s, h in handlers.items():
                signal.signal(s, h)
            if self.rank == 0:
                self._log_file.flush()
            if self.ahead:
                self.ahead.close()
        self._leave()

    # ------------------------------------------------------------------------------------------------ housekeeping
    def _leave(self):
        """Close the trackers and the group of ranks."""
        if self.engine is not None and self.engine.engine is not None:
            self.engine.release()
        self.accelerator.end_training()
        if (self.sharded or self.engine is not None) and not torch.distributed.is_initialized():
            (sharding if self.fsdp else deepspeed).release_groups()

    def _settle(self):
        if self.sharded:
            for module in {id(m): m for m in (self.model.module, *(t.net.module for t in self.trainees.values()))}.values():
                sharding.rest(module)

    def _on_signal(self, number, _frame):
        """Stop after this step; at once when asked again, but not by a launcher that passes a Ctrl-C on which this process had too."""
        now = time.monotonic()
        if self._stop is None:
            self._stop, self._stopped = number, now
        elif now - self._stopped > 2:
            raise KeyboardInterrupt

    def _last_step(self, step: int, elapsed: float, calls: int) -> int:
        """The step at which --steps, --time_budget or --max_calls, whichever comes first, will end the run, at the pace since
        (step, elapsed, calls)."""
        cfg, done = self.cfg, self.step - step
        ends = [cfg.steps]
        for limit, now, then in ((cfg.time_budget, self.elapsed, elapsed), (cfg.max_calls, self.calls, calls)):
            if limit and now > then:
                ends.append(self.step + max(0, math.ceil((limit - now) * done / (now - then))))
        return min(ends)

    def _stopping(self) -> bool:
        return bool(self._agree(float(self._stop is not None)))

    def _out_of_time(self) -> bool:
        return bool(self.cfg.time_budget) and self._agree(self.elapsed) >= self.cfg.time_budget

    def _agree(self, value: float) -> float:
        """The largest value over ranks, so that all of them leave the loop together."""
        if self.world == 1:
            return value
        t = torch.tensor([value], device=self.device, dtype=torch.float64)
        torch.distributed.all_reduce(t, op=torch.distributed.ReduceOp.MAX)
        return t.item()

    def _count(self):
        """Add the network calls since the last look. Ranks do equal work, so that this rank's calls speak for all."""
        self.calls += (CALLS.total - self._seen) * self.world
        self._seen = CALLS.total

    def _energy(self) -> dict:
        """{"joules", "of"} of all ranks since the first step, or {"why"} it is not known. All ranks call it."""
        self.meter.read(at_once=True)
        unknown, joules, of = float(bool(self.meter.why)), self.meter.joules, self.meter.of
        if self.world > 1:
            t = torch.tensor([unknown, joules], device=self.device, dtype=torch.float64)
            torch.distributed.all_reduce(t)
            unknown, joules = t.tolist()
            of = [f"{self.world} GPUs" if name == "GPU" else name for name in of]
        return {"why": self.meter.why or "another rank has no energy counter"} if unknown else {"joules": round(joules, 1), "of": of}

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _housekeeping(self, bar):
        cfg = self.cfg
        self.meter.read()
        if self.step == 1 or self._due(cfg.log_every):
            means = {k: torch.stack([v.cpu() for v in vs]).mean().item() for k, vs in self._logged.items()}
            self._logged.clear()
            self._check(means)
            self.log(means)
            if self.watcher:
                self.watcher.losses(means)
            bar.set_postfix({k.split("/")[0][0] + "/" + k.split("/")[1]: f"{v:.3g}" for k, v in means.items() if k.endswith("/loss")}
                            | (self.watcher.summary() if self.watcher else {}))
        if self.watcher:
            self.watcher.step()
        if self._due(cfg.checkpoint_every):
            self.save()
            if self.watcher:
                self.watcher.checkpointed()

    def _check(self, means: dict):
        from .health import exploding
        for k, v in means.items():
            if not k.endswith("/loss"):
                continue
            if not math.isfinite(v):
                raise UserError(self._last_words(f"{k} is {v} at step {self.step}"))
            history = self._history.setdefault(k, [])
            history.append(v)
            if exploding(history):
                raise UserError(self._last_words(f"{k} exploded to {v:.3g} at step {self.step}"))

    def _last_words(self, what: str) -> str:
        return f"{what}; {self._kept()}. Lower --lr, raise --warmup or --batch, or train without --mixed_precision, in a new --output_dir"

    def _kept(self) -> str:
        last = self._latest()
        return f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"

    def log(self, values: dict):
        """To metrics.jsonl always, and to the tracker when there is one."""
        if self.rank == 0 and not self.cfg.dry_run:
            row = {"step": self.step, "seconds": round(self.elapsed, 3), "calls": self.calls, **{k: v for k, v in values.items()}}
            self._log_file.write(json.dumps(row) + "\n")
            self._log_file.flush()
        if self.accelerator.log_with:
            self.accelerator.log({k: v for k, v in values.items() if isinstance(v, (int, float))}, step=self.step)

    # ------------------------------------------------------------------------------------------------ checkpoints
    def _latest(self) -> Path | None:
        found = sorted((self.out / "checkpoints").glob("step-*")) if (self.out / "checkpoints").exists() else []
        return found[-1] if found else None

    def save(self):
        """Checkpoint, written beside and renamed: a kill at any moment leaves the previous one or this one, whole."""
        self._saved = self.step
        files, energy = self._tensors(), self._energy()
        if self.rank == 0:
            root = self.out / "checkpoints"
            final, temp = root / f"step-{self.step:07d}", root / f".writing-{self.step:07d}"
            try:
                shutil.rmtree(temp, ignore_errors=True)
                temp.mkdir(parents=True)
                for name, tensors in files.items():
                    save_tensors(tensors, temp / name)
                state = {"step": self.step, "tick": self.tick, "elapsed": self.elapsed, "calls": self.calls, "joules": energy.get("joules"), "best": self.best,
                         "updates": {n: t.updates for n, t in self.trainees.items()}, "history": self._history,
                         "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
                         "watcher": self.watcher.state() if self.watcher else None}
                _write(temp / "state.json", json.dumps(state))
                shutil.rmtree(final, ignore_errors=True)
                os.replace(temp, final)
            except Exception as error:
                shutil.rmtree(temp, ignore_errors=True)
                if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                    raise UserError(f"could not write a checkpoint to {root} ({error}); {self._kept()}. Free some space: the same command resumes") from error
                raise
            for old in sorted(root.glob("step-*"))[: -self.cfg.keep_checkpoints]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _save_once(self):
        """Save, unless this step just was: the checkpoint would be written over itself, with a moment of none."""
        if self.step != self._saved:
            self.save()

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, file by file, as whole tensors; under FSDP all ranks call it, and the first keeps them, on the CPU."""
        files = {}
        for t in self.trainees.values():
            parts = {f"{t.name}.safetensors": {n: p.data for n, p in t.own.items()}, f"{t.name}.optimizer.safetensors": self._states(t)}
            parts |= {f"{t.name}.average{i}.safetensors": values for i, (_, values) in enumerate(t.averages)}
            for name, values in parts.items():
                if self.sharded:
                    gathered = ((k, sharding.whole_state(v, t.params[k.split("::")[0]])) for k, v in values.items())
                    values = {k: v.cpu() if self.rank == 0 else None for k, v in gathered}
                files[name] = values
        return files

    def _states(self, trainee: Trainee) -> dict[str, Tensor]:
        return self.engine.states() if self._engined(trainee) else optimizers.tensors(trainee)

    def _engined(self, trainee: Trainee) -> bool:
        """Whether DeepSpeed's engine steps it."""
        return self.engine is not None and self.engine.trainee is trainee

    def load(self, folder: Path):
        """Restore a checkpoint, on any number of ranks."""
        from safetensors.torch import load_file
        state = json.loads((folder / "state.json").read_text())
        self.step, self.tick, self.elapsed = state["step"], state["tick"], state["elapsed"]
        self.calls = state.get("calls", 0)
        self.meter.start(state.get("joules") if self.rank == 0 else 0.0)
        self.best, self._history = tuple(state["best"]), state["history"]
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.watcher:
            self.watcher.restore(state["watcher"])
        for t in self.trainees.values():
            t.updates = state["updates"][t.name]
            values = t.rows(load_file(folder / f"{t.name}.safetensors"))
            for n, p in t.own.items():
                p.data.copy_(values[n])
            states = load_file(folder / f"{t.name}.optimizer.safetensors")
            self.engine.restore(states) if self._engined(t) else optimizers.restore(t, states)
            for i, (_, average) in enumerate(t.averages):
                for n, v in t.rows(load_file(folder / f"{t.name}.average{i}.safetensors")).items():
                    average[n].copy_(v)
        self._settle()
        if self.rank == 0:
            # Rows after the checkpoint will be written again by the steps that are repeated.
            rows = (self.out / "metrics.jsonl").read_text().splitlines(keepends=True)
            kept = [r for r in rows if r.endswith("\n") and json.loads(r)["step"] <= self.step]
            self._log_file.close()
            _write(self.out / "metrics.jsonl", "".join(kept))
            self._log_file = open(self.out / "metrics.jsonl", "a")
            print(f"resumed from {folder}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------- small helpers
def _cpu_has_bf16() -> bool:
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def _main_thread() -> bool:
    import threading
    return threading.current_thread() is threading.main_thread()


def _write(path: Path, text: str):
    temp = path.with_name(path.name + ".tmp")
    temp.write_text(text)
    os.replace(temp, path)


def save_tensors(tensors: dict[str, Tensor], path: Path):
    """safetensors, contiguous on the CPU; written beside and renamed."""
    from safetensors.torch import save_file
    temp = path.with_name(path.name + ".tmp")
    whole = lambda v: v.untyped_storage().nbytes() == v.numel() * v.element_size()          # the file's format refuses parts of a larger tensor
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file({k: v if whole(v) else v.clone() for k, v in tensors.items()}, temp)
    os.replace(temp, path)


def _to(value, device):
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    # From pinned memory the copy runs beside what the GPU computes; from other memory it is the same as a blocking one.
    return value.to(device, non_blocking=torch.device(device).type == "cuda") if torch.is_tensor(value) else value


_permutations: dict = {}


def _epoch_indices(n: int, numbers: Tensor, seed: int) -> Tensor:
    """Data index of each global sample number: every epoch visits all n items in an order drawn from (seed, epoch)."""
    out = torch.empty_like(numbers)
    for epoch in (numbers // n).unique().tolist():
        key = (n, epoch, seed)
        if key not in _permutations:
            if len(_permutations) > 8:
                _permutations.clear()
            _permutations[key] = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 9_973 + epoch))
        here = numbers // n == epoch
        out[here] = _permutations[key][numbers[here] % n]
    return out


def cli(main: Callable, config: type[RunConfig]):
    """Parse flags (tyro), run, and turn an error of the user into one line and exit code 2."""
    import tyro

    try:
        main(parse(config, sys.argv[1:], tyro))
        return
    except UserError as error:
        text = str(error)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes from the last checkpoint, if there is one", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGINT)
    except Exception as error:
        from .plan import out_of_memory, out_of_space
        if not (text := out_of_memory(error) or out_of_space(error)):
            raise
    # Out here the error has let go of its frames, so that the loop has ended its line of progress.
    print(f"error: {text}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def parse(config: type[RunConfig], argv: list[str], tyro) -> RunConfig:
    """`--recipe NAME` fills the defaults; flags given beside it win and are listed as deviations, the global batch first."""
    from .recipes import automatic, origins
    name = next((argv[i + 1] if a == "--recipe" else a.split("=", 1)[1] for i, a in enumerate(argv)
                 if (a == "--recipe" and i + 1 < len(argv)) or a.startswith("--recipe=")), "")
    found = config.recipes
    if name == "auto":                       # of the teacher's family
        found = {**found, "auto": automatic(config, argv)}
    if name and name not in found:
        raise UserError(f"unknown --recipe {name!r}: this script has {', '.join([*sorted(config.recipes), 'auto'])}")
    preset = {k: v for k, v in found.get(name, {}).items() if k not in ("source", "origins")}
    cfg = tyro.cli(config, args=argv, default=config(**preset), description=(sys.modules[config.__module__].__doc__ or "").strip().split("\n\n")[0])
    if name:
        rows = [(k, v, getattr(cfg, k)) for k, v in preset.items() if getattr(cfg, k) != v]
        rows.sort(key=lambda r: r[0] != "batch")
        print(f"recipe {name}: {found[name]['source']}", file=sys.stderr)
        for line in origins(found[name], cfg):
            print(f"  {line}", file=sys.stderr)
        for k, theirs, ours in rows:
            print(f"  deviates: {k} = {ours} (recipe {theirs})", file=sys.stderr)
    return cfg
