"""Peak memory of a training step at real sizes: what `--dry_run` predicts, beside what the step's tensors take.

    python benchmarks/memory/run.py                      # every case, simulated: no GPU, no download, minutes each on one core
    python benchmarks/memory/run.py --real               # on a GPU: the same cases for real besides, as far as they fit
    python benchmarks/memory/run.py --cases "sdxl-1024 dmd"

The steps are those of the scripts in train_scripts/, through `Run`, on networks made from the public configurations with random weights;
text embeddings and latents are there, as from a cache, so that encoders and autoencoder count nowhere. simulate.py says what is not counted.
Every case runs in a process of its own. Writes log.json and README.md's table; what is in the log is not repeated (--fresh: it is)."""
from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "train_scripts"), str(HERE)]
from simulate import Pretend, gpu_precision  # noqa: E402

GB = 1024**3
LORA = dict(lora=64, gradient_checkpointing=True)
DMD = dict(student_times=(1.0,), critic_updates=1)       # more updates and more steps repeat the same calls: the peak is the same
# case -> (network, script, flags, GB it was asked to fit in)
CASES: dict[str, tuple[str, str, dict, float | None]] = {
    "sd15-512 dmd, LoRA": ("sd15", "dmd", LORA | DMD, 12),
    "sd15-512 dmd, full weights": ("sd15", "dmd", DMD | dict(gradient_checkpointing=True), None),
    "sdxl-1024 dmd, LoRA": ("sdxl", "dmd", LORA | DMD, 24),
    "sdxl-1024 dmd, LoRA, GAN": ("sdxl", "dmd", LORA | DMD | dict(gan=1e-3), 24),
    "sdxl-1024 dmd, LoRA, no checkpointing": ("sdxl", "dmd", LORA | DMD | dict(gradient_checkpointing=False), None),
    "sdxl-1024 dmd, full weights": ("sdxl", "dmd", DMD | dict(gradient_checkpointing=True), None),
    "sdxl-1024 lcm, LoRA": ("sdxl", "lcm", LORA, 24),
    "sdxl-1024 dmd, LoRA, batch 4": ("sdxl", "dmd", LORA | DMD | dict(batch=4), None),
    "sdxl-1024 dmd, LoRA, no checkpointing, batch 4": ("sdxl", "dmd", LORA | DMD | dict(gradient_checkpointing=False, batch=4), None),
    "sdxl-1024 dmd, LoRA, base in 16 bits": ("sdxl", "dmd", LORA | DMD | dict(base_bits=16), 24),
    "flux-12b-1024 dmd, LoRA": ("flux", "dmd", LORA | DMD, 80),
    "flux-12b-1024 dmd, LoRA, base in 16 bits": ("flux", "dmd", LORA | DMD | dict(base_bits=16), 80),
    "wan-1.3b-480p-81 dmd, LoRA": ("wan", "dmd", LORA | DMD, 48)}


@dataclass
class Config:
    cases: tuple[str, ...] = tuple(CASES)
    real: bool = False           # also run them, on a GPU
    fresh: bool = False
    one: bool = False            # the first case, in this process; prints JSON


# --------------------------------------------------------------------------------------------------------------- networks
def unet(device, family: str, config: dict, **conditions):
    """A UNet of the stable-diffusion kind: `config` as in its unet/config.json."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from zoo.backbones.sd import StableDiffusion
    from zoo.backbones.sdxl import StableDiffusionXL
    from zoo.process import VP
    with torch.device(device):
        net = UNet2DConditionModel(**config)
    table = VP.from_config(DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).config)
    return stand_in({"sd": StableDiffusion, "sdxl": StableDiffusionXL}[family], net, conditions, (4, config["sample_size"], config["sample_size"]),
                    guidance=5.0, pred="eps", process=table, pipe=SimpleNamespace(vae_scale_factor=8))


def sd15(device):
    return unet(device, "sd", steps().SD15, prompt=(77, 768))


def sdxl(device):
    return unet(device, "sdxl", steps().SDXL, prompt=(77, 2048), pooled=(1280,))


def steps():
    """benchmarks/training_step/run.py, which has the UNets' configurations."""
    spec = importlib.util.spec_from_file_location("training_step", HERE.parent / "training_step/run.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flux(device):
    """transformer/config.json of FLUX.1-dev, which is the class's own default but for the guidance it embeds."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from zoo.backbones.flux import Flux
    pipe = SimpleNamespace(vae_scale_factor=8, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
                           **{n: getattr(FluxPipeline, n) for n in ("_pack_latents", "_unpack_latents", "_prepare_latent_image_ids")})
    with torch.device(device):
        net = FluxTransformer2DModel(guidance_embeds=True)
    return stand_in(Flux, net, {"prompt": (512, 4096), "pooled": (768,)}, (16, 128, 128), guidance=3.5, pipe=pipe, embeds=True,
                    takes_guidance=True)


def wan(device):
    """transformer/config.json of Wan2.1-T2V-1.3B; 81 frames of 480 x 832 are 21 x 60 x 104 latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
    from diffusers.configuration_utils import FrozenDict

    from zoo.backbones.wan import Wan
    pipe = SimpleNamespace(vae_scale_factor_temporal=4, vae_scale_factor_spatial=8, config=FrozenDict(expand_timesteps=False),
                           scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    with torch.device(device):
        net = WanTransformer3DModel(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30)
    return stand_in(Wan, net, {"prompt": (512, 4096)}, (16, 21, 60, 104), guidance=5.0, pipe=pipe)


def tiny(device):
    """A small UNet that fits anywhere: the test's."""
    config = dict(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8,
                  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    return unet(device, "sd", config, prompt=(7, 32))


NETWORKS = {f.__name__: f for f in (sd15, sdxl, flux, wan, tiny)}


def stand_in(family, module, conditions: dict[str, tuple], shape: tuple[int, ...], **facts):
    """A family's adapter around a network with random weights: encoded text and latents without encoders."""
    from zoo.backbones import Examples, Source
    from zoo.process import RectifiedFlow

    class Stand(family):
        def __init__(self):
            self.module, self.shape, self.stock_shape, self.folder, self.data = module.requires_grad_(False).eval(), shape, shape, "random", ""
            self.name, self.process = family.family, RectifiedFlow()
            self.__dict__.update(facts)

        def batches(self, images=False):
            def get(index):
                cond = {k: torch.zeros(len(index), *size) for k, size in conditions.items()}
                return {"cond": cond, "uncond": cond} | ({"x0": torch.zeros(len(index), *shape)} if images else {})
            return Source(1 << 16, get)

        def examples(self, n, seeds=1):
            fields = self.batches().get(torch.arange(n * seeds))
            return Examples(["item"] * n * seeds, fields["cond"], fields["uncond"])

        def encode_prompts(self, prompts):
            return torch.zeros(len(prompts), *conditions["prompt"])

        def to(self, device):
            self.module.to(device)
            return self
    return Stand()


# -------------------------------------------------------------------------------------------------------------- one case
def measure(network: str, script: str, flags: dict, memory: Pretend | None) -> dict:
    """{"predicted", "peak", "roles"} in GB, {"parameters", "trained"} in numbers; memory: the counter, or None for a GPU's own."""
    from zoo.plan import plan
    from zoo.run import Run
    found, cuda = {}, memory is None
    module = importlib.import_module(f"train_{script}")

    def peak() -> float:
        return (torch.cuda.max_memory_allocated() if cuda else memory.peak) / GB

    def stepping(run):
        estimate = plan(run)
        found.update(predicted=(estimate.held + estimate.needed) / GB,
                     roles={name: {k: v / GB for k, v in role.items() if v} for name, role in estimate.roles.items()},
                     trained={name: sum(p.numel() for p in t.params.values()) for name, t in run.trainees.items()})
        gc.collect()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            memory.peak = memory.live
        for run.step in (1, 2):                                    # the second has the optimisers' states from its beginning
            yield run.step
        found["peak"] = peak()
    saved = Run.loop, Run.watch
    Run.loop, Run.watch = stepping, lambda run, student, *_a, **_k: run.average(student, run.cfg.ema)
    try:
        with tempfile.TemporaryDirectory() as folder:
            pretending = memory is not None and not memory.everything
            model = NETWORKS[network]("cuda" if cuda else "cpu") if not pretending else _made(memory, lambda: NETWORKS[network]("cpu"))
            found["parameters"] = sum(p.numel() for p in model.module.parameters())
            if pretending:
                make = model.make
                model.make = lambda *a, **k: _made(memory, lambda: make(*a, **k))
            settings = dict(batch=1, lora=0, steps=10**6, output_dir=folder + "/run", mixed_precision="bf16", checkpoint_every=0, sample_every=0,
                            measure_every=0, seed=1)
            settings |= {"time_budget": 0.0} | flags
            module.main(module.Config(teacher=model, **settings))
    finally:
        Run.loop, Run.watch = saved
    return found


def _made(memory, make):
    with memory.networks():
        return make()


def one(name: str, real: bool) -> dict:
    network, script, flags, _ = CASES[name]
    if real:
        return measure(network, script, flags, None)
    memory = Pretend()
    with gpu_precision(), memory:
        return measure(network, script, flags, memory)


# ------------------------------------------------------------------------------------------------------------- the table
def table(found: dict) -> str:
    lines = ["| case | parameters | trained | predicted GB | simulated GB | predicted / simulated | asked GB | measured GB on a GPU |",
             "|---|---|---|---|---|---|---|---|"]
    for name, row in found.items():
        limit, sim, real = CASES[name][3], row.get("simulated", {}), row.get("real", {})
        if "error" in sim:
            lines.append(f"| {name} | {sim['error']} | | | | | | |")
            continue
        trained = " + ".join(f"{v / 1e6:,.0f} M" for v in sim["trained"].values())
        lines.append(f"| {name} | {sim['parameters'] / 1e9:.2f} B | {trained} | {sim['predicted']:.1f} | {sim['peak']:.1f} | "
                     f"{sim['predicted'] / sim['peak']:.2f} | {limit or ''} | {'%.1f' % real['peak'] if 'peak' in real else real.get('error', '')} |")
    return "\n".join(lines)


def write(found: dict):
    record = {"torch": torch.__version__.split("+")[0], "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "", "found": found}
    (HERE / "log.json").write_text(json.dumps(record, indent=1) + "\n")
    page = (HERE / "README.md").read_text()
    head, rest = page.split("<!-- memory:begin -->")
    (HERE / "README.md").write_text(head + "<!-- memory:begin -->\n" + table(found) + "\n<!-- memory:end -->" + rest.split("<!-- memory:end -->")[1])


def main(cfg: Config):
    if cfg.one:
        print("RESULT " + json.dumps(one(cfg.cases[0], cfg.real)))
        return
    if cfg.real and not torch.cuda.is_available():
        raise SystemExit("error: --real measures on a GPU, and there is none here")
    log = HERE / "log.json"
    found = json.loads(log.read_text())["found"] if log.exists() else {}
    found = {name: found.get(name, {}) for name in CASES if name in found or name in cfg.cases}
    for kind in ("simulated", "real") if cfg.real else ("simulated",):
        for name in cfg.cases:
            if not cfg.fresh and "peak" in found[name].get(kind, {}):
                continue
            began = time.perf_counter()
            done = subprocess.run([sys.executable, __file__, "--cases", name, "--one", *["--real"] * (kind == "real")], capture_output=True, text=True,
                                  env=os.environ | {"HF_HUB_OFFLINE": "1"})
            line = next((row for row in done.stdout.splitlines() if row.startswith("RESULT ")), None)
            why = "out of memory" if "OutOfMemory" in done.stderr else (done.stderr.strip().splitlines() or ["no output"])[-1][:160]
            row = found[name][kind] = json.loads(line[7:]) if line else {"error": why}
            print(f"{name}, {kind}: {row.get('peak', row.get('error'))}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
            write({k: v for k, v in found.items() if v})
    print(table({k: v for k, v in found.items() if v}))


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Config, description=__doc__))
