"""The command line: what it prints, for people and for machines, and how it ends."""
from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

import zoo
from zoo import cli, registry
from zoo.errors import UserError


def run(capsys, *words):
    cli.main(list(words))
    return capsys.readouterr().out


def fails(capsys, code, *words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(words))
    assert stopped.value.code == code
    return capsys.readouterr().err


def test_methods(capsys):
    lines = run(capsys, "methods", "*flow*").splitlines()
    assert lines[0].split()[:2] == ["NAME", "FAMILY"] and [x.split()[0] for x in lines[1:]] == [m.name for m in zoo.methods("*flow*")]
    data = json.loads(run(capsys, "methods", "--json"))
    assert [m["name"] for m in data] == [m.name for m in zoo.methods()] and data[0]["url"].startswith("https://arxiv.org/abs/")


def test_students(capsys):
    lines = run(capsys, "students", "--method", "dmd2", "--base", "sdxl").splitlines()
    assert [x.split()[0] for x in lines[1:]] == ["dmd2.sdxl-4step", "dmd2.sdxl-4step-lora", "dmd2.sdxl-1step"]
    data = json.loads(run(capsys, "students", "hyper-sd.*", "--steps", "8", "--json"))
    assert all(8 in s["steps"] and s["name"].startswith("hyper-sd.") and s["facts"] for s in data) and data
    assert json.loads(run(capsys, "students", "--status", "unverified",
                          "--json")) == json.loads(json.dumps([cli.as_dict(s) for s in zoo.students(status="unverified")]))


@pytest.mark.parametrize("words, answer", [
    (("methods", "NOMATCH"), "no method matches 'NOMATCH': there are arcflow"), (("methods", "dmdd*"), "did you mean dmd"),
    (("students", "no-such*"), "no student is called 'no-such*'"), (("students", "dmd.emojy*"), "did you mean dmd.emoji-4step"),
    (("students", "--method", "dmdd"), "no student has --method dmdd: did you mean dmd"), (("students", "--base", "sdxxl"), "did you mean"),
    (("students", "--kind", "shiped"), "did you mean shipped?"), (("students", "--modality", "sound"), "there are image"),
    (("students", "--status", "verifyed"), "did you mean verified"), (("students", "--steps", "77"), "no student has --steps 77: there are 1, 2,"),
    (("students", "hyper-sd.*", "--method", "dmd"), "no student matches hyper-sd.* --method dmd together: leave one out")])
def test_what_matches_nothing_is_answered_with_what_there_is(capsys, words, answer):
    for more in ((), ("--json",)):
        err = fails(capsys, 2, *words, *more)
        assert answer in err and err.startswith("error: ") and err.count("\n") == 1


def test_counts():
    assert cli.counts((8, 7, 6, 5, 4, 3, 2)) == "2-8" and cli.counts((4, 2, 1)) == "1, 2, 4" and cli.counts((4,)) == "4"


def test_show_a_student(capsys):
    text = run(capsys, "show", "hyper-sd.flux-8step")
    for part in ("ByteDance/Hyper-SD", "Hyper-FLUX.1-dev-8steps-lora.safetensors", "0.125", "guidance_scale=3.5", "verified"):
        assert part in text
    data = json.loads(run(capsys, "show", "dmd2.sdxl-4step", "--json"))
    assert data["timesteps"] == {"4": [999, 749, 499, 249]} and data["metrics"][0]["source"]


def test_show_a_method_with_its_recipes(capsys):
    text = run(capsys, "show", "dmd", "--recipes")
    assert text.startswith(registry.method("dmd").doc.splitlines()[0])
    assert "--recipe sdxl-4step" in text and "Yin et al. 2024" in text and "guidance = 8.0" in text
    import train_dmd
    assert cli.read_recipes(registry.method("dmd")) == train_dmd.Config.recipes


@pytest.mark.parametrize("name", [m.name for m in registry.METHODS])
def test_recipes_are_read_as_the_script_has_them(name):
    import importlib
    assert cli.read_recipes(registry.method(name)) == importlib.import_module(registry.method(name).path.stem).Config.recipes


def test_show_answers_with_the_nearest_of_both_kinds(capsys):
    assert "did you mean sdxl-turbo" in fails(capsys, 2, "show", "sdxl-turb")
    assert "did you mean dmd" in fails(capsys, 2, "show", "dmmd")


def test_a_row_cannot_bring_markup(capsys, monkeypatch):
    row = replace(registry.student("sdxl-turbo"), name="[red]x.y[/red]", license="[link=https://evil]mit[/link]")
    monkeypatch.setattr(registry, "STUDENTS", (row,))
    text = run(capsys, "students")
    assert "[red]x.y[/red]" in text and "[link=https://evil]mit[/link]" in text


FILE = __file__
MISTAKES = [
    *((name, "dmmd") for name in ("show", "cite", "where", "make", "card", "verify", "train")), ("show", "dmd.emoji-4step", "--recipes"), ("show",),
    ("nothing",),
    ("make", "hyper-sd.sdxl-4step"), ("make", "lcm.emoji-4step", "--out", FILE), ("make", "lcm.emoji-4step", "--out", f"{FILE}/run"),
    ("card", FILE), ("card", "no/folder"), ("card", "hyper-sd.sdxl-4step"), ("push", FILE, "me/x"), ("push", "no/folder", "me/x"), ("push", "nofolder", "me/x"),
    ("verify", FILE), ("verify", "dmd.emoji-4step", "--revision", "v1"), ("verify", "hyper-sd.sdxl-4step"),
    *((name, student, *more) for name, more in (("sample", ("a fox",)), ("eval", ("--prompts", FILE)), ("export", ("--to", "fused", "--out", "new")))
      for student in ("hyper-sd.sdxl-4stp", FILE, "./no-folder")),
    *(("sample", "dmd.fashion-4step", "3", *more) for more in (
        ("--steps", "3"), ("--steps", "0"), ("--steps", "-1"), ("--steps", "four"), ("--guidance", "7"), ("--guidance", "much"), ("--seeds", "0"),
        ("--seeds", "-2"),
        ("--seeds", "x"), ("--seed", "-1"), ("--out", "no/such/folder/a.png"), ("--out", "."), ("--out", "a.doc"), ("--out", f"{FILE}/a.png"),
        ("--device", "cuda:99"), ("--device", "abacus"))),
    ("sample", "dmd.fashion-4step"), ("sample", "dmd.fashion-4step", "10"), ("sample", "dmd.fashion-4step", "-1"), ("sample", "dmd.fashion-4step", "sneakr"),
    ("sample", "dmd.emoji-4step"), ("sample", "dmd.emoji-4step", "red heart", "--guidance", "3"),
    *(("eval", "dmd.fashion-4step", *more) for more in (
        ("--limit", "0"), ("--limit", "-1"), ("--seeds", "0"), ("--steps", "3"), ("--prompts", "none.txt"), ("--prompts", FILE), ("--prompts", "."),
        ("--out", "no/such/r.json"), ("--out", "."), ("--reference", "no-such-pictures"), ("--limit", "1", "--reference", "no/such/pictures"))),
    ("eval", "dmd.emoji-4step"), ("eval", "dmd.emoji-4step", "--prompts", "coco"), ("eval", "dmd.emoji-4step", "--prompts", "partiprompts"),
    *(("export", "dmd.fashion-4step", "--out", out, "--to", *more) for out, *more in (
        ("new", "onnx"), (".", "fused"), (FILE, "fused"), ("new.safetensors", "fused"), (f"{FILE}/x", "fused"), ("new", "comfyui"), ("new", "single-file"),
        ("new", "lora"), ("new", "fused", "--rank", "8"), ("new", "lora", "--rank", "0"), ("new", "fused", "--teacher", "fashion"))),
    ("export", "dmd.emoji-4step", "--out", "new", "--to", "fp8", "--rank", "8"), ("export", "dmd.emoji-4step", "--to", "fp8")]


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_mistakes_are_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path, words):
    """Whatever is wrong is said before anything is computed or written: no picture, no report, no export is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zoo.calls.draw", lambda *a, **k: pytest.fail("it sampled before it looked"))
    if "--reference" in words:                 # its size is that of the pictures: one is drawn
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("x")
    monkeypatch.setattr(sys, "argv", ["zoo"])
    err = fails(capsys, 2, *words)
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_place_that_may_not_be_written_is_found_first(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for words in (("sample", "x", "3", "--out", tmp_path / "a.png"), ("eval", "x", "--out", tmp_path / "r.json"),
                  ("make", "lcm.emoji-4step", "--out", tmp_path),
                  ("export", "x", "--to", "fused", "--out", tmp_path / "new")):
        assert "may not be written: give a writable path" in fails(capsys, 2, *map(str, words))


@pytest.mark.parametrize("error, code, said", [
    (PermissionError(13, "Permission denied", "/etc/x"), 2, "error: /etc/x cannot be used (Permission denied)"),
    (OSError(28, "No space left on device", "/x"), 2, "No space left on device"), (KeyboardInterrupt(), 130, "interrupted")])
def test_exit_codes(capsys, monkeypatch, error, code, said):
    def stop(args):
        raise error
    monkeypatch.setattr(cli, "list_methods", stop)
    err = fails(capsys, code, "methods")
    assert said in err and err.count("\n") == 1


def test_the_hub_commands_pass_their_flags_on(capsys, monkeypatch):
    said = {}

    def push(folder, repo_id, **options):
        said.update(folder=folder, repo_id=repo_id, **options)
        return "https://hub/commit/1"
    monkeypatch.setattr("zoo.hub.publish.push", push)
    out = run(capsys, "push", "outputs/x/student", "user/x", "--private", "--revision", "next", "--create_pr", "--tag", "v1")
    assert out.strip() == "https://hub/commit/1" and callable(said.pop("say"))
    assert said == {"folder": "outputs/x/student", "repo_id": "user/x", "private": True, "revision": "next", "create_pr": True, "tag": "v1",
                    "collection": None}
    data = json.loads(run(capsys, "push", "outputs/x/student", "user/x", "--json"))
    assert data == {"folder": "outputs/x/student", "repo": "user/x", "url": "https://hub/commit/1", "commit": "1", "pull_request": None,
                    "revision": None, "tag": None}
    monkeypatch.setattr("zoo.hub.publish.push", lambda folder, repo, say, **options: [say(s) for s in ("checking the folder", "sending")] and "https://hub/x")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    cli.main(["push", "outputs/x/student", "user/x"])
    assert "sending" in capsys.readouterr().err
    assert said["private"] is None and said["create_pr"] is False        # nothing said: the Hub's own default


def test_verify_ends_with_1_when_something_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr("zoo.hub.verify.verify", lambda source, revision=None: [f"{source}@{revision}: README.md is missing"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["verify", "user/x", "--revision", "v1"])
    assert stopped.value.code == 1 and "user/x@v1: README.md is missing" in capsys.readouterr().out
    monkeypatch.setattr("zoo.hub.verify.verify", lambda source, revision=None: [])
    assert json.loads(run(capsys, "verify", "user/x", "--json")) == {"source": "user/x", "revision": None, "problems": []}
    heard = []
    monkeypatch.setattr("zoo.hub.verify.verify", lambda source, revision=None: heard.append(source) or [])
    run(capsys, "verify", "dmd.emoji-4step")
    assert heard[0].endswith("zoo/assets/students/dmd.emoji-4step")


def rebuilt_row(value, tolerance=0.1):
    return registry.rebuilt("dmd.toy-2step", "dmd", "toy", (4, 2, 1), "mit", "--teacher toy --steps 2", 3, {"torch": "0.0.1"},
                            (registry.Metric("conditional_kid_flat", value, 4, "toy", "measured.json", tolerance),))


def test_make_repeats_the_command_and_holds_it_against_the_row(capsys, monkeypatch, tmp_path):
    """The exact flags and the seed reach the script; a metric outside its tolerance ends with exit code 1."""
    from tqdm import tqdm
    heard = []

    def train(name, flags):
        heard.append((name, flags))
        print("what a script prints")
        list(tqdm([1], desc="training", disable=False))
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "measured.json").write_text(json.dumps({"measured": [{"who": "teacher", "steps": 4, "conditional_kid_flat": 9},
                                                                       {"who": "student", "steps": 4, "conditional_kid_flat": 0.45}]}))
    monkeypatch.setattr(cli, "train", train)
    monkeypatch.setattr(registry, "STUDENTS", (rebuilt_row(0.4),))
    cli.main(["make", "dmd.toy-2step", "--out", str(tmp_path / "run"), "--json"])
    printed = capsys.readouterr()
    assert "what a script prints" in printed.err and "training" not in printed.err            # nobody watches: no bar, whoever draws it
    data = json.loads(printed.out)
    report = data["metrics"]
    assert data["folder"] == str(tmp_path / "run" / "student") and data["seed"] == 3
    assert heard == [("dmd", ["--teacher", "toy", "--steps", "2", "--seed", "3", "--output_dir", str(tmp_path / "run")])]
    assert report == [{"metric": "conditional_kid_flat", "steps": 4, "here": 0.45, "row": 0.4, "tolerance": 0.1, "verdict": "agrees"}]
    monkeypatch.setattr(registry, "STUDENTS", (rebuilt_row(0.2),))
    err = fails(capsys, 1, "make", "dmd.toy-2step", "--out", str(tmp_path / "run"))
    assert "made with torch 0.0.1" in err
    monkeypatch.setattr(registry, "STUDENTS", (registry.student("dmd.toy-2step"), registry.shipped("dmd.x", "dmd", "toy", (4,), "mit")))
    assert "is shipped" in fails(capsys, 2, "make", "dmd.x")


@pytest.mark.slow
def test_make_really_trains(capsys, monkeypatch, tmp_path):
    """A row's command through the method's own script, to a student that opens by the row's name."""
    import torch
    row = replace(rebuilt_row(1.0, tolerance=1e9), command="--teacher toy --steps 2 --batch 8")
    monkeypatch.setattr(registry, "STUDENTS", (row,))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zoo"])
    cli.main(["make", row.name])
    capsys.readouterr()
    points = zoo.load(row.name)(class_labels=[0, 1], generator=torch.Generator().manual_seed(0)).images
    assert points.shape == (2, 2) and torch.isfinite(points).all()


# ------------------------------------------------------------------------------------------------------------- students
TIMES = (1.0, 0.75, 0.5, 0.25)


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """One exported student of every kind the trainers make."""
    import dataclasses
    from pathlib import Path

    import tiny
    from zoo.backbones import load, text, toy, toy_video
    from zoo.hub.contract import contract_for
    from zoo.hub.export import export_student
    sys.path.insert(0, str(Path(__file__).parent / "backbones"))
    import tiny_a
    root = tmp_path_factory.mktemp("cli")
    tiny_a.build("dit", root / "teacher-dit")
    index = root / "teacher-dit" / "model_index.json"            # as the Hub's has it; diffusers does not write it again
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": {"0": "tench, Tinca tinca", "1": "goldfish"}}))
    sd = load(str(tiny.tiny_sd(root / "teacher-sd")))
    made = {"sd": (sd, {}), "lora": (sd, {"lora": 4}), "guided": (sd, {"guidance_embedding": True}), "two": (sd, {"two_time": True}),
            "pixel": (load(str(tiny.tiny_pixel(root / "teacher-pixel"))), {}),
            "plain": (load(str(tiny.tiny_pixel(root / "teacher-plain", classes=None, channels=3))), {}),
            "dit": (load(str(root / "teacher-dit")), {}), "toy": (toy.Toy(fit_steps=1), {}), "text": (text.load("toy"), {}),
            "video": (toy_video.ToyVideo(), {})}
    rules = {"two": "jump", "text": "unmask", "video": "causal"}
    terms = {"guided": {"guidance": 3.0, "guidance_range": (1.0, 8.0)}}
    out = {}
    for name, (model, options) in made.items():
        contract = contract_for(model, TIMES, rules.get(name, "renoise"), **terms.get(name, {}))
        if name == "video":
            contract = dataclasses.replace(contract, layout={"shape": list(model.shape), "chunk": 2, "sink": 0, "window": 0, "slots": False})
        out[name] = str(export_student(model, model.make("student", **options), root / name, contract, lora_rank=options.get("lora", 0)))
    return out


@pytest.fixture
def student(students):
    return students["sd"]


WHAT = {"sd": "red heart", "lora": "red heart", "guided": "red heart", "two": "red heart", "pixel": "3", "plain": None, "dit": "goldfish", "toy": "0",
        "text": "ab", "video": "disk moving left"}

KINDS = [pytest.param(k, marks=[pytest.mark.slow] * (k in ("lora", "guided", "two", "plain"))) for k in WHAT]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_student_is_sampled_or_refused(capsys, students, kind, tmp_path):
    """The same seed gives the same bytes, another seed others: also where a stock pipeline draws noise by itself (DiT)."""
    from PIL import Image
    words = ["sample", students[kind], *filter(None, [WHAT[kind]])]
    if kind == "toy":
        assert "samples are points, not pictures: draw them with zoo.load(" in fails(capsys, 2, *words)
        return
    if kind == "text":
        texts = run(capsys, *words, "--seeds", "2").split()
        assert len(texts) == 2 and all(t.startswith("ab") for t in texts)
        data = json.loads(run(capsys, *words, "--seeds", "2", "--json"))
        assert data["texts"] == texts and data["seeds"] == [0, 1]
        assert f"drop --out and write > {tmp_path / 'a.txt'}" in fails(capsys, 2, *words, "--out", str(tmp_path / "a.png")).replace("a.png", "a.txt")
        assert "takes no guidance" in fails(capsys, 2, *words, "--guidance", "1")
        return
    out, ending = [], "gif" if kind == "video" else "png"
    for i, seed in enumerate(("0", "0", "1")):
        torch.manual_seed(100 + i)                           # what a pipeline might draw from instead
        data = json.loads(run(capsys, *words, "--seed", seed, "--steps", "4", "--out", str(tmp_path / f"{i}.{ending}"), "--json"))
        assert data["seeds"] == [int(seed)] and data["steps"] == 4 and data["out"] == str(tmp_path / f"{i}.{ending}")
        out.append((tmp_path / f"{i}.{ending}").read_bytes())
    assert out[0] == out[1] != out[2]
    picture = Image.open(tmp_path / f"0.{ending}")
    assert list(picture.size) == data["size"] and getattr(picture, "n_frames", 1) == data["frames"] == (8 if kind == "video" else 1)
    if kind in ("plain", "video"):
        refused = ("nonsense", "leave it out") if kind == "plain" else (WHAT[kind], "give a path such as")
        assert refused[1] in fails(capsys, 2, "sample", students[kind], refused[0], "--out", str(tmp_path / "a.jpg"))
    else:
        assert "give one" in fails(capsys, 2, "sample", students[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_student_is_measured_or_refused(capsys, students, kind, tmp_path):
    if kind in ("toy", "text", "video"):
        err = fails(capsys, 2, "eval", students[kind], "--prompts", __file__)
        assert err.count("\n") == 1 and ("zoo sample" in err or "zoo.load" in err)
        return
    (tmp_path / "prompts.txt").write_text(f"{WHAT[kind]}\n")
    words = ["eval", students[kind], "--seeds", "1", "--steps", "1", "--json"]
    if kind == "plain":
        assert "leave it out" in fails(capsys, 2, *words, "--prompts", str(tmp_path / "prompts.txt"))
        assert "--seeds N" in fails(capsys, 2, *words, "--limit", "3")
    else:
        words += ["--prompts", str(tmp_path / "prompts.txt")]
    rows = {r["metric"]: r for r in json.loads(run(capsys, *words))["rows"]}
    parts = {"pixel": {"denoiser"}, "plain": {"denoiser"}, "dit": {"denoiser", "vae"}}.get(kind, {"text_encoder", "denoiser", "vae"})
    assert {m.removeprefix("ms_") for m in rows if m.startswith("ms_")} == parts | {"rest", "total"}
    assert all(rows[f"ms_{p}"]["value"] > 0 for p in parts) and rows["ms_denoiser"]["note"] == "1 call of the network"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_student_is_exported_or_refused(capsys, students, kind, tmp_path):
    words = ["export", students[kind], "--to", "fused", "--out", str(tmp_path / "new")]
    if kind in ("toy", "text", "video"):
        assert fails(capsys, 2, *words).count("\n") == 1 and not (tmp_path / "new").exists()
        return
    report = json.loads(run(capsys, *words, "--json"))
    assert report["maximum_error"] < 1e-6 and report["written"] == str(tmp_path / "new")
    run(capsys, "sample", str(tmp_path / "new"), *filter(None, [WHAT[kind]]), "--out", str(tmp_path / "a.png"))


def test_one_picture_by_default_and_a_grid_of_several(capsys, student, tmp_path, monkeypatch):
    from PIL import Image
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "sample", student, "red heart", "--steps", "2").strip() == "sample.png" and Image.open("sample.png").size == (16, 16)
    assert run(capsys, "sample", student, "red heart", "--steps", "2", "--seeds", "3", "--out", "a.png").strip() == "a.png"
    row = Image.open("a.png")
    assert row.size == (48, 16) and row.crop((0, 0, 16, 16)).tobytes() == Image.open("sample.png").tobytes()
    run(capsys, "sample", student, "red heart", "--steps", "1", "--seeds", "6", "--out", "b.png")
    assert Image.open("b.png").size == (48, 32)
    assert "trained for 1, 2, 4" in fails(capsys, 2, "sample", student, "red heart", "--steps", "3")


def test_guidance_is_passed_on_within_what_was_trained(capsys, students, tmp_path):
    from pathlib import Path
    for w in ("1", "6"):
        run(capsys, "sample", students["guided"], "red heart", "--guidance", w, "--out", str(tmp_path / f"{w}.png"))
    # An untrained student's guidance input is still zero: what is held is that the scale arrives.
    import zoo.loading
    pipe, heard = zoo.loading.load(students["guided"]), []
    stock = type(pipe).__mro__[1]
    original = stock.__call__
    stock.__call__ = lambda self, *a, **k: heard.append(k.get("guidance_scale")) or original(self, *a, **k)
    try:
        from zoo import calls
        calls.draw(pipe, {"prompt": "red"} | calls.guidance_in(pipe, 6.0, "x"), 1, 0)
    finally:
        stock.__call__ = original
    assert heard == [6.0] and Path(tmp_path / "6.png").exists()
    assert "was trained for 1 to 8" in fails(capsys, 2, "sample", students["guided"], "red heart", "--guidance", "9")
    assert "takes no guidance scale" in fails(capsys, 2, "sample", students["pixel"], "3", "--guidance", "1")


def test_class_names(capsys, students, tmp_path, monkeypatch):
    """By the pipeline's own names, or Fashion-MNIST's for students of that teacher alone; what is no class is answered with those there are."""
    monkeypatch.chdir(tmp_path)
    by_name, by_number = (run(capsys, "sample", "dmd.fashion-4step", word, "--out", f"{word}.png") for word in ("sneaker", "7"))
    assert (tmp_path / "sneaker.png").read_bytes() == (tmp_path / "7.png").read_bytes() and by_name != by_number
    assert "did" not in fails(capsys, 2, "sample", students["pixel"], "sneaker") and not (tmp_path / "sample.png").exists()
    assert "tench" in fails(capsys, 2, "sample", students["dit"], "tenchh")
    assert "a number from 0 to 3" in fails(capsys, 2, "sample", students["pixel"], "4")           # 4 is the null class


# -------------------------------------------------------------------------------------------------------------- the rest
def test_every_command_gives_json(capsys, students, monkeypatch, tmp_path):
    """Also where a library prints: stdout is one JSON document."""
    import argparse
    listed = next(a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert {n for n, p in listed.items() if "--json" not in p._option_string_actions} == {"train"}        # all of its flags are the script's
    assert json.loads(run(capsys, "cite", "dmd", "--json")) == {"name": "dmd", "bibtex": zoo.cite("dmd")}
    assert json.loads(run(capsys, "where", "dmd2", "--json")) == {"name": "dmd", "path": str(registry.method("dmd").path)}
    monkeypatch.setattr("zoo.hub.card.refresh", lambda folder: print("noise") or f"{folder}/README.md")
    assert json.loads(run(capsys, "card", students["sd"], "--json")) == {"folder": students["sd"], "card": f"{students['sd']}/README.md"}
    assert "recipes" not in json.loads(run(capsys, "show", "dmd", "--json")) and json.loads(run(capsys, "show", "dmd", "--recipes", "--json"))["recipes"]


def test_commands_of_the_pages_are_commands():
    """What the README and the pages of docs/ tell a reader to type is understood by the command line, with these flags."""
    import re
    import shlex
    from pathlib import Path
    root = Path(__file__).parent.parent
    found = set()
    for page in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^(?:    )?(zoo [a-z]+ [^\n]*)$", text, re.M)
        blocks += re.findall(r"`(zoo (?:sample|push|eval|export|verify|card|make|show|cite|students) [^`\n]+)`", text)
        found |= {line.split("  #")[0].strip() for line in blocks}
    assert any("zoo sample outputs/dmd-emoji/student" in line for line in found) and len(found) > 5
    for line in sorted(found):
        args = cli.parser().parse_args(shlex.split(line)[1:])
        assert args.command == "sample" or not hasattr(args, "prompt")
        if line.startswith("zoo sample outputs/dmd-emoji/student"):
            assert (args.seeds, args.out, args.steps) == (1, "heart.png", 4)            # one picture, as in the Python lines above it


def test_bars_are_for_people(capsys, students, monkeypatch, tmp_path):
    """On a terminal the grid, eval and export draw bars; into files, and with --json, nothing is written to stderr at all."""
    (tmp_path / "prompts.txt").write_text("red heart\nblue star\n")
    jobs = {"sampling": ("sample", students["sd"], "red heart", "--seeds", "2", "--out", str(tmp_path / "a.png")),
            "hpsv2": ("eval", students["sd"], "--prompts", str(tmp_path / "prompts.txt"), "--steps", "1"),
            "writing fused": ("export", students["sd"], "--to", "fused", "--out", str(tmp_path / "new"))}
    import shutil
    import types
    monkeypatch.setitem(sys.modules, "hpsv2", types.SimpleNamespace(score=lambda p, t, hps_version: [0.0], __spec__=object()))
    for what, words in jobs.items():
        for terminal in (False, True):
            for more in ((), ("--json",)):
                shutil.rmtree(tmp_path / "new", ignore_errors=True)
                capsys.readouterr()
                with monkeypatch.context() as patch:
                    patch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
                    cli.main([*words, *more])
                err = capsys.readouterr().err
                assert (what in err) if terminal and not more else err == "", (what, terminal, more, err)


def test_errors_that_are_bugs_keep_their_traceback(monkeypatch):
    def broken(args):
        raise RuntimeError("a bug")
    monkeypatch.setattr(cli, "list_methods", broken)
    with pytest.raises(RuntimeError):
        cli.main(["methods"])
    assert issubclass(UserError, ValueError)
