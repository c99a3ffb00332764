"""The Dockerfile as far as it can be read without building it: pinned, complete, and torch stays as it is."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments on one line), without comments."""
    lines = "\n".join(line for line in TEXT.splitlines() if not line.lstrip().startswith("#"))
    return [
        (name, " ".join(rest.split()))
        for name, rest in re.findall(r"^([A-Z]+) (.*)$", lines.replace("\\\n", " "), re.MULTILINE)
    ]


def arguments_of(wanted: str) -> list[str]:
    return [rest for name, rest in instructions() if name == wanted]


def test_the_base_is_one_release_of_the_vendor() -> None:
    (base,) = arguments_of("ARG")
    assert re.fullmatch(r"BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", base)
    assert arguments_of("FROM") == ["${BASE}"]
    assert ":latest" not in TEXT


def ignored(name: str) -> bool:
    """Whether .dockerignore keeps a file or folder from the build: the last line that fits decides."""
    result = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and fnmatch(name, line.removeprefix("!")):
            result = not line.startswith("!")
    return result


def test_what_is_copied_is_there_and_sent() -> None:
    sources = [name for rest in arguments_of("COPY") for name in rest.split()[:-1]]
    assert {"pyproject.toml", "megatron_moe", "configs", "corpus"} <= set(sources)
    for name in sources:
        assert (ROOT / name).exists(), name
        assert not ignored(name), name
    assert ignored("runs") and ignored(".git") and ignored(".venv")


def test_everything_that_the_package_is_built_from_is_there_before_it_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    before = TEXT[: TEXT.index("pip install")]
    for name in ("pyproject.toml", project["readme"], *project["license-files"], "megatron_moe"):
        assert re.search(rf"^COPY .*\b{re.escape(name)}\b", before, re.MULTILINE), name


def test_pip_leaves_torch_alone() -> None:
    """The constraints that the image's own packages become, made by the Dockerfile's own pipe."""
    (install,) = [rest for rest in arguments_of("RUN") if "pip install" in rest]
    assert (
        "--constraint /tmp/constraints.txt" in install
        and "torch" not in install.split("pip install")[1].split("&&")[0]
    )
    pipe = re.search(r"pip list --format=freeze \| (grep .*?) > /tmp/constraints.txt", install)
    assert pipe is not None
    there = [
        "torch==2.14.0a0+4fdf77b940.nv26.8.63802676",
        "torchvision==0.29.0a0",
        "triton==3.6.0",
        "numpy==2.4.1",
        "nvidia-cudnn-frontend==1.20.0",
        "transformer_engine==2.15.0",
        "flash_attn==2.8.3",
        "apex==0.1",
    ]
    others = ["pydantic==2.11.1", "rich==13.9.4", "setuptools==80.0", "wandb==0.19.0", "psutil==7.0.0"]
    kept = subprocess.run(
        ["bash", "-c", pipe[1]],
        input="\n".join([*there, *others]),
        capture_output=True,
        text=True,
        check=True,
    )
    assert kept.stdout.split() == there
    assert "diff /tmp/torch.txt" in install, "and is looked at again afterwards"
    (pinned,) = re.findall(
        r"^megatron-core==(\S+)$", (ROOT / "constraints/python3.12.txt").read_text(), re.MULTILINE
    )
    assert pinned.startswith("0.19.")


def test_it_runs_the_command_as_a_user_of_few_rights() -> None:
    (user,) = arguments_of("USER")
    assert user.isdecimal() and user != "0"
    assert [json.loads(rest) for rest in arguments_of("ENTRYPOINT")] == [["megatron-moe"]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "megatron-moe" in project["scripts"]
    assert instructions()[-3:][0] == ("WORKDIR", "/workspace")
