"""The Space as it would be pushed: the page, this package and the leaderboard's tables in one folder that needs only its requirements.

    python -m zoo.hub.space build/space                         # assemble and check
    hf upload USER/NAME build/space --repo-type space

From a clone only: an installed package has no page. `raceable` says which students of others the page offers."""
from __future__ import annotations

import argparse
import ast
import re
import shutil
import sys
from pathlib import Path

import yaml

from .. import registry
from ..errors import UserError
from ..rows import Student

ROOT = Path(__file__).resolve().parents[2]
TORCH, PYTHONS = ">=2.8,<2.12", ("3.10", "3.12")          # what ZeroGPU lists
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
REQUIRED = ("title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file", "suggested_hardware", "short_description", "license")
OTHER_NAMES = {"PIL": "pillow", "yaml": "pyyaml", "gradio_client": "gradio"}      # what is imported -> what is installed
RACEABLE = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
MOST_PRELOADED = 10                                       # repositories; the Hub refuses more
JUNK = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


# ------------------------------------------------------------------------------------------------------- what it loads
def raceable(row: Student) -> bool:
    """Whether the page can race this student of others on the Hub: weights put on the network or into the pipeline of its teacher, so
    that both draw the same noise at the same size (a whole pipeline may have a size of its own), sampled as its makers say."""
    return row.kind == "community" and row.status == "verified" and row.parts in ("lora", "component") and row.pipeline in RACEABLE and not row.pickle


def models() -> list[str]:
    """Hub ids that the page can load: those students and their teachers. What races at first is inside the package."""
    return sorted({name for row in registry.students() if raceable(row) for name in (row.source, row.teacher)})


# ------------------------------------------------------------------------------------------------------- assembling
def assemble(target: str | Path, root: Path = ROOT) -> Path:
    """Write the Space's folder at `target`, replacing an earlier one. Raises UserError without a clone, when `target` holds
    something else, and with everything `lint` finds."""
    target = Path(target)
    if not (root / "spaces" / "app.py").is_file():
        raise UserError(f"{root} is no clone of the project (it has no spaces/app.py): run this from one")
    if target.exists() and any(target.iterdir()) and not (target / "app.py").is_file():
        raise UserError(f"{target} holds something that is not a Space: give another folder")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(root / "spaces", target, ignore=JUNK)
    shutil.copytree(root / "zoo", target / "zoo", ignore=JUNK)
    shutil.rmtree(target / "zoo" / "_scripts", ignore_errors=True)
    shutil.copytree(root / "train_scripts", target / "zoo" / "_scripts", ignore=JUNK)
    for table in sorted((root / "benchmarks" / "leaderboard").glob("*/leaderboard.csv")):
        place = target / "leaderboard" / table.parent.name
        place.mkdir(parents=True)
        for file in (table, table.with_name("board.json")):
            if file.is_file():
                shutil.copy2(file, place)
    for name in ("LICENSE", "NOTICE"):
        shutil.copy2(root / name, target)
    found = lint(target, root)
    if found:
        raise UserError(f"the Space is not fit to push: {'; '.join(found)}")
    return target


# ------------------------------------------------------------------------------------------------------- checking
def lint(folder: str | Path, root: Path = ROOT) -> list[str]:
    """What would keep the folder from running as a Space; empty when nothing. root: where pyproject.toml is."""
    folder = Path(folder)
    pins = _pins(folder)
    return [*_front_matter(folder, pins), *_requirements(pins, root), *_references(folder, pins), *_package(folder)]


def _pins(folder: Path) -> dict:
    """Requirement by lower-case name; a missing file gives none."""
    from packaging.requirements import Requirement
    path = folder / "requirements.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    wanted = [Requirement(line.partition("#")[0].strip()) for line in lines if line.partition("#")[0].strip()]
    return {_plain(r.name): r for r in wanted}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pin(requirement) -> str:
    """The version of a `name==version`, else nothing."""
    exact = [s.version for s in requirement.specifier if s.operator == "=="]
    return exact[0] if len(exact) == 1 else ""


def _front_matter(folder: Path, pins: dict) -> list[str]:
    path = folder / "README.md"
    if not path.is_file():
        return ["README.md is missing"]
    text = path.read_text(encoding="utf-8")
    front, closed, _ = text.removeprefix("---\n").partition("\n---\n")
    try:
        data = yaml.safe_load(front) if text.startswith("---\n") and closed else None
    except yaml.YAMLError as error:
        return [f"README.md: the front matter is not YAML ({str(error).splitlines()[0]})"]
    if not isinstance(data, dict):
        return ["README.md has no front matter between --- lines"]
    from huggingface_hub import SpaceHardware
    found = [f"front matter: {k} is missing" for k in REQUIRED if not data.get(k)]
    says = lambda ok, what: [] if ok else [f"front matter: {what}"]
    gradio = _pin(pins["gradio"]) if "gradio" in pins else ""
    found += says(data.get("sdk") == "gradio", f"sdk is {data.get('sdk')!r}, the page is made with gradio")
    found += says(str(data.get("sdk_version")) == gradio, f"sdk_version {data.get('sdk_version')} is not the gradio of requirements.txt ({gradio or 'none'})")
    found += says(str(data.get("python_version")) in PYTHONS, f"python_version {data.get('python_version')} is none of {', '.join(PYTHONS)}")
    found += says((folder / str(data.get("app_file"))).is_file(), f"app_file {data.get('app_file')} does not exist")
    found += says(data.get("suggested_hardware") in {h.value for h in SpaceHardware},
                  f"suggested_hardware {data.get('suggested_hardware')!r} is no hardware of the Hub")
    found += says(len(str(data.get("short_description", ""))) <= 60, "short_description is longer than 60 characters")
    found += says({data.get("colorFrom"), data.get("colorTo")} <= COLOURS, f"colours are among {', '.join(sorted(COLOURS))}")
    named = data.get("models") or []
    found += says(not set(models()) - set(named), f"models lacks {', '.join(sorted(set(models()) - set(named)))}, which the page can load")
    found += says(not set(named) - set(models()), f"models names {', '.join(sorted(set(named) - set(models())))}, which the page does not load")
    return found + _preload(data.get("preload_from_hub") or [], named)


def _preload(entries: list, named: list[str]) -> list[str]:
    """Entries are `repository`, `repository file,file` or `repository file,file commit`. Whole repositories are not fetched: those of
    base models hold each weight in several formats."""
    found = [f"front matter: preload_from_hub has {len(entries)} entries, the Hub takes {MOST_PRELOADED}"] if len(entries) > MOST_PRELOADED else []
    for entry in map(str, entries):
        repository, *rest = entry.split(" ")
        if repository not in named:
            found.append(f"front matter: preload_from_hub fetches {repository}, which models does not name")
        if not 1 <= len(rest) <= 2 or not all(rest[0].split(",")) or (len(rest) == 2 and not re.fullmatch("[0-9a-f]{40}", rest[1])):
            found.append(f"front matter: preload_from_hub: write '{repository} file,file' and a commit, if any, of 40 digits")
        elif any(f.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")) for f in rest[0].split(",")):
            found.append(f"front matter: preload_from_hub fetches pickles of {repository}, which are never opened")
    return found


def _requirements(pins: dict, root: Path) -> list[str]:
    """Every line is pinned, and every dependency of the package is there, inside the range pyproject.toml gives; torch is one that ZeroGPU has."""
    import importlib.metadata

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    wanted = _project_dependencies(root / "pyproject.toml") or importlib.metadata.requires("fewstep") or []
    found = [] if pins else ["requirements.txt is missing or empty"]
    found += [f"requirements.txt does not pin {name}: write {name}==VERSION" for name, requirement in pins.items() if not _pin(requirement)]
    for text in wanted:
        want = Requirement(text)
        if want.marker is not None and "extra" in str(want.marker) and not any(want.marker.evaluate({"extra": e}) for e in ("space", "metrics")):
            continue
        have = pins.get(_plain(want.name))
        version = _pin(have) if have is not None else ""
        if have is None:
            found.append(f"requirements.txt does not pin {want.name}: it lacks the line")
        elif version and version not in want.specifier:
            found.append(f"requirements.txt has {want.name} {version}, pyproject.toml wants {want.specifier}")
    torch = _pin(pins["torch"]) if "torch" in pins else ""
    if torch and torch not in SpecifierSet(TORCH):
        found.append(f"torch {torch} is not what ZeroGPU has ({TORCH})")
    return found


def _project_dependencies(path: Path) -> list[str]:
    """Dependencies and those of the extras space and metrics. Python 3.10 has no TOML reader: then an empty list."""
    if sys.version_info < (3, 11) or not path.is_file():
        return []
    import tomllib
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["space"], *extras["metrics"]]


def _references(folder: Path, pins: dict) -> list[str]:
    """Modules that the page imports and files that it names must be in the folder or be installed by it."""
    found = []
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and not n.level}
        for name in sorted(names - set(sys.stdlib_module_names)):
            here = (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()
            if not here and _plain(OTHER_NAMES.get(name, name)) not in pins:
                found.append(f"{path.name} imports {name}, which is neither in the folder nor in requirements.txt")
        for name in re.findall(r'HERE / "([^"]+\.[a-z]+)"', path.read_text(encoding="utf-8")):
            if not (folder / name).is_file():
                found.append(f"{path.name} uses {name}, which is not in the folder")
    return found


def _package(folder: Path) -> list[str]:
    scripts = folder / "zoo" / "_scripts" / "train_dmd.py"
    return [f"{p.relative_to(folder)} is missing" for p in (folder / "zoo" / "__init__.py", scripts) if not p.is_file()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m zoo.hub.space", description="Assemble and check the Space as it would be pushed.")
    parser.add_argument("folder", help="where to write it, such as build/space")
    try:
        folder = assemble(parser.parse_args(argv).folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    print(f"{folder}: {size / 2**20:.0f} MB, fit to push: hf upload USER/NAME {folder} --repo-type space")


if __name__ == "__main__":
    main()
