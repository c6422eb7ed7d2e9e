"""Uses besides the plain call: what runs on a tiny student, what the stock call refuses, and that every number falls when its adapter does
nothing or is given another's picture."""
from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(ROOT / "benchmarks" / "downstream")]
import tiny
from zoo import data
from zoo.backbones import load
from zoo.errors import UserError
from zoo.hub import card, downstream
from zoo.hub.contract import Contract, contract_for
from zoo.hub.export import LORA_WEIGHTS, export_student

TIMES = (1.0, 0.75, 0.5, 0.25)


# ------------------------------------------------------------------------------------------------------- the numbers
@pytest.fixture(scope="module")
def emoji():
    """Eight emoji [8, 64, 64, 3] in [0, 1]."""
    table = data.emoji("heldout")
    return np.stack([np.asarray(table[i]["image"].convert("RGB")) for i in range(0, 80, 10)]).astype(np.float32) / 255


def test_follows():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4))
    assert downstream.follows(a, 2 * a) == pytest.approx(1) and downstream.follows(-a, a) == pytest.approx(-1)
    assert downstream.follows(0 * a, a) == 0 and downstream.follows(0 * a, 0 * a) == 0          # a LoRA of scale 0 follows nothing
    assert abs(downstream.follows(a, b)) < 0.9


def test_overlap_of_silhouettes(emoji):
    shapes = downstream.silhouette(emoji)
    assert 0.05 < shapes.mean() < 0.95 and not downstream.silhouette(np.ones((1, 4, 4, 3))).any()
    assert downstream.overlap(shapes, shapes) == 1 > 0.9 > downstream.overlap(shapes, np.roll(shapes, 1, axis=0))
    assert downstream.overlap(shapes, ~shapes) == 0
    half = np.zeros((1, 4, 4), bool)
    half[:, :2] = True
    assert downstream.overlap(half, np.ones((1, 4, 4), bool)) == 0.5 and downstream.overlap(~half & half, half & ~half) == 1


def test_a_picture_is_found_among_others(emoji):
    noisy = np.clip(emoji[:, None] + 0.1 * np.random.default_rng(0).normal(size=(8, 2, 64, 64, 3)), 0, 1)
    assert downstream.finds(noisy, emoji) == 1
    assert downstream.finds(np.roll(noisy, 1, axis=0), emoji) == 0                              # shown another's picture
    assert downstream.finds(np.repeat(noisy[:1], 8, axis=0), emoji) == 1 / 8                    # the same whatever was shown: chance


def test_the_style_is_seen_by_its_number(emoji):
    import parts
    plain, painted = parts.off_style(emoji), parts.off_style(parts.delft(emoji))
    assert painted < 1e-6 < 0.05 < plain
    assert parts.off_style((emoji + parts.delft(emoji)) / 2) == pytest.approx(plain / 2, rel=0.01)
    assert parts.off_style(np.ones((1, 2, 2, 3))) < 1e-9                                       # the ground stays white


class Stand(downstream.Bench):
    """Pipelines replaced by functions: the student obeys what it is given, the teacher does not."""

    def __init__(self, images):
        self.student, self.teacher, self.contract = "student", "teacher", Contract({1: (999,)})
        self.images = images

    def obeys(self, pipe, shown):
        return (shown if pipe == "student" else np.roll(self.images, 3, axis=0))[:, None]

    def controlled(self, folder, images, scale, words):
        return lambda pipe, k: self.obeys(pipe, images if scale else np.ones_like(images))

    def shown(self, folder, images):
        from contextlib import nullcontext
        return nullcontext(lambda scale: lambda pipe, k: self.obeys(pipe, images if scale else np.roll(images, 1, axis=0)))


@pytest.mark.parametrize("use", ["controlnet", "ip_adapter"])
def test_a_control_that_is_ignored_or_off_is_told_from_one_that_is_followed(emoji, use):
    for row in getattr(Stand(emoji), use)("", emoji):
        assert row["student"] == 1 and row["teacher, as few steps"] == row["teacher, 25 steps"] < 0.9 and row["student without it"] < 0.1


# ------------------------------------------------------------------------------------------------------- stock pipelines
@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny teacher, a student of it, and a LoRA, a ControlNet and an IP-Adapter of random weights for it."""
    from diffusers import ControlNetModel
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    root = tmp_path_factory.mktemp("downstream")
    teacher = tiny.tiny_sd(root / "teacher")
    model = load(str(teacher))
    contract = contract_for(model, TIMES)
    facts = {"method": "dmd", "prompts": ["red heart", "blue star"]}
    student = export_student(model, model.make("student"), root / "student", contract, extra=lambda f: card.write_card(f, model, facts))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        styled = model.make("style", lora=4)
        for p in styled.trainable().values():
            p.data += 0.1 * torch.randn(p.shape)
        lora = export_student(model, styled, root / "style", contract, lora_rank=4) / LORA_WEIGHTS
        unet = load(str(teacher)).module
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
        for p in net.parameters():
            p.data += 0.1 * torch.randn(p.shape)
        net.save_pretrained(root / "controlnet")
        eyes = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                                              image_size=16, patch_size=8, projection_dim=16))
        eyes.save_pretrained(root / "ip" / "image_encoder")
        state = {"image_proj.proj.weight": torch.randn(64, 16), "image_proj.proj.bias": torch.zeros(64), "image_proj.norm.weight": torch.ones(16),
                 "image_proj.norm.bias": torch.zeros(16)}
        for n, name in enumerate(n for n in unet.attn_processors if n.endswith("attn2.processor")):
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            state |= {f"ip_adapter.{2 * n + 1}.to_{x}_ip.weight": torch.randn(width, 16) for x in "kv"}
        save_file(state, root / "ip" / downstream.IP_WEIGHTS)
    return SimpleNamespace(teacher=teacher, student=student, lora=lora, controlnet=root / "controlnet", ip=root / "ip")


@pytest.mark.slow
def test_every_use_is_measured_and_on_the_card(made, monkeypatch):
    monkeypatch.setattr(downstream, "MANY", 6)
    downstream.main([str(made.student), "--teacher", str(made.teacher), "--guidance", "2", "--lora", str(made.lora), "--controlnet", str(made.controlnet),
                     "--ip_adapter", str(made.ip)])
    rows = json.loads((made.student / "fewstep.json").read_text())["card"]["downstream"]
    by = {(r["use"], r["measure"], r["steps"]): r for r in rows}
    assert {k[2] for k in by} == {1, 2, 4} and {k[1] for k in by} == {"distance", "follows", "overlap", "found"}
    assert by["image to image, strength 0.5", "distance", 1]["student"] == "refused"
    assert 0 < by["image to image, strength 0.75", "distance", 4]["student"] < 1
    assert all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float))
    assert len([r for r in rows if r["measure"] == "follows"]) == 2 * 3
    text = (made.student / "README.md").read_text()
    assert "## Beyond the plain call" in text and "refused" in text and "ControlNet of silhouettes" in text and "Not measured" not in text
    downstream.record(made.student, [r for r in rows if r["measure"] == "distance"], 2, 3)
    text = (made.student / "README.md").read_text()
    assert "Not measured: style LoRA, ControlNet, IP-Adapter." in text and "(2 prompts, 3 pictures of each)" in text


def same(a, b) -> bool:
    return np.array_equal(a, b)


@pytest.mark.slow
def test_adapters_reach_the_networks_and_leave_them_as_they_were(made):
    """On both pipelines each adapter changes the pictures, at scale 0 it changes nothing, another control gives another picture, and nothing
    is left behind."""
    bench = downstream.Bench(made.student, made.teacher, ["red heart", "blue star"], 2.0, seeds=1)
    images = np.random.default_rng(0).uniform(size=(2, 16, 16, 3)).astype(np.float32)
    images[0, :8], images[1, :, :8] = 1, 1                       # two silhouettes
    for pipe in (bench.student, bench.teacher):
        plain, turned = bench.draw(pipe, 2), bench.draw(pipe, 2, bench.next_prompts)
        with bench.styled(made.lora) as at:
            assert same(at(0.0)(pipe, 2), plain) and not same(at(1.0)(pipe, 2), plain)
        assert same(bench.draw(pipe, 2), plain)
        assert same(bench.controlled(made.controlnet, images, 0.0)(pipe, 2), turned)
        steered, swapped = (bench.controlled(made.controlnet, x)(pipe, 2) for x in (images, images[::-1].copy()))
        assert not same(steered, turned) and not same(steered, swapped)
        wordless = bench.draw(pipe, 2, ["", ""])
        assert same(bench.controlled(made.controlnet, images, 0.0, False)(pipe, 2), wordless) and not same(turned, wordless)
        with bench.shown(made.ip, images) as at:
            assert same(at(0.0)(pipe, 2), wordless) and not same(at(1.0)(pipe, 2), wordless)
            seen = at(1.0)(pipe, 2)
        with bench.shown(made.ip, images[::-1].copy()) as at:
            assert not same(at(1.0)(pipe, 2), seen)
        assert same(bench.draw(pipe, 2), plain)


@pytest.mark.slow
def test_a_pipeline_follows_itself(made, monkeypatch):
    """The teacher in the student's place is moved by a LoRA exactly as the teacher is."""
    monkeypatch.setattr(downstream, "MANY", 4)
    bench, twin = (downstream.Bench(made.student, made.teacher, ["red heart"], 7.5, seeds=1) for _ in range(2))      # 7.5: of a stock call
    bench.contract, bench.student = Contract({4: TIMES}), twin.teacher
    rows = bench.lora(made.lora)
    assert all(r["student"] == r["teacher, 4 steps"] == pytest.approx(1, abs=1e-3) for r in rows)


def test_device_and_seeds_of_the_command_reach_the_measurement(tmp_path, monkeypatch):
    from clients import folder
    made, asked = folder("student", tmp_path / "student"), []
    monkeypatch.setattr(downstream, "measure", lambda *given, **options: asked.append(options) or [])
    downstream.main([str(made), "--device", "meta", "--seeds", "2"])
    downstream.main([str(made)])
    assert asked == [{"device": "meta", "seeds": 2}, {"device": "cuda" if torch.cuda.is_available() else "cpu", "seeds": downstream.SEEDS}]
    for flags, words in ((["--device", "nowhere"], "--device nowhere cannot be used here"), (["--seeds", "0"], "give at least 1")):
        with pytest.raises(UserError, match=words):
            downstream.main([str(made), *flags])


def test_what_is_not_there_is_refused(tmp_path):
    (tmp_path / "fewstep.json").write_text(json.dumps({**Contract({1: (999,)}).to_json(), "student": {"family": "pixel", "teacher": "fashion"}}))
    with pytest.raises(UserError, match="pixel family"):
        downstream.measure(tmp_path, "x", ["a"], 1.0)
    for flag in ("lora", "controlnet", "ip_adapter"):
        with pytest.raises(UserError, match=f"--{flag} {tmp_path}/none is not there"):
            downstream.measure(tmp_path, "x", ["a"], 1.0, downstream.Adapters(**{flag: tmp_path / "none"}))
