"""The README's Python runs as printed."""
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "train_scripts"))


class Network(torch.nn.Module):
    """What a reader brings: a module predicting velocity from (x, timestep, label)."""

    def __init__(self):
        super().__init__()
        self.label = torch.nn.Embedding(11, 8)
        self.net = torch.nn.Sequential(torch.nn.Conv2d(10, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, x, timestep, label):
        extra = torch.cat([self.label(label), (timestep / 1000)[:, None]], 1)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return self.net(torch.cat([x, extra], 1))


def test_distil_your_own_teacher_in_ten_lines(tmp_path, monkeypatch):
    block = re.search(r"<!-- own-teacher -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    assert len(block.strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    network = Network()
    before = [p.clone() for p in network.parameters()]
    names = {"network": network, "labels": torch.arange(64) % 10, "images": torch.rand(64, 1, 32, 32) * 2 - 1}
    exec(block.replace("steps=500", "steps=3, batch=8"), names)      # the text as printed, with fewer steps
    assert names["run"].step == 3 and (tmp_path / "outputs/mine/student/custom.safetensors").exists()
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters()))       # the teacher's bits are untouched
