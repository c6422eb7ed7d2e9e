"""A base kept in few bits (--base_bits): what it predicts, what learns beside it, what it weighs, what leaves, and what is refused."""
from __future__ import annotations

import dataclasses
import gc
import json
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_dmd
import train_meanflow
from tiny import tiny_sd

sys.path[:0] = [str(Path(__file__).parent / "backbones")]
import tiny_a  # noqa: E402
import tiny_b  # noqa: E402

from zoo import backbones, calculus, quantized, watch  # noqa: E402
from zoo.errors import UserError  # noqa: E402

BITS = (8, 4)
NEAR = {8: 0.01, 4: 0.25}          # relative error of a prediction; the tiny networks have random weights
needs_library = pytest.mark.usefixtures("library")


@pytest.fixture(scope="session")
def library():
    pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a tiny teacher, built when it is first asked for, with a file of prompts beside it."""
    root = tmp_path_factory.mktemp("teachers")
    (root / "prompts.txt").write_text("red heart\nblue star\n")

    def of(name):
        if not (root / name).exists():
            tiny_sd(root / name) if name == "sd" else (tiny_a if name in tiny_a.BUILDERS else tiny_b).build(name, root / name)
        return str(root / name)
    return of


def opened(folder, name):
    where = folder(name)
    return backbones.load(where, data="" if name in ("dit", "ddpm") else str(Path(where).parent / "prompts.txt"))


def given(model, n=2):
    g = torch.Generator().manual_seed(3)
    return torch.randn(n, *model.shape, generator=g), torch.tensor([0.3, 0.7])[:n], model.examples(n).cond


def relative(a, b) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def config(folder, out, name="sd", script=train_dmd, **fields):
    fields = dict(teacher=folder(name), data=str(Path(folder(name)).parent / "prompts.txt"), output_dir=str(out), lora=2, batch=2, steps=2, time_budget=0,
                  sample_every=0, measure_every=0, checkpoint_every=2, export="last", mixed_precision="no", lr=1e-3) | fields
    return script.Config(**fields)


def checkpoint(run):
    where = run.out / "checkpoints" / f"step-{run.step:07d}"
    return {f.name: load_file(f) for f in where.glob("*.safetensors")}


# ------------------------------------------------------------------------------------------------------------- one layer
@needs_library
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(128, 64), (30, 96), (9, 13)])
def test_a_layer_is_near_its_own_weights_and_passes_gradients_on(bits, shape):
    """Also where blocks of 64 go over the end of a row, which the library's own unpacking on a CPU gets wrong (an error of 0.25)."""
    torch.manual_seed(0)
    whole = torch.nn.Linear(shape[1], shape[0])
    torch.nn.init.normal_(whole.weight)
    layer = {4: quantized._four, 8: quantized._eight}[bits](quantized.library(), whole, "cpu", torch.float32)
    assert 0 < relative(quantized.values(layer), whole.weight.detach()) < {8: 0.012, 4: 0.11}[bits]
    x = torch.randn(2, 5, shape[1], requires_grad=True)
    out, plain = layer(x), torch.nn.functional.linear(x, quantized.values(layer), whole.bias.detach())
    assert torch.equal(out, plain) and torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (out, plain)))
    with torch.no_grad():
        assert torch.equal(layer(x), out)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16 and relative(low.float(), out) < 0.02
    assert torch.equal(layer(x), out)                     # and is as before afterwards


# ------------------------------------------------------------------------------------------------------------- networks
FAST = ("sd15", "sdxl", "sd3", "flux", "pixart_sigma")
OTHERS = tuple(n for n in (*tiny_a.BUILDERS, *tiny_b.BUILDERS) if n not in FAST)


@needs_library
@pytest.mark.parametrize("name,bits", [(n, (8, 4)[i % 2]) for i, n in enumerate(FAST)]
                         + [pytest.param(n, b, marks=pytest.mark.slow) for i, n in enumerate(FAST + OTHERS) for b in BITS if n in OTHERS or b != (8, 4)[i % 2]])
def test_roles_on_a_packed_base(folder, name, bits):
    """Near the full teacher, student and critic start as the packed one, and only the adapter that is called learns."""
    full, model = opened(folder, name), opened(folder, name)
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    quantized.quantize(model, bits, "cpu")
    packed = quantized.of(model.module)
    x, t, cond = given(model)
    with torch.no_grad():
        wanted, teacher = (m.teacher(x, t, cond, to=m.pred) for m in (full, model))
    layers = set(packed.layers)
    # With random weights Z-Image magnifies any change of them.
    assert 0 < relative(teacher, wanted) and (relative(teacher, wanted) < NEAR[bits] or name == "zimage")
    with torch.no_grad():
        for path in layers:
            full.module.get_submodule(path).weight.copy_(quantized.values(model.module.get_submodule(path)))
        assert relative(teacher, full.teacher(x, t, cond, to=full.pred)) < 1e-3               # the stock network with the same weights
    assert layers and all(torch.equal(p, before[n]) for n, p in model.module.named_parameters() if n.rpartition(".")[0] not in layers)
    assert not any(n.startswith(tuple(f"{e}." for e in model.time_embeddings)) for n in layers)
    student, critic = model.make("student", lora=2), model.make("critic", lora=2)
    assert torch.equal(student(x, t, cond, to=model.pred), teacher) and torch.equal(critic(x, t, cond, to=model.pred), teacher)
    student(x, t, cond, to=model.pred).square().mean().backward()
    reached = {n for n, p in model.module.named_parameters() if p.grad is not None}
    assert reached and reached <= set(student.trainable()) and any(n.split(".base_layer")[0].split(".lora_")[0] in layers for n in reached)
    quantized.quantize(model, bits, "cpu")                  # a second run on it: nothing is packed twice
    assert quantized.of(model.module) is packed


@needs_library
@pytest.mark.parametrize("bits", BITS)
def test_checkpointed_activations_recompute_with_the_role_and_are_let_go(folder, bits):
    model = opened(folder, "sd3")
    quantized.quantize(model, bits, "cpu")
    x, t, cond = given(model)
    student, gradients = model.make("student", lora=2), []
    model.make("critic", lora=2)
    for n, p in model.module.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.1)
    for checkpointing in (False, True):
        if checkpointing:
            model.module.enable_gradient_checkpointing()
            from zoo.denoiser import checkpoint_activations
            checkpoint_activations(model.module)
        kept = []
        hook = model.module.get_submodule("transformer_blocks.0.ff.net.2").register_forward_pre_hook(lambda _m, args: kept.append(weakref.ref(args[0])))
        loss = student(x, t, cond, to=model.pred).square().mean()
        hook.remove()
        gc.collect()
        assert (kept[0]() is None) == checkpointing           # adapters keep what they read; under checkpointing nothing does
        gradients.append(torch.autograd.grad(loss, list(student.trainable().values())))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients)) and any(g.abs().max() > 0 for g in gradients[0])


@needs_library
@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_those_held(folder, bits):
    """Counted from storages, and what a plan says."""
    model = opened(folder, "flux")
    quantized.quantize(model, bits, "cpu")
    seen = {}
    for layer in model.module.modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        beside = [v for s in (state, getattr(state, "state2", None)) if s is not None for v in vars(s).values() if torch.is_tensor(v)]
        scale = [layer.scale] if isinstance(layer, quantized._made[8]) else []
        for tensor in (*layer.parameters(recurse=False), *beside, *scale):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    packed = quantized.of(model.module)
    assert sum(seen.values()) == packed.kept == quantized.weight_bytes(model.module) < packed.before


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_sixteen_bits_change_nothing_under_bf16(folder, name):
    """Under autocast the prediction is that of the full teacher bit for bit, and so is the gradient of an adapter; without it only the weights'
    rounding shows."""
    x = t = cond = None
    out, gradients, plain = [], [], []
    for bits in (0, 16):
        model = opened(folder, name)
        if bits:
            before = quantized.weight_bytes(model.module)
            quantized.quantize(model, bits, "cpu")
            packed = quantized.of(model.module)
            assert packed.kept == quantized.weight_bytes(model.module) < before and packed.error < 0.003
        x, t, cond = given(model) if x is None else (x, t, cond)
        torch.manual_seed(0)
        student = model.make("student", lora=2)
        with torch.no_grad():
            plain.append(model.teacher(x, t, cond, to=model.pred))
        with torch.autocast("cpu", torch.bfloat16):
            out.append(student(x, t, cond, to=model.pred))
        gradients.append(torch.autograd.grad(out[-1].square().mean(), list(student.trainable().values()), allow_unused=True))
    assert torch.equal(*out) and 0 < relative(*plain[::-1]) < 0.1
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("how", ["jvp", "fd"])
def test_derivatives_with_sixteen_bits_are_those_of_the_rounded_weights(folder, how):
    """Also in a run under bf16: derivatives are taken in float32, where the packed weights are read as they are and nothing else is rounded."""
    model, rounded, full = (opened(folder, "sd3") for _ in range(3))
    quantized.quantize(model, 16, "cpu")
    for path in quantized.of(model.module).layers:
        weight = rounded.module.get_submodule(path).weight.data
        weight.copy_(weight.bfloat16())
    x, t, cond = given(model)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))

    def taken(m):
        with torch.autocast("cpu", torch.bfloat16):
            return calculus.total_derivative(lambda x, t: m.teacher(x, t, cond, to=m.pred), (x, t), (direction, torch.ones_like(t)), how)
    (value, slope), wanted = taken(model), taken(rounded)
    assert torch.equal(value, wanted[0]) and torch.equal(slope, wanted[1]) and slope.dtype == torch.float32
    assert slope.norm() > 1 and 0 < relative(slope, taken(full)[1]) < 0.1
    cfg = train_meanflow.Config(teacher=model.folder, lora=2, base_bits=16, derivative=how)
    quantized.check(cfg, model, cut=False)                # and it is not refused


# ------------------------------------------------------------------------------------------------------------- runs
@needs_library
@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 16])
def test_resumption_is_exact_and_the_plan_counts_packed_weights(folder, tmp_path, monkeypatch, capsys, bits):
    monkeypatch.setattr(watch.Watcher, "begin", lambda self: None)              # two trainings are compared, and no student leaves
    monkeypatch.setattr(watch.Watcher, "finish", lambda self: None)
    fields = dict(base_bits=bits, gradient_checkpointing=True, critic_updates=1, student_times=(1.0, 0.5), mixed_precision="bf16",
                  tell_critic=False, checkpoint_every=1)
    whole = train_dmd.main(config(folder, tmp_path / "whole", **fields))
    assert f"in {bits} bits" in capsys.readouterr().err
    train_dmd.main(config(folder, tmp_path / "parts", steps=1, **fields))
    parts = train_dmd.main(config(folder, tmp_path / "parts", **fields))
    a, b = checkpoint(whole), checkpoint(parts)
    assert a.keys() == b.keys() and all(a[f].keys() == b[f].keys() and all(torch.equal(a[f][k], b[f][k]) for k in a[f]) for f in a)
    assert all("lora_" in k for k in a["student.safetensors"]) and any(v.abs().max() > 0 for k, v in a["student.safetensors"].items() if "lora_B" in k)
    adapters = sum(p.numel() * p.element_size() for t in whole.trainees.values() for p in t.params.values())
    averages = sum(r["averages"] for r in whole.estimate.roles.values())
    held = quantized.weight_bytes(whole.model.module) - adapters
    assert held == quantized.of(whole.model.module).kept                     # adapters aside, the network is what was packed
    assert whole.estimate.held - averages == quantized.weight_bytes(whole.model.module)
    with pytest.raises(UserError, match="base_bits"):                        # another base is another run
        train_dmd.main(config(folder, tmp_path / "parts", steps=5, **fields | {"base_bits": 0}))


@needs_library
def test_the_student_leaves_as_a_plain_lora_on_the_published_base(folder, tmp_path, monkeypatch):
    """The folder is base and adapter summed, as stock diffusers sums them from the adapter's file; the record and the card say the bits."""
    from diffusers import StableDiffusionPipeline
    monkeypatch.setattr(watch, "TEACHER_STEPS", 2)
    monkeypatch.setattr(backbones.Backbone, "watched", (2, 2))
    run = train_dmd.main(config(folder, tmp_path / "run", base_bits=4, critic_updates=1, student_times=(1.0, 0.5), ema=0.0, lr=1e-2))
    student = tmp_path / "run/student"
    assert json.loads((student / "fewstep.json").read_text())["student"]["base_bits"] == 4 and "in 4 bits" in (student / "README.md").read_text()
    assert json.loads((tmp_path / "run/config.json").read_text())["base_bits"] == 4
    left, base = (StableDiffusionPipeline.from_pretrained(p, safety_checker=None) for p in (student, folder("sd")))
    model = run.model
    x, t, cond = given(model)
    call = lambda net: net(x, 1000 * t, encoder_hidden_states=cond["prompt"], return_dict=False)[0].detach()
    plain = call(base.unet)
    base.load_lora_weights(student, weight_name="pytorch_lora_weights.safetensors")
    assert not any("absmax" in k or "quant" in k for k in left.unet.state_dict())
    assert torch.allclose(call(left.unet), call(base.unet), atol=1e-5) and not torch.allclose(call(left.unet), plain, atol=1e-3)
    again = train_dmd.main(config(folder, tmp_path / "second", base_bits=8, steps=1, init_student=str(student), critic_updates=1))     # from it, other bits
    assert again.step == 1


@needs_library
def test_a_second_time_and_a_difference_along_it(folder):
    """Surgery leaves the packed layers alone; a difference of nearby calls is that of a plain network with the same weights, since nothing but
    weights is rounded."""
    model, plain = opened(folder, "sd3"), opened(folder, "sd3")
    quantized.quantize(model, 8, "cpu")
    for path in quantized.of(model.module).layers:
        plain.module.get_submodule(path).weight.data.copy_(quantized.values(model.module.get_submodule(path)))
    x, t, cond = given(model)
    before = model.teacher(x, t, cond, to=model.pred)
    net = model.make("student", lora=2, two_time=True)
    assert torch.equal(net(x, t, cond, r=t, to=model.pred), before)
    mine, wanted = (calculus.derivative(lambda at: m.teacher(x, at, cond, to=m.pred), (t,), (torch.ones_like(t),), "fd") for m in (model, plain))
    assert wanted.norm() > 1 and relative(mine, wanted) < 0.01


@needs_library
@pytest.mark.slow
def test_a_method_of_differences_and_one_with_a_discriminator_train(folder, tmp_path, monkeypatch):
    import train_ladd
    monkeypatch.setattr(watch.Watcher, "begin", lambda self: None)
    monkeypatch.setattr(watch.Watcher, "finish", lambda self: None)
    (tmp_path / "images").mkdir()
    from PIL import Image
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text("red heart")
    for script in (train_meanflow, train_ladd):
        cfg = config(folder, tmp_path / script.__name__, script=script, base_bits=4, data=str(tmp_path / "images"), mixed_precision="bf16")
        assert script.main(cfg).step == 2
    cfg = config(folder, tmp_path / "dmd", base_bits=8, gan=1e-3, data=str(tmp_path / "images"), critic_updates=1, optimizer="adamw8bit")
    assert train_dmd.main(cfg).step == 2


# ------------------------------------------------------------------------------------------------------------- refusals
@needs_library
@pytest.mark.parametrize("fields,said", [({"lora": 0}, "add --lora"), ({"teacher_lora": "style.safetensors"}, "fuse"), ({"compile": True}, "--compile"),
                                         ({"data": ""}, "leave it out")])
def test_refused_in_one_line(folder, tmp_path, fields, said):
    if "data" in fields:                 # a network of your own
        fields = fields | {"teacher": backbones.Custom(torch.nn.Linear(2, 2), {"x0": torch.zeros(4, 2)}, shape=(2,))}
    with pytest.raises(UserError, match=said) as error:
        train_dmd.main(config(folder, tmp_path / "run", **{"base_bits": 4, **fields}))
    assert "\n" not in str(error.value) and "--base_bits 4" in str(error.value)


@needs_library
def test_refused_by_what_a_run_has(folder, tmp_path):
    cfg = config(folder, tmp_path / "run", script=train_meanflow, base_bits=4, derivative="jvp")
    with pytest.raises(UserError, match="--derivative fd"):
        train_meanflow.main(cfg)
    model = opened(folder, "sd")
    with pytest.raises(UserError, match="8gpu_ddp"):
        quantized.check(dataclasses.replace(cfg, derivative="fd"), model, cut=True)
    quantized.quantize(model, 4, "cpu")
    for bits in (8, 0):
        with pytest.raises(UserError, match="load it anew"):
            quantized.quantize(model, bits, "cpu")
    with pytest.raises(UserError, match="--lora"):
        model.make("student")
    used = opened(folder, "sd")
    used.make("student", lora=2)
    with pytest.raises(UserError, match="has adapters already"):
        quantized.quantize(used, 4, "cpu")


def test_a_network_without_linear_blocks_and_a_missing_library(folder, tmp_path, monkeypatch):
    model = opened(folder, "sd")
    monkeypatch.setattr(quantized, "layers", lambda *_: [])
    with pytest.raises(UserError, match="no linear layers"):
        quantized.quantize(model, 4, "cpu")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install"):
        train_dmd.main(config(folder, tmp_path / "run", base_bits=4))
