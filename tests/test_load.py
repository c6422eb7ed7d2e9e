"""Rows of the registry reach the actual call: local folders stand for the repositories, tiny random networks for the models."""
from __future__ import annotations

import functools
import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import tiny
import zoo
from zoo import loading, registry
from zoo.errors import UserError
from zoo.rows import Student

PROMPT = "red heart"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Stable Diffusion base model: epsilon prediction and a scheduler of another kind, as the real ones have."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
    folder = tiny.tiny_sd(tmp_path_factory.mktemp("base"))
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    """A folder with a LoRA file, and its rank-weighted product for one layer."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"]), "default")
    g = torch.Generator().manual_seed(1)
    for name, p in pipe.unet.named_parameters():
        if ".lora_" in name:
            p.data = 0.2 * torch.randn(p.shape, generator=g)
    layer = next(n for n, m in pipe.unet.named_modules() if n.endswith("attn1.to_q"))
    module = pipe.unet.get_submodule(layer)
    delta = 4 / 2 * module.lora_B["default"].weight @ module.lora_A["default"].weight
    folder = tmp_path_factory.mktemp("lora")
    state = get_peft_model_state_dict(pipe.unet)
    metadata = {"unet.r": 2, "unet.lora_alpha": 4, "unet.target_modules": ["to_q", "to_v"]}
    save_file({f"unet.{k}": v.contiguous() for k, v in state.items()}, folder / "a-lora.safetensors",
              {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
    return folder, layer, delta.detach(), module.base_layer.weight.detach().clone()


def local(name: str, monkeypatch, **changes) -> Student:
    """The registered row `name` with local places, registered in its stead."""
    row = replace(registry.student(name), **changes)
    monkeypatch.setattr(registry, "STUDENTS", tuple(row if s.name == name else s for s in registry.STUDENTS))
    return row


class Heard:
    """What reached the network (`part`) and the scheduler in one call of `pipe`."""

    def __init__(self, pipe, *args, part="unet", **kwargs):
        self.batches, self.times, self.told, self.steps = [], [], [], []
        scheduler, step = pipe.scheduler, pipe.scheduler.step

        def hear(module, given, named):
            x, t = named.get("hidden_states", given[0] if given else None), named.get("timestep", given[1] if len(given) > 1 else None)
            self.batches.append(len(x))
            self.times.append(int(t.flatten()[0]))
            self.told.append(named)

        @functools.wraps(step)              # pipelines ask its signature whether it takes an eta
        def hear_step(*a, **k):
            self.steps.append(k)
            return step(*a, **k)
        hooks = [m.register_forward_pre_hook(hear, with_kwargs=True) for n, m in pipe.components.items() if n in (part, f"{part}_2") and m is not None]
        scheduler.step = hear_step
        pipe.set_progress_bar_config(disable=True)
        try:
            pipe(*args, **({"output_type": "latent"} | kwargs))
        finally:
            scheduler.step = step
            for hook in hooks:
                hook.remove()


# name -> scheduler class, what its configuration must say, timesteps of the plain call
LORAS = {
    "hyper-sd.sd15-4step": ("DDIMScheduler", {"timestep_spacing": "trailing"}, [999, 749, 499, 249]),
    "hyper-sd.sd15-2step": ("DDIMScheduler", {"timestep_spacing": "trailing"}, [999, 499]),
    "hyper-sd.sd15-unified": ("TCDScheduler", {}, [999]),
    "tcd.sd15": ("TCDScheduler", {}, None),
    "lcm-lora.sd15": ("LCMScheduler", {"original_inference_steps": 50}, [999, 759, 499, 259]),
}


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_row_reaches_the_call(name, base, lora, monkeypatch):
    """Scheduler class and configuration, step count, timesteps, guidance and eta of `zoo.load(name)(prompt)`."""
    folder, layer, delta, weight = lora
    row = local(name, monkeypatch, teacher=str(base), source=str(folder), file="a-lora.safetensors")
    kind, config, times = LORAS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe = zoo.load(name)
        heard = Heard(pipe, PROMPT)
    assert type(pipe.scheduler).__name__ == kind and all(pipe.scheduler.config[k] == v for k, v in config.items())
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"                 # the base model's table stays
    assert len(heard.times) == row.usual_steps and (times is None or heard.times == times)
    assert set(heard.batches) == {1}                                               # no classifier-free guidance
    assert pipe.guidance_scale == row.guidance
    assert all(k.get("eta") == row.call["eta"] for k in heard.steps if "eta" in row.call)
    torch.testing.assert_close(pipe.unet.get_submodule(layer).weight, weight + row.lora_scale * delta)
    assert type(pipe).__name__ == "StableDiffusionPipeline" and not hasattr(pipe.unet, "peft_config")


@pytest.mark.parametrize("scale", [0.125, 0.5])
def test_the_lora_scale_is_in_the_weights(scale, base, lora, monkeypatch):
    folder, layer, delta, weight = lora
    local("hyper-sd.sd15-4step", monkeypatch, teacher=str(base), source=str(folder), file="a-lora.safetensors", lora_scale=scale)
    pipe = zoo.load("hyper-sd.sd15-4step")
    torch.testing.assert_close(pipe.unet.get_submodule(layer).weight, weight + scale * delta)


def file_of_weights(base, folder, seed=5):
    from diffusers import UNet2DConditionModel
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    g = torch.Generator().manual_seed(seed)
    state = {k: v + 0.01 * torch.randn(v.shape, generator=g) for k, v in unet.state_dict().items()}
    save_file(state, folder / "unet.safetensors")
    return state


@pytest.mark.parametrize("name, times", [("dmd2.sdxl-4step", [999, 749, 499, 249]), ("hyper-sd.sdxl-1step", [800]), ("sdxl-lightning.2step", [999, 499])])
def test_a_replaced_unet(name, times, base, tmp_path, monkeypatch):
    """A file of weights takes the place of the base model's, with the timesteps it was trained at."""
    state = file_of_weights(base, tmp_path)
    row = local(name, monkeypatch, teacher=str(base), source=str(tmp_path), file="unet.safetensors", pipeline="StableDiffusionPipeline")
    pipe = zoo.load(name)
    assert all(torch.equal(v, state[k]) for k, v in pipe.unet.state_dict().items())
    heard = Heard(pipe, PROMPT)
    assert heard.times == times and set(heard.batches) == {1} and type(pipe.scheduler).__name__ == row.scheduler


def test_the_one_step_lightning_network_predicts_x0(base, tmp_path, monkeypatch):
    file_of_weights(base, tmp_path)
    local("sdxl-lightning.1step", monkeypatch, teacher=str(base), source=str(tmp_path), file="unet.safetensors", pipeline="StableDiffusionPipeline")
    pipe = zoo.load("sdxl-lightning.1step")
    assert pipe.scheduler.config.prediction_type == "sample" and pipe.scheduler.config.timestep_spacing == "trailing"


def test_a_model_folder_with_a_guidance_input(base, tmp_path, monkeypatch):
    """lcm.sdxl: a whole UNet with time_cond_proj_dim, fed its scale of 8 without classifier-free guidance."""
    from diffusers import UNet2DConditionModel
    config = dict(UNet2DConditionModel.load_config(base, subfolder="unet")) | {"time_cond_proj_dim": 16}
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path, safe_serialization=True)
    local("lcm.sdxl", monkeypatch, teacher=str(base), source=str(tmp_path), pipeline="StableDiffusionPipeline")
    pipe = zoo.load("lcm.sdxl")
    heard = Heard(pipe, PROMPT)
    assert len(heard.times) == 4 and set(heard.batches) == {1} and pipe.guidance_scale == 8.0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Heard(pipe, PROMPT, guidance_scale=4.0)            # within the range it was trained for


def test_a_whole_pipeline_by_its_hub_id(base, monkeypatch):
    """sdxl-turbo: one step, trailing, ancestral, no guidance; the Hub id finds the row."""
    row = local("sdxl-turbo", monkeypatch, source="stabilityai/sdxl-turbo", pipeline="StableDiffusionPipeline")
    from diffusers import StableDiffusionPipeline
    stock = StableDiffusionPipeline.from_pretrained
    asked = {}

    def fetch(source, **options):
        asked.update(source=source, **options)
        return stock(base)
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", fetch)
    pipe = zoo.load("stabilityai/sdxl-turbo")
    assert asked["source"] == row.source and asked["use_safetensors"] and "trust_remote_code" not in asked
    heard = Heard(pipe, PROMPT)
    assert heard.times == [999] and set(heard.batches) == {1} and type(pipe.scheduler).__name__ == "EulerAncestralDiscreteScheduler"


def test_a_call_outside_the_contract_warns_once(base, lora, monkeypatch):
    local("hyper-sd.sd15-4step", monkeypatch, teacher=str(base), source=str(lora[0]), file="a-lora.safetensors")
    pipe = zoo.load("hyper-sd.sd15-4step")
    with pytest.warns(UserWarning, match="trained for 4 steps, not 3"):
        Heard(pipe, PROMPT, num_inference_steps=3)
    with pytest.warns(UserWarning, match="trained for guidance_scale=0, not 7.5"):
        heard = Heard(pipe, PROMPT, guidance_scale=7.5)
    assert set(heard.batches) == {2}                       # it warns and does as it was told
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Heard(pipe, PROMPT, num_inference_steps=3, guidance_scale=7.5)
        Heard(pipe, PROMPT, guidance_scale=1.0)            # no guidance, as 0 is


def test_true_guidance_arguments_are_named_by_the_row():
    """Qwen's pipelines take the scale as true_cfg_scale, and Wan's second transformer has one of its own."""
    from diffusers import QwenImagePipeline, WanPipeline
    for name, stock in (("qwen-image-lightning.4step", QwenImagePipeline), ("wan2.2-lightning.t2v-a14b-4step", WanPipeline)):
        row, said = registry.student(name), {}
        kind = loading._contracted(type("Spy", (stock,), {"__call__": _spy(stock, said)}))
        pipe = object.__new__(kind)
        object.__setattr__(pipe, "_terms", loading.Terms.of_row(row))
        object.__setattr__(pipe, "_warned", set())
        pipe("a fox")
        assert said[row.guidance_argument] == row.guidance == 1.0 and said["num_inference_steps"] == 4
        assert all(said[k] == v for k, v in row.call.items())


def _spy(stock, said):
    @functools.wraps(stock.__call__)
    def call(self, *args, **kwargs):
        said.update(kwargs)
    return call


@pytest.mark.parametrize("name", ["dmd2.sdxl-1step", "tdm.dreamshaper-4step"])
def test_pickles_are_refused_by_name(name):
    with pytest.raises(UserError, match=f"pickle only .{registry.student(name).file}"):
        zoo.load(name)


def test_what_the_hub_refuses_is_one_line_and_bugs_keep_theirs(base, monkeypatch):
    """Offline: a row's base model cannot be had. A state that does not fit is no matter of the network."""
    with pytest.raises(UserError, match="could not fetch tianweiy/DMD2 from the Hub"):
        zoo.load("dmd2.sdxl-4step-lora")

    def broken(*a):
        raise RuntimeError("size mismatch")
    monkeypatch.setattr(loading, "_assemble", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        zoo.load("dmd2.sdxl-4step-lora")


def test_unverified_rows_open_only_on_request(base, lora, monkeypatch):
    row = local("hyper-sd.sd15-4step", monkeypatch, teacher=str(base), source=str(lora[0]), file="a-lora.safetensors", status="unverified",
                note="nobody tried")
    with pytest.raises(UserError, match="not verified .nobody tried.: pass allow_unverified=True"):
        zoo.load(row.name)
    assert zoo.load(row.name, allow_unverified=True).unet is not None


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean hyper-sd.sdxl-4step"):
        zoo.load("hyper-sd.sdxl-4stp")
    with pytest.raises(UserError, match="unknown student"):
        zoo.load("./nothing/here")


def test_dtype_and_device_defaults(base, lora, monkeypatch):
    """float16 rows open in float32 on a CPU, bfloat16 rows as they are; what is asked for wins."""
    local("hyper-sd.sd15-4step", monkeypatch, teacher=str(base), source=str(lora[0]), file="a-lora.safetensors")
    assert zoo.load("hyper-sd.sd15-4step").unet.dtype == torch.float32
    assert zoo.load("hyper-sd.sd15-4step", dtype=torch.bfloat16).unet.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------- folders
def test_a_folder_saved_again_keeps_its_contract(tmp_path, base):
    """No record, but the contract in the scheduler's configuration."""
    from diffusers import LCMScheduler, StableDiffusionPipeline
    from zoo.hub.contract import Contract
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=2)
    pipe.scheduler.register_to_config(_fewstep=Contract({2: (999, 499), 1: (999,)}, prediction="epsilon").to_json())
    pipe.save_pretrained(tmp_path / "again")
    assert Heard(zoo.load(tmp_path / "again"), PROMPT).times == [999, 499]
    with pytest.raises(UserError, match="open it with DiffusionPipeline"):
        zoo.load(base)


def test_a_pickle_only_folder_is_refused(tmp_path, base):
    folder = tmp_path / "pickled"
    shutil.copytree(base, folder)
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(UserError, match="pickles only .*model.bin"):
        zoo.load(folder)


def test_a_rebuilt_student_says_how_it_is_made(monkeypatch, tmp_path):
    row = registry.rebuilt("dmd.toy-4step", "dmd", "toy", (4, 2, 1), "mit", "--teacher toy --steps 4", 0, {"torch": "2"}, ())
    monkeypatch.setattr(registry, "STUDENTS", (row,))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="zoo make dmd.toy-4step"):
        zoo.load("dmd.toy-4step")
    shipped = registry.shipped("dmd.gone", "dmd", "toy", (4,), "mit")
    monkeypatch.setattr(registry, "STUDENTS", (shipped,))
    with pytest.raises(UserError, match="install the package again"):
        zoo.load("dmd.gone")


def test_a_lora_repository_opens_on_its_teacher(tmp_path, base, lora):
    """The adapter, the scheduler and the record alone: the teacher is fetched by the name in the record."""
    from diffusers import LCMScheduler
    from zoo.hub.contract import Contract
    folder, layer, delta, weight = lora
    student = tmp_path / "lora-only"
    student.mkdir()
    shutil.copy(folder / "a-lora.safetensors", student / "pytorch_lora_weights.safetensors")
    contract = Contract({2: (999, 499), 1: (999,)}, prediction="epsilon", lora_scale=0.5)
    (student / "fewstep.json").write_text(json.dumps(contract.to_json() | {"student": {"family": "sd", "teacher": str(base), "slot": None, "lora_rank": 2}}))
    scheduler = LCMScheduler(original_inference_steps=2)
    scheduler.register_to_config(_fewstep=contract.to_json())
    scheduler.save_pretrained(student / "scheduler")
    pipe = zoo.load(student)
    torch.testing.assert_close(pipe.unet.get_submodule(layer).weight, weight + 0.5 * delta)
    assert Heard(pipe, PROMPT).times == [999, 499]
