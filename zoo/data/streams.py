"""Streams: Hub sets and tar shards read forwards, by position, so that a run resumes at any sample and repeats every order.

Position p of a stream is a row of epoch p // n, the files in an order drawn from the epoch; n is known after the first pass. `order`
shuffles positions within windows of `buffer` rows by (seed, window): a pure function, like the permutation of a set in memory.
Every rank reads the same files and decodes its own rows. To go to a position, whole files are passed over by their number of rows
where it is known (it is written to `notes`, a JSON file, at the end of each file) and read over where it is not."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Callable, Iterator

import torch
from torch import Tensor

from ..errors import UserError
from .tally import Tally


BUFFER = {"video": 64}         # rows of a window: 1024 pictures or captions, fewer clips, whose bytes are held for a window or two


class Stream:
    """parts: one function per file, each giving a fresh iterator of its rows; name: for messages; window: rows shuffled together;
    columns: what was found ("caption", "label", "image") and under which of the `names` of the source; files: names of the parts, where known."""

    def __init__(self, name: str, parts: list[Callable[[], Iterator[dict]]], window: int = 1024, notes: Path | None = None,
                 columns: dict[str, str] | None = None, names: list[str] | None = None, files: list[str] | None = None):
        self.files = files or [f"file {i}" for i in range(len(parts))]
        self.name, self.parts, self.window, self.notes = name, parts, window, notes
        self.columns, self.names = columns or {}, names or []
        self.broken = Tally(f"files of {name}", len(parts))
        self.counts: dict[int, int] = self._read_notes()
        self._kept: dict[int, list[dict]] = {}
        self._rows: Iterator[dict] | None = None
        self._at = 0

    @property
    def n(self) -> int | None:
        """Rows of one epoch, once every file has been read."""
        return sum(self.counts.values()) if len(self.counts) == len(self.parts) else None

    def order(self, numbers: Tensor, seed: int) -> Tensor:
        """Position of each global sample number."""
        window = numbers // self.window
        out = torch.empty_like(numbers)
        for w in window.unique().tolist():
            shuffled = torch.randperm(self.window, generator=torch.Generator().manual_seed(seed * 9_973 + w + 1))
            out[window == w] = w * self.window + shuffled[numbers[window == w] % self.window]
        return out

    def rows(self, positions: list[int]) -> list[dict]:
        """The rows at those positions, in whatever order they are asked for; forwards is cheap, backwards starts again."""
        found = {}
        for window in sorted({p // self.window for p in positions}):
            if window not in self._kept:
                first = window * self.window
                self._kept = {w: rows for w, rows in self._kept.items() if w == window - 1}      # a batch may lie across two windows
                self._kept[window] = self._read(range(first, first + self.window))
            found |= {p: self._kept[window][p % self.window] for p in positions if p // self.window == window}
        return [found[p] for p in positions]

    def _read(self, wanted: range) -> list[dict]:
        far = bool(self.counts) and wanted[0] - self._at > 4 * self.window         # files in between may be passed over
        if self._rows is None or self._at > wanted[0] or far:
            self._rows, self._at = self._open(wanted[0]), wanted[0]
        while self._at < wanted[0]:
            next(self._rows)
            self._at += 1
        out = [next(self._rows) for _ in wanted]
        self._at = wanted[-1] + 1
        return out

    def _open(self, position: int) -> Iterator[dict]:
        """Rows from `position` on, epoch after epoch."""
        epoch = 0
        if self.n:
            epoch, position = divmod(position, self.n)
        while True:
            for part in torch.randperm(len(self.parts), generator=torch.Generator().manual_seed(epoch)).tolist():
                if position and position >= self.counts.get(part, position + 1):
                    position -= self.counts[part]
                    continue
                for row in self._part(part):
                    if position:
                        position -= 1
                    else:
                        yield row
            if not self.n:
                raise UserError(f"{self.name} holds no rows: check --data")
            epoch, position = epoch + 1 + position // self.n, position % self.n

    def _part(self, part: int) -> Iterator[dict]:
        """The rows of one file; a file that breaks off ends there, and is counted."""
        n = 0
        try:
            for row in self.parts[part]():
                yield row
                n += 1
        except UserError:
            raise
        except Exception as error:          # of tarfile, zlib, pyarrow, fsspec ...: what it is stands in the message
            self.broken.skip(part, f"{self.files[part]}, after {n} rows: {str(error).splitlines()[0][:100] if str(error) else ''}", error)
        if self.counts.get(part) != n:
            self.counts[part] = n
            self._write_notes()

    # ------------------------------------------------------------------------------------------------ the numbers of rows
    def _read_notes(self) -> dict[int, int]:
        if self.notes is None or not self.notes.is_file():
            return {}
        try:
            known = json.loads(self.notes.read_text())
            return {int(k): int(v) for k, v in known["rows"].items()} if known["files"] == len(self.parts) else {}
        except (ValueError, TypeError, KeyError, AttributeError):          # cut off by a machine that went down: the files are counted anew
            return {}

    def _write_notes(self) -> None:
        if self.notes is None:
            return
        self.notes.parent.mkdir(parents=True, exist_ok=True)
        temp = self.notes.with_name(f"{self.notes.name}.{os.getpid()}")
        temp.write_text(json.dumps({"files": len(self.parts), "rows": self.counts}))
        os.replace(temp, self.notes)


def field(row: dict, column: str):
    """row["a"], or row["a"]["b"] for the column "a.b"; None where it is not there."""
    if column in row:
        return row[column]
    value = row
    for key in column.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def candidates(features: dict, column: str) -> list[str]:
    """Names of the fields that may be the pictures ("image") or the clips ("video") of a set: the usual one first, then by type, or by the
    extension that members of shards are named by."""
    from datasets import Image, Video

    from .clips import ANIMATED, VIDEO_TYPES
    names = sorted(k for k in features if not k.startswith("__"))
    if column == "image":
        found = [k for k in names if isinstance(features[k], Image)]
    else:
        films = [k for k in names if isinstance(features[k], Video) or f".{k}" in VIDEO_TYPES - ANIMATED]
        found = films + [k for k in names if f".{k}" in ANIMATED]
    return [column] * (column in names) + [k for k in found if k != column]


def open_stream(spec, notes: Path | None = None, column: str = "image", beside: str = "caption") -> Stream:
    """A Stream of dicts image (of what `column`, "image" or "video", names; None for ""), name and `beside`, which is caption or label or ""
    for none, from tar shards, a local table or a Hub set. Raises UserError when there is nothing to read, and for columns asked for that are
    not there."""
    from datasets import Image, Video, load_dataset

    from . import CAPTIONS, LABELS, folder_of, unreachable
    shards, tables = spec.shards, spec.tables
    local = shards or tables
    try:
        if local:
            kind = "webdataset" if shards else {".jsonl": "json"}.get(tables[0].suffix, tables[0].suffix[1:])
            table = load_dataset(kind, data_files={"train": [str(p) for p in local]}, split="train", streaming=True)
        else:
            name, _, split = spec.place.partition(":")
            table = load_dataset(name, spec.config or None, split=split or "train", streaming=True)
        features = dict(table.features or next(iter(table)))
    except Exception as error:
        if local:
            what = f"{local[0]}, the first of {len(local)} {'shards' if shards else 'files'}," if len(local) > 1 else str(local[0])
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"{what} cannot be read ({type(error).__name__}: {reason}): write it again, or leave it out") from error
        raise unreachable(spec.place, error) from error
    names = sorted(k for k in features if not k.startswith("__"))
    every = fields_of(features)
    asked = spec.video if column == "video" else spec.image
    picture = column_of(spec.place, column, asked, candidates(features, column), {**features, **dict.fromkeys(every)}) if column else ""
    usual = [*CAPTIONS, "txt", *(f"{k}.{c}" for k in names for c in CAPTIONS)]
    caption = column_of(spec.place, "caption", spec.caption, [c for c in usual if c in every], every) if beside == "caption" else ""
    usual = [*LABELS, *(f"{k}.{c}" for k in names for c in LABELS)]
    label = column_of(spec.place, "label", spec.label, [c for c in usual if c in every], every) if beside == "label" else ""
    if not column:
        table = table.select_columns(sorted({caption.split(".")[0] if caption and caption not in features else caption} - {""}
                                            | ({"__key__"} & set(features)))) if caption else table
    for k in names if column else ():          # bytes, decoded where they are wanted
        if isinstance(features[k], Image | Video):
            table = table.cast_column(k, type(features[k])(decode=False))

    folder = folder_of(local) if local else Path()

    def part(i):
        rows = table.shard(num_shards=table.num_shards, index=i)
        return lambda: ({beside: field(r, caption or label) if caption or label else "", "image": _file(field(r, picture), folder) if picture else None,
                         "name": r.get("__key__") or ""} for r in rows)
    columns = {k: found for k, found in (("caption", caption), ("label", label), (column, picture)) if found}
    files = [p.name for p in local] if len(local) == table.num_shards else None
    return Stream(spec.place, [part(i) for i in range(table.num_shards)], spec.buffer or BUFFER.get(column, 1024), notes, columns, every, files)


def _file(entry, folder: Path):
    """{"bytes", "path"} of a picture or clip that a table holds as bytes or names by a path, relative to the table's folder."""
    if isinstance(entry, str):
        return {"bytes": None, "path": str(folder / entry)}
    return {"bytes": entry, "path": None} if isinstance(entry, bytes) else entry


def fields_of(features: dict) -> list[str]:
    """Names of the columns; of a column of objects, column.key of each."""
    inner = {k: [f"{k}.{c}" for c in v] for k, v in features.items() if isinstance(v, dict)}
    return [c for k in sorted(features) if not k.startswith("__") for c in (inner.get(k) or [k])]


def column_of(place: str, what: str, asked: str, usual: list[str], names) -> str:
    """The column `asked` for, or the first of the `usual` ones; "" for none. Raises UserError where the one asked for is none of `names`."""
    if asked and asked not in names:
        raise UserError(f"{place} has no column {asked} for the {what}: it has {', '.join(k for k in names if not k.startswith('__'))}")
    return asked or (usual[0] if usual else "")
