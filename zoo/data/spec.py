"""What `--data` may say: a place, and after a question mark what to know about it.

    prompts.txt            photos/            user/name:validation            shards/{000..010}.tar            tables/*.parquet
    user/name:train?caption=TEXT&image=jpg&stream=no          photos/?buckets=yes          clips/?fps=16

caption, image, video, label: the column (or `column.key` of a column of objects) where it is not one of the usual names;
config: of a Hub set that has several; stream: read forwards without downloading (Hub sets and shards: yes) or as a whole (all else);
buffer: rows of a stream that are shuffled among each other (1024, of clips 64);
buckets: pictures keep their aspect ratio (see `buckets`); fps: frames a second that clips are thinned to."""
from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import parse_qsl

from ..errors import UserError

FLAGS = {"yes": True, "no": False}
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Spec:
    place: str                    # path, pattern, Hub id or built-in name; the last two may end in :split
    caption: str = ""
    image: str = ""
    video: str = ""
    label: str = ""
    config: str = ""
    stream: bool | None = None    # None: as the kind of place has it
    buffer: int = 0               # 0: 1024, or 64 of clips
    buckets: bool = False
    fps: float = 0.0              # 0: every frame

    @property
    def shards(self) -> list[Path]:
        """The tar files the place names, in order; none where it names something else. Raises UserError for one that is not there."""
        return self._files("shard") if self.place.endswith(".tar") else []

    @property
    def tables(self) -> list[Path]:
        """The same of table files: one, those of a pattern, or the parquet files in a folder that holds no pictures or clips."""
        from . import IMAGE_TYPES, TABLE_TYPES
        folder, found = Path(self.place), []
        if not folder.is_dir():
            return self._files("data file") if folder.suffix in TABLE_TYPES else []
        from .clips import VIDEO_TYPES
        for path in folder.rglob("*"):
            kind = path.suffix.lower()
            if kind in IMAGE_TYPES | VIDEO_TYPES and path.is_file():
                return []                        # at the first: such a folder may be a large one
            if kind == ".parquet" and path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
                found.append(path)
        return sorted(found)

    def _files(self, kind: str) -> list[Path]:
        """The files that a path, a pattern or braces name. Raises UserError for one that is not there."""
        if Path(self.place).is_file():
            return [Path(self.place)]
        found = []
        for name in expand(self.place):
            path = Path(name)
            matches = sorted(path.parent.glob(path.name)) if re.search(r"[*?\[]", path.name) else [path] if path.is_file() else []
            if not matches:
                raise UserError(f"{kind} {name} does not exist: check the path")
            found += matches
        return found


def expand(pattern: str) -> list[str]:
    """`a{08..11}` as a08, a09, a10, a11: digits keep their width."""
    found = BRACES.search(pattern)
    if not found:
        return [pattern]
    low, high = found.groups()
    if int(low) > int(high):
        raise UserError(f"{{{low}..{high}}} counts backwards in --data {pattern}: write the smaller number first")
    middle = (str(i).zfill(len(low)) for i in range(int(low), int(high) + 1))
    return [whole for part in middle for whole in expand(pattern[: found.start()] + part + pattern[found.end():])]


def parse(text: str | Path) -> Spec:
    """A Spec from what the user wrote. Raises UserError for options that do not exist."""
    text = str(text)
    place, mark, query = text.rpartition("?")
    if not mark or "=" not in query or Path(text).exists():
        return Spec(text)
    options = dict(parse_qsl(query, keep_blank_values=True))
    known = {f.name: f for f in fields(Spec) if f.name != "place"}
    for name, value in options.items():
        if name not in known:
            raise UserError(f"--data has no option {name!r} ({text}): it has {', '.join(known)}")
        if name in ("stream", "buckets"):
            if value not in FLAGS:
                raise UserError(f"--data {text}: {name} is yes or no, not {value!r}")
            options[name] = FLAGS[value]
        elif name in ("buffer", "fps"):
            try:
                options[name] = {"buffer": int, "fps": float}[name](value)
            except ValueError:
                raise UserError(f"--data {text}: {name} is a number, not {value!r}") from None
            if options[name] <= 0:
                raise UserError(f"--data {text}: {name} must be above 0")
    spec = Spec(place, **options)
    if why := _unused(spec, options):
        raise UserError(f"--data {text}: {why}: leave it out")
    return spec


def _unused(spec: Spec, options: dict) -> str:
    """Why one of the options given says nothing about this place; "" where all do."""
    from . import BUILT_IN, is_local
    place = spec.place
    if place.endswith(".txt"):
        return f"{next(iter(options))} is for tables, pictures and clips, and {place} is a list of prompts"
    if "config" in options and is_local(place):
        return f"config names one of several parts of a Hub set, and {place} is none"
    if spec.stream and (place.partition(":")[0] in BUILT_IN or Path(place).is_dir() and not spec.tables):
        return f"{place} is read item by item, as they are needed, and not as a stream"
    if "buffer" in options and not (spec.stream if spec.stream is not None else place.endswith(".tar") or not is_local(place)):
        return f"buffer shuffles the rows of a stream, and {place} is read as a whole and shuffled as a whole"
    return ""
