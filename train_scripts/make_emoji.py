"""Rebuild the embedded emoji set: captioned 64x64 emoji in three styles, one parquet file.

    python train_scripts/make_emoji.py                      # fetches the four packages with `npm pack`
    python train_scripts/make_emoji.py --tarballs folder/   # uses tarballs already in a folder

Images come from three openly licensed sets (Noto, Twemoji, Fluent 3D), labels from emojibase; attributions
are in zoo/assets/emoji/NOTICE. People, flags and keycap symbols are left out. Columns: image (WebP bytes,
a `datasets` Image), caption "{style} {label}", style, label, group, codepoint, source, license, split. Five
percent of the (concept, style) pairs carry split "heldout"; the two other styles of such a concept are always
in "train", so a held-out caption is a new combination of known words.
"""

import io
import json
import random
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import tyro
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

PACKAGES = {
    "noto": ("emoji-datasource-google", "16.0.0", "Apache-2.0"),
    "twemoji": ("emoji-datasource-twitter", "16.0.0", "CC-BY-4.0"),
    "fluent": ("@lobehub/fluent-emoji-3d", "1.1.0", "MIT"),
    "labels": ("emojibase-data", "17.0.0", "MIT"),
}
GROUPS = {"Smileys & Emotion": "smileys", "Animals & Nature": "animals", "Food & Drink": "food",
          "Travel & Places": "travel", "Activities": "activities", "Objects": "objects"}
LEFT_OUT = {"cigarette", "water pistol", "kitchen knife", "bomb", "syringe", "bikini", "pile of poo",
            "coffin"}
STYLES = ("noto", "twemoji", "fluent")
MAX_WORDS = 12


@dataclass
class Config:
    tarballs: Path | None = None  # folder holding the four .tgz files; None: run `npm pack`
    out: Path = Path("zoo/assets/emoji/emoji.parquet")
    size: int = 64
    quality: int = 90  # WebP
    heldout: float = 0.05  # fraction of all (concept, style) pairs
    seed: int = 0


def fetch(folder: Path) -> None:
    for name, version, _ in PACKAGES.values():
        subprocess.run(["npm", "pack", f"{name}@{version}", "--silent"], cwd=folder, check=True)


def read_package(folder: Path, key: str, wanted: str) -> dict[str, bytes]:
    """Members of a package tarball whose path matches the regular expression `wanted`, by base name."""
    name, version, _ = PACKAGES[key]
    path = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    with tarfile.open(path, "r:gz") as tar:
        return {Path(m.name).name: tar.extractfile(m).read() for m in tar if re.fullmatch(wanted, m.name)}


def normalise(label: str) -> str:
    text = unicodedata.normalize("NFKD", label.lower()).encode("ascii", "ignore").decode()
    return " ".join(re.sub(r"[^a-z0-9]+", " ", text.replace("'", "")).split())


def encode(raw: bytes, size: int, quality: int) -> bytes:
    """Flatten on white, pad to a square, resize, and compress to WebP."""
    picture = PILImage.open(io.BytesIO(raw)).convert("RGBA")
    side = max(picture.size)
    canvas = PILImage.new("RGBA", (side, side), "white")
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    buffer = io.BytesIO()
    small = canvas.convert("RGB").resize((size, size), PILImage.LANCZOS)
    small.save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()


def collect(folder: Path, cfg: Config) -> list[dict]:
    google = read_package(folder, "noto", r"package/(emoji\.json|img/google/64/.+\.png)")
    pictures = {"noto": google,
                "twemoji": read_package(folder, "twemoji", r"package/img/twitter/64/.+\.png"),
                "fluent": read_package(folder, "fluent", r"package/assets/.+\.webp")}
    labels = {e["hexcode"]: e["label"] for e in
              json.loads(read_package(folder, "labels", r"package/en/data\.json")["data.json"])}
    bare = {code.replace("-FE0F", ""): label for code, label in labels.items()}  # some omit the selector
    rows = []
    for entry in sorted(json.loads(google["emoji.json"]), key=lambda e: e["sort_order"]):
        code = entry["unified"]
        label = normalise(labels.get(code) or bare.get(code.replace("-FE0F", "")) or entry["name"])
        if entry["category"] not in GROUPS or label in LEFT_OUT:
            continue
        plain = entry["image"].removesuffix(".png")
        files = {"noto": entry["image"] if entry["has_img_google"] else "",
                 "twemoji": entry["image"] if entry["has_img_twitter"] else "",
                 "fluent": next((f"{c}.webp" for c in (plain, plain.replace("-fe0f", ""))
                                 if f"{c}.webp" in pictures["fluent"]), "")}
        for style in STYLES:
            raw = pictures[style].get(files[style])
            if raw is None:
                continue
            name, version, licence = PACKAGES[style]
            rows.append({
                "image": {"bytes": encode(raw, cfg.size, cfg.quality), "path": None},
                "caption": " ".join(f"{style} {label}".split()[:MAX_WORDS]),
                "style": style, "label": label, "group": GROUPS[entry["category"]], "codepoint": code,
                "source": f"{name}@{version}", "license": licence, "split": "train"})
    return rows


def hold_out(rows: list[dict], fraction: float, seed: int) -> None:
    """Mark one style of randomly drawn concepts that have all three, until `fraction` is held out."""
    concepts: dict[str, list[dict]] = {}
    for row in rows:
        concepts.setdefault(row["label"], []).append(row)
    full = [group for group in concepts.values() if sorted(r["style"] for r in group) == sorted(STYLES)]
    rng = random.Random(seed)
    for group in rng.sample(full, round(fraction * len(rows))):
        rng.choice(group)["split"] = "heldout"


def main(cfg: Config) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = cfg.tarballs or Path(scratch)
        if cfg.tarballs is None:
            fetch(folder)
        rows = collect(folder, cfg)
    hold_out(rows, cfg.heldout, cfg.seed)
    features = Features({"image": Image()} | {k: Value("string") for k in rows[0] if k != "image"})
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=features).to_parquet(cfg.out)
    held = sum(r["split"] == "heldout" for r in rows)
    print(f"{cfg.out}: {len(rows)} images, {len({r['label'] for r in rows})} labels, {held} held out, "
          f"{cfg.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(tyro.cli(Config))
