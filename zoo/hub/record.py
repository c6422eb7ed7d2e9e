"""Names and reading of an exported folder, for everything that must not wait for torch."""
from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError
from .contract import Contract

WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
RECORD = "fewstep.json"
SLOT_FOLDERS = {"r": "two_time", "guidance": "guidance"}


def read_record(folder: str | Path) -> tuple[Contract, dict]:
    """Contract and record of an exported student. Raises UserError when `folder` is none, or its record cannot be read."""
    path = Path(folder) / RECORD
    if not path.exists():
        raise UserError(f"{folder} is not an exported student (it has no {RECORD}): give the folder a run of these scripts exported")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Contract.from_json(data), data["student"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}): export the student again") from error
