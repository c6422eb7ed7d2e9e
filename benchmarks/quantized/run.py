"""What a base kept in few bits (--base_bits) gets wrong, and what it weighs: python benchmarks/quantized/run.py

On trained teachers (--teachers, folders and Hub ids too): relative root mean square difference of the packed teacher's prediction to the full
one's, at its own samples noised to five times, and of its many-step samples on the same noise; bytes held, counted. At real shapes, without weights:
bytes of the base from its shapes, by the same count (held against the real one on the first teacher). The table goes to log.md beside this file."""
from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from zoo import backbones, quantized, rollout  # noqa: E402

HERE = Path(__file__).parent
TIMES, STEPS, PROMPTS, SEEDS = (0.1, 0.3, 0.5, 0.7, 0.9), 25, 16, 2


@dataclass
class Options:
    teachers: tuple[str, ...] = ("emoji",)
    real_shapes: bool = True        # SDXL's and FLUX.1's as well
    log: bool = True


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of a - b relative to b's."""
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def readings(model, seen: dict | None = None) -> dict:
    """Predictions at noised samples and many-step samples; seen: those of another run, whose samples are noised."""
    given, g = model.examples(PROMPTS, SEEDS), torch.Generator().manual_seed(1)
    noise, process = torch.randn(len(given.names), *model.shape, generator=g), model.process
    times = process.t_max * (1 - torch.arange(STEPS, dtype=torch.float64) / STEPS)
    samples = rollout.sample(model.teacher, noise, given.cond, times, "ode", uncond=given.uncond, guidance=model.guidance)
    out = {"samples": samples, "pictures": model.decode(samples)}
    for t in TIMES:
        at = torch.full((len(noise),), t * process.t_max)
        x = process.noise((seen or out)["samples"], torch.randn(noise.shape, generator=g), at)
        out[t] = model.teacher(x, at, given.cond, to=model.pred)
    return out


def measured(teacher: str) -> list[dict]:
    """One row per number of bits."""
    full = backbones.load(teacher)
    whole, rows = readings(full), []
    for bits in (16, 8, 4):
        model = backbones.load(teacher)
        share = sum(model.module.get_submodule(p).weight.numel() for p in quantized.layers(model.module, model.time_embeddings)) / \
            sum(p.numel() for p in model.module.parameters())
        quantized.quantize(model, bits, "cpu")
        packed, mine = quantized.of(model.module), readings(model, whole)
        assert packed.kept == from_shapes(full.module, full.time_embeddings, bits), "the count from shapes is not what is held"
        rows.append({"network": teacher, "bits": bits, "packed": share, "before": packed.before, "now": packed.kept, "weights": packed.error,
                     "by time": [distance(mine[t], whole[t]) for t in TIMES], "pictures": distance(mine["pictures"], whole["pictures"])})
    return rows


def from_shapes(module, apart: tuple[str, ...], bits: int) -> int:
    """Bytes of `module` with packed layers, from shapes alone: float32 for the rest, as a run loads it."""
    names = set(quantized.layers(module, apart))
    total = sum(4 * p.numel() for n, p in module.named_parameters() if n.removesuffix(".weight") not in names)
    for name in names:
        layer = module.get_submodule(name)
        n, blocks = layer.weight.numel(), -(-layer.weight.numel() // 64)
        # 4 bits: codes, an 8-bit scale per 64 numbers, a float32 scale per 256 of those, their offset, and two code tables per layer.
        total += 2 * n if bits == 16 else n + 4 * layer.out_features if bits == 8 else -(-n // 2) + blocks + 4 * -(-blocks // 256) + 4 + 4 * 16 + 4 * 256
    return total


def real_shapes() -> list[dict]:
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel
    spec = importlib.util.spec_from_file_location("training_step", HERE.parent / "training_step/run.py")
    steps = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = steps
    spec.loader.exec_module(steps)
    rows = []
    with torch.device("meta"):
        networks = {"SDXL": (UNet2DConditionModel(**steps.SDXL), ("time_embedding",)),
                    "FLUX.1-dev": (FluxTransformer2DModel(guidance_embeds=True), ("time_text_embed.timestep_embedder",))}
    for name, (module, apart) in networks.items():
        n = sum(p.numel() for p in module.parameters())
        share = sum(module.get_submodule(p).weight.numel() for p in quantized.layers(module, apart)) / n
        rows += [{"network": f"{name} ({n / 1e9:.2f} billion)", "bits": bits, "packed": share, "before": 4 * n,
                  "now": from_shapes(module, apart, bits)} for bits in (16, 8, 4)]
    return rows


def table(rows: list[dict]) -> str:
    size = lambda b: f"{b / 1024**3:.2f} GB" if b > 1024**3 else f"{b / 1024**2:.2f} MB"
    lines = ["| network | bits | share packed | as loaded (float32) | packed | weights | prediction | by time " + "/".join(map(str, TIMES)) + " | pictures |",
             "|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        errors = [f"{r['weights']:.2%}", f"{sum(r['by time']) / len(TIMES):.2%}", " / ".join(f"{e:.2%}" for e in r["by time"]),
                  f"{r['pictures']:.2%}"] if "weights" in r else ["–"] * 4
        lines.append(f"| {r['network']} | {r['bits']} | {r['packed']:.1%} | {size(r['before'])} | {size(r['now'])} | " + " | ".join(errors) + " |")
    return "\n".join(lines)


def main(options: Options) -> None:
    rows = [row for teacher in options.teachers for row in measured(teacher)] + (real_shapes() if options.real_shapes else [])
    text = table(rows)
    print(text)
    if options.log:
        (HERE / "log.md").write_text(text + "\n")


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Options))
