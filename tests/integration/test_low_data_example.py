"""The example of pruning with few digits, as people run it, with tiny settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "low_data.py"


def start(*options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *options],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_it_prunes_with_and_without_generated_digits(tmp_path: Path) -> None:
    options = ("--digits", "40", "--steps", "3", "--dense-epochs", "3", "--sparsities", "0.9")
    done = start(*options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())  # nothing is left in the folder
    lines = re.findall(r"^(.+?) +([\d.]+) % +([\d.]+) % +([\d.]+)$", done.stdout, re.MULTILINE)
    assert [name for name, *_ in lines] == [
        "dense, by the other digits",
        "real digits",
        "real digits, twice the steps",
        "and generated digits",
    ]
    assert [float(share) for _, share, *_ in lines] == [0.0, 90.0, 90.0, 90.0]
    accuracies = [float(accuracy) for *_, accuracy, _ in lines]
    assert accuracies[0] > 80  # by digits that the pruning has not
    assert len(set(accuracies)) == 4  # the arms differ


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--digits", "5"), "--digits: expected 10 to 3000, got 5"),
        (("--sparsities", "98"), "--sparsities: expected between 0 and 1, got [98.0]"),
        (("--steps", "0"), "--steps: expected at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused_in_words(
    options: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import low_data  # noqa: PLC0415  (an example, no package)

    with pytest.raises(SystemExit) as exit_:
        low_data.parse_arguments(options)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
