"""rCM: its discrete derivative, its two fixed points, and a run."""
import math
import sys
from pathlib import Path

import pytest
import torch

from zoo import backbones, losses, rollout
from zoo.process import TrigFlow, view
from zoo.toy import Gaussian, sliced_wasserstein

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "train_scripts"))
import train_rcm as script  # noqa: E402

FLOW = TrigFlow()


def setting(world, n=256):
    g = torch.Generator().manual_seed(0)
    t = 0.05 + (math.pi / 2 - 0.1) * torch.rand(n, generator=g, dtype=torch.float64)
    x0 = world.means[0] + world.stds[0] * torch.randn(n, 1, generator=g, dtype=torch.float64)
    return FLOW.noise(x0, torch.randn(n, 1, generator=g, dtype=torch.float64), t), t


def consistency(world):
    """Velocity reading of the exact consistency function: F = (cos t x - X(x, t -> 0)) / sin t."""
    return lambda x, t: (t.cos()[:, None] * x - world.flow_map(x, t, torch.zeros_like(t))) / t.sin()[:, None]


def test_discrete_derivative():
    """One step back on the circle: first order, exact where the pair (x0, eps) does not change. Reference 1.2e-5 at h = 1e-4, for a function that
    is not named; here cos t sin t dF/dt, what enters g, is 1.0e-5 off on average."""
    world = Gaussian(1.0, 0.7, process=FLOW)
    x, t = setting(world)
    dx = world(x, t, {}, to="velocity")
    F = consistency(world)
    exact = torch.func.jvp(F, (x, t), (dx, torch.ones_like(t)))[1]
    error = lambda h: (script.step_back(F, x, t, dx, torch.tensor(h, dtype=torch.float64))[1] - exact).mul((t.cos() * t.sin())[:, None]).abs().mean().item()
    assert error(1e-4) < 1.2e-5 and 9 < error(1e-3) / error(1e-4) < 11
    x0, eps = torch.randn(2, 256, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fixed = lambda x, t: FLOW.velocity(x0, eps, t)
    x = FLOW.noise(x0, eps, t)
    _, dv = script.step_back(fixed, x, t, FLOW.velocity(x0, eps, t), torch.tensor(0.3, dtype=torch.float64))
    assert (dv + x).abs().max() < 1e-12                                     # dF/dt = -x on a circle, whatever the step
    ahead = (fixed(x, t + 0.3) - fixed(x, t)) / 0.3                         # mutation: a plain difference is not
    assert (ahead + x).abs().max() > 1e-2


def test_tangent_vanishes_at_the_consistency_function_and_not_at_the_teacher():
    """The sheet's case, N(0, 1) with sigma_data = 1: the teacher's F is 0 everywhere. It is a fixed point of the score term but not of the
    consistency term, whose solution is -tan(t / 2) x: the flow does not move x, while the denoiser cos t x shrinks it."""
    world = Gaussian(0.0, 1.0, process=FLOW)
    x, t = setting(world)
    dx = world(x, t, {}, to="velocity")
    assert dx.abs().max() < 1e-12
    solution = lambda x, t: -(t / 2).tan()[:, None] * x
    for how, tolerance in (("jvp", 4e-12), ("fd", 2e-4)):
        assert script.tangent(solution, x, t, dx, how, 1e-4).abs().max() < tolerance
    g = script.tangent(lambda x, t: 0 * x, x, t, dx, "jvp", 1e-4)
    assert (g + (t.cos() * t.sin())[:, None] * x).abs().max() < 1e-12 and g.abs().max() > 0.1


@pytest.mark.parametrize("how,tolerance", [("jvp", 4e-12), ("fd", 2e-3)])
def test_tangent_vanishes_for_any_gaussian(how, tolerance):
    world = Gaussian(1.0, 0.7, process=FLOW)
    x, t = setting(world)
    dx = world(x, t, {}, to="velocity")
    assert script.tangent(consistency(world), x, t, dx, how, 1e-3).abs().max() < tolerance
    assert script.tangent(consistency(world), x, t, -dx, how, 1e-3).abs().max() > 1e-2
    assert script.tangent(lambda x, t: world(x, t, {}, to="velocity"), x, t, dx, how, 1e-3).abs().max() > 1e-2


def test_score_direction_vanishes_when_fake_is_real_and_points_to_the_data_otherwise():
    real, fake = Gaussian(1.0, 0.7, process=FLOW), Gaussian(-1.0, 0.7, process=FLOW)
    g = torch.Generator().manual_seed(1)
    x = -1 + 0.7 * torch.randn(2000, 1, generator=g, dtype=torch.float64)
    t = 0.05 + 1.45 * torch.rand(2000, generator=g, dtype=torch.float64)
    x_t = FLOW.noise(x, torch.randn(2000, 1, generator=g, dtype=torch.float64), t)
    assert losses.dmd_direction(x, x_t, t, {}, {}, real, real, 1.0)[0].abs().max() == 0
    toward = losses.dmd_direction(x, x_t, t, {}, {}, real, fake, 1.0)[0]
    assert toward.mean() > 0 and losses.dmd_direction(x, x_t, t, {}, {}, fake, real, 1.0)[0].mean() < 0      # swapped: away
    # Half the squared distance to x + direction has the direction as its descent; a sample of 1 / |x - D|_1 normalises each.
    x_real, x_fake = real(x_t, t, {}), fake(x_t, t, {})
    assert torch.allclose(toward, (x_real - x_fake) / (x - x_real).abs())
    y = x.clone().requires_grad_()
    losses.along(y, toward).backward()
    assert torch.allclose(y.grad, -toward / y.numel(), rtol=1e-4, atol=1e-8)      # the loss is computed in float32


def distances(net, model, times, n=4096):
    y, label = model.mixture.sample(n, seed=99)
    g = torch.Generator().manual_seed(5)
    draw = lambda: torch.randn(n, 2, generator=g)
    return {k: sliced_wasserstein(rollout.sample(net, draw(), {"label": label}, t, "renoise", draw), y) for k, t in times.items()}


@pytest.mark.slow
def test_rcm_converges_on_the_toy(tmp_path):
    model = backbones.load("toy")
    run = script.main(script.Config(teacher=model, output_dir=str(tmp_path / "run"), batch=128, lr=5e-4, critic_lr=1e-3, ema=0.99, steps=300,
                                    dmd_after=20, dmd=0.3, time_budget=0, measure_every=0, sample_every=0, checkpoint_every=0, export="last"))
    assert run.trainees["critic"].updates == 2 * 280                       # none before dmd_after
    times = {k: run.watcher.trained[k] for k in (1, 2)}
    before = distances(view(model.make("student"), run.trainees["student"].process), model, times)
    after = distances(run.watcher.net, model, times)
    assert before[1] > 0.06 and before[2] > 0.07
    assert after[1] < 0.045 and after[2] < 0.035
