"""Step time and peak memory of training steps on random weights at real shapes, beside a plain implementation that copies three models.

    python benchmarks/training_step/run.py                     # on a GPU sd15-512 and sdxl-1024 (under ten minutes), on a CPU the tiny preset
    python benchmarks/training_step/run.py --presets 12gb      # one preset; see PRESETS

Nothing is downloaded: networks are made from the configurations of diffusers classes, text embeddings and latents are random (as from a
cache). Every case runs in a process of its own, so that peaks do not mix. The steps are those of the scripts in train_scripts/, through
`Run`; only `plain` is written here, as one would for one model: three copies, two calls for guidance, one optimiser for each; it rolls its
student out to the same depths as the script, so that both make the same calls. Beside the steps: the derivatives of sCM and MeanFlow, AdamW's
step fused and not, and one network plain, compiled, and compiled into CUDA graphs. Writes log-<device>.md and .json beside this file; --keep
goes on with that file, for what the budget left out. Memory on a CPU is the process's growth, which counts what the allocator and libraries
keep, and says little about tensors."""
from __future__ import annotations

import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "train_scripts")]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
GB = 1024**3

# Public unet/config.json of stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0.
SD15 = dict(sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, cross_attention_dim=768, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
SDXL = dict(sample_size=128, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816, down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",))
TINY = dict(sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=64, attention_head_dim=8, norm_num_groups=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
PRESETS = {                # network, batch, LoRA rank, and flags of every run
    "tiny": dict(unet=TINY, batch=4, lora=16, flags={}, steps=3, without=("dmd lora compiled",), networks=dict(mid_block_type=None)),   # compiling takes minutes on a CPU: blocks of one width
    "12gb": dict(unet=SD15, batch=1, lora=64, flags=dict(gradient_checkpointing=True, offload_averages=True), steps=6,
                 only=("dmd lora", "dmd lora shared", "dmd gan lora", "lcm lora", "dmd lora compiled", "optimizers")),
    "sd15-512": dict(unet=SD15, batch=4, lora=64, flags={}, steps=6),
    "sdxl-1024": dict(unet=SDXL, batch=1, lora=64, flags=dict(gradient_checkpointing=True), steps=4),
    "emoji": dict(trained=True, only=("derivatives",))}        # the embedded teacher: a trained network is far less stiff in time than random weights
# name -> (script, options); "lora" takes the preset's rank, "full" trains all weights.
STEPS = {"dmd lora": ("dmd", {}), "dmd lora shared": ("dmd", dict(share_sample=True)), "dmd gan lora": ("dmd", dict(gan=5e-3)),
         "dmd lora compiled": ("dmd", dict(compile=True)), "dmd full": ("dmd", dict(lora=0)), "lcm lora": ("lcm", {}), "scm lora fd": ("scm", {}), "scm lora jvp": ("scm", dict(derivative="jvp")),
         "meanflow lora fd": ("meanflow", {}), "meanflow lora jvp": ("meanflow", dict(derivative="jvp"))}
GUIDANCE, CRITIC_UPDATES = 5.0, 2
# Every case, in the order in which the budget is spent: the first group of all presets, then the second.
CASES = (("plain", "dmd lora", "dmd lora shared", "dmd lora compiled", "optimizers", "networks", "dmd full", "dmd gan lora", "lcm lora"),
         ("scm lora fd", "scm lora jvp", "meanflow lora fd", "meanflow lora jvp", "derivatives"))
LONGEST = 180.0              # seconds of one case
WARM = 6                     # steps of a compiled run before its times count: rollouts call the student on parts of a batch, each size a new kind of call


@dataclass
class Config:
    presets: tuple[str, ...] = field(default_factory=lambda: ("sd15-512", "sdxl-1024", "emoji") if CUDA else ("tiny", "emoji"))
    budget: float = 560.0        # seconds in all; cases that would begin after it are left out and named
    threads: int = 0             # on a CPU (0: all cores)
    keep: bool = False           # keep the cases that log-<device>.json has, and run the others
    case: str = ""               # one case of one preset, in this process; prints JSON


# ------------------------------------------------------------------------------------------------------------- the model
def network(preset: str, **changes):
    from diffusers import UNet2DConditionModel
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return UNet2DConditionModel(**PRESETS[preset]["unet"] | changes).requires_grad_(False).eval()


def conditions(config, n: int, seed: int) -> dict[str, torch.Tensor]:
    """Random text embeddings as the family's encoders give them."""
    g = torch.Generator().manual_seed(seed)
    cond = {"prompt": torch.randn(n, 77, config.cross_attention_dim, generator=g)}
    return cond | ({"pooled": torch.randn(n, 1280, generator=g)} if config.addition_embed_type else {})


def call(module, x, timestep, cond):
    extra = {}
    if "pooled" in cond:
        size = x.shape[-1] * 8
        extra["added_cond_kwargs"] = {"text_embeds": cond["pooled"], "time_ids": x.new_tensor([[size, size, 0, 0, size, size]]).expand(len(x), -1)}
    return module(x, timestep, encoder_hidden_states=cond["prompt"], return_dict=False, **extra)[0]


def backbone(preset: str, **changes):
    from diffusers import DDIMScheduler

    from zoo.backbones import Backbone, Examples, Source
    from zoo.process import VP

    class Random(Backbone):
        family, pred, guidance, name, data, bf16_on_cpu = "sd", "eps", GUIDANCE, preset, "", False

        def __init__(self):
            self.module = network(preset, **changes)
            self.process = VP.from_config(DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).config)
            size = self.module.config.sample_size
            self.shape = (4, size, size)
            self.table, self.nothing = conditions(self.module.config, 16, 1), conditions(self.module.config, 1, 2)
            self.latents = torch.randn(16, *self.shape, generator=torch.Generator().manual_seed(3))

        def forward(self, module, x, timestep, cond):
            return call(module, x, timestep, cond)

        def head_shape(self):
            blocks = self.module.config.block_out_channels
            return blocks[-1], self.shape[-1] // 2 ** (len(blocks) - 1)

        def batches(self, images=False):
            def get(index):
                index = index % 16
                fields = {"cond": {k: v[index] for k, v in self.table.items()}, "uncond": {k: v.expand(len(index), *v.shape[1:]) for k, v in self.nothing.items()}}
                return fields | ({"x0": self.latents[index]} if images else {})
            return Source(1 << 16, get)

        def examples(self, n, seeds=1):
            fields = self.batches().get(torch.arange(n * seeds))
            return Examples([f"item {i}" for i in range(n * seeds)], fields["cond"], fields["uncond"])
    return Random()


# ------------------------------------------------------------------------------------------------------------- measuring
def wait():
    if CUDA:
        torch.cuda.synchronize()


def held() -> float:
    """GB: the most the GPU has held, or the most memory the process has had."""
    return torch.cuda.max_memory_allocated() / GB if CUDA else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


class Breakdown:
    """Seconds inside networks, by whose update it was, who was called and how, for one step that is not among the timed ones."""

    def __init__(self):
        self.rows: dict[str, list[tuple[float, int]]] = {}
        self.of = ""

    @contextmanager
    def __call__(self):
        from zoo.denoiser import Denoiser
        from zoo.run import Run
        real = Denoiser._raw

        def timed(net, x, *rest):
            wait()
            began = time.perf_counter()
            out = real(net, x, *rest)
            wait()
            role = self.names.get(id(net.module), "teacher") if net.role is None else net.role
            kind = f"{self.of}'s update: {role}{' average' if net.weights else ''}, {'with' if out.requires_grad else 'without'} graph"
            self.rows.setdefault(kind, []).append((time.perf_counter() - began, len(x)))
            return out
        def update(run, trainee, *args):
            self.of = trainee.name
            return minimize(run, trainee, *args)
        minimize, Run.minimize, Denoiser._raw = Run.minimize, update, timed
        try:
            yield
        finally:
            Run.minimize, Denoiser._raw = minimize, real

    def name(self, run):
        self.names = {id(t.net.module): n for n, t in run.trainees.items() if t.net.role is None}

    def table(self) -> dict[str, dict]:
        return {k: {"calls": len(v), "samples": sum(n for _, n in v), "seconds": sum(s for s, _ in v)} for k, v in self.rows.items()}


def through_run(preset: str, script: str, options: dict, folder: str) -> dict:
    """The script's own steps: seconds of each timed one, peak, and where one more step spends its time."""
    import importlib

    from zoo import compiled
    from zoo.run import Run
    spec, inside, base = PRESETS[preset], Breakdown(), 0.0
    module = importlib.import_module(f"train_{script}")
    precision = "bf16" if CUDA else "no"
    settings = dict(batch=spec["batch"], lora=spec["lora"], steps=10**6, time_budget=0.0, output_dir=folder, mixed_precision=precision, checkpoint_every=0, sample_every=0,
                    measure_every=0) | spec["flags"] | options | (dict(critic_updates=CRITIC_UPDATES) if script == "dmd" else {})
    seconds: list[float] = []

    def stepping(run):
        inside.name(run)
        run.step = 1
        began = time.perf_counter()
        if run.cfg.compile:
            compiled.networks(run)
        for i in range(WARM if run.cfg.compile else 1):
            yield i                                           # warm-up: states are made, and every kind of call is compiled
        wait()
        found["warm_up"] = time.perf_counter() - began
        for i in range(spec["steps"]):
            wait()
            began = time.perf_counter()
            yield i
            wait()
            seconds.append(time.perf_counter() - began)
        found["peak_gb"] = held() - base
        with inside():
            began = time.perf_counter()
            yield spec["steps"]
            wait()
            found["broken_down"] = time.perf_counter() - began
    found: dict = {}
    Run.watch = lambda run, student, *a, **k: run.average(student, run.cfg.ema)
    Run.loop = stepping
    base = 0.0 if CUDA else held()
    model = backbone(preset)
    module.main(module.Config(teacher=model, **settings))
    return found | {"seconds": seconds, "inside": inside.table()}


def plain(preset: str) -> dict:
    """DMD2 as one would write it for this one model: a teacher, a full student and a full critic, `CRITIC_UPDATES` critic steps and one of the
    student, an average of the student's weights."""
    import copy

    from diffusers import DDIMScheduler

    from zoo.run import Batch
    spec, updates = PRESETS[preset], itertools.count(1)
    base = 0.0 if CUDA else held()
    teacher = network(preset)
    student, critic = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    if spec["flags"].get("gradient_checkpointing"):
        student.enable_gradient_checkpointing()
        critic.enable_gradient_checkpointing()
        student.train(), critic.train()
    average = [p.detach().clone() for p in student.parameters()]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-5, betas=(0.9, 0.99), weight_decay=0.0) for m in (student, critic)]
    bars = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod.to(DEVICE)
    table, nothing = ({k: v.to(DEVICE) for k, v in conditions(teacher.config, n, seed).items()} for n, seed in ((16, 1), (1, 2)))
    size, batch = teacher.config.sample_size, spec["batch"]
    knots = [999, 749, 499, 249]
    cast = (lambda: torch.autocast("cuda", torch.bfloat16)) if CUDA else nullcontext

    def coefficients(t):
        a = bars[t][:, None, None, None]
        return a.sqrt(), (1 - a).sqrt()

    def denoise(net, x, t, cond):
        a, s = coefficients(t)
        return (x - s * call(net, x, t, cond).float()) / a

    def draw():
        index = torch.randint(16, (batch,), device=DEVICE)
        return {k: v[index] for k, v in table.items()}, {k: v.expand(batch, *v.shape[1:]) for k, v in nothing.items()}

    def student_input(cond):
        """As in the script, to the same depths: one per sample, the earlier of two draws; the steps before it run without gradient."""
        draws = Batch({}, (), (0, next(updates)), batch, slice(0, batch), DEVICE)
        depth = torch.minimum(draws.randint(4), draws.randint(4))
        t = torch.full((batch,), knots[0], device=DEVICE)
        x = torch.randn(batch, 4, size, size, device=DEVICE)
        for i in range(3):
            going = depth > i
            if going.any():
                with torch.no_grad():
                    x0 = denoise(student, x[going], t[going], {k: v[going] for k, v in cond.items()})
                t[going] = knots[i + 1]
                a, s = coefficients(t[going])
                x[going] = a * x0 + s * torch.randn_like(x0)
        return x, t

    def update(net, optimizer, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step():
        for _ in range(CRITIC_UPDATES):
            cond, _ = draw()
            with cast():
                with torch.no_grad():
                    x = denoise(student, *student_input(cond), cond)
                t, eps = torch.randint(1000, (batch,), device=DEVICE), torch.randn_like(x)
                a, s = coefficients(t)
                loss = (call(critic, a * x + s * eps, t, cond).float() - eps).square().mean()
            update(critic, optimizers[1], loss)
        cond, uncond = draw()
        critic.requires_grad_(False)
        with cast():
            x = denoise(student, *student_input(cond), cond)
            with torch.no_grad():
                t, eps = torch.randint(20, 980, (batch,), device=DEVICE), torch.randn_like(x)
                a, s = coefficients(t)
                x_t = a * x + s * eps
                guided, free = denoise(teacher, x_t, t, cond), denoise(teacher, x_t, t, uncond)
                real, fake = free + GUIDANCE * (guided - free), denoise(critic, x_t, t, cond)
                direction = (real - fake) / (x - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
            loss = 0.5 * (x - (x + direction).detach()).square().mean()
        update(student, optimizers[0], loss)
        critic.requires_grad_(True)
        torch._foreach_lerp_(average, list(student.parameters()), 0.02)

    seconds = []
    for i in range(spec["steps"] + 1):
        wait()
        began = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:], "peak_gb": held() - base}


def derivatives(preset: str) -> dict:
    """d/ds of the network's velocity along the flow, by forward mode through plain attention (torch's fused kernels have none) and by differences:
    relative error against float64 forward mode, and cost in forward passes."""
    from zoo import backbones
    from zoo.calculus import total_derivative
    model = backbones.load(preset).to(DEVICE) if PRESETS[preset].get("trained") else backbone(preset)
    fields = model.batches(images=True).get(torch.arange(1))
    g = torch.Generator().manual_seed(5)
    x, eps, t = fields["x0"], torch.randn(fields["x0"].shape, generator=g), torch.tensor([0.6])

    def measured(how, dtype, h=5e-3):
        net = model.teacher
        net.module.to(dtype)
        cond = {k: v.to(DEVICE, dtype) for k, v in fields["cond"].items()}
        at, start = t.to(DEVICE, dtype), model.process.noise(x.to(DEVICE, dtype), eps.to(DEVICE, dtype), t.to(DEVICE, dtype))
        along = model.process.velocity(x.to(DEVICE, dtype), eps.to(DEVICE, dtype), at)
        fn = lambda x, t: net(x, t, cond, to="v")

        def once():
            if how == "forward":
                with torch.no_grad():
                    return fn(start, at)
            return total_derivative(fn, (start, at), (along, torch.ones_like(at)), how, h)[1]
        out = once()                                          # warm-up
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        before, spent = (torch.cuda.memory_allocated() / GB if CUDA else held()), []
        for _ in range(3):
            wait()
            began = time.perf_counter()
            out = once()
            wait()
            spent.append(time.perf_counter() - began)
        return out.double(), sorted(spent)[1], held() - before

    _, forward, _ = measured("forward", torch.float32)
    rows, results = {}, {"jvp, math attention": measured("jvp", torch.float32)}
    for h in (2e-4, 1e-3, 5e-3, 2e-2):
        results[f"finite difference, h = {h:g}"] = measured("fd", torch.float32, h)
    exact, _, _ = measured("jvp", torch.float64)              # last: the weights stay in float64
    for name, (value, spent, extra) in results.items():
        rows[name] = {"error": ((value - exact).norm() / exact.norm()).item(), "seconds": spent, "forwards": spent / forward, "extra_gb": extra}
    return {"forward_seconds": forward, "rows": rows}


def optimizers(preset: str) -> dict:
    """Seconds of one AdamW step over what a run trains, by torch's list of tensors (foreach) and by its fused kernel, in turns."""
    spec, model = PRESETS[preset], backbone(preset)
    rows = {}
    for kind, lora in (("LoRA", spec["lora"]), ("full weights", 0)):
        try:
            params = list(model.make("student", lora=lora).trainable().values())
            for p in params:
                p.requires_grad_(True).grad = torch.full_like(p, 1e-4)
            spent: dict[str, list[float]] = {"foreach": [], "fused": []}
            for how in ("foreach", "fused", "fused", "foreach"):
                optimizer = torch.optim.AdamW(params, lr=1e-5, betas=(0.9, 0.99), weight_decay=0.0, **{how: True})
                for i in range(8):
                    wait()
                    began = time.perf_counter()
                    optimizer.step()
                    wait()
                    if i >= 2:                                # the first ones make the states
                        spent[how].append(time.perf_counter() - began)
                del optimizer
            rows[kind] = {"numbers": sum(p.numel() for p in params), "tensors": len(params)} | {k: median(v) for k, v in spent.items()}
        except torch.cuda.OutOfMemoryError:
            rows[kind] = {"refused": "out of memory"}
    return {"rows": rows}


def networks(preset: str) -> dict:
    """One network with an adapter, as a step calls it: plain, with compiled blocks, and with compiled blocks recorded as CUDA graphs (GPU). Seconds,
    and how far each is from the plain network after its weights have moved, and in the gradient of the first of two calls (graphs reuse the
    memory of their outputs)."""
    from zoo import compiled
    spec, repeat = PRESETS[preset], 15 if CUDA else 5
    saving = spec["flags"].get("gradient_checkpointing", False)
    cast = (lambda: torch.autocast("cuda", torch.bfloat16)) if CUDA else nullcontext
    changes = spec.get("networks", {})
    model, state = backbone(preset, **changes), None
    fields = model.batches(images=True).get(torch.arange(spec["batch"]))
    cond = {k: v.to(DEVICE) for k, v in fields["cond"].items()}
    x, t = fields["x0"].to(DEVICE), torch.full((spec["batch"],), 0.6, device=DEVICE)

    def made():
        nonlocal state
        net = (model if state is None else backbone(preset, **changes)).make("student", lora=spec["lora"], gradient_checkpointing=saving)
        for name, p in net.trainable().items():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.01)
        state = state or {k: v.clone() for k, v in net.trainable().items()}
        for name, p in net.trainable().items():
            p.data.copy_(state[name])
        return net

    def forward(net):
        with torch.no_grad(), cast():
            return net(x, t, cond, to="eps")

    def both(net):
        with cast():
            loss = net(x, t, cond, to="eps").square().mean()
        loss.backward()
        for p in net.trainable().values():
            p.grad = None

    def first_of_two(net):
        """The gradient of one call after which another was made."""
        params = list(net.trainable().values())
        with cast():
            first, _ = net(x, t, cond, to="eps").square().mean(), net(x.flip(0), t, cond, to="eps")
        return torch.cat([g.flatten() for g in torch.autograd.grad(first, params, materialize_grads=True)])

    def clock(call, net, stance):
        torch.compiler.cudagraph_mark_step_begin()
        wait()
        began = time.perf_counter()
        with torch.compiler.set_stance(stance):
            call(net)
        wait()
        return time.perf_counter() - began

    def check(net):
        """Predictions with weights moved in place, and gradients; the weights are put back."""
        with torch.no_grad():
            for p in net.trainable().values():
                p.mul_(2)
        torch.compiler.cudagraph_mark_step_begin()
        out = forward(net).float().clone()
        torch.compiler.cudagraph_mark_step_begin()
        grad = first_of_two(net).float().clone()
        with torch.no_grad():
            for p in net.trainable().values():
                p.div_(2)
        return out, grad
    apart = lambda a, b: ((a - b).norm() / b.norm()).item()
    rows: dict[str, dict] = {}

    def measure(name, net):
        """Times of `net` and, in turns, of the same with its blocks as they are."""
        for kind, call in (("forward", forward), ("forward and backward", both)):
            first = clock(call, net, "default")
            clock(call, net, "default")
            spent = {"default": [], "force_eager": []}
            for i in range(repeat):
                for stance in list(spent)[:: 1 if i % 2 else -1]:
                    spent[stance].append(clock(call, net, stance))
            rows[f"{name}, {kind}"] = {"seconds": median(spent["default"]), "plain": median(spent["force_eager"]), "first": first}
        with torch.compiler.set_stance("force_eager"):
            wanted = check(net)
        for kind, a, b in zip(("forward", "forward and backward"), check(net), wanted):
            rows[f"{name}, {kind}"]["apart"] = apart(a, b)
    ways = {"compiled": {}, **({"compiled, CUDA graphs": {"mode": "reduce-overhead"}} if CUDA else {})}
    for name, options in ways.items():
        net = made()
        try:
            compiled.compile_blocks(net.module, **options)
            measure(name, net)
        except Exception as error:  # whatever a compiler says: the other rows are worth having
            rows[name] = {"refused": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"}
        del net
        torch._dynamo.reset()
    return {"rows": rows, "blocks": len(compiled.blocks(model.module))}


def one(preset: str, case: str) -> dict:
    import accelerate.utils, datasets, diffusers.models, peft, zoo.backbones, zoo.run  # noqa: E401, F401  what is imported later would count as the step's memory
    if case == "plain":
        return plain(preset)
    if case in ("derivatives", "optimizers", "networks"):
        return {"derivatives": derivatives, "optimizers": optimizers, "networks": networks}[case](preset)
    script, options = STEPS[case]
    with tempfile.TemporaryDirectory() as folder:
        return through_run(preset, script, options, folder + "/run")


# ------------------------------------------------------------------------------------------------------------- the table
def device_name() -> str:
    if CUDA:
        return torch.cuda.get_device_name()
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine()) if Path("/proc/cpuinfo").exists() else platform.machine()
    return f"CPU ({model}, {torch.get_num_threads()} threads)"


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def report(found: dict, left: list[str]) -> str:
    lines = [f"# Training steps on {device_name()}", "", f"torch {torch.__version__.split('+')[0]}, {'bf16 autocast' if CUDA else 'float32'}, weights in float32. Random weights and inputs; "
             f"DMD2 steps are {CRITIC_UPDATES} critic updates and one of the student." + ("" if CUDA else " CPU-size networks: these numbers say nothing about a GPU.")]
    for preset, cases in found.items():
        spec, base = PRESETS[preset], cases.get("plain", {})
        lines += ["", f"## {preset}, the embedded teacher's trained weights"] if spec.get("trained") else ["", f"## {preset}: batch {spec['batch']}, {spec['unet']['sample_size']} x {spec['unet']['sample_size']} latents, LoRA rank {spec['lora']}"
                  + "".join(f", {k}" for k in spec["flags"]), "", "| step | seconds | time / plain | peak GB | memory / plain |", "|---|---|---|---|---|"]
        for case in ["plain", *STEPS]:
            row = cases.get(case)
            if row is None:
                continue
            name = "DMD2, three copies (plain)" if case == "plain" else case
            if "error" in row:
                lines.append(f"| {name} | {row['error']} | | | |")
                continue
            ratio = lambda a, b, near: f"{a / b:.2f}" if near and b else ""
            near, s = "seconds" in base and case.startswith(("dmd", "plain")) and "gan" not in case, median(row["seconds"])       # the plain step has no GAN
            name += f" (after {row['warm_up']:.0f} s of compiling and warming up)" if case.endswith("compiled") else ""
            lines.append(f"| {name} | {s:.3g} | {ratio(s, median(base['seconds']), near) if near else ''} | {row['peak_gb']:.2f} | "
                         f"{ratio(row['peak_gb'], base['peak_gb'], near) if near else ''} |")
        lines += [] if spec.get("trained") else ["", "Where one further step spent its time, the device waited for at every forward pass (calls, samples; the rest is backward passes and optimisers):", "",
                  "| step | forward pass | calls | samples | seconds | of the step |", "|---|---|---|---|---|---|"]
        for case in STEPS:
            for kind, v in cases.get(case, {}).get("inside", {}).items():
                lines.append(f"| {case} | {kind} | {v['calls']} | {v['samples']} | {v['seconds']:.3g} | {100 * v['seconds'] / cases[case]['broken_down']:.0f} % |")
        if "rows" in cases.get("optimizers", {}):
            lines += ["", "One AdamW step:", "", "| trained | numbers | tensors | foreach, s | fused, s | fused / foreach |", "|---|---|---|---|---|---|"]
            for kind, r in cases["optimizers"]["rows"].items():
                lines.append(f"| {kind} | {r['refused']} | | | | |" if "refused" in r else
                             f"| {kind} | {r['numbers']:,} | {r['tensors']} | {r['foreach']:.3g} | {r['fused']:.3g} | {r['fused'] / r['foreach']:.2f} |")
        elif "error" in cases.get("optimizers", {}):
            lines += ["", f"Optimisers: {cases['optimizers']['error']}"]
        if "rows" in cases.get("networks", {}):
            lines += ["", f"One network with its adapter ({cases['networks']['blocks']} blocks that repeat), one batch; apart: relative "
                      "distance from the plain network, of the prediction after the weights moved and of the gradient of the first of two calls:", "",
                      "| network | seconds | plain, s | time / plain | first call, s | apart |", "|---|---|---|---|---|---|"]
            for name, r in cases["networks"]["rows"].items():
                lines.append(f"| {name} | {r['refused']} | | | | |" if "refused" in r else
                             f"| {name} | {r['seconds']:.3g} | {r['plain']:.3g} | {r['seconds'] / r['plain']:.2f} | {r['first']:.1f} | {r['apart']:.1e} |")
            lines += [] if CUDA else ["", "CUDA graphs were not tried: there is no GPU here."]
        elif "error" in cases.get("networks", {}):
            lines += ["", f"Networks: {cases['networks']['error']}"]
        if "rows" in cases.get("derivatives", {}):
            lines += ["", f"Total derivative along the flow, one sample (one forward pass: {cases['derivatives']['forward_seconds']:.3g} s); error against float64 forward mode:", "",
                      "| derivative | relative error | cost in forward passes | extra GB |", "|---|---|---|---|"]
            for name, r in cases["derivatives"]["rows"].items():
                lines.append(f"| {name} | {r['error']:.1e} | {r['forwards']:.2f} | {r['extra_gb']:.2f} |")
        elif "error" in cases.get("derivatives", {}):
            lines += ["", f"Derivatives: {cases['derivatives']['error']}"]
    return "\n".join(lines + ([f"\nLeft out when the budget was spent: {', '.join(left)}."] if left else [])) + "\n"


def main(cfg: Config):
    if not CUDA:
        torch.set_num_threads(cfg.threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1)
    if cfg.case:
        print("RESULT " + json.dumps(one(cfg.presets[0], cfg.case)))
        return
    slug = "cpu" if not CUDA else torch.cuda.get_device_name().lower().replace(" ", "-")
    record = HERE / f"log-{slug}.json"
    began, found, left = time.perf_counter(), {preset: {} for preset in cfg.presets}, []
    if cfg.keep and record.exists():
        kept = json.loads(record.read_text())["found"]
        found |= {preset: {case: row for case, row in cases.items() if "error" not in row} for preset, cases in kept.items()}
    env = {"HF_HUB_OFFLINE": "1"} | ({} if CUDA else {"TORCHINDUCTOR_COMPILE_THREADS": str(torch.get_num_threads())})
    wanted = lambda preset, case: case in PRESETS[preset].get("only", (case,)) and case not in PRESETS[preset].get("without", ())
    for preset, case in [(p, c) for group in CASES for p in cfg.presets for c in group if wanted(p, c) and c not in found[p]]:
        spent = time.perf_counter() - began
        if spent > cfg.budget:
            left.append(f"{preset} {case}")
            continue
        command = [sys.executable, __file__, "--presets", preset, "--case", case, "--threads", str(torch.get_num_threads())]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=min(LONGEST, max(40.0, cfg.budget - spent)), env=os.environ | env)
            line = next((row for row in done.stdout.splitlines() if row.startswith("RESULT ")), None)
            found[preset][case] = json.loads(line[7:]) if line else {"error": "out of memory" if "OutOfMemory" in done.stderr else (done.stderr.strip().splitlines() or ["no output"])[-1][:160]}
        except subprocess.TimeoutExpired:
            found[preset][case] = {"error": "not done in time"}
        print(f"{preset} {case}: {time.perf_counter() - began - spent:.0f} s", file=sys.stderr, flush=True)
        write(found, left, slug)         # what is there stays there, whatever becomes of the next case
    print(write(found, left, slug))


def write(found: dict, left: list[str], slug: str) -> str:
    text = report(found, left)
    (HERE / f"log-{slug}.md").write_text(text)
    (HERE / f"log-{slug}.json").write_text(json.dumps({"device": device_name(), "torch": torch.__version__, "found": found, "left": left}, indent=1) + "\n")
    return text


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Config))
