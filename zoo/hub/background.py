"""Pushing while a run trains: one push at a time in a thread, never in the way of the loop, and never its end."""
from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Callable

from .publish import Landed, push
from .retry import scrub

BRANCH = "training"       # where students leave during a run; main holds finished ones only


class Pusher:
    """Pushes folders to `repo_id`. say(text): told of every failure, besides stderr."""

    def __init__(self, repo_id: str, say: Callable[[str], None] = lambda text: None):
        self.repo_id, self.say = repo_id, say
        self.thread: threading.Thread | None = None
        self.failed = ""                 # why the last push in the background did not land

    @property
    def idle(self) -> bool:
        return self.thread is None or not self.thread.is_alive()

    def offer(self, folder: str | Path) -> bool:
        """Push `folder` to the branch `training` in the background; False when the last one still runs. The folder must stay until `idle`."""
        if not self.idle:
            return False
        if self.failed:
            self._tell(f"the last push to {self.repo_id} failed and is tried again: {self.failed}")
        self.thread = threading.Thread(target=self._push, args=(folder,), daemon=True)
        self.thread.start()
        return True

    def _push(self, folder):
        try:
            push(folder, self.repo_id, revision=BRANCH, sample=False)
            self.failed = ""
        except Exception as error:          # whatever it is, training goes on
            self.failed = scrub(f"{error}").split("\n")[0] or type(error).__name__

    def finish(self, folder: str | Path, wait: float = 600.0) -> str | None:
        """Push the finished student to main, after the push that still runs; its URL, or None (told why, and where it did not land how to push
        it by hand)."""
        if self.thread is not None:
            self.thread.join(wait)
        try:
            return push(folder, self.repo_id)
        except Landed as error:
            self._tell(str(error))
            return None
        except Exception as error:
            self._tell(f"the student was not pushed: {scrub(str(error))}\n  it is whole in {folder}; push it with: zoo push {folder} {self.repo_id}")
            return None

    def _tell(self, text: str):
        print(f"\nwarning: {text}", file=sys.stderr)
        self.say(text)

