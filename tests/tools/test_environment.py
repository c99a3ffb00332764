"""tools/environment.py: layers are complete or made again, and a stale one is noticed."""

import re
import shutil
import sys
import threading
import tomllib
from pathlib import Path

import environment
import find_python
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
THIS_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone with its own cache, so that nothing of this machine's is touched."""
    folder = tmp_path / "clone"
    folder.mkdir()
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    shutil.copytree(REPOSITORY / "constraints", folder / "constraints")
    monkeypatch.setattr(environment, "CLONE", folder)
    monkeypatch.setenv("MEGATRON_MOE_CACHE", str(tmp_path / "cache"))
    environment.writable_cache.cache_clear()
    yield folder
    environment.writable_cache.cache_clear()


@pytest.fixture
def ready(clone):
    """The clone with the notes of complete layers; no package is installed."""
    interpreter = find_python.find_python(THIS_VERSION)
    layers = [environment.cached("dependencies")]
    with environment.making(layers[0], ["dependencies"]):
        pass
    with environment.making(clone / ".venv", environment.made_from(interpreter, False, layers)):
        pass
    assert environment.is_ready(clone / ".venv", THIS_VERSION, dev=False)
    return clone


def name_of(requirement: str) -> str:
    return re.split(r"[<>=~!\[ ]", requirement)[0].lower().replace("_", "-")


def test_requirements_are_those_that_pip_reads():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert environment.requirements("dependencies") == project["project"]["dependencies"]
    extras = project["project"]["optional-dependencies"]
    assert {name: environment.requirements(name) for name in environment.WITH_DEV} == {
        name: items for name, items in extras.items() if name not in ("all", "evaluation")
    }
    assert environment.requirements("requires") == project["build-system"]["requires"]


@pytest.mark.parametrize("file", sorted(set(environment.CONSTRAINTS.values())))
def test_constraints_pin_every_requirement_to_one_public_version(file):
    lines = (REPOSITORY / "constraints" / file).read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    wanted = [environment.requirements(name) for name in ("requires", "dependencies", *environment.WITH_DEV)]
    assert {name_of(item) for items in wanted for item in items} <= {name_of(pin) for pin in pins}


def test_apex_of_the_index_is_never_asked_for():
    # The apex that can be installed by that name is an authentication library, not NVIDIA's.
    files = [REPOSITORY / "pyproject.toml", *(REPOSITORY / "constraints").iterdir()]
    assert not [file for file in files if "apex" in file.read_text()]


def test_a_python_that_does_not_run_is_passed_over(tmp_path, monkeypatch):
    shims, real = tmp_path / "shims", tmp_path / "real"
    shims.mkdir()
    real.mkdir()
    (shims / f"python{THIS_VERSION}").write_text("#!/bin/sh\nexit 127\n")
    (shims / f"python{THIS_VERSION}").chmod(0o755)
    (real / f"python{THIS_VERSION}").symlink_to(sys.executable)
    monkeypatch.setattr(find_python.sys, "version", "2.7.18")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(shims))
    assert find_python.find_python(THIS_VERSION) is None
    monkeypatch.setenv("PATH", f"{shims}:{real}")
    assert find_python.find_python(THIS_VERSION).minor == THIS_VERSION


def test_an_interrupted_layer_is_made_again_from_nothing(tmp_path):
    layer = tmp_path / "layer"
    with pytest.raises(RuntimeError), environment.making(layer, ["torch"]):
        (layer / "half").touch()
        raise RuntimeError
    assert not environment.is_complete(layer)
    with environment.making(layer, ["torch"]) as lock:
        assert lock is not None
        assert not (layer / "half").exists()
    with environment.making(layer, ["torch"]) as lock:
        assert lock is None


def test_of_two_at_once_only_one_makes_the_layer(tmp_path, monkeypatch):
    second_waits, first_makes = threading.Event(), threading.Event()
    monkeypatch.setattr(environment, "say", lambda line: second_waits.set())
    made = []

    def make_first():
        with environment.making(tmp_path / "layer", ["torch"]) as lock:
            first_makes.set()
            made.append(lock is not None and second_waits.wait(60))

    first = threading.Thread(target=make_first)
    first.start()
    assert first_makes.wait(60)
    with environment.making(tmp_path / "layer", ["torch"]) as lock:
        assert lock is None
    first.join()
    assert made == [True]


def test_a_cache_that_cannot_be_written_is_replaced_by_one_in_the_clone(clone, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEGATRON_MOE_CACHE", str(tmp_path / "file"))
    assert environment.cached("3.11-key") == clone / ".venv-cache" / "3.11-key"
    assert "cannot be written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [("pyproject.toml", '"numpy>=2"', '"numpy>=2.1"'), ("constraints/*", "numpy==2.", "numpy==3.")],
    ids=["requirement", "pin"],
)
def test_a_changed_requirement_or_pin_makes_the_environment_stale(ready, file, old, new):
    for path in ready.glob(file):
        path.write_text(path.read_text().replace(old, new))
    assert not environment.is_ready(ready / ".venv", THIS_VERSION, dev=False)


def test_an_environment_is_stale_without_the_tools_or_the_layer_below(ready):
    assert not environment.is_ready(ready / ".venv", THIS_VERSION, dev=True)
    shutil.rmtree(environment.cached("dependencies"))
    assert not environment.is_ready(ready / ".venv", THIS_VERSION, dev=False)


def test_a_venv_that_the_user_made_is_left_alone(clone):
    (clone / ".venv").mkdir()
    (clone / ".venv" / "pyvenv.cfg").touch()
    with pytest.raises(environment.Failure, match="was not made by this program"):
        environment.make_environment(clone / ".venv", None, dev=False)
    assert (clone / ".venv" / "pyvenv.cfg").exists()
