"""Decoupled DMD against closed forms: the split is exact, the two schedules' fixed points, and the toy."""
import sys
from pathlib import Path

import pytest
import torch

from zoo import losses, rollout
from zoo.backbones.base import Source
from zoo.backbones.toy import Toy
from zoo.process import RectifiedFlow
from zoo.toy import Gaussian, Mixture, sliced_wasserstein

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "train_scripts"))
import train_decoupled_dmd as script  # noqa: E402

RF = RectifiedFlow()
WORLD = Mixture(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.5, 0.5]))      # classes +-1, std .5
W = 3.0


def conditions(n, label=1):
    label = torch.full((n,), label)
    return {"label": label}, {"label": 0 * label + 2}


def scale(x, x_t, t, cond):
    """What both of the script's directions are divided by."""
    return losses.per_sample_mean((x - WORLD(x_t, t, cond)).abs())[:, None]


def draw(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, eps = (torch.randn(n, 1, generator=g, dtype=torch.float64) for _ in range(2))
    t = 0.02 + 0.96 * torch.rand(n, generator=g, dtype=torch.float64)
    return x, RF.noise(x, eps, t), t


def test_the_split_is_exact():
    """Sheet, TB7: fake - real_w = (fake - real) - (w - 1) (real - real_0); at one shared time and weight the method is DMD at scale w."""
    x, x_t, t = draw(4096)
    cond, uncond = conditions(len(x))
    fake = Gaussian(0.3, 1.0)
    dm, ca = losses.dmd_direction(x, x_t, t, cond, uncond, WORLD, fake, 1.0)[0], script.augmentation(x, x_t, t, cond, uncond, WORLD, W)
    guided = losses.guided(WORLD, x_t, t, cond, uncond, W)
    whole = guided - fake(x_t, t)
    assert ((dm + ca) * scale(x, x_t, t, cond) - whole).abs().max() < 1e-9
    dmd = losses.dmd_direction(x, x_t, t, cond, uncond, WORLD, fake, W)[0] * losses.per_sample_mean((x - guided).abs())[:, None]
    assert ((dm + ca) * scale(x, x_t, t, cond) - dmd).abs().max() < 1e-9
    off_by_one = script.augmentation(x, x_t, t, cond, uncond, WORLD, W + 1)              # mutation: w for w - 1
    assert ((dm + off_by_one) * scale(x, x_t, t, cond) - whole).abs().max() > 0.1
    assert script.augmentation(x, x_t, t, cond, uncond, WORLD, 1.0).abs().max() == 0      # no guidance, no spear


def train_linear(steps, spear=(0.02, 0.98), shield=True, start=(0.3, 1.0)):
    """A linear student m + s z of class +1 with a closed-form critic: weight 1, SGD 0.02, batch 2048; the spear's times ~ U(spear)."""
    m, s = (torch.tensor(v, dtype=torch.float64) for v in start)
    g = torch.Generator().manual_seed(0)
    cond, uncond = conditions(2048)
    for _ in range(steps):
        z, eps, xi = (torch.randn(2048, 1, generator=g, dtype=torch.float64) for _ in range(3))
        t, r = (torch.rand(2048, generator=g, dtype=torch.float64) for _ in range(2))
        t, r, x = 0.02 + 0.96 * t, spear[0] + (spear[1] - spear[0]) * r, m + s * z
        x_r = RF.noise(x, xi, r)
        step = script.augmentation(x, x_r, r, cond, uncond, WORLD, W) * scale(x, x_r, r, cond)
        if shield:
            x_t = RF.noise(x, eps, t)
            step = step + losses.dmd_direction(x, x_t, t, cond, uncond, WORLD, Gaussian(m.item(), s.abs().item()), 1.0)[0] * scale(x, x_t, t, cond)
        m, s = m + 0.02 * step.mean(), s + 0.02 * (step * z).mean()
    return m.item(), s.item()


def test_the_spear_alone_runs_away():
    """Sheet, TB9: (2.1, .62) after 100 steps, (10.2, .31) after 1000."""
    mean, std = train_linear(100, shield=False)
    assert abs(mean - 2.1) < 0.05 and abs(std - 0.62) < 0.01
    mean, std = train_linear(900, shield=False, start=(mean, std))
    assert abs(mean - 10.2) < 0.2 and abs(std - 0.31) < 0.01


def test_the_shield_bounds_it_and_a_lower_range_tames_it():
    """Sheet, TB9: spear at t < .5 gives (1.11, .45) after 100 steps and (1.19, .167) after 1000. Its mutation, the spear over the
    whole range, has guided DMD's fixed point (2.069, .255), twice the class mean."""
    mean, std = train_linear(100, spear=(0.02, 0.5))
    assert abs(mean - 1.11) < 0.01 and abs(std - 0.45) < 0.01
    mean, std = train_linear(900, spear=(0.02, 0.5), start=(mean, std))
    assert abs(mean - 1.19) < 0.01 and abs(std - 0.167) < 0.01
    mean, std = train_linear(300, start=(2.0, 0.26))
    assert abs(mean - 2.069) < 0.02 and abs(std - 0.255) < 0.01


class Unlabelled(Toy):
    """The whole ring of eight modes whatever the label: something to learn for one step."""

    def batches(self, images=False):
        null = lambda index: {"label": torch.full_like(index, self.null)}
        return Source(4096, lambda index: {"cond": null(index), "uncond": null(index)})


@pytest.fixture(scope="module")
def ring():
    return Unlabelled(fit_steps=400)         # fitted once; students are copies of it


QUICK = dict(time_budget=0, measure_every=0, sample_every=0, checkpoint_every=0, mixed_precision="no")


def test_the_spear_stays_below_the_student_time(ring, tmp_path, monkeypatch):
    seen = []
    simulate, spear = rollout.backward_simulation, script.augmentation
    def simulated(*args):
        x, s = simulate(*args)
        seen.append(("s", s))
        return x, s
    def augmented(x, x_r, r, *args):
        seen.append(("r", r))
        return spear(x, x_r, r, *args)
    monkeypatch.setattr(rollout, "backward_simulation", simulated)
    monkeypatch.setattr(script, "augmentation", augmented)
    script.main(script.Config(teacher=ring, steps=4, batch=256, guidance=2.0, output_dir=str(tmp_path / "run"), **QUICK))
    ring.guidance = 1.0
    pairs = [(seen[i - 1][1], r) for i, (kind, r) in enumerate(seen) if kind == "r"]
    s, r = (torch.cat(each) for each in zip(*pairs))
    assert len(pairs) == 4 and set(s.tolist()) == {1.0, 0.75, 0.5, 0.25}
    assert (r <= s).all() and (r >= 0.02).all() and (r / s).max() > 0.95


def distance(net, model, knots, n=2000):
    g = torch.Generator().manual_seed(5)
    target, label = model.mixture.sample(n, seed=9)
    noise = torch.randn(n, 2, generator=g)
    made = rollout.sample(net, noise, {"label": torch.full_like(label, model.null)}, torch.tensor(knots), "renoise", lambda: torch.randn(n, 2, generator=g))
    return sliced_wasserstein(made, target)


@pytest.mark.slow
def test_converges_on_the_toy(ring, tmp_path):
    """Without guidance the target is the ring itself; sliced Wasserstein distance of one and of four steps."""
    cfg = script.Config(teacher=ring, steps=300, batch=128, lr=1e-3, critic_lr=2e-3, output_dir=str(tmp_path / "run"), **QUICK)
    run = script.main(cfg)
    fresh, student = ring.make("fresh"), run.watcher.net
    before, after = ([distance(net, ring, k) for k in ((1.0,), (1.0, 0.75, 0.5, 0.25))] for net in (fresh, student))
    print(f"sliced Wasserstein, 1 and 4 steps: {before} -> {after}")
    assert before[0] > 1.0 and after[0] < 0.3
    assert before[1] > 0.2 and after[1] < 0.2
