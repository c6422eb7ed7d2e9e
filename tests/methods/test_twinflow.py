"""TwinFlow against closed forms: the recursive target, the sign of the rectification, self-guidance, negative time, and the toy."""
import sys
from pathlib import Path

import pytest
import torch

from zoo import backbones, rollout
from zoo.process import RectifiedFlow, view
from zoo.toy import Gaussian, sliced_wasserstein
from zoo.watch import FirstTimeZero

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "train_scripts"))
import train_twinflow as script  # noqa: E402

RF = RectifiedFlow()


def residual(world, t, r, leg, order=2, x=None, swap=False, sign=1):
    """R at the exact average velocity: what the target differs from it by, before the clamp matters."""
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)[:, None] if x is None else x
    t, r = (torch.full((len(x),), v, dtype=torch.float64) for v in (t, r))
    u = (lambda x, t, r: world.average_velocity(x, r, t)) if swap else world.average_velocity
    F, v = world.average_velocity(x, t, r), sign * world(x, t, {}, to="velocity")
    u = u if not swap else (lambda x, t, r: world.flow_map(x, r, t))
    return (F - script.integral_target(F, u, v, x, t, r, order, leg)).abs().max().item()


@pytest.mark.parametrize("order", [1, 2])
def test_recursive_target_at_the_exact_average_velocity(order):
    """Sheet (RCGM): the residual is of the order of the first leg, max .004 at t = .9 and .038 at t = .5 for leg .01, ten times less
    for .001, clamp inactive. It names no Gaussian; N(.5, .5^2) over [-3, 3] gives .0033 and .038."""
    world = Gaussian(0.5, 0.5)
    late, middle = residual(world, 0.9, 0.0, 0.01, order), residual(world, 0.5, 0.0, 0.01, order)
    assert abs(late - 0.004) < 1e-3 and abs(middle - 0.038) < 2e-3
    assert abs(residual(world, 0.5, 0.0, 0.001, order) - middle / 10) < 5e-4
    assert residual(world, 0.5, 0.0, 0.01, order, sign=-1) > 0.9                 # mutation: the first leg the other way
    assert residual(world, 0.5, 0.2, 0.01, order, swap=True) > 0.5               # mutation: a flow map with swapped times for a velocity


def test_the_target_is_detached_and_short_jumps_are_flow_matching():
    world = Gaussian(1.0, 0.7)
    x = torch.randn(64, 1, dtype=torch.float64)
    t = torch.full((64,), 0.5, dtype=torch.float64)
    v = world(x, t, {}, to="velocity")
    F = (v + 0.3).requires_grad_()
    for gap in (0.0, 0.004, 0.01):
        y = script.integral_target(F, lambda x, t, r: 7 * x, v, x, t, t - gap, 2, 0.01)
        assert not y.requires_grad and (y - v).abs().max() < 1e-9
    assert (script.integral_target(F + 5, lambda x, t, r: 7 * x, v, x, t, t, 2, 0.01) - (F + 4)).abs().max() < 1e-9     # clamped


def test_rectification_moves_one_step_samples_towards_the_data():
    """Sheet: with the exact velocities of N(m_f, S) (twin) and N(m, S) (real), x = z - F moves towards m; with m_f = m not at all."""
    t, x = torch.full((4096,), 0.6, dtype=torch.float64), torch.randn(4096, 1, dtype=torch.float64)
    velocity = lambda mean: Gaussian(mean, 0.7)(x, t, {}, to="velocity")
    for mine, goal in ((-0.4, 1.0), (1.5, 1.0), (1.0, 1.0)):
        gap = velocity(mine) - velocity(goal)              # rises x by the same amount, since F falls by it
        F = torch.zeros_like(x, requires_grad=True)
        script.distance(F, (F - gap.clamp(-1, 1)).detach()).mean().backward()
        moved = F.grad.mean().item()                       # descent moves F by -grad, and x = z - F by +grad
        assert (moved > 1e-6) == (goal > mine) and (abs(moved) < 1e-12) == (goal == mine)


def test_distance_has_a_gradient_that_does_not_shrink_with_the_error():
    grads = []
    for error in (1.0, 0.1, 1e-5):
        x = torch.full((1, 4), error, requires_grad=True)
        d = script.distance(x, torch.zeros(1, 4))
        d.sum().backward()
        grads.append(x.grad.norm().item())
    assert abs(grads[0] - grads[1]) < 1e-4 and grads[2] < 0.02 * grads[0]
    x, y = torch.randn(3, 5), torch.randn(3, 5)
    e = (x - y).square().mean(1)
    official = e * (e / 1e-6 + 1) ** -0.5 / 1e-3           # mse (mse / c^2 + 1)^(-1/2) / c
    assert torch.allclose(script.distance(x, y), official, rtol=1e-4)


def test_time_weight_and_self_guidance():
    weight = script.time_weight(torch.tensor([1.0, 0.0]))
    assert abs(weight[0] - 1) < 1e-6 and abs(weight[1] - 4.0777) < 1e-3
    uncond, v, cond = torch.tensor(0.2), torch.tensor(1.0), torch.tensor(1.0)
    for _ in range(200):                                   # an average that learns its own guided target
        cond = script.self_guided(v, cond, uncond, 5.0)
    assert abs(cond - (uncond + 5.0 * (v - uncond))) < 1e-4


def test_negative_time_is_another_branch_that_starts_as_the_teacher():
    """Through the view of a variance-preserving network too: the second time keeps its sign, and positive ones are as before."""
    from zoo.process import VP, View
    seen = {}

    class Probe:
        process = VP(torch.linspace(0.999, 0.0, 1000, dtype=torch.float64))

        def __call__(self, x, t, cond, *, r=None, to="x0", logits=False):
            seen["r"] = r
            return x

    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    probe = View(Probe(), RF)
    for sign in (1, -1):
        probe(torch.zeros(2, 1, dtype=torch.float64), t, {}, r=sign * t)
        assert torch.equal(seen["r"], sign * Probe.process.time(RF.angle(t)))
    probe(torch.zeros(2, 1, dtype=torch.float64), t, {}, r=0 * t)
    assert (seen["r"] == 0).all()
    model = backbones.load("toy")
    net, label = view(model.make("student", two_time=True), RF), {"label": torch.tensor([0, 1])}
    x, t = torch.randn(2, 2), torch.tensor([0.3, 0.7])
    start = view(model.make("plain"), RF)(x, t, label, to="velocity")
    assert all(torch.equal(net(x, t, label, r=r, to="velocity"), start) for r in (t, -t, 0 * t))
    torch.nn.init.normal_(net.module.time_embedding.cond_proj.weight, std=0.1)
    assert (net(x, t, label, r=-t, to="velocity") - net(x, t, label, r=t, to="velocity")).abs().max() > 1e-2


def toy(tmp_path, **flags):
    """Distance of 1-, 2- and 4-step samples to the mixture, before and after: mean over modes, so that shifted modes count."""
    settings = dict(teacher="toy", batch=128, time_budget=0.0, measure_every=0, sample_every=0, checkpoint_every=0)
    run = script.main(script.Config(output_dir=str(tmp_path / "run"), **(settings | flags)))
    truth, label = run.model.mixture.sample(2000, seed=5)
    by_mode = lambda x: sum(sliced_wasserstein(x[label == k], truth[label == k]) for k in range(8)) / 8

    def reach(net):
        out = []
        for stride in (4, 2, 1):
            g = torch.Generator().manual_seed(3)
            draw = lambda: torch.randn(2000, 2, generator=g)
            x = rollout.sample(FirstTimeZero(net), draw(), {"label": label}, torch.tensor([1.0, 0.75, 0.5, 0.25])[::stride], "renoise", draw)
            out.append(round(by_mode(x), 4))
        return out
    return reach(run.model.make("untrained", two_time=True)), reach(run.watcher.net)


def test_toy_converges(tmp_path):
    """Measured with 1, 2, 4 steps: .081 .100 .080 before, .039 .032 .032 after."""
    before, after = toy(tmp_path, steps=500)
    print(before, after)
    assert min(before) > 0.075 and max(after) < 0.05
