"""`gpu(seconds)`: a ZeroGPU lease around a function, and nothing anywhere else. Import this module before gradio.

This folder is called `spaces` as the PyPI package is. Started from the folder above, `import spaces` would find the folder (an
empty namespace) and gradio would mistake it for the package; then the name is blocked, which gradio takes for "not installed".

On ZeroGPU a decorated call runs in a process forked for it, and only that process has a GPU: the page's own process keeps models on
the CPU, and what is drawn with goes to the GPU inside the call (`racing.placed`). What goes in and comes out is pickled."""
from __future__ import annotations

import os
import sys
from typing import Callable

ZERO_GPU = os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "true", "yes")


def _package():
    """The PyPI package `spaces`, or None."""
    try:
        import spaces
    except ImportError:
        return None
    if not hasattr(spaces, "GPU"):
        sys.modules["spaces"] = None
        return None
    return spaces


_SPACES = _package()
if ZERO_GPU and _SPACES is None:
    raise SystemExit("error: this is a ZeroGPU Space without the package `spaces`: add it to requirements.txt")


def gpu(seconds: int | Callable[..., int]) -> Callable[[Callable], Callable]:
    """Decorator: on ZeroGPU the call gets a GPU for at most `seconds`, a number or a function of the call's arguments; short leases
    are queued first."""
    if ZERO_GPU:
        return _SPACES.GPU(duration=seconds)
    return lambda function: function
