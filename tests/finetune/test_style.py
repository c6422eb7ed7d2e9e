"""A teacher made of a base and a style LoRA: what is trained, what leaves, and whether the two adapters are used together as the card says."""
from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/backbones"), str(ROOT / "train_scripts")]
import tiny  # noqa: E402
import tiny_a  # noqa: E402
import tiny_b  # noqa: E402

from zoo import backbones, report, watch  # noqa: E402
from zoo.backbones.style import add_style  # noqa: E402
from zoo.errors import UserError  # noqa: E402

PROMPTS = ["red heart", "blue star"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("style")
    tiny.tiny_sd(root / "base")
    (root / "prompts.txt").write_text("red heart\nblue star\nsmiling heart\nred star\n")
    lora(root / "base", root / "style", text=True)
    return root


def lora(base: Path, folder: Path, text: bool = False, rank: int = 4, seed: int = 0, alpha: int = 8) -> Path:
    """A LoRA as diffusers' own training scripts save it: on the network's attention, and on the text encoder's with `text`."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    pipe, g = DiffusionPipeline.from_pretrained(base), torch.Generator().manual_seed(seed)
    layers = {}
    parts = {"unet" if hasattr(pipe, "unet") else "transformer": ["to_q", "to_v", "to_out.0"]} | ({"text_encoder": ["q_proj", "v_proj"]} if text else {})
    for part, targets in parts.items():
        module = getattr(pipe, part)
        module.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
        for name, p in module.named_parameters():
            if "lora_" in name:
                p.data = 0.3 * torch.randn(p.shape, generator=g)
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
        layers[f"{part}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
    pipe.save_lora_weights(folder, **layers)
    return folder


def opened(world, name="base"):
    return backbones.load(str(world / name), data=str(world / "prompts.txt"))


def given(model, n=2):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, *model.shape, generator=g), torch.tensor([0.9, 0.35])[:n], model.conditions(PROMPTS[:n])


def test_the_teacher_is_the_stock_pipeline_with_the_lora_and_comes_back(world):
    """At each scale the network and the text encoder are what diffusers computes with the LoRA loaded; setting it to 0 is the base again."""
    from diffusers import DiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor
    model, base = opened(world), opened(world)
    style = add_style(model, str(world / "style"), 0.7)
    assert style.parts == ["unet", "text_encoder"] and add_style(model, str(world / "style"), 0.7) is style       # a second run in the same process
    stock = DiffusionPipeline.from_pretrained(world / "base")
    stock.unet.set_attn_processor(AttnProcessor())
    stock.load_lora_weights(world / "style", adapter_name="style")
    for scale in (0.7, 0.35, 0.0):
        style.set(model, scale)
        stock.set_adapters(["style"], [scale])
        x, t, cond = given(model)
        with torch.no_grad():
            prompt = stock.encode_prompt(PROMPTS, "cpu", 1, False)[0]
            torch.testing.assert_close(cond["prompt"], prompt, atol=1e-5, rtol=0)
            theirs = stock.unet(x, model.process.timestep(t), encoder_hidden_states=prompt).sample
            torch.testing.assert_close(model.teacher(x, t, cond, to=model.pred), theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-5)
            plain = base.teacher(x, t, base.conditions(PROMPTS), to=model.pred)
        assert (scale == 0) == torch.allclose(plain, theirs, atol=1e-4)
    assert not any("lora" in n or p.requires_grad for part in (model.module, model.pipe.text_encoder) for n, p in part.named_parameters())


def test_every_role_shares_the_styled_base_and_its_adapter_holds_the_student_alone(world):
    model = opened(world)
    before = model.module.state_dict()["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"].clone() if hasattr(model.module, "mid_block") else None
    add_style(model, str(world / "style"))
    student = model.make("student", lora=4)
    x, t, cond = given(model)
    with torch.no_grad():
        styled = model.teacher(x, t, cond)
        assert torch.equal(student(x, t, cond), styled)                       # starts as the styled teacher
        model.style.set(model, 0.0)                                           # the same call moves every role, under an adapter too
        assert not torch.allclose(student(x, t, cond), styled, atol=1e-4)
        model.style.set(model, 1.0)
        torch.testing.assert_close(student(x, t, cond), styled, atol=1e-5, rtol=1e-5)
    from zoo.hub.export import lora_state
    assert all(".lora_A." in k or ".lora_B." in k for k in lora_state(student)) and before is not None


@pytest.mark.slow
def test_life_with_a_style_lora(world, tmp_path, monkeypatch):
    """Train with LoRA, resume, export: the folder is base + style + student; stock base + style file + student file gives the same pictures;
    report, record and card say what the LoRA is."""
    import numpy as np
    import train_dmd
    from diffusers import DiffusionPipeline
    monkeypatch.setattr(watch, "TEACHER_STEPS", 3)
    monkeypatch.setattr(backbones.Backbone, "watched", (4, 2))
    (world / "style/README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    cfg = train_dmd.Config(teacher=str(world / "base"), teacher_lora=str(world / "style"), teacher_lora_scale=0.8,
                           data=str(world / "prompts.txt"), batch=4, steps=2, lora=4, lr=1e-2, time_budget=0, output_dir=str(tmp_path / "run"),
                           sample_every=0, measure_every=2, checkpoint_every=1,
                           mixed_precision="no", guidance=2.0, critic_updates=1)
    train_dmd.main(cfg)
    run = train_dmd.main(dataclasses.replace(cfg, steps=3))
    assert run.step == 3 and run.model.style.now == 0.8
    student = tmp_path / "run/student"
    call = dict(num_inference_steps=2, guidance_scale=1.0, output_type="np")
    draw = lambda pipe: (pipe.set_progress_bar_config(disable=True), pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **call).images)[1]
    fused = DiffusionPipeline.from_pretrained(student)
    stacked = DiffusionPipeline.from_pretrained(world / "base", scheduler=fused.scheduler)
    stacked.load_lora_weights(world / "style", adapter_name="style")
    stacked.load_lora_weights(student, weight_name="pytorch_lora_weights.safetensors", adapter_name="student")
    stacked.set_adapters(["style", "student"], [0.8, 1.0])
    whole, summed = draw(fused), draw(stacked)
    np.testing.assert_allclose(whole, summed, atol=2e-3)
    stacked.set_adapters(["style", "student"], [0.0, 1.0])
    assert abs(draw(stacked) - whole).max() > 2e-2                     # the file alone is another student: the style is not in it
    record = json.loads((student / "fewstep.json").read_text())
    assert record["student"]["teacher_lora"] == {"name": "pytorch_lora_weights.safetensors", "file": "pytorch_lora_weights.safetensors", "scale": 0.8,
                                                 "parts": ["unet", "text_encoder"]}
    made = record["card"]["report"]
    assert set(made["parts"]) == {"quality", "diversity", "stacking"} and [r["scale"] for r in made["parts"]["stacking"]["rows"]] == [0.5, 1.0]
    card = (student / "README.md").read_text()
    for needle in ("license: other", "cc-by-nc-4.0", "non-commercial", "with the style LoRA", "## The style LoRA",
                   'set_adapters(["style", "student"], [0.8, 1])', "## Go or no-go", "Rule: quality"):
        assert needle in card, needle
    assert made["verdict"].split(":")[0] in (tmp_path / "run/report.md").read_text()


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "wan"])
def test_other_families_take_a_style(tmp_path, family):
    """A random LoRA saved by the family's pipeline changes its teacher, and only through the weights."""
    base = (tiny_a if family in tiny_a.BUILDERS else tiny_b).build(family, tmp_path / family)
    lora(base, tmp_path / "style")
    model = backbones.load(str(base))
    x, t = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.6])
    with torch.no_grad():
        cond = model.conditions(["a red heart"])
        plain = model.teacher(x, t, cond)
        add_style(model, str(tmp_path / "style"))
        moved = model.teacher(x, t, cond)
        model.style.set(model, 0.0)
        torch.testing.assert_close(model.teacher(x, t, cond), plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, moved, atol=1e-3)


def test_a_peft_folder_serves_a_family_without_a_loader(tmp_path):
    from diffusers import DiffusionPipeline
    from peft import LoraConfig, get_peft_model
    base = tiny_a.build("pixart_sigma", tmp_path / "base")
    lora_ed = get_peft_model(DiffusionPipeline.from_pretrained(base).transformer, LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    for name, p in lora_ed.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    lora_ed.save_pretrained(tmp_path / "peft")
    model = backbones.load(str(base))
    x, t = torch.randn(1, *model.shape), torch.tensor([0.6])
    with torch.no_grad():
        cond = model.conditions(["a red heart"])
        plain = model.teacher(x, t, cond, to="eps")
        add_style(model, str(tmp_path / "peft"))
        expected = model.forward(lora_ed.merge_and_unload(), x, model.process.timestep(t), cond)
        torch.testing.assert_close(model.teacher(x, t, cond, to="eps"), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-3)


# ------------------------------------------------------------------------------------------------------- the report's arithmetic
def table(student, few, many=0.0, high=1.0):
    row = lambda who, steps, value: {"who": who, "steps": steps, "d": value, "low": value - 1, "high": value + high}
    return [row("teacher", 25, many), row("teacher", 4, few), row("teacher", 1, 5 * few), row("student", 4, student), row("student", 1, few)]


def test_quality_is_the_share_of_the_way(world):
    assert report.quality(table(30.0, 100.0), "d")["closed"] == pytest.approx(0.7) and report.quality(table(30.0, 100.0), "d")["ok"]
    assert not report.quality(table(60.0, 100.0), "d")["ok"]
    inside = report.quality(table(0.5, -0.1), "d")                    # few steps lose nothing: only the interval is left to judge by
    assert inside["ok"] and inside["closed"] is None and not report.quality(table(3.0, -0.1), "d")["ok"]


def test_diversity_finds_the_prompt_that_collapsed():
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 4, 16, generator=g)
    names = list("abcd")
    assert report.diversity(teacher, teacher, names)["mean"] == pytest.approx(1)
    one = teacher * torch.tensor([1.0, 0.1, 1.0, 1.0]).reshape(4, 1, 1)
    made = report.diversity(one, teacher, names)
    assert made["ok"] and made["per_prompt"]["b"] == pytest.approx(0.1, abs=1e-3) and "'b'" in made["text"]
    two = teacher * torch.tensor([1.0, 0.1, 0.1, 1.5]).reshape(4, 1, 1)
    assert not report.diversity(two, teacher, names)["ok"] and report.diversity(two, teacher, names)["mean"] > report.SPREAD
    assert not report.diversity(0.5 * teacher, teacher, names)["ok"]


def test_stacking_tells_a_student_that_follows_from_one_that_does_not(world):
    """A student that is the teacher follows exactly; one whose pictures turn away from what the LoRA does is a no-go; weights come back."""
    from types import SimpleNamespace
    model = opened(world)
    add_style(model, str(world / "style"))
    net = model.make("student", lora=2)
    examples = model.examples(4, 2)
    before = {n: p.clone() for n, p in model.module.named_parameters()}

    def few(_k, n, ex, sign=1.0):
        x, t = torch.randn(n, *model.shape, generator=torch.Generator().manual_seed(1)), torch.full((n,), 1.0)
        return sign * net(x, t, {k: v[:n] for k, v in ex.cond.items()})
    watcher = SimpleNamespace(run=SimpleNamespace(model=model, sharded=False), net=net, half=4, trained={1: None}, examples=examples, sample=few, teach=few,
                              _pictures=model.decode)
    same = report.stacking(watcher)
    assert same["ok"] and all(r["follows"] == pytest.approx(1, abs=1e-4) and r["size"] == pytest.approx(1, abs=1e-4) for r in same["rows"])
    watcher.sample = lambda k, n, ex: few(k, n, ex, sign=-1.0)
    watcher._pictures = lambda x: x
    turned = report.stacking(watcher)
    assert not turned["ok"] and all(r["follows"] < -0.9 for r in turned["rows"])
    assert all(torch.allclose(before[n], p, atol=1e-6) for n, p in model.module.named_parameters())
    watcher.net = opened(world).make("student")                        # full weights: not an adapter on these weights
    assert report.stacking(watcher) is None and "full weights" in report._why_not(watcher)


# ------------------------------------------------------------------------------------------------------- what is refused
def refused(model, source, match, **options):
    with pytest.raises(UserError, match=match) as error:
        add_style(model, str(source), **options)
    assert "\n" not in str(error.value)


def test_a_lora_for_another_family_is_named(world, tmp_path):
    """Other shapes, other layers, a whole model, a pickle, a few-step adapter, another reading of the network: one line each."""
    from safetensors.torch import load_file, save_file
    sdxl = tiny_a.build("sdxl", tmp_path / "sdxl")
    refused(backbones.load(str(sdxl)), world / "style", r"does not fit .*sdxl family.*is \[\d+, \d+\] in the file and \[\d+, \d+\] there")
    sd3 = tiny_b.build("sd3", tmp_path / "sd3")
    lora(sd3, tmp_path / "sd3-style")
    model = opened(world)
    refused(model, tmp_path / "sd3-style", "does not fit .*sd family.*transformer_blocks")
    refused(model, world / "base/unet/diffusion_pytorch_model.safetensors", "holds no LoRA.*goes to --teacher")
    (tmp_path / "style.bin").write_bytes(b"\x80")
    refused(model, tmp_path / "style.bin", "convert it to safetensors")
    refused(model, "nothing-here", "does not exist")
    refused(backbones.load("toy"), world / "style", "diffusers pipeline")
    refused(backbones.load(str(tiny_a.build("pixart_sigma", tmp_path / "pixart"))), world / "style", "no LoRA loader.*peft folder")
    refused(model, "latent-consistency/lcm-lora-sdv1-5", "could not be read from the Hub.*no network")
    state = load_file(world / "style/pytorch_lora_weights.safetensors")
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        save_file(state, tmp_path / f"two/{name}.safetensors", {"modelspec.prediction_type": "epsilon"})
    refused(model, tmp_path / "two", "holds 2 safetensors files.*name the file")
    refused(model, tmp_path / "two/a.safetensors", "trained for prediction epsilon .* predicts v")
    (tmp_path / "two/fewstep.json").write_text("{}")
    refused(model, tmp_path / "two/b.safetensors", "few-step adapter")
    assert not any("lora" in n for n, _ in model.module.named_parameters())           # nothing was left behind
    add_style(model, str(world / "style"))
    refused(model, world / "style", "holds the LoRA .* already", scale=0.5)


RUN = """
import sys
import train_dmd
from zoo import backbones, watch
watch.TEACHER_STEPS, backbones.Backbone.watched = 2, (2, 2)
train_dmd.main(train_dmd.Config(teacher="me/base", teacher_lora="me/style", data=sys.argv[1], output_dir=sys.argv[2], batch=2, steps=1, lora=2, time_budget=0,
                                measure_every=0, sample_every=0, mixed_precision="no", critic_updates=1, guidance=2.0))
"""


@pytest.mark.slow
def test_base_and_style_from_the_hub(world, tmp_path):
    """Both by Hub id, through the real client: the card names both, with their revisions and licences."""
    sys.path[:0] = [str(ROOT / "tests/hub")]
    from clients import Client
    from loopback import Loopback
    with Loopback() as hub:
        for name, folder, terms in (("base", world / "base", "openrail++"), ("style", world / "style", "cc-by-nc-4.0")):
            hub.make(f"models/me/{name}")
            for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md"):
                hub.write(f"models/me/{name}", path.relative_to(folder).as_posix(), path.read_bytes())
            hub.write(f"models/me/{name}", "README.md", f"---\nlicense: {terms}\n---\n".encode())
        me = Client(hub, tmp_path / "home")
        process = me.start(RUN, world / "prompts.txt", tmp_path / "run", PYTHONPATH=f"{ROOT}:{ROOT / 'train_scripts'}")
        _, err = process.communicate(timeout=170)
        assert process.returncode == 0, err[-3000:]
        heads = {name: hub.repos[f"models/me/{name}"].branches["main"] for name in ("base", "style")}
    student = tmp_path / "run/student"
    card, record = (student / "README.md").read_text(), json.loads((student / "fewstep.json").read_text())
    for needle in ("- me/base", "- me/style", "license: other", "license_name: openrail++-and-cc-by-nc-4.0", "non-commercial", 'load_lora_weights("me/style"'):
        assert needle in card, needle
    assert record["student"]["teacher_lora"]["revision"] == heads["style"] and record["card"]["base_revision"] == heads["base"]
