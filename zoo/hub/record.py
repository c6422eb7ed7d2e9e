"""Names and reading of an exported folder, for everything that must not wait for torch. What is read may come from a stranger."""
from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError
from .contract import Contract

WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
RECORD = "fewstep.json"
SLOT_FOLDERS = {"r": "two_time", "guidance": "guidance"}
PARTS = (None, "unet", "transformer", *SLOT_FOLDERS.values())        # where the weights of a slot may lie


def read_record(folder: str | Path) -> tuple[Contract, dict]:
    """Contract and record of an exported student. Raises UserError when `folder` is none, or its record cannot be read or says
    something no export writes."""
    path = Path(folder) / RECORD
    if not path.exists():
        raise UserError(f"{folder} is not an exported student (it has no {RECORD}): give the folder a run of these scripts exported")
    try:
        data = json.loads(member(folder, RECORD).read_text(encoding="utf-8"))
        contract, record = Contract.from_json(data), {"teacher": "", "slot": None, "slot_weights": None, "lora_rank": 0} | data["student"]
        family = record["family"]
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}): export the student again") from error
    said = {"family": isinstance(family, str), "teacher": isinstance(record["teacher"], str), "slot": record["slot"] in (None, *SLOT_FOLDERS),
            "slot_weights": record["slot_weights"] in PARTS, "lora_rank": isinstance(record["lora_rank"], int),
            "length": family != "text" or isinstance(record.get("length"), int), "base_bits": record.get("base_bits", 0) in (0, 4, 8, 16)}
    for key, fits in said.items():
        if not fits:
            raise UserError(f"{path} says {key} {record.get(key)!r}, which no export writes: export the student again, or do not trust it")
    return contract, record


def base_revision(folder: str | Path) -> str | None:
    """The commit of the teacher's repository that the student was made with, where the record knows it."""
    card = json.loads(member(folder, RECORD).read_text(encoding="utf-8")).get("card")
    known = card.get("base_revision") if isinstance(card, dict) else None
    return known if isinstance(known, str) else None


def member(folder: str | Path, name: str | Path) -> Path:
    """The file or folder `name` inside `folder`. Raises UserError when it leaves it, by its name or by a link: what lies elsewhere is not
    the student's. The links of the client's cache are no way out, since they end in the blobs of the same repository."""
    folder, name = Path(folder), Path(name)
    root = folder.resolve()
    places = [root] + ([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])
    path = folder / name
    if name.is_absolute() or ".." in name.parts or not any(path.resolve().is_relative_to(place) for place in places):
        raise UserError(f"{name} leaves {folder}, and is not opened: copy the student with its files (cp -rL), or do not trust it")
    return path
