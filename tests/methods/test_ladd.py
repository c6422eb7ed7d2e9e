"""LADD: heads on the frozen teacher's features, gradients through it, the losses' reference values, GDD-I's frozen layers, and the toy."""
import copy
import math
import sys
from pathlib import Path

import pytest
import torch

from zoo import UserError, backbones, critics, rollout
from zoo.process import RectifiedFlow
from zoo.toy import sliced_wasserstein

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent / "train_scripts")]
import train_ladd as script  # noqa: E402
from tiny import tiny_pixel, tiny_sd  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("ladd")
    (root / "prompts.txt").write_text("a red heart\na blue star\n")
    tiny_sd(root / "sd")
    tiny_pixel(root / "pixel")
    fitted = backbones.load("toy")
    return lambda family: copy.deepcopy(fitted) if family == "toy" else backbones.load(str(root / family), str(root / "prompts.txt") if family == "sd" else "")


def some(model):
    cond = model.batches().get(torch.tensor([0, 1]))["cond"]
    return torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.6]), cond


@pytest.mark.parametrize("family,depths", [("toy", 2), ("pixel", 3), ("sd", 3)])
@pytest.mark.parametrize("lora", [0, 4])
def test_heads_read_the_frozen_teacher_and_own_only_themselves(tiny, family, depths, lora):
    model = tiny(family)
    student = model.make("student", lora=lora)
    before = {n: p.clone() for n, p in model.module.named_parameters() if "lora" not in n}
    D = model.discriminator()
    assert D.trainable() and all(n.startswith("head.each.") for n in D.trainable())
    x, t, cond = some(model)
    logits = D.judge(x, t, cond)
    assert len(logits) == depths and all(d.ndim == 2 and len(d) == 2 for d in logits)
    for p in student.trainable().values():                    # whatever the student became, the features are the teacher's
        p.data += 0.1
    assert all(torch.equal(a, b) for a, b in zip(logits, D.judge(x, t, cond)))
    x.requires_grad_()
    for p in D.trainable().values():                          # as in the student's turn
        p.requires_grad_(False)
    model.module.zero_grad()
    script.adversarial_loss(critics.hinge_generator, D.judge(x, t, cond)).backward()
    assert x.grad.abs().max() > 0                             # through the teacher to the sample
    assert all(p.grad is None for p in model.module.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.module.named_parameters() if n in before)


def test_the_pass_ends_at_the_last_tap(tiny):
    model = tiny("pixel")
    D, ran = model.discriminator(), []
    model.module.up_blocks[0].register_forward_hook(lambda *_: ran.append(1))
    x, t, cond = some(model)
    D.judge(x, t, cond)
    assert not ran
    model.teacher(x, t, cond)
    assert ran                                                # and the teacher itself is whole again


def test_features_are_those_of_a_full_pass(tiny):
    model = tiny("sd")
    D, seen = model.discriminator(), []
    x, t, cond = some(model)
    logits = D.judge(x, t, cond)
    for name in model.taps:
        model.module.get_submodule(name).register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    model.teacher(x, t, cond)
    assert all(torch.equal(a, b) for a, b in zip(logits, D.head(seen)))


def test_reference_values():
    """Logits 0: hinge 2, softplus 2 log 2. Generated = real at the same (t, eps): equal logits, nothing to tell apart (sheet)."""
    zeros = [torch.zeros(4, 9), torch.zeros(4, 4)]
    assert script.adversarial_loss(critics.hinge_discriminator, zeros, zeros) == 2
    assert abs(script.adversarial_loss(critics.discriminator, zeros, zeros) - 2 * math.log(2)) < 1e-6
    assert script.adversarial_loss(critics.hinge_generator, [torch.ones(2, 3), 3 * torch.ones(2, 5)]) == -2      # depths count alike
    assert script.approximate_r1(zeros, zeros) == 0 and script.approximate_r1(zeros, [z + 2 for z in zeros]) == 4
    high, low = [torch.full((4, 9), 5.0)], [torch.full((4, 9), -5.0)]
    for critic, student in script.LOSSES.values():
        assert script.adversarial_loss(critic, high, low) < 0.1 < script.adversarial_loss(critic, low, high)     # positive = real
        assert script.adversarial_loss(student, high) < script.adversarial_loss(student, low)


# ------------------------------------------------------------------------------------------------------------- closed forms, float64
RF = RectifiedFlow()
REAL, MINE = (1.0, 0.7), (-0.4, 0.5)                          # mean and std of the data and of a student, in one dimension


def points(law, t, n=8192):
    """x_t of N(mean, std^2) noised to t on the flow path: n points [n, 1] of equal mass at its quantiles, and its mean and variance."""
    mean, var = (1 - t) * law[0], ((1 - t) * law[1]) ** 2 + t**2
    z = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    return mean + var**0.5 * z[:, None], mean, var


def log_ratio(t, real, mine):
    """(c0, c1, c2) of log p_t / q_t = c0 + c1 x + c2 x^2."""
    (_, mp, vp), (_, mq, vq) = points(real, t), points(mine, t)
    return (mq**2 / vq - mp**2 / vp + math.log(vq / vp)) / 2, mp / vp - mq / vq, (1 / vq - 1 / vp) / 2


def fitted(objective):
    """Coefficients of the quadratic logit that minimises `objective(logit)`."""
    c = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    logit = lambda x: c[0] + c[1] * x + c[2] * x**2
    optimiser = torch.optim.LBFGS([c], max_iter=300, tolerance_grad=1e-11, tolerance_change=1e-14, line_search_fn="strong_wolfe")
    def closure():
        optimiser.zero_grad()
        loss = objective(logit)
        loss.backward()
        return loss
    optimiser.step(closure)
    return c.detach(), objective(logit).item()


@pytest.mark.parametrize("real,mine,t", [((1, 1), (-1, 1), 0.0), (REAL, MINE, 0.2), (REAL, MINE, 0.6)])
def test_the_best_discriminator_is_the_log_ratio_of_the_noised_laws(real, mine, t):
    """Sheet, GDD (its 1-D optimum) and 0.7: l* = log p/q, 2x for N(1, 1) against N(-1, 1). Mutation: the sides swapped learn its negative."""
    y, x = points(real, t)[0], points(mine, t)[0]
    expected = torch.tensor(log_ratio(t, real, mine), dtype=torch.float64)
    best, loss = fitted(lambda logit: script.adversarial_loss(critics.discriminator, [logit(y)], [logit(x)]))
    assert (best - expected).abs().max() < 2e-3 * max(1, expected.abs().max()) and loss < 2 * math.log(2) - 1e-3
    if t == 0:
        assert (best - torch.tensor([0.0, 2.0, 0.0])).abs().max() < 2e-3
    swapped, _ = fitted(lambda logit: script.adversarial_loss(critics.discriminator, [logit(x)], [logit(y)]))
    assert (swapped + expected).abs().max() < 2e-3 * max(1, expected.abs().max())


def test_against_the_data_themselves_the_best_discriminator_knows_nothing():
    """Sheet, LADD: where x is real, equal logits, 2 log 2 (softplus) and 2 (hinge) are the least any discriminator pays."""
    y = points(REAL, 0.4)[0]
    for (critic, _), least in zip((script.LOSSES["softplus"], script.LOSSES["hinge"]), (2 * math.log(2), 2.0)):
        best, loss = fitted(lambda logit: script.adversarial_loss(critic, [logit(y)], [logit(y)]))
        assert best.abs().max() < 1e-6 and abs(loss - least) < 1e-9
        assert script.adversarial_loss(critic, [2 * y], [2 * y]) > least + 0.1


@pytest.mark.parametrize("name", ["softplus", "hinge"])
def test_a_student_against_the_best_discriminator_becomes_the_data(name):
    """(1.000, .700) from (-.4, .5), a linear student, the log ratio as discriminator, t ~ U(.1, .9). Mutation: a student that pays for being
    taken for real runs away."""
    z, eps, u = torch.quasirandom.SobolEngine(3, scramble=True, seed=0).draw(2048, dtype=torch.float64).clamp(1e-9, 1 - 1e-9).unbind(1)
    z, eps, t = torch.special.ndtri(z)[:, None], torch.special.ndtri(eps)[:, None], (0.1 + 0.8 * u)[:, None]
    def trained(steps, sign):
        m, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in MINE)
        for _ in range(steps):
            (mp, vp), (mq, vq) = (((1 - t) * a, ((1 - t) * b) ** 2 + t**2) for a, b in (REAL, (m.detach(), s.detach())))
            x = RF.noise(m + s * z, eps, t[:, 0])
            logit = ((x - mq) ** 2 / vq - (x - mp) ** 2 / vp + (vq / vp).log()) / 2
            (sign * script.adversarial_loss(script.LOSSES[name][1], [logit])).backward()
            with torch.no_grad():
                for p in (m, s):
                    p -= 0.3 * p.grad.clamp(-1, 1)
                    p.grad = None
        return m.item(), s.item()
    mean, std = trained(250, 1)
    assert abs(mean - 1) < 0.01 and abs(std - 0.7) < 0.01
    assert trained(20, -1)[0] < -1


def test_approximate_r1_is_the_gradients_square_and_holds_the_discriminator_back():
    """E |l(y + a n) - l(y)|^2 = a^2 l'(y)^2 + 3 a^4 l''^2 / 4 for a quadratic logit; the slope of the best linear one meets its closed
    condition, below 2. Mutation: subtracted, the term drives the slope up."""
    n = points((0.0, 1.0), 0.0)[0]
    a, c1, c2, y = 0.3, 1.5, -0.4, 0.8
    logit = lambda x: c1 * x + c2 * x**2
    exact = a**2 * (c1 + 2 * c2 * y) ** 2 + 3 * a**4 * c2**2
    assert abs(script.approximate_r1([logit(y + 0 * n)], [logit(y + a * n)]).item() - exact) < 1e-3 * exact
    (y, *_), (x, *_) = points((1, 1), 0.0), points((-1, 1), 0.0)
    moved = a * n[torch.randperm(len(n), generator=torch.Generator().manual_seed(0))]
    def slope(gamma):
        w = torch.ones((), dtype=torch.float64, requires_grad=True)
        for _ in range(400):
            loss = script.adversarial_loss(critics.discriminator, [w * y], [w * x]) + gamma * script.approximate_r1([w * y], [w * (y + moved)])
            w = (w - 0.5 * torch.autograd.grad(loss, w)[0]).detach().requires_grad_()
        return w.item()
    w = slope(1.0)
    left = -(torch.sigmoid(-w * y) * y).mean() + (torch.sigmoid(w * x) * x).mean() + 2 * a**2 * w
    assert left.abs() < 1e-3 and 0.5 < w < 1.9
    assert abs(slope(0.0) - 2) < 2e-2 and slope(-0.05) > 2.1


def test_the_students_gradient_is_exact_through_the_frozen_teacher(tiny, monkeypatch):
    """Sheet: the teacher gets no gradient and passes it to x, the same one to a generated and to a real sample at the same (t, eps): against
    differences of the loss, in float64. Mutation: other noise is another gradient."""
    model = tiny("pixel")
    D = model.discriminator(told=True)
    model.module.double(), D.head.double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)        # the heads read their features as float32
    g = torch.Generator().manual_seed(0)
    y, eps, other, d = (torch.randn(2, *model.shape, generator=g, dtype=torch.float64) for _ in range(4))
    t, s = torch.tensor([0.3, 0.6], dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64)
    cond = model.batches().get(torch.tensor([0, 1]))["cond"]
    loss = lambda x, eps=eps: script.adversarial_loss(critics.generator, D.judge(model.process.noise(x, eps, t), t, cond, s))
    def gradient(x, *noise):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(loss(x, *noise), x)[0]
    slope, h = (gradient(y) * d).sum(), 1e-5
    differences = (loss(y + h * d) - loss(y - h * d)) / (2 * h)
    assert abs(slope) > 1e-6 and abs(slope - differences) < 1e-6 * abs(slope)
    assert torch.equal(gradient(y), gradient(y.clone())) and all(p.grad is None for p in model.module.parameters())
    assert abs((gradient(y, other) * d).sum() - differences) > 1e-3 * abs(slope)


def test_times_are_drawn_with_their_weights():
    u = (torch.arange(1000) + 0.5) / 1000
    counts = lambda weights: script.chosen(u, weights).bincount(minlength=4).tolist()
    assert counts((0.7, 0.1, 0.1, 0.1)) == [700, 100, 100, 100]
    assert counts((0, 0, 1, 1)) == [0, 0, 500, 500]


@pytest.mark.parametrize("lora", [0, 4])
def test_frozen_convolutions(tiny, lora):
    model = tiny("sd")
    full, innate = model.make("a", lora=lora), model.make("b", lora=lora, frozen=script.CONVOLUTIONS)
    left = {n.replace(".b.", ".a.") for n in innate.trainable()}
    frozen = set(full.trainable()) - left
    assert any("conv1" in n for n in frozen) and not any("conv1" in n or "conv2" in n or "to_out" in n for n in left)
    if not lora:                                              # norms, time layers, attention queries train on
        assert all(any(part in n for n in left) for part in ("norm1", "time_emb_proj", "to_q", "time_embedding", "conv_out"))
    x, t, cond = some(model)
    innate(x, t, cond).square().mean().backward()
    names = dict(innate.module.named_parameters())
    assert all(names[n.replace(".a.", ".b.")].grad is None for n in frozen)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in innate.trainable().values())


def test_nothing_to_freeze_is_an_error(tiny):
    with pytest.raises(UserError, match="none of the layers"):
        tiny("toy").make("student", frozen=script.CONVOLUTIONS)


def test_one_step_on_synthetic_data_with_frozen_convolutions(tiny, tmp_path):
    """GDD-I's setting without any image: the convolutions leave the run as they came."""
    model = tiny("pixel")
    flags = dict(teacher=model, batch=4, steps=2, time_budget=0.0, measure_every=0, sample_every=0, mixed_precision="no", easy_steps=1,
                 student_times=(1.0,), freeze_convolutions=True, synthetic=6, synthetic_steps=2, lr=1e-2, output_dir=str(tmp_path / "run"))
    run = script.main(script.Config(**flags))
    assert list((tmp_path / "run/pairs").glob("*.safetensors")) and run.watcher.contract.steps == [1]
    teacher, student = dict(model.module.named_parameters()), dict(run.trainees["student"].net.module.named_parameters())
    same = {n for n in teacher if torch.equal(teacher[n], student[n])}
    assert {n for n in teacher if "conv1" in n or "samplers" in n} <= same and not any("norm1" in n and "up_blocks" in n for n in same)
    with pytest.raises(UserError, match="time_weights"):
        script.main(script.Config(**(flags | dict(output_dir=str(tmp_path / "other"), student_times=(1.0, 0.5), time_weights=(1.0,)))))


def toy(teacher, folder, **flags):
    """Distance of 1-, 2- and 4-step samples to the mixture, before and after: mean over modes, so that shifted modes count."""
    settings = dict(teacher=teacher, batch=128, time_budget=0.0, measure_every=0, sample_every=0, checkpoint_every=0)
    run = script.main(script.Config(output_dir=str(folder), **(settings | flags)))
    truth, label = run.model.mixture.sample(2000, seed=5)
    by_mode = lambda x: sum(sliced_wasserstein(x[label == k], truth[label == k]) for k in range(8)) / 8

    def reach(net):
        out = []
        for _, knots in sorted(run.watcher.trained.items()):
            g = torch.Generator().manual_seed(3)
            draw = lambda: torch.randn(2000, 2, generator=g)
            x = rollout.sample(net, draw(), {"label": label}, knots, "renoise", draw)
            out.append(round(by_mode(x), 4))
        return out
    return reach(run.model.make("untrained")), reach(run.watcher.net)


@pytest.mark.slow
def test_toy_converges_where_the_heads_are_told_the_student_time(tiny, tmp_path):
    """Not told, they see the samples of all student times as one set, and only the mixture is matched: later times drift to make up
    for the first. Low noise (mean = -1) shows the modes' width. Measured with 1, 2, 4 steps: .081 .100 .080 before, .041 .028 .045 told,
    .059 .087 .128 untold."""
    before, told = toy(tiny("toy"), tmp_path / "told", steps=500, mean=-1.0)
    _, untold = toy(tiny("toy"), tmp_path / "untold", steps=500, mean=-1.0, tell_critic=False)
    print(before, told, untold)
    assert min(before) > 0.075 and max(told) < 0.06 and untold[-1] > 0.075
