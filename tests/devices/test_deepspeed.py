"""DeepSpeed's ZeRO-2 and ZeRO-3: their configurations as accelerate reads them, what is refused, and runs on two ranks against one without DeepSpeed."""
import contextlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import train_dmd
import train_lcm
import train_progressive
import train_scm
import train_tscd
import train_twinflow
import yaml
from launching import CONFIGS, arguments, environment, torchrun
from test_ranks import alone, distance, few_samples, files, options, teachers  # noqa: F401  (fixtures)

from zoo import deepspeed, sharding
from zoo.errors import UserError

ZERO2, ZERO3 = "deepspeed_zero2.yaml", "deepspeed_zero3.yaml"
QUIET = dict(teacher="toy", batch=16, steps=1, time_budget=0, sample_every=0, measure_every=0, export="last")
# (name, method, options): accumulation, an average read every step, clipping that bites; adapters; forward-mode derivatives with decay of weights;
# a rate that falls to the end of a phase and Adam's states cleared there, one trainee never minimised; a UNet with recomputed activations; calls on some rows.
COMPARED = {ZERO2: [("lcm", "lcm", dict(grid=10, accumulate=2, max_grad_norm=0.05)), ("lora", "lcm", dict(grid=10, lora=4, ema=0.0)),
            ("jvp", "meanflow", dict(derivative="jvp", weight_decay=0.01)), ("phases", "progressive", dict(guided_steps=2, first=4, last=2, phase_steps=2)),
            ("unet", "reflow", dict(teacher="sd", gradient_checkpointing=True, pairs=6, pair_steps=2)), ("rows", "twinflow", dict()),
            ("calls", "flow_map", dict()), ("scm", "scm", dict(h=0.02)), ("split", "split_meanflow", dict()), ("tscd", "tscd", dict()),
            ("arcflow", "arcflow", dict()), ("sdtt", "sdtt", dict(first=8, last=4, round_steps=1))],
            # every method it takes: accumulation and clipping; adapters in parts and their average; several calls in one loss; differences in
            # time (wide ones: narrow ones are at the last bits of the values); recomputed activations, of adapters on a frozen base too.
            ZERO3: [("lcm", "lcm", dict(grid=10, accumulate=2, max_grad_norm=0.05)), ("lora", "lcm", dict(grid=10, lora=4)),
                    ("calls", "flow_map", dict()), ("meanflow", "meanflow", dict(h=0.02)), ("scm", "scm", dict(h=0.02)),
                    ("split", "split_meanflow", dict()), ("tscd", "tscd", dict()),
                    ("watched", "lcm", dict(grid=10, measure_every=2, sample_every=3, export="best", offload_averages=True)),
                    ("unet", "reflow", dict(teacher="sd", gradient_checkpointing=True, pairs=6, pair_steps=2)),
                    ("unet-lora", "reflow", dict(teacher="sd", gradient_checkpointing=True, pairs=6, pair_steps=2, lora=2))]}


@pytest.fixture
def told(monkeypatch):
    """The environment of the shipped configuration, as if DeepSpeed were installed."""
    for name, value in environment(ZERO2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(deepspeed, "imported", lambda: None)


def test_the_configuration_says_what_its_processes_are_told(told):
    args = arguments(ZERO2)
    assert (args.num_processes, args.num_machines, args.use_deepspeed, args.multi_gpu) == (8, 1, True, False)
    assert environment(ZERO2) == {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_MIXED_PRECISION": "no",
                                  "ACCELERATE_CONFIG_DS_FIELDS": ""}
    assert environment(ZERO3) == environment(ZERO2) | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert deepspeed.asked() == 2 and not sharding.asked()
    deepspeed.check(train_lcm.Config())
    with deepspeed.hidden():
        assert not deepspeed.asked()
    assert deepspeed.asked()


@pytest.mark.parametrize("config", [ZERO2, ZERO3])
def test_every_line_of_the_configuration_counts(config):
    args, lines = vars(arguments(config)), yaml.safe_load((CONFIGS / config).read_text())
    lines |= lines.pop("deepspeed_config")
    for key in lines.keys() - {"compute_environment", "distributed_type"}:
        assert str(args[key]).lower() == str(lines[key]).lower(), key


@pytest.mark.parametrize("name, value, words", [
    ("DEEPSPEED_ZERO_STAGE", "1", "zero_stage 1.*deepspeed_zero2.yaml"), ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "--offload_averages"),
    ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu", "offload_param_device"), ("GRADIENT_ACCUMULATION_STEPS", "4", "--accumulate"),
    ("GRADIENT_CLIPPING", "1.0", "--max_grad_norm"), ("DEEPSPEED_CONFIG_FILE", "ds.json", "deepspeed_zero2.yaml")])
def test_settings_that_cannot_be_honoured_are_refused(told, monkeypatch, name, value, words):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UserError, match=words):
        deepspeed.check(train_lcm.Config())


def test_flags_and_methods_that_cannot_be_honoured_are_refused(told, tmp_path):
    for flags, words in ((dict(optimizer="adafactor"), "use adamw"), (dict(mixed_precision="fp16"), "bf16")):
        with pytest.raises(UserError, match=words):
            train_lcm.main(train_lcm.Config(output_dir=str(tmp_path / "lcm"), **QUIET, **flags))
    with pytest.raises(UserError, match="dmd trains student and critic here.*8gpu_fsdp2.yaml"):
        train_dmd.main(train_dmd.Config(output_dir=str(tmp_path / "dmd"), **QUIET))
    with pytest.raises(UserError, match="tscd trains student and critic"):           # with its critic only
        train_tscd.main(train_tscd.Config(output_dir=str(tmp_path / "tscd"), gan=0.1, **QUIET))


@pytest.mark.parametrize("script, more, words", [(train_lcm, {}, ""), (train_scm, dict(derivative="jvp"), "no forward mode.*--derivative fd"),
                                                 (train_twinflow, {}, "twinflow.*deepspeed_zero2"), (train_progressive, {}, "progressive.*deepspeed_zero2")])
def test_what_zero_3_cannot_do_is_refused(told, monkeypatch, script, more, words):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        deepspeed.check(script.Config(**more))


def test_a_missing_deepspeed_is_named_with_its_remedy(tmp_path, monkeypatch):
    for name, value in environment(ZERO2).items():
        monkeypatch.setenv(name, value)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "deepspeed" else find(name, *more))
    with pytest.raises(UserError, match="pip install 'deepspeed.*8gpu_fsdp2.yaml"):
        train_lcm.main(train_lcm.Config(output_dir=str(tmp_path), **QUIET))


def compared(config: str, jobs: list, folder: Path, teachers: Path, back: bool = False) -> dict[str, float]:
    """The largest distance between each run on one rank without DeepSpeed (folder/one) and the same on two ranks with it (folder/two), at equal
    global batch: parameters, averages and optimiser states; the students that leave agree too. back: the first job's run of one rank goes on,
    too, on two, for two more steps (folder/two/back)."""
    pytest.importorskip("deepspeed")
    from safetensors.torch import load_file
    one, two, cut = folder / "one", folder / "two", config == ZERO3
    planned = {name: alone(method, options(one, teachers, name, more)).estimate.roles["student"] for name, method, more in jobs}
    job = lambda name, method, more, **others: {"method": method, "sharded": cut, "zero": True, "options": options(two, teachers, name, more, **others)}
    launched = [job(*each) for each in jobs]
    if back:
        shutil.copytree(one / jobs[0][0], two / "back")
        launched.append(job("back", *jobs[0][1:], steps=8))
    out = torchrun(config, launched)
    roles = {Path(row["run"]).name: row["roles"]["student"] for row in (json.loads(line[5:]) for line in out.splitlines() if line.startswith("done "))}
    apart = {}
    for name, _, _ in jobs:
        whole = planned[name] | {"weights": planned[name]["weights"] + planned[name]["gradient"]}           # a copy is stepped
        for part in ("optimizer", "weights", "averages") if cut else ("optimizer",):           # a half, and what fills up odd ones
            assert roles[name][part] <= 0.5 * whole[part] + 2048 * cut + 128, (name, part)
        assert roles[name]["activations"] == pytest.approx(planned[name]["activations"] / 2, rel=0.02)
        apart[name] = distance(files(one / name), files(two / name))
        students = [load_file(next((folder / name / "student").rglob("*.safetensors"))) for folder in (one, two)]
        assert students[0].keys() == students[1].keys() and all((v - students[1][k]).abs().max() < 2e-4 for k, v in students[0].items()), name
    return apart


@pytest.mark.slow
@pytest.mark.parametrize("config", [ZERO2, ZERO3])
def test_two_ranks_with_deepspeed_train_as_one_without(config, tmp_path, teachers):  # noqa: F811
    """And a checkpoint of two ranks goes on on one without DeepSpeed, and back. What .ci/run runs after it installed DeepSpeed."""
    one, two = tmp_path / "one", tmp_path / "two"
    apart = compared(config, COMPARED[config][:1], tmp_path, teachers, back=True)
    for where in (one, two):
        alone("lcm", options(where, teachers, "lcm", COMPARED[config][0][2], steps=8))
    apart["2 to 1"], apart["1 to 2"] = distance(files(one / "lcm"), files(two / "lcm")), distance(files(one / "lcm"), files(two / "back"))
    print(apart)
    assert max(apart.values()) < 2e-4, apart


@pytest.mark.slow
@pytest.mark.parametrize("config", [ZERO2, ZERO3])
def test_other_methods_and_adapters_with_deepspeed(config, tmp_path, teachers):  # noqa: F811
    """And stock diffusers open the student that the ranks put together."""
    from diffusers import DiffusionPipeline
    apart = compared(config, COMPARED[config][1:], tmp_path, teachers)
    print(apart)
    assert max(apart.values()) < 2e-4, apart
    DiffusionPipeline.from_pretrained(tmp_path / "two" / "unet" / "student")


@pytest.mark.slow
def test_what_a_step_does_not_use_stays_under_zero_3(tmp_path, teachers):  # noqa: F811
    """Not moved by the gradient of an earlier step. And bf16 trains; a loss that is not finite ends the run."""
    pytest.importorskip("deepspeed")
    import torch
    more = dict(betas=(0.0, 0.999), steps=4)
    run = lambda where, name="rare", more=more: options(tmp_path / where, teachers, name, more)
    job = lambda method, given: {"method": method, "sharded": True, "zero": True, "options": given}
    alone("now_and_then", run("one"))
    half = run("two", "half", dict(grid=10, mixed_precision="bf16", steps=4))
    torchrun(ZERO3, [job("now_and_then", run("two")), job("lcm", half)])
    moved = [v for name, values in files(tmp_path / "two" / "half").items() if "::" not in name for v in values.values()]
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in moved)
    with pytest.raises(AssertionError, match="not finite"):
        torchrun(ZERO3, [job("now_and_then", run("two", "poisoned", more | {"poisoned": True}))])
    one, two = (files(tmp_path / where / "rare")["student.safetensors"] for where in ("one", "two"))
    assert one.keys() == two.keys() and max((v - two[k]).abs().max().item() for k, v in one.items()) < 2e-4
