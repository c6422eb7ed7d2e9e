"""sCM against the exact consistency function of a Gaussian in TrigFlow."""
import math
import sys
from pathlib import Path

import pytest
import torch

from zoo import backbones, losses, rollout
from zoo.process import EDM, VP, TrigFlow, view
from zoo.toy import Gaussian, sliced_wasserstein

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "train_scripts"))
import train_scm as script  # noqa: E402


class Exact:
    """f(x, t) = X(x, t -> 0) as a net: the exact consistency function of `world` on its own path."""

    def __init__(self, world):
        self.world, self.process = world, world.process

    def __call__(self, x, t, cond, *, r=None, to="x0", logits=False):
        x0 = self.world.flow_map(x, t, torch.zeros_like(t))
        alpha, sigma = (c[:, None] for c in self.process.coeffs(t)[:2])
        return self.process.read(x0, (x - alpha * x0) / sigma, t, to)


def setting(sigma_data=0.5, n=256, seed=0):
    """World, points x_t, times over (0.05, pi/2), exact velocity along the probability flow."""
    flow = TrigFlow(sigma_data)
    world = Gaussian(1.0, 0.7, process=flow)
    g = torch.Generator().manual_seed(seed)
    t = 0.05 + (math.pi / 2 - 0.06) * torch.rand(n, generator=g, dtype=torch.float64)
    x = flow.noise(1 + 0.7 * torch.randn(n, 1, generator=g, dtype=torch.float64), torch.randn(n, 1, generator=g, dtype=torch.float64), t)
    return flow, world, x, t, world(x, t, {}, to="velocity")


def velocity_of(net):
    return lambda x, t: net(x, t, {}, to="velocity")


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_tangent_vanishes_at_the_exact_consistency_function(sigma_data):
    """Reference: g = 0 to 4e-12 for any t; J by forward mode equals a central difference to 1e-8."""
    flow, world, x, t, dx = setting(sigma_data)
    tangent = lambda v, dx=dx, ramp=1.0, how="jvp", h=1e-4: script.tangent(v, x, t, dx, ramp, how, h)
    exact = velocity_of(Exact(world))
    assert tangent(exact).abs().max() < 4e-12
    assert (tangent(exact, how="fd") - tangent(exact)).abs().max() < 1e-8
    assert tangent(velocity_of(world)).abs().max() > 1e-2                   # the denoiser is not the consistency function
    assert tangent(exact, dx=-dx).abs().max() > 1e-2                        # along the wrong direction
    assert tangent(exact, ramp=0.5).abs().max() > 1e-2                      # half of the derivative
    assert script.tangent(exact, x, math.pi / 2 - t, dx, 1.0, "jvp", 0).abs().max() > 1e-2      # cos for sin


def test_tangent_is_the_derivative_along_the_flow_of_any_network():
    """g = cos t df/dt, against differences of f along the exact trajectory, for a network that is not consistent at all."""
    flow, world, x, t, dx = setting()
    wild = lambda x, t: (2 * x + t[:, None] ** 2).sin()
    f = lambda x, t: t.cos()[:, None] * x - t.sin()[:, None] * wild(x, t)
    h = 1e-5
    along = [f(world.flow_map(x, t, t + d), t + d) for d in (h, -h)]
    expected = t.cos()[:, None] * (along[0] - along[1]) / (2 * h)
    assert expected.abs().max() > 0.1
    assert (script.tangent(wild, x, t, dx, 1.0, "jvp", 0) - expected).abs().max() < 1e-8


def test_tangent_does_not_depend_on_the_path_the_network_was_made_on():
    """The same consistency function held by an EDM or a VP network, read as TrigFlow: the same g (VP's table: to its float32 nodes)."""
    flow, world, x, t, dx = setting(0.5)
    vp = VP(torch.linspace(1, 0, 1001, dtype=torch.float64)[1:])
    native = script.tangent(lambda x, t: velocity_of(Exact(world))(x, t) + 0.1 * x, x, t, dx, 1.0, "jvp", 0)
    assert native.abs().max() > 1e-2
    for process in (EDM(), vp):
        net = view(Exact(Gaussian(1.0, 0.7, process=process)), flow)
        assert (velocity_of(net)(x, t) - velocity_of(Exact(world))(x, t)).abs().max() < 1e-9
        wrapped = script.tangent(lambda x, t: velocity_of(net)(x, t) + 0.1 * x, x, t, dx, 1.0, "jvp", 0)
        assert (wrapped - native).abs().max() < 1e-9


def test_sigma_data_is_the_scale_of_the_noise():
    flow = TrigFlow(0.5)
    t = torch.linspace(0.1, 1.5, 8, dtype=torch.float64)
    alpha, sigma, dalpha, dsigma = flow.coeffs(t)
    assert torch.equal(sigma, 0.5 * t.sin()) and torch.equal(dsigma, 0.5 * t.cos()) and torch.equal(alpha, t.cos()) and torch.equal(dalpha, -t.sin())
    assert (flow.time(flow.angle(t)) - t).abs().max() < 1e-12
    assert torch.equal(TrigFlow().time(t), t)


def test_normalised_tangents_are_at_most_of_unit_length():
    g = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 6)[:, None, None, None]
    norm, length = (v.flatten(1).norm(dim=1) for v in (g, losses.bounded(g, 0.1)))
    assert torch.allclose(length, norm / (norm + 0.1), atol=1e-6) and (length < 1 + 1e-6).all() and length[-1] > 0.99


def distances(net, model, times, n=4096):
    y, label = model.mixture.sample(n, seed=99)
    g = torch.Generator().manual_seed(5)
    draw = lambda: torch.randn(n, 2, generator=g)
    return {k: sliced_wasserstein(rollout.sample(net, draw(), {"label": label}, t, "renoise", draw), y) for k, t in times.items()}


@pytest.mark.slow
def test_scm_converges_on_the_toy(tmp_path):
    """In two dimensions |g| is about 0.2, so that c = 0.1 leaves directions without lengths, which do not settle: c = 1 here."""
    model = backbones.load("toy")
    run = script.main(script.Config(teacher=model, output_dir=str(tmp_path / "run"), batch=256, lr=1e-3, ema=0.995, steps=1000, tangent_c=1.0,
                                    tangent_warmup=300, mean=-0.5, time_budget=0, measure_every=0, sample_every=0, checkpoint_every=0, export="last"))
    times = {k: run.watcher.trained[k] for k in (1, 2)}
    before = distances(view(model.make("student"), run.trainees["student"].process), model, times)
    after = distances(run.watcher.net, model, times)
    assert before[1] > 0.06 and before[2] > 0.07
    assert after[1] < 0.04 and after[2] < 0.025
