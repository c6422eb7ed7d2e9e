"""Counting what cannot be read: a few bad items are skipped and said, more than one in a hundred stop the run."""
from __future__ import annotations

import warnings

from ..errors import UserError

ALLOWED = 0.01
SAID = 10             # every one of the first, then fewer and fewer
ENOUGH = 100          # items to have seen before a share of them means something, where their number is not known


class Tally:
    """Bad items of one set. total: how many items there are; None for a stream, whose share is of what was read."""

    def __init__(self, what: str, total: int | None = None):
        self.what, self.total, self.seen, self.bad = what, total, 0, {}

    def read(self, n: int = 1) -> None:
        """n more items were looked at."""
        self.seen += n

    def skip(self, key, name: str, error: Exception | str) -> None:
        """Item `key` (counted once) cannot be used. Raises UserError when these are more than 1 %."""
        if key in self.bad:
            return
        kind = error if isinstance(error, str) else getattr(error, "said", type(error).__name__)
        self.bad[key] = f"{name} ({kind})"
        of, count = self.total or max(self.seen, len(self.bad)), len(self.bad)
        if count > ALLOWED * (self.total or max(self.seen, ENOUGH)):
            raise UserError(f"{count} of {of} {self.what} cannot be read (allowed: 1 %), the first is "
                            f"{next(iter(self.bad.values()))}: remove or replace them")
        if count <= SAID or count % 10 ** (len(str(count)) - 1) == 0:          # 20, 30 ... 100, 200 ...: one in a hundred of millions is a lot of lines
            warnings.warn(f"skipped {count} of {of} {self.what} that cannot be read, this one is {self.bad[key]}", stacklevel=3)
