"""What a teacher carries besides its networks leaves with the student and still works there: safety checker, licence files, watermark. And
exports of SDXL students under other programs' keys."""
from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "backbones")]
import tiny
import tiny_a
import zoo
from zoo.backbones import ASSETS, load
from zoo.errors import UserError
from zoo.hub import card, model_cards, stage
from zoo.hub.contract import contract_for
from zoo.hub.convert import convert
from zoo.hub.export import LORA_WEIGHTS, export_student
from zoo.hub.record import read_record

TIMES = (1.0, 0.75, 0.5, 0.25)


def checked_teacher(folder: Path) -> Path:
    """A tiny Stable Diffusion teacher with licence files and a safety checker to which every picture is one of its concepts."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor
    tiny.tiny_sd(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=small | {"image_size": 16, "patch_size": 8}, text_config=small, projection_dim=16))
    checker.concept_embeds_weights.data.fill_(-2.0)
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe = StableDiffusionPipeline(**pipe.components | {"safety_checker": checker, "feature_extractor": CLIPImageProcessor(size=16, crop_size=16)})
    pipe.save_pretrained(folder, safe_serialization=True)
    (folder / "LICENSE.md").write_text("the teacher's terms")
    (folder / "USE_POLICY.md").write_text("what it must not be used for")
    return folder


def test_the_safety_checker_and_the_licence_files_are_kept_and_work(tmp_path):
    from diffusers import DiffusionPipeline
    teacher = checked_teacher(tmp_path / "teacher")
    model = load(str(teacher))
    folder = export_student(model, model.make("student"), tmp_path / "student", contract_for(model, TIMES),
                            extra=lambda f: card.write_card(f, model, {"method": "dmd"}))
    assert (folder / "LICENSE.md").read_text() == "the teacher's terms" and (folder / "USE_POLICY.md").exists()
    kept = "Kept from the teacher: `LICENSE.md`, `USE_POLICY.md`, `safety_checker`."
    assert kept in (folder / "README.md").read_text()
    assert {"LICENSE.md", "USE_POLICY.md", "safety_checker/model.safetensors"} <= set(stage.files(folder))          # and leaves with a push
    fused = tmp_path / "fused"
    convert(folder, "fused", fused)
    assert (fused / "LICENSE.md").exists() and (fused / "USE_POLICY.md").exists()
    for pipe in (DiffusionPipeline.from_pretrained(folder), zoo.load(folder), DiffusionPipeline.from_pretrained(fused)):
        pipe.set_progress_bar_config(disable=True)
        assert pipe.config.requires_safety_checker
        for name, weight in model.pipe.safety_checker.state_dict().items():
            assert torch.equal(pipe.safety_checker.state_dict()[name], weight)
        out = pipe("red heart", num_inference_steps=2, output_type="np")
        assert out.nsfw_content_detected == [True] and not out.images.any()                  # it is asked, and its word counts


@pytest.mark.parametrize("shipped", [pytest.param(p, id=p.name) for p in model_cards.folders()])
def test_shipped_students_hold_the_notice_of_their_teachers_data(shipped):
    notice = ASSETS / read_record(shipped)[1]["teacher"] / "NOTICE"
    assert (shipped / "NOTICE").read_bytes() == notice.read_bytes()
    assert "Kept from the teacher: `NOTICE`" in (shipped / "README.md").read_text()


def test_the_watermark_of_sdxl_stays(tmp_path, monkeypatch):
    """Stock pipelines of SDXL mark pictures where the library is installed: nothing in the export or in the package's own opening stops that."""
    from diffusers import DiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl as stock

    class Mark:
        def apply_watermark(self, images):
            return torch.zeros_like(images)
    teacher = tiny_a.build("sdxl", tmp_path / "teacher")
    model = load(str(teacher))
    folder = export_student(model, model.make("student"), tmp_path / "student", contract_for(model, TIMES))
    assert "add_watermarker" not in json.loads((folder / "model_index.json").read_text())
    monkeypatch.setattr(stock, "is_invisible_watermark_available", lambda: True)
    monkeypatch.setattr(stock, "StableDiffusionXLWatermarker", Mark, raising=False)
    for pipe in (DiffusionPipeline.from_pretrained(folder), zoo.load(folder)):
        pipe.set_progress_bar_config(disable=True)
        assert (pipe("red heart", num_inference_steps=2, output_type="np").images == 0.5).all()          # the mark here paints all grey


# ------------------------------------------------------------------------------------------------------- SDXL for other programs
@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """Tiny SDXL students: full weights, and a LoRA."""
    root = tmp_path_factory.mktemp("sdxl")
    teacher = tiny_a.build("sdxl", root / "teacher")
    model, out = load(str(teacher)), {}
    for name, options in (("full", {}), ("lora", {"lora": 4})):
        net = model.make(name, **options)
        g = torch.Generator().manual_seed(2)
        moved = net.reading({n: p.detach() + 0.05 * torch.randn(p.shape, generator=g) for n, p in net.trainable().items()})
        out[name] = export_student(model, moved, root / name, contract_for(model, TIMES), lora_rank=options.get("lora", 0))
        record = out[name] / "fewstep.json"
        data = json.loads(record.read_text())
        data["student"]["teacher"] = str(teacher)
        record.write_text(json.dumps(data))
    return out


def test_the_unet_of_an_sdxl_student_for_comfyui(sdxl, tmp_path):
    report = convert(sdxl["full"], "comfyui", tmp_path / "unet.safetensors")
    with safe_open(tmp_path / "unet.safetensors", "pt") as f:
        keys, note = set(f.keys()), json.loads(f.metadata()["fewstep"])
    assert report["maximum_error"] < 1e-5 and all(k.startswith("model.diffusion_model.") for k in keys)
    assert {"model.diffusion_model.label_emb.0.0.weight", "model.diffusion_model.label_emb.0.2.bias", "model.diffusion_model.input_blocks.0.0.weight"} <= keys
    assert not any("cond_proj" in k for k in keys) and note["timesteps"]["4"] == [999, 749, 499, 249]


def test_the_lora_of_an_sdxl_student_under_kohyas_keys(sdxl, tmp_path):
    """Kohya has no names for the layers of the size embedding: such a LoRA is refused by their names, its whole UNet goes, and one of the
    other layers is read as it was."""
    with pytest.raises(UserError, match="do not reach add_embedding.linear_1, add_embedding.linear_2 .*--to fused"):
        convert(sdxl["lora"], "comfyui", tmp_path / "lora.safetensors")
    assert not (tmp_path / "lora.safetensors").exists()
    convert(sdxl["lora"], "fused", tmp_path / "fused")
    assert convert(tmp_path / "fused", "comfyui", tmp_path / "unet.safetensors")["maximum_error"] < 1e-5
    shutil.copytree(sdxl["lora"], tmp_path / "smaller")
    with safe_open(sdxl["lora"] / LORA_WEIGHTS, "pt") as f:
        state, metadata = {k: f.get_tensor(k) for k in f.keys() if "add_embedding" not in k}, f.metadata()
    save_file(state, tmp_path / "smaller" / LORA_WEIGHTS, metadata)
    convert(tmp_path / "smaller", "comfyui", tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", "pt") as f:
        assert all(k.startswith("lora_unet_") for k in f.keys()) and len([k for k in f.keys() if k.endswith(".alpha")]) == len(state) // 2


def test_a_whole_sdxl_checkpoint_is_refused_by_name(sdxl, tmp_path):
    with pytest.raises(UserError, match="StableDiffusionXLPipeline.*its UNet alone: --to comfyui"):
        convert(sdxl["full"], "single-file", tmp_path / "out")
    assert not (tmp_path / "out").exists()
