"""Few-step SiD against closed forms: the projection identity, both Fisher gradients, the guidance options' fixed points, and the toy."""
import sys
from pathlib import Path

import pytest
import torch

from zoo import rollout
from zoo.backbones.base import Source
from zoo.backbones.toy import Toy
from zoo.process import RectifiedFlow
from zoo.toy import Gaussian, Mixture, sliced_wasserstein

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "train_scripts"))
import train_sid as script  # noqa: E402

RF = RectifiedFlow()
REAL = Gaussian(1.0, 0.7)
WORLD = Mixture(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.5, 0.5]))      # classes +-1, std .5


def normals(n, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 1, generator=g, dtype=torch.float64) for _ in range(k)]


def identity(x, eps, t, fake, alpha, through=True):
    """The script's loss before its weight, on the flow path; through=False cuts the gradients through the two scores (the mutation)."""
    x_t = RF.noise(x, eps, t)
    x_t = x_t if through else x_t.detach()
    return script.score_identity(x, REAL(x_t, t), fake(x_t, t), alpha)


# ------------------------------------------------------------------------------------------------------------- the identity
def test_projection_identity():
    """Sheet, TB2: E[(real - fake)(fake - x)] = 0 and E[(real - fake)(real - x)] = E|real - fake|^2 = 1.3369 for an exact critic."""
    z, eps = normals(1_000_000, 2)
    t = torch.full((len(z),), 0.6, dtype=torch.float64)
    x, fake = -0.4 + 0.5 * z, Gaussian(-0.4, 0.5)
    assert abs(identity(x, eps, t, fake, 1.0).mean()) < 3e-3
    assert abs(identity(x, eps, t, fake, 0.0).mean() - 1.3369) < 6e-3
    assert abs(identity(x, eps, t, Gaussian(-0.2, 0.5), 1.0).mean()) > 0.1               # mutation: another student's critic


def test_one_critic_serves_the_mixture_of_steps():
    """Sheet, 12: with the denoiser of the two steps' mixture the identity holds over both steps together, not step by step."""
    z, eps = normals(1_000_000, 2)
    first = torch.arange(len(z)) % 2 == 0
    x = torch.where(first[:, None], -0.4 + 0.5 * z, 0.8 + 0.3 * z)
    fake = Mixture(torch.tensor([[-0.4], [0.8]]), torch.tensor([0.5, 0.3]))
    t = torch.full((len(z),), 0.6, dtype=torch.float64)
    each = identity(x, eps, t, fake, 1.0)
    assert abs(each.mean()) < 3e-3 and abs(each[first].mean()) > 0.1


@pytest.mark.parametrize("alpha,dm,ds", [(0.5, -1.888, -0.135), (1.0, -2.069, -0.141)])
def test_gradient_is_that_of_the_fisher_divergence(alpha, dm, ds):
    """Sheet, TB3 at t = .6: twice the gradient is the full Fisher divergence's with alpha = 1/2, its sampling law frozen with alpha = 1."""
    z, eps = normals(1_000_000, 2)
    t = torch.full((len(z),), 0.6, dtype=torch.float64)
    for through in (True, False):
        m, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-0.4, 0.5))
        (2 * identity(m + s * z, eps, t, Gaussian(-0.4, 0.5), alpha, through).mean()).backward()
        close = abs(m.grad - dm) < 1e-2 and abs(s.grad - ds) < 1e-2
        assert close == through                    # without the gradients through both scores it is another loss


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_converges_to_the_teacher(alpha):
    """Sheet, TB4: (1.000, .700) from (-2, .2) with weight 1, SGD .02, batch 2048, 1500 steps, t ~ U(.02, .98)."""
    m, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-2.0, 0.2))
    g = torch.Generator().manual_seed(0)
    for _ in range(1500):
        z, eps = (torch.randn(2048, 1, generator=g, dtype=torch.float64) for _ in range(2))
        t = 0.02 + 0.96 * torch.rand(2048, generator=g, dtype=torch.float64)
        identity(m + s * z, eps, t, Gaussian(m.item(), abs(s.item())), alpha).mean().backward()
        with torch.no_grad():
            for p in (m, s):
                p -= 0.02 * p.grad
                p.grad = None
    assert abs(m - 1.0) < 0.01 and abs(s - 0.7) < 0.01


# ------------------------------------------------------------------------------------------------------------- guidance
def conditions(n):
    return {"label": torch.ones(n, dtype=torch.long)}, {"label": torch.full((n,), 2)}


class Trained:
    """The critic of a linear student (class +1: m + s z, class -1: its mirror) after training at scale k1 with dropped prompts: the
    empty prompt is the mixture's denoiser u, and u + k1 (c - u) is the class' own."""
    process = RF

    def __init__(self, m, s, k1):
        self.exact, self.k1 = Mixture(torch.tensor([[-m], [m]]), torch.tensor([s, s])), k1

    def __call__(self, x, t, cond, *, to="x0"):
        u = self.exact(x, t, {"label": torch.full_like(cond["label"], 2)})
        return u + (self.exact(x, t, cond) - u) / self.k1


def drift(m, s, k1, k2, k4):
    """Expected move (dm, ds) of the student by the detached difference real^k4 - fake^k2, weight 1, t ~ U(.02, .98)."""
    u = torch.quasirandom.SobolEngine(3, scramble=True, seed=0).draw(2**16, dtype=torch.float64)
    z, eps = torch.special.ndtri(u[:, :2].clamp(1e-9, 1 - 1e-9)).split(1, dim=1)
    t = 0.02 + 0.96 * u[:, 2]
    cond, uncond = conditions(len(t))
    x_t, fake = RF.noise(m + s * z, eps, t), Trained(m, s, k1)
    d = script.at_scale(WORLD, x_t, t, cond, uncond, k4) - script.at_scale(fake, x_t, t, cond, uncond, k2)
    return d.mean().item(), (d * z).mean().item()


@pytest.mark.parametrize("k1,k2,k4,m,s", [(1, 1, 1, 1.000, 0.500), (1, 0, 1, 1.928, 0.220), (1, -0.5, 1, 2.505, 0.145), (1, -1, 1, 3.114, 0.091),
                                          (3, 3, 3, 2.069, 0.255), (1, 3, 3, 1.000, 0.500)],
                         ids=["none", "zero", "anti-half", "anti-one", "long-short", "guided-critic-trained-unguided"])
def test_fixed_points_of_the_guidance_options(k1, k2, k4, m, s):
    """Sheet, 12 and 10: zero and anti guide implicitly and stay finite; long-short has the fixed point of guiding the teacher alone; a
    critic guided only when it is read cancels the teacher's guidance. The drift vanishes there and restores the mean on both sides."""
    dm, ds = drift(m, s, k1, k2, k4)
    assert abs(dm) < 4e-3 and abs(ds) < 4e-3
    assert drift(m - 0.1, s, k1, k2, k4)[0] > 0.01 and drift(m + 0.1, s, k1, k2, k4)[0] < -0.01


def test_options_and_prompt_dropping():
    cfg = lambda option: script.Config(cfg=option, anti_scale=-0.5)
    assert [script.scales(cfg(o), 3.0) for o in ("long-short", "zero", "anti")] == [(3.0, 3.0, 3.0), (0.0, 0.0, 1.0), (1.0, -0.5, 1.0)]
    x, t = torch.randn(64, 1), torch.full((64,), 0.5)
    cond, uncond = conditions(64)
    u, c = WORLD(x, t, uncond), WORLD(x, t, cond)
    assert torch.equal(script.at_scale(WORLD, x, t, cond, uncond, 0), u) and torch.equal(script.at_scale(WORLD, x, t, cond, uncond, 1), c)
    assert torch.allclose(script.at_scale(WORLD, x, t, cond, uncond, -0.5), u - 0.5 * (c - u), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- the toy
class Unlabelled(Toy):
    """The whole ring of eight modes whatever the label: something to learn for one step."""

    def batches(self, images=False):
        null = lambda index: {"label": torch.full_like(index, self.null)}
        return Source(4096, lambda index: {"cond": null(index), "uncond": null(index)})


@pytest.fixture(scope="module")
def ring():
    return Unlabelled(fit_steps=400)         # fitted once; students are copies of it


QUICK = dict(time_budget=0, measure_every=0, sample_every=0, checkpoint_every=0, mixed_precision="no")


def distance(net, model, knots, n=2000):
    g = torch.Generator().manual_seed(5)
    target, label = model.mixture.sample(n, seed=9)
    noise = torch.randn(n, 2, generator=g)
    made = rollout.sample(net, noise, {"label": torch.full_like(label, model.null)}, torch.tensor(knots), "renoise", lambda: torch.randn(n, 2, generator=g))
    return sliced_wasserstein(made, target)


@pytest.mark.slow
def test_converges_on_the_toy(ring, tmp_path):
    """Sliced Wasserstein distance to the ring with one and with four steps. Student rates near the critic's do not converge here
    (1e-3 beside 2e-3, two critic updates: .77 and .74 after 300 steps), so this is at a fifth with four updates, as by default."""
    cfg = script.Config(teacher=ring, steps=250, batch=128, lr=2e-4, critic_lr=1e-3, output_dir=str(tmp_path / "run"), **QUICK)
    run = script.main(cfg)
    assert cfg.critic_updates == 4 and cfg.lr / cfg.critic_lr == script.Config.lr / script.Config.critic_lr
    before, after = ([distance(net, ring, k) for k in ((1.0,), (1.0, 0.75, 0.5, 0.25))] for net in (ring.make("fresh"), run.watcher.net))
    print(f"sliced Wasserstein, 1 and 4 steps: {before} -> {after}")
    assert before[0] > 1.0 and after[0] < 0.35
    assert before[1] > 0.28 and after[1] < 0.25


@pytest.mark.parametrize("option", ["zero", "anti"])
def test_the_student_alone_moves_in_its_turn(ring, tmp_path, option):
    """Gradients pass through both scores to the student; the critic gets none and the teacher's network keeps its bits."""
    before = [p.clone() for p in ring.module.parameters()]
    run = script.main(script.Config(teacher=ring, steps=2, batch=8, critic_updates=0, cfg=option, output_dir=str(tmp_path / "run"), **QUICK))
    moved = lambda name: any(not torch.equal(p, q) for p, q in zip(run.trainees[name].params.values(), ring.module.parameters()))
    assert moved("student") and not moved("critic")
    assert all(torch.equal(p, q) for p, q in zip(before, ring.module.parameters()))
