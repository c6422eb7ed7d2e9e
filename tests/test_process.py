"""Processes, readings, views and closed-form worlds, in float64."""
import math

import pytest
import torch
from diffusers import DDIMScheduler

from zoo.calculus import total_derivative
from zoo.process import EDM, VP, RectifiedFlow, TrigFlow, per_sample, view
from zoo.toy import Gaussian, Mixture, ring

CONFIG = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000, rescale_betas_zero_snr=True)
PROCESSES = {"rf": RectifiedFlow(), "trig": TrigFlow(), "edm": EDM(), "vp": VP.from_config(CONFIG)}
PREDICTIONS = ["x0", "eps", "v", "velocity", "score"]


def inner(process, n=64, seed=0):
    u = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (0.05 + 0.9 * u) * (process.t_max if process.t_max < 10 else 5.0)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("src", PREDICTIONS)
@pytest.mark.parametrize("dst", PREDICTIONS)
def test_every_reading_converts_to_every_other(process, src, dst):
    t = inner(process)
    g = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(len(t), 3, generator=g, dtype=torch.float64) for _ in range(2))
    x = process.noise(x0, eps, t)
    alpha, sigma, da, ds = (c[:, None] for c in process.coeffs(t))
    truth = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "velocity": da * x0 + ds * eps, "score": -eps / sigma}
    assert torch.allclose(process.convert(truth[src], x, t, src, dst), truth[dst], atol=1e-8)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_derivatives_and_inverse_angle(process):
    t = inner(process)
    _, dalpha = torch.func.jvp(lambda s: process.coeffs(s)[0], (t,), (torch.ones_like(t),))
    _, dsigma = torch.func.jvp(lambda s: process.coeffs(s)[1], (t,), (torch.ones_like(t),))
    assert torch.allclose(dalpha, process.coeffs(t)[2], atol=1e-9) and torch.allclose(dsigma, process.coeffs(t)[3], atol=1e-9)
    assert torch.allclose(process.time(process.angle(t)), t, atol=1e-9)


def test_vp_is_the_stock_table():
    vp, stock = PROCESSES["vp"], DDIMScheduler(**CONFIG)
    steps = torch.tensor([999, 749, 499, 249, 0])
    t = vp.from_timestep(steps.double())
    assert torch.allclose(t[:4], torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64))
    alpha, sigma, _, _ = vp.coeffs(t.float())
    assert torch.allclose(alpha**2, stock.alphas_cumprod[steps], atol=1e-6) and alpha[0] < 1e-7 and sigma[0] == 1
    alpha, sigma, _, _ = vp.coeffs(torch.zeros(1))
    assert alpha == 1 and sigma == 0


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("other", PROCESSES)
def test_view_of_the_exact_teacher_is_the_exact_teacher(name, other):
    """A mixture's exact net on one path, viewed on another, is the mixture's exact net there."""
    world = lambda p: Mixture(torch.tensor([[-1.0, 0.5], [1.0, 0.0]]), torch.tensor([0.3, 0.6]), process=p)
    seen, exact = view(world(PROCESSES[name]), PROCESSES[other]), world(PROCESSES[other])
    t = inner(PROCESSES[other])
    x = PROCESSES[other].noise(torch.randn(len(t), 2, dtype=torch.float64), torch.randn(len(t), 2, dtype=torch.float64), t)
    for to in ("x0", "velocity", "v"):
        assert torch.allclose(seen(x, t, {}, to=to), exact(x, t, {}, to=to), atol=1e-6)


def test_mixture_score_is_the_gradient_of_the_log_density():
    world = ring(4, process=PROCESSES["vp"])
    t = inner(world.process, 16)
    x = torch.randn(16, 2, dtype=torch.float64, requires_grad=True)
    alpha, sigma, _, _ = (c[:, None] for c in world.process.coeffs(t))
    var = alpha**2 * world.stds**2 + sigma**2
    logp = torch.logsumexp(-0.5 * ((x[:, None] - alpha[..., None] * world.means) ** 2).sum(-1) / var - var.log(), 1)
    (grad,) = torch.autograd.grad(logp.sum(), x)
    assert torch.allclose(world(x.detach(), t, {}, to="score"), grad, atol=1e-8)


@pytest.mark.parametrize("process", [PROCESSES["rf"], PROCESSES["trig"]], ids=["rf", "trig"])
def test_flow_map_solves_the_ode(process):
    world = Gaussian(1.0, 0.7, dim=1, process=process)
    t = torch.full((8,), 0.9, dtype=torch.float64) * process.t_max
    x = start = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]
    n = 4000
    for i in range(n):                     # midpoint rule towards r = 0.1 t_max
        s, h = t * (1 - i / n) + 0.1 * process.t_max * i / n, -(t - 0.1 * process.t_max) / n
        mid = x + 0.5 * h[:, None] * world(x, s, {}, to="velocity")
        x = x + h[:, None] * world(mid, s + 0.5 * h, {}, to="velocity")
    assert torch.allclose(x, world.flow_map(start, t, torch.full_like(t, 0.1 * process.t_max)), atol=1e-6)


def test_total_derivative_jvp_and_difference_agree():
    fn = lambda x, t: (x**2).sum(1) * t.sin()
    x, t = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    v, one = torch.randn_like(x), torch.ones_like(t)
    exact = 2 * (x * v).sum(1) * t.sin() + (x**2).sum(1) * t.cos()
    value, jvp = total_derivative(fn, (x, t), (v, one))
    assert torch.allclose(jvp, exact) and torch.allclose(value, fn(x, t))
    errors = [(total_derivative(fn, (x, t), (v, one), "fd", h)[1] - exact).abs().max().item() for h in (1e-1, 1e-2)]
    assert 50 < errors[0] / errors[1] < 200           # second order


def test_per_sample_broadcasts():
    assert per_sample(torch.ones(2), torch.zeros(2, 3, 4, 5)).shape == (2, 1, 1, 1)
    assert math.isclose(TrigFlow().t_max, math.pi / 2)
