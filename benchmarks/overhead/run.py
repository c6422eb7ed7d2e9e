"""What `Run` costs: one DMD2 iteration (two critic updates, one student update) through `Run.minimize` against the same iteration in a
bare hand-written loop, interleaved pair by pair on the same networks and batch size.

    python benchmarks/overhead/run.py                      # writes results.json here; target: median ratio at most 1.03"""
from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "train_scripts")]


@dataclass
class Config:
    teacher: str = "fashion"
    batch: int = 32
    pairs: int = 12
    threads: int = 0        # 0: all cores


def bare_loop(model, batch: int):
    """One iteration of DMD2 as one would write it for this model alone, fp32, one student time."""
    from zoo import critics, losses
    from zoo.process import per_sample
    G, fake = model.make("student"), model.make("critic")
    real, process, w = model.teacher, model.process, model.guidance
    params = {n: list(net.module.parameters()) for n, net in (("G", G), ("fake", fake))}
    opts = {n: torch.optim.AdamW(p, lr=2e-4, betas=(0.0, 0.99), weight_decay=0.0, fused=True) for n, p in params.items()}
    average = [p.detach().clone() for p in params["G"]]
    data = model.batches()

    def draw():
        fields = data.get(torch.randint(len(data), (batch,)))
        return fields["cond"], fields["uncond"], torch.randn(batch, *model.shape)

    def update(name, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params[name], 10.0)
        opts[name].step()
        opts[name].zero_grad(set_to_none=True)

    def iteration():
        one = torch.ones(batch)
        for _ in range(2):
            cond, _, z = draw()
            with torch.no_grad():
                x = G(z, one, cond)
            update("fake", critics.denoising(fake, x, torch.randn_like(x), torch.rand(batch).clamp(min=1e-3), cond))
        cond, uncond, z = draw()
        for p in params["fake"]:
            p.requires_grad_(False)
        x = G(z, one, cond)
        t = 0.02 + 0.96 * torch.rand(batch)
        x_t = process.noise(x, torch.randn_like(x), t)
        with torch.no_grad():
            x_real = losses.guided(real, x_t, t, cond, uncond, w)
            x_fake = fake(x_t, t, cond)
            direction = per_sample(1 / (x - x_real).abs().flatten(1).mean(1).clamp(min=1e-5), x) * (x_real - x_fake)
        update("G", losses.along(x, direction))
        for p in params["fake"]:
            p.requires_grad_(True)
        torch._foreach_lerp_(average, params["G"], 0.02)
    return iteration


def pairs(model, other, cfg, folder) -> list[dict[str, float]]:
    """Seconds of interleaved iterations: the script's own closures through Run, and `other()`."""
    import train_dmd

    from zoo.run import Run
    settings = train_dmd.Config(teacher=model, batch=cfg.batch, student_times=(1.0,), steps=10**6, time_budget=0, output_dir=folder, mixed_precision="no",
                                checkpoint_every=0, sample_every=0, measure_every=0)
    Run.watch = lambda self, student, *a, **k: self.average(student, settings.ema)
    Run.loop = lambda self: stepping(self)
    times: list[float] = []

    def stepping(run):
        """The loop body runs between two yields; between iterations the other side of the pair is timed."""
        from tqdm import tqdm
        bar = tqdm(disable=True)
        yield 0                                        # warm-up
        other()
        for i in range(cfg.pairs):
            if i % 2:
                times.append(("bare", clock(other)))
            began = time.perf_counter()
            yield i
            run.step += 1
            run._housekeeping(bar)
            times.append(("run", time.perf_counter() - began))
            if not i % 2:
                times.append(("bare", clock(other)))
    train_dmd.main(settings)
    values = {name: [s for n, s in times if n == name] for name in ("run", "bare")}
    return [{"run": a, "bare": b} for a, b in zip(values["run"], values["bare"])]


def clock(fn) -> float:
    began = time.perf_counter()
    fn()
    return time.perf_counter() - began


def main(cfg: Config):
    from zoo import backbones
    torch.set_num_threads(cfg.threads or os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        seconds = pairs(backbones.load(cfg.teacher), bare_loop(backbones.load(cfg.teacher), cfg.batch), cfg, folder + "/run")
    ratios = sorted(p["run"] / p["bare"] for p in seconds)
    result = {"teacher": cfg.teacher, "batch": cfg.batch, "threads": torch.get_num_threads(), "torch": torch.__version__.split("+")[0], "pairs": seconds,
              "ratio_median": round(statistics.median(ratios), 4), "ratio_min": round(ratios[0], 4), "ratio_max": round(ratios[-1], 4)}
    (Path(__file__).parent / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print({k: v for k, v in result.items() if k != "pairs"})


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Config))
