"""A folder made ready to leave: what is in it, whether it may go, and a staged copy with its repository's name on the card."""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path, PurePosixPath

from ..errors import UserError
from .lint import check, front_matter, inside
from .record import LORA_WEIGHTS, RECORD, member
from .retry import SECRET

PLACE = "path/to/student"          # stands for the repository in usage lines until the folder is pushed
LIMIT = 250                        # files beyond which a repository of this kind is a mistake (and some clients split the upload)
# Files of weights that are not opened: they are pickles, or of formats that can hold code. The one list, for pushing, pulling and opening.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".h5")
LEFT = {".git", ".cache", "__pycache__", ".ipynb_checkpoints", ".DS_Store"}          # never part of a student
DATA = {".parquet", ".jsonl", ".csv", ".txt", ".arrow"}
SHARDS = re.compile(r"(.*/)?\d{8}\.safetensors")          # stored pairs (zoo.data.pairs)


def files(folder: str | Path) -> dict[str, Path]:
    """Repository path -> file of what would be pushed, sorted. Raises UserError for a link that leaves the folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder a run exported")
    out = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if LEFT & set(parts) or path.is_dir() and not path.is_symlink():
            continue
        if path.is_symlink():
            raise UserError(f"{path} is a link: copy the folder with its files (cp -rL) and push the copy")
        out["/".join(parts)] = path
    return out


def kind(folder: str | Path) -> str:
    """What a folder is: student (of ours), pipeline, lora, dataset, or card (a README.md alone, perhaps with pictures)."""
    names = files(folder)
    if RECORD in names:
        return "student"
    if "model_index.json" in names:
        return "pipeline"
    if LORA_WEIGHTS in names:
        return "lora"
    weights = [n for n in names if n.endswith(".safetensors")]
    if all(SHARDS.fullmatch(n) for n in weights) and (weights or any(Path(n).suffix in DATA for n in names)):
        return "dataset"
    if "README.md" in names and not weights:
        return "card"
    raise UserError(f"{folder} is not an exported student (it has no {RECORD}), no pipeline, LoRA, data set or card: give the folder a run exported")


def is_pickle(name: str) -> bool:
    return name.lower().endswith(PICKLES)


def pickles(names, parts) -> tuple[list[str], list[str]]:
    """Pickles among the files of a repository: (those that opening it would need, those that only lie beside safetensors or in no part).

    parts: folders of the pipeline's parts (keys of its model_index.json), or ["."] where the weights lie at the top."""
    place = lambda name: PurePosixPath(name).parent.as_posix()
    whole = {place(n) for n in names if n.endswith(".safetensors")}
    found = sorted(filter(is_pickle, names))
    needed = [n for n in found if place(n) in set(parts) - whole]
    return needed, [n for n in found if n not in needed]


def unsafe(folder: str | Path) -> list[str]:
    """Why weights must not be read from `folder` (a student of anybody, or the client's cache of one), one line each: links and paths
    that lead out of it, and safetensors files that are none. Raises UserError for the first link that leaves it."""
    folder, found = Path(folder), []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        member(folder, name)
        if path.suffix == ".safetensors" and path.is_file() and (reason := not_safe(path)):
            found.append(f"{name} {reason}")
        if ".safetensors.index." in path.name:               # which file holds which weight: names of files beside it
            try:
                shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError):
                found.append(f"{name} is no list of shards")
                continue
            found += [f"{name} names {s!r}, which is no safetensors file beside it" for s in sorted(map(str, shards))
                      if PurePosixPath(s).name != s or not s.endswith(".safetensors")]
    return found


def not_safe(path: Path) -> str | None:
    """Why a file of weights is refused, or None: a pickle by name or by content, or no whole safetensors file."""
    if is_pickle(path.name):
        return "is a pickle: opening it can run code; save weights as safetensors"
    if path.suffix != ".safetensors":
        return None
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            f.seek(0)
            head = f.read(4)
            return "is a pickle under another name" if head[:2] in (b"\x80\x02", b"\x80\x04", b"PK") else "is not a whole safetensors file"
        try:
            header = json.loads(f.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return "is not a whole safetensors file"
    return None if 8 + length + max(ends, default=0) == size else "is not a whole safetensors file"


def problems(folder: str | Path) -> list[str]:
    """Why the files of `folder` must not be pushed or opened, one line each: pickles, broken weights, tokens, unsafe names, code."""
    found = []
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    for name, path in files(folder).items():
        if not inside(name):
            found.append(f"{name!r} is not a plain relative path")
        if reason := not_safe(path):
            found.append(f"{name} {reason}")
        if path.suffix == ".py":
            found.append(f"{name} is code: a student is opened without trusting remote code")
        text = _readable(path)
        if SECRET.search(text) or token and len(token) > 5 and token in text:
            found.append(f"{name} holds an access token: remove it, and revoke the token")
    return found


def _readable(path: Path, most: int = 20_000_000) -> str:
    """Where a file may hold words, whatever its name: the header of weights, the first 20 MB of anything else."""
    with open(path, "rb") as f:
        if path.suffix == ".safetensors":
            most = min(int.from_bytes(f.read(8), "little"), most)
        return f.read(most).decode("utf-8", "replace")


def unfit_lora(path: Path) -> str | None:
    """Why a LoRA file cannot be used: its rank and alpha must be in its metadata, or alpha is lost on loading."""
    with open(path, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    data = json.loads((header.get("__metadata__") or {}).get("lora_adapter_metadata") or "{}")
    if not any(k.endswith("lora_alpha") for k in data):
        return f"{path.name} has no lora_adapter_metadata: without it alpha is lost; save it with save_lora_weights or this package"
    return None


def stage(folder: str | Path, temp: str | Path, repo_id: str) -> tuple[Path, str]:
    """A copy of `folder` under `temp`, its card naming `repo_id`; returns (copy, kind). Files are hard links where possible.

    Raises UserError for everything that must not leave: an unfit card, a pickle, a token, too many files."""
    what = kind(folder)
    names = files(folder)
    if len(names) >= LIMIT and what != "dataset":
        raise UserError(f"{folder} has {len(names)} files and a repository of this kind fewer than {LIMIT}: remove what is not part of it")
    found = problems(folder)
    if LORA_WEIGHTS in names and not found and (reason := unfit_lora(names[LORA_WEIGHTS])):
        found.append(reason)
    if found:
        raise UserError(f"{folder} is not fit to publish: {'; '.join(found)}")
    copy = Path(temp) / "staged"
    for name, path in names.items():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == "README.md":
            target.write_text(path.read_text(encoding="utf-8").replace(PLACE, repo_id), encoding="utf-8")
            continue
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)
    check(copy, "dataset" if what == "dataset" else "model")
    return copy, what


def lora_folder(student: str | Path, target: str | Path) -> Path:
    """The LoRA of an exported student as a folder of its own: adapter, scheduler with the contract, record, card and picture.

    Raises UserError when the student has no LoRA file that stock diffusers loads."""
    student, target = Path(student), Path(target)
    if not (student / LORA_WEIGHTS).exists():
        raise UserError(f"{student} has no {LORA_WEIGHTS} at its top: train with --lora, or push the whole folder")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty: give a new folder")
    for name, path in files(student).items():
        parts = (LORA_WEIGHTS, RECORD, "README.md", "scheduler/scheduler_config.json")
        if name in parts or path.suffix in (".png", ".webp") or re.match("(LICENSE|NOTICE|USE_POLICY)", name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
    return target


def blob_id(path: Path) -> str:
    """git's id of a file."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while part := f.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def differences(folder: Path, tree: dict) -> list[str]:
    """Paths of `folder` that a repository's tree lacks or holds otherwise. tree: path -> RepoFile."""
    out = []
    for name, path in files(folder).items():
        entry = tree.get(name)
        large = getattr(entry, "lfs", None)
        if entry is None or entry.size != path.stat().st_size:
            out.append(name)
        elif large is not None and large.sha256 != sha256(path) or large is None and entry.blob_id != blob_id(path):
            out.append(name)
    return out


def card_of(folder: str | Path) -> dict:
    """Metadata of the card at `folder`; empty when it has none."""
    path = Path(folder) / "README.md"
    return (front_matter(path.read_text(encoding="utf-8"))[0] or {}) if path.exists() else {}
