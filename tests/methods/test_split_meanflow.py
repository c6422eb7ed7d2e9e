"""SplitMeanFlow against the exact average velocity of a Gaussian."""
import sys
from pathlib import Path

import pytest
import torch

from zoo import losses, rollout
from zoo.calculus import total_derivative
from zoo.process import RectifiedFlow
from zoo.toy import Gaussian, sliced_wasserstein

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "train_scripts"))
import train_split_meanflow as script  # noqa: E402

RF, WORLD = RectifiedFlow(), Gaussian(1.0, 0.7)
v = lambda x, t: WORLD(x, t, {}, to="velocity")


def points(n=256):
    g = torch.Generator().manual_seed(0)
    r = 0.05 + 0.4 * torch.rand(n, generator=g, dtype=torch.float64)
    t = r + 0.05 + 0.4 * torch.rand(n, generator=g, dtype=torch.float64)
    eps = torch.randn(n, 1, generator=g, dtype=torch.float64)
    return RF.noise(1 + 0.7 * torch.randn(n, 1, generator=g, dtype=torch.float64), eps, t), t, r, torch.rand(n, generator=g, dtype=torch.float64)


def residual(u, lam=None):
    x, t, r, drawn = points()
    return u(x, t, r) - losses.two_jumps(u, x, t, r, drawn if lam is None else lam)


def test_the_exact_average_velocity_splits_anywhere():
    """Reference: residual 1e-16 (here a few roundings of values near 1)."""
    exact = WORLD.average_velocity
    assert residual(exact).abs().max() < 1e-14
    assert residual(lambda x, t, r: v(x, t)).abs().max() > 1e-2              # the velocity is not the average velocity
    assert residual(lambda x, t, r: exact(x, r, t) + x).abs().max() > 1e-2
    x, t, r, lam = points()
    q = t - lam * (t - r)
    first = exact(x, t, q)
    second = exact(x - (t - q)[:, None] * first, q, r)
    swapped = exact(x, t, r) - ((1 - lam)[:, None] * first + lam[:, None] * second)
    assert swapped.abs().max() > 1e-2                                        # weights of the wrong leg
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    assert not losses.two_jumps(lambda x, t, r: scale * x, x, t, r, lam).requires_grad


def test_meanflow_is_the_limit_of_an_infinitesimal_split():
    """residual / lam -> u - (v - (t - r) du/dt), with an error linear in lam (reference 1.9e-2, 1.9e-3, 1.9e-4 at 1e-1, 1e-2, 1e-3)."""
    x, t, r, _ = points()
    u = lambda x, t, r: torch.where((t == r)[:, None], v(x, t), WORLD.average_velocity(x, t, r)) - 0.3 * (t - r)[:, None]     # wrong, but right on the boundary
    _, du = total_derivative(u, (x, t, r), (v(x, t), torch.ones_like(t), torch.zeros_like(r)), "fd", 1e-5)
    meanflow = u(x, t, r) - v(x, t) + (t - r)[:, None] * du
    assert meanflow.abs().max() > 0.1
    errors = [(residual(u, lam) / lam - meanflow).abs().mean().item() for lam in (1e-1, 1e-2, 1e-3)]
    assert errors[0] < 5e-2 and errors[2] < 5e-4
    assert 8 < errors[0] / errors[1] < 12 and 8 < errors[1] / errors[2] < 12


def test_without_the_boundary_a_constant_solves_it():
    assert residual(lambda x, t, r: torch.full_like(x, 3.0)).abs().max() < 1e-14


# ------------------------------------------------------------------------------------------------------------- learning
def distance(teacher, run, steps):
    """Sliced Wasserstein distance of jumps of the student to the teacher's mixture, 4096 points."""
    label = torch.arange(4096) % 8
    noise = torch.randn(4096, 2, generator=torch.Generator().manual_seed(3))
    x = rollout.sample(run.watcher.net, noise, {"label": label}, 1 - torch.arange(steps) / steps, "jump")
    return sliced_wasserstein(x, teacher.mixture.sample(4096, seed=5, label=label)[0])


@pytest.fixture(scope="module")
def teacher():
    from zoo.backbones.toy import Toy
    return Toy()


def trained(teacher, folder, **more):
    return script.main(script.Config(**dict(teacher=teacher, output_dir=str(folder), batch=256, lr=1e-3, time_budget=0, measure_every=0, sample_every=0,
                                            checkpoint_every=0, export="last") | more))


def test_learns_the_map(teacher, tmp_path):
    """One step from .071 (untrained: the teacher's Euler step) to .034, two steps from .084 to .024."""
    start = trained(teacher, tmp_path / "start", steps=1, lr=0.0)
    assert distance(teacher, start, 1) > 0.065 and distance(teacher, start, 2) > 0.075
    run = trained(teacher, tmp_path / "run", steps=400)
    assert distance(teacher, run, 1) < 0.045 and distance(teacher, run, 2) < 0.04


def test_never_on_the_boundary_learns_nothing(teacher, tmp_path):
    """Mutation: without r = t the student drifts away from the teacher, to .47."""
    run = trained(teacher, tmp_path / "run", steps=200, equal=0.0)
    assert distance(teacher, run, 2) > 0.1
