"""What a stranger's repository or folder can say and hold, and what is not opened because of it. Every refusal is one line that names the thing."""
from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tiny
import zoo
from zoo import loading
from zoo.errors import UserError
from zoo.hub import stage
from zoo.hub.contract import Contract
from zoo.hub.record import base_revision, member, read_record

CONTRACT = Contract({2: (999, 499), 1: (999,)}, prediction="epsilon")
RECORD = {"family": "sd", "teacher": "nobody/base", "slot": None, "slot_weights": None, "lora_rank": 0, "process": "VP"}


class Ran(Exception):
    """A pickle was opened."""


class Trap:
    def __reduce__(self):
        return exec, ("from test_security import Ran; raise Ran",)


def trap(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Trap()))
    return path


def say(folder: Path, contract=CONTRACT, card=None, **record) -> None:
    data = contract.to_json() | {"student": RECORD | record} | ({"card": card} if card else {})
    (folder / "fewstep.json").write_text(json.dumps(data))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A student of two steps as a run exports it."""
    from diffusers import LCMScheduler, StableDiffusionPipeline
    folder = tiny.tiny_sd(tmp_path_factory.mktemp("student"))
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    config = {k: v for k, v in pipe.scheduler.config.items() if k not in ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")}
    pipe.scheduler = LCMScheduler.from_config(config, original_inference_steps=2, prediction_type="epsilon")
    pipe.scheduler.register_to_config(_fewstep=CONTRACT.to_json())
    pipe.save_pretrained(folder)
    say(folder)
    return folder


@pytest.fixture
def student(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "student"))


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder, match: str, **options) -> None:
    with pytest.raises(UserError, match=match) as error:
        zoo.load(folder, **options)
    assert len(str(error.value).splitlines()) == 1


# ------------------------------------------------------------------------------------------------------- paths and links
@pytest.mark.parametrize("key, value", [("slot_weights", "../../elsewhere"), ("slot_weights", "/etc"), ("slot_weights", ["unet"]), ("slot", "../x"),
                                        ("family", None), ("teacher", 3), ("lora_rank", "../x")])
def test_a_record_that_no_export_writes_is_refused(student, key, value):
    say(student, **{key: value})
    refused(student, f"says {key} .*{str(value)[-4:-1]}")


def test_weights_outside_the_folder_are_not_a_students(student, tmp_path):
    """`read_student` (--init_student) joins what the record says to the folder."""
    from zoo.hub.export import _student_state
    shutil.copytree(student / "unet", tmp_path / "elsewhere")
    for name in ("../elsewhere", str(tmp_path / "elsewhere")):
        with pytest.raises(UserError, match=f"{name}.* leaves"):
            _student_state(type("Model", (), {"pipe": None, "part": "unet"}), student, CONTRACT, RECORD | {"slot": "r", "slot_weights": name}, True)


@pytest.mark.parametrize("name", ["unet", "fewstep.json", "scheduler/scheduler_config.json", "text_encoder/model.safetensors"])
def test_a_link_out_of_the_folder_is_refused(student, tmp_path, name):
    (student / name).rename(tmp_path / "moved")
    (student / name).symlink_to(tmp_path / "moved")
    refused(student, f"{name}.* leaves .*cp -rL")


def test_the_links_of_the_clients_cache_are_followed(student, tmp_path):
    """snapshots/COMMIT holds links into blobs/ of the same repository, and of no other."""
    root = tmp_path / "models--me--student"
    snapshot = root / "snapshots" / ("0" * 40)
    for i, path in enumerate(sorted(p for p in student.rglob("*") if p.is_file())):
        place = snapshot / path.relative_to(student)
        place.parent.mkdir(parents=True, exist_ok=True)
        (root / "blobs").mkdir(exist_ok=True)
        path.rename(root / "blobs" / str(i))
        place.symlink_to(root / "blobs" / str(i))
    assert zoo.load(snapshot).scheduler.config.original_inference_steps == 2
    other = tmp_path / "models--them--secret" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(snapshot / "unet" / "config.json", other / "a")
    (snapshot / "unet" / "config.json").unlink()
    (snapshot / "unet" / "config.json").symlink_to(other / "a")
    refused(snapshot, "unet/config.json leaves")


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "unet/../../a", ".."])
def test_member(tmp_path, name):
    assert member(tmp_path, "unet/a.json") == tmp_path / "unet" / "a.json"
    with pytest.raises(UserError, match="leaves"):
        member(tmp_path, name)


@pytest.mark.parametrize("shard", ["../vae/a.safetensors", "/home/a.safetensors", "a.bin"])
def test_a_list_of_shards_names_files_beside_it(student, shard):
    index = student / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": shard}}))
    refused(student, f"{shard}.*no safetensors file beside it")
    (student / "unet" / "diffusion_pytorch_model.bin.index.json").write_text(index.read_text())
    index.unlink()
    assert zoo.load(student).unet is not None             # the list of a pickle is never read


# ------------------------------------------------------------------------------------------------------- code
def test_no_class_outside_the_two_libraries_is_named(student):
    index = student / "model_index.json"
    before = index.read_text()
    for changes in ({"unet": ["os", "system"]}, {"scheduler": ["far.schedulers", "Flow"]}, {"vae": ["../vae", "Vae"]}):
        change(index, **changes)
        refused(student, "outside diffusers and transformers for its " + next(iter(changes)))
        index.write_text(before)
    change(index, _class_name=["pipeline", "Mine"])
    refused(student, "code of its own pipeline .*Mine.* not trusted")


def test_a_lora_names_a_scheduler_of_diffusers(student, tmp_path, monkeypatch):
    """`_class_name` of a pulled scheduler_config.json becomes an attribute of diffusers."""
    alone = lora_of(student, tmp_path, "nobody/base")
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *a, **k: object())
    for name in ("DiffusionPipeline", "os", None, "__version__"):
        change(alone / "scheduler" / "scheduler_config.json", _class_name=name)
        refused(alone, "no scheduler of diffusers")


def test_a_contract_tells_a_call_nothing_else(student):
    """Its values reach the arguments of a call: keys and numbers of other kinds are refused where it is read."""
    good = CONTRACT.to_json()
    for bad, match in (({"call": {"2": {"callback": "x"}}}, "callback"), ({"knots": {"2": [999]}}, "knots"), ({"knots": {"2": [499, 999]}}, "knots"),
                       ({"knots": {}}, "knots"), ({"knots": {"a": [1]}}, "ValueError"), ({"knots": 3}, "AttributeError"), ({"sampler": "exec"}, "sampler"),
                       ({"sampler": "causal"}, "layout"), ({"guidance": "7"}, "number"), ({"dtype": "load"}, "dtype"),
                       ({"lora_scale": float("nan")}, "number")):
        with pytest.raises(UserError, match=match):
            Contract.from_json(good | bad)
    assert Contract.from_json(good) == CONTRACT
    (student / "fewstep.json").write_text("[1, 2")
    refused(student, "fewstep.json cannot be read")
    say(student)
    change(student / "scheduler" / "scheduler_config.json", _fewstep="no table")
    refused(student, "contract")


# ------------------------------------------------------------------------------------------------------- pickles
def test_one_list_of_pickles():
    """Pushing, pulling and opening read the same suffixes, in any case."""
    from fnmatch import fnmatch
    names = [f"unet/a{suffix}" for suffix in stage.PICKLES] + ["unet/B.BIN", "a.Joblib"]
    assert all(map(stage.is_pickle, names)) and not stage.is_pickle("unet/a.safetensors")
    asked = {}

    def snapshot(name, **options):
        asked.update(options)
        raise UserError("enough")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", snapshot)
        patch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: str(Path(__file__)))
        patch.setattr("pathlib.Path.read_text", lambda self, **k: "_fewstep")
        with pytest.raises(UserError, match="enough"):
            zoo.load("user/name", revision="v1")
    assert asked["revision"] == "v1" and all(any(fnmatch(n, p) for p in asked["ignore_patterns"]) for n in names)
    assert not any(fnmatch("unet/a.safetensors", p) for p in asked["ignore_patterns"])


def test_a_pickle_that_would_be_needed_is_refused_and_one_beside_safetensors_is_only_said(student):
    trap(student / "unet" / "diffusion_pytorch_model.bin")
    trap(student / "optimizer.joblib")
    with pytest.warns(UserWarning, match="holds pickles too .optimizer.joblib, unet/diffusion_pytorch_model.bin.") as said:
        pipe = zoo.load(student)
    assert len([w for w in said if "pickles" in str(w.message)]) == 1 and pipe.unet is not None
    (student / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    trap(student / "vae" / "weights.h5")
    refused(student, "pickles only .vae/weights.h5.")
    (student / "vae" / "weights.h5").unlink()
    refused(student, "cannot be opened .*as safetensors")             # the part has no weights at all


def test_which_pickles_are_needed():
    names = ["unet/a.bin", "unet/a.safetensors", "vae/b.pt", "run/c.pkl", "d.ckpt"]
    assert stage.pickles(names, ["unet", "vae"]) == (["vae/b.pt"], ["d.ckpt", "run/c.pkl", "unet/a.bin"])
    assert stage.pickles(names, ["."]) == (["d.ckpt"], ["run/c.pkl", "unet/a.bin", "vae/b.pt"])


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_a_pickle_under_another_name_is_refused_by_its_name(student, name):
    trap(student / name)
    refused(student, f"{name} is ")


def test_a_lora_that_is_a_pickle_under_another_name(student, tmp_path):
    """Left to itself, diffusers opens a file that is no safetensors one as a pickle."""
    alone = lora_of(student, tmp_path, str(student))
    trap(alone / "pytorch_lora_weights.safetensors")
    refused(alone, "pytorch_lora_weights.safetensors is ")
    pipe = type("Pipe", (), {"load_lora_weights": lambda self, source, **options: told.update(options), "get_list_adapters": lambda self: {"unet": ["student"]},
                             "fuse_lora": lambda self, **k: None, "unload_lora_weights": lambda self: None})()
    told = {}
    loading.put_lora(pipe, "a", "b", 1.0)
    assert told["use_safetensors"] is True


READS = {"from_pretrained", "load_lora_weights"}
WEIGHTLESS = ("Tokenizer", "Processor", "Config", "Scheduler")          # ends of the names of classes without weights


def readers(source: str) -> list[str]:
    """Calls that read weights, their own or bound by functools.partial, and do not say use_safetensors=True, nor pass on options that were set to it."""
    bare = []
    for node in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
        called = [f for f in (node.func, *node.args[:1]) if isinstance(f, ast.Attribute) and f.attr in READS]
        options = [re.escape(ast.unparse(k.value)) for k in node.keywords if k.arg is None]
        said = "use_safetensors=True" in map(ast.unparse, node.keywords) or any(re.search(rf"\b{o} = .*use_safetensors\W+True", source) for o in options)
        if called and not ast.unparse(called[0].value).endswith(WEIGHTLESS) and not said:
            bare.append(ast.unparse(node))
    return bare


def programs(path: Path) -> list[str]:
    """The source of a module, and of the programs it holds as text for another process."""
    source = path.read_text(encoding="utf-8")
    texts = [n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [source, *(text for text in texts if re.search(r"^import .*\bsys\b", text, re.M))]


def test_everything_that_is_opened_is_safetensors():
    assert readers("options = {'use_safetensors': True}\nA.from_pretrained(f, **options)\nother = {}") == []
    assert readers("other = {}\nA.from_pretrained(f, **other)") == ["A.from_pretrained(f, **other)"]
    assert readers("A.from_pretrained(f)\npartial(pipe.load_lora_weights, f)\nAutoTokenizer.from_pretrained(f)\nB.from_pretrained(f, use_safetensors=False)"
                   ) == ["A.from_pretrained(f)", "partial(pipe.load_lora_weights, f)", "B.from_pretrained(f, use_safetensors=False)"]
    sources = {(path.name, i): source for path in Path(zoo.__file__).parent.rglob("*.py") for i, source in enumerate(programs(path))}
    assert "load_lora_weights" in sources["verify.py", 1]
    for where, source in sources.items():                                 # nor is code trusted; unsaid, transformers asks at the terminal
        for node in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
            trusts = [ast.unparse(k.value) for k in node.keywords if k.arg == "trust_remote_code"]
            assert trusts == ["False"] or not trusts and not re.fullmatch(r"Auto\w+\.from_pretrained", ast.unparse(node.func)), (where, ast.unparse(node))
    assert {where: bare for where, source in sources.items() if (bare := readers(source))} == {}


# ------------------------------------------------------------------------------------------------------- base models
def lora_of(student: Path, tmp_path: Path, teacher: str, card=None) -> Path:
    """The folder of a LoRA alone, for the first attention of the student's network."""
    folder = tmp_path / "lora"
    (folder / "scheduler").mkdir(parents=True)
    shutil.copy(student / "scheduler" / "scheduler_config.json", folder / "scheduler")
    g = torch.Generator().manual_seed(0)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {f"unet.{layer}.lora_A.weight": torch.randn(2, 8, generator=g), f"unet.{layer}.lora_B.weight": torch.randn(8, 2, generator=g)}
    config = {"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": [layer]}
    save_file(state, folder / "pytorch_lora_weights.safetensors", {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    say(folder, lora_rank=2, teacher=teacher, card=card)
    return folder


def test_a_pulled_lora_names_no_folder_of_this_machine(student, tmp_path, monkeypatch):
    """A folder may name another; what comes from the Hub may not, by whatever path, nor by an id that is a folder here."""
    alone = lora_of(student, tmp_path, str(student))
    plain, fused = (zoo.load(f).unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q").weight for f in (student, alone))
    assert not torch.equal(plain, fused)
    monkeypatch.setattr(loading, "_fetch", lambda name, revision: alone)
    monkeypatch.setattr(loading, "_names_at", lambda name, revision: [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nobody" / "base").mkdir(parents=True)
    for teacher in (str(student), "student", "./student", "../x", "~/student", "a/b/c", "nobody/base", "nobody/.."):
        say(alone, lora_rank=2, teacher=teacher)
        refused("me/lora", "names .* as its base model, which is no Hub id, or a folder of this machine")
    say(alone, lora_rank=2, teacher=str(student))
    from zoo.hub.convert import _Student
    pipe = type("Pipe", (), {"unet": None, "set_progress_bar_config": lambda self, **k: None})()
    with pytest.raises(UserError, match="no Hub id, or a folder of this machine"):
        _Student(pipe, "me/lora").teacher                                  # what `zoo export me/lora --to lora` compares with
    assert _Student(pipe, str(alone)).teacher == _Student(pipe, "me/lora", given=str(student)).teacher == str(student)


def test_the_base_model_is_the_one_the_student_was_made_with(student, tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline
    commit, asked, stock = "c" * 40, {}, DiffusionPipeline.from_pretrained

    def fetch(source, **options):
        asked.update(source=source, **options)
        return stock(student)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fetch)
    alone = lora_of(student, tmp_path, "nobody/base", card={"base_revision": commit})
    zoo.load(alone)
    assert asked["source"] == "nobody/base" and asked["revision"] == commit and asked["use_safetensors"] is True and "trust_remote_code" not in asked
    assert base_revision(alone) == commit and base_revision(student) is None
    asked.clear()
    say(alone, lora_rank=2, teacher="nobody/base")
    zoo.load(alone)
    assert "revision" not in asked


def test_a_lora_of_another_base_model_is_not_passed_over(student, tmp_path):
    """diffusers logs that nothing was loaded and leaves the base model as it was."""
    alone = lora_of(student, tmp_path, str(student))
    save_file({f"transformer.blocks.0.to_q.lora_{k}.weight": torch.ones(2, 2) for k in "AB"}, alone / "pytorch_lora_weights.safetensors")
    refused(alone, "no LoRA weights for a StableDiffusionPipeline")
    save_file({"unet.conv_in.weight": torch.ones(2, 2)}, alone / "pytorch_lora_weights.safetensors")
    refused(alone, "is no LoRA that diffusers reads")


# ------------------------------------------------------------------------------------------------------- a default call is right or raises
def test_a_folder_that_does_not_hold_to_its_contract_is_refused(student):
    config, index = student / "scheduler" / "scheduler_config.json", student / "model_index.json"
    before, named = config.read_text(), index.read_text()
    for changes, match in (({"original_inference_steps": 7}, "samples 2 steps at .*trained at"), ({"prediction_type": "v_prediction"}, "reads the network as"),
                           ({"_fewstep": Contract({1: (999,)}, prediction="epsilon").to_json()}, "is another"),
                           ({"original_inference_steps": 1}, "does not sample 2 steps")):
        change(config, **changes)
        refused(student, f"does not hold to its contract.*({match})")
        config.write_text(before)
    change(index, scheduler=["diffusers", "DDIMScheduler"])
    refused(student, "does not hold to its contract: the scheduler is DDIMScheduler, the student was trained for LCMScheduler")
    index.write_text(named)
    assert zoo.load(student)._contract == CONTRACT == read_record(student)[0]


def test_options_that_mean_nothing_are_refused(student, tmp_path):
    from zoo.toy import ToyNet
    refused(student, "revision='v1' is of Hub ids", revision="v1")
    refused("dmd.fashion-4step", "revision='v1' is of Hub ids", revision="v1")
    toy = tmp_path / "toy"
    toy.mkdir()
    save_file({k: v.contiguous() for k, v in ToyNet().state_dict().items()}, toy / "toy.safetensors")
    say(toy, Contract({1: (1000.0,)}, prediction="velocity"), family="toy", process="RectifiedFlow")
    refused(toy, "float32 alone", dtype=torch.bfloat16)
    assert zoo.load(toy, dtype=torch.float32)(class_labels=[0]).images.shape == (1, 2)
    refused(student, "float32 alone with its extra input", dtype=torch.float16, two_time=True)
    refused(student, "no second network", two_time=True)
    (student / "fewstep.json").unlink()
    refused(student, "no second network", two_time=True)
    assert zoo.load(student, dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    say(toy, Contract({1: (1000.0,)}, prediction="velocity"), family="toy", process="torch")
    refused(toy, "process 'torch'")


def test_a_call_says_what_is_outside_the_contract(student):
    pipe = zoo.load(student)
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        images = pipe("red heart", 16, 16, 2, output_type="latent").images              # by position, as the stock class takes them
        assert images.shape[-2:] == (8, 8)
        pipe("red heart", timesteps=[999, 499], output_type="latent")
    with pytest.warns(UserWarning, match=r"trained at timesteps \[999, 499\], not \[999, 299\]"):
        pipe("red heart", timesteps=[999, 299], output_type="latent")
    with pytest.warns(UserWarning, match="trained for 1, 2 steps, not 3"):
        with pytest.raises(ValueError):                                                 # and the stock scheduler refuses it
            pipe("red heart", 16, 16, 3, output_type="latent")


def test_what_a_call_is_told_besides_its_grid_holds_for_any_count():
    told = {"guidance_scale": 0.0, "max_sequence_length": 12}
    terms = loading.Terms.of_contract(Contract({2: (1000, 400), 1: (1000,)}, call={2: told | {"sigmas": [1.0, 0.4]}, 1: told | {"sigmas": [1.0]}}))
    assert terms.extra == told and terms.per_step == {2: {"sigmas": [1.0, 0.4]}, 1: {"sigmas": [1.0]}}


# ------------------------------------------------------------------------------------------------------- what leaves
def test_an_earlier_student_outlives_an_export_that_fails(made, tmp_path, monkeypatch):
    """Between the two renames of a replacement: an error puts the earlier one back, and after a kill the next export does."""
    from zoo import backbones
    from zoo.hub.contract import contract_for
    from zoo.hub.export import export_student
    model = backbones.load("toy")
    net, contract = model.make("student"), contract_for(model, (1.0, 0.5))
    folder = export_student(model, net, tmp_path / "s", contract, facts={"run": 1})
    stock = os.replace

    def fails(source, target):
        if Path(source).name.startswith(".writing-"):
            raise OSError("disk full")
        stock(source, target)
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(UserError, match="disk full"):
        export_student(model, net, folder, contract, facts={"run": 2})
    assert read_record(folder)[1]["run"] == 1 and [p.name for p in tmp_path.iterdir()] == ["s"]
    monkeypatch.setattr(os, "replace", stock)
    folder.rename(tmp_path / ".old-s")                     # killed here
    monkeypatch.setattr("zoo.hub.export._write_bare", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="disk full"):
        export_student(model, net, folder, contract, facts={"run": 3})
    assert read_record(folder)[1]["run"] == 1


def test_a_folder_is_not_taken_for_a_built_in_teacher(tmp_path, monkeypatch):
    from zoo.hub.export import _teacher_name
    (tmp_path / "emoji").mkdir()
    (tmp_path / "mine").mkdir()
    names = {str(tmp_path / "emoji"): "emoji (a folder)", str(tmp_path / "mine"): "mine", "emoji": "emoji", "user/emoji": "user/emoji"}
    assert {n: _teacher_name(type("Model", (), {"name": n})) for n in names} == names
