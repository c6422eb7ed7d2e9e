"""Fewstep: a zoo of few-step diffusion students. `import zoo` is light: torch and diffusers load with the first model.

    pipe = zoo.load("outputs/dmd-emoji/student")  # a pipeline whose plain pipe(prompt) is right: a folder, a Hub id,
    pipe = zoo.load("hyper-sd.sdxl-4step")        # or a name of the registry
    zoo.methods("*flow*"); zoo.students(method="dmd2", base="sdxl"); zoo.cite("dmd")
"""
from importlib import import_module

__version__ = "0.1.0"
_HOMES = {"load": "zoo.loading", "methods": "zoo.registry", "students": "zoo.registry", "cite": "zoo.registry",
          "UserError": "zoo.errors"}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__():
    return sorted({*globals(), *_HOMES})
