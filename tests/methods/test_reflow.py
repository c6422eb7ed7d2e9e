"""Reflow, InstaFlow's distillation and rf++ against closed forms: straightness, the density of times, where lines end, the toy."""
import math
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from zoo import backbones, rollout, times
from zoo.data import pairs
from zoo.process import EDM, VP, RectifiedFlow, view
from zoo.toy import Gaussian, sliced_wasserstein

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "train_scripts"))
import train_reflow as script  # noqa: E402

RF = RectifiedFlow()
WORLD = Gaussian(1.0, 0.7)


def affine(x, y):
    """Least squares y = a x + b, and the mean square that is left."""
    design = torch.cat([x, torch.ones_like(x)], 1)
    fit = torch.linalg.lstsq(design, y).solution
    return fit, ((y - design @ fit) ** 2).mean().item()


def coupled(n=4000):
    z = torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = torch.ones(n, dtype=torch.float64)
    return z, WORLD.flow_map(z, one, 0 * one), one


# ------------------------------------------------------------------------------------------------------------- T30
def test_one_reflow_of_a_gaussian_is_straight_and_one_euler_step_exact():
    """Sheet, T30: the coupling by the exact flow is monotone, so S = E|v - (z - x0)|^2 is 0 at every time and Euler's step exact."""
    z, x0, one = coupled()
    worst = 0.0
    for t in torch.linspace(0, 1, 11, dtype=torch.float64):
        x_t, velocity = script.straight_line(x0, z, t * one, 1.0)
        assert torch.allclose(x_t, (1 - t) * x0 + t * z) and torch.equal(velocity, z - x0)
        fit, left = affine(x_t, velocity)                # the best network of this time
        worst = max(worst, left)
    assert worst < 1e-20
    assert (z - (fit[0] * z + fit[1]) - x0).abs().max() < 1e-9                     # fitted at t = 1: one step to the data
    x_t, velocity = script.straight_line(x0[torch.randperm(len(z), generator=torch.Generator().manual_seed(1))], z, 0.5 * one, 1.0)
    assert affine(x_t, velocity)[1] > 0.3                # mutation: unpaired ends cross
    x_t, velocity = script.straight_line(z, x0, 0.5 * one, 1.0)
    assert (x_t + 0.5 * velocity - z).abs().max() > 0.1  # mutation: the ends swapped


def test_stored_endpoints_approach_the_flow_map():
    z, x0, _ = coupled(500)
    off = {n: (pairs.endpoint(WORLD, z, {}, {}, n) - x0).abs().max().item() for n in (25, 100, 400)}
    assert off[400] < 1e-2 and 3 < off[25] / off[100] < 5 and 3 < off[100] / off[400] < 5       # Euler: first order


@pytest.mark.parametrize("zero_snr", [True, False])
def test_the_line_is_what_stock_ddim_walks(zero_snr):
    """DDIM on the teacher's schedule, from its pure-noise start, stays on straight_line(x0, start, t, top) of the flow; where the
    schedule stops short of pure noise, a line drawn to t = 1 is another one."""
    vp = VP(DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero_snr).alphas_cumprod)
    top = RF.time(vp.angle(torch.tensor(1.0, dtype=torch.float64))).item()
    assert (top == 1.0) if zero_snr else 0.93 < top < 0.95
    g = torch.Generator().manual_seed(0)
    z, x0 = torch.randn(8, 2, generator=g, dtype=torch.float64), torch.randn(8, 2, generator=g, dtype=torch.float64)
    one = torch.ones(8, dtype=torch.float64)
    x = rollout.start(vp, z, one)
    eps = vp.pair(x0, x, one, "x0")[1] if not zero_snr else z
    for r in (0.75, 0.5, 0.25):
        x = vp.step(x0, eps, r * one)
        alpha, sigma, _, _ = vp.coeffs(r * one)
        t = RF.time(vp.angle(r * one))
        seen = x / (alpha + sigma)[:, None]              # the same point on the flow's path
        on_line = lambda top: script.straight_line(x0, rollout.start(RF, z, top * one), t, top)[0]
        assert (on_line(top) - seen).abs().max() < 1e-12
        assert zero_snr or (on_line(1.0) - seen).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------------------- T32
def test_conversion_of_an_edm_teacher_is_exact():
    """Sheet, T32: v = (x - D_edm(x / (1 - t), t / (1 - t))) / t."""
    edm = Gaussian(1.0, 0.7, process=EDM())
    t = torch.linspace(0.01, 0.98, 64, dtype=torch.float64)
    x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by_hand = (x - edm(x / (1 - t[:, None]), t / (1 - t), {})) / t[:, None]
    seen = view(edm, RF)(x, t, {}, to="velocity")
    assert torch.allclose(seen, by_hand, atol=1e-10) and torch.allclose(seen, WORLD(x, t, {}, to="velocity"), atol=1e-10)


def test_u_shaped_times_have_the_density_of_the_paper():
    """pdf of s or 1 - s, s ~ 4 e^(4s) / (e^4 - 1): it integrates to 1 and has 19 % of its mass within .05 of the ends (uniform: 10 %)."""
    def cdf(t):
        one_side = lambda s: (math.exp(4 * s) - 1) / (math.exp(4) - 1)
        return 0.5 * one_side(t) + 0.5 * (1 - one_side(1 - t))
    assert cdf(0) == 0 and abs(cdf(1) - 1) < 1e-12
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    t = times.u_shaped(u, 4.0)
    assert t[0].abs() < 1e-12 and (t[-1] - 1).abs() < 1e-12 and (t.diff() > 0).all()
    assert max(abs(cdf(b.item()) - a.item()) for a, b in zip(u, t)) < 1e-12
    ends = ((t < 0.05) | (t > 0.95)).double().mean().item()
    assert abs(ends - 2 * cdf(0.05)) < 2e-3 and 0.18 < ends < 0.19, ends


# ------------------------------------------------------------------------------------------------------------- the toy
@pytest.fixture(scope="module")
def toy():
    return backbones.load("toy")             # fitted once; full-weight students are copies of it


def points(net, model, k, n=2000):
    g = torch.Generator().manual_seed(5)
    target, label = model.mixture.sample(n, seed=9)
    knots = 1 - torch.arange(k) / k
    return sliced_wasserstein(rollout.sample(net, torch.randn(n, 2, generator=g), {"label": label}, knots, "ode"), target)


def config(toy, out, **options):
    quiet = dict(time_budget=0, measure_every=0, sample_every=0, checkpoint_every=0)
    return script.Config(**{**dict(teacher=toy, batch=128, pairs=2048, pair_steps=25, lr=1e-3, output_dir=str(out)), **quiet, **options})


@pytest.mark.slow
def test_converges_on_the_toy_then_distils_from_its_own_pairs(toy, tmp_path):
    run = script.main(config(toy, tmp_path / "two", steps=500))
    before, after = ({k: points(net, run.model, k) for k in (1, 4)} for net in (run.model.make("fresh"), run.watcher.net))
    print(f"sliced Wasserstein {before} -> {after}")
    assert min(before.values()) > 0.06 and max(after.values()) < 0.035
    assert run.watcher.contract.sampler == "ode" and set(run.watcher.contract.knots) == {4, 2, 1}

    distilled = script.main(config(toy, tmp_path / "three", steps=100, stage="distill", metric="mse", pairs=256, init_student=str(tmp_path / "two/student")))
    assert set(distilled.watcher.contract.knots) == {1} and points(distilled.watcher.net, run.model, 1) < 0.035
    stored = load_file(tmp_path / "three/pairs/00000000.safetensors")
    cond = run.model.batches().get(stored["item"])["cond"]
    own, real = (pairs.endpoint(net, stored["z"], cond, {k: v * 0 + 8 for k, v in cond.items()}, 25) for net in (run.watcher.net.net, run.model.teacher))
    assert torch.allclose(stored["x0"], own, atol=1e-4) and not torch.allclose(stored["x0"], real, atol=1e-2)       # k-reflow: the student's own ODE


def test_a_stopped_run_goes_on_bit_for_bit_with_the_pairs_of_its_start(toy, tmp_path):
    """k-reflow: its own ODE made the pairs before the first update; the resumed run keeps them, and does not make new ones."""
    start = script.main(config(toy, tmp_path / "start", steps=1, pairs=16, pair_steps=2))
    options = dict(batch=16, pairs=40, pair_steps=3, init_student=str(start.out / "student"))
    script.main(config(toy, tmp_path / "whole", steps=6, **options))
    for steps in (3, 6):
        script.main(config(toy, tmp_path / "part", steps=steps, **options))
    for name in ("checkpoints/step-0000006/student", "checkpoints/step-0000006/student.average0", "pairs/00000000"):
        a, b = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "part"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
