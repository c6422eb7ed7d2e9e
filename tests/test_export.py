"""What leaves a run is what the trainer sampled: exported folders opened by stock diffusers in a process that has no package of ours.

Tolerance: 1e-5 on images in [0, 1] (measured here: about 1e-6; the stock tables are float32, the trainer's float64)."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

import tiny
from zoo import loading, rollout
from zoo.backbones import load
from zoo.backbones.toy import Toy
from zoo.errors import UserError
from zoo.hub.contract import Contract, contract_for, knots_for, scheduler_for
from zoo.hub.export import export_student, plain_state, read_record
from zoo.process import VP, RectifiedFlow, view

TOLERANCE = 1e-5
TIMES = (1.0, 0.75, 0.5, 0.25)
PROMPT, LABELS = "fluent red heart", [1, 3]
# name -> (teacher, options of make, options of the contract)
CASES = {
    "sd-full": ("sd", {}, {}),
    "sd-ode": ("sd", {}, {"rule": "ode"}),
    "sd-lora": ("sd", {"lora": 4}, {}),
    "sd-two": ("sd", {"two_time": True}, {"rule": "jump"}),
    "sd-two-lora": ("sd", {"two_time": True, "lora": 4}, {"rule": "jump"}),
    "sd-guided": ("sd", {"guidance_embedding": True}, {"guidance": 3.0, "guidance_range": (1.0, 8.0)}),
    "sd-folded": ("sd", {"guidance_embedding": True}, {"guidance": 3.0, "guidance_range": (1.0, 5.0)}),
    "pixel-full": ("pixel", {}, {}),
    "pixel-lora": ("pixel", {"lora": 4}, {}),
    "pixel-two": ("pixel", {"two_time": True}, {"rule": "jump"}),
    "pixel-guided": ("pixel", {"guidance_embedding": True}, {"guidance": 2.0}),
}

STOCK = """
import json, sys, numpy as np, torch
from diffusers import DiffusionPipeline
assert not any(m == "zoo" or m.startswith("zoo.") for m in sys.modules)
try:
    import zoo
    raise SystemExit("the package is importable here: the test would prove nothing")
except ImportError:
    pass
out, jobs = {}, json.loads(sys.argv[1])
for name, job in jobs.items():
    pipe = DiffusionPipeline.from_pretrained(job["folder"])
    pipe.set_progress_bar_config(disable=True)
    call = dict(output_type="np")
    what = (job["prompt"],) if job["prompt"] else ()
    if not what:
        call |= dict(class_labels=job["labels"], batch_size=len(job["labels"]))
    seeded = lambda: torch.Generator().manual_seed(7)
    for k in job["steps"]:
        out[f"{name}/{k}"] = pipe(*what, num_inference_steps=k, generator=seeded(), **call).images
    k = max(job["steps"])
    if what:
        for w in (0.0, 1.0, 3.0):
            out[f"{name}/w{w:g}"] = pipe(*what, num_inference_steps=k, generator=seeded(), guidance_scale=w, **call).images
        try:
            pipe(*what, generator=seeded(), **call)
            out[f"{name}/default"] = np.array("ran")
        except ValueError:
            out[f"{name}/default"] = np.array("raised")
    pipe.save_pretrained(job["again"])
    again = DiffusionPipeline.from_pretrained(job["again"])
    out[f"{name}/contract"] = np.array(json.dumps(again.scheduler.config["_fewstep"]))
    again.set_progress_bar_config(disable=True)
    out[f"{name}/again"] = again(*what, num_inference_steps=k, generator=seeded(), **call).images
    if job.get("lora"):
        teacher = DiffusionPipeline.from_pretrained(job["teacher"])
        teacher.set_progress_bar_config(disable=True)
        teacher.load_lora_weights(job["folder"], weight_name="pytorch_lora_weights.safetensors")
        teacher.scheduler = pipe.scheduler
        out[f"{name}/lora"] = teacher(*what, num_inference_steps=k, generator=seeded(), guidance_scale=1.0, **call).images
np.savez(sys.argv[2], **out)
"""


def stock(jobs: dict, out: Path) -> dict:
    """Run STOCK in a process outside the package, with remote code disabled; arrays by name."""
    import numpy as np
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH",)}
    env |= {"DIFFUSERS_DISABLE_REMOTE_CODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    block = "import sys; sys.modules['zoo'] = None\n"        # an installed package is not importable either
    script = block + STOCK.replace('assert not any(m == "zoo" or m.startswith("zoo.") for m in sys.modules)\n', "")
    done = subprocess.run([sys.executable, "-c", script, json.dumps(jobs), str(out)], env=env, cwd=out.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(out))


def stir(net, seed=3):
    """Give every trainable weight a value of its own, as averages: what the module itself holds must not be exported."""
    g = torch.Generator().manual_seed(seed)
    return net.reading({n: p.detach() + 0.05 * torch.randn(p.shape, generator=g) for n, p in net.trainable().items()})


def to_data(net):
    """A two-time net with its second time at 0."""
    def read(x, t, cond, **kw):
        return net(x, t, cond, r=torch.zeros_like(t), **kw)
    read.process = net.process
    return read


def trainer_images(model, net, contract, k):
    """Images [B, C, H, W] in [0, 1] of the trainer's own sampler, its numbers drawn in the stock pipeline's order."""
    g = torch.Generator().manual_seed(7)
    cond = {"prompt": model.encode_prompts([PROMPT])} if model.family == "sd" else {"label": torch.tensor(LABELS)}
    n = len(next(iter(cond.values())))
    if net.slot == "guidance":
        w = 7.5 if contract.guidance_range and contract.guidance_range[1] > 7.5 else contract.guidance
        cond["guidance"] = torch.full((n,), w)
    draw = lambda: randn_tensor((n, *model.shape), generator=g)
    reading = to_data(net) if net.slot == "r" else net
    rule = "ode" if contract.sampler == "ode" else "renoise"
    x = rollout.sample(reading, draw(), cond, contract.times(k, model.process), rule, draw)
    return (model.decode(x) / 2 + 0.5).clamp(0, 1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every case exported and sampled: name -> (model, net, contract, folder), and the stock process's arrays."""
    root = tmp_path_factory.mktemp("students")
    teachers = {"sd": tiny.tiny_sd(root / "sd"), "pixel": tiny.tiny_pixel(root / "pixel")}
    made, jobs = {}, {}
    for name, (teacher, options, terms) in CASES.items():
        model = load(str(teachers[teacher]))
        net = stir(model.make("student", **options))
        terms = dict(terms)
        contract = contract_for(model, TIMES, terms.pop("rule", "renoise"), **terms)
        net_out = view(net, RectifiedFlow()) if net.slot == "r" else net
        folder = export_student(model, net_out, root / name, contract, lora_rank=options.get("lora", 0))
        made[name] = (model, net, contract, folder)
        jobs[name] = {"folder": str(folder), "again": str(root / f"{name}-again"), "steps": list(contract.knots), "teacher": str(teachers[teacher]),
                      "prompt": PROMPT if teacher == "sd" else "", "labels": LABELS, "lora": name == "sd-lora"}
    return made, stock(jobs, root / "stock.npz")


@pytest.mark.parametrize("name", CASES)
def test_stock_diffusers_samples_as_the_trainer(exported, name):
    made, arrays = exported
    model, net, contract, _ = made[name]
    assert set(contract.knots) == {4, 2, 1}
    for k in contract.knots:
        ours = trainer_images(model, net, contract, k).permute(0, 2, 3, 1).numpy()
        theirs = arrays[f"{name}/{k}"]
        assert ours.std() > 0.01                    # a saturated picture would hide a difference
        assert abs(ours - theirs).max() < TOLERANCE, (name, k, abs(ours - theirs).max())


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("sd")])
def test_wrong_defaults(exported, name):
    _, arrays = exported
    assert arrays[f"{name}/default"] == ("ran" if name == "sd-ode" else "raised")       # DDIM takes any number of steps
    if name == "sd-guided":                          # this one listens to the scale
        assert (arrays[f"{name}/w1"] != arrays[f"{name}/w3"]).any()
    else:                                            # the default scale 7.5 is bit-equal to none
        for w in ("w0", "w1"):
            assert (arrays[f"{name}/4"] == arrays[f"{name}/{w}"]).all()


@pytest.mark.parametrize("name", CASES)
def test_contract_survives_resaving(exported, name):
    made, arrays = exported
    assert Contract.from_json(json.loads(str(arrays[f"{name}/contract"]))) == made[name][2]
    assert (arrays[f"{name}/again"] == arrays[f"{name}/4"]).all()
    assert read_record(made[name][3])[0] == made[name][2]


def test_lora_file_on_the_teacher_is_the_fused_folder(exported):
    _, arrays = exported
    assert abs(arrays["sd-lora/lora"] - arrays["sd-lora/4"]).max() < TOLERANCE


def test_no_local_paths_no_pickles(exported):
    for _, _, _, folder in exported[0].values():
        for path in folder.rglob("*"):
            assert path.suffix not in (".bin", ".pt", ".ckpt", ".pkl"), path
            if path.suffix == ".json":
                assert str(folder.parent) not in path.read_text(), path


@pytest.mark.parametrize("name", ["sd-full", "sd-lora", "sd-folded", "pixel-full"])
def test_load_fills_in_the_contract(exported, name):
    made, arrays = exported
    pipe = loading.load(made[name][3])
    pipe.set_progress_bar_config(disable=True)
    what = dict(prompt=PROMPT) if name.startswith("sd") else dict(class_labels=LABELS, batch_size=2)
    images = pipe(**what, output_type="np", generator=torch.Generator().manual_seed(7)).images
    assert (images == arrays[f"{name}/4"]).all()
    with pytest.warns(UserWarning, match="trained for 1, 2, 4 steps, not 3"):
        pipe(**what, num_inference_steps=3)


@pytest.mark.parametrize("name", ["sd-two", "sd-two-lora", "pixel-two", "sd-folded", "pixel-guided"])
def test_load_two_time(exported, name):
    """The network with its extra input, in the process it was trained in."""
    model, net, contract, folder = exported[0][name]
    pipe = loading.load(folder, two_time=True)
    what = dict(prompt=PROMPT) if model.family == "sd" else dict(class_labels=LABELS)
    for k in (1, 2, 4):
        images = pipe(**what, num_inference_steps=k, generator=torch.Generator().manual_seed(7), output_type="pt").images
        if net.slot == "guidance":
            expected = trainer_images(model, net, contract, k)
        else:
            cond = {"prompt": model.encode_prompts([PROMPT])} if model.family == "sd" else {"label": torch.tensor(LABELS)}
            noise = randn_tensor((len(images), *model.shape), generator=torch.Generator().manual_seed(7))
            x = rollout.sample(view(net, RectifiedFlow()), noise, cond, torch.linspace(1, 0, k + 1)[:-1], "jump")
            expected = (model.decode(x) / 2 + 0.5).clamp(0, 1)
        assert (images - expected).abs().max() < TOLERANCE
    if model.family == "sd":
        with pytest.raises(UserError, match="has no second network"):
            loading.load(exported[0]["sd-full"][3], two_time=True)


@pytest.mark.parametrize("name", ["sd-full", "sd-lora", "sd-two", "sd-two-lora", "sd-guided", "pixel-two"])
def test_init_student_returns_the_same_network(exported, name):
    model, net, _, folder = exported[0][name]
    fresh = load(str(folder.parent / CASES[name][0]))
    again = fresh.make("student", **CASES[name][1], init=str(folder))
    got = plain_state(again)
    for key, value in plain_state(net).items():
        torch.testing.assert_close(got[key], value, atol=1e-6, rtol=0)


def test_init_student_without_the_slot_is_the_stock_form(exported):
    """A two-time and a guidance student start an ordinary run as what the stock pipeline samples."""
    for name, w in (("sd-two", None), ("sd-guided", 3.0), ("sd-folded", 3.0)):
        model, net, _, folder = exported[0][name]
        plain = load(str(folder.parent / "sd")).make("student", init=str(folder))
        x, t = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 0.5])
        cond = {"prompt": model.encode_prompts([PROMPT] * 2)}
        expected = net(x, t, cond, r=torch.zeros(2)) if w is None else net(x, t, cond | {"guidance": torch.full((2,), w)})
        torch.testing.assert_close(plain(x, t, cond), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case, make, match", [
    ("sd-full", {"lora": 4}, "full-weights student"), ("sd-lora", {"lora": 8}, "give --lora 4"), ("pixel-full", {}, "family"),
    ("sd", {}, "not an exported student"),
    ("sd-two-lora", {"lora": 4}, "extra input")])
def test_init_student_refuses(exported, case, make, match):
    root = exported[0]["sd-full"][3].parent
    with pytest.raises(UserError, match=match):
        load(str(root / "sd")).make("student", **make, init=str(root / case))


def test_export_replaces_a_student_and_nothing_else(exported, tmp_path):
    model, net, contract, _ = exported[0]["pixel-full"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="give another folder"):
        export_student(model, net, tmp_path / "mine", contract)
    export_student(model, net, tmp_path / "s", contract, extra=lambda f: (f / "old.txt").write_text("x"))
    with pytest.raises(RuntimeError):                # a failure on the way leaves the earlier student whole
        export_student(model, net, tmp_path / "s", contract, extra=lambda f: (_ for _ in ()).throw(RuntimeError()))
    assert (tmp_path / "s" / "old.txt").exists()
    export_student(model, net, tmp_path / "s", contract)
    assert not (tmp_path / "s" / "old.txt").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["mine", "s"]


def test_toy_round_trip(tmp_path):
    model = Toy(fit_steps=1)
    for options, rule in (({}, "renoise"), ({"two_time": True}, "jump"), ({"two_time": True}, "renoise"), ({"lora": 4}, "renoise")):
        net = stir(model.make("student", **options))
        contract = contract_for(model, TIMES, rule)
        folder = export_student(model, net, tmp_path / "toy", contract, lora_rank=options.get("lora", 0))
        points = loading.load(folder)(class_labels=[0, 5], generator=torch.Generator().manual_seed(1)).images
        g = torch.Generator().manual_seed(1)
        draw = lambda: torch.randn(2, 2, generator=g)
        reading = to_data(net) if options.get("two_time") and rule == "renoise" else net
        expected = rollout.sample(reading, draw(), {"label": torch.tensor([0, 5])}, torch.tensor(TIMES), rule, draw)
        torch.testing.assert_close(points, expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- contract
def vp():
    from diffusers import DDIMScheduler
    return VP(DDIMScheduler().alphas_cumprod)


def test_knots():
    assert knots_for(TIMES, vp()) == {4: (999, 749, 499, 249), 2: (999, 499), 1: (999,)}
    assert knots_for((1.0,), vp()) == {1: (999,)}
    assert list(knots_for([1 - i / 6 for i in range(6)], RectifiedFlow())) == [6, 3, 2, 1]
    assert knots_for((1.0, 0.6), vp(), "jump") == {2: (999, 499), 1: (999,)}
    for bad in ((), (0.5, 1.0)):
        with pytest.raises(UserError, match="from noise to data"):
            knots_for(bad, vp())


def test_contract_messages():
    contract = Contract(knots_for(TIMES, vp()))
    with pytest.raises(UserError, match="trained for 1, 2, 4 steps, not 3"):
        contract.check(3)
    with pytest.raises(UserError, match="trained for 1 step, not 4"):
        Contract(knots_for((1.0,), vp())).check(4)
    assert Contract.from_json(json.loads(json.dumps(contract.to_json()))) == contract
    with pytest.raises(UserError, match="schema 3"):
        Contract.from_json(contract.to_json() | {"schema": 3})


@pytest.mark.parametrize("rule", ["renoise", "ode"])
@pytest.mark.parametrize("times", [(1.0, 0.5, 0.25), (0.8, 0.4), (1.0, 2 / 3, 1 / 3)])
def test_a_grid_no_stock_scheduler_follows_is_refused_before_training(tmp_path_factory, times, rule):
    scheduler = {"renoise": "LCMScheduler", "ode": "DDIMScheduler"}[rule]
    contract = Contract(knots_for(times, vp()), rule, scheduler=scheduler)
    with pytest.raises(UserError, match="evenly spaced from 1"):
        scheduler_for(contract, {"num_train_timesteps": 1000})


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_servers_and_stock_diffusers_read_the_same_folder(tmp_path, family):
    """`dmd2_config` stands in model_index.json of a flow student, and stock diffusers opens and samples it all the same."""
    from diffusers import DiffusionPipeline

    sys.path.insert(0, str(Path(__file__).parent / "backbones"))
    import tiny_b
    from zoo.hub.verify import opens
    tiny_b.build(family, tmp_path / "teacher")
    model = load(str(tmp_path / "teacher"))
    contract = contract_for(model, TIMES)
    (tmp_path / "teacher" / "LICENSE").write_text("the teacher's terms")
    folder = export_student(model, model.make("student"), tmp_path / "student", contract)
    block = json.loads((folder / "model_index.json").read_text())["dmd2_config"]
    assert block == {"num_inference_steps": 4, "denoising_timesteps": [1000, 750, 500, 250], "solver": "sde", "guidance_scale": contract.guidance}
    assert (folder / "LICENSE").read_text() == "the teacher's terms"
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert Contract.from_json(pipe.scheduler.config["_fewstep"]) == contract
    assert opens(folder, model.family) == ([], "")


def test_dmd2_config_only_where_it_applies(exported):
    for _, _, _, folder in exported[0].values():
        assert "dmd2_config" not in (folder / "model_index.json").read_text()


# ------------------------------------------------------------------------------------------------------------- card
FACTS = {"method": "dmd", "prompts": [PROMPT], "command": "accelerate launch train_dmd.py --steps 3", "seconds": 12.0, "steps": 3, "device": "2 CPU cores",
         "samples": 64, "measured": [{"who": "teacher", "steps": 4, "calls": 8, "kid_flat": 0.5}, {"who": "student", "steps": 4, "calls": 4, "kid_flat": 0.25}]}


@pytest.fixture
def carded(exported, tmp_path):
    from PIL import Image
    from zoo.hub.card import write_card
    model, net, contract, _ = exported[0]["sd-lora"]

    def finish(folder):
        Image.new("RGB", (8, 8)).save(folder / "grid.png")
        write_card(folder, model, FACTS | {"chain": ["lcm (a)"]})
    return export_student(model, net, tmp_path / "student", contract, lora_rank=4, extra=finish)


def test_card(carded):
    from huggingface_hub import ModelCard
    from zoo.hub.card import lint
    assert lint(carded) == []
    card = ModelCard.load(carded / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "other" and data["library_name"] == "diffusers" and {"few-step", "dmd", "4-step", "lora"} <= set(data["tags"])
    assert [r.metric_value for r in card.data.eval_results] == [0.25]
    for text in ("999, 749, 499, 249", FACTS["command"], "lcm (a)", "load_lora_weights", "zoo.load", "guidance_scale=1", "@article"):
        assert text in card.content


@pytest.mark.parametrize("old, new, complaint", [
    ("license: other", "license: free", "no license id"), ("library_name: diffusers", "library_name: torch", "needs diffusers"),
    ("inference: false", "base_model: a/b", "go together"), ("inference: false", "base_model: a/b\nbase_model_relation: distilled", "'distilled' is none"),
    ("url: grid.png", "url: gone.png", "gone.png is not in the folder"), ("license_name: as-the-teacher\n", "", "needs license_name"),
    ("pipeline_tag: text-to-image", "pipeline_tag: chat", "pipeline_tag"), ("tags:", "label:", "tags is missing"), ("---\n", "", "no metadata block")])
def test_lint_finds(carded, old, new, complaint):
    from zoo.hub.card import lint
    path = carded / "README.md"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    assert any(complaint in line for line in lint(carded)), lint(carded)
