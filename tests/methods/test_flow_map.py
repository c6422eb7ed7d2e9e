"""Flow maps by Lagrangian, Eulerian and progressive (self-)distillation against the exact map of a Gaussian."""
import sys
from pathlib import Path

import pytest
import torch

from zoo import rollout
from zoo.process import RectifiedFlow
from zoo.toy import Gaussian, sliced_wasserstein

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "train_scripts"))
import train_flow_map as script  # noqa: E402

RF, WORLD = RectifiedFlow(), Gaussian(1.0, 0.7)
v = lambda x, t: WORLD(x, t, {}, to="velocity")


def points(n=256):
    g = torch.Generator().manual_seed(0)
    r = 0.05 + 0.4 * torch.rand(n, generator=g, dtype=torch.float64)
    t = r + 0.05 + 0.4 * torch.rand(n, generator=g, dtype=torch.float64)
    eps = torch.randn(n, 1, generator=g, dtype=torch.float64)
    return RF.noise(1 + 0.7 * torch.randn(n, 1, generator=g, dtype=torch.float64), eps, t), t, r


def largest(objective, u, velocity=v, how="jvp", h=1e-4, swap=False):
    x, t, r = points()
    return script.RESIDUALS[objective](u, velocity, x, *((r, t) if swap else (t, r)), how, h).abs().max().item()


@pytest.mark.parametrize("objective,reference", [("lsd", 7e-11), ("esd", 2e-11), ("psd", 1e-14)])
def test_residuals_vanish_at_the_exact_map_alone(objective, reference):
    """Reference residuals of the exact map: 7e-11 (Lagrangian), 2e-11 (Eulerian), 1e-16 (progressive; a few roundings of it)."""
    exact = WORLD.average_velocity
    assert largest(objective, exact) < reference
    assert largest(objective, exact, how="fd") < 1e-6
    assert largest(objective, lambda x, t, r: v(x, t)) > 1e-2                       # the velocity is not the average velocity
    assert largest(objective, lambda x, t, r: exact(x, r, t) + 0.1) > 1e-2
    if objective != "psd":                                                          # off the diagonal PSD sees no velocity
        assert largest(objective, exact, lambda x, t: -v(x, t)) > 1e-2              # flipped sign
        assert largest(objective, exact, lambda x, t: v(x, 0.5 * t)) > 1e-2         # wrong time


def test_lagrangian_residual_of_a_perturbed_map():
    """X + c (t - r)^2 has residual -2 c (t - r) - v'(r) c (t - r)^2, with time growing towards noise and r the end."""
    c = 0.3
    x, t, r = points()
    u = lambda x, t, r: WORLD.average_velocity(x, t, r) - c * (t - r)[:, None]
    slope = (v(1 + 0 * x, r) - v(0 * x, r))                                         # the Gaussian velocity is linear in x
    gap = (t - r)[:, None]
    expected = -2 * c * gap - slope * c * gap**2
    assert (script.lagrangian(u, v, x, t, r, "jvp", 0) - expected).abs().max() < 1e-9
    assert (script.lagrangian(u, v, x, t, r, "fd", 1e-4) - expected).abs().max() < 1e-6
    assert (script.lagrangian(u, v, x, t, r, "jvp", 0) + expected).abs().max() > 0.1


@pytest.mark.parametrize("objective", ["lsd", "esd", "psd"])
def test_diagonal_is_flow_matching(objective):
    x, t, _ = points()
    u = lambda x, t, r: torch.sin(x) * t[:, None] + 0.2 * r[:, None]
    residual = script.RESIDUALS[objective](u, v, x, t, t, "jvp", 0)
    assert (residual - (u(x, t, t) - v(x, t))).abs().max() < 1e-12


def test_gradient_takes_the_paths_it_should():
    """Lagrangian: through d/dr X, not through the point where v is asked. Eulerian, progressive: through u(x_t, t, r) alone."""
    x, t, r = points()
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    u = lambda x, t, r: a * x * (1 + r[:, None] ** 2)
    asked = []
    def velocity(x, t):
        asked.append(x.requires_grad)
        return v(x, t)
    for how, tolerance in (("jvp", 1e-9), ("fd", 1e-4)):
        residual = script.lagrangian(u, velocity, x, t, r, how, 1e-4)
        slope = x * (1 + r[:, None] ** 2 - (t - r)[:, None] * 2 * r[:, None])       # d/da d/dr X
        assert not any(asked)
        assert abs(torch.autograd.grad(residual.square().sum() / 2, a)[0] / (residual * slope).sum() - 1) < tolerance
        for objective in ("esd", "psd"):
            residual = script.RESIDUALS[objective](u, velocity, x, t, r, how, 1e-4)
            slope = x * (1 + r[:, None] ** 2)
            assert abs(torch.autograd.grad(residual.square().sum() / 2, a)[0] / (residual * slope).sum() - 1) < tolerance
    kept = u(x, t, r) - (u(x, t, (t + r) / 2) + u(x - (t - r)[:, None] / 2 * u(x, t, (t + r) / 2), (t + r) / 2, r)) / 2     # mutation: no stop-gradient
    assert abs(torch.autograd.grad(kept.square().sum() / 2, a)[0] / (kept * slope).sum() - 1) > 0.1


# ------------------------------------------------------------------------------------------------------------- learning
@pytest.fixture(scope="module")
def teacher():
    from zoo.backbones.toy import Toy
    return Toy()


def distance(teacher, run, steps):
    """Sliced Wasserstein distance of jumps of the student to the teacher's mixture, 4096 points."""
    label = torch.arange(4096) % 8
    noise = torch.randn(4096, 2, generator=torch.Generator().manual_seed(3))
    x = rollout.sample(run.watcher.net, noise, {"label": label}, 1 - torch.arange(steps) / steps, "jump")
    return sliced_wasserstein(x, teacher.mixture.sample(4096, seed=5, label=label)[0])


def trained(teacher, folder, **more):
    return script.main(script.Config(**dict(teacher=teacher, output_dir=str(folder), batch=256, lr=1e-3, time_budget=0, measure_every=0, sample_every=0,
                                            checkpoint_every=0, export="last") | more))


@pytest.mark.parametrize("objective", ["lsd", "esd", "psd"])
@pytest.mark.slow
def test_learns_the_map(teacher, tmp_path, objective):
    """One step from .071 (untrained: the teacher's Euler step) to .038, .034, .031 (lsd, esd, psd); two steps from .084 to .018, .034, .018."""
    start = trained(teacher, tmp_path / "start", objective=objective, steps=1, lr=0.0)
    assert distance(teacher, start, 1) > 0.065 and distance(teacher, start, 2) > 0.075
    run = trained(teacher, tmp_path / "run", objective=objective, steps=400)
    assert distance(teacher, run, 1) < 0.045 and distance(teacher, run, 2) < 0.04


def test_self_distillation_never_asks_the_teacher(teacher, tmp_path, monkeypatch):
    guided = script.losses.guided
    def refuse(*args, to="x0"):
        assert to != "velocity"                # sampling the teacher for the grid reads v
        return guided(*args, to=to)
    monkeypatch.setattr(script.losses, "guided", refuse)
    for objective in script.RESIDUALS:
        assert trained(teacher, tmp_path / objective, objective=objective, velocity="data", steps=1).step == 1
    with pytest.raises(AssertionError):
        trained(teacher, tmp_path / "distilled", steps=1)
