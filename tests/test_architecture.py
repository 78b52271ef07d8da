"""The rules of the house, read off the source: who may import whom, how large a file may grow."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_prune"
SHARED = ("passes",)
APART = ("saliency", "selection", "schedules", "masking", "augment", "refit", "removal")
MAY_USE = {("removal", "masking")}  # what is removed is cut
ROOMS = (*SHARED, *APART, "offline", "callbacks")
BANNED_NAMES = ("utils", "util", "helpers", "helper", "misc", "common")
MAX_LINES = 350
MAX_FUNCTION_LINES = 60

SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}


def imported_modules(source: str, file: str) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute module name) of every import, in functions too, relative ones too."""
    package = Path(file).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*parents, node.module) if node.module else parents)
            # With the name: `from lightning_prune import masking` imports that room.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def room_of(module: str) -> str | None:
    """Return the room that a dotted module name or a file name in dotted form lies in."""
    parts = module.split(".")
    return (
        parts[1] if parts[0] == "lightning_prune" and len(parts) > 1 and parts[1] in ROOMS else None
    )


def through_the_front_door(module: str) -> bool:
    """Tell whether a name is taken from the package's ``__init__`` instead of a module in it."""
    parts = module.split(".")
    modules = {Path(file).with_suffix("").parts[1] for file in SOURCES}
    return parts[0] == "lightning_prune" and (len(parts) < 2 or parts[1] not in modules)


def faults(source: str, file: str) -> list[str]:
    """Return one line for every import in ``source`` that the house forbids."""
    here = room_of(Path(file).with_suffix("").as_posix().replace("/", "."))
    at_the_door = file == "lightning_prune/__init__.py"
    found = []
    for line, module in imported_modules(source, file):
        there = room_of(module)
        if module.split(".")[0] in ("lightning", "pytorch_lightning") and here != "callbacks":
            found.append(f"{file}:{line} imports {module}; only callbacks knows Lightning")
        apart = here in APART and there in APART and there != here
        if apart and (here, there) not in MAY_USE:
            found.append(
                f"{file}:{line} imports {module}; rooms meet through Scores and Masks only"
            )
        if there in ("callbacks", "offline") and here in APART:
            found.append(f"{file}:{line} imports {module}; nothing but the front door may")
        if there and here in (None, *SHARED) and there != here and not at_the_door:
            found.append(f"{file}:{line} imports {module}; what all rooms share imports no room")
        if through_the_front_door(module):
            found.append(f"{file}:{line} imports {module}; import from the room that has it")
    return found


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Yield (name, lines of its body without the docstring) of every function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body and node.end_lineno is not None:
                yield node.name, node.end_lineno - body[0].lineno + 1


def test_the_package_was_found() -> None:
    assert "lightning_prune/__init__.py" in SOURCES
    rooms = {room_of(Path(file).with_suffix("").as_posix().replace("/", ".")) for file in SOURCES}
    assert rooms >= set(ROOMS)


@pytest.mark.parametrize("file", sorted(SOURCES))
def test_imports_keep_to_the_rules(file: str) -> None:
    assert faults(SOURCES[file], file) == []


@pytest.mark.parametrize("file", sorted(SOURCES))
def test_no_assert_in_the_package(file: str) -> None:
    # `python -O` removes asserts: what the user gave is checked by `if ... raise`.
    lines = [
        node.lineno for node in ast.walk(ast.parse(SOURCES[file])) if isinstance(node, ast.Assert)
    ]
    assert lines == []


@pytest.mark.parametrize("file", sorted(SOURCES))
def test_files_and_functions_stay_small(file: str) -> None:
    assert len(SOURCES[file].splitlines()) <= MAX_LINES
    assert {
        name: lines for name, lines in functions(SOURCES[file]) if lines > MAX_FUNCTION_LINES
    } == {}


@pytest.mark.parametrize("file", sorted(SOURCES))
def test_every_file_is_named_for_its_one_job(file: str) -> None:
    names = {part.strip("_") for part in Path(file).with_suffix("").parts}
    assert names.isdisjoint(BANNED_NAMES)
    assert not Path(file).name.startswith("base_")


def test_the_picture_of_the_house_shows_every_file() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([a-z0-9_/]+\.py)`", page)) - {"tests/test_architecture.py"}
    files = {file.removeprefix("lightning_prune/") for file in SOURCES}
    assert {file for file in files if not file.endswith("__init__.py")} - named == set()
    assert named - files == set()


def test_installing_the_package_changes_no_trainer() -> None:
    # An entry point in this group would add our callbacks to every Trainer on the machine.
    assert "callbacks_factory" not in (ROOT / "pyproject.toml").read_text()


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("lightning_prune/saliency/target.py", "from lightning_prune.masking import apply"),
        ("lightning_prune/saliency/target.py", "from lightning_prune import masking"),
        ("lightning_prune/saliency/target.py", "from ..masking.apply import apply_masks"),
        ("lightning_prune/saliency/target.py", "from .. import selection"),
        ("lightning_prune/saliency/rules/linear.py", "from ...selection import threshold"),
        (
            "lightning_prune/selection/threshold.py",
            "def f():\n    import lightning_prune.schedules",
        ),
        ("lightning_prune/schedules/rounds.py", "from ..selection import Threshold"),
        ("lightning_prune/masking/apply.py", "import lightning.pytorch as pl"),
        ("lightning_prune/_types.py", "from lightning import Trainer"),
        ("lightning_prune/augment/vae.py", "import pytorch_lightning"),
        ("lightning_prune/masking/apply.py", "from lightning_prune.callbacks import vae_augment"),
        (
            "lightning_prune/exceptions.py",
            "from lightning_prune.callbacks.vae_augment import VAEAugmentCallback",
        ),
        ("lightning_prune/callbacks/vae_augment.py", "from lightning_prune import Threshold"),
        ("lightning_prune/callbacks/vae_augment.py", "import lightning_prune"),
        ("lightning_prune/passes/teacher.py", "from lightning_prune.saliency import rows"),
        ("lightning_prune/refit/layers.py", "from lightning_prune.offline import staged"),
    ],
)
def test_a_forbidden_import_is_seen(file: str, statement: str) -> None:
    assert len(faults(statement, file)) == 1


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("lightning_prune/saliency/target.py", "from lightning_prune._types import Scores"),
        ("lightning_prune/saliency/target.py", "from lightning_prune import exceptions"),
        ("lightning_prune/saliency/target.py", "from lightning_prune.passes import batches"),
        ("lightning_prune/saliency/rules/linear.py", "from ..registry import Rule"),
        ("lightning_prune/saliency/accumulator.py", "import torchmetrics"),
        ("lightning_prune/callbacks/vae_augment.py", "from lightning_prune.augment import vae"),
        ("lightning_prune/callbacks/vae_augment.py", "import lightning as L"),
        (
            "lightning_prune/__init__.py",
            "from lightning_prune.callbacks import SaliencyPruningCallback",
        ),
    ],
)
def test_an_allowed_import_is_not(file: str, statement: str) -> None:
    assert faults(statement, file) == []
