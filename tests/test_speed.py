"""What makes runs faster without changing them: fused optimisers, batches that are read ahead, a start that imports and fits nothing it need not."""
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_dmd
import train_lcm
from zoo import critics, losses, optimizers
from zoo.backbones import Source
from zoo.backbones.toy import Toy
from zoo.data.ahead import Ahead, pinned
from zoo.errors import UserError
from zoo.run import Run

ROOT = Path(__file__).parents[1]


class Part:
    """A Trainee as optimisers see it."""

    def __init__(self, own: dict):
        self.own = {k: torch.nn.Parameter(v.clone()) for k, v in own.items()}
        self.params = self.own


def trained(steps, fused, betas=(0.0, 0.99), saved=None, start=None, monkeypatch=None):
    g = torch.Generator().manual_seed(0)
    shapes = {"matrix": (33, 7), "odd": (5,), "scalar": (), "no rows": (0, 4)}           # a rank may own no rows of a parameter
    part = Part(start or {k: torch.randn(s, generator=g) for k, s in shapes.items()})
    with monkeypatch.context() as patch:
        patch.setattr(optimizers, "FUSED", {"cpu"} if fused else set())
        part.optimizer = optimizers.make("adamw", part, torch.device("cpu"), lr=1e-2, betas=betas, weight_decay=0.1)
    assert bool(part.optimizer.param_groups[0]["fused"]) == fused and bool(part.optimizer.param_groups[0]["foreach"]) != fused
    if saved is not None:
        optimizers.restore(part, saved)
    for i in steps:
        g = torch.Generator().manual_seed(100 + i)
        for p in part.own.values():
            p.grad = torch.randn(p.shape, generator=g)
        part.optimizer.step()
    return {k: p.detach().clone() for k, p in part.own.items()}, {k: v.clone() for k, v in optimizers.tensors(part).items()}


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.999)])
def test_the_fused_kernel_steps_as_foreach_does_and_resumes_bit_for_bit(monkeypatch, betas):
    go = lambda *a, **k: trained(*a, betas=betas, monkeypatch=monkeypatch, **k)
    fused, states = go(range(6), True)
    plain, _ = go(range(6), False)
    assert all(torch.allclose(fused[k], plain[k], rtol=1e-5, atol=1e-6) for k in fused)
    half, kept = go(range(3), True)
    resumed, resumed_states = go(range(3, 6), True, saved=kept, start=half)
    assert all(torch.equal(fused[k], resumed[k]) for k in fused) and all(torch.equal(states[k], resumed_states[k]) for k in states)
    half, kept = go(range(3), False)                 # a checkpoint of the other implementation goes on
    resumed, _ = go(range(3, 6), True, saved=kept, start=half)
    assert all(torch.allclose(fused[k], resumed[k], rtol=1e-5, atol=1e-6) for k in fused)


def test_step_counts_go_where_the_fused_kernel_reads_them():
    """On a GPU they lie beside the parameter; the meta device stands in for it."""
    part = Part({"w": torch.zeros(3)})
    saved = {"w::step": torch.tensor(4.0), "w::exp_avg": torch.ones(3), "w::exp_avg_sq": torch.ones(3)}
    part.own["w"] = part.params["w"] = torch.nn.Parameter(torch.zeros(3, device="meta"))
    for fused in (True, False):
        part.optimizer = torch.optim.AdamW(part.own.values(), lr=1e-3)
        part.optimizer.param_groups[0]["fused"] = fused
        optimizers.restore(part, saved)
        state = part.optimizer.state[part.own["w"]]
        assert state["step"].device.type == ("meta" if fused else "cpu") and state["exp_avg"].device.type == "meta"


# ------------------------------------------------------------------------------------------------------ batches read ahead
def lcm(folder, monkeypatch, ahead, **options):
    """Parameters after a few steps, with or without a thread that reads ahead."""
    import zoo.watch
    monkeypatch.setattr(zoo.watch.Watcher, "finish", lambda self: None)
    real, readers = Run.__init__, []

    def init(self, cfg, model):
        real(self, cfg, model)
        self.ahead = Ahead(finish=lambda fields: fields) if ahead else None
        readers.append(self.ahead)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "__init__", init)
        script = options.pop("script", train_lcm)
        run = script.main(script.Config(teacher=Toy(fit_steps=0), output_dir=str(folder), batch=8, time_budget=0, sample_every=0, measure_every=0,
                                        checkpoint_every=0,
                                        **options))
    return {f"{t.name}.{k}": p.detach() for t in run.trainees.values() for k, p in t.params.items()}, readers[0]


def test_batches_read_ahead_are_the_same_batches(tmp_path, monkeypatch):
    """Two micro-batches a step, two trainees that share a source, stopped and resumed."""
    options = dict(script=train_dmd, accumulate=2, gan=0.01, steps=4)
    plain, _ = lcm(tmp_path / "plain", monkeypatch, False, **options)
    ahead, reader = lcm(tmp_path / "ahead", monkeypatch, True, **options)
    assert all(torch.equal(plain[k], ahead[k]) for k in plain)
    assert (reader.hits, reader.misses) == (4 * 3 * 2 - 1, 0)             # all but the first micro-batch
    lcm(tmp_path / "parts", monkeypatch, True, **options | {"steps": 2})
    parts, _ = lcm(tmp_path / "parts", monkeypatch, True, **options)
    assert all(torch.equal(plain[k], parts[k]) for k in plain)


def test_reading_ahead_reads_once_at_a_time_and_gives_up_where_it_guesses_wrong():
    import threading
    busy, threads, order = threading.Lock(), set(), []

    def read(source, tick):
        assert busy.acquire(blocking=False), "two reads at once"
        threads.add(threading.current_thread().name)
        order.append((source.n, tick))
        busy.release()
        return {"cond": {"n": torch.tensor(tick)}}
    a, b = Source(1, None), Source(2, None)
    ahead = Ahead(finish=lambda fields: fields)
    for tick in range(3):
        assert ahead((a, tick), (a, tick + 1), read)["cond"]["n"] == tick
    assert ahead.hits == 2 and len(threads) == 2 and order == [(1, 0), (1, 1), (1, 2), (1, 3)][: len(order)]
    for tick in range(3, 20):                            # sources that take turns: every guess is wrong
        source = (a, b)[tick % 2]
        assert ahead((source, tick), (source, tick + 1), read)["cond"]["n"] == tick
    assert ahead.misses == ahead.hits + 4 and ahead.waiting is None
    ahead.close()


def test_an_error_of_a_batch_is_raised_at_its_own_step():
    def read(tick):
        if tick == 2:
            raise UserError("picture 2 is broken")
        return {"x": tick}
    ahead = Ahead(finish=lambda fields: fields)
    assert ahead((0,), (1,), read) == {"x": 0} and ahead((1,), (2,), read) == {"x": 1}
    with pytest.raises(UserError, match="picture 2"):
        ahead((2,), (3,), read)
    ahead.close()


def test_pictures_are_decoded_ahead_and_encoded_by_the_thread_that_trains(tmp_path, monkeypatch):
    import json
    import threading

    import numpy as np
    from PIL import Image
    from tiny import tiny_sd

    from zoo import backbones
    from zoo.data.feed import Pictures
    (tmp_path / "images").mkdir()
    g, rows = np.random.default_rng(0), []
    for i in range(6):
        Image.fromarray(g.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "caption": f"a red heart {i}"}))
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(rows))
    folder, here, ran, decoded = str(tiny_sd(tmp_path / "teacher")), threading.current_thread(), [], []
    load = lambda: backbones.load(folder, data=str(tmp_path / "images"))
    plain, model = load().batches(images=True), load()
    real, decode = model.encode, Pictures._decode
    monkeypatch.setattr(model, "encode", lambda pixels: (ran.append(threading.current_thread()), real(pixels))[1])
    source, ahead = model.batches(images=True), Ahead(finish=lambda fields: fields)
    monkeypatch.setattr(Pictures, "_decode", lambda self, *a: (decoded.append(a[0]), decode(self, *a))[1])
    read = lambda source, at: source.get(torch.tensor([at % 6, (at + 1) % 6]))
    for at in range(0, 12, 2):                           # an epoch that is encoded, and one from the cache
        found, wanted = ahead((source, at), (source, at + 2), read), read(plain, at)
        assert torch.equal(found["x0"], wanted["x0"]) and torch.equal(found["cond"]["prompt"], wanted["cond"]["prompt"])
        if at == 4:
            ahead.close()                                # what was begun has ended: nothing is decoded twice, by either source
            assert set(ran) == {here} and len(ran) == 6 and len(decoded) <= 6 + 6 and ahead.hits == 2
            ahead = Ahead(finish=lambda fields: fields)
    assert len(ran) == 6 and ahead.hits == 2
    ahead.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a GPU")
def test_batches_lie_in_pinned_memory():
    fields = pinned({"cond": {"prompt": torch.ones(2, 3)}, "x0": torch.ones(2, device="cuda"), "name": "n"})
    assert fields["cond"]["prompt"].is_pinned() and fields["x0"].is_cuda and fields["name"] == "n"


@pytest.mark.parametrize("name, accumulate", [("dmd", 1), ("dmd", 2), ("dmd_pairs", 1), ("swiftbrush", 2)])
def test_a_shared_sample_saves_one_sampling_and_is_the_students(tmp_path, monkeypatch, name, accumulate):
    """The critic's first update trains on what the student's loss saw, with fresh noise, and no network is called for it again."""
    script = importlib.import_module(f"train_{name}")
    options = {"dmd": dict(student_times=(1.0,), critic_updates=2), "dmd_pairs": dict(pairs=16, pair_steps=1), "swiftbrush": {}}[name]
    updates, calls, seen = options.get("critic_updates", 1), {}, {"student": [], "critic": []}
    along, denoising = losses.along, critics.denoising
    monkeypatch.setattr("zoo.watch.Watcher.finish", lambda self: None)
    monkeypatch.setattr(losses, "along", lambda x, d: seen["student"].append(x.detach().clone()) or along(x, d))
    monkeypatch.setattr(critics, "denoising", lambda fake, x, eps, *a: seen["critic"].append((x.detach().clone(), eps)) or denoising(fake, x, eps, *a))
    for share in (False, True):
        for kept in seen.values():
            kept.clear()
        run = script.main(script.Config(teacher=Toy(fit_steps=0), steps=3, batch=16, accumulate=accumulate, share_sample=share, time_budget=0, measure_every=0,
                                        sample_every=0, output_dir=str(tmp_path / f"{share}"), **options))
        calls[share] = run.calls
        firsts = [x for at in range(0, len(seen["critic"]), updates * accumulate) for x, _ in seen["critic"][at: at + accumulate]]
        assert len(firsts) == len(seen["student"]) == 3 * accumulate
        assert all(torch.equal(a, b) for a, b in zip(firsts, seen["student"])) == share
        noises = [eps for _, eps in seen["critic"]]
        assert not any(torch.equal(a, b) for i, a in enumerate(noises) for b in noises[:i])
    assert calls[False] - calls[True] == 3 * 16


# ------------------------------------------------------------------------------------------------------ calls that are not made
def of_toy(script, folder, monkeypatch, **options):
    """(parameters, samples that networks were called on, calls of their modules) of a few steps on the toy."""
    import zoo.watch
    from zoo.denoiser import Denoiser
    made, call = [], Denoiser._call
    with monkeypatch.context() as patch:
        patch.setattr(zoo.watch.Watcher, "finish", lambda self: None)
        patch.setattr(Denoiser, "_call", lambda self, *args: (made.append(len(args[0])), call(self, *args))[1])
        run = script.main(script.Config(teacher=Toy(fit_steps=0), output_dir=str(folder), batch=16, time_budget=0, sample_every=0, measure_every=0,
                                        checkpoint_every=0,
                                        **{"mixed_precision": "no"} | options))
    return {f"{t.name}.{k}": p.detach() for t in run.trainees.values() for k, p in t.params.items()}, run.calls, made


@pytest.mark.parametrize("name", ["scm", "rcm"])
def test_a_tangent_takes_the_value_that_is_trained(tmp_path, monkeypatch, name):
    """One call of the student less a step, to the same bits; under mixed precision the trained value is too coarse, and the call is made."""
    import train_rcm
    import train_scm
    script, options = {"scm": (train_scm, {}), "rcm": (train_rcm, {"dmd_after": 99})}[name]
    options |= {"steps": 3, "h": 1e-2}
    short, few, _ = of_toy(script, tmp_path / "short", monkeypatch, **options)
    tangent = script.tangent
    with monkeypatch.context() as patch:
        patch.setattr(script, "tangent", lambda *args: tangent(*args[:-1], None))
        full, many, _ = of_toy(script, tmp_path / "full", patch, **options)
    assert many - few == 3 * 16 and all(torch.equal(short[k], full[k]) for k in short)
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(script, "tangent", lambda *args: (seen.append(args[-1]), tangent(*args))[1])
        of_toy(script, tmp_path / "mixed", patch, **options | {"steps": 1, "mixed_precision": "bf16"})
    assert seen == [None]


def test_a_derivative_alone_takes_two_calls(tmp_path, monkeypatch):
    import train_meanflow
    from zoo import calculus
    calls = []

    def fn(x, t):
        calls.append(x)
        return x.sin() * t
    x, t = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    args = fn, (x, t), (t, x), "fd", 1e-3
    value, whole = calculus.total_derivative(*args)
    assert len(calls) == 3 and torch.equal(value, x.sin() * t)
    assert torch.equal(calculus.derivative(*args), whole) and len(calls) == 5
    given = calculus.total_derivative(*args, value=value)
    assert torch.equal(given[0], value) and torch.equal(given[1], whole) and len(calls) == 7
    _, counted, _ = of_toy(train_meanflow, tmp_path, monkeypatch, steps=2, h=5e-3)
    assert counted == 2 * 16 * (1 + 2 + 3)                       # the teacher, the derivative, the trained call


def test_the_discriminator_judges_both_sides_in_one_call(tmp_path, monkeypatch):
    """DMD2's critic: as many samples, one call of the network less, the same training up to the order of sums."""
    options = dict(steps=2, gan=0.01, critic_updates=2)
    one, samples, made = of_toy(train_dmd, tmp_path / "one", monkeypatch, **options)
    apart = lambda net, pairs, cond, r=None: [net(x, t, cond, r=r, logits=True)[1] for x, t in pairs]
    with monkeypatch.context() as patch:
        patch.setattr(train_dmd.critics, "logits", apart)
        two, same, more = of_toy(train_dmd, tmp_path / "two", patch, **options)
    assert samples == same and sum(made) == sum(more) and len(more) - len(made) == 2 * 2
    assert all((one[k] - two[k]).abs().max() < 1e-3 for k in one)            # Adam divides gradients by their size: a last bit may turn one that is none
    net, toy = Toy(fit_steps=0).make("critic", head=True, two_time=True), Toy(fit_steps=0)
    cond, at = toy.examples(8).cond, torch.rand(8)
    pairs = [(torch.randn(8, 2), torch.rand(8)) for _ in range(2)]
    together, single = train_dmd.critics.logits(net, pairs, cond, at), apart(net, pairs, cond, at)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(together, single)) and not torch.allclose(single[0], single[1], atol=1e-3)


# ------------------------------------------------------------------------------------------------------------ start
def test_the_toys_network_is_what_its_fit_ends_at(monkeypatch):
    """`zoo.backbones.toy.ship` writes it."""
    from zoo.backbones import toy
    monkeypatch.setattr(toy, "_fitted", {})
    with monkeypatch.context() as patch:
        patch.delattr(toy.Toy, "_fit")                    # the file is there, and read
        shipped = toy.Toy().module
    monkeypatch.setattr(toy, "_fitted", {})
    monkeypatch.setattr(toy, "SHIPPED", Path("nowhere"))
    fitted, begun = toy.Toy().module, toy.Toy(fit_steps=0).module
    x, k, label = 2 * torch.randn(900, 2, generator=torch.Generator().manual_seed(0)), torch.linspace(1, 999, 900), torch.arange(900) % 9
    apart = lambda a, b: (a(x, k, label) - b(x, k, label)).square().mean().sqrt().item()
    assert apart(shipped, fitted) < 0.05 < 1 < apart(shipped, begun)           # another machine sums in another order


def test_a_run_without_adapters_does_not_import_peft_and_one_with_them_reads_its_own():
    code = """
import sys, torch
from zoo import backbones
model = backbones.load("toy")
x, t, cond = torch.randn(4, 2), torch.full((4,), 0.5), {"label": torch.arange(4)}
plain = model.make("student")(x, t, cond)
assert "peft" not in sys.modules, "peft"
tuned = model.make("tuned", lora=4)
for name, p in tuned.trainable().items():
    p.data.normal_()
fresh = model.make("fresh", lora=4)
assert not torch.allclose(tuned(x, t, cond), plain) and torch.allclose(fresh(x, t, cond), plain), "not its own adapter"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-1500:]
