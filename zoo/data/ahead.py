"""Reading the next batch while this one trains: one thread, which decodes, looks up caches and copies to pinned memory.

Which items a batch holds follows from its tick alone, so that reading ahead changes no number and resumption knows nothing of it. Networks are
not run ahead: TF32 and the attention kernel are settings of the whole process, and steps change them (calculus.full_precision)."""
from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable

import torch

PATIENCE = 3          # wrong guesses beyond the right ones after which nothing is read ahead any more


def pinned(fields):
    """A tensor, or a dict of them, with what lies in the CPU's memory copied to pages that the GPU can read while others compute."""
    if isinstance(fields, dict):
        return {k: pinned(v) for k, v in fields.items()}
    return fields.pin_memory() if torch.is_tensor(fields) and fields.device.type == "cpu" else fields


class Later(Exception):
    """What is read ahead needs a network: the training's own thread reads it when it is wanted."""


_thread = threading.local()


def before_network() -> None:
    """Said by a source before it runs an encoder; nothing happens but in the thread that reads ahead."""
    if getattr(_thread, "ahead", False):
        raise Later


def _enter(device: int | None) -> None:
    """Begin as the thread that reads ahead. device: this rank's GPU, in whose name memory is pinned (another's would get a context of its own)."""
    _thread.ahead = True
    if device is not None:
        torch.cuda.set_device(device)


class Ahead:
    """ahead(wanted, following, read) -> read(*wanted), while read(*following) begins in a thread for the call after.

    Never reads twice at once: sources keep positions and caches. An error of what was read ahead is raised by the call that wants it."""

    def __init__(self, finish: Callable = pinned):
        self.finish, self.waiting, self.hits, self.misses = finish, None, 0, 0
        self.thread = ThreadPoolExecutor(1, "batches", initializer=_enter, initargs=(torch.cuda.current_device() if torch.cuda.is_available() else None,))

    def __call__(self, wanted: tuple, following: tuple, read: Callable) -> dict:
        made = self._taken(wanted)
        try:
            made = self.finish(read(*wanted)) if made is None else made.result()
        except Later:
            made = self.finish(read(*wanted))
        if self.misses <= self.hits + PATIENCE:
            self.waiting = following, self.thread.submit(lambda: self.finish(read(*following)))
        return made

    def _taken(self, wanted: tuple) -> Future | None:
        """What was read ahead if it is `wanted`; waits for it in any case."""
        if self.waiting is None:
            return None
        (guess, made), self.waiting = self.waiting, None
        right = len(guess) == len(wanted) and all(a is b or (type(a) is type(b) is int and a == b) for a, b in zip(guess, wanted))
        self.hits, self.misses = self.hits + right, self.misses + (not right)
        if right:
            return made
        made.exception()
        return None

    def close(self) -> None:
        """Let go of what was read for a step that will not come."""
        self.thread.shutdown(wait=True, cancel_futures=True)
        self.waiting = None
