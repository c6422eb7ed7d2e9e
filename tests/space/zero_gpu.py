"""The page as on ZeroGPU, on a machine without a GPU: the package `spaces` is the real one, with its queue for a GPU, its forked process
for each lease and its pickling of what goes in and out. Stood in for are a CUDA build of torch, which `spaces` reads at import, and
the GPU itself, which is the CPU under a second name. Run by test_api.py with the package's folder in SITE and the page's in SPACE."""
import os
import sys
import threading
import warnings

import torch

warnings.filterwarnings("ignore", message=".*Nvidia driver FS.*")
sys.modules["bitsandbytes"] = None                 # which asks torch for the functions of a real GPU when it is imported
torch._C._cuda_init = getattr(torch._C, "_cuda_init", lambda: None)
torch.version.cuda = torch.version.cuda or "12.8"
torch.cuda._is_in_bad_fork = bool               # False, as a name that pickles
sys.path[:0] = [os.environ["SITE"]]
sys.path.append(os.environ["SPACE"])

import gpu  # noqa: E402
import spaces.zero.torch as torch_in_spaces  # noqa: E402

torch_in_spaces.init, torch_in_spaces.size, torch_in_spaces.move = lambda uuid: None, lambda: 0, lambda callback=None: None

import app  # noqa: E402
import racing  # noqa: E402

assert gpu.ZERO_GPU and racing.DEVICE == "cuda" and racing.KEPT_ON == "cpu" and torch.cuda.is_available()
racing.DEVICE = "cpu:0"
torch.set_num_threads(1)                        # a forked process cannot use its parent's threads
_, (_, url, _) = app.serve(prevent_thread_lock=True)
kept = sorted(key for key in racing.garage.kept)
print("kept at the start:", kept, flush=True)
print(f"the page is at {url}", flush=True)
threading.Event().wait()
