"""The MMDiT and video families on tiny random pipelines: the teacher is the stock network, guidance is the stock pipeline's own step by
step, the second time starts as nothing, and a run's whole life ends in a folder stock diffusers samples as the trainer does."""
import dataclasses
import functools
import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "train_scripts")]
import last_layer  # noqa: E402
import tiny_b  # noqa: E402

from zoo import backbones, loading, losses, rollout, watch  # noqa: E402
from zoo.errors import UserError  # noqa: E402
from zoo.hub.contract import contract_for  # noqa: E402
from zoo.hub.export import export_student  # noqa: E402
from zoo.process import TrigFlow, view  # noqa: E402

FAMILIES = list(tiny_b.BUILDERS)
TEACHERS = [*FAMILIES, *tiny_b.MEMBERS]
VIDEO = {"wan", "cogvideox", "ltx"}
PROMPTS = ["a red heart", "a blue cat and a green tree"]
# What the stock call is told to guide at w, in the pipeline's own words.
GUIDED = {"qwen_image": lambda w: {"true_cfg_scale": w, "negative_prompt": " "}, "zimage": lambda w: {"guidance_scale": w - 1}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiny teachers, an image folder with captions, and a prompts file."""
    root = tmp_path_factory.mktemp("flow")
    for teacher in TEACHERS:
        tiny_b.build(teacher, root / teacher)
    (root / "images").mkdir()
    g, rows = np.random.default_rng(0), []
    for i in range(12):
        Image.fromarray(g.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(root / "images" / f"{i:03d}.png")
        rows.append({"file_name": f"{i:03d}.png", "caption": f"a {tiny_b.WORDS[i % 3]} {tiny_b.WORDS[3 + i % 4]}"})
    (root / "images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "prompts.txt").write_text("a red heart\na blue cat\n\na green tree\n")
    return root


def opened(world, family, folder=None):
    return backbones.load(str(folder or world / family), data=str(world / "prompts.txt"))


def given(model, n=2, seed=0):
    """(x, t, cond, uncond) of n prompts."""
    g = torch.Generator().manual_seed(seed)
    uncond = {k: v.expand(n, *v.shape[1:]) for k, v in model.unconditional().items()}
    return torch.randn(n, *model.shape, generator=g), torch.tensor([0.9, 0.35])[:n], model.conditions(PROMPTS[:n]), uncond


class Recorded:
    """A stock pipeline's own loop: what its scheduler was given and gave back, step by step, in the adapter's layout.

    steps: (output, timestep [B], x, next x)."""

    def __init__(self, model, pipe, **call):
        pipe.set_progress_bar_config(disable=True)
        step, self.steps = pipe.scheduler.step, []

        @functools.wraps(step)               # the pipelines look at its signature
        def recorded(output, timestep, sample, *args, **kwargs):
            after = step(output, timestep, sample, *args, **kwargs)
            mine = (from_stock(model, z.clone()) for z in (output, sample, after[0]))
            self.steps.append((next(mine), timestep.expand(len(sample)), *mine))
            return after
        pipe.scheduler.step = recorded
        shape = {k: v for k, v in model.stock_call.items() if k != "guidance_scale"}
        try:
            pipe(prompt=list(PROMPTS), output_type="latent", generator=torch.Generator().manual_seed(3), **shape | call)
        finally:
            del pipe.scheduler.step


def from_stock(model, z):
    """A stock loop's latents in the adapter's layout."""
    pipe, factor = model.pipe, getattr(model.pipe, "vae_scale_factor", 1)
    if model.family == "flux":
        return pipe._unpack_latents(z, *(n * factor for n in model.shape[-2:]), factor)
    if model.family == "qwen_image":
        return pipe._unpack_latents(z, *(n * factor for n in model.shape[-2:]), factor)[:, :, 0]
    if model.family == "flux2":
        c, h, w = model.shape
        return pipe._unpatchify_latents(z.permute(0, 2, 1).reshape(len(z), c * 4, h // 2, w // 2))
    if model.family == "cogvideox":
        return z.transpose(1, 2)
    if model.family == "ltx":
        return pipe._unpack_latents(z, *model.shape[1:], 1, 1)
    return z


# ---------------------------------------------------------------------------------------------------- what the teacher is
@pytest.mark.parametrize("family", TEACHERS)
def test_unguided_stock_loop_is_the_teacher_bit_for_bit(world, family):
    """Every step of the stock pipeline without guidance is one call of the teacher and of a fresh student, with the same bits."""
    model = opened(world, family)
    call = {} if family == "qwen_image" else {"guidance_scale": 3.5 if family == "flux" else 0.0 if family == "zimage" else 1.0}
    stock = Recorded(model, model.pipe, num_inference_steps=3, **call)
    student = model.make("student")
    lora = opened(world, family).make("student", lora=2)
    cond = model.conditions(PROMPTS)
    assert len(stock.steps) == 3 and stock.steps[0][2].std() > 0.5
    with torch.no_grad():
        for output, timestep, x, _ in stock.steps:
            for net in (model.teacher, student, lora):
                net.process.timestep = lambda _t: timestep             # the loop's own bits, without a division and back
                assert torch.equal(net(x, timestep / 1000, cond, to=model.pred), output)


@pytest.mark.parametrize("family", TEACHERS)
def test_guidance_is_the_stock_pipelines_own(world, family):
    """losses.guided at w is what the stock pipeline hands its scheduler at every step of its own guided loop."""
    model, w = opened(world, family), 4.0
    stock = Recorded(model, model.pipe, num_inference_steps=3, **GUIDED.get(family, lambda w: {"guidance_scale": w})(w))
    cond = model.conditions(PROMPTS)
    uncond = {k: v.expand(2, *v.shape[1:]) for k, v in model.unconditional().items()}
    with torch.no_grad():
        for output, timestep, x, _ in stock.steps:
            t = model.process.from_timestep(timestep.float())
            mine = losses.guided(model.teacher, x, t, cond, uncond, w, to=model.pred)
            torch.testing.assert_close(mine, output, atol=2e-5 * float(output.abs().max()), rtol=0)
            plain = model.teacher(x, t, cond, to=model.pred)
            assert (plain - output).abs().max() > 1e-3 * output.abs().max()           # or the test would prove nothing


@pytest.mark.parametrize("family", TEACHERS)
def test_a_head_reads_what_the_output_layer_reads(world, family):
    model = opened(world, family)
    last_layer.check(model, model.conditions(PROMPTS))


# ------------------------------------------------------------------------------------------------------- the second time
@pytest.mark.parametrize("family", [f if f in ("sd3", "flux2", "zimage", "wan", "wan22_ti2v", "cogvideox") else pytest.param(f, marks=pytest.mark.slow)
                                    for f in TEACHERS])
def test_two_time_starts_as_the_teacher(world, tmp_path, family):
    """r = t is the teacher's reading with the same bits; changed weights read r; the folder holds the r = 0 fold, and says where the rest is."""
    from diffusers import DiffusionPipeline

    model = opened(world, family)
    net = model.make("student", two_time=True)
    x, t, cond, _ = given(model)
    with torch.no_grad():
        assert torch.equal(net(x, t, cond, r=t), model.teacher(x, t, cond)) and torch.equal(net(x, t, cond), model.teacher(x, t, cond))
        for part in getattr(net.module.time_embedding, "parts", [net.module.time_embedding]):
            torch.nn.init.normal_(part.cond_proj.weight, std=0.3)
        at_zero = net(x, t, cond, r=0 * t, to=model.pred)
        assert not torch.allclose(net(x, t, cond, r=t, to=model.pred), at_zero, atol=1e-3)
    contract = contract_for(model, (1.0,), "jump")
    folder = export_student(model, net, tmp_path / "student", contract)
    assert json.loads((folder / "fewstep.json").read_text())["student"]["slot"] == "r" and (folder / "two_time").is_dir()
    stock = opened(world, family, folder)
    module = DiffusionPipeline.from_pretrained(str(folder)).transformer
    with torch.no_grad():
        fold = stock.forward(module, x, model.process.timestep(t), cond)
    torch.testing.assert_close(fold, at_zero, atol=1e-5 * float(at_zero.abs().max()), rtol=0)
    if family == "sd3":
        assert torch.isfinite(loading.load(folder, two_time=True)(PROMPTS, num_inference_steps=2, output_type="pt").images).all()


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("family", [f if f in ("flux2", "zimage", "wan22_ti2v") else pytest.param(f, marks=pytest.mark.slow) for f in TEACHERS])
def test_gradients_reach_the_second_time(world, family, lora):
    """The projection of r learns from the first step, with its own weights and through an adapter; after it r matters."""
    model = opened(world, family)
    net = model.make("student", two_time=True, lora=lora)
    x, t, cond, _ = given(model)
    own = {n: p for n, p in net.trainable().items() if "cond_proj" in n and "lora_A" not in n}     # the other half of an adapter waits for this one
    assert len(own) == len(getattr(net.module.time_embedding, "parts", [0]))
    net(x, t, cond, r=t / 2, to=model.pred).square().mean().backward()
    assert all(p.requires_grad and p.grad.abs().max() > 0 for p in own.values())
    with torch.no_grad():
        for p in own.values():
            p -= 100 * p.grad
        assert not torch.equal(net(x, t, cond, r=t / 2), net(x, t, cond))
        if lora:                             # of the one network that the roles share, the teacher's reading is as before
            assert torch.equal(model.teacher(x, t, cond), opened(world, family).teacher(x, t, cond))


def test_a_constant_of_time_without_biases(world):
    """FLUX.2 embeds its time without a bias; its 256 published time features hold a 1 all the same, at whole timesteps and between them."""
    from diffusers.models.embeddings import Timesteps
    model = opened(world, "flux2")
    for width in (256, model.module.config.timestep_guidance_channels):
        model.module.time_guidance_embed.time_proj = features = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        one = model.constant_of_time().float()
        seen = features(torch.linspace(0, 1000, 3333)) @ one
        assert (seen - 1).abs().max() < 2e-6 and one.norm() < 2


def test_a_network_without_a_time_embedding_is_refused_by_name(world):
    model = opened(world, "sd3")
    model.module.time_text_embed.timestep_embedder = None
    assert not model.takes_second_scalar
    with pytest.raises(UserError, match="no time embedding .* sd3 family"):
        model.make("student", two_time=True)


# ---------------------------------------------------------------------------------------------------- what leaves a run
def stir(net, seed=3):
    """Averages of a trained network: every trainable weight has a value of its own."""
    g = torch.Generator().manual_seed(seed)
    return net.reading({n: p.detach() + 0.05 * torch.randn(p.shape, generator=g) for n, p in net.trainable().items()})


@pytest.mark.parametrize("rule", ["renoise", pytest.param("ode", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [f if f in FAMILIES else pytest.param(f, marks=pytest.mark.slow) for f in TEACHERS])
def test_stock_diffusers_samples_the_exported_student_as_the_trainer(world, tmp_path, family, rule):
    """Every step count of the contract, with what the contract says to a stock call; the LoRA file on the stock teacher is the fused folder."""
    from diffusers import DiffusionPipeline
    model, lora = opened(world, family), 4 * (rule == "renoise")
    net = stir(model.make("student", lora=lora))
    contract = contract_for(model, (1.0, 0.75, 0.5, 0.25), rule)
    folder = export_student(model, net, tmp_path / "student", contract, lora_rank=lora)
    pipe = DiffusionPipeline.from_pretrained(str(folder))
    cond, ends = model.conditions(PROMPTS), {}
    assert set(contract.knots) == ({4} if (model.family, rule) == ("wan", "renoise") else {4, 2, 1})
    for k in contract.knots:
        torch.manual_seed(5)
        stock = Recorded(model, pipe, **contract.stock_call(k))
        assert [float(s[1][0]) for s in stock.steps] == pytest.approx(list(contract.knots[k]), abs=1e-3)
        g = torch.Generator().manual_seed(3)
        if family == "cogvideox":                        # its loop hands the generator to the scheduler; the others leave re-noising to the global one
            torch.randn(2, *model.shape, generator=g)
        else:
            g.manual_seed(5)
        fresh = lambda: from_stock(model, torch.randn(to_stock(model, stock.steps[0][2]).shape, generator=g))
        mine = rollout.sample(net, stock.steps[0][2], cond, contract.times(k, model.process), rule, fresh)
        ends[k] = stock.steps[-1][3]
        torch.testing.assert_close(mine, ends[k], atol=1e-4 * float(mine.abs().max()), rtol=0)
    if lora:
        teacher = DiffusionPipeline.from_pretrained(str(world / family), scheduler=pipe.scheduler)
        teacher.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
        torch.manual_seed(5)
        again = Recorded(model, teacher, **contract.stock_call(4) | ({} if family != "flux2" else {"guidance_scale": 1.0}))
        torch.testing.assert_close(again.steps[-1][3], ends[4], atol=1e-4 * float(ends[4].abs().max()), rtol=0)
    if family == "flux" and lora:                        # zoo.load tells the network the scale the student was trained at
        plain, heard = loading.load(folder), []
        plain.transformer.register_forward_pre_hook(lambda _m, _args, kwargs: heard.append(float(kwargs["guidance"][0])), with_kwargs=True)
        plain(PROMPTS[0], output_type="latent")
        assert heard == [model.guidance] * 4


def to_stock(model, x):
    """The shape of a stock loop's latents."""
    if model.family in ("flux", "qwen_image"):
        return model.pipe._pack_latents(x.contiguous(), *x.shape)
    if model.family == "flux2":
        return model.pipe._pack_latents(model.pipe._patchify_latents(x.contiguous()))
    return x.transpose(1, 2) if model.family == "cogvideox" else model.pipe._pack_latents(x, 1, 1) if model.family == "ltx" else x


# One alternating and one single-network script for each family, one of them with LoRA and the other with full weights; the rest of the matrix on request.
SINGLE = {f: "reflow" if f in VIDEO else "lcm" for f in FAMILIES}
CI = {(f, name, 4 * ((i + j) % 2)) for i, f in enumerate(FAMILIES) for j, name in enumerate((SINGLE[f], "dmd"))}
LIVES = [pytest.param(*case, id="-".join(map(str, case)), marks=[] if case == ("sd3", "dmd", 4) else pytest.mark.slow)
         for f in FAMILIES for name in ("dmd", SINGLE[f]) for lora in (4, 0) for case in [(f, name, lora)] if case in CI or os.environ.get("FAMILY_MATRIX")]
# The extra input of a member whose network embeds one time per token (the critic of dmd is told which step it judges), and two times.
LIVES += [pytest.param(*case, id="-".join(map(str, case)), marks=pytest.mark.slow)
          for case in (("wan22_ti2v", "dmd", 4), ("sd35_medium", "dmd", 0), ("flux2", "meanflow", 4), ("zimage", "meanflow", 0))]
# A head on the last layer.
LIVES += [pytest.param(*case, id="-".join(map(str, case)), marks=pytest.mark.slow) for case in (("qwen_image", "arcflow", 4), ("flux", "arcflow", 0))]


@pytest.mark.parametrize("family,name,lora", LIVES)
def test_life(world, tmp_path, monkeypatch, family, name, lora):
    from diffusers import DiffusionPipeline

    from zoo.hub.card import lint
    monkeypatch.setattr(type(opened(world, family)), "watched", (2, 2))
    monkeypatch.setattr(watch, "TEACHER_STEPS", 3)
    script = importlib.import_module(f"train_{name}")
    options = {"dmd": dict(critic_updates=1), "reflow": dict(pairs=4, pair_steps=2)}.get(name, {})
    data = world / ("images" if name in ("lcm", "meanflow") else "prompts.txt")
    cfg = script.Config(teacher=str(world / family), data=str(data), batch=2, steps=2, lora=lora, time_budget=0,
                        output_dir=str(tmp_path / "run"), sample_every=2, measure_every=2, checkpoint_every=1,
                        gradient_checkpointing=bool(lora), mixed_precision="no",
                        guidance=2.0, student_times=(1.0, 0.5), **options)
    run = script.main(cfg)
    pristine = DiffusionPipeline.from_pretrained(str(world / family)).transformer.state_dict()
    base = {k.replace(".base_layer", ""): v for k, v in run.model.module.state_dict().items() if "lora_" not in k and "cond_proj" not in k}
    assert all(torch.equal(base[k], v) for k, v in pristine.items())
    resumed = script.main(dataclasses.replace(cfg, steps=3))
    assert (run.step, resumed.step) == (2, 3)
    student, contract = tmp_path / "run/student", run.watcher.contract
    assert lint(student) == []
    pipe = DiffusionPipeline.from_pretrained(str(student))
    pipe.set_progress_bar_config(disable=True)
    moved = pipe.transformer.state_dict()
    assert any(not torch.equal(moved[k], v) for k, v in pristine.items())
    for k in contract.steps:
        out = pipe(prompt="a red heart", output_type="np", **contract.stock_call(k))
        assert np.isfinite(out.frames if run.model.family in VIDEO else out.images).all()
    if lora and name != "meanflow":          # the stock teacher has no layer for the adapter of a second time
        DiffusionPipeline.from_pretrained(str(world / family)).load_lora_weights(str(student), weight_name="pytorch_lora_weights.safetensors")
    second = script.main(dataclasses.replace(cfg, steps=1, output_dir=str(tmp_path / "second"), init_student=str(student)))
    assert second.step == 1


# ------------------------------------------------------------------------------------------------------- what is refused
def test_refusals(world, tmp_path):
    """Unsupported members of the families, and uses, are named."""
    with pytest.raises(UserError, match="embeds its guidance"):
        opened(world, "flux").make("student", guidance_embedding=True)
    with pytest.raises(UserError, match="prompts alone, and this method trains on captioned clips"):
        opened(world, "ltx").batches(images=True)
    tiny_b.build("wan", tmp_path / "wan", two_networks=True)
    with pytest.raises(UserError, match="A14B.*two networks.*use Wan 2.1 or Wan 2.2 TI2V-5B") as said:
        opened(world, "wan", tmp_path / "wan")
    assert "\n" not in str(said.value)
    tiny_b.build("flux", tmp_path / "schnell", guidance_embeds=False)
    schnell = opened(world, "flux", tmp_path / "schnell")
    assert schnell.guidance == 1 and schnell.stock_call.get("guidance_scale") is None
    x, t, cond, uncond = given(schnell)
    with pytest.raises(UserError, match="takes no guidance"):
        losses.guided(schnell.teacher, x, t, cond, uncond, 3.0)


def test_other_members(world, tmp_path):
    """Wan 2.2 TI2V (a time per token) is called as its stock pipeline does; distilled klein is read without guidance."""
    tiny_b.build("wan", tmp_path / "wan22", expand_timesteps=True)
    model = opened(world, "wan", tmp_path / "wan22")
    stock = Recorded(model, model.pipe, num_inference_steps=2, guidance_scale=1.0)
    output, timestep, x, _ = stock.steps[0]
    model.process.timestep = lambda _t: timestep
    with torch.no_grad():
        assert torch.equal(model.teacher(x, timestep / 1000, model.conditions(PROMPTS), to="velocity"), output)
        causal = model.causal()              # the family of train_self_forcing, frames first
        assert causal.family == "video" and causal.shape == (2, 4, 4, 4)
        causal.process.timestep = lambda _t: timestep[:, None].expand(-1, 8)
        seen = causal.teacher(x.transpose(1, 2), timestep / 1000, model.conditions(PROMPTS), to="velocity")
        assert torch.equal(seen.transpose(1, 2), output)
    tiny_b.build("flux2", tmp_path / "klein", is_distilled=True)
    assert opened(world, "flux2", tmp_path / "klein").guidance == 1


@pytest.mark.parametrize("family", ["qwen_image", "flux"])
def test_guidance_under_another_process(world, family):
    """A view of a teacher with a rule of its own is guided by that rule."""
    model = opened(world, family)
    x, t, cond, uncond = given(model)
    trig = TrigFlow()
    other = view(model.teacher, trig)
    angle = model.process.angle(t)
    with torch.no_grad():
        plain = losses.guided(model.teacher, x, t, cond, uncond, 3.0)
        norm = torch.hypot(1 - t, t).reshape(-1, 1, 1, 1)
        seen = losses.guided(other, x / norm, trig.time(angle), cond, uncond, 3.0)
    torch.testing.assert_close(seen, plain, atol=1e-4, rtol=1e-4)
