#!/usr/bin/env python3
"""Make the environment of this clone: the right Python, the pinned dependencies, the project itself.

Three layers, each a virtual environment that sees the one below it, each complete or made anew:

    <cache>/3.11-<key>        the dependencies, shared by all clones of this user
    <cache>/3.11-<key>-dev    the tools that test and check (with --dev)
    .venv                     this clone: the project, editable, and the commands of the layers below

<cache> is $MEGATRON_MOE_CACHE, or megatron-moe in $XDG_CACHE_HOME or ~/.cache; the key is a hash of the
requirements, the constraints and the interpreter. Any python3 >= 3.8 runs this file, with nothing installed.
Exit codes: 0 ready; 3 no working interpreter of the wanted version; 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, Iterator

from find_python import Interpreter, find_python

CLONE = Path(__file__).resolve().parents[1]
FIRST_PAIR, SECOND_PAIR = "3.11", "3.12"
# Python 3.13 stands in for the second pair on a machine that has no other, under the same constraints.
CONSTRAINTS = {"3.11": "python3.11.txt", "3.12": "python3.12.txt", "3.13": "python3.12.txt"}
# The optional dependencies that are installed with --dev: the tests cover what they add.
WITH_DEV = ("dev", "parquet", "zstd", "huggingface", "tiktoken", "tensorboard")
NO_INTERPRETER = 3
# Lies in each layer: empty while the layer is being made, what it was made from once it is complete.
NOTE = "environment.json"


class Failure(Exception):
    """Ends the program with a message for the user."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def say(line: str) -> None:
    """Print one line now, also through a pipe, with the home folder as ~."""
    print(line.replace(os.path.expanduser("~/"), "~/"), flush=True)


def choose_interpreter(pair: str | None) -> Interpreter:
    """The interpreter of `pair`; without one, of the first version in CONSTRAINTS that this machine has."""
    for version in [pair] if pair else list(CONSTRAINTS):
        found = find_python(version)
        if found is not None:
            return found
    wanted = pair or "3.11, 3.12 or 3.13"
    raise Failure(
        f"No working Python {wanted} with pip was found: looked for it on PATH and in pyenv's versions.\n"
        f"Install one (`pyenv install {pair or FIRST_PAIR}`, the system's packages, or python.org), or name "
        "one that lies elsewhere: `make PYTHON=/path/to/python TARGET`.",
        exit_code=NO_INTERPRETER,
    )


def requirements(name: str) -> list[str]:
    """The list `name` of pyproject.toml ("dependencies"); read without tomllib, which Python < 3.11 lacks."""
    text = (CLONE / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^" + name + r" = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    if block is None:
        raise Failure(f"pyproject.toml has no list '{name}'")
    lines = (line.split("#")[0] for line in block.group(1).splitlines())
    return [item for line in lines for item in re.findall(r'"([^"]+)"', line)]


def dev_requirements() -> list[str]:
    """What --dev adds to the dependencies."""
    return [item for name in WITH_DEV for item in requirements(name)]


def constraints(interpreter: Interpreter) -> Path:
    """The file that pins every package for this interpreter."""
    return CLONE / "constraints" / CONSTRAINTS[interpreter.minor]


def dependency_key(interpreter: Interpreter) -> str:
    """Name of the dependency layer: another requirement, pin, interpreter or machine makes another name."""
    parts = [constraints(interpreter).read_text(encoding="utf-8"), *interpreter[:3]]
    parts += requirements("requires") + requirements("dependencies") + dev_requirements()
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return f"{interpreter.minor}-{digest[:12]}"


def user_cache() -> Path:
    """The folder that all clones of this user share."""
    own = os.environ.get("MEGATRON_MOE_CACHE")
    return Path(own or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-moe")


@functools.lru_cache(maxsize=None)
def writable_cache() -> Path:
    """The user's cache folder, or one in the clone if that cannot be written."""
    try:
        cache = user_cache().absolute()
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=str(cache)):
            return cache
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home folder
        say(f"The cache folder cannot be written ({error}): using .venv-cache in this clone")
        return CLONE / ".venv-cache"


def cached(name: str) -> Path:
    """Where the shared layer `name` lies, or is to be made; a complete one may lie in a read-only folder."""
    with contextlib.suppress(RuntimeError):
        if is_complete(user_cache() / name):
            return user_cache().absolute() / name
    return writable_cache() / name


def read_note(folder: Path) -> Any:
    """What a complete layer was made from; None for a layer that is missing or was interrupted."""
    try:
        return json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_complete(folder: Path) -> bool:
    return read_note(folder) is not None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the lock beside `folder` and yield its descriptor; waits for whoever makes the same layer."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(str(folder) + ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Waiting for another process that is making {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def last_lines(log: IO[bytes], count: int = 15) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    return "\n".join("    " + line for line in lines[-count:])


def run(command: list[str], lock: int) -> None:
    """Run one step in silence; where it fails, show the end of its output.

    The step inherits the lock: if this process is killed, nobody touches the layer while pip still writes.
    """
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PIP_USER="0")
    for name in ("PYTHONPATH", "PYTHONHOME", "PIP_CONSTRAINT", "PIP_TARGET", "PIP_PREFIX"):
        environment.pop(name, None)
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=str(CLONE), env=environment, pass_fds=[lock], stdout=log, stderr=subprocess.STDOUT
        )
        on_terminal = sys.stdout.isatty()
        while process.poll() is None:
            time.sleep(0.1)
            if on_terminal:
                print(f"\r  {time.monotonic() - start:.0f} s ", end="", flush=True)
        if on_terminal:
            print("\r" + " " * 12 + "\r", end="", flush=True)
        if process.returncode != 0:
            raise Failure("Failed: {}\n{}".format(" ".join(command), last_lines(log)))


def make_venv(interpreter: Interpreter, folder: Path, lock: int, below: Path | None) -> None:
    """An environment that sees the layer `below`, and that layer's pip; without one, it has its own pip."""
    if below is None and interpreter.has_ensurepip:
        run([interpreter.path, "-m", "venv", str(folder)], lock)
        return
    run([interpreter.path, "-m", "venv", "--without-pip", str(folder)], lock)
    if below is None:
        # Debian's Python without its venv package has no ensurepip; its pip can install into the environment.
        run([interpreter.path, "-m", "pip", "--python", str(folder / "bin/python"), "install", "pip"], lock)
    else:
        link = f"import site; site.addsitedir({str(site_packages(below))!r})\n"
        (site_packages(folder) / "layer_below.pth").write_text(link, encoding="utf-8")


def site_packages(folder: Path) -> Path:
    return next((folder / "lib").glob("python3*/site-packages"))


def remove(folder: Path) -> None:
    """Delete a layer, its note last, so that a deletion that is cut short still shows whose folder it is."""
    if folder.exists():
        for entry in folder.iterdir():
            if entry.name == NOTE:
                entry.write_text("")
            elif entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(str(entry))
            else:
                entry.unlink()
        shutil.rmtree(str(folder))


@contextlib.contextmanager
def making(folder: Path, made_from: Any) -> Iterator[int | None]:
    """Make `folder` complete or leave it marked as unfinished; yields the lock, None if nothing is to do."""
    if read_note(folder) == made_from:
        yield None
        return
    with locked(folder) as lock:
        if read_note(folder) == made_from:  # somebody else made it while we waited
            yield None
            return
        remove(folder)
        folder.mkdir(parents=True)
        (folder / NOTE).touch()
        yield lock
        unfinished = folder / (NOTE + ".new")
        unfinished.write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(folder / NOTE)


def make_dependencies(interpreter: Interpreter, name: str, packages: list[str], below: Path | None) -> Path:
    """A shared layer with these packages, pinned by the constraints; returns its folder."""
    folder = cached(name)
    with making(folder, {"interpreter": list(interpreter), "packages": packages}) as lock:
        if lock is not None:
            names = [re.split(r"[<>=~!\[ ]", package)[0] for package in packages]
            time_needed = "a few minutes, once for all clones" if below is None else "once for all clones"
            say("Installing {} into {} ({})".format(", ".join(names), folder, time_needed))
            make_venv(interpreter, folder, lock, below)
            pins = ["--constraint", str(constraints(interpreter))]
            run([str(folder / "bin/python"), "-m", "pip", "install", *pins, *packages], lock)
    return folder


def offer_commands(layer: Path, environment: Path) -> None:
    """Give `environment` the commands of a layer below it (pytest, torchrun), run by its own interpreter."""
    for source in sorted((layer / "bin").iterdir()):
        target = environment / "bin" / source.name
        if target.exists() or source.is_symlink() or not os.access(str(source), os.X_OK):
            continue
        python = re.escape(bytes(layer / "bin/python"))
        start_by_pip = rb"\A(#!%b.*\n|#!/bin/sh\n'''exec' \"?%b.*\n' '''\n)" % (python, python)
        body, scripts = re.subn(start_by_pip, b"", source.read_bytes())
        if not scripts:
            target.symlink_to(source)
            continue
        # Through sh, because a #! line has a length limit and takes no spaces.
        start = "#!/bin/sh\n'''exec' \"{}\" \"$0\" \"$@\"\n' '''\n".format(environment / "bin/python")
        target.write_bytes(start.encode() + body)
        target.chmod(0o755)


def made_from(interpreter: Interpreter, dev: bool, layers: list[Path]) -> Any:
    """What the clone's own layer depends on, as JSON reads it back."""
    project = hashlib.sha256((CLONE / "pyproject.toml").read_bytes()).hexdigest()
    return {
        "interpreter": list(interpreter),
        "clone": str(CLONE),
        "dev": dev,
        "dependencies": dependency_key(interpreter),
        "layers": [str(layer) for layer in layers],
        "project": project,
    }


def is_ready(folder: Path, pair: str | None, dev: bool) -> bool:
    """Whether the clone's layer is what a new one would be; starts no process, so that `make` stays quick."""
    note = read_note(folder)
    try:
        interpreter = Interpreter(*note["interpreter"])
        layers = [Path(layer) for layer in note["layers"]]
        current = made_from(interpreter, note["dev"], layers)
    except (TypeError, KeyError, OSError):
        return False
    right_python = pair is None or interpreter.minor == pair
    intact = os.access(interpreter.path, os.X_OK) and all(is_complete(layer) for layer in layers)
    return note == current and right_python and intact and (note["dev"] or not dev)


def make_environment(folder: Path, pair: str | None, dev: bool) -> None:
    """Bring the clone's environment `folder`, and the layers that it needs, up to date."""
    if is_ready(folder, pair, dev):
        return
    if folder.exists() and any(folder.iterdir()) and not (folder / NOTE).exists():
        raise Failure(f"{folder} was not made by this program: move it away and run this again")
    interpreter = choose_interpreter(pair)
    say(f"Making the environment {folder.name} with Python {interpreter.version} ({interpreter.path})")
    key = dependency_key(interpreter)
    packages = requirements("dependencies") + requirements("requires")
    layers = [make_dependencies(interpreter, key, packages, None)]
    if dev:
        layers.append(make_dependencies(interpreter, key + "-dev", dev_requirements(), layers[0]))
    with making(folder, made_from(interpreter, dev, layers)) as lock:
        if lock is None:
            return
        make_venv(interpreter, folder, lock, layers[-1])
        editable = ["--no-index", "--no-deps", "--no-build-isolation", "--editable", str(CLONE)]
        run([str(folder / "bin/python"), "-m", "pip", "install", *editable], lock)
        for layer in layers:
            offer_commands(layer, folder)
    say(f"Ready: {folder.name}/bin/megatron-moe")


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the environment of this clone: .venv or .venv-3.12.")
    parser.add_argument(
        "--pair",
        choices=[FIRST_PAIR, SECOND_PAIR],
        help="the version pair, by its Python; without it, the first one whose Python is found goes to .venv",
    )
    parser.add_argument("--dev", action="store_true", help="with the tools that test and check")
    parser.add_argument(
        "--optional", action="store_true", help="if that Python is missing, say so, leave no .venv, exit 0"
    )
    arguments = parser.parse_args()
    folder = CLONE / (".venv-" + SECOND_PAIR if arguments.pair == SECOND_PAIR else ".venv")
    try:
        make_environment(folder, arguments.pair, arguments.dev)
    except Failure as failure:
        if arguments.optional and failure.exit_code == NO_INTERPRETER:
            say(f"Python {arguments.pair} was not found here: going on without {folder.name}")
            if (folder / NOTE).exists():
                remove(folder)
            return 0
        print(failure, file=sys.stderr)
        return failure.exit_code
    except OSError as error:
        print(f"Failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted: the next run starts this step again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
