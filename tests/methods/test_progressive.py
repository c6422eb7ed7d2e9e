"""Progressive distillation and guided distillation against closed forms: targets, weights, phases, resumption, the toy."""
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from zoo import UserError, backbones, losses, rollout
from zoo.process import VP, RectifiedFlow
from zoo.toy import Gaussian, sliced_wasserstein

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "train_scripts"))
import train_progressive as script  # noqa: E402

RF = RectifiedFlow()
COSINE = VP(DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod)


def world(process):
    return Gaussian(1.0, 0.7, process=process)


def states(process, n=512, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0, eps = (torch.randn(n, 1, generator=g, dtype=torch.float64) for _ in range(2))
    return 1 + 0.7 * x0, eps


def ddim(net, x, t, r):
    x0, eps = net.process.pair(net(x, t, {}, to="v"), x, t, "v")
    return net.process.step(x0, eps, r)


# ------------------------------------------------------------------------------------------------------------- T01
@pytest.mark.parametrize("process", [RF, COSINE])
@pytest.mark.parametrize("n", [1, 4, 1024])
def test_one_step_to_the_target_lands_where_two_steps_of_the_teacher_do(process, n):
    """Sheet, T01 (1e-16 there): DDIM from (x_t, x~) lands on x_t''; the target of one teacher step misses it."""
    net = world(process)
    i = torch.arange(512) % n + 1
    t, m, r = (((i - back) / n).double() for back in (0, 0.5, 1))
    x_t = process.noise(*states(process), t)
    pair = script.one_step_target(net, x_t, t, m, r, {})
    landed, two = process.step(*pair, r), ddim(net, ddim(net, x_t, t, m), m, r)
    assert (landed - two).abs().max() < 1e-11
    rebuilt = process.noise(*pair, t)
    assert (rebuilt - x_t).abs().max() < 1e-11
    last = i == 1                                       # last interval: x~ = D(x_t') itself
    half = ddim(net, x_t, t, m)
    assert (pair[0] - net(half, m, {}))[last].abs().max() < 1e-11
    swapped = script.one_step_target(net, x_t, t, r.clamp(min=1e-4), m, {})       # mutation: r and t' exchanged
    assert (process.step(*swapped, r) - two).abs().max() > (1e-3 if n < 1024 else 1e-7)


def test_a_gaussian_ladder_is_exact():
    """Sheet, T01: every DDIM step is affine, so a per-time linear fit has loss 0 and the N/2-step student is the N-step teacher (1e-6)."""
    class Fitted:
        """v affine in x at each time of the grid, fitted to the script's target."""
        process = COSINE

        def __init__(self, teacher, n):
            self.fits = {}
            x0, eps = states(COSINE, 64)
            for i in range(1, n + 1):
                t, m, r = (torch.full((64,), (i - back) / n, dtype=torch.float64) for back in (0, 0.5, 1))
                x = COSINE.noise(x0, eps, t)
                v = COSINE.read(*script.one_step_target(teacher, x, t, m, r, {}), t, "v")
                design = torch.cat([x, torch.ones_like(x)], 1)
                fit = torch.linalg.lstsq(design, v).solution
                self.left = ((design @ fit - v) ** 2).max().item()
                self.fits[round(i / n, 9)] = fit
                assert self.left < 1e-18

        def __call__(self, x, t, cond, *, to):
            a, b = self.fits[round(t[0].item(), 9)]
            return a * x + b

    teacher, n = world(COSINE), 16
    z = torch.randn(100, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grid = lambda k: 1 - torch.arange(k, dtype=torch.float64) / k
    expected = rollout.sample(teacher, z, {}, grid(2 * n), "ode")
    while n:
        teacher = Fitted(teacher, n)
        assert (rollout.sample(teacher, z, {}, grid(n), "ode") - expected).abs().max() < 1e-6, n
        n //= 2
    assert (rollout.sample(world(COSINE), z, {}, grid(1), "ode") - expected).abs().max() > 0.1       # the undistilled teacher in one step


@pytest.mark.parametrize("process", [RF, COSINE])
def test_weight_is_the_larger_of_the_two_errors(process):
    """max(1, SNR) |x0 - x0~|^2 = the larger of the mean square errors in x0 and in eps."""
    t = torch.linspace(0.05, 0.95, 128, dtype=torch.float64)
    x_t = process.noise(*states(process, 128), t)
    pair = [torch.randn(128, 1, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2)]
    v, target = (process.convert(x0, x_t, t, "x0", "v") for x0 in pair)
    eps = [process.convert(x0, x_t, t, "x0", "eps") for x0 in pair]
    larger = torch.maximum((pair[0] - pair[1]) ** 2, (eps[0] - eps[1]) ** 2)
    snr = (process.coeffs(t)[0] / process.coeffs(t)[1])[:, None] ** 2
    assert torch.allclose(larger, snr.clamp(min=1) * (pair[0] - pair[1]) ** 2)
    assert torch.allclose(script.weighted(process, v, target, t), larger.mean(), rtol=1e-9)
    assert abs(((v - target) ** 2).mean() / larger.mean() - 1) > 0.05        # mutation: the plain mean square of v is another weight


# ------------------------------------------------------------------------------------------------------------- T02
def test_guided_distillation_is_met_by_one_affine_network():
    """Sheet, T02: with Gaussian classes, D_w is affine in x with known coefficients: one regression on (x, c, w c) matches it (1e-3)
    at every w including the ends, and at w = 1 (w' = 0) it is the conditional teacher."""
    class Classes:
        process = COSINE

        def __call__(self, x, t, cond, *, to):
            return self.process.convert(Gaussian(0.0, 0.7, process=COSINE)(x - self.process.coeffs(t)[0][:, None] * cond["mean"], t, {}) + cond["mean"],
                                        x, t, "x0", to)
    g = torch.Generator().manual_seed(0)
    mean, t = torch.randn(400, 1, generator=g, dtype=torch.float64), torch.full((400,), 0.4, dtype=torch.float64)
    x_t = COSINE.noise(mean + 0.7 * torch.randn(400, 1, generator=g, dtype=torch.float64), torch.randn(400, 1, generator=g, dtype=torch.float64), t)
    w = 1 + 4 * torch.rand(400, generator=g, dtype=torch.float64)
    cond, uncond = {"mean": mean}, {"mean": 0 * mean}
    target = lambda w: losses.guided(Classes(), x_t, t, cond, uncond, w, to="v")
    design = lambda w: torch.cat([x_t, mean, w[:, None] * mean], 1)
    fit = torch.linalg.lstsq(design(w), target(w)).solution
    for scale in (1.0, 2.5, 5.0):
        at = torch.full_like(w, scale)
        assert (design(at) @ fit - target(at)).abs().max() < 1e-9
    assert torch.equal(target(1), Classes()(x_t, t, cond, to="v"))
    assert (target(torch.ones_like(w)) - target(1)).abs().max() < 1e-12
    assert (design(w - 1) @ fit - target(w)).abs().max() > 1e-2           # mutation: w' = w - 1 taken for w


# ------------------------------------------------------------------------------------------------------------- phases
@pytest.fixture(scope="module")
def toy():
    return backbones.load("toy")             # fitted once; full-weight students are copies of it


def test_phase_is_a_pure_function_of_the_step():
    where = lambda step: script.phase(step, 100, 8, 1, 50)
    assert [where(s) for s in (0, 99)] == [(0, 0, 100)] * 2
    assert [where(s) for s in (100, 149, 150, 200, 299, 300, 399, 10_000)] == [
        (8, 100, 50), (8, 100, 50), (4, 150, 50), (2, 200, 100), (2, 200, 100), (1, 300, 100), (1, 300, 100), (1, 300, 100)]
    assert script.phase(0, 0, 2, 2, 5) == (2, 0, 10)
    cifar = script.Config.recipes["cifar10"]
    n, begin, length = script.phase(10**9, 0, cifar["first"], cifar["last"], cifar["phase_steps"])
    assert n == 1 and begin + length == cifar["steps"]        # the recipe's steps are its ladder


def config(toy, out, **options):
    quiet = dict(time_budget=0, measure_every=0, sample_every=0, checkpoint_every=0)
    return script.Config(**{**dict(teacher=toy, batch=128, lr=1e-3, output_dir=str(out)), **quiet, **options})


def test_a_run_stopped_in_the_middle_of_a_phase_keeps_its_teacher(toy, tmp_path, capsys):
    """Stopped after 4 of 9 updates, in the second phase: the phase's teacher comes from the checkpoint, bit for bit."""
    ladder = dict(first=4, last=1, phase_steps=3, batch=16, checkpoint_every=4)
    whole = script.main(config(toy, tmp_path / "whole", steps=15, **ladder))
    part = config(toy, tmp_path / "part", steps=4, **ladder)
    script.main(part)
    assert "ended before the phase of 1 steps" in capsys.readouterr().err
    script.main(dataclasses.replace(part, steps=15))
    for name in ("student", "phase_teacher", "student.optimizer"):
        a, b = (load_file(tmp_path / run / "checkpoints/step-0000015" / f"{name}.safetensors") for run in ("whole", "part"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    student, teacher = whole.trainees["student"], whole.trainees["phase_teacher"]
    assert any(not torch.equal(a, b) for a, b in zip(student.params.values(), teacher.params.values()))
    assert student.lr(0) == 1e-3 and abs(student.lr(1) - 2e-3 / 3) < 1e-9 and student.lr(3) == 1e-3 and student.lr(14) == student.lr(99)


def test_steps_that_do_not_halve_are_refused(toy, tmp_path):
    with pytest.raises(UserError, match="by halving"):
        script.main(config(toy, tmp_path / "run", first=6, last=4))


def points(net, model, k, n=2000):
    g = torch.Generator().manual_seed(5)
    target, label = model.mixture.sample(n, seed=9)
    knots = 1 - torch.arange(k) / k
    return sliced_wasserstein(rollout.sample(net, torch.randn(n, 2, generator=g), {"label": label}, knots, "ode"), target)


@pytest.mark.slow
def test_converges_on_the_toy(toy, tmp_path):
    run = script.main(config(toy, tmp_path / "run", steps=750, first=8, last=1, phase_steps=125))
    before, after = (points(net, run.model, 1) for net in (run.model.make("fresh"), run.watcher.net))
    print(f"sliced Wasserstein {before:.4f} -> {after:.4f}")
    assert before > 0.065 and after < 0.035
    assert set(run.watcher.contract.knots) == {1}


def test_guidance_is_folded_in_and_the_contract_has_the_last_count_alone(toy, tmp_path, monkeypatch):
    """Phase 0 at w = 2 on the toy: one call of the student is the guided teacher; exported for 4 steps only."""
    monkeypatch.setattr(toy, "guidance", 1.0)            # put back after the run sets it
    run = script.main(config(toy, tmp_path / "run", steps=300, guided_steps=300, guidance=2.0, first=8, last=4, ema=0.9))
    assert set(run.watcher.contract.knots) == {4}
    assert set(json.loads((tmp_path / "run/student/fewstep.json").read_text())["knots"]) == {"4"}
    x0, label = run.model.mixture.sample(500, seed=3)
    t = torch.rand(500, generator=torch.Generator().manual_seed(4)) * 0.9 + 0.05
    x = RF.noise(x0, torch.randn(500, 2, generator=torch.Generator().manual_seed(5)), t)
    cond, uncond = {"label": label}, {"label": torch.full_like(label, 8)}
    guided, plain = losses.guided(run.model.teacher, x, t, cond, uncond, 2.0), run.model.teacher(x, t, cond)
    error = lambda other: (run.watcher.net(x, t, cond) - other).square().mean().item()
    print(f"to the guided teacher {error(guided):.4f}, to the plain one {error(plain):.4f}")
    assert error(guided) < 0.25 * error(plain)
