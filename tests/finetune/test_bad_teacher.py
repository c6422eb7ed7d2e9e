"""What is wrong with a teacher, a precision or the memory is said in one line with a remedy, before or instead of training."""
from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/hub"), str(ROOT / "tests/backbones"), str(ROOT / "train_scripts")]
import tiny  # noqa: E402
import tiny_a  # noqa: E402
import tiny_b  # noqa: E402

from zoo import backbones, plan, run  # noqa: E402
from zoo.backbones import checks  # noqa: E402
from zoo.errors import UserError  # noqa: E402
from zoo.hub.contract import contract_for  # noqa: E402
from zoo.hub.export import export_student  # noqa: E402

LOAD = """
import json, sys
from zoo import backbones
from zoo.backbones.style import add_style
from zoo.errors import UserError
said = {}
for repo in sys.argv[1:]:
    try:
        backbones.load(repo)
        said[repo] = "opened"
    except UserError as error:
        said[repo] = str(error)
try:
    add_style(type("M", (), {"style": None, "pipe": 1, "name": "base"}), "me/gated")
except UserError as error:
    said["lora"] = str(error)
print("RESULT " + json.dumps(said))
"""


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    tiny.tiny_sd(root / "sd")
    (root / "prompts.txt").write_text("red heart\nblue star\n")
    return root


def one_line(match, call):
    with pytest.raises(UserError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- the Hub
@pytest.mark.slow
def test_gated_missing_private_and_other_repositories(tmp_path):
    from clients import Client
    from loopback import Loopback
    with Loopback() as hub:
        for name in ("gated", "private", "checkpoint"):
            hub.make(f"models/me/{name}")
            hub.write(f"models/me/{name}", "model.safetensors" if name == "checkpoint" else "model_index.json", b"{}")
        hub.write("models/me/gated", "style.safetensors", b"{}")
        hub.repos["models/me/gated"].gated, hub.repos["models/me/private"].private = True, True
        reader = Client(hub, tmp_path / "home", "hf_reader")
        out, err = reader.start(LOAD, "me/gated", "me/private", "me/missing", "me/checkpoint").communicate(timeout=120)
        said = json.loads(out.rpartition("RESULT ")[2])
    assert "me/gated is gated; accept its terms at https://huggingface.co/me/gated" in said["me/gated"] and "hf auth login" in said["me/gated"]
    for repo in ("me/private", "me/missing"):
        assert f"there is no {repo}, or it is private" in said[repo]
    assert "not a single checkpoint file" in said["me/checkpoint"] and "is gated" in said["lora"]
    assert all("\n" not in text for text in said.values())


def test_offline(monkeypatch):
    one_line("no network reaches it.*hf download user/name", lambda: backbones.load("user/name"))


# ------------------------------------------------------------------------------------------------------- distilled already
def test_a_student_as_teacher_is_refused_and_can_be_accepted(sd, tmp_path):
    import train_dmd
    model = backbones.load(str(sd / "sd"))
    assert checks.few_step_signs(model) == []
    folder = export_student(model, model.make("student"), tmp_path / "quick", contract_for(model, (1.0, 0.5)))
    cfg = train_dmd.Config(teacher=str(folder), data=str(sd / "prompts.txt"), output_dir=str(tmp_path / "run"), mixed_precision="no", dry_run=True)
    one_line("contract of a student of 1 or 2 steps.*--distilled_teacher", lambda: train_dmd.main(cfg))
    train_dmd.main(dataclasses.replace(cfg, distilled_teacher=True))


@pytest.mark.parametrize("name,config,sign", [
    ("user/model", {"_class_name": "x"}, None), ("ByteDance/SDXL-Lightning", {}, "of the registry"), ("me/my-lcm-style", {}, "named 'lcm'"),
    ("me/sdxl-turbo-anime", {}, "named 'turbo'"), ("me/dmdesign", {}, None), ("me/hyperrealism", {}, None), ("me/4-step-anime", {}, "named '4-step'")])
def test_signs_in_names(name, config, sign):
    from diffusers import DDIMScheduler
    model = SimpleNamespace(name=name, family="other", module=None, pipe=SimpleNamespace(scheduler=DDIMScheduler(), config={}))
    found = checks.few_step_signs(model)
    assert (found == []) if sign is None else sign in found[0]


def test_signs_in_parts(sd):
    from diffusers import LCMScheduler
    model = backbones.load(str(sd / "sd"))
    model.pipe.scheduler = LCMScheduler.from_config(model.pipe.scheduler.config)
    assert "LCMScheduler" in checks.few_step_signs(model)[0]
    klein = SimpleNamespace(name="x", family="flux2", pipe=SimpleNamespace(scheduler=None, config={"is_distilled": True}))
    assert checks.few_step_signs(klein) == ["is_distilled in its model_index.json"]
    for name in ("emoji", "fashion"):
        assert checks.few_step_signs(backbones.load(name)) == []


# ------------------------------------------------------------------------------------------------------- predictions
def test_a_student_of_another_prediction_is_named(sd, tmp_path):
    from diffusers import DiffusionPipeline
    model = backbones.load(str(sd / "sd"))
    folder = export_student(model, model.make("student"), tmp_path / "student", contract_for(model, (1.0, 0.5)))
    pipe = DiffusionPipeline.from_pretrained(sd / "sd")
    pipe.scheduler.register_to_config(prediction_type="epsilon", rescale_betas_zero_snr=False)
    pipe.save_pretrained(tmp_path / "eps")
    other = backbones.load(str(tmp_path / "eps"))
    one_line("predicts v_prediction and .* predicts epsilon", lambda: other.make("student", init=str(folder)))


def test_a_noise_network_under_a_v_scheduler_is_found(sd, capsys):
    """A network that returns its input is what an epsilon network is at pure noise."""
    model = backbones.load(str(sd / "sd"))
    x, cond = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0)), {"prompt": torch.zeros(2, 8, 16)}
    assert checks.look_at_noise(model, x, cond) < 0.9                  # random: neither
    model.forward = lambda module, x, timestep, cond: x + 0.1
    capsys.readouterr()
    one_line("says prediction_type v_prediction, but .* returns the noise", lambda: checks.look_at_noise(model, x, cond))
    model.pred = "eps"
    assert checks.look_at_noise(model, x, cond) > 0.9 and not capsys.readouterr().err
    model.forward = lambda module, x, timestep, cond: torch.ones_like(x)
    checks.look_at_noise(model, x, cond)
    assert "does not return the noise" in capsys.readouterr().err
    assert checks.look_at_noise(SimpleNamespace(pred="velocity"), x, cond) is None


# ------------------------------------------------------------------------------------------------------- precision, memory, clips
def test_a_precision_the_machine_lacks(sd, monkeypatch, tmp_path):
    import train_dmd
    one_line("needs a GPU", lambda: train_dmd.main(train_dmd.Config(teacher=str(sd / "sd"), mixed_precision="fp16", output_dir=str(tmp_path / "run"))))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)       # as torch answers on a T4
    one_line("Tesla T4 has no bf16: use --mixed_precision fp16", lambda: checks.refuse_precision("bf16"))
    checks.refuse_precision("fp16")
    checks.refuse_precision("no")


def test_out_of_memory_in_a_step_prints_the_estimate_and_three_ways_out(sd, monkeypatch, capsys, tmp_path):
    """Raised by a loss after the plan was made, through the command line's own wrapper; on a CPU in torch's words and Python's."""
    import train_dmd
    monkeypatch.setattr(sys, "argv", ["train_dmd.py", "--teacher", str(sd / "sd"), "--data", str(sd / "prompts.txt"), "--output_dir", str(tmp_path / "run"),
                                      "--mixed_precision", "no", "--batch", "2"])
    monkeypatch.setattr("zoo.watch.Watcher.begin", lambda self: None)

    def fail(*_args, **_kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    monkeypatch.setattr(train_dmd.critics, "denoising", fail)
    with pytest.raises(SystemExit) as stop:
        run.cli(train_dmd.main, train_dmd.Config)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1
    for needle in ("out of GPU memory", "GB held and", "GB free", "(1) a smaller --batch", "micro-batch is 2", "(2) --gradient_checkpointing", "(3) --lora 64"):
        assert needle in lines[0], needle
    cpu = "[enforce fail at alloc_cpu.cpp:113] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    for error in (MemoryError(), RuntimeError(cpu)):
        assert plan.out_of_memory(error).startswith("out of memory (") and "\n" not in plan.out_of_memory(error)


def test_other_runtime_errors_keep_their_traceback(monkeypatch):
    def fail(_cfg):
        raise RuntimeError("a bug")
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(RuntimeError, match="a bug"):
        run.cli(fail, run.RunConfig)
    assert plan.out_of_memory(RuntimeError("a bug")) == ""


def test_a_clip_shorter_than_a_chunk(tmp_path):
    import train_self_forcing
    folder = tiny_b.build("wan", tmp_path / "wan")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    cfg = train_self_forcing.Config(teacher=str(folder), data=str(tmp_path / "prompts.txt"), chunk=3, output_dir=str(tmp_path / "run"), mixed_precision="no")
    one_line("2 latent frames, fewer than one chunk of 3: choose --chunk 2 or less", lambda: train_self_forcing.main(cfg))


# ------------------------------------------------------------------------------------------------------- few prompts
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_one_prompt_is_enough(tmp_path, name):
    """A file of one prompt: the watcher has one condition to look at, and the run ends with a student and its report."""
    import train_dmd

    from zoo import watch
    folder = (tiny_a if name in tiny_a.BUILDERS else tiny_b).build(name, tmp_path / name)
    (tmp_path / "one.txt").write_text("a red heart\n")
    steps, watch.TEACHER_STEPS = watch.TEACHER_STEPS, 2
    try:
        done = train_dmd.main(train_dmd.Config(teacher=str(folder), data=str(tmp_path / "one.txt"), batch=2, steps=1, lora=2, time_budget=0, measure_every=1,
                                               sample_every=1, output_dir=str(tmp_path / "run"), mixed_precision="no", critic_updates=1, guidance=2.0))
    finally:
        watch.TEACHER_STEPS = steps
    assert done.step == 1 and done.watcher.n == 4
    json.loads((tmp_path / "run/measured.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert "over 1 prompts" in (tmp_path / "run/report.md").read_text()
