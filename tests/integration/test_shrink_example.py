"""The example that cuts and exports a network, as people run it, with little training."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_small_network_says_the_same_everywhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "examples" / "shrink_and_deploy.py"),
            "--epochs", "2", "--dense-epochs", "1",
        ],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())  # nothing is left in the folder
    before, after = re.findall(r"^parameters +([\d,]+) +([\d,]+)", done.stdout, re.MULTILINE)[0]
    assert (before, after) == ("61,706", "15,738")  # half of the units: a quarter of most weights
    shares = dict(re.findall(r"^  (\w+) +([\d.]+) %$", done.stdout, re.MULTILINE))
    assert shares["masked"] == shares["small"] == shares["onnxruntime"]
    assert float(shares["small"]) > 50
    sizes = dict(re.findall(r"^  ([\w.]+) +([\d,]+) bytes$", done.stdout, re.MULTILINE))
    size = {name: int(text.replace(",", "")) for name, text in sizes.items()}
    assert size["small.pt"] < 0.3 * size["masked.pt"]
    assert size["masked.safetensors"] < 0.6 * size["masked.pt"]
