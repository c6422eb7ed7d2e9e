"""Exports for other programs: each opens again and draws what the student draws, to a stated tolerance; what has no map is refused by name."""
from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

import tiny
from zoo.backbones import load
from zoo.errors import UserError
from zoo.hub import convert as formats
from zoo.hub.contract import contract_for
from zoo.hub.convert import convert, low_rank, original_unet, original_vae
from zoo.hub.export import export_student

TIMES = (1.0, 0.75, 0.5, 0.25)


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


CLOSE = 1e-5


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Exported tiny students: full weights, a LoRA, a student of pixels."""
    root = tmp_path_factory.mktemp("formats")
    model, pixel = load(str(tiny.tiny_sd(root / "teacher-sd"))), load(str(tiny.tiny_pixel(root / "teacher-pixel")))
    out = {}
    for name, source, options in (("full", model, {}), ("lora", model, {"lora": 4}), ("pixel", pixel, {})):
        net = source.make("student", **options)
        g = torch.Generator().manual_seed(2)
        moved = net.reading({n: p.detach() + 0.05 * torch.randn(p.shape, generator=g) for n, p in net.trainable().items()})
        out[name] = export_student(source, moved, root / name, contract_for(source, TIMES), lora_rank=options.get("lora", 0))
        record = out[name] / "fewstep.json"                      # the record names a teacher by its last part: give the tests its place
        data = json.loads(record.read_text())
        data["student"]["teacher"] = str(root / ("teacher-pixel" if name == "pixel" else "teacher-sd"))
        record.write_text(json.dumps(data))
    return out


@pytest.mark.parametrize("name", ["full", "lora", "pixel"])
def test_fused(students, name, tmp_path):
    report = convert(students[name], "fused", tmp_path / "out")
    assert report["maximum_error"] < CLOSE and not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    assert (tmp_path / "out" / "fewstep.json").exists()


@pytest.mark.parametrize("to", ["single-file", "comfyui"])
def test_full_weights_under_the_original_keys(students, to, tmp_path):
    """One file, no trace of the guidance input of zeros, and how to sample in its metadata."""
    from safetensors import safe_open
    report = convert(students["full"], to, tmp_path / "student.safetensors")
    assert (tmp_path / "student.safetensors").stat().st_mode & 0o044 == 0o044 & ~_mask()      # another program may read it
    assert report["maximum_error"] < CLOSE and sorted(p.name for p in tmp_path.iterdir()) == ["student.safetensors"]
    with safe_open(tmp_path / "student.safetensors", "pt") as f:
        keys, note = set(f.keys()), json.loads(f.metadata()["fewstep"])
    assert {"model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
            "first_stage_model.decoder.mid.attn_1.q.weight"} <= keys and not any("cond_proj" in k for k in keys)
    assert any(k.startswith("cond_stage_model.transformer.text_model.") for k in keys)
    assert note["timesteps"]["4"] == [999, 749, 499, 249] and note["prediction_type"] == "v_prediction" and note["rescale_betas_zero_snr"]


def test_a_lora_under_kohyas_keys(students, tmp_path):
    report = convert(students["lora"], "comfyui", tmp_path / "lora.safetensors")
    state = load_file(tmp_path / "lora.safetensors")
    assert report["maximum_error"] < CLOSE
    assert all(k.startswith("lora_unet_") and k.rsplit(".", 1)[0].count(".") <= 1 for k in state)
    assert all(v == 4 for k, v in state.items() if k.endswith(".alpha"))


def test_the_students_own_lora(students, tmp_path):
    report = convert(students["lora"], "lora", tmp_path / "out")
    assert report["maximum_error"] < CLOSE and report["kind"] == "the student's own LoRA"
    assert torch.equal(*(load_file(p / "pytorch_lora_weights.safetensors")[k] for p in (students["lora"], tmp_path / "out")
                         for k in [sorted(load_file(students["lora"] / "pytorch_lora_weights.safetensors"))[0]]))


def test_a_lora_from_full_weights_gets_better_with_its_rank(students, tmp_path):
    """Whatever a LoRA cannot hold (biases, norms) is said; what it can is lost by rank alone."""
    reports = [convert(students["full"], "lora", tmp_path / str(rank), rank=rank) for rank in (1, 4, 64)]
    lost = [r["change_lost_by_rank"] for r in reports]
    assert lost[0] > lost[1] > lost[2] and lost[2] < 1e-5 and reports[0]["change_outside_layers"] > 0
    assert reports[2]["maximum_error"] < reports[0]["maximum_error"]


def test_low_rank_is_the_nearest():
    """Eckart and Young: what is left is the sum of the squared singular values left out, also for kernels."""
    g = torch.Generator().manual_seed(0)
    change = torch.randn(6, 5, 3, 3, generator=g)
    down, up, residue = low_rank(change, 2)
    again = (up.flatten(1) @ down.flatten(1)).reshape(change.shape)
    s = torch.linalg.svdvals(change.flatten(1).double())
    assert down.shape == (2, 5, 3, 3) and up.shape == (6, 2, 1, 1)
    torch.testing.assert_close((change - again).double().square().sum(), s[2:].square().sum(), rtol=1e-5, atol=1e-6)
    assert residue == pytest.approx(s[2:].square().sum().item())
    exact = torch.randn(6, 2, generator=g) @ torch.randn(2, 7, generator=g)
    down, up, residue = low_rank(exact, 2)
    torch.testing.assert_close(up @ down, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name, part", [("full", "unet"), ("pixel", "unet")])
def test_fp8_stores_matrices_and_opens_with_stock_diffusers(students, name, part, tmp_path):
    from diffusers import DiffusionPipeline
    report = convert(students[name], "fp8", tmp_path / "out")
    state = load_file(next((tmp_path / "out" / part).glob("*.safetensors")))
    assert all((v.dtype == torch.float8_e4m3fn) == (v.dim() >= 2) for v in state.values())
    assert 0 < report["maximum_error"] < 0.5
    assert DiffusionPipeline.from_pretrained(tmp_path / "out").unet.dtype == torch.float32
    assert report["parameters_in_fp8"] > 10 * report["parameters_kept"]


@pytest.mark.parametrize("to", ["single-file", "comfyui", "lora"])
def test_families_without_a_key_map_are_refused_by_name(students, to, tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.calls.draw", lambda *a, **k: pytest.fail("it sampled before it refused"))
    with pytest.raises(UserError, match="ConsistencyModelPipeline"):
        convert(students["pixel"], to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What is offered beside fused and fp8, which every family has.
OFFERED = {"sd15": ("single-file", "comfyui"), "sd15-lora": ("single-file", "comfyui", "lora"), "sdxl": ("comfyui",), "sdxl-lora": ("lora",),
           **{f"{f}-lora": ("lora",) for f in ("sd3", "flux", "flux2", "qwen_image", "zimage", "wan", "cogvideox", "ltx")}, "dit": (), "dit-lora": ()}


@pytest.mark.slow
@pytest.mark.parametrize("case", OFFERED)
def test_every_family_and_target(case, tmp_path):
    """Each export is opened again and compared, or refused naming the family; nothing is left where it was refused."""
    import sys
    from pathlib import Path
    sys.path.insert(0, str(Path(__file__).parent / "backbones"))
    import tiny_a
    import tiny_b
    family, _, lora = case.partition("-")
    (tiny_a if family in tiny_a.BUILDERS else tiny_b).build(family, tmp_path / "teacher")
    model = load(str(tmp_path / "teacher"))
    student = export_student(model, model.make("student", **({"lora": 4} if lora else {})), tmp_path / "student", contract_for(model, TIMES),
                             lora_rank=4 if lora else 0)
    for to in formats.KINDS:
        out = tmp_path / to
        if to in (*OFFERED[case], "fused", "fp8"):
            report = convert(student, to, out, teacher=str(tmp_path / "teacher") if lora and to in ("lora", "comfyui") else "")
            assert report["maximum_error"] < (1 if to == "fp8" else CLOSE) and report["bytes"] > 0
        elif (case, to) in {("sdxl", "lora"), ("sd15", "lora")}:
            with pytest.raises(UserError, match="nothing to extract"):         # an untrained student: the map is there
                convert(student, to, out, teacher=str(tmp_path / "teacher"))
        else:
            with pytest.raises(UserError, match=type(model.pipe).__name__):
                convert(student, to, out, teacher=str(tmp_path / "teacher") if lora and to in ("lora", "comfyui") else "")
        assert out.exists() == (to in (*OFFERED[case], "fused", "fp8"))


@pytest.mark.parametrize("call, match", [
    (dict(to="fp8", rank=8), "--to fp8 takes none"), (dict(to="comfyui", rank=8), "--to comfyui takes none"), (dict(to="fused", rank=64), "leave it out"),
    (dict(to="lora", rank=0), "at least 1"), (dict(name="lora", to="lora", rank=8), "has a LoRA of its own"), (dict(to="fused", teacher="x/y"), "leave it out"),
    (dict(to="comfyui", teacher="x/y"), "leave it out"), (dict(to="fused", out="a.safetensors"), "writes a folder")])
def test_options_of_no_effect_are_refused(students, call, match, tmp_path):
    call = dict(call)
    name, out = call.pop("name", "full"), call.pop("out", "out")
    with pytest.raises(UserError, match=match):
        convert(students[name], out=tmp_path / out, **call)
    assert not list(tmp_path.iterdir())


def test_a_teacher_that_moved_is_named(students, tmp_path):
    """A record names a local teacher by its last part alone: --teacher says where it is, and another one does not fit."""
    moved = tmp_path / "student"
    shutil.copytree(students["lora"], moved)
    data = json.loads((moved / "fewstep.json").read_text())
    teacher, data["student"]["teacher"] = data["student"]["teacher"], "teacher-sd"
    (moved / "fewstep.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="the teacher teacher-sd is not here: name its folder or Hub id with --teacher"):
        convert(moved, "lora", tmp_path / "out")
    assert convert(moved, "lora", tmp_path / "out", teacher=teacher)["maximum_error"] < CLOSE
    other = tiny.tiny_pixel(tmp_path / "other")
    with pytest.raises(UserError, match="teacher"):
        convert(students["full"], "lora", tmp_path / "wrong", teacher=str(other))
    assert not (tmp_path / "wrong").exists()


def test_a_lora_beside_a_style_is_not_compared_without_it(students, tmp_path):
    styled = tmp_path / "styled"
    shutil.copytree(students["lora"], styled)
    data = json.loads((styled / "fewstep.json").read_text())
    data["student"]["teacher_lora"] = {"name": "ink.safetensors", "scale": 1.0, "parts": ["unet"]}
    (styled / "fewstep.json").write_text(json.dumps(data))
    for to in ("lora", "comfyui"):
        with pytest.raises(UserError, match="beside the style LoRA its teacher had .ink.safetensors."):
            convert(styled, to, tmp_path / "out")
    assert convert(styled, "fused", tmp_path / "out")["maximum_error"] < CLOSE


@pytest.mark.parametrize("stop", [KeyboardInterrupt, UserError, RuntimeError])
def test_nothing_half_written_stays(students, stop, tmp_path, monkeypatch):
    def broken(folder):
        raise stop("stopped")
    monkeypatch.setattr(formats, "_open", broken)
    with pytest.raises(stop):
        convert(students["full"], "fused", tmp_path / "out")
    monkeypatch.setattr(formats._Student, "error", lambda self, pipe, **extra: float("nan"))
    with pytest.raises(UserError, match="not finite"):
        convert(students["full"], "single-file", tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(students, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="exists: give a new path"):
        convert(students["full"], "fused", tmp_path)
    with pytest.raises(UserError, match="choose one of lora, fused"):
        convert(students["full"], "onnx", tmp_path / "out")


def test_a_lora_needs_to_know_its_teacher(students, tmp_path):
    orphan = tmp_path / "orphan"
    shutil.copytree(students["full"], orphan)
    data = json.loads((orphan / "fewstep.json").read_text())
    del data["student"]["teacher"]
    (orphan / "fewstep.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="distilled from"):
        convert(orphan, "lora", tmp_path / "out")


@pytest.mark.parametrize("what", ["sd", "deep", "sdxl"])
def test_original_keys_of_other_unets(what):
    """diffusers' own conversion gives the weights back: three resolutions, attention at other places, SDXL's extra embedding."""
    from diffusers import UNet2DConditionModel
    common = dict(sample_size=8, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4)
    configs = {"sd": dict(block_out_channels=(8, 16), layers_per_block=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                          up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
               "deep": dict(block_out_channels=(8, 8, 16, 16), layers_per_block=2, down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3),
               "sdxl": dict(block_out_channels=(8, 16, 16), layers_per_block=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D",
                                                                                                  "CrossAttnDownBlock2D"),
                            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 3),
                            use_linear_projection=True,
                            addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32)}
    unet = UNet2DConditionModel(**common, **configs[what])
    names = original_unet(unet)
    assert len(names) == len(unet.state_dict()) and not any(k.startswith(("down_blocks", "up_blocks", "mid_block")) for k in names)


def test_a_wrong_key_map_is_noticed(monkeypatch):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    unet = UNet2DConditionModel(sample_size=8, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4, block_out_channels=(8, 8), layers_per_block=1,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    swapped = formats.RESNET | {"conv1": "out_layers.3", "conv2": "in_layers.2"}
    monkeypatch.setattr(formats, "RESNET", swapped)
    with pytest.raises(UserError, match="does not hold this UNet"):
        original_unet(unet)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    assert len(original_vae(vae)) == len(vae.state_dict())
    monkeypatch.setattr(formats, "VAE_ATTENTION", formats.VAE_ATTENTION | {"to_q": "k", "to_k": "q"})
    with pytest.raises(UserError, match="does not hold this autoencoder"):
        original_vae(vae)


def test_a_guidance_input_has_no_place_in_the_original_layout():
    from diffusers import UNet2DConditionModel
    unet = UNet2DConditionModel(sample_size=8, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4, block_out_channels=(8, 8),
                                layers_per_block=1, time_cond_proj_dim=4,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    with pytest.raises(UserError, match="guidance scale as an input"):
        original_unet(unet)
    unet.time_embedding.cond_proj.weight.data.zero_()
    assert not any("cond_proj" in k for k in original_unet(unet))
