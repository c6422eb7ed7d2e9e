"""Optimisers and averages that save memory: exact resumption, and the plan's bytes against those that are really held."""
import sys

import pytest
import torch
from safetensors.torch import load_file

import train_dmd
import train_lcm
from zoo import optimizers
from zoo.errors import UserError

QUIET = dict(teacher="toy", batch=16, time_budget=0, sample_every=0, measure_every=0, checkpoint_every=3, export="last")


def checkpoint(run):
    folder = run.out / "checkpoints" / f"step-{run.step:07d}"
    return {f.name: load_file(f) for f in folder.glob("*.safetensors")}


def available(name: str):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    return name


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_resumption_is_exact_and_the_plan_counts_what_is_held(tmp_path, monkeypatch, name):
    import zoo.watch
    monkeypatch.setattr(zoo.watch.Watcher, "finish", lambda self: None)           # no student leaves: two trainings are compared
    options = QUIET | dict(optimizer=available(name), offload_averages=True, lr=1e-3)
    whole = train_dmd.main(train_dmd.Config(output_dir=str(tmp_path / "whole"), steps=6, **options))
    train_dmd.main(train_dmd.Config(output_dir=str(tmp_path / "parts"), steps=3, **options))
    parts = train_dmd.main(train_dmd.Config(output_dir=str(tmp_path / "parts"), steps=6, **options))
    a, b = checkpoint(whole), checkpoint(parts)
    assert a.keys() == b.keys() and all(a[f].keys() == b[f].keys() and all(torch.equal(a[f][k], b[f][k]) for k in a[f]) for f in a)
    held = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    for t in whole.trainees.values():
        planned = whole.estimate.roles[t.name]
        # Not counted per parameter: step counts, and 8-bit code tables, which all parameters share.
        states = [s for p in t.own.values() for k, s in t.optimizer.state[p].items() if torch.is_tensor(s) and s.ndim and not k.startswith("qmap")]
        assert held(states) == planned["optimizer"], t.name
        assert held(t.params.values()) == planned["gradient"]
        assert held(v for _, values in t.averages for v in values.values()) == planned["host_averages"] + planned["averages"]
        assert planned["averages"] == 0 and planned["weights"] == held(t.net.module.parameters())
    assert whole.estimate.roles["student"]["host_averages"] > 0


def test_averages_on_the_cpu_are_the_same_averages(tmp_path, monkeypatch):
    """Also one that is read in every step (LCM's target)."""
    import zoo.watch
    monkeypatch.setattr(zoo.watch.Watcher, "finish", lambda self: None)
    runs = [train_lcm.main(train_lcm.Config(output_dir=str(tmp_path / str(off)), steps=3, offload_averages=off, **QUIET)) for off in (False, True)]
    assert len(runs[0].trainees["student"].averages) == 2
    assert all(v.device.type == "cpu" for _, values in runs[1].trainees["student"].averages for v in values.values())
    a, b = map(checkpoint, runs)
    assert all(torch.equal(a[f][k], b[f][k]) for f in a for k in a[f])


def test_an_average_elsewhere_is_brought_to_the_network_it_is_read_by():
    """Weights on another device than the input are moved for the call; the meta device stands in for one that is not here."""
    from zoo import backbones
    model = backbones.load("toy")
    net = model.make("student")
    moved = []

    class Elsewhere(torch.Tensor):
        def to(self, device):
            moved.append(device)
            return self.as_subclass(torch.Tensor)

    x, t, cond = torch.randn(2, 2), torch.full((2,), 0.5), {"label": torch.tensor([0, 1])}
    doubled = {n: 2 * p.detach() for n, p in net.trainable().items()}
    plain = net.reading(doubled)(x, t, cond)
    assert torch.equal(plain, net.reading({n: v.as_subclass(Elsewhere) for n, v in doubled.items()})(x, t, cond))
    assert moved == [x.device] * len(doubled) and not torch.equal(plain, net(x, t, cond))


def test_a_missing_library_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        train_dmd.main(train_dmd.Config(output_dir=str(tmp_path), optimizer="adamw8bit", **QUIET))


@pytest.mark.parametrize("name", [n for n in optimizers.NAMES])
def test_every_optimiser_moves_a_matrix_towards_its_target(name):
    """Thirty steps of each lower a quadratic by half at least (8-bit states begin at 4096 numbers: this matrix has them)."""
    available(name)
    w = torch.nn.Parameter(torch.zeros(64, 80))
    target = torch.randn(64, 80, generator=torch.Generator().manual_seed(0))
    trainee = type("T", (), {"params": {"w": w}, "own": {"w": w}})()
    step = optimizers.make(name, trainee, w.device, lr=0.05, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(30):
        loss = (w - target).square().mean()
        step.zero_grad()
        loss.backward()
        step.step()
    assert (w - target).square().mean() < 0.5 * target.square().mean()
