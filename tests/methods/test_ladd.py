"""LADD: heads on the frozen teacher's features, gradients through it, the losses' reference values, GDD-I's frozen layers, and the toy."""
import copy
import math
import sys
from pathlib import Path

import pytest
import torch

from zoo import UserError, backbones, critics, rollout
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
