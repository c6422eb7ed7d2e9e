"""One thread per process (two cores run tiny models many times faster that way), and no network."""
import os

for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                    "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_ANALYTICS_ENABLED": "False", "ZOO_KEEP_THREADS": "1"}.items():
    os.environ[name] = value

import torch

torch.set_num_threads(1)
