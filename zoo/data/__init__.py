"""Data: the three sets that ship with the package, and the user's own images and prompts.

    table = open_dataset("emoji")                  # or a folder, a parquet/jsonl/csv file, a Hub id
    pixels, table = load(table, 64, 3)             # [N, 3, 64, 64] in [-1, 1] and the rows they belong to
    captions = prompts("prompts.txt")              # or anything `open_dataset` reads that has captions

A set is a `datasets.Dataset` with a column `image` and, where known, `caption` and `label`. What else a place may be and be told
(streams, shards, columns, buckets) is in `spec`; how items are encoded and kept for training in `feed` and `cache`.
"""
from __future__ import annotations

import csv
import io
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import UserError

from .spec import Spec, parse
from .tables import Lines, parquet
from .tally import Tally

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

ASSETS = Path(__file__).parent.parent / "assets"
IMAGE_TYPES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TABLE_TYPES = {".parquet", ".jsonl", ".csv"}
CAPTIONS = ("caption", "text", "prompt")  # in this order; the first present becomes `caption`
LABELS = ("label", "labels", "class", "cls")  # likewise


# ------------------------------------------------------------------------------ the built-in sets
def emoji(split: str = "train") -> Dataset:
    """Captioned 64x64 emoji in three styles; split "train", "heldout" or "all".

    Held out are concept-style pairs that no teacher saw.
    Columns image, caption, style, label, group, codepoint, source, license, split.
    Noto (Apache-2.0), Twemoji (CC-BY-4.0: name the authors where pictures are shown), Fluent (MIT).
    """
    if split not in ("train", "heldout", "all"):
        raise UserError(f'emoji has no split "{split}"; use "train", "heldout" or "all"')
    table = parquet([ASSETS / "emoji" / "emoji.parquet"])
    return table if split == "all" else table.select([i for i, s in enumerate(table["split"]) if s == split])


def fashion(split: str = "train", path: str | Path | None = None) -> Dataset:
    """Fashion-MNIST, 28x28 grey (MIT); split "train" (60,000) or "test" (10,000, shipped).

    Columns image, label. The training images are looked for in `path`, the folder named by FEWSTEP_FASHION_MNIST,
    Debian's package dataset-fashion-mnist and the Hub, in this order; UserError when none has them.
    """
    from datasets import ClassLabel, Dataset, Features, Image

    from .fashion_mnist import CLASSES, arrays
    pixels, labels = arrays(split, path)
    head = b"P5 %d %d 255\n" % pixels.shape[:0:-1]  # a PGM file is this line and the bytes: nothing to encode
    files = [{"bytes": head + x.tobytes(), "path": None} for x in pixels]
    return Dataset.from_dict({"image": files, "label": labels},
                             Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))}))


def avatars() -> Dataset:
    """2,000 pixel-art avatars, 32x32 (DiceBear, CC0), captioned; one further column per attribute.

    `train_scripts/make_avatars.py` builds as many more as wanted.
    """
    return parquet([ASSETS / "avatars" / "avatars.parquet"])


BUILT_IN: dict[str, Callable[..., Dataset]] = {"emoji": emoji, "fashion": fashion, "avatars": avatars}


# ------------------------------------------------------------------------------ the user's own
def open_dataset(spec: str | Path, column: str = "image") -> Dataset:
    """A set of images by name, as a `datasets.Dataset` with `image` and, where known, `caption` and `label`; or of clips, with `video`.

    spec: "emoji", "fashion" or "avatars", with a split as in "fashion:test"; a folder of images; a parquet,
    jsonl or csv file whose column `image` holds pictures or paths relative to the file; or a Hub id
    ("user/name" or "user/name:split"). In a folder, captions come from metadata.jsonl or metadata.csv (columns
    file_name and caption) or from a .txt file beside each image, labels from the first level of subfolders.
    Raises UserError when there is nothing to read or no images in it.
    """
    table = _table(spec, column)
    if column not in table.column_names:
        raise UserError(f"{spec} has no column `{column}`: it has {', '.join(table.column_names)}")
    if not len(table):
        raise UserError(f"{spec} holds no {column}s: point to a folder or file with at least one")
    return table


def is_local(place: str | Path) -> bool:
    """Whether a place is a built-in set or something on this machine (also a file that is missing), rather than a Hub id."""
    name = str(place).partition(":")[0]
    path = Path(str(place))
    file = path.suffix in TABLE_TYPES | IMAGE_TYPES | {".txt", ".json", ".tar"}
    return name in BUILT_IN or path.exists() or file or name.count("/") != 1 or name.startswith((".", "/", "~"))


def prompts(spec: str | Path, column: str = "image") -> list[str]:
    """Prompts from a .txt file (one a line, empty lines skipped) or the captions of what `open_dataset` reads.

    Tables need no images: a column caption, text or prompt is enough. column: whether the captions of a folder are those of its
    images or its videos; where it has none of them, of the other. Raises UserError when missing or empty.
    """
    return list(lines_of(spec, column))


def lines_of(spec: str | Path, column: str = "image") -> Sequence[str]:
    """`prompts`, those of a table read from it as they are asked for."""
    if Path(spec).suffix == ".txt":
        lines = _text(Path(spec), "prompts file").split("\n")        # and nothing else: texts hold rarer separators
        found = [line.strip() for line in lines if line.strip()]
    else:
        known = parse(spec)
        place = Path(known.place)
        folder = place.is_dir() and not known.tables
        if folder and not _files_of(place, column):
            column = {"image": "video", "video": "image"}[column]
            if not _files_of(place, column):
                raise UserError(f"{spec} holds no images or videos to read captions of: give a file of prompts (.txt, .jsonl, .csv or .parquet), "
                                "or a folder of captioned ones")
        table = _table(spec, column)
        if "caption" not in table.column_names:
            where = f"put a .txt file with its caption beside each {column}" if folder else "give it one"
            raise UserError(f"{spec} holds no prompts, since it has no column {' or '.join(CAPTIONS)}: it has {', '.join(table.column_names) or 'none'}; "
                            f"{where}, or name the column, as in '{place}?caption=COLUMN'")
        lines = Lines(table, "caption", read=lambda line: line.strip() if isinstance(line, str) else line)
        tally = Tally(f"prompts of {spec}", len(table))

        def good(number: int, line) -> bool:
            if line is not None and not isinstance(line, str):
                tally.skip(number, f"row {number}: {line!r:.40}", "no text")
            return isinstance(line, str) and bool(line)
        found = lines.where(good)
    if not found:
        raise UserError(f"{spec} holds no prompts: write one a line (.txt) or fill its column `caption`")
    return found


def images(data: Dataset | str | Path, size: int, channels: int = 3) -> Tensor:
    """The pictures of a set as float32 [N, channels, size, size] in [-1, 1]; `load` says how."""
    return load(data, size, channels)[0]


def load(data: Dataset | str | Path, size: int, channels: int = 3) -> tuple[Tensor, Dataset]:
    """The pictures of a set, float32 [N, channels, size, size] in [-1, 1], and the N rows they belong to.

    Transparency becomes white (one channel: 3 -> 1 by luma). A picture at most one eighth smaller than
    `size` is padded, with black if channels = 1 and else white, so that 28x28 becomes 32x32 untouched; any other
    is scaled to cover the square and cropped at its centre. Pictures that cannot be decoded are skipped with one
    warning that counts them; UserError when they are more than 1 %.
    """
    import numpy as np
    import torch
    from datasets import Image

    table = data if hasattr(data, "column_names") else open_dataset(data)
    if table is not data and (parse(data).buckets or parse(data).stream):
        raise UserError(f"this family reads its pictures as a whole and at one size: drop ?buckets=yes and ?stream=yes from {data}")
    rows = table.select_columns("image").cast_column("image", Image(decode=False))
    pixels = np.empty((len(rows), size, size, channels), np.uint8)
    good, bad = [], []
    for i, row in enumerate(rows):
        try:
            pixels[len(good)] = _decode(row["image"], size, channels)
            good.append(i)
        except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more
            bad.append(f"{(row['image'] or {}).get('path') or f'row {i}'} ({type(error).__name__})")
    if len(bad) > 0.01 * len(rows):
        raise UserError(f"{len(bad)} of {len(rows)} images cannot be decoded (allowed: 1 %), "
                        f"the first is {bad[0]}: remove or replace them")
    if bad:
        warnings.warn(f"skipped {len(bad)} of {len(rows)} images that cannot be decoded, the first is {bad[0]}",
                      stacklevel=2)
    flat = torch.from_numpy(pixels[: len(good)]).permute(0, 3, 1, 2).contiguous()
    return flat.float().div_(127.5).sub_(1), table.select(good) if bad else table


def _decode(entry: dict, size: int | tuple[int, int], channels: int):
    """uint8 [H, W, channels]; size: of the square, or (H, W)."""
    import numpy as np
    import PIL.Image
    from PIL import ImageOps

    height, width = size if isinstance(size, tuple) else (size, size)
    with PIL.Image.open(io.BytesIO(entry["bytes"]) if entry["bytes"] else entry["path"]) as image:
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
    w, h = image.size
    if w <= width and h <= height and 7 * width <= 8 * w and 7 * height <= 8 * h:
        small, image = image, PIL.Image.new(image.mode, (width, height), "black" if channels == 1 else "white")
        image.paste(small, ((width - w) // 2, (height - h) // 2))
    else:
        image = ImageOps.fit(image, (width, height), PIL.Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(height, width, channels)


# ------------------------------------------------------------------------------ reading tables
def _table(spec: str | Path, column: str = "image") -> Dataset:
    """The set, its columns named image (or video), caption and label, where it has them. Raises UserError for columns asked for that are not there."""
    from datasets import Image, Value

    from .streams import candidates, column_of, fields_of
    known = parse(spec)
    table = _place(known, column)
    names, found = fields_of(table.features), {}
    inside = [f"{k}.{name}" for k in table.column_names for name in CAPTIONS]
    for what, asked, usual in (("caption", known.caption, [*CAPTIONS, "txt", *inside]), ("label", known.label, LABELS)):
        found[what] = column_of(known.place, what, asked, [c for c in usual if c in names], names)
    found[column] = column_of(known.place, column, getattr(known, column), candidates(table.features, column), {**table.features, **dict.fromkeys(names)})
    if twice := [name for name in found.values() if name and list(found.values()).count(name) > 1]:
        raise UserError(f"--data {spec} names {twice[0]} for two things: name another column, among {', '.join(names)}")
    for what, name in found.items():
        table = table if name in ("", what) else _renamed(table, name, what)
    if "image" in table.column_names and column == "image":
        kind = table.features["image"]
        if isinstance(kind, dict) and kind.keys() <= {"bytes", "path"} or (
                isinstance(kind, Value) and kind.dtype in ("string", "large_string", "binary", "large_binary")):
            table = table.cast_column("image", Image())
    return table


def _renamed(table: Dataset, name: str, what: str) -> Dataset:
    """With the column `name`, or the part "column.key" of a column of objects, as the column `what`."""
    from datasets import concatenate_datasets
    if name in table.column_names:
        return (table.remove_columns(what) if what in table.column_names else table).rename_column(name, what)
    inner = table.select_columns(name.partition(".")[0]).flatten(max_depth=2).select_columns(name).rename_column(name, what)
    return concatenate_datasets([table.remove_columns(what) if what in table.column_names else table, inner], axis=1)


def _place(spec: Spec, column: str) -> Dataset:
    place = spec.place
    name, _, split = place.partition(":")
    if name in BUILT_IN:
        return BUILT_IN[name](split) if split else BUILT_IN[name]()
    path = Path(place)
    if tables := spec.tables:
        return _tables(tables, spec)
    if path.is_dir():
        return _folder(path, column)
    if path.suffix == ".tar":
        return _shards(spec)
    if is_local(place):
        raise UserError(f"no data at {place!r}: give {', '.join(BUILT_IN)}, a folder of images, a parquet, jsonl or csv file, "
                        "shards such as path/{000..010}.tar, or a Hub id such as user/name")
    return _hub(name, split or "train", spec.config)


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} cannot be read ({type(error).__name__}): "
                        "save it as UTF-8 text") from error


def _rows(path: Path) -> list[dict]:
    """Rows of a csv or jsonl file; what is no row is counted and left out."""
    text = _text(path, "data file")
    if path.suffix == ".csv":
        limit = csv.field_size_limit(2**31 - 1)          # captions are not bounded
        try:
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        except csv.Error as error:
            raise UserError(f"{path} is not a readable csv file ({error}): write it again") from error
        finally:
            csv.field_size_limit(limit)
        tally = Tally(f"rows of {path}", len(rows))
        for number, row in enumerate(rows):
            if None in row:
                tally.skip(number, f"row {number}", "more fields than the header names: quote texts that hold commas")
        return [row for row in rows if None not in row]
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows, tally = [], Tally(f"lines of {path}", len(lines))
    for number, line in lines:
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            tally.skip(number, f"line {number}", "not a JSON object: write one {...} a line")
    return rows


def _from_rows(place: str, rows: list[dict], texts: set[str]) -> Dataset:
    """A table with every key of any row as a column. In the columns `texts`, values of another kind than text are counted and empty; any other
    column of mixed kinds becomes text."""
    import pyarrow
    from datasets import Dataset
    columns = {}
    for name in dict.fromkeys(k for row in rows for k in row):
        values = [row.get(name) for row in rows]
        try:
            pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError):
            if name in texts:
                tally = Tally(f"rows of {place}", len(rows))
                for i, value in enumerate(values):
                    if value is not None and not isinstance(value, str):
                        tally.skip(i, f"row {i}: {name} {value!r:.40}", "no text")
                values = [v if isinstance(v, str) else None for v in values]
            else:
                values = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        columns[name] = values
    return Dataset.from_dict(columns)


def _tables(files: list[Path], spec: Spec) -> Dataset:
    """The rows of table files of one kind, one after another."""
    from datasets import Value
    if files[0].suffix == ".parquet":
        table = parquet(files)
    else:
        texts = {*CAPTIONS, "txt", spec.caption, "image", spec.image, "video", spec.video}
        table = _from_rows(spec.place, [row for path in files for row in _rows(path)], texts)
    for column in {"image", "video", spec.image, spec.video} & set(table.column_names):
        if table.features[column] in (Value("string"), Value("large_string")):  # paths, relative to the file unless absolute
            paths = [str(folder_of(files) / p) if p else None for p in table[column][:]]
            table = table.remove_columns(column).add_column(column, paths)
    return table


def folder_of(files: list[Path]) -> Path:
    """Where paths inside the files begin: their folder, or the one around the folders of several."""
    return Path(os.path.commonpath([path.parent for path in files]))


def _shards(spec: Spec) -> Dataset:
    """Tar shards as a whole: what `datasets` unpacks of them into its own cache."""
    from datasets import load_dataset
    files = [str(p) for p in spec.shards]
    try:
        return load_dataset("webdataset", data_files={"train": files}, split="train")
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        which = _broken(spec.shards) or spec.place
        raise UserError(f"{which} could not be unpacked ({type(error).__name__}: {reason}): write it again, or leave it out") from error


def _broken(shards: list[Path]) -> Path | None:
    """The first of the tar files that cannot be read to its end."""
    import tarfile
    for path in shards:
        try:
            with tarfile.open(path) as tar:
                tar.getmembers()
        except (tarfile.TarError, OSError, EOFError):
            return path
    return None


def _files_of(folder: Path, column: str) -> list[Path]:
    from .clips import VIDEO_TYPES
    types = {"image": IMAGE_TYPES, "video": VIDEO_TYPES}[column]
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in types and p.is_file())


def _folder(folder: Path, column: str = "image") -> Dataset:
    from datasets import ClassLabel, Dataset, Image

    from .clips import VIDEO_TYPES
    types, files = {"image": IMAGE_TYPES, "video": VIDEO_TYPES}[column], _files_of(folder, column)
    if not files:
        raise UserError(f"{folder} holds no {column}s ({', '.join(sorted(types))}): "
                        "point to a folder with at least one")
    columns = {column: [str(p) for p in files]}
    metadata = next((folder / n for n in ("metadata.jsonl", "metadata.csv") if (folder / n).is_file()), None)
    names = sorted({p.relative_to(folder).parts[0] for p in files if p.parent != folder})
    if metadata:
        rows = _rows(metadata)
        if any("file_name" not in row for row in rows):
            raise UserError(f"{metadata} has rows without file_name: every row names its image, "
                            f"relative to {folder}")
        known = {str(folder / row.pop("file_name")): row for row in rows}
        for key in dict.fromkeys(k for row in known.values() for k in row):
            columns[key] = [known.get(p, {}).get(key) for p in columns[column]]
    elif any(p.with_suffix(".txt").is_file() for p in files):
        texts = (p.with_suffix(".txt") for p in files)
        columns["caption"] = [_text(t, "caption file").strip() if t.is_file() else None for t in texts]
    table = Dataset.from_dict(columns)
    table = table.cast_column("image", Image()) if column == "image" else table
    if not {*LABELS} & {*table.column_names} and names and all(p.parent != folder for p in files):
        if all(name.isdecimal() for name in names):      # the class numbers themselves
            return table.add_column("label", [int(p.relative_to(folder).parts[0]) for p in files])
        number = {name: i for i, name in enumerate(names)}
        labels = [number[p.relative_to(folder).parts[0]] for p in files]
        table = table.add_column("label", labels).cast_column("label", ClassLabel(names=names))
    return table


def _hub(name: str, split: str, config: str = "") -> Dataset:
    from datasets import load_dataset
    try:
        return load_dataset(name, config or None, split=split)
    except Exception as error:
        raise unreachable(name, error) from error


def unreachable(name: str, error: Exception) -> UserError:
    """The one line for a Hub set that could not be opened."""
    from datasets.exceptions import DatasetNotFoundError

    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    head, repo = f"no data at {name!r}: it is no folder or file here, and the Hub set could not be opened", name.partition(":")[0]
    if "gated dataset" in text:
        return UserError(f"{head}: it is gated; accept its terms at https://huggingface.co/datasets/{repo} with your account, then `hf auth login`")
    if isinstance(error, DatasetNotFoundError):
        return UserError(f"{head}: there is no such set, or it is private and you are not logged in; check the id, or `hf auth login`")
    if "Config name is missing" in text or "BuilderConfig" in text:
        names = [line.strip() for line in str(error).splitlines() if "available configs" in line.lower() or "Available:" in line]
        return UserError(f"{head}: it has several configurations ({' '.join(names or [text])[:300]}); name one, as in --data '{name}?config=NAME'")
    if "scripts are no longer supported" in text:
        return UserError(f"{head}: it is made by a script of its own, which is not run; use a copy of it as parquet files")
    if text.startswith(("Bad split", "Unknown split")):
        return UserError(f"{head}: {text}; name the split, as in --data {repo}:SPLIT")
    return UserError(f"{head} ({type(error).__name__}: {text}); check the path or id, its split (user/name:split) and the network")
