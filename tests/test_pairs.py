"""Stored pairs: the same bits however often the making was killed and however many ranks shared it; endpoints of the guided ODE."""
import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny import tiny_pixel, tiny_sd  # noqa: E402

from zoo import UserError, backbones, losses, metrics, rollout  # noqa: E402
from zoo.backbones.base import Source  # noqa: E402
from zoo.data import pairs  # noqa: E402
from zoo.metrics import efflite0  # noqa: E402
from zoo.toy import ring  # noqa: E402

WORLD = ring(4)


class Counted:
    """The closed-form teacher, counting its calls; it may end the process at one of them."""

    def __init__(self, kill_at=0):
        self.process, self.calls, self.kill_at = WORLD.process, 0, kill_at

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return WORLD(*args, **kwargs)


def a_run(out, rank=0, world=1, wait=lambda: None, dry_run=False, seed=0):
    label = torch.arange(10) % 4
    items = Source(10, lambda i: {"cond": {"label": label[i]}, "uncond": {"label": torch.full_like(i, 4)}})
    return SimpleNamespace(out=Path(out), rank=rank, world=world, device="cpu", cfg=SimpleNamespace(seed=seed, dry_run=dry_run),
                           model=SimpleNamespace(batches=lambda: items, shape=(2,), name="ring", module=torch.nn.Identity()),
                           accelerator=SimpleNamespace(autocast=contextlib.nullcontext, wait_for_everyone=wait))


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(pairs, "SHARD", 8)
    monkeypatch.setattr(pairs, "CHUNK", 4)


def everything(source):
    fields = source.get(torch.arange(len(source)))
    return {"z": fields["z"], "x0": fields["x0"], "label": fields["cond"]["label"], "null": fields["uncond"]["label"]}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def make(out, kill_at=0, n=30, **options):
    net = Counted(kill_at)
    return pairs.stored(a_run(out, **options), net, n, steps=3, guidance=2.0), net


def test_count_conditions_and_guided_endpoints(tmp_path):
    source, net = make(tmp_path)
    assert len(source) == 30 and len(list((tmp_path / "pairs").glob("*.safetensors"))) == 4
    got = everything(source)
    assert got["z"].shape == got["x0"].shape == (30, 2) and (got["null"] == 4).all()
    assert torch.bincount(got["label"], minlength=4).tolist() == [9, 9, 6, 6]          # every item three times
    knots = torch.tensor([1, 2 / 3, 1 / 3], dtype=torch.float64)
    cond, uncond = {"label": got["label"]}, {"label": got["null"]}
    expected = rollout.sample(WORLD, got["z"], cond, knots, "ode", uncond=uncond, guidance=2.0)
    assert torch.allclose(got["x0"], expected, atol=1e-5)
    plain = rollout.sample(WORLD, got["z"], cond, knots, "ode")
    assert not torch.allclose(got["x0"], plain, atol=1e-2)                              # the guidance was applied
    picked = source.get(torch.tensor([29, 3, 3]))
    assert torch.equal(picked["z"], got["z"][[29, 3, 3]]) and torch.equal(picked["x0"], got["x0"][[29, 3, 3]])
    assert got["z"].unique().numel() == 60 and abs(pairs.noise(0, torch.arange(2000), (4,)).std() - 1) < 0.03
    assert not torch.equal(pairs.noise(0, torch.arange(3), (2,)), pairs.noise(1, torch.arange(3), (2,)))


def killed(out):
    torch.set_num_threads(1)
    make(out, kill_at=15)


def test_killed_half_way_the_same_command_gives_the_same_bits_and_repeats_no_file(tmp_path):
    whole, net = make(tmp_path / "whole")
    child = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path / "killed",))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    done = list((tmp_path / "killed" / "pairs").glob("*.safetensors"))
    assert len(done) == 2                              # two files of two chunks of three calls, dead in the third file
    stamps = {p: p.stat().st_mtime_ns for p in done}
    resumed, again = make(tmp_path / "killed")
    assert same(everything(whole), everything(resumed)) and again.calls == net.calls - 12
    assert all(p.stat().st_mtime_ns == stamps[p] for p in done)
    assert make(tmp_path / "killed")[1].calls == 0


def test_ranks_share_the_making_and_see_the_same_pairs(tmp_path):
    whole, net = make(tmp_path / "one")
    barrier, made = threading.Barrier(2), {}
    def rank(i):
        made[i] = make(tmp_path / "two", rank=i, world=2, wait=barrier.wait)
    threads = [threading.Thread(target=rank, args=(i,)) for i in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(same(everything(whole), everything(source)) for source, _ in made.values())
    assert sum(n.calls for _, n in made.values()) == net.calls and all(n.calls > 0 for _, n in made.values())


def test_a_dry_run_writes_nothing_and_mistakes_are_said(tmp_path, monkeypatch):
    source, net = make(tmp_path / "dry", dry_run=True)
    assert len(source) == 30 and net.calls == 0 and not (tmp_path / "dry").exists()
    with pytest.raises(UserError, match="at least 1"):
        make(tmp_path, n=0)
    import zoo.run
    def full(tensors, path):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(zoo.run, "save_tensors", full)
    with pytest.raises(UserError, match="No space left.*store fewer"):
        make(tmp_path / "full")


# ------------------------------------------------------------------------------------------------------------- distances
def test_huber_is_a_norm_far_out_and_a_square_near():
    x, e = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.randn(3, 4, 8, 8, dtype=torch.float64)
    n, c = 256, 0.00054 * 256
    norm = e.flatten(1).norm(dim=1)
    assert torch.allclose(losses.huber(x, x + 100 * e).double(), (100 * norm - c) / n, rtol=1e-3)
    assert torch.allclose(losses.huber(x, x + 0.01 / norm[:, None, None, None] * e).double(), torch.full((3,), 0.01**2 / (2 * c * n)).double(), rtol=2e-2)
    assert torch.equal(losses.huber(x, x), torch.zeros(3))


@pytest.mark.skipif(not efflite0.available(), reason="needs fewstep[metrics]")
@pytest.mark.parametrize("family,make_teacher", [("sd", tiny_sd), ("pixel", tiny_pixel)])
def test_perceptual_distance_has_a_gradient_through_the_decoder(tmp_path, family, make_teacher, capsys):
    model = backbones.load(str(make_teacher(tmp_path / family)))
    d = pairs.distance(model, "perceptual")
    assert "perceptual distance: perceptual_efflite0" in capsys.readouterr().err
    y = 0.3 * torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    x = (y + 0.3 * torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    far = d(x, y)
    far.sum().backward()
    assert far.shape == (2,) and x.grad.abs().max() > 0
    with torch.no_grad():
        assert (d(x - 0.05 * x.grad / x.grad.norm(), y) < far).all() and d(y, y).abs().max() < 1e-9


def test_perceptual_distance_refuses_what_it_cannot_see(monkeypatch):
    with pytest.raises(UserError, match="vectors"):
        pairs.distance(SimpleNamespace(shape=(2,), name="toy"), "perceptual")
    monkeypatch.setattr(efflite0, "available", lambda: False)
    with pytest.raises(UserError, match=r"pip install fewstep\[metrics\]"):
        pairs.distance(SimpleNamespace(shape=(1, 8, 8), name="x"), "perceptual")


def test_pairs_of_a_stream_are_read_forwards(tmp_path, monkeypatch):
    """A stream goes to a row by reading up to it: pairs in a shuffled order would read it anew for every batch."""
    from zoo.data.streams import Stream
    opened, label = [], lambda rows: torch.tensor([r["label"] for r in rows])

    def rows():
        opened.append(1)
        return iter([{"label": i % 4} for i in range(40)])
    stream = Stream("list", [rows], window=8)
    get = lambda index: {"cond": {"label": label(stream.rows(index.tolist()))}, "uncond": {"label": torch.full_like(index, 4)}}
    run = a_run(tmp_path)
    run.model.batches = lambda: Source(2**31, get, lambda numbers, seed, batch: stream.order(numbers, seed))
    source = pairs.stored(run, Counted(), 32, 2)
    whole, made = everything(source), len(opened)
    order = source.order(torch.arange(64), 0, 8)
    assert sorted(order[:32].tolist()) == list(range(32)) == sorted(order[32:].tolist())
    for part in order.split(8):
        got = source.get(part)
        assert torch.equal(got["z"], whole["z"][part]) and torch.equal(got["cond"]["label"], whole["label"][part])
    assert len(opened) - made <= 2                              # once an epoch


@pytest.mark.skipif(not efflite0.available(), reason="needs fewstep[metrics]")
def test_a_run_says_which_perceptual_distance_it_took(tmp_path, monkeypatch):
    import train_dmd_pairs as script
    cfg = script.Config(teacher=str(tiny_pixel(tmp_path / "pixel")), metric="perceptual", pairs=8, pair_steps=2, batch=4, steps=1, time_budget=0,
                        output_dir=str(tmp_path / "run"), sample_every=0, measure_every=0, mixed_precision="no")
    script.main(cfg)
    told = lambda: json.loads((tmp_path / "run/config.json").read_text()).get("perceptual_network")
    body = (tmp_path / "run/student/README.md").read_text()
    assert told() == "perceptual_efflite0" and re.search(r"^- perceptual distance of the loss: .*efflite0$", body, re.M)
    monkeypatch.setattr(metrics, "perceptual_name", lambda: "lpips_vgg")                  # installed since: another loss
    with pytest.raises(UserError, match="perceptual_network: 'perceptual_efflite0' -> 'lpips_vgg'"):
        script.main(dataclasses.replace(cfg, steps=2))
    script.main(dataclasses.replace(cfg, metric="mse", output_dir=str(tmp_path / "mse")))
    assert "perceptual" not in (tmp_path / "mse/student/README.md").read_text()
