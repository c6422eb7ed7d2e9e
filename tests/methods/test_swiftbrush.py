"""SwiftBrush against closed forms: variational score distillation, what guidance does to its fixed point, and the toy."""
import sys
from pathlib import Path

import pytest
import torch

from zoo import losses, rollout
from zoo.process import RectifiedFlow
from zoo.toy import Gaussian, Mixture, sliced_wasserstein

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "train_scripts"))
import train_swiftbrush as script  # noqa: E402

RF = RectifiedFlow()
CLASSES = Mixture(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.5, 0.5]))      # two classes at -1 and 1


class DrawnNoise:
    """eps_fake replaced by the noise that was drawn (its x0 is the sample itself): score distillation sampling."""
    process = RF

    def __init__(self, x):
        self.x = x

    def __call__(self, x_t, t, cond, *, to="x0"):
        return self.x


class StudentScore:
    """Exact, never guided score of one class' student m + s z, and the teacher's own unconditional score beside it."""
    process = RF

    def __init__(self, mean, std):
        self.own = Gaussian(mean, std)

    def __call__(self, x_t, t, cond, *, to="x0"):
        return torch.where((cond["label"] == 2)[:, None], CLASSES(x_t, t, cond), self.own(x_t, t, {}))


def draw(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 1, generator=g, dtype=torch.float64) for _ in range(2)] + [torch.rand(n, generator=g, dtype=torch.float64)]


def test_weight_is_sigma_squared_on_eps():
    x, eps, u = draw(512)
    t = 0.02 + 0.96 * u
    x_t = RF.noise(x, eps, t)
    real, fake = Gaussian(1.0, 0.7), Gaussian(-0.4, 0.5)
    direction, _, _ = script.vsd_direction(x_t, t, {}, {}, real, fake, 1, 1)
    sigma2 = t[:, None] ** 2
    assert torch.allclose(direction, sigma2 * (fake(x_t, t, {}, to="eps") - real(x_t, t, {}, to="eps")), atol=1e-9)
    assert script.vsd_direction(x_t, t, {}, {}, real, real, 1, 1)[0].abs().max() == 0


def test_score_distillation_sampling_has_the_same_mean_and_variance_one_half():
    """Sheet, TB10: at fake = real = N(0, 1), t = 0.5, eps_real - eps has mean 0 and variance .500; the variational form is 0."""
    x, eps, _ = draw(400_000)
    t = torch.full((len(x),), 0.5, dtype=torch.float64)
    x_t = RF.noise(x, eps, t)
    real = Gaussian(0.0, 1.0)
    sds = -script.vsd_direction(x_t, t, {}, {}, real, DrawnNoise(x), 1, 1)[0] / 0.25      # without sigma^2
    assert torch.allclose(sds, real(x_t, t, {}, to="eps") - eps, atol=1e-9)
    assert abs(sds.mean()) < 5e-3 and abs(sds.var() - 0.5) < 5e-3
    assert script.vsd_direction(x_t, t, {}, {}, real, real, 1, 1)[0].var() == 0


def test_guidance_at_the_start():
    """fake = real: with an unguided critic sigma^2 (w - 1)(eps_c - eps_u) is left (sheet, VSD), with both guided nothing; one scale
    for all samples is the same as drawing it from a point."""
    x, eps, u = draw(256)
    t = 0.02 + 0.96 * u
    x_t, label = RF.noise(x, eps, t), torch.ones(256, dtype=torch.long)
    cond, uncond = {"label": label}, {"label": label + 1}
    direction, _, _ = script.vsd_direction(x_t, t, cond, uncond, CLASSES, CLASSES, 4.5, 1)
    expected = -t[:, None] ** 2 * 3.5 * (CLASSES(x_t, t, cond, to="eps") - CLASSES(x_t, t, uncond, to="eps"))
    assert torch.allclose(direction, expected, atol=1e-9)
    assert script.vsd_direction(x_t, t, cond, uncond, CLASSES, CLASSES, 4.5, 4.5)[0].abs().max() == 0
    drawn = script.vsd_direction(x_t, t, cond, uncond, CLASSES, CLASSES, torch.full((256,), 4.5), 1)[0]
    assert torch.allclose(drawn, direction, atol=1e-12)


def train_linear(w_fake, steps, weight=lambda t: 1 - t + 0 * t, sign=1):
    """Student m + s z of the class at +1 from (.3, 1), SGD .02, batch 4096, t ~ U(.02, .98), w = 3 (the sheet's TB9)."""
    m, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 1.0))
    g = torch.Generator().manual_seed(0)
    label = torch.ones(4096, dtype=torch.long)
    for _ in range(steps):
        z, eps = (torch.randn(4096, 1, generator=g, dtype=torch.float64) for _ in range(2))
        t = 0.02 + 0.96 * torch.rand(4096, generator=g, dtype=torch.float64)
        x = m + s * z
        x_t = RF.noise(x, eps, t).detach()
        fake = StudentScore(m.item(), abs(s.item()))
        direction, _, _ = script.vsd_direction(x_t, t, {"label": label}, {"label": label + 1}, CLASSES, fake, 3.0, w_fake)
        direction = sign * direction / weight(t)[:, None]
        (0.5 * (x - (x + direction).detach()) ** 2).mean().backward()
        with torch.no_grad():
            for p in (m, s):
                p -= 0.02 * p.grad
                p.grad = None
    return m.item(), s.item()


@pytest.mark.parametrize("w_fake,expected", [(3.0, (1.000, 0.500)), (1, (2.069, 0.261))])
def test_guidance_on_both_scores_cancels(w_fake, expected):
    """TB9 after 1000 steps, whose weight is 1 on x0 (alpha sigma divided away): both guided (1.000, .500); real alone (2.069, .261)."""
    mean, std = train_linear(w_fake, 1000, weight=lambda t: (1 - t) * t)
    assert abs(mean - expected[0]) < 0.01 and abs(std - expected[1]) < 0.01


def test_the_papers_weight_keeps_the_fixed_point_and_the_wrong_sign_runs_away():
    one = lambda t: torch.ones_like(t)
    mean, std = train_linear(3.0, 1500, one)
    assert abs(mean - 1.0) < 0.01 and abs(std - 0.5) < 0.02
    assert train_linear(3.0, 100, one, sign=-1)[0] < 0.29


def test_dropped_prompts_are_replaced_by_the_empty_one():
    cond, uncond = {"a": torch.arange(4), "b": torch.ones(4, 2, 3)}, {"a": torch.full((4,), 9), "b": torch.zeros(4, 2, 3)}
    out = losses.without_prompt(cond, uncond, torch.tensor([True, False, False, True]))
    assert out["a"].tolist() == [9, 1, 2, 9] and out["b"].sum((1, 2)).tolist() == [0, 6, 6, 0]


def toy(tmp_path, **flags):
    """One-step samples of a toy student before and after training, as distances to the mixture."""
    settings = dict(teacher="toy", batch=128, time_budget=0.0, measure_every=0, sample_every=0, checkpoint_every=0)
    run = script.main(script.Config(output_dir=str(tmp_path / "run"), **(settings | flags)))
    truth, label = run.model.mixture.sample(2000, seed=5)
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(3))

    def reach(net):                                            # mean over modes, so that shifted modes count
        x = rollout.sample(net, noise, {"label": label}, torch.tensor([1.0]))
        return sum(sliced_wasserstein(x[label == k], truth[label == k]) for k in range(8)) / 8
    return reach(run.model.make("untrained")), reach(run.watcher.net)


def test_toy_converges(tmp_path):
    """Measured .081 before and .046 after."""
    before, after = toy(tmp_path, steps=300)
    print(before, after)
    assert before > 0.075 and after < 0.05
