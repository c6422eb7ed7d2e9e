"""Families of UNets and of class- and text-conditional transformers, each against its own stock pipeline.

The stock pipeline runs a few guided steps; what its network read and gave and what its scheduler was handed are kept, and the adapter must
give the same numbers at the same latents: the network's bits, the guided combination, the channels that are dropped."""
from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent / "train_scripts")]
import last_layer  # noqa: E402
import tiny_a  # noqa: E402

from zoo import backbones, losses  # noqa: E402
from zoo.errors import UserError  # noqa: E402

PROMPTS = ["a red heart", "blue cat"]
W = 3.5


@dataclass
class Family:
    """what: arguments of a stock call; loads_lora: stock pipelines of this class have load_lora_weights."""
    what: dict
    loads_lora: bool = False
    output: str = "latent"


def family(name: str, prompted: bool = True, **more) -> Family:
    return Family(({"prompt": PROMPTS} if prompted else {}) | tiny_a.CALLS.get(name, {}), **more)


FAMILIES = {name: family(name, loads_lora=lora) for name, lora in {"sd15": True, "sd21": True, "sdxl": True, "pixart_sigma": False, "sana": True}.items()}
FAMILIES |= {"dit": family("dit", prompted=False, output="pt"), "ddpm": family("ddpm", prompted=False, output="np")}
FAMILIES |= {"sdxl_v": family("sdxl_v", loads_lora=True), "pixart_alpha_512": family("pixart_alpha_512")}
GUIDED = [name for name in FAMILIES if name != "ddpm"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of the tiny teachers as they are asked for, prompts and pictures."""
    from PIL import Image
    root = tmp_path_factory.mktemp("families")
    (root / "images").mkdir()
    g, rows = np.random.default_rng(0), []
    for i in range(12):
        Image.fromarray(g.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / "images" / f"{i:03d}.png")
        rows.append({"file_name": f"{i:03d}.png", "caption": f"a red tree {i}", "label": i % 5})
    (root / "images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "prompts.txt").write_text("a red heart\nblue cat\na star\na blue tree\n")

    def folder(name):
        return str(root / name if (root / name).exists() else tiny_a.build(name, root / name))
    return folder, root


def opened(world, name):
    folder, root = world
    return backbones.load(folder(name), data=str(root / "prompts.txt"))


def conditions(model, what):
    """(cond, uncond) of the prompts or labels of a stock call."""
    if "prompt" in what:
        with torch.no_grad():
            cond, empty = model.conditions(what["prompt"]), model.unconditional()
        return cond, {k: v.expand(len(cond[k]), *v.shape[1:]) for k, v in empty.items()}
    label = torch.tensor(what["class_labels"]) if "class_labels" in what else torch.zeros(what["batch_size"], dtype=torch.long)
    return tuple(model._conditions(label).values())


def watched(pipe, part, **call):
    """Run a stock call; per step (network input, timestep number, network output, what the scheduler was handed)."""
    network, scheduler, steps = getattr(pipe, part), pipe.scheduler, []

    def keep(_module, args, kwargs, out):
        x = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        t = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        steps.append([x.clone(), torch.as_tensor(t).reshape(-1)[0].item(), (out[0] if isinstance(out, tuple) else out.sample).clone()])
    hook, real = network.register_forward_hook(keep, with_kwargs=True), scheduler.step

    def step(output, *args, **kwargs):
        steps[-1].append(output.clone())
        return real(output, *args, **kwargs)
    scheduler.step = step
    pipe.set_progress_bar_config(disable=True)
    pipe(**call, generator=torch.Generator().manual_seed(0))
    hook.remove()
    del scheduler.step
    return steps


@pytest.mark.parametrize("name", FAMILIES)
def test_the_teacher_is_the_stock_pipelines_network_and_guidance(world, name):
    from diffusers import DiffusionPipeline
    family, model = FAMILIES[name], opened(world, name)
    pipe = DiffusionPipeline.from_pretrained(world[0](name))
    guide = {"guidance_scale": W} if name in GUIDED else {}
    if model.folds_guidance:
        from diffusers.models.attention_processor import AttnProcessor
        pipe.unet.set_attn_processor(AttnProcessor())          # as the adapter does for small pictures on a CPU
    steps = watched(pipe, model.part, **family.what, **guide, num_inference_steps=3, output_type=family.output)
    cond, uncond = conditions(model, family.what)
    net, channels = model.make("student"), model.shape[0]
    assert len(steps) >= 3 and len({s[1] for s in steps}) >= 3
    for x, number, raw, combined in steps:
        # Stock solvers hand the network whole timesteps; float64 carries them through t and back to the same number.
        t = model.process.from_timestep(torch.full((len(x),), number, dtype=torch.float64))
        halves = [cond, uncond] if name == "dit" else [uncond, cond]
        both = cond if name not in GUIDED else {k: torch.cat([h[k] for h in halves]) for k in cond}
        with torch.no_grad():
            assert torch.equal(net(x, t, both, to=model.pred), raw[:, :channels])
            if name in GUIDED:
                half, t = x[: len(x) // 2], t[: len(x) // 2]
                mine = losses.guided(model.teacher, half, t, cond, uncond, W, to=model.pred)
                torch.testing.assert_close(mine, combined[: len(half), :channels], atol=1e-5, rtol=1e-5)
                other = losses.guided(model.teacher, half, t, cond, uncond, W + 1, to=model.pred)
                assert (other - mine).abs().max() > 1e-3          # w and 1 + w would be told apart


def test_pixart_alpha_reads_the_size(world):
    """At 1024 (a network of 128 latents a side) the stock pipeline passes resolution and aspect ratio; here of a smaller, oblong picture."""
    from diffusers import DiffusionPipeline
    folder = tiny_a.build("pixart_alpha", world[1] / "alpha")
    model, pipe = backbones.load(str(folder), data=str(world[1] / "prompts.txt")), DiffusionPipeline.from_pretrained(folder)
    steps = watched(pipe, "transformer", prompt=PROMPTS, guidance_scale=W, height=16, width=32, use_resolution_binning=False,
                    num_inference_steps=2, output_type="latent")
    cond, uncond = conditions(model, {"prompt": PROMPTS})
    for x, number, raw, combined in steps:
        t = model.process.from_timestep(torch.full((4,), number, dtype=torch.float64))
        with torch.no_grad():
            assert torch.equal(model.teacher(x, t, {k: torch.cat([uncond[k], cond[k]]) for k in cond}, to="eps"), raw[:, :4])
            mine = losses.guided(model.teacher, x[:2], t[:2], cond, uncond, W, to="eps")
            torch.testing.assert_close(mine, combined[:2, :4], atol=1e-5, rtol=1e-5)
    net = model.make("student", two_time=True)
    with torch.no_grad():
        assert torch.equal(net(x[:2], t[:2], cond, r=t[:2]), model.teacher(x[:2], t[:2], cond))


@pytest.mark.parametrize("name", FAMILIES)
def test_two_times(world, name):
    """r = t reproduces the teacher, r is read in every place, and the teacher stays itself; with LoRA too."""
    model = opened(world, name)
    cond, _ = conditions(model, FAMILIES[name].what)
    x, t = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.6)
    with torch.no_grad():
        before = model.teacher(x, t, cond)
        net = model.make("student", two_time=True)
        assert torch.equal(net(x, t, cond, r=t), before)
        slots = [n for n, p in net.module.named_parameters() if n.endswith("cond_proj.weight")]
        assert len(slots) == len(model.time_embeddings) and all(n in net.trainable() for n in slots)
        for n in slots:
            torch.nn.init.normal_(net.module.get_parameter(n), std=0.1)
            assert not torch.allclose(net(x, t, cond, r=t), net(x, t, cond, r=0 * t), atol=1e-4)
            torch.nn.init.zeros_(net.module.get_parameter(n))
        with pytest.raises(ValueError, match="two_time=True"):
            model.make("plain")(x, t, cond, r=t)
        net = model.make("student", two_time=True, lora=4)           # on the shared base from here on
        assert torch.equal(net(x, t, cond, r=t), before) and torch.equal(model.teacher(x, t, cond), before)
        adapters = {n: p for n, p in net.trainable().items() if ".cond_proj." in n}
        assert len(adapters) == 2 * len(slots)
        for p in adapters.values():
            torch.nn.init.normal_(p, std=0.3)
        assert not torch.allclose(net(x, t, cond, r=t), net(x, t, cond, r=0 * t), atol=1e-4)
        assert torch.equal(model.teacher(x, t, cond), before)


# (script, LoRA rank): one script that alternates between student and critic and one with a single network of two times, each family with
# LoRA in one of them. Some run always, the others in the slow suite; every script with every family is benchmarks/families/run.py.
LIVES = [("dmd", 4), ("meanflow", 0)], [("dmd", 0), ("meanflow", 4)]
FAST = [("sdxl", "dmd"), ("pixart_sigma", "meanflow"), ("dit", "dmd"), ("sana", "meanflow")]
CASES = [pytest.param(name, *life, id=f"{name}-{life[0]}-{'lora' if life[1] else 'full'}", marks=[] if (name, life[0]) in FAST else pytest.mark.slow)
         for i, name in enumerate(FAMILIES) for life in LIVES[i % 2][: 1 if name in tiny_a.MEMBERS else 2]]


@pytest.mark.parametrize("name,script,lora", CASES)
def test_life(world, tmp_path, monkeypatch, name, script, lora):
    """Train two steps, resume for two more, export, open with stock diffusers and sample what the trainer samples."""
    from diffusers import DiffusionPipeline
    from diffusers.utils.torch_utils import randn_tensor

    from zoo import rollout, watch
    from zoo.hub.card import lint
    from zoo.watch import FirstTimeZero
    monkeypatch.setattr(watch, "TEACHER_STEPS", 2)                     # its references are not what is tested here
    monkeypatch.setattr(backbones.Backbone, "watched", (4, 2))
    family, train = FAMILIES[name], importlib.import_module(f"train_{script}")
    data = str(world[1] / ("prompts.txt" if script == "dmd" else "images"))
    cfg = train.Config(teacher=world[0](name), data="" if script == "dmd" and "prompt" not in family.what else data, batch=4, steps=2, lora=lora,
                       time_budget=0, output_dir=str(tmp_path / "run"), sample_every=0, measure_every=2, checkpoint_every=1, mixed_precision="no",
                       guidance=0.0 if name == "ddpm" else 2.0, gradient_checkpointing=bool(lora) and script == "dmd")
    run = train.main(cfg)
    pristine = dict(getattr(DiffusionPipeline.from_pretrained(world[0](name)), run.model.part).named_parameters())
    base = {n.replace(".base_layer", ""): p for n, p in run.model.module.named_parameters() if "lora_" not in n and "cond_proj" not in n}
    assert base.keys() == pristine.keys() and all(torch.equal(base[n], p) for n, p in pristine.items())      # the frozen base kept its bits
    resumed = train.main(dataclasses.replace(cfg, steps=4))
    assert (run.step, resumed.step) == (2, 4)
    student, contract = tmp_path / "run/student", resumed.watcher.contract
    assert lint(student) == []
    pipe = DiffusionPipeline.from_pretrained(student)
    pipe.set_progress_bar_config(disable=True)
    call = {**family.what, **resumed.model.stock_call}
    seeded = lambda: torch.Generator().manual_seed(5)
    for k in contract.steps:
        assert np.isfinite(pipe(**call | contract.stock_call(k), generator=seeded(), output_type="np").images).all()
    if resumed.model.folds_guidance:
        with pytest.raises(ValueError):
            pipe(**family.what)                              # 50 steps: refused by the stock scheduler, not sampled wrongly
    model, net = resumed.model, resumed.watcher.net
    noise = randn_tensor((2, *model.shape), generator=seeded())
    cond = conditions(model, family.what)[0]
    reading = FirstTimeZero(net) if script == "meanflow" else net
    mine = model.decode(rollout.sample(reading, noise, cond, resumed.watcher.trained[1])) / 2 + 0.5
    theirs = torch.as_tensor(pipe(**call | contract.stock_call(1), generator=seeded(), output_type="np").images).permute(0, 3, 1, 2)
    torch.testing.assert_close(theirs, mine.clamp(0, 1), atol=2e-4, rtol=0)
    if lora and family.loads_lora and script == "dmd":       # the adapter of a two-time student has a layer the stock teacher lacks
        teacher = DiffusionPipeline.from_pretrained(world[0](name))
        teacher.set_progress_bar_config(disable=True)
        teacher.load_lora_weights(student, weight_name="pytorch_lora_weights.safetensors")
        teacher.scheduler = pipe.scheduler
        again = teacher(**call | contract.stock_call(1) | {"guidance_scale": 1.0}, generator=seeded(), output_type="np").images
        torch.testing.assert_close(torch.as_tensor(again).permute(0, 3, 1, 2), theirs, atol=2e-4, rtol=0)
    if script == "meanflow":                                 # the whole network of two times, jumping
        from zoo import loading
        said = {k: v for k, v in family.what.items() if k in ("prompt", "class_labels", "batch_size")}
        jumped = loading.load(student, two_time=True)(**said, num_inference_steps=2, generator=seeded(), output_type="pt").images
        expected = model.decode(rollout.sample(net, noise, cond, torch.tensor([1.0, 0.5]), "jump")) / 2 + 0.5
        torch.testing.assert_close(jumped, expected.clamp(0, 1), atol=2e-4, rtol=0)
    second = train.main(dataclasses.replace(cfg, steps=1, output_dir=str(tmp_path / "second"), init_student=str(student)))
    assert json.loads((tmp_path / "second/student/fewstep.json").read_text())["student"]["chain"] and second.step == 1


def test_sana_under_its_other_scheduler(world):
    """Both schedulers SANA is published with say the same flow and shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
    pipe = SanaPipeline.from_pretrained(world[0]("sana"))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.save_pretrained(world[1] / "sana-euler")
    models = [backbones.load(f) for f in (world[0]("sana"), str(world[1] / "sana-euler"))]
    x, t = torch.randn(1, *models[0].shape), torch.tensor([0.3])
    cond = models[0].conditions(["a red heart"])
    assert [m.shift for m in models] == [3.0, 3.0] and torch.equal(models[0].teacher(x, t, cond), models[1].teacher(x, t, cond))
    pipe.scheduler.register_to_config(prediction_type="epsilon")
    pipe.save_pretrained(world[1] / "sana-eps")
    with pytest.raises(UserError, match="predicts epsilon"):
        backbones.load(str(world[1] / "sana-eps"))


def test_a_schedule_of_another_kind_is_refused(world):
    from diffusers import EDMEulerScheduler, StableDiffusionXLPipeline
    pipe = StableDiffusionXLPipeline.from_pretrained(world[0]("sdxl"), scheduler=EDMEulerScheduler())
    pipe.save_pretrained(world[1] / "edm")
    with pytest.raises(UserError, match="EDMEulerScheduler"):
        backbones.load(str(world[1] / "edm"))


def test_recomputed_blocks_embed_the_second_time(world):
    """DiT embeds its times inside its blocks: their recomputation sees the r of the forward pass, whatever was called since."""
    model = opened(world, "dit")
    cond, _ = conditions(model, FAMILIES["dit"].what)
    x, t = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.6)
    found = []
    for checkpointing in (False, True):
        net = model.make("student", two_time=True, gradient_checkpointing=checkpointing)
        assert bool(net.module.gradient_checkpointing) is checkpointing
        g = torch.Generator().manual_seed(1)
        for name, p in net.trainable().items():
            if name.endswith("cond_proj.weight"):
                p.data.copy_(0.1 * torch.randn(p.shape, generator=g))
        loss = net(x, t, cond, r=t / 2).square().mean()
        with torch.no_grad():
            net(x, t, cond, r=0 * t)
        loss.backward()
        found.append({n: p.grad for n, p in net.trainable().items() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any("cond_proj" in n for n in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_reads_what_the_output_layer_reads(world, name):
    model = opened(world, name)
    last_layer.check(model, conditions(model, FAMILIES[name].what)[0])


def test_a_network_whose_output_layer_is_not_known_takes_no_head():
    custom = backbones.Custom(torch.nn.Conv2d(3, 3, 1), {"x0": torch.zeros(4, 3, 2, 2)}, shape=(3, 2, 2))
    with pytest.raises(UserError, match="the custom family is not known: .* set the attribute `last` to its name"):
        custom.make("student", head=lambda layer, width: layer)


def test_an_unsupported_family_names_the_supported_ones(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "MarigoldDepthPipeline"}))
    with pytest.raises(UserError, match="MarigoldDepthPipeline.*StableDiffusionXLPipeline") as error:
        backbones.load(str(tmp_path))
    assert all(name in str(error.value) for name in backbones.FAMILIES)


def test_every_family_of_the_table_has_an_adapter():
    for kind in backbones.FAMILIES:
        assert callable(backbones.adapter(kind))


@pytest.mark.parametrize("family", ["sd15", "ddpm"])
def test_weights_under_another_name_are_found_and_missing_ones_named(tmp_path, family):
    """Many fine-tunes are published as the fp16 variant alone."""
    from diffusers import DiffusionPipeline
    plain = tiny_a.build(family, tmp_path / "plain")
    DiffusionPipeline.from_pretrained(str(plain)).save_pretrained(tmp_path / "half", variant="fp16")
    assert list((tmp_path / "half").rglob("*.fp16.safetensors")) and not list((tmp_path / "half" / "unet").glob("*model.safetensors"))
    one, two = (dict(backbones.load(str(tmp_path / name)).module.named_parameters()) for name in ("plain", "half"))
    assert all(torch.equal(one[k], two[k]) and two[k].dtype == torch.float32 for k in one)
    for file in (tmp_path / "half" / "unet").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="half cannot be opened as a pipeline .*every part its model_index.json names, as safetensors") as error:
        backbones.load(str(tmp_path / "half"))
    assert "\n" not in str(error.value)


def test_guidance_of_what_has_none_is_refused(tmp_path):
    """Guided by itself, a network is what it was: the scale would be recorded, paid for and without effect."""
    folder = str(tiny_a.build("ddpm", tmp_path / "ddpm"))
    assert backbones.load(folder).guidance == backbones.load(folder, guidance=1.0).guidance == 1
    with pytest.raises(UserError, match="--guidance 3: .*ddpm has no unconditional half .* leave it out"):
        backbones.load(folder, guidance=3.0)
    data = {"x0": torch.zeros(4, 2), "label": torch.arange(4)}
    custom = lambda **options: backbones.Custom(torch.nn.Identity(), options.pop("data", data), shape=(2,), **options)
    with pytest.raises(UserError, match="custom has no unconditional half"):
        backbones.load(custom(), guidance=2.0)
    assert backbones.load(custom(uncond={"label": torch.tensor([4])}), guidance=2.0).guidance == 2
    with pytest.raises(UserError, match="`uncond` has the keywords label, and `data` label, mask"):
        custom(data=data | {"mask": torch.ones(4)}, uncond={"label": torch.tensor([4])})
    with pytest.raises(UserError, match="different lengths .x0: 4, label: 3."):
        custom(data=data | {"label": torch.arange(3)})
