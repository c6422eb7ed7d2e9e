"""TSCD and PCM against exact jumps: DDIM chains on the grid and the flow map of a Gaussian."""
import sys
from pathlib import Path

import pytest
import torch

from zoo import UserError, backbones, rollout
from zoo.process import RectifiedFlow
from zoo.toy import Gaussian, sliced_wasserstein

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "train_scripts"))
import train_tscd as script  # noqa: E402

RF, WORLD, N = RectifiedFlow(), Gaussian(1.0, 0.7), 40


class Jumper:
    """A net whose DDIM step from t lands exactly where `land(x, t, s)` says, s = to(t): the student that meets its targets."""
    process = RF

    def __init__(self, land, to):
        self.land, self.to = land, to

    def __call__(self, x, t, cond, *, to="x0"):
        s = self.to(t)
        y = self.land(x, t, s)
        (a, b), (c, d) = ([v[:, None] for v in RF.coeffs(time)[:2]] for time in (t, s))
        x0, eps = (d * x - b * y) / (a * d - b * c), (a * y - c * x) / (a * d - b * c)
        return RF.read(x0, eps, t, to)


def chain(x, t, s):
    """The teacher's DDIM steps over the grid, from t to s [B]."""
    for k in range(N, 0, -1):
        here, there = torch.full_like(t, k / N), torch.full_like(t, (k - 1) / N)
        step = RF.step(*RF.pair(WORLD(x, here, {}, to="v"), x, here, "v"), there)
        x = torch.where(((t > here - 1e-9) & (s < there + 1e-9))[:, None], step, x)
    return x


def draws(segments, phased, n=512):
    g = torch.Generator().manual_seed(0)
    k, r, s, top = script.grid_times(torch.randint(N, (n,), generator=g), torch.rand(n, generator=g), N, segments, phased)
    t, r, s, top = (v.double() / N for v in (k, r, s, top))
    eps = torch.randn(n, 1, generator=g, dtype=torch.float64)
    return RF.noise(1 + 0.7 * torch.randn(n, 1, generator=g, dtype=torch.float64), eps, t), t, r, s, top


def residual(student, real, x, t, r, s):
    return (script.jump(student, x, t, s, {}) - script.segment_target(student, real, x, t, r, s, {}, {}, 1)).abs().max().item()


@pytest.mark.parametrize("segments", [1, 4, 8])
def test_phased_loss_is_zero_at_the_ddim_chain_to_the_edge_and_nowhere_near(segments):
    x, t, r, s, _ = draws(segments, phased=True)
    edge = lambda t: ((t * N - 0.5).floor() // (N // segments)) * (N // segments) / N      # the lower edge of the phase t is in
    assert torch.equal(edge(t), s)
    assert residual(Jumper(chain, edge), WORLD, x, t, r, s) < 1e-12
    assert residual(WORLD, WORLD, x, t, r, s) > 1e-3                        # the teacher's own long step
    assert residual(Jumper(chain, lambda t: edge(t) / 2), WORLD, x, t, r, s) > 1e-3 or segments == 1       # another edge
    class Flipped:                                                          # the teacher's sign
        process = RF
        def __call__(self, x, t, cond, *, to):
            return -WORLD(x, t, cond, to=to)
    assert residual(Jumper(chain, edge), Flipped(), x, t, r, s) > 1e-2


def test_deterministic_sampling_in_k_steps_is_the_whole_chain():
    """Jumps from edge to edge compose (semigroup): k steps of the phased student are the teacher's N steps, to rounding."""
    z = torch.randn(256, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    full = chain(z, torch.ones(256).double(), torch.zeros(256).double())
    for k in (1, 4, 8):
        student = Jumper(chain, lambda t: t - 1 / k)
        assert (rollout.sample(student, z, {}, 1 - torch.arange(k).double() / k, "ode") - full).abs().max() < 1e-12
    renoised = rollout.sample(Jumper(chain, lambda t: t - 0.25), z, {}, 1 - torch.arange(4).double() / 4, "renoise", lambda: torch.randn_like(z))
    assert (renoised - full).abs().max() > 0.1                             # and not under another rule


@pytest.mark.parametrize("segments", [1, 2, 8])
def test_jumps_to_any_time_of_the_segment_match_the_closed_form(segments):
    """With the exact flow map as student and a teacher that is exact over one skip, every target s is met (X is a semigroup)."""
    x, t, r, s, _ = draws(segments, phased=False)
    exact = Jumper(WORLD.flow_map, lambda t: s)
    real = Jumper(WORLD.flow_map, lambda t: t - 1 / N)
    assert residual(exact, real, x, t, r, s) < 1e-12
    assert (script.jump(exact, x, t, s, {}) - WORLD.flow_map(x, t, s)).abs().max() < 1e-12
    assert residual(Jumper(WORLD.flow_map, lambda t: s / 2), real, x, t, r, s) > 1e-3       # a student made for other targets


def test_one_ddim_skip_is_the_flow_map_to_second_order():
    """The teacher's skip is DDIM and not the flow: an error of O(1/N^2), a quarter per doubling of the grid."""
    t = torch.full((64,), 0.5).double()
    x = RF.noise(*torch.randn(2, 64, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64), t)
    errors = [(script.jump(WORLD, x, t, t - 1 / n, {}) - WORLD.flow_map(x, t, t - 1 / n)).abs().mean().item() for n in (20, 40, 80)]
    assert 3.5 < errors[0] / errors[1] < 4.5 and 3.5 < errors[1] / errors[2] < 4.5


def test_the_target_is_detached_and_ends_at_the_sample_itself():
    x, t, r, _, _ = draws(1, False)
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    class Net:
        process = RF
        def __call__(self, x, t, cond, *, to):
            return scale * 100 * x
    assert not script.segment_target(Net(), WORLD, x, t, r, 0 * r, {}, {}, 1).requires_grad
    y = script.segment_target(Net(), WORLD, x, t, r, r, {}, {}, 1)          # s = r: X-(x, r -> r) = x, whatever the net says
    assert torch.equal(y, script.jump(WORLD, x, t, r, {}))


def test_stages_and_segments():
    assert [script.segments_at(step, 8, 1, 100) for step in (0, 99, 100, 200, 300, 10**6)] == [8, 8, 4, 2, 1, 1]
    assert script.segments_at(500, 8, 4, 100) == 4 and script.segments_at(500, 4, 4, 100) == 4
    g = torch.Generator().manual_seed(0)
    i, u = torch.randint(N, (20_000,), generator=g), torch.rand(20_000, generator=g)
    for segments in (8, 4, 2, 1):
        size = N // segments
        k, r, s, top = script.grid_times(i, u, N, segments, False)
        edge = script.grid_times(i, u, N, segments, True)[2]
        assert torch.equal(r, k - 1) and (s >= edge).all() and (s <= r).all() and torch.equal(top, edge + size)
        assert ((edge % size == 0) & (k > edge) & (k <= top)).all()
        last = s[k == top] - edge[k == top]                                 # uniform over all `size` targets
        assert (torch.bincount(last, minlength=size) / len(last) - 1 / size).abs().max() < 0.04


@pytest.mark.parametrize("s,g", [(0.0, 0.3), (0.25, 0.4), (0.5, 0.95)])
def test_noising_for_the_discriminator_is_the_exact_transition(s, g):
    """Flow path: (1 - g)/(1 - s) x_s + sqrt(g^2 - ((1 - g)/(1 - s))^2 s^2) z keeps the marginal (the official variance does not)."""
    n = 400_000
    gen = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(n, 1, generator=gen, dtype=torch.float64)
    s, g = (torch.full((n,), v, dtype=torch.float64) for v in (s, g))
    x = script.noised(RF, RF.noise(1 + 0.7 * draw(), draw(), s), s, g, draw())
    var = ((1 - g) ** 2 * 0.49 + g**2)[0].item()
    assert abs(x.mean() - (1 - g[0])) < 5e-3 and abs(x.var() - var) < 5e-3 * max(1, var)
    official = ((1 - g[0]) / (1 - s[0])) ** 2 * ((1 - s[0]) ** 2 * 0.49 + s[0] ** 2) + ((g[0] - s[0]) / (1 - s[0])) ** 2
    assert abs(official - var) > 0.02 or s[0] == 0


# ------------------------------------------------------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def model():
    return backbones.load("toy")


def quick(tmp_path, **kw):
    return script.Config(**dict(dict(output_dir=str(tmp_path / "run"), batch=256, lr=1e-3, ema=0.99, time_budget=0, measure_every=0,
                                     sample_every=0, checkpoint_every=0, export="last"), **kw))


def distances(net, model, counts, n=4096):
    y, label = model.mixture.sample(n, seed=99)
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(5))
    return {k: sliced_wasserstein(rollout.sample(net, z, {"label": label}, 1 - torch.arange(k) / k, "ode"), y) for k in counts}


def test_stages_converge_on_the_toy(tmp_path, model):
    before = distances(model.make("student"), model, (4, 2))
    run = script.main(quick(tmp_path, teacher=model, steps=500, stage_steps=100))
    assert sorted(run.watcher.contract.knots) == [1, 2, 4] and run.watcher.contract.scheduler == "DDIMScheduler"
    after = distances(run.watcher.net, model, (4, 2))
    assert before[4] > 0.055 and before[2] > 0.07
    assert after[4] < 0.025 and after[2] < 0.055


def test_phases_converge_on_the_toy_and_serve_their_number_of_steps_only(tmp_path, model):
    before = distances(model.make("student"), model, (4,))[4]
    run = script.main(quick(tmp_path, teacher=model, steps=250, phases=4, huber_c=1e-3))
    assert list(run.watcher.contract.knots) == [4]
    assert before > 0.055 and distances(run.watcher.net, model, (4,))[4] < 0.02


@pytest.mark.slow
def test_discriminator_trains_beside_the_student(tmp_path, model):
    run = script.main(quick(tmp_path, teacher=model, steps=3, batch=32, gan=0.1, log_every=1))
    assert run.trainees["critic"].updates == run.trainees["student"].updates == 3
    with pytest.raises(UserError, match="does not serve"):
        script.main(quick(tmp_path / "other", teacher=model, grid=30))
