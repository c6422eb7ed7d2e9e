"""Guard: a short real distillation must close a stated part of the gap to the teacher, so that broken learning cannot land green."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_seventy_steps_of_dmd_close_part_of_the_gap_on_fashion(tmp_path):
    """Steps, not seconds, so that a slow machine trains as far as a fast one."""
    subprocess.run([sys.executable, str(ROOT / "train_scripts/train_dmd.py"), "--teacher", "fashion", "--student_times", "1.0", "--steps", "70",
                    "--time_budget", "0", "--output_dir", str(tmp_path / "run"), "--sample_every", "0", "--measure_every", "0"], check=True,
                   env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=1200)
    facts = json.loads((tmp_path / "run" / "measured.json").read_text())
    distance = {(r["who"], r["steps"]): r["conditional_kid_fashionnet"] for r in facts["measured"]}
    closed = (distance["teacher", 1] - distance["student", 1]) / (distance["teacher", 1] - distance["teacher", 25])
    assert facts["steps"] == 70 and closed > 0.4, (closed, distance)
