"""What the scripts of this folder share: where the adapters lie, and the LoRA's style, which a number can tell."""
from __future__ import annotations

from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "zoo/assets/emoji/teacher"
STUDENT = ROOT / "zoo/assets/students/dmd.emoji-4step"
MADE = ROOT / "outputs/downstream"
LORA = MADE / "delft/pytorch_lora_weights.safetensors"
CONTROLNET = MADE / "controlnet"
IP_ADAPTER = MADE / "ip_adapter"

LUMINANCE = np.array([0.299, 0.587, 0.114])
DARK, LIGHT = np.array([0.06, 0.14, 0.45]), np.array([1.0, 1.0, 1.0])       # the two colours of Delft's tiles


def delft(images: np.ndarray) -> np.ndarray:
    """Pictures [..., 3] in [0, 1] in blue on white: their luminance laid on the line between DARK and LIGHT."""
    return DARK + (images @ LUMINANCE)[..., None] * (LIGHT - DARK)


def off_style(images: np.ndarray) -> float:
    """Mean distance of the pixels from the line between DARK and LIGHT: 0 for pictures in blue on white."""
    way = (LIGHT - DARK) / np.linalg.norm(LIGHT - DARK)
    off = images - LIGHT
    return float(np.linalg.norm(off - (off @ way)[..., None] * way, axis=-1).mean())
