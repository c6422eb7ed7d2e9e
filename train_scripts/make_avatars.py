"""Pixel avatars: as many 32x32 pictures as wanted, every attribute known, for measuring generalisation.

Drawn by DiceBear's pixel-art style (https://www.dicebear.com, design CC0 1.0, code MIT) through Node.js and npm,
which only this script needs: the package ships a sample. Captions name every attribute in at most 14 words.
Seed 0 is the shipped sample. Who trains on avatars leaves out every fifth combination of attributes (`split_of`).

    python train_scripts/make_avatars.py                                            # the shipped 2,000
    python train_scripts/make_avatars.py --count 50000 --seed 1 --out avatars.parquet
"""
from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import tyro
from datasets import Dataset, Features, Image, Value

from zoo.errors import UserError

PACKAGES = ("@dicebear/core@9.4.3", "@dicebear/pixel-art@9.4.3", "@resvg/resvg-js@2.6.2")
# DiceBear's colours under names an eye at 32x32 tells apart
SKIN = {"ffdbac": "light", "f5cfa0": "light", "eac393": "medium", "e0b687": "medium", "cb9e6e": "tan",
        "b68655": "tan", "a26d3d": "dark", "8d5524": "dark"}
HAIR = {"cab188": "sandy", "a78961": "sandy", "83623b": "brown", "603a14": "brown", "603015": "brown",
        "611c17": "auburn", "612616": "auburn", "28150a": "black", "009bbd": "blue", "bd1700": "red",
        "91cb15": "green"}
SHIRT = {"5bc0de": "cyan", "428bca": "blue", "03396c": "navy", "88d8b0": "mint", "44c585": "green",
         "00b159": "green", "ff6f69": "coral", "d11141": "red", "ae0001": "maroon", "ffeead": "cream",
         "ffd969": "yellow", "ffc425": "yellow"}
HAT = {"2e1e05": "black", "2663a3": "blue", "989789": "gray", "3d8a6b": "green", "cc6192": "pink",
       "614f8a": "purple", "a62116": "red"}
BACKGROUND = {"b6e3f4": "blue", "c0aede": "purple", "ffd5dc": "pink", "ffdfbf": "peach"}
ATTRIBUTES = ("mood", "skin", "hair", "hair_color", "shirt", "beard", "glasses", "hat", "earrings",
              "background")


@dataclass
class Config:
    count: int = 2000
    seed: int = 0
    out: Path = Path("zoo/assets/avatars/avatars.parquet")
    work: Path = Path("runs/make_avatars")
    """Folder for the npm packages."""


def attributes(raw: dict) -> dict[str, str]:
    """DiceBear's `extra` in words; "none" for what is not drawn (its colour is reported all the same)."""
    def color(key: str, names: dict) -> str:
        return names[raw[key].lstrip("#").lower()]

    glasses = raw.get("glasses", "none")
    return {"mood": raw["mouth"].rstrip("0123456789"), "skin": color("skinColor", SKIN),
            "hair": raw["hair"].rstrip("0123456789"), "hair_color": color("hairColor", HAIR),
            "shirt": color("clothingColor", SHIRT), "beard": "beard" if "beard" in raw else "none",
            "glasses": {"dark": "sunglasses", "ligh": "glasses"}.get(glasses[:4], "none"),
            "hat": color("hatColor", HAT) if "hat" in raw else "none",
            "earrings": "earrings" if "accessories" in raw else "none",
            "background": color("primaryBackgroundColor", BACKGROUND)}


def caption(a: dict[str, str]) -> str:
    extras = [a["beard"], a["glasses"], f"{a['hat']} hat" if a["hat"] != "none" else "none", a["earrings"]]
    words = [a["mood"], a["skin"], a["hair"], a["hair_color"], "hair", a["shirt"], "shirt", *extras,
             a["background"], "background"]
    return " ".join(w for w in words if w != "none")


def split_of(caption: str) -> str:
    """"heldout" for one caption in five, and so for one combination of attributes in five, else "train"."""
    return "train" if zlib.crc32(caption.encode()) % 5 else "heldout"


def main(cfg: Config) -> None:
    if not (shutil.which("node") and shutil.which("npm")):
        raise UserError("node and npm not found: install Node.js 18 or later, or use the shipped sample, "
                        "zoo.data.avatars()")
    cfg.work.mkdir(parents=True, exist_ok=True)
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefix", cfg.work, *PACKAGES], check=True)
    script = shutil.copy(Path(__file__).with_suffix(".mjs"), cfg.work)  # Node looks for packages beside the file
    command = ["node", script, str(cfg.count), str(cfg.seed)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    rows = []
    for raw in map(json.loads, lines):
        drawn, png = io.BytesIO(base64.b64decode(raw["png"])), io.BytesIO()
        PIL.Image.open(drawn).convert("RGB").save(png, "png", optimize=True)
        known = attributes(raw)
        image = {"bytes": png.getvalue(), "path": None}
        rows.append({"image": image, "caption": caption(known), **known, "seed": raw["seed"]})
    text = {k: Value("string") for k in ("caption", *ATTRIBUTES, "seed")}
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, Features({"image": Image(), **text})).to_parquet(cfg.out)
    print(f"{len(rows)} avatars, {cfg.out.stat().st_size:,} bytes in {cfg.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
