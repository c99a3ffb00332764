"""Imports run only downwards through the rooms, and config, plan and the command line need no torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_moe"
ROOMS = [
    "config",
    "plan",
    "engine",
    "data",
    "model",
    "convert",
    "inference",
    "training",
    "launch",
    "cli",
    "__main__",
]
"""From the ground up: a room imports from itself and from those before it."""
HEAVY = ("torch", "megatron", "numpy", "sentencepiece")


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; for `from a import b` both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    height = ROOMS.index(room_of(path))
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("megatron_moe.")} - {
        "__version__"
    }
    assert {room for room in rooms if ROOMS.index(room) > height} == set()


@pytest.mark.parametrize("room", ["config", "plan"])
def test_lower_rooms_import_no_torch(room: str) -> None:
    for path in (PACKAGE / room).rglob("*.py"):
        assert {name for name in imported(path) if name.split(".")[0] in ("torch", "megatron")} == set(), path


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["preprocess", "--help"],
        ["validate", "configs/quickstart.yaml", "--provenance"],
        ["plan", "configs/quickstart.yaml", "--json"],
        ["plan", "configs/quickstart.yaml", "--gpus", "4"],
        ["validate", "configs/quickstart.yaml", "model.megatron_core.qk_l2_norm=true"],
    ],
)
@pytest.mark.second_pair
def test_commands_that_answer_at_once_load_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from megatron_moe.cli import main\n"
        "try:\n    code = main(sys.argv[1:])\n"
        "except SystemExit as exit:\n    code = exit.code\n"
        f"heavy = sorted(set({HEAVY}) & set(sys.modules))\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_every_package_that_is_imported_is_declared() -> None:
    """A package that only the tests bring would be missing where users install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = [
        *project["dependencies"],
        *(line for name in extras if name != "dev" for line in extras[name]),
    ]
    packages = {re.split(r"[<>=\[]", line)[0].replace("megatron-core", "megatron") for line in declared}
    used = {name.split(".")[0] for path in FILES for name in imported(path)}
    own = {"megatron_moe", *sys.stdlib_module_names}
    assert used - own <= {package.split(".")[0] for package in packages}
