"""The whole life of every script on tiny stock pipelines: train, stop, resume, export, lint the card, open with stock diffusers, sample."""
import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "train_scripts")]
from tiny import TINY, tiny_pixel, tiny_sd  # noqa: E402

from zoo import registry  # noqa: E402
from zoo.hub.card import lint  # noqa: E402
from zoo.run import Run  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiny teachers, an image folder with captions, and a prompts file."""
    root = tmp_path_factory.mktemp("tiny")
    tiny_sd(root / "sd")
    tiny_pixel(root / "pixel")
    (root / "images").mkdir()
    g = np.random.default_rng(0)
    rows = []
    for i in range(40):
        Image.fromarray(g.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(root / "images" / f"{i:03d}.png")
        rows.append({"file_name": f"{i:03d}.png", "caption": f"noto picture {i}", "label": i % 4})
    (root / "images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "prompts.txt").write_text("a red heart\na blue cat\n\na green tree\n")
    return root


@pytest.fixture(autouse=True)
def little_measured(monkeypatch):
    """Eight samples against a teacher of four steps: what is measured and drawn stays the same, in a third of the time."""
    from zoo import watch
    for name, value in {"TEACHER_STEPS": 4, "PROMPTS": 4, "SEEDS": 2}.items():
        monkeypatch.setattr(watch, name, value)


# Every script with two families, the first three with every form of each; one case of those three is in the fast suite.
FIRST = ("dmd", "lcm", "meanflow")
FORMS = [("sd", 4), ("pixel", 0), ("sd", 0), ("pixel", 4)]
IMAGE_METHODS = [m for m in registry.methods() if m.modality == "image"]
CASES = [pytest.param(m.name, *form, id=f"{m.name}-{form[0]}-{'lora' if form[1] else 'full'}", marks=[] if m.name in FIRST and i % 2 == j else pytest.mark.slow)
         for i, m in enumerate(IMAGE_METHODS) for j, form in enumerate(FORMS if m.name in FIRST else FORMS[:2])]


@pytest.mark.parametrize("name,family,lora", CASES)
def test_life(world, tmp_path, name, family, lora):
    from diffusers import DiffusionPipeline
    script = importlib.import_module(f"train_{name}")
    needs_images = registry.method(name).needs.startswith("images")
    cfg = script.Config(teacher=str(world / family), data=str(world / ("images" if needs_images else "prompts.txt")) if family == "sd" or needs_images else "",
                        batch=4, steps=2, lora=lora, time_budget=0, output_dir=str(tmp_path / "run"), sample_every=2, measure_every=2, checkpoint_every=1,
                        gradient_checkpointing=bool(lora) and family == "sd", mixed_precision="no", guidance=2.0,
                        report_to="tensorboard" if lora else "none", **TINY.get(name, {}))
    run = script.main(cfg)
    pristine = {k: v.clone() for k, v in DiffusionPipeline.from_pretrained(str(world / family)).unet.state_dict().items()}
    base = {k.replace(".base_layer", ""): v for k, v in run.model.module.state_dict().items() if "lora_" not in k and "cond_proj" not in k}
    assert all(torch.equal(base[k], pristine[k].float()) for k in pristine if "cond_proj" not in k)      # the frozen base kept its bits
    resumed = script.main(dataclasses.replace(cfg, steps=4))
    assert (run.step, resumed.step) == (2, 4)
    out = tmp_path / "run"
    assert len(list((out / "samples").glob("*.png"))) >= 2 and (out / "measured.json").exists()
    assert bool(list(out.rglob("events.out.tfevents*"))) == bool(lora)
    student = out / "student"
    assert lint(student) == []
    pipe = DiffusionPipeline.from_pretrained(str(student))
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a red heart"} if family == "sd" else {"class_labels": 1}
    steps = run.watcher.contract.steps
    for k in steps:
        picture = pipe(**call, num_inference_steps=k, generator=torch.Generator().manual_seed(0), output_type="np").images
        assert np.isfinite(picture).all()
    if family == "sd" and run.watcher.contract.sampler != "ode":      # DDIM takes any number of steps
        with pytest.raises(ValueError):
            pipe(**call)                                    # 50 steps: refused by the stock scheduler, not sampled wrongly
    second = script.main(dataclasses.replace(cfg, steps=1, output_dir=str(tmp_path / "second"), init_student=str(student), report_to="none"))
    assert json.loads((tmp_path / "second/student/fewstep.json").read_text())["student"]["chain"] and second.step == 1


# ------------------------------------------------------------------------------------------------------------- killed, resumed
class Killed(BaseException):
    """Nothing catches it to save or to tidy up: what is left of the run is what lies on the disk."""


# What makes a script's state rich: critics with a head, averages, phases and warm-ups that the kill falls into.
RICH: dict[str, dict] = {
    "dmd": dict(gan=0.01), "tscd": dict(gan=0.1, stage_steps=2),
    "split_meanflow": dict(target_decay=0.9), "progressive": dict(guided_steps=1, first=4, last=2, phase_steps=3, ema=0.9),
    "rcm": dict(dmd_after=1), "ladd": dict(easy_steps=4), "dmd_pairs": dict(pairs=20, pair_steps=2), "reflow": dict(pairs=20, pair_steps=2),
    "sdtt": dict(teacher="toy", guidance=0.0, first=8, last=2, round_steps=3),
}


def everything(run) -> dict[str, torch.Tensor]:
    """All that training has moved: parameters of every trainee, averages, optimiser states, counters."""
    found = {"counters": torch.tensor([run.step, run.tick, *(t.updates for t in run.trainees.values())])}
    for name, t in run.trainees.items():
        found |= {f"{name}/{n}": p.detach() for n, p in t.params.items()}
        found |= {f"{name}/average {i}/{n}": v for i, (_, values) in enumerate(t.averages) for n, v in values.items()}
        for n, p in t.own.items():
            found |= {f"{name}/{key}/{n}": torch.as_tensor(v) for key, v in t.optimizer.state.get(p, {}).items()}
    return found


def contents(file: Path) -> dict:
    """Tensors as bytes, and metadata, whose order in the file is the library's own."""
    with safe_open(file, "pt") as f:
        return {"": f.metadata()} | {k: f.get_tensor(k).numpy().tobytes() for k in f.keys()}


# Self Forcing's is in tests/methods/test_self_forcing.py, on a tiny pipeline of its own.
@pytest.mark.parametrize("name, lora", [(m.name, 0) for m in registry.methods() if m.modality != "video"]
                         + [(n, 4) for n in ("dmd", "meanflow", "rcm", "tscd", "swiftbrush")])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, name, lora):
    """Left in the middle of step 3, after some of its networks have moved, with the checkpoint of step 2 on the disk: a new `main` goes on from there
    and ends where the run that nothing stopped ends. (test_run.py kills real processes, of three scripts.)"""
    from zoo import plan
    from zoo.backbones.toy import Toy
    script = importlib.import_module(f"train_{name}")
    monkeypatch.setattr(plan, "_activations", lambda *_: 0)  # an estimate of memory, which collects garbage
    flags = dict(batch=8, steps=5, guidance=2.0, checkpoint_every=2, time_budget=0, measure_every=0, sample_every=0, mixed_precision="no")
    flags |= RICH.get(name, {}) | ({"lora": lora} if lora else {})
    cfg = lambda folder: script.Config(output_dir=str(tmp_path / folder), **{"teacher": Toy(fit_steps=0, width=32)} | flags)
    whole = script.main(cfg("whole"))
    minimize = Run.minimize
    def dies(run, *args):
        minimize(run, *args)
        if run.step == 3:
            raise Killed
    with monkeypatch.context() as patched:
        patched.setattr(Run, "minimize", dies)
        with pytest.raises(Killed):
            script.main(cfg("killed"))
    assert [p.name for p in (tmp_path / "killed/checkpoints").iterdir()] == ["step-0000002"] and not (tmp_path / "killed/student").exists()
    torch.manual_seed(12345)                                 # a new process has another global generator
    resumed = script.main(cfg("killed"))
    a, b = everything(whole), everything(resumed)
    assert a.keys() == b.keys() and not [k for k in a if not torch.equal(a[k], b[k])]
    trained = [t for t in resumed.trainees.values() if t.updates]
    assert trained and all(any("/exp_avg_sq/" in k and k.startswith(f"{t.name}/") and a[k].any() for k in a) for t in trained)
    left = [sorted(p for p in (tmp_path / folder / "student").rglob("*.safetensors")) for folder in ("whole", "killed")]
    assert left[0] and all(contents(p) == contents(q) for p, q in zip(*left, strict=True))


def test_checkpointed_gradients_equal_plain_ones_with_roles_interleaved(world):
    """Activation checkpointing recomputes with the adapter of the forward pass, whatever ran since."""
    from zoo import backbones
    grads = {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = backbones.load(str(world / "sd"), data=str(world / "prompts.txt"))
        G, critic = (model.make(role, lora=4, gradient_checkpointing=checkpointing) for role in ("student", "critic"))
        for i, p in enumerate(p for net in (G, critic) for p in net.trainable().values()):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.05
        model.module.train()
        x = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(1))
        t = torch.full((2,), 0.6)
        cond = model.batches().get(torch.tensor([0, 1]))["cond"]
        y = G(x, t, cond)
        z = critic(y, t, cond)
        model.teacher(x, t, cond)                            # another role runs before backward
        z.square().mean().backward()
        grads[checkpointing] = [p.grad.clone() for p in G.trainable().values()]
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(grads[False], grads[True]))
    assert max(g.abs().max() for g in grads[True]) > 0       # through the critic to the student


def test_two_time_starts_as_the_teacher_and_reads_its_second_time(world):
    from zoo import backbones
    for family in ("sd", "pixel"):
        model = backbones.load(str(world / family), data=str(world / "prompts.txt"))
        net = model.make("student", two_time=True)
        cond = model.batches().get(torch.tensor([0, 1]))["cond"]
        x, t = torch.randn(2, *model.shape), torch.full((2,), 0.6)
        assert torch.equal(net(x, t, cond, r=t), model.teacher(x, t, cond))
        torch.nn.init.normal_(net.module.time_embedding.cond_proj.weight, std=0.1)
        assert not torch.allclose(net(x, t, cond, r=t), net(x, t, cond, r=0 * t), atol=1e-4)
        with pytest.raises(ValueError, match="two_time=True"):
            model.make("other")(x, t, cond, r=t)


def test_guidance_is_the_stock_pipelines_own(world):
    """losses.guided at w equals the stock pipeline's classifier-free step at guidance_scale=w."""
    from diffusers import StableDiffusionPipeline

    from zoo import backbones, losses
    model = backbones.load(str(world / "sd"), data=str(world / "prompts.txt"))
    pipe = StableDiffusionPipeline.from_pretrained(str(world / "sd"))
    pipe.set_progress_bar_config(disable=True)
    noise, seen = torch.randn(1, *model.shape), {}
    def keep(p, i, t, kwargs):
        seen.setdefault("x1", kwargs["latents"].clone())
        return kwargs
    pipe("a blue cat", latents=noise, num_inference_steps=4, guidance_scale=3.5, output_type="latent", callback_on_step_end=keep,
         callback_on_step_end_tensor_inputs=["latents"])
    t, r = torch.tensor([1.0]), torch.tensor([0.75])
    cond, uncond = {"prompt": model.encode_prompts(["a blue cat"])}, {"prompt": model.encode_prompts([""])}
    v = losses.guided(model.teacher, noise, t, cond, uncond, 3.5, to="v")
    mine = model.process.step(*model.process.pair(v, noise, t, "v"), r)
    assert torch.allclose(mine, seen["x1"], atol=1e-4)
