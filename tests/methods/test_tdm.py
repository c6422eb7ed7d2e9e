"""Trajectory distribution matching against closed forms: noising on from a noisy point, one step as DMD, the knots' laws, and the toy."""
import sys
from pathlib import Path

import pytest
import torch

from zoo import losses, rollout
from zoo.backbones.base import Source
from zoo.backbones.toy import Toy
from zoo.process import VP, RectifiedFlow
from zoo.toy import Gaussian, sliced_wasserstein

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "train_scripts"))
import train_tdm as script  # noqa: E402

RF = RectifiedFlow()
REAL = Gaussian(1.0, 0.7)
SD = VP.from_config(dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
BOTH = pytest.mark.parametrize("process", [RF, SD], ids=["flow", "vp"])


def at(value, n):
    return torch.full((n,), value, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- noising on
@BOTH
@pytest.mark.parametrize("s,u", [(0.0, 0.3), (0.25, 0.25), (0.25, 0.4), (0.5, 0.75), (0.75, 0.98)])
def test_noising_on_is_the_forward_process_from_the_knot(process, s, u):
    """Sheet, TB8: x_u = (alpha_u / alpha_s) x_s + b n with b^2 = sigma_u^2 - (alpha_u sigma_s / alpha_s)^2, so the law of noise(x0, u)."""
    n, g = 200_000, torch.Generator().manual_seed(0)
    z, eps, fresh = (torch.randn(n, 1, generator=g, dtype=torch.float64) for _ in range(3))
    x0 = 1 + 0.7 * z
    x_u = process.noise(x0, script.noised_on(process, eps, at(s, n), at(u, n), fresh), at(u, n))
    (alpha_s, sigma_s), (alpha, sigma) = ((c[0] for c in process.coeffs(at(r, 1))[:2]) for r in (s, u))
    b = (sigma**2 - (alpha / alpha_s * sigma_s) ** 2).clamp(min=0).sqrt()
    assert torch.allclose(x_u, alpha / alpha_s * process.noise(x0, eps, at(s, n)) + b * fresh, atol=1e-9)
    assert abs(x_u.mean() - alpha) < 8e-3 and abs(x_u.var() - (0.49 * alpha**2 + sigma**2)) < 8e-3
    if 0 < s < u:                           # mutation: the two knots swapped
        swapped = process.noise(x0, script.noised_on(process, eps, at(u, n), at(s, n), fresh), at(u, n))
        assert abs((swapped - x_u).std()) > 0.1


# ------------------------------------------------------------------------------------------------------------- one step is DMD
class Scaled:
    """x0-prediction `by` x."""

    def __init__(self, by, process):
        self.by, self.process = by, process

    def __call__(self, x, t, cond, *, r=None, to="x0"):
        return self.process.convert(self.by * x, x, t, "x0", to)


@BOTH
def test_one_step_is_dmd_with_a_huber_distance(process):
    """Sheet, 8: K = 1 ends at the clean time, x_u is the plainly noised sample and the gradient has DMD's direction; for a wide c it
    is DMD's gradient itself."""
    g = torch.Generator().manual_seed(0)
    x, eps, n = (torch.randn(8, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    u = 0.05 + 0.9 * torch.rand(8, generator=g, dtype=torch.float64)
    assert torch.equal(script.noised_on(process, eps, 0 * u, u, n), n)
    x_u, real, fake = process.noise(x, n, u), Scaled(0.5, process), Scaled(0.2, process)
    x.requires_grad_(True)
    direction = losses.dmd_direction(x, x_u, u, {}, {}, real, fake, 1.0)[0]
    def gradient(c):
        return torch.autograd.grad(script.student_objective(x, x_u, u, {}, {}, real, fake, 1.0, c)[0], x)[0]
    narrow, wide = gradient(5.4e-4), gradient(1e4) * 1e4
    assert torch.allclose(wide, -direction / x.numel(), rtol=1e-5, atol=1e-12)
    assert (torch.nn.functional.cosine_similarity(-narrow.flatten(1), direction.flatten(1)) > 1 - 1e-9).all()
    rms = losses.per_sample_mean((x_u * 0.3) ** 2).sqrt()
    scale = losses.per_sample_mean((x - 0.5 * x_u).abs())
    assert torch.allclose(narrow.flatten(1).norm(dim=1) * scale * len(x) * 48**0.5, torch.ones(8).double(), atol=1e-4) and rms.min() > 0.1


# ------------------------------------------------------------------------------------------------------------- the knots' laws
class Linear:
    """Knot t's student: x0 = a + b x; on the flow path."""
    process = RF

    def __init__(self, knots):
        self.knots = knots
        self.a, self.b = (torch.zeros(len(knots), dtype=torch.float64, requires_grad=True) for _ in range(2))

    def __call__(self, x, t, cond, *, to="x0"):
        i = (t[:, None] == torch.tensor(self.knots, dtype=t.dtype)).int().argmax(1)
        return RF.convert(self.a[i, None] + self.b[i, None] * x, x, t, "x0", to)


class Regression:
    """The optimal critic of jointly Gaussian (x, x_u), all elements alike and one noise level: E[x | x_u], out of their own moments."""
    process = RF

    def __init__(self, x, x_u):
        self.mean, self.mean_u = x.mean(), x_u.mean()
        self.slope = ((x - self.mean) * (x_u - self.mean_u)).mean() / x_u.var()

    def __call__(self, x, t, cond, *, to="x0"):
        return self.mean + self.slope * (x - self.mean_u)


def knot_laws(mixed, steps=300):
    """Spread of x_.5, mean and spread of x_0 after training a linear two-step student on N(1, .7^2) in 16 dimensions with an exact
    critic, at the times u halfway between the knots."""
    G, g = Linear((1.0, 0.5)), torch.Generator().manual_seed(0)
    knots = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    for i in range(steps):
        for depth in (0, 1):
            noise, n = (torch.randn(256, 16, generator=g, dtype=torch.float64) for _ in range(2))
            x_t, t = script.trajectory(G, noise, {}, knots[:2], torch.full((256,), depth))
            s, u = knots[depth + 1].expand(256), ((knots[depth] + knots[depth + 1]) / 2).expand(256)
            x, eps = script.predict(G, x_t, t, {})
            x_u = RF.noise(x, mixed(eps, s, u, n), u).detach()
            loss, _ = script.student_objective(x, x_u, u, {}, {}, REAL, Regression(x.detach(), x_u), 1.0, 1.0)
            loss.backward()
            with torch.no_grad():
                for p in (G.a, G.b):
                    p -= 0.3 * (1 - i / steps) * p.grad
                    p.grad = None
    noise = torch.randn(20_000, 16, generator=g, dtype=torch.float64)
    middle, _ = script.trajectory(G, noise, {}, knots[:2], torch.ones(len(noise)))
    with torch.no_grad():
        end = rollout.sample(G, noise, {}, knots[:2], "ode")
    return middle.std().item(), end.mean().item(), end.std().item()


def test_laws_at_the_knots():
    """The last law is the teacher's; the inner one is not quite. With critic E[x | x_u] the spread y of x_s solves
    a y (y - sigma_s) / alpha_s = k (a^2 y^2 + b^2), k = alpha_u S^2 / (alpha_u^2 S^2 + sigma_u^2): .686 at s = .5, u = .75, S = .7 (the
    teacher's is .610, its own Euler step's .5). Noising the clean prediction afresh (the mutation: DMD's critic) gives .85."""
    middle, mean, std = knot_laws(lambda eps, s, u, n: script.noised_on(RF, eps, s, u, n))
    assert abs(middle - 0.686) < 0.01 and abs(mean - 1) < 0.01 and abs(std - 0.7) < 0.01
    middle, mean, std = knot_laws(lambda eps, s, u, n: n)
    assert abs(middle - 0.85) < 0.01 and abs(mean - 1) < 0.01 and abs(std - 0.7) < 0.01


# ------------------------------------------------------------------------------------------------------------- the toy
class Unlabelled(Toy):
    """The whole ring of eight modes whatever the label."""

    def batches(self, images=False):
        null = lambda index: {"label": torch.full_like(index, self.null)}
        return Source(4096, lambda index: {"cond": null(index), "uncond": null(index)})


@pytest.fixture(scope="module")
def ring():
    return Unlabelled(fit_steps=400)


QUICK = dict(time_budget=0, measure_every=0, sample_every=0, checkpoint_every=0, mixed_precision="no")


def apart(net, model, knots, n=4000):
    g = torch.Generator().manual_seed(5)
    target, label = model.mixture.sample(n, seed=9)
    noise = torch.randn(n, 2, generator=g)
    return sliced_wasserstein(rollout.sample(net, noise, {"label": torch.full_like(label, model.null)}, torch.tensor(knots), "ode"), target)


def test_converges_on_the_toy(ring, tmp_path):
    """Sliced Wasserstein distance to the ring with two deterministic steps, the only count the student is trained and exported for."""
    cfg = script.Config(teacher=ring, steps=300, batch=128, lr=5e-4, critic_lr=1e-3, student_times=(1.0, 0.5), output_dir=str(tmp_path / "run"), **QUICK)
    run = script.main(cfg)
    assert set(run.watcher.contract.knots) == {2} and run.watcher.contract.scheduler == "DDIMScheduler"
    before, after = (apart(net, ring, cfg.student_times) for net in (ring.make("fresh"), run.watcher.net))
    print(f"sliced Wasserstein {before:.3f} -> {after:.3f}")
    assert before > 0.4 and after < 0.2
