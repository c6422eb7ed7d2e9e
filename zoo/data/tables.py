"""Tables on this machine: parquet files mapped from disk where they are large, and texts of a column read where they lie."""
from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

HELD = 64 * 2**20     # bytes of parquet files that every rank reads into memory; larger ones are unpacked once, by `datasets` into its cache, and mapped
ROWS = 1000           # read at once


def parquet(files: list[Path]) -> Dataset:
    """The rows of the files one after another; a column that some of them lack is empty there. Raises UserError for a file that cannot be read,
    or whose columns are of other types."""
    import datasets
    import pyarrow.dataset
    schema = _schema(files)
    try:
        if sum(path.stat().st_size for path in files) <= HELD:
            table = pyarrow.dataset.dataset([str(path) for path in files], schema=schema, format="parquet").to_table()
            return datasets.Dataset(table.replace_schema_metadata(schema.metadata))
        features = datasets.Features.from_arrow_schema(schema)
        return datasets.load_dataset("parquet", data_files={"train": [str(path) for path in files]}, features=features, split="train")
    except Exception as error:          # of pyarrow, or what `datasets` makes of it
        if (broken := _broken(files)) is not None:
            raise UserError(f"{broken} is not a readable parquet file ({_reason(error)}): write it again, or leave it out") from error
        raise UserError(f"{files[0].parent} could not be unpacked into {datasets.config.HF_DATASETS_CACHE} ({_reason(error)}): free some space there, "
                        "name another folder by HF_DATASETS_CACHE, or read forwards with ?stream=yes") from error


def _schema(files: list[Path]):
    """The columns of all files, of types that hold every file's."""
    import pyarrow
    import pyarrow.parquet
    schema = None
    for path in files:
        try:
            mine = pyarrow.parquet.read_schema(path)
        except (OSError, ValueError) as error:      # pyarrow's errors derive from these
            raise UserError(f"{path} is not a readable parquet file ({_reason(error)}): write it again") from error
        try:
            schema = mine if schema is None else pyarrow.unify_schemas([schema, mine], promote_options="permissive")
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise UserError(f"{path} does not go with {files[0]} ({_reason(error)}): give them one at a time, or write them alike") from error
    return schema


def _broken(files: list[Path]) -> Path | None:
    """The first file whose rows cannot be read to the end."""
    import pyarrow.parquet
    for path in files:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for _ in file.iter_batches():
                    pass
        except (OSError, ValueError):
            return path
    return None


def _reason(error: BaseException) -> str:
    error = error.__cause__ or error                # what `datasets` wraps
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0][:150]}"


class Lines(Sequence):
    """A column's values, read from the table as they are asked for. keep: the rows that count, in order (None: all); read: made of each value."""

    def __init__(self, table: Dataset, column: str, keep: Sequence[int] | None = None, read: Callable = lambda value: value):
        self.table, self.column, self.keep, self.read = table.select_columns(column), column, keep, read

    def __len__(self) -> int:
        return len(self.table) if self.keep is None else len(self.keep)

    def __getitem__(self, i: int):
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self.read(self.table[int(i) if self.keep is None else self.keep[i]][self.column])

    def __iter__(self) -> Iterator:
        rows = range(len(self.table)) if self.keep is None else self.keep
        for at in range(0, len(rows), ROWS):
            yield from map(self.read, self.table[rows[at: at + ROWS]][self.column])

    def where(self, good: Callable) -> "Lines":
        """The lines that are good(number, value)."""
        keep = array("q", (i for i, value in enumerate(self) if good(i, value)))
        return self if len(keep) == len(self) else Lines(self.table, self.column, keep, self.read)
