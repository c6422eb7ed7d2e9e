"""A training step on pretended tensors: every operation runs on shapes alone, and the bytes that live at once are counted.

    with gpu_precision(), Pretend() as memory:
        with memory.networks():
            module = UNet2DConditionModel(**config)          # takes no memory
        ...                                                 # a step as it is written; inputs may be real
    memory.peak

What a network gives is pretended, and so is all that follows from it; noise, times, indices and depths stay real, so that the step takes the
branches it would take. Not counted: what kernels take for themselves, the allocator's rounding and gaps, and the device's own context."""
from __future__ import annotations

import contextlib
import weakref

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index.Tensor}
# What autocast of a GPU runs in float32 and that of a CPU does not: pretended tensors are a CPU's, where torch has no CUDA.
FULL = [(F, n) for n in ("layer_norm", "group_norm", "softmax", "mse_loss", "softplus")] + [(torch.Tensor, "__pow__")] + [
    (where, n) for where in (torch, torch.Tensor) for n in ("softmax", "pow", "rsqrt", "sum", "exp", "norm", "log", "cumsum", "prod", "reciprocal")]


@contextlib.contextmanager
def gpu_precision():
    """Inside, autocast on a CPU keeps in float32 what it keeps so on a GPU."""
    def full(real):
        up = lambda a: a.float() if isinstance(a, torch.Tensor) and a.dtype is torch.bfloat16 else a

        def call(*args, **kwargs):
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tuple(map(up, args)), {k: up(v) for k, v in kwargs.items()}
            return real(*args, **kwargs)
        return call
    before = [(where, name, where.__dict__.get(name), getattr(where, name)) for where, name in FULL]
    for where, name, _, real in before:
        setattr(where, name, full(real))
    try:
        yield
    finally:
        for where, name, own, _ in before:
            setattr(where, name, own) if own is not None else delattr(where, name)


class Pretend(TorchDispatchMode):
    """`live` and `peak`: bytes of tensors. everything: count real tensors, and pretend none (to check this counter by a run that fits)."""

    def __init__(self, everything: bool = False):
        super().__init__()
        self.everything, self.shapes, self.making = everything, FakeTensorMode(allow_non_fake_inputs=True), False
        self.live = self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    @contextlib.contextmanager
    def networks(self):
        """Inside, all that is made is pretended."""
        self.making = not self.everything
        try:
            yield
        finally:
            self.making = False

    def __enter__(self):
        self._apply = torch.nn.Module._apply
        if not self.everything:                               # modules are where they are
            torch.nn.Module._apply = lambda module, *_args, **_options: module
            FakeTensor.__deepcopy__ = _copied
        return super().__enter__()

    def __exit__(self, *error):
        torch.nn.Module._apply = self._apply
        if "__deepcopy__" in FakeTensor.__dict__:
            del FakeTensor.__deepcopy__
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.everything:
            out = func(*args, **kwargs)
            tree_map(self._see, out)
            return out
        if not self.making and not any(isinstance(a, FakeTensor) for a in tree_flatten((args, kwargs))[0]):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:          # a number that nobody knows: 1, or yes
            return args[0].dtype is torch.bool or (1.0 if args[0].dtype.is_floating_point else 1)
        if func is aten.equal.default:
            return True
        if func in INDEXED:
            args = (args[0], [i if i is None else self._rows(i) for i in args[1]], *args[2:])
        with self.shapes:
            out = func(*args, **kwargs)
        tree_map(self._see, out)
        return out

    def _rows(self, index: torch.Tensor) -> torch.Tensor:
        """A mask [n] as the rows it picks; of a pretended one, all."""
        if index.dtype is not torch.bool:
            return index
        with _disable_current_modes():
            return torch.arange(len(index)) if isinstance(index, FakeTensor) else index.nonzero()[:, 0]

    def _see(self, tensor):
        if not isinstance(tensor, torch.Tensor) or not (self.everything or isinstance(tensor, FakeTensor)):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self.live += size
            self.peak = max(self.peak, self.live)
            self._known[key] = weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int):
        self.live -= size
        self._known.pop(key, None)


def _copied(tensor: FakeTensor, memo: dict):
    """A copy with a storage of its own: the stock one splits a parameter's views from it."""
    if id(tensor) not in memo:
        new = torch.empty_like(tensor.detach())
        memo[id(tensor)] = torch.nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else new
    return memo[id(tensor)]
