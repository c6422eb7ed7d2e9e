"""From --data to training items: encoded once, the same whatever happened before, caches that let the encoders go, stores of pairs."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT / "tests" / "backbones")]
from test_streams import png, shard, shards  # noqa: E402
from tiny import tiny_sd  # noqa: E402

from zoo import backbones, data, rollout  # noqa: E402
from zoo.data import cache as caches  # noqa: E402
from zoo.data import feed, pairs  # noqa: E402
from zoo.data.cache import Storage  # noqa: E402
from zoo.errors import UserError  # noqa: E402


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(tiny_sd(tmp_path_factory.mktemp("teacher") / "sd"))


@pytest.fixture
def folder(tmp_path):
    """Twelve captioned pictures; the first and the last are the same file, and two captions are equal."""
    made = tmp_path / "images"
    made.mkdir()
    for i in range(12):
        Image.fromarray(np.random.default_rng(i % 11).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(made / f"{i:02}.png")
        (made / f"{i:02}.txt").write_text(f"red heart {'star ' * (i % 3)}{'blue' if i % 4 else 'noto'}")
    return made


def opened(teacher, where, cache="", **options):
    model = backbones.load(teacher, data=str(where))
    model.storage = Storage(str(cache), options.pop("gigabytes", 1.0), **options)
    return model


def counting(model):
    """The model, noting what its encoders are asked."""
    model.asked = {"prompts": [], "pictures": 0}
    conditions, encode = model.conditions, model.encode

    def prompts(texts):
        model.asked["prompts"] += texts
        return conditions(texts)

    def pictures(pixels):
        model.asked["pictures"] += len(pixels)
        return encode(pixels)
    model.conditions, model.encode = prompts, pictures
    return model


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b)


def index(*numbers):
    return torch.tensor(numbers)


# ------------------------------------------------------------------------------------------------ what an item is
def test_items_are_the_stock_encodings_of_caption_and_picture(teacher, folder):
    model = opened(teacher, folder)
    got = model.batches(images=True).get(index(5, 0))
    captions = data.prompts(folder)
    pixels = data.images(folder, 16)
    assert torch.equal(got["cond"]["prompt"], torch.cat([model.conditions([captions[i]])["prompt"] for i in (5, 0)]))
    assert torch.allclose(got["x0"], model.encode(pixels[[5, 0]]), atol=1e-5)
    assert torch.equal(got["uncond"]["prompt"], model.unconditional()["prompt"].expand(2, -1, -1))
    assert len(model.batches()) == 12 and "x0" not in model.batches().get(index(1))


@pytest.mark.parametrize("cached", [False, True])
def test_an_item_has_the_same_bits_whatever_was_asked_before(teacher, folder, tmp_path, cached):
    first = opened(teacher, folder, tmp_path / "a" if cached else "").batches(images=True).get(torch.arange(12))
    other = opened(teacher, folder, tmp_path / "b" if cached else "").batches(images=True)
    for part in ((11,), (3, 4, 3), (0, 11, 7)):
        got = other.get(index(*part))
        assert torch.equal(got["x0"], first["x0"][list(part)]) and torch.equal(got["cond"]["prompt"], first["cond"]["prompt"][list(part)])


def test_equal_prompts_and_pictures_are_encoded_once_and_never_again(teacher, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "FILE_SECONDS", 0.0)                           # written at once
    model = counting(opened(teacher, folder, tmp_path / "cache"))
    source = model.batches(images=True)
    first = source.get(torch.arange(12))
    unique = len(set(data.prompts(folder)))
    assert unique < 12 and len([p for p in model.asked["prompts"] if p]) == unique and model.asked["pictures"] == 11
    source.get(torch.arange(12))
    assert model.asked["pictures"] == 11
    again = counting(opened(teacher, folder, tmp_path / "cache"))
    got = again.batches(images=True).get(torch.arange(12))
    assert again.asked == {"prompts": [], "pictures": 0} and same(got["cond"], first["cond"]) and torch.equal(got["x0"], first["x0"])


def test_encoders_rest_once_everything_is_cached_and_come_back_for_more(teacher, folder, tmp_path, monkeypatch):
    moves = []
    monkeypatch.setattr(feed.Texts, "_move", lambda self, device: moves.append(str(device)))
    model = opened(teacher, folder, tmp_path / "cache")
    model.batches()
    assert moves == ["cpu"] and model.texts.resting
    model.examples(4, 2)
    assert moves == ["cpu"]                                                    # measuring needs no encoder either
    model.texts(["a prompt of nobody"])
    assert moves == ["cpu", "cpu", "cpu"]                                      # to the network's device, here the CPU too, and back
    small = opened(teacher, folder, tmp_path / "small", gigabytes=1e-6)
    with pytest.warns(UserWarning, match="is full"):
        small.batches()
    assert not small.texts.resting                                             # what has no room is encoded again: the encoder stays
    assert same(small.batches().get(index(1, 2))["cond"], model.batches().get(index(1, 2))["cond"])


def test_a_cache_of_other_encoders_is_refused(teacher, folder, tmp_path):
    opened(teacher, folder, tmp_path / "cache").batches()
    other = opened(teacher, folder, tmp_path / "cache")
    with torch.no_grad():
        next(other.pipe.text_encoder.parameters()).mul_(1.01)
    with pytest.raises(UserError, match="weights: .*give another --cache"):
        other.batches()
    half = opened(teacher, folder, tmp_path / "cache")
    half.pipe.text_encoder.bfloat16()
    with pytest.raises(UserError, match="precision"):
        half.batches()
    large = opened(teacher, folder, tmp_path / "cache")
    large.batches(images=True)
    large = opened(teacher, folder, tmp_path / "cache")
    large.shape = (4, 16, 16)
    with pytest.raises(UserError, match="size: "):
        large.batches(images=True)


def test_a_cache_of_other_settings_is_refused(teacher, folder, tmp_path):
    """The weights as they were: the scale of the latents, the empty prompt and the tokenizer decide what is kept besides."""
    opened(teacher, folder, tmp_path / "cache").batches(images=True)
    other = opened(teacher, folder, tmp_path / "cache")
    other.pipe.vae.register_to_config(scaling_factor=0.5)
    with pytest.raises(UserError, match="settings: .*scaling_factor.* there, .*'scaling_factor': 0.5} here"):
        other.batches(images=True)
    kinds = [feed.settings(SimpleNamespace(config={"_class_name": "X", "unet": ["a", "b"], **more}))
             for more in ({}, {"force_zeros_for_empty_prompt": True}, {"latents_mean": [0.0, 1.0]}, {"latents_mean": [0.0, 1.5]}, {"sample_size": 4})]
    assert kinds[0] == kinds[4] == {} and len({str(k) for k in kinds}) == 4
    other = opened(teacher, folder, tmp_path / "cache")
    other.pipe.tokenizer.add_tokens(["Cat"])
    with pytest.raises(UserError, match="tokens: "):
        other.batches()


def test_a_cache_of_another_revision_of_the_repository_is_refused(teacher, tmp_path, monkeypatch):
    """A Hub repository that moved on between two runs, its encoders as they were: the commit alone tells."""
    repo = tmp_path / "hub" / "models--me--model"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(teacher, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    for name, value in (("HF_HUB_CACHE", str(tmp_path / "hub")), ("HF_HUB_OFFLINE", True)):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    (tmp_path / "p.txt").write_text("red heart\n")

    def run(commit):
        (repo / "refs" / "main").write_text(commit * 40)
        return opened("me/model", tmp_path / "p.txt", tmp_path / "cache").batches()
    run("a")
    with pytest.raises(UserError, match=r"text-me--model was encoded by another .*revision: 'a{40}' there, 'b{40}' here\): give another --cache") as error:
        run("b")
    assert "\n" not in str(error.value)
    run("a")


def test_ranks_share_the_prompts(teacher, folder, tmp_path):
    models = [counting(opened(teacher, folder, tmp_path / "cache", rank=r, world=2)) for r in range(2)]
    for model in models:
        model.texts.prepare(data.prompts(folder))
    asked = [{p for p in m.asked["prompts"] if p} for m in models]
    assert all(asked) and not asked[0] & asked[1] and asked[0] | asked[1] == set(data.prompts(folder))
    assert models[1].texts.resting                                             # the second one saw the first one's part


# ------------------------------------------------------------------------------------------------ what cannot be read
def test_pictures_that_cannot_be_decoded_are_counted_and_replaced_by_the_next(teacher, tmp_path):
    made = tmp_path / "images"
    made.mkdir()
    for i in range(120):
        (made / f"{i:03}.png").write_bytes(png((i, 0, 0)))
        (made / f"{i:03}.txt").write_text(f"red {i}")
    (made / "050.png").write_bytes((made / "050.png").read_bytes()[:40])
    model = opened(teacher, made)
    source = model.batches(images=True)
    with pytest.warns(UserWarning, match=r"skipped 1 of 120 images of .*050\.png"):
        got = source.get(index(49, 50, 51))
    assert torch.equal(got["x0"][1], got["x0"][2]) and not torch.equal(got["x0"][0], got["x0"][1])
    (made / "070.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"2 of 120 images of"):
        source.get(index(70))
    for i in range(4):
        (made / f"{i:03}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="2 of 120 images"):                    # before the first step
        opened(teacher, made).batches(images=True)


def test_pictures_without_a_caption_do_not_train_as_the_empty_prompt(teacher, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(130):
        (folder / f"{i:03}.png").write_bytes(png((i, 0, 0)))
        (folder / f"{i:03}.txt").write_text(f"red {i}")
    (folder / "020.txt").unlink()
    with pytest.warns(UserWarning, match=r"skipped 1 of 130 images of .*020\.png .no text"):
        source = opened(teacher, folder).batches(images=True)
    got = source.get(index(20, 21))
    assert torch.equal(got["x0"][0], got["x0"][1]) and torch.equal(got["cond"]["prompt"][0], got["cond"]["prompt"][1])
    for i in range(30, 40):
        (folder / f"{i:03}.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"11 of 130 images have no caption .*the first is 020\.png: caption or remove them"):
        opened(teacher, folder).batches(images=True)


def test_options_of_clips_are_refused_by_families_of_pictures(teacher, folder):
    for option in ("fps=8", "video=film"):
        with pytest.raises(UserError, match=rf"the sd family reads images: leave .{option.split('=')[0]}= out"):
            opened(teacher, f"{folder}?{option}").batches(images=True)


def test_missing_captions_and_columns_are_named(teacher, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.png").write_bytes(png((1, 2, 3)))
    with pytest.raises(UserError, match=r"no caption column .*it has image"):
        opened(teacher, tmp_path / "plain").batches(images=True)
    with pytest.raises(UserError, match=r"holds no prompts, since .*it has image; put a .txt file with its caption beside each image, or name"):
        opened(teacher, tmp_path / "plain").batches()
    shard(tmp_path / "x.tar", [("a", "red", png((1, 2, 3)))])
    with pytest.raises(UserError, match="no column words for the caption: it has png, txt"):
        opened(teacher, f"{tmp_path}/x.tar?caption=words").batches(images=True)
    table = tmp_path / "t.jsonl"
    table.write_text(json.dumps({"title": "red", "size": 3}))
    with pytest.raises(UserError, match="no column for the caption: it has size, title; name it"):
        opened(teacher, f"{table}?stream=yes").batches()
    with pytest.raises(UserError, match="comes without prompts: give --data prompts.txt"):
        opened(teacher, "").batches()


# ------------------------------------------------------------------------------------------------ streams
def test_shards_give_the_items_that_a_folder_of_the_same_gives(teacher, tmp_path):
    place = shards(tmp_path, [5, 4, 3])
    model = opened(teacher, f"{place}?buffer=4", notes=tmp_path / "notes")
    source = model.batches(images=True)
    assert len(source) == feed.UNKNOWN
    order = source.order(torch.arange(24), 0, 4)
    got = {k: torch.cat([(source.get(part)[k] if k == "x0" else source.get(part)[k]["prompt"]) for part in order.split(4)]) for k in ("x0", "cond")}
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02}.png").write_bytes(png((i, 0, 0)))
        (folder / f"{i:02}.txt").write_text(f"row {i}")
    plain = opened(teacher, folder).batches(images=True).get(torch.arange(12))
    match = [[j for j in range(12) if torch.equal(got["x0"][i], plain["x0"][j])] for i in range(24)]
    assert all(len(m) == 1 for m in match) and all(torch.equal(got["cond"][i], plain["cond"]["prompt"][m[0]]) for i, m in enumerate(match))
    assert sorted(m[0] for m in match[:12]) == list(range(12)) == sorted(m[0] for m in match[12:])          # two epochs
    later = opened(teacher, f"{place}?buffer=4", notes=tmp_path / "notes").batches(images=True)             # a run that resumes
    assert len(later) == 12 and torch.equal(later.get(order[20:24])["x0"], got["x0"][20:24])
    assert set(model.examples(4).names) <= {f"row {i}" for i in range(12)}


def test_rows_without_a_caption_are_passed_over_and_prompts_stream(teacher, tmp_path):
    table = tmp_path / "p.jsonl"
    rows = [{"prompt": f"red star {i}" if i != 7 else None} for i in range(150)]
    table.write_text("\n".join(map(json.dumps, rows)))
    source = opened(teacher, f"{table}?stream=yes&buffer=50").batches()
    with pytest.warns(UserWarning, match="captions of .*row 7"):
        got = source.get(index(7, 8))
    assert torch.equal(got["cond"]["prompt"][0], got["cond"]["prompt"][1]) and source.identity.startswith("stream")


def test_a_stream_whose_captions_are_numbers_says_so(teacher, tmp_path):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"caption": i, "alt": f"red {i}"}) for i in range(30)))
    with pytest.raises(UserError, match=r"none of the first \d+ rows of .*p.jsonl has a caption .column caption.: name the column of texts"):
        opened(teacher, f"{tmp_path}/p.jsonl?stream=yes").examples(2)
    assert opened(teacher, f"{tmp_path}/p.jsonl?stream=yes&caption=alt").examples(2).names[0].startswith("red")


def test_a_table_that_streams_finds_pictures_beside_itself(teacher, folder, tmp_path):
    (folder / "t.csv").write_text("image,caption\n" + "".join(f"{i:02}.png,red heart {i}\n" for i in range(12)))
    whole, streamed = (opened(teacher, f"{folder}/t.csv{how}").batches(images=True).get(torch.arange(12)) for how in ("", "?stream=yes"))
    assert torch.equal(whole["x0"], streamed["x0"]) and same(whole["cond"], streamed["cond"])


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_local_tables_stream(teacher, tmp_path, kind):
    from datasets import Dataset
    table = Dataset.from_dict({"prompt": [f"red star {i}" for i in range(40)]})
    {"parquet": table.to_parquet, "csv": table.to_csv}[kind](str(tmp_path / f"t.{kind}"))
    model = counting(opened(teacher, f"{tmp_path}/t.{kind}?stream=yes&buffer=8"))
    model.batches().get(index(9, 3))
    assert {p for p in model.asked["prompts"] if p} == {"red star 9", "red star 3"}


# ------------------------------------------------------------------------------------------------ stores of pairs
def store(teacher, prompts, out, *flags, ranks=1, wait=True):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(29950 + os.getpid() % 40)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "train_scripts" / "make_pairs.py"), "--teacher", teacher, "--data", str(prompts),
               "--output_dir", str(out), "--steps", "3", "--file", "4", "--chunk", "2", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if not wait:
        return child
    out, err = child.communicate(timeout=120)
    return SimpleNamespace(code=child.returncode, out=out, err=err)


def content(folder):
    from safetensors.torch import load_file
    return {p.name: load_file(p) for p in sorted(Path(folder).glob("*.safetensors"))}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_text("\n".join(["red heart", "blue star", "noto face", "smiling fluent star", "red"]))
    return path


def make_here(teacher, prompts, out, n, monkeypatch=None, **options):
    import make_pairs
    return make_pairs.main(make_pairs.Config(teacher=teacher, data=str(prompts), output_dir=str(out), pairs=n, steps=3, file=4, chunk=2, **options))


def test_a_store_holds_trajectories_that_end_in_the_endpoint_and_trains_a_run(teacher, prompts, tmp_path):
    make_here(teacher, prompts, tmp_path / "store", 10, trajectory=True)
    model = opened(teacher, prompts)
    items = model.batches()
    record = pairs.read_record(tmp_path / "store", model, items, model.guidance)
    source = pairs._source(items, tmp_path / "store", record["pairs"], record["file"])
    got = source.get(torch.arange(10))
    assert got["path"].shape == (10, 4, *model.shape) and torch.equal(got["path"][:, -1], got["x0"]) and len(record["times"]) == 3
    t = torch.full((10,), model.process.t_max)
    assert torch.allclose(got["path"][:, 0], rollout.start(model.process, got["z"], t), atol=1e-6)
    step = rollout.sample(model.teacher, got["z"], got["cond"], pairs.knots(model.process, 3), "ode", uncond=got["uncond"], guidance=model.guidance)
    assert torch.allclose(step, got["x0"], atol=1e-4)
    counts = torch.bincount(torch.cat([s["item"] for s in content(tmp_path / "store").values()]), minlength=5)
    assert counts.tolist() == [2] * 5                                          # every prompt equally often
    run = SimpleNamespace(model=model)
    assert len(pairs.stored(run, model.teacher, 1, 1, model.guidance, str(tmp_path / "store"))) == 10
    for change, message in (({"guidance": 1.25}, "guidance: "), ({}, "items: ")):
        if not change:
            model = opened(teacher, prompts.parent / "other.txt")
            (prompts.parent / "other.txt").write_text("red heart")
        with pytest.raises(UserError, match=message):
            pairs.stored(SimpleNamespace(model=model), None, 1, 1, change.get("guidance", model.guidance), str(tmp_path / "store"))
    with pytest.raises(UserError, match="is no store"):
        pairs.stored(run, None, 1, 1, 1.0, str(tmp_path))
    next((tmp_path / "store").glob("00000004*")).unlink()
    with pytest.raises(UserError, match="is not finished, 1 files are missing"):
        pairs.stored(run, None, 1, 1, run.model.guidance, str(tmp_path / "store"))


def test_a_store_grows_and_other_flags_are_refused(teacher, prompts, tmp_path):
    make_here(teacher, prompts, tmp_path / "grown", 6)
    first = (tmp_path / "grown" / "00000000.safetensors").stat().st_mtime_ns
    make_here(teacher, prompts, tmp_path / "grown", 12)
    make_here(teacher, prompts, tmp_path / "whole", 12)
    assert (tmp_path / "grown" / "00000000.safetensors").stat().st_mtime_ns == first
    assert same(content(tmp_path / "grown"), content(tmp_path / "whole"))
    with pytest.raises(UserError, match="holds other pairs .*seed: 0 there, 1 here"):
        make_here(teacher, prompts, tmp_path / "grown", 12, seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("!")
    with pytest.raises(UserError, match="no store of pairs"):
        make_here(teacher, prompts, tmp_path / "mine", 12)


def test_pairs_of_a_run_are_of_its_prompts_and_weights(teacher, tmp_path):
    """Made in the run's own folder: where the same flags name other prompts or another network by now, they are not gone on with."""
    import contextlib
    edited = tmp_path / "p.txt"

    def paired(where=teacher, **cfg):
        model = opened(where, edited)
        run = SimpleNamespace(model=model, out=tmp_path / "run", rank=0, world=1, device="cpu", cfg=SimpleNamespace(seed=0, dry_run=False, **cfg),
                              accelerator=SimpleNamespace(autocast=contextlib.nullcontext, wait_for_everyone=lambda: None))
        return pairs.stored(run, model.teacher, 4, 1, model.guidance)
    edited.write_text("red heart\nblue star\n")
    first = paired().get(torch.arange(4))
    assert same(paired().get(torch.arange(4)), first)
    edited.write_text("red heart\nblue face\n")                                # as many, so that every pair would find one
    with pytest.raises(UserError, match="run/pairs holds other pairs .items: '2 prompts .*' there, '2 prompts .*' here"):
        paired()
    edited.write_text("red heart\nblue star\n")
    other = shutil.copytree(teacher, tmp_path / "sd")
    model = backbones.load(str(other))
    with torch.no_grad():
        model.pipe.unet.conv_out.weight[:] += 1
    model.pipe.save_pretrained(other)
    with pytest.raises(UserError, match="holds other pairs .*weights: "):
        paired(str(other))
    (tmp_path / "run" / "pairs" / "store.json").unlink()                        # of an earlier version: of what they are is not known
    with pytest.raises(UserError, match="is no store of pairs"):
        paired()
    shutil.rmtree(tmp_path / "run" / "pairs")
    assert same(paired().get(torch.arange(4)), first)


@pytest.mark.slow
def test_a_store_killed_at_any_moment_and_finished_by_two_ranks_has_the_same_bits(teacher, prompts, tmp_path):
    whole = store(teacher, prompts, tmp_path / "whole", "--pairs", "64", "--trajectory")
    assert whole.code == 0, whole.err[-2000:]
    child = store(teacher, prompts, tmp_path / "killed", "--pairs", "64", "--trajectory", wait=False)
    deadline = time.time() + 100
    while len(list((tmp_path / "killed").glob("*.safetensors"))) < random.Random(0).randint(2, 5):
        assert child.poll() is None and time.time() < deadline, child.stderr.read()[-2000:]
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close(), child.stderr.close()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("*.safetensors")}
    assert 0 < len(done) < 16
    resumed = store(teacher, prompts, tmp_path / "killed", "--pairs", "64", "--trajectory", "--cache", str(tmp_path / "cache"), ranks=2)
    assert resumed.code == 0, resumed.err[-2000:]
    assert same(content(tmp_path / "whole"), content(tmp_path / "killed")) and all(p.stat().st_mtime_ns == t for p, t in done.items())


# ------------------------------------------------------------------------------------------------ a run
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["buckets", "stream"])
def test_a_run_resumes_to_the_same_bits_with_and_without_a_cache(teacher, folder, tmp_path, kind):
    import train_lcm
    place = {"buckets": f"{folder}?buckets=yes", "stream": f"{shards(tmp_path, [5, 4, 3])}?buffer=4"}[kind]

    def trained(name, steps, cache=""):
        train_lcm.main(train_lcm.Config(teacher=teacher, data=place, batch=4, steps=steps, checkpoint_every=1, keep_checkpoints=9, sample_every=0,
                                        measure_every=0,
                                        time_budget=0, mixed_precision="no", output_dir=str(tmp_path / name), cache=cache and str(tmp_path / cache)))
        from safetensors.torch import load_file
        return load_file(tmp_path / name / "checkpoints" / f"step-{steps:07d}" / "student.safetensors")
    whole = trained("whole", 5)
    trained("resumed", 2, "cache")
    assert same(trained("resumed", 5, "cache"), whole)                         # from a half-filled cache
    if kind == "buckets":
        assert same(trained("again", 5, "cache"), whole)                       # from a full one
