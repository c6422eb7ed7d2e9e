"""DMD (the original) against closed forms: its direction is the gradient of the divergence, its fixed points, and the toy."""
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zoo import backbones, losses, rollout
from zoo.process import RectifiedFlow
from zoo.toy import Gaussian, Mixture, sliced_wasserstein

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "train_scripts"))
import train_dmd_pairs as script  # noqa: E402

RF = RectifiedFlow()
REAL = Gaussian(1.0, 0.7)


def difference(x, x_t, t, real, fake, cond=None, uncond=None, w=1.0):
    """D_real - D_fake out of the script's direction: its weight alpha_t / mean |x - D_real| divided out again."""
    d, _ = script.matching_direction(x, x_t, t, cond or {}, uncond or {}, real, fake, w)
    scale = losses.per_sample_mean((x - losses.guided(real, x_t, t, cond or {}, uncond or {}, w)).abs())[:, None]
    return d * scale / (1 - t)[:, None], scale


@pytest.mark.parametrize("t,dm,ds,gap", [(0.2, -2.5339, -0.695, 0.02744), (0.6, -0.51095, -0.0175, 1.3369), (0.9, -0.01718, -2e-5, 1.9372)])
def test_direction_is_the_gradient_of_the_divergence(t, dm, ds, gap):
    """Sheet, TB1: real N(1, .7^2), student m + s z at m = -.4, s = .5: dKL/dm, dKL/ds and E|D_real - D_fake|^2."""
    n, g = 400_000, torch.Generator().manual_seed(0)
    z, eps = (torch.randn(n, 1, generator=g, dtype=torch.float64) for _ in range(2))
    x, time = -0.4 + 0.5 * z, torch.full((n,), t, dtype=torch.float64)
    d, _ = difference(x, RF.noise(x, eps, time), time, REAL, Gaussian(-0.4, 0.5))
    ascent = ((1 - t) / t) ** 2 * d
    assert abs(-ascent.mean() - dm) < 6e-3 * max(1, abs(dm))
    assert abs(-(ascent * z).mean() - ds) < 1e-2
    assert abs((d**2).mean() - gap) < 6e-3


def test_direction_carries_alpha_and_is_normalised():
    """Eq. 7 and 8 leave alpha_t (D_real - D_fake) / mean |x - D_real|; without alpha it is the form of the later code."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 4, 4, generator=g, dtype=torch.float64)
    t = 0.02 + 0.96 * torch.rand(64, generator=g, dtype=torch.float64)
    class Scaled:
        process = RF
        def __init__(self, by):
            self.by = by
        def __call__(self, x_t, t, cond, r=None, to="x0"):
            return self.by * x_t
    x_t = RF.noise(x, torch.randn(x.shape, generator=g, dtype=torch.float64), t)
    d, _ = script.matching_direction(x, x_t, t, {}, {}, Scaled(0.5), Scaled(0.2), 1.0)
    expected = (1 - t)[:, None, None, None] * 0.3 * x_t / (x - 0.5 * x_t).abs().mean((1, 2, 3), keepdim=True)
    assert torch.allclose(d, expected, atol=1e-12)


def train_linear(direction, start=(-2.0, 0.2), steps=1500):
    """A linear student m + s z with a closed-form critic, SGD 0.02, batch 4096, t ~ U(.02, .98)."""
    m, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in start)
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        z, eps = (torch.randn(4096, 1, generator=g, dtype=torch.float64) for _ in range(2))
        t = 0.02 + 0.96 * torch.rand(4096, generator=g, dtype=torch.float64)
        x = m + s * z
        step = direction(x.detach(), RF.noise(x, eps, t).detach(), t, Gaussian(m.item(), abs(s.item())))
        (0.5 * ((x - (x + step).detach()) ** 2).mean()).backward()
        with torch.no_grad():
            for p in (m, s):
                p -= 0.02 * p.grad
                p.grad = None
    return m.item(), s.item()


def test_converges_to_the_teacher_and_the_mutation_runs_away():
    """Sheet, TB4: (1.000, .700) from (-2, .2); the per-sample scale is a batch mean here, as a scalar sample has no mean of its own."""
    def direction(x, x_t, t, fake, sign=1):
        d, scale = difference(x, x_t, t, REAL, fake)
        return sign * (1 - t)[:, None] * d / scale.mean()
    mean, std = train_linear(direction)
    assert abs(mean - 1.0) < 0.01 and abs(std - 0.7) < 0.01
    assert train_linear(lambda *a: direction(*a, sign=-1), steps=100)[0] < -2.0


def test_guided_fixed_point():
    """Sheet, TB9 (weight 1): (2.069, .261) after 1000 steps at w = 3, classes +-1 with std .5: the mean overshoots, the spread halves."""
    world = Mixture(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.5, 0.5]))
    label = torch.ones(4096, dtype=torch.long)
    def direction(x, x_t, t, fake):
        return difference(x, x_t, t, world, fake, {"label": label}, {"label": 0 * label + 2}, 3.0)[0]
    mean, std = train_linear(direction, start=(0.3, 1.0), steps=1000)
    assert abs(mean - 2.069) < 0.02 and abs(std - 0.261) < 0.01


# ------------------------------------------------------------------------------------------------------------- the toy
@pytest.fixture(scope="module")
def toy():
    return backbones.load("toy")             # fitted once; full-weight students are copies of it


def points(net, model, n=2000):
    g = torch.Generator().manual_seed(5)
    target, label = model.mixture.sample(n, seed=9)
    noise = torch.randn(n, 2, generator=g)
    return sliced_wasserstein(rollout.sample(net, noise, {"label": label}, torch.tensor([1.0])), target)


def test_converges_on_the_toy(toy, tmp_path):
    cfg = script.Config(teacher=toy, steps=300, batch=128, pairs=1024, pair_steps=25, output_dir=str(tmp_path / "run"), time_budget=0, lr=1e-3, critic_lr=1e-3,
                        measure_every=0, sample_every=0, checkpoint_every=0)
    run = script.main(cfg)
    before, after = points(run.model.make("fresh"), run.model), points(run.watcher.net, run.model)
    print(f"sliced Wasserstein {before:.4f} -> {after:.4f}")
    assert before > 0.065 and after < 0.045
    assert set(run.watcher.contract.knots) == {1}


def test_a_stopped_run_goes_on_bit_for_bit(toy, tmp_path):
    whole = script.Config(teacher=toy, steps=6, batch=16, pairs=40, pair_steps=3, output_dir=str(tmp_path / "whole"), time_budget=0, measure_every=0,
                          sample_every=0)
    script.main(whole)
    part = dataclasses.replace(whole, output_dir=str(tmp_path / "part"), steps=3)
    script.main(part)
    made = (tmp_path / "part/pairs/00000000.safetensors").stat().st_mtime_ns
    script.main(dataclasses.replace(part, steps=6))
    for name in ("student", "critic", "student.optimizer", "student.average0"):
        a, b = (load_file(tmp_path / run / "checkpoints/step-0000006" / f"{name}.safetensors") for run in ("whole", "part"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    assert (tmp_path / "part/pairs/00000000.safetensors").stat().st_mtime_ns == made
