"""Health at the level of runs: silent on healthy trainings, each warning fired by a planted failure."""
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "train_scripts"))
import train_dmd  # noqa: E402

from zoo import backbones, health, watch  # noqa: E402

HEALTHY = dict(teacher="toy", steps=160, batch=256, lr=5e-4, critic_lr=1e-3, time_budget=0, sample_every=0, measure_every=40, checkpoint_every=1000)


def warnings(out):
    return [json.loads(line)["warning"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines() if '"warning"' in line]


@pytest.mark.parametrize("options", [{}, {"guidance": 1.0, "gan": 0.01}, {"student_times": (1.0,), "critic_updates": 5}], ids=["default", "gan", "one-step"])
def test_silent_on_healthy_runs(tmp_path, options):
    train_dmd.main(train_dmd.Config(**{**HEALTHY, **options}, output_dir=str(tmp_path / "run")))
    assert warnings(tmp_path / "run") == []


def test_critic_that_does_not_learn_is_lagging(tmp_path):
    train_dmd.main(train_dmd.Config(**{**HEALTHY, "critic_lr": 1e-7, "student_times": (1.0,)}, output_dir=str(tmp_path / "run")))
    assert "critic lagging" in warnings(tmp_path / "run")


class Pictures(backbones.Custom):
    """Four prompts whose teacher is a known point plus noise: samples are made, not trained, so that each failure is exact."""


def watched(tmp_path, student, **how):
    """A Watcher's measurement, three times, on a student given as a function of (x, t, cond)."""
    g = torch.Generator().manual_seed(0)
    targets = torch.tanh(torch.randn(16, 3, 8, 8, generator=g)) * 0.6
    from zoo.process import RectifiedFlow
    class World(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))
        def forward(self, x, timestep, item):
            t = (timestep / 1000).clamp(min=1e-3)[:, None, None, None]
            mean = torch.where((item >= 0)[:, None, None, None], targets[item.clamp(min=0)], torch.zeros(1))
            s2 = 0.3**2
            x0 = mean + (1 - t) * s2 / ((1 - t) ** 2 * s2 + t**2) * (x - (1 - t) * mean)
            return (x - x0) / t
    model = Pictures(World(), {"item": torch.arange(16)}, shape=(3, 8, 8), process=RectifiedFlow(), uncond={"item": torch.tensor([-1])}, guidance=2.0)
    from zoo.run import Run
    run = Run(train_dmd.Config(teacher=model, output_dir=str(tmp_path / "run"), ema=0, time_budget=0), model)
    G = run.train("student", model.make("student"), 1e-3)
    w = run.watch(G, torch.tensor([1.0]), **how)
    w.begin()
    class Student:
        process = model.process
        def __call__(self, x, t, cond, *, to="x0"):
            return student(x, cond["item"], targets) + 1e-4 * run.step         # it moves
    w.net = Student()
    for step in (100, 150, 200):
        run.step = step
        w.measure({1: w.sample(1, w.n, w.examples)})
    return warnings(tmp_path / "run")


def good(x, item, targets):
    """What guidance 2 gives in this world: the conditional mean counted twice, with the data's spread."""
    return (2 * targets[item] * 0.9 + 0.3 * x).clamp(-1.2, 1.2)


def test_silent_on_a_good_student(tmp_path):
    assert watched(tmp_path, good) == []


@pytest.mark.parametrize("name,student", [
    ("mode collapse", lambda x, item, targets: good(0 * x, item, targets) + 0.001 * x),
    ("oversaturation", lambda x, item, targets: 5 * good(x, item, targets)),
    ("wrong guidance convention", lambda x, item, targets: -2 * targets[item] * 0.9 + 0.3 * x),     # cond and uncond swapped
])
def test_each_warning_fires_on_its_planted_failure(tmp_path, name, student):
    found = watched(tmp_path, student)
    assert name in found, found
    assert name in health.REMEDIES


def missing(x, item, targets):
    """What this world gives without guidance."""
    return targets[item] * 0.9 + 0.3 * x


def test_missing_guidance_is_seen_where_the_guided_teacher_is_the_target(tmp_path):
    assert watched(tmp_path / "a", missing) == ["wrong guidance convention"]
    rows = [json.loads(line) for line in (tmp_path / "a" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(r["measure/guidance@1"] - 1) < 0.3 for r in rows if "measure/score" in r)
    assert watched(tmp_path / "b", missing, follows_teacher=False) == []         # a target of its own, such as data


def test_conditional_distance_is_unbiased_and_orders():
    g = torch.Generator().manual_seed(0)
    draw = lambda mean, n=400: mean + 0.5 * torch.randn(n, 4, 16, generator=g)
    same, near, far = (watch.conditional_kid(draw(0.0), draw(m)) for m in (0.0, 0.3, 0.9))
    assert same.low < 0 < same.high and 0 < near.value < far.value
