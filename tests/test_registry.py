"""Rows, scripts and README agree; every script is short, documented, importable, and has no dead option."""
import ast
import dataclasses
import importlib
import io
import json
import re
import subprocess
import sys
import tokenize
import typing
from pathlib import Path

import pytest
import tyro

import zoo
from zoo import registry
from zoo.run import RunConfig, parse

ROOT = Path(__file__).parent.parent
NAMES = [m.name for m in registry.METHODS]
COLUMNS, LINES = 100, 120


def code_lines(source: str) -> int:
    """Lines of code at COLUMNS columns: docstrings, comments and blank lines are free, a longer line counts as several."""
    free = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    width: dict[int, int] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in free:
            continue
        for number in range(token.start[0], token.end[0] + 1):
            end = token.end[1] if number == token.end[0] else len(source.splitlines()[number - 1])
            width[number] = max(width.get(number, 0), end)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            for number in range(node.body[0].lineno, node.body[0].end_lineno + 1):
                width.pop(number, None)
    return sum(-(-w // COLUMNS) for w in width.values())


def module(name: str):
    return importlib.import_module(registry.method(name).path.stem)


def test_code_lines_counts_code_only():
    assert code_lines('"""Doc\n\nstring."""\n\n# comment\nx = 1  # ' + "c" * 200 + "\n") == 1
    assert code_lines('def f():\n    """Doc."""\n    return (1,\n            2)\n') == 3
    assert code_lines("x = '" + "a" * 120 + "'\n") == 2
    assert code_lines("x = '''a\n\nb'''\n") == 2


def test_rows_are_the_scripts_on_disk():
    on_disk = sorted(p.name for p in (ROOT / "train_scripts").glob("train_*.py"))
    assert sorted(m.script for m in registry.METHODS) == on_disk
    assert len(set(NAMES)) == len(NAMES)
    for m in registry.METHODS:
        assert m.script == f"train_{m.name}.py" and m.status in ("beta", "stable")


@pytest.mark.parametrize("name", NAMES)
def test_docstring(name):
    row, doc = registry.method(name), registry.method(name).doc
    assert row.title in " ".join(doc.splitlines()[0].split())
    assert row.url in doc
    assert row.authors[0] in doc.splitlines()[1]
    assert re.search(r"^Departures", doc, re.M)
    assert f"accelerate launch train_scripts/{row.script}" in doc
    assert f"python train_scripts/{row.script} --teacher toy" in doc


@pytest.mark.parametrize("name", NAMES)
def test_launch_lines_parse(name):
    """What the docstring tells people to type is accepted."""
    config = module(name).Config
    for line in re.findall(rf"train_scripts/{registry.method(name).script}(.*)", registry.method(name).doc):
        flags = line.split("#")[0].replace("...", "").split()
        assert isinstance(parse(config, flags, tyro), RunConfig)


@pytest.mark.parametrize("name", NAMES)
def test_script_is_short(name):
    assert code_lines(registry.method(name).path.read_text(encoding="utf-8")) <= LINES


@pytest.mark.parametrize("name", NAMES)
def test_script_is_a_script(name):
    """Importable without side effects, with Config, main and the row's name; it imports no other script."""
    script = module(name)
    assert issubclass(script.Config, RunConfig) and script.Config.method == name and callable(script.main)
    tree = ast.parse(registry.method(name).path.read_text(encoding="utf-8"))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not {i for i in imported if i.startswith(("train_", "make_"))}


def other_value(field: dataclasses.Field, kind) -> tuple[object, list[str]]:
    """A value that is not the default, and the words that say it on the command line."""
    flag = f"--{field.name}"
    if kind is bool:
        return not field.default, [flag if not field.default else f"--no_{field.name}"]
    if typing.get_origin(kind) is typing.Literal:
        value = next(v for v in typing.get_args(kind) if v != field.default)
    elif typing.get_origin(kind) is tuple:
        value = tuple(v / 2 + 0.25 for v in field.default)
        return value, [flag, *map(str, value)]
    else:
        value = {int: lambda d: d + 3, float: lambda d: d + 0.5, str: lambda d: d + "x"}[kind](field.default)
    return value, [flag, str(value)]


@pytest.mark.parametrize("name", NAMES)
def test_every_option_parses(name):
    config = module(name).Config
    kinds = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        value, words = (None, []) if field.name == "recipe" else other_value(field, kinds[field.name])
        if words:
            assert getattr(parse(config, words, tyro), field.name) == value, words


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_parses(name, capsys):
    config = module(name).Config
    for recipe, preset in config.recipes.items():
        cfg = parse(config, ["--recipe", recipe, "--batch", "7"], tyro)
        assert preset["source"] and cfg.batch == 7 and cfg.recipe == recipe
        assert all(getattr(cfg, k) == v for k, v in preset.items() if k not in ("source", "batch"))
        assert ("deviates: batch = 7" in capsys.readouterr().err) == ("batch" in preset)
    with pytest.raises(zoo.UserError, match="nothing-of-the-kind"):
        parse(config, ["--recipe", "nothing-of-the-kind"], tyro)


def reads(path: Path) -> set[str]:
    """Names read as `cfg.NAME` or `<anything>.cfg.NAME`."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Attribute)]
    return {n.attr for n in nodes if (isinstance(n.value, ast.Name) and n.value.id == "cfg")
            or (isinstance(n.value, ast.Attribute) and n.value.attr == "cfg")}


# Read under a computed name or before there is a Config: `_due(getattr(run.cfg, f"{f}_every"))`.
READ_BY_NAME = {"sample_every": "watch.py", "measure_every": "watch.py"}


@pytest.mark.parametrize("name", NAMES)
def test_no_dead_option(name):
    inside = set().union(*(reads(p) for p in (ROOT / "zoo").rglob("*.py")))
    used = inside | reads(registry.method(name).path)
    for field, where in READ_BY_NAME.items():
        if field.removesuffix("_every") in (ROOT / "zoo" / where).read_text(encoding="utf-8"):
            used.add(field)
    assert {f.name for f in dataclasses.fields(module(name).Config)} - used == set()


def test_lookup():
    assert registry.method("dmd").arxiv == "2405.14867"
    assert [m.name for m in zoo.methods("mean*")] == ["meanflow"]
    with pytest.raises(zoo.UserError, match="did you mean meanflow"):
        registry.method("mean_flow")
    with pytest.raises(zoo.UserError, match="there are .*dmd"):
        registry.method("zzzzz")


def test_students_filter(monkeypatch):
    rows = (registry.Student("a", "dmd", "emoji", "x/a", (4, 2, 1), "mit"), registry.Student("b", "lcm", "emoji", "x/b", (4,), "mit"))
    monkeypatch.setattr(registry, "STUDENTS", rows)
    assert [s.name for s in zoo.students()] == ["a", "b"]
    assert [s.name for s in zoo.students(steps=1)] == ["a"]
    assert [s.name for s in zoo.students(method="lcm", teacher="emoji")] == ["b"]
    with pytest.raises(zoo.UserError, match="no field colour"):
        zoo.students(colour="red")


def test_students_by_base_and_by_other_names_of_a_method():
    assert {"dmd2.sdxl-4step", "dmd2.sdxl-4step-lora"} <= {s.name for s in zoo.students(method="dmd2", base="sdxl")}
    assert zoo.students(method="dmd2", base="sdxl") == zoo.students(method="dmd", base="SDXL") == zoo.students(method="dmd", base="stable-diffusion-xl-base")
    assert all("FLUX" in s.teacher for s in zoo.students(base="flux")) and zoo.students(base="flux")
    assert {s.name for s in zoo.students("hyper-sd.sd15*")} == {s.name for s in zoo.students("hyper-sd*", base="sd1.5")}
    assert all(8 in s.steps for s in zoo.students(steps=8)) and not zoo.students(base="no such model")
    assert registry.method("dmd2") is registry.method("dmd")


def test_unknown_students_are_answered_with_the_nearest():
    with pytest.raises(zoo.UserError, match="unknown student 'sdxl-turb': did you mean sdxl-turbo"):
        registry.student("sdxl-turb")
    with pytest.raises(zoo.UserError, match="did you mean hyper-sd.sdxl-4step"):
        zoo.cite("hyper-sd.sdxl-4stp")


def test_rows_of_our_own_are_one_call(monkeypatch):
    shipped = registry.shipped("dmd.fashion-4step", "dmd", "fashion", (4, 2, 1), "mit")
    rebuilt = registry.rebuilt("lcm.emoji-4step", "lcm", "emoji", (4, 2, 1), "apache-2.0", "--teacher emoji", 0, {"torch": "2.13.0"},
                               (registry.Metric("kid_flat", 0.4, 4, "emoji", "measured.json", tolerance=0.1),))
    monkeypatch.setattr(registry, "STUDENTS", (shipped, rebuilt))
    assert shipped.source == "assets/students/dmd.fashion-4step" and rebuilt.source == "outputs/lcm.emoji-4step/student"
    assert [s.name for s in zoo.students(kind="rebuilt")] == ["lcm.emoji-4step"]


def test_students_name_registered_methods():
    known = {m.name for m in registry.METHODS} | {p.name for p in registry.PAPERS} | {"undisclosed"}
    for row in registry.STUDENTS:
        assert row.method in known and (not row.paper or row.paper in known), row.name
        assert row.steps == tuple(sorted(row.steps, reverse=True)) and row.usual_steps in row.steps, row.name


STUDENT_NAMES = [s.name for s in registry.STUDENTS]
COMMUNITY = [s for s in registry.STUDENTS if s.kind == "community"]


def test_rows_are_pinned_to_a_commit_or_say_that_none_is_known():
    for row in COMMUNITY:
        assert bool(re.fullmatch(r"[0-9a-f]{40}", row.revision)) != ("opened at its newest commit" in row.note and row.revision == "main"), row.name
    assert sum(row.revision != "main" for row in COMMUNITY) > 0.7 * len(COMMUNITY)
    assert registry.community.COMMITS.keys() <= {row.source for row in COMMUNITY}                 # and no commit of nothing


def test_a_verified_row_has_a_licence_and_an_unknown_one_is_said():
    assert {row.name for row in COMMUNITY if row.license == "unknown" and row.status == "verified"} == set()
    for row in COMMUNITY:
        assert (row.license == "unknown") == ("licence not verified" in row.note), row.name
    # a student of a base that forbids commercial use forbids it too, where both are known
    from zoo.hub.lint import non_commercial
    for row in COMMUNITY:
        assert non_commercial({"license": row.license}) or not non_commercial({"license": row.base_license}), row.name


def test_every_field_of_a_row_is_read_somewhere():
    """No row says what nobody asks for: attributes read in the package and its benchmarks."""
    files = [p for place in ("zoo", "benchmarks") for p in (ROOT / place).rglob("*.py")]
    read = {n.attr for p in files for n in ast.walk(ast.parse(p.read_text(encoding="utf-8"))) if isinstance(n, ast.Attribute)}
    for kind in (registry.Student, registry.Method, registry.Metric, registry.Paper):
        assert {f.name for f in dataclasses.fields(kind)} - read == set(), kind


@pytest.mark.parametrize("name, arxiv", [("sd-turbo", "2311.17042"), ("sdxl-turbo", "2311.17042"), ("turbo", "2311.17042"), ("add", "2311.17042"),
                                         ("sdxl-lightning.4step", "2402.13929"), ("sdxl-lightning", "2402.13929"), ("hyper-sd.sdxl-4step", "2404.13686"),
                                         ("hyper-sd", "2404.13686"), ("lcm-lora.sdxl", "2311.05556"), ("lcm-lora", "2311.05556"), ("lcm.sdxl", "2310.04378"),
                                         ("pcm.sdxl-2step", "2405.18407"), ("pcm", "2405.18407"), ("tcd.sd15", "2402.19159"), ("tdm.sd3-4step", "2503.06674"),
                                         ("sana-sprint.1.6b", "2503.09641"), ("sana-sprint", "2503.09641"), ("anyflow", "2605.13724"), ("dmd2", "2405.14867"),
                                         ("dmd2.sdxl-4step", "2405.14867"), ("flux.1-schnell", "2403.12015"), ("z-image-turbo", "2511.22677")])
def test_a_student_its_family_and_its_paper_are_cited(name, arxiv, capsys):
    from zoo import cli
    text = zoo.cite(name)
    assert text.count("@article{") == 1 and f"arXiv:{arxiv}" in text and "others" not in text
    cli.main(["cite", name])
    assert text in capsys.readouterr().out
    cli.main(["show", name])
    assert arxiv in capsys.readouterr().out


def test_what_has_no_paper_is_cited_by_its_place_and_what_is_nothing_is_refused():
    assert zoo.cite("flux.2-klein-4b") == ("@misc{flux2klein4b,\n  title = {black-forest-labs/FLUX.2-klein-4B},\n"
                                           "  url   = {https://huggingface.co/black-forest-labs/FLUX.2-klein-4B}\n}")
    for name in ("", "undisclosed", "nothing", "sdxl-light"):
        with pytest.raises(zoo.UserError, match=f"unknown method '{name}'"):
            zoo.cite(name)
    with pytest.raises(zoo.UserError, match="turbo has no script here, only students of others .sdxl-turbo, sd-turbo"):
        registry.method("turbo")
    assert {p.name for p in registry.PAPERS} <= {s.paper or s.method for s in registry.STUDENTS}
    assert set(registry.METHOD_ALIASES.values()) <= {m.name for m in registry.METHODS} | {p.name for p in registry.PAPERS}


def test_methods_are_our_own_scripts():
    assert not {m.name for m in zoo.methods()} & {p.name for p in registry.PAPERS}


def test_student_names_are_their_own():
    assert len(set(STUDENT_NAMES)) == len(STUDENT_NAMES)
    assert sum(s.kind == "shipped" for s in registry.STUDENTS) <= 6


@pytest.mark.parametrize("name", STUDENT_NAMES)
def test_row_of_a_student(name):
    """What a row says is something installed libraries can do; what it claims has a source."""
    import inspect

    import diffusers
    row = registry.student(name)
    assert row.kind in ("shipped", "rebuilt", "community") and row.status in ("verified", "unverified")
    assert row.license and row.base_license and zoo.cite(name).count("{") == zoo.cite(name).count("}")
    assert all(m.source and m.dataset and m.steps in row.steps for m in row.metrics)
    if row.kind == "rebuilt":
        assert row.command and row.versions and all(m.tolerance for m in row.metrics)
    if row.kind != "community":
        return
    assert row.facts and (row.status == "verified" or row.note)
    assert all(f.startswith("https://") for f in row.facts)
    assert row.parts in ("pipeline", "lora", "component") and bool(row.component) == (row.parts == "component")
    for file in (row.file, row.second_file):
        assert not file.startswith("/") and ".." not in file
    accepts = inspect.signature(getattr(diffusers, row.pipeline).__call__).parameters
    assert {row.guidance_argument, "num_inference_steps", *row.call} <= accepts.keys()
    assert not row.timesteps or ("timesteps" in accepts and all(len(t) == k for k, t in row.timesteps.items()))
    if row.scheduler:
        assert row.scheduler_config.keys() <= inspect.signature(getattr(diffusers, row.scheduler).__init__).parameters.keys()
    else:
        assert not row.scheduler_config


@pytest.mark.parametrize("name", NAMES)
def test_cite(name):
    text = zoo.cite(name)
    row = registry.method(name)
    assert text.startswith("@article{") and text.count("{") == text.count("}")
    assert row.title in text and row.arxiv in text and row.authors[-1] in text and f"20{row.arxiv[:2]}" in text


def test_readme_table_is_fresh():
    """Rewrite it with `python -m zoo.registry README.md`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert registry.refresh(text) == text


def test_import_is_light():
    """`import zoo` and the registry import neither torch nor diffusers."""
    code = ("import sys, zoo; zoo.methods(); zoo.cite('dmd'); import zoo.cli; "
            "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & sys.modules.keys(), sys.modules.keys()")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_shipped_rows_quote_the_committed_logs():
    """A number in a row is the number of the log it names."""
    for row in registry.students(kind="shipped"):
        assert (Path(registry.__file__).parent / row.source / "fewstep.json").exists(), row.name
        for metric in row.metrics:
            text = (ROOT / metric.source).read_text(encoding="utf-8")
            if metric.source.endswith(".json"):
                log = json.loads(text)
                [logged] = [r[metric.name] for r in log["rows"] if (r["who"], r["steps"]) == (row.name, metric.steps)]
                assert abs(logged - metric.value) < 0.5, (row.name, metric)
            else:
                assert f"| student | {metric.steps} | {metric.steps} | {metric.value:.4g} |" in text, (row.name, metric)


def test_rebuilt_rows_quote_the_committed_logs():
    """The flags of the row are those of the run that was measured, and its numbers are that run's."""
    rows = registry.students(kind="rebuilt")
    assert rows
    for row in rows:
        for metric in row.metrics:
            log = json.loads((ROOT / metric.source).read_text(encoding="utf-8"))
            [logged] = [r[metric.name] for r in log["rows"] if (r["who"], r["steps"]) == ("student", metric.steps)]
            assert abs(logged - metric.value) < 0.5 and f"{row.command} --seed {row.seed}" in log["command"], (row.name, metric)
