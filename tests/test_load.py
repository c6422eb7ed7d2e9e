"""Rows of the registry reach the actual call: local folders stand for the repositories, tiny random networks for the models."""
from __future__ import annotations

import functools
import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

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


# ------------------------------------------------------------------------------------------------------- every kind of row
def family(name: str, folder, **options):
    """A tiny pipeline of a family as a base model, its folder."""
    sys.path.insert(0, str(Path(__file__).parent / "backbones"))
    import tiny_a
    import tiny_b
    return (tiny_a if name in tiny_a.BUILDERS else tiny_b).build(name, folder, **options)


def lora_file(network, path, targets=("to_q", "to_k"), prefix="transformer", seed=1):
    """Save a LoRA of rank 2, alpha 4, for `network`; returns what it adds to each layer at scale 1."""
    g, state, delta, metadata = torch.Generator().manual_seed(seed), {}, {}, {f"{prefix}.r": 2, f"{prefix}.lora_alpha": 4}
    for name, layer in network.named_modules():
        if name.split(".")[-1] in targets and isinstance(layer, torch.nn.Linear):
            down, up = 0.3 * torch.randn(2, layer.in_features, generator=g), 0.3 * torch.randn(layer.out_features, 2, generator=g)
            state |= {f"{prefix}.{name}.lora_A.weight": down, f"{prefix}.{name}.lora_B.weight": up}
            delta[name] = 4 / 2 * up @ down
    metadata[f"{prefix}.target_modules"] = list(delta)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
    return delta


def added(network, before: dict, delta: dict, scale: float) -> None:
    """`network` holds its weights of `before`, and `scale` times the LoRA where it has one; nothing else moved."""
    for name, value in network.state_dict().items():
        change = scale * delta.get(name.removesuffix(".weight"), 0.0)
        torch.testing.assert_close(value, before[name] + change, atol=1e-5, rtol=1e-5)


TRANSFORMER_CALL = {"height": 16, "width": 16}
# row -> builder of its base model, the stock call's size, scheduler, timesteps of the plain call, samples in one call of the network (2 with guidance)
KINDS = {
    "hyper-sd.sdxl-4step": ("sdxl", {}, "DDIMScheduler", [999, 749, 499, 249], 1),
    "lcm-lora.sdxl": ("sdxl", {}, "LCMScheduler", [999, 759, 499, 259], 1),
    "tcd.sdxl": ("sdxl", {}, "TCDScheduler", [999, 759, 499, 259], 1),
    "dmd2.sdxl-4step-lora": ("sdxl", {}, "LCMScheduler", [999, 749, 499, 249], 1),
    "sdxl-lightning.4step-lora": ("sdxl", {}, "EulerDiscreteScheduler", [999, 749, 499, 249], 1),
    "pcm.sdxl-4step": ("sdxl", {}, "TCDScheduler", [999, 759, 499, 259], 1),
    "hyper-sd.sd3-4step": ("sd3", TRANSFORMER_CALL, "FlowMatchEulerDiscreteScheduler", [1000, 857, 602, 8], 2),        # as its base model's
    "tdm.sd3-4step": ("sd3", TRANSFORMER_CALL, "DPMSolverMultistepScheduler", None, 1),
    "hyper-sd.flux-8step": ("flux", TRANSFORMER_CALL | {"max_sequence_length": 12}, "FlowMatchEulerDiscreteScheduler", None, 1),
    "qwen-image-lightning.4step": ("qwen_image", TRANSFORMER_CALL, "FlowMatchEulerDiscreteScheduler", [1000, 900, 750, 500], 1),
    "wan2.1-lightx2v.t2v-14b-4step": ("wan", {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 12}, "UniPCMultistepScheduler", None, 1),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_lora_of_each_family_reaches_the_call(name, tmp_path, monkeypatch):
    """On a pipeline of the same class: scheduler, timesteps, guidance and scale of the plain call."""
    import diffusers
    builder, size, kind, times, batch = KINDS[name]
    base = family(builder, tmp_path / "base")
    row = registry.student(name)
    assert json.loads((base / "model_index.json").read_text())["_class_name"] == row.pipeline
    stock = diffusers.DiffusionPipeline.from_pretrained(base)
    part = "unet" if hasattr(stock, "unet") else "transformer"
    network = getattr(stock, part)
    before, own = {k: v.clone() for k, v in network.state_dict().items()}, stock.scheduler
    delta = lora_file(network, tmp_path / "few" / "a.safetensors", prefix=part)
    local(name, monkeypatch, teacher=str(base), source=str(tmp_path / "few"), file="a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe = zoo.load(name, dtype=torch.float32, allow_unverified=row.status != "verified")
        heard = Heard(pipe, "a red heart", part=part, **size)
    assert delta and row.lora_scale and type(pipe).__name__ == row.pipeline
    added(getattr(pipe, part), before, delta, row.lora_scale)
    assert type(pipe.scheduler).__name__ == kind and all(pipe.scheduler.config[k] == v for k, v in row.scheduler_config.items())
    if row.scheduler_alone:                           # nothing of the base model's own configuration is left, such as its shift
        assert all(pipe.scheduler.config[k] == row.scheduler_config.get(k, v) for k, v in type(pipe.scheduler)().config.items() if not k.startswith("_"))
    elif row.scheduler and part == "unet":
        assert pipe.scheduler.config.beta_schedule == own.config.beta_schedule == "scaled_linear"
    got = pipe.scheduler.timesteps.tolist()
    assert len(heard.batches) == len(got) == row.usual_steps and set(heard.batches) == {batch}
    assert times is None or [int(t + 0.01) for t in got] == times
    assert all(k.get("eta") == v for k in heard.steps for a, v in row.call.items() if a == "eta")
    if builder == "flux":                             # its guidance is an input of the network
        assert {float(t["guidance"][0]) for t in heard.told} == {3.5}
    if row.scheduler_config.get("flow_shift"):        # trailing or linear grids of the solver, moved by the row's shift
        assert max(got) >= 999 and got == sorted(got, reverse=True)


def test_a_lora_of_two_files_goes_to_two_networks(tmp_path, monkeypatch):
    """Wan 2.2: one file for the network of high noise, one for that of low noise; both samplings are heard."""
    from diffusers import WanPipeline
    base = family("wan", tmp_path / "base", two_networks=True)
    stock = WanPipeline.from_pretrained(base)
    parts = {"transformer": stock.transformer, "transformer_2": stock.transformer_2}
    before = {p: {k: v.clone() for k, v in m.state_dict().items()} for p, m in parts.items()}
    delta = {p: lora_file(m, tmp_path / "few" / f"{p}.safetensors", seed=i) for i, (p, m) in enumerate(parts.items())}
    name = "wan2.2-lightning.t2v-a14b-4step"
    row = local(name, monkeypatch, teacher=str(base), source=str(tmp_path / "few"), file="transformer.safetensors", second_file="transformer_2.safetensors")
    with pytest.raises(UserError, match="not verified"):
        zoo.load(name)
    pipe = zoo.load(name, dtype=torch.float32, allow_unverified=True)
    for p in parts:
        added(getattr(pipe, p), before[p], delta[p], row.lora_scale)
    heard = Heard(pipe, "a red heart", part="transformer", height=32, width=32, num_frames=5, max_sequence_length=12)
    assert len(heard.batches) == 4 and set(heard.batches) == {1} and pipe.guidance_scale == 1.0 and pipe._guidance_scale_2 == 1.0
    assert pipe.scheduler.config.flow_shift == 5.0 and type(pipe.scheduler).__name__ == "UniPCMultistepScheduler"


@pytest.mark.parametrize("name, times, config", [("dmd2.sdxl-4step", [999, 749, 499, 249], {"original_inference_steps": 4}), ("hyper-sd.sdxl-1step", [800], {}),
                                                 ("sdxl-lightning.1step", [999], {"prediction_type": "sample", "timestep_spacing": "trailing"})])
def test_a_unet_file_in_an_sdxl_pipeline(name, times, config, tmp_path, monkeypatch):
    from diffusers import UNet2DConditionModel
    base = family("sdxl", tmp_path / "base")
    state = {k: v + 0.01 for k, v in UNet2DConditionModel.from_pretrained(base, subfolder="unet").state_dict().items()}
    save_file(state, tmp_path / "unet.safetensors")
    row = local(name, monkeypatch, teacher=str(base), source=str(tmp_path), file="unet.safetensors")
    pipe = zoo.load(name)
    assert type(pipe).__name__ == row.pipeline == "StableDiffusionXLPipeline" and all(torch.equal(v, state[k]) for k, v in pipe.unet.state_dict().items())
    heard = Heard(pipe, "a red heart")
    assert heard.times == times and set(heard.batches) == {1} and all(pipe.scheduler.config[k] == v for k, v in config.items())


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
