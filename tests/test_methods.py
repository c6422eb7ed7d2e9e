"""Each method against closed forms (the sheets' toy checks with their reference numbers), and mutations that must fail."""
import sys
from pathlib import Path

import pytest
import torch

from zoo import calculus, critics, losses, rollout
from zoo.process import RectifiedFlow, View
from zoo.toy import Gaussian, Mixture, sliced_wasserstein

sys.path.insert(0, str(Path(__file__).parent.parent / "train_scripts"))
import train_dmd  # noqa: E402
import train_flow_map  # noqa: E402
import train_lcm  # noqa: E402
import train_meanflow  # noqa: E402

RF = RectifiedFlow()
REAL = Gaussian(1.0, 0.7)


def fake_at(mean, std):
    return Gaussian(mean, std)


# ------------------------------------------------------------------------------------------------------------- DMD
@pytest.mark.parametrize("t,dm,ds,gap", [(0.2, -2.5339, -0.695, 0.02744), (0.6, -0.51095, -0.0175, 1.3369), (0.9, -0.01718, -2e-5, 1.9372)])
def test_score_difference_is_the_gradient_of_kl(t, dm, ds, gap):
    """Reference numbers for real N(1, .7^2), fake N(-.4, .5^2) on the flow path: dKL/dm, dKL/ds and E|D_real - D_fake|^2."""
    n = 400_000
    g = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(n, 1, generator=g, dtype=torch.float64) for _ in range(2))
    time = torch.full((n,), t, dtype=torch.float64)
    x_t = RF.noise(-0.4 + 0.5 * z, eps, time)
    difference = fake_at(-0.4, 0.5)(x_t, time, {}) - REAL(x_t, time, {})
    weight = ((1 - t) / t) ** 2
    assert abs((weight * difference).mean() - dm) < 6e-3 * max(1, abs(dm))
    assert abs((weight * difference * z).mean() - ds) < 1e-2
    assert abs((difference**2).mean() - gap) < 6e-3


def train_linear(direction, start=(-2.0, 0.2), steps=1500):
    """A linear student m + s z with a closed-form critic, SGD 0.02, batch 4096, t ~ U(.02, .98)."""
    m, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in start)
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        z, eps = (torch.randn(4096, 1, generator=g, dtype=torch.float64) for _ in range(2))
        t = 0.02 + 0.96 * torch.rand(4096, generator=g, dtype=torch.float64)
        x = m + s * z
        x_t = RF.noise(x, eps, t).detach()
        loss = losses_along64(x, direction(x.detach(), x_t, t, fake_at(m.item(), abs(s.item()))))
        loss.backward()
        with torch.no_grad():
            for p in (m, s):
                p -= 0.02 * p.grad
                p.grad = None
    return m.item(), s.item()


def losses_along64(x, direction):
    return 0.5 * ((x - (x + direction).detach()) ** 2).mean()


def batch_mean(x, x_t, t, fake, sign=1):
    """The direction, with its per-sample scale replaced by the batch mean (a scalar sample has no mean of its own)."""
    d = losses.dmd_direction(x, x_t, t, {}, {}, REAL, fake, 1.0)[0]
    scale = (x - REAL(x_t, t, {})).abs()
    return sign * d * scale / scale.mean()


def test_dmd_converges_to_the_teacher_and_its_mutation_does_not():
    mean, std = train_linear(batch_mean)
    assert abs(mean - 1.0) < 0.01 and abs(std - 0.7) < 0.01
    mean, std = train_linear(lambda *a: batch_mean(*a, sign=-1), steps=100)
    assert mean < -2.0                       # the wrong sign runs away


def test_dmd_direction_vanishes_when_fake_is_real_and_points_to_the_data_otherwise():
    g = torch.Generator().manual_seed(1)
    x = 1 + 0.7 * torch.randn(2000, 1, generator=g, dtype=torch.float64)
    t = 0.02 + 0.96 * torch.rand(2000, generator=g, dtype=torch.float64)
    x_t = RF.noise(x, torch.randn(2000, 1, generator=g, dtype=torch.float64), t)
    assert losses.dmd_direction(x, x_t, t, {}, {}, REAL, REAL, 1.0)[0].abs().max() == 0
    assert losses.dmd_direction(x - 2, x_t - 2 * (1 - t[:, None]), t, {}, {}, REAL, fake_at(-1.0, 0.7), 1.0)[0].mean() > 0


def test_guided_fixed_point():
    """DMD against a guided teacher overshoots the class mean and halves its spread: (2.069, .255) at w = 3 (classes +-1, std .5)."""
    world = Mixture(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.5, 0.5]))
    def direction(x, x_t, t, fake):
        label = torch.ones(len(x), dtype=torch.long)
        x_real = losses.guided(world, x_t, t, {"label": label}, {"label": 0 * label + 2}, 3.0)
        return x_real - fake(x_t, t, {})
    mean, std = train_linear(direction, start=(0.3, 1.0), steps=3000)
    assert abs(mean - 2.069) < 0.02 and abs(std - 0.255) < 0.01


def test_guided_is_linear_in_w_and_one_means_none():
    world = Mixture(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.5, 0.5]))
    x, t, label = torch.randn(64, 1), torch.rand(64) * 0.9 + 0.05, torch.ones(64, dtype=torch.long)
    cond, uncond = {"label": label}, {"label": label + 1}
    c, u = world(x, t, cond), world(x, t, uncond)
    assert torch.equal(losses.guided(world, x, t, cond, uncond, 1), c)
    for w in (0.0, 2.5):
        assert torch.allclose(losses.guided(world, x, t, cond, uncond, w), u + w * (c - u), atol=1e-6)
    assert torch.allclose(losses.guided(world, x, t, cond, uncond, torch.full((64,), 2.5)), u + 2.5 * (c - u), atol=1e-6)


def test_along_has_exactly_the_stated_gradient():
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    d = torch.randn(4, 3, 2, 2)
    losses.along(x, d).backward()
    assert torch.allclose(x.grad, -d / x.numel(), atol=1e-8)


def test_backward_simulation_keeps_the_exact_marginal():
    """With the variance-preserving student x0 = flow map, every re-noised input has the path's own marginal."""
    world = Gaussian(0.0, 1.0)
    g = torch.Generator().manual_seed(0)
    n = 200_000
    class FlowMap:
        process = RF
        def __call__(self, x, t, cond):
            return world.flow_map(x, t, torch.zeros_like(t))
    x, t = rollout.backward_simulation(FlowMap(), torch.randn(n, 1, generator=g), {}, torch.tensor([1.0, 0.75, 0.5, 0.25]), 3,
                                       lambda: torch.randn(n, 1, generator=g))
    assert t[0] == 0.25 and abs(x.var() - (0.75**2 + 0.25**2)) < 5e-3


def test_backward_simulation_takes_one_depth_per_sample():
    """Mixed depths give each sample exactly what a whole batch of its depth gives it, with the same draws."""
    world, knots = Gaussian(1.0, 0.7), torch.tensor([1.0, 0.75, 0.5, 0.25])
    noise = torch.randn(8, 1, generator=torch.Generator().manual_seed(0))

    def run(depth):
        g = torch.Generator().manual_seed(1)
        return rollout.backward_simulation(world, noise, {}, knots, depth, lambda: torch.randn(8, 1, generator=g))
    depth = torch.arange(8) % 4
    x, t = run(depth)
    assert torch.equal(t, knots[depth])
    for d in range(4):
        whole_x, whole_t = run(d)
        assert torch.equal(x[depth == d], whole_x[depth == d]) and (whole_t == knots[d]).all()


def test_a_critic_told_the_student_time_keeps_the_steps_from_compensating_one_another(tmp_path):
    """One critic score for all student times lets late steps overshoot what early ones lack; told the time, every step is nearer."""
    def distance(tell):
        run = train_dmd.main(train_dmd.Config(teacher="toy", steps=134, time_budget=0.0, tell_critic=tell, output_dir=str(tmp_path / str(tell)),
                                              lr=2e-4, critic_lr=4e-4, betas=(0.0, 0.99),    # fast: the critic is always a little behind
                                              measure_every=0, sample_every=0, checkpoint_every=0))
        student, n, g = run.watcher.net, 4096, torch.Generator().manual_seed(5)
        label = torch.arange(n) % 8
        x = rollout.sample(student, torch.randn(n, 2, generator=g), {"label": label}, torch.tensor([1.0, 0.75, 0.5, 0.25]), "renoise",
                           lambda: torch.randn(n, 2, generator=g))
        return sliced_wasserstein(x, run.model.mixture.sample(n, seed=9, label=label)[0])
    told, untold = distance(True), distance(False)
    assert told < 0.11 and untold > 1.3 * told           # .086 and .157 where written


def test_discriminator_recovers_the_log_ratio():
    """NS losses on 1-D Gaussians N(1, 1) against N(-1, 1): the optimal logit is log p/q = 2x."""
    g = torch.Generator().manual_seed(0)
    real, fake = 1 + torch.randn(20_000, 1, generator=g), -1 + torch.randn(20_000, 1, generator=g)
    head = torch.nn.Linear(1, 1)
    opt = torch.optim.LBFGS(head.parameters(), max_iter=50)
    def closure():
        opt.zero_grad()
        loss = critics.discriminator(head(real), head(fake))
        loss.backward()
        return loss
    opt.step(closure)
    assert abs(head.weight.item() - 2) < 0.1 and abs(head.bias.item()) < 0.1
    assert critics.generator(torch.tensor([5.0])) < critics.generator(torch.tensor([-5.0]))


# ------------------------------------------------------------------------------------------------------------- LCM
class Composition:
    """Where the 50-step DDIM chain of the teacher lands: the fixed point of consistency distillation on that grid."""
    process = RF

    def __init__(self, world, n):
        self.world, self.n = world, n

    def __call__(self, x, t, cond=None):
        k = (t * self.n).round().long()
        for j in range(self.n, 0, -1):
            here, there = (torch.full_like(t, i / self.n) for i in (j, j - 1))
            x0, eps = RF.pair(self.world(x, here, {}, to="v"), x, here, "v")
            x = torch.where((k >= j)[:, None], RF.step(x0, eps, there), x)
        return x


def test_consistency_target_is_met_exactly_by_the_ddim_composition_and_not_by_the_flow_map():
    n, world = 50, Gaussian(1.0, 0.7)
    f = Composition(world, n)
    t = torch.randint(1, n + 1, (256,), generator=torch.Generator().manual_seed(0)).double() / n
    x = RF.noise(1 + 0.7 * torch.randn(256, 1, dtype=torch.float64), torch.randn(256, 1, dtype=torch.float64), t)
    y = train_lcm.consistency_target(f, world, x, t, t - 1 / n, {}, {}, 1)
    assert (f(x, t) - y).abs().max() < 1e-6
    exact = lambda x, t, cond=None: world.flow_map(x, t, torch.zeros_like(t))
    assert (exact(x, t) - train_lcm.consistency_target(exact, world, x, t, t - 1 / n, {}, {}, 1)).abs().max() > 1e-4
    class Flipped:                          # mutation: the teacher's sign
        process = RF
        def __call__(self, x, t, cond, *, to):
            return -world(x, t, cond, to=to)
    assert (f(x, t) - train_lcm.consistency_target(f, Flipped(), x, t, t - 1 / n, {}, {}, 1)).abs().max() > 1e-2


def test_consistency_boundary_is_the_sample_itself():
    world = Gaussian(1.0, 0.7)
    t = torch.full((8,), 0.02, dtype=torch.float64)
    x = torch.randn(8, 1, dtype=torch.float64)
    nonsense = lambda x, t, cond=None: 100 + 0 * x
    y = train_lcm.consistency_target(nonsense, world, x, t, 0 * t, {}, {}, 1)
    assert (y - world(x, t, {})).abs().max() < 1e-9            # one DDIM step to 0 is D itself


# ------------------------------------------------------------------------------------------------------------- MeanFlow
def meanflow_residual(u, v, x, t, r, how="jvp"):
    return (u(x, t, r) - train_meanflow.average_velocity_target(u, v, x, t, r, how, 1e-4)).abs().max().item()


def test_meanflow_identity_and_its_mutations():
    world = Gaussian(1.0, 0.7)
    g = torch.Generator().manual_seed(0)
    r = 0.05 + 0.4 * torch.rand(256, generator=g, dtype=torch.float64)
    t = r + 0.05 + 0.4 * torch.rand(256, generator=g, dtype=torch.float64)
    x = RF.noise(1 + 0.7 * torch.randn(256, 1, generator=g, dtype=torch.float64), torch.randn(256, 1, generator=g, dtype=torch.float64), t)
    v = world(x, t, {}, to="velocity")
    exact = meanflow_residual(world.average_velocity, v, x, t, r)
    assert exact < 1e-9
    assert meanflow_residual(world.average_velocity, v, x, t, r, "fd") < 1e-5
    instantaneous = lambda x, t, r: world(x, t, {}, to="velocity")
    assert meanflow_residual(instantaneous, v, x, t, r) > 1e-2            # the velocity is not the average velocity
    swapped = lambda x, t, r: world.average_velocity(x, r, t)
    assert meanflow_residual(swapped, v, x, t, r) > 1e-2                  # swapped times
    assert meanflow_residual(world.average_velocity, -v, x, t, r) > 1e-2  # flipped sign


def test_meanflow_target_is_detached_and_reduces_to_flow_matching():
    world = Gaussian(1.0, 0.7)
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    u = lambda x, t, r: scale * x * t[:, None]
    x, t = torch.randn(16, 1, dtype=torch.float64), torch.full((16,), 0.5, dtype=torch.float64)
    v = world(x, t, {}, to="velocity")
    target = train_meanflow.average_velocity_target(u, v, x, t, t, "jvp", 1e-3)
    assert not target.requires_grad and torch.equal(target, v)            # r = t: exactly flow matching


@pytest.mark.parametrize("how", ["jvp", "fd"])
def test_derivatives_do_not_see_mixed_precision(how):
    """A difference of nearby bf16 values is noise, and forward mode through autocast raises."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 1, 3, padding=1))
    x, v = torch.randn(2, 2, 1, 8, 8)
    plain = calculus.total_derivative(net, (x,), (v,), how)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = calculus.total_derivative(net, (x,), (v,), how)
        residual = train_flow_map.lagrangian(lambda x, t, r: net(x) * r[:, None, None, None], lambda x, t: x, x, torch.full((2,), 0.8),
                                             torch.full((2,), 0.4), how, 5e-3)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed)) and residual.dtype == torch.float32
    exact = train_flow_map.lagrangian(lambda x, t, r: net(x) * r[:, None, None, None], lambda x, t: x, x, torch.full((2,), 0.8),
                                      torch.full((2,), 0.4), how, 5e-3)
    assert torch.equal(residual, exact)


def test_two_time_output_through_a_view_keeps_the_second_time():
    class Probe:
        process = RF
        def __call__(self, x, t, cond, *, r=None, to="x0", logits=False):
            return RF.convert(x * r[:, None], x, t, "x0", to)
    from zoo.process import TrigFlow
    seen = View(Probe(), TrigFlow())
    x, t = torch.randn(4, 2, dtype=torch.float64), torch.full((4,), 0.8, dtype=torch.float64)
    a, b = (seen(x, t, {}, r=torch.full((4,), r, dtype=torch.float64)) for r in (0.1, 0.5))
    assert (a - b).abs().max() > 1e-2
