"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, https://arxiv.org/abs/1708.07747; MIT): reading and finding it.

The 10,000 test images ship with the package; the 60,000 training images (26 MB) do not.
"""
from __future__ import annotations

import gzip
import lzma
import os
from pathlib import Path

import numpy as np

from zoo.errors import UserError

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
           "ankle boot")
ASSETS = Path(__file__).parent.parent / "assets" / "fashion"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
HUB_ID = "zalando-datasets/fashion_mnist"
ENV = "FEWSTEP_FASHION_MNIST"


def read_idx(path: str | Path) -> np.ndarray:
    """An idx file, plain, .gz or .xz, as a uint8 array: [N] labels or [N, H, W] images.

    The header: two zero bytes, the type (8 = uint8), the number of axes, one big-endian uint32 per axis.
    """
    raw = Path(path).read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    elif raw[:6] == b"\xfd7zXZ\0":
        raw = lzma.decompress(raw)
    if raw[:3] != b"\0\0\x08":
        raise UserError(f"{path} is not an idx file of bytes; expected Fashion-MNIST's *-ubyte.gz files")
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def _find(folder: Path, stem: str) -> Path | None:
    return next((folder / n for n in (f"{stem}.gz", f"{stem}.xz", stem) if (folder / n).is_file()), None)


def arrays(split: str = "train", path: str | Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 28, 28] and labels uint8 [N] of split "train" (60,000) or "test" (10,000).

    "test" is read from the package unless `path` is given. "train" is looked for in `path`, the folder in the
    environment variable FEWSTEP_FASHION_MNIST, Debian's package folder, and last on the Hub, in this order.
    Raises UserError when `path` lacks the files, or when none of the places has them.
    """
    if split not in ("train", "test"):
        raise UserError(f'Fashion-MNIST has no split "{split}"; use "train" or "test"')
    prefix = "train" if split == "train" else "t10k"
    named = path or (split == "train" and os.environ.get(ENV))
    for folder in [Path(named)] if named else [ASSETS] if split == "test" else [DEBIAN]:
        images, labels = (_find(folder, f"{prefix}-{s}-ubyte") for s in ("images-idx3", "labels-idx1"))
        if images and labels:
            return read_idx(images), read_idx(labels)
        if named:
            raise UserError(f"{folder} has no {prefix}-images-idx3-ubyte(.gz) and -labels-idx1-ubyte(.gz); "
                            f"point --data or {ENV} to the folder of Fashion-MNIST's files")
    return _from_hub(split)


def _from_hub(split: str) -> tuple[np.ndarray, np.ndarray]:
    from datasets import load_dataset
    try:
        data = load_dataset(HUB_ID, split=split).with_format("numpy")
    except Exception as error:  # offline, not cached, gated, moved: the remedy is the same
        raise UserError(f"Fashion-MNIST {split} images not found ({type(error).__name__}): set {ENV} to a "
                        f"folder with the *-ubyte.gz files, or `apt install dataset-fashion-mnist` ({DEBIAN}), "
                        f"or allow network access to the Hub set {HUB_ID}") from error
    return data["image"][:], data["label"][:].astype(np.uint8)
