"""The command line: what reaches a command, what its exit code is, what the user sees of a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe import __version__
from megatron_moe.cli import main
from megatron_moe.config.errors import RunError
from megatron_moe.config.loading import load
from megatron_moe.data import command as preprocess_command

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
CORPUS = str(ROOT / "corpus" / "tinyshakespeare.txt")
COMMANDS = ["validate", "plan", "train", "verify", "preprocess", "doctor"]


def exit_code(*arguments: str) -> int:
    """The exit code of a command, whichever way it leaves."""
    try:
        return main(arguments)
    except SystemExit as left:
        assert isinstance(left.code, int)
        return left.code


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_each_command_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    assert f"    {command}" in capsys.readouterr().out
    assert exit_code(command, "--help") == 0
    text = capsys.readouterr().out
    assert f"example:\n  megatron-moe {command}" in text
    assert "CONFIG" in text or command in ("preprocess", "doctor")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"megatron-moe {__version__}\n"


def test_validate_prints_an_experiment_that_loads_to_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ([], ["--provenance"]):
        assert exit_code("validate", QUICKSTART, *options, "training.seed=5") == 0
        again = tmp_path / "again.yaml"
        again.write_text(capsys.readouterr().out)
        assert load(again).experiment == load(QUICKSTART, ["training.seed=5"]).experiment


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("iterations", [1, 2, 7, 1000])
def test_the_quickstart_holds_for_the_promised_sizes(tp: int, pp: int, iterations: int) -> None:
    sizes = {
        "parallel.tensor_model_parallel_size": tp,
        "parallel.pipeline_model_parallel_size": pp,
        "training.train_iters": iterations,
    }
    for replicas in (1, 2, 4):
        load(QUICKSTART, [f"{key}={size}" for key, size in sizes.items()], world_size=tp * pp * replicas)


def test_overrides_may_stand_on_both_sides_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    code = exit_code("validate", "training.seed=1", "--provenance")
    assert code == 2, "CONFIG comes first"
    assert exit_code("validate", QUICKSTART, "training.seed=1", "--provenance", "optimizer.lr=0.5") == 0
    text = capsys.readouterr().out
    assert "  seed: 1 " in text
    assert "  lr: 0.5 " in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["validate", QUICKSTART, "training.sed=1"],
            "override training.sed: unknown key; did you mean training.seed?",
        ),
        (["validate", "none.yaml"], "none.yaml: there is no such file; name an existing YAML file"),
        (["plan", QUICKSTART, "--gpus", "3"], "which does not divide the 3 ranks"),
        (
            ["train", QUICKSTART, "model.num_layers=0"],
            "override model.num_layers: must be a whole number from 1 to 10000",
        ),
        (["verify", QUICKSTART, "moe.moe_router_topk=9"], "override moe.moe_router_topk: 9 is more than"),
    ],
)
def test_mistakes_are_lines_on_stderr_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["trian", QUICKSTART], "invalid choice: 'trian'"),
        (["train"], "CONFIG"),
        (["train", QUICKSTART, "--fast"], "train does not take --fast"),
        (["plan", QUICKSTART, "--gpus", "0"], "must be a whole number of at least 1, not 0"),
        (["verify", QUICKSTART, "--tolerance", "-1"], "must be a number above 0"),
        (["verify", QUICKSTART, "--tol", "1"], "verify does not take --tol"),
        (
            ["preprocess", "--input", "a", "--output", "b", "--no-append-eod", "c=d"],
            "preprocess does not take c=d",
        ),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*arguments) == 2
    assert words in capsys.readouterr().err


def test_validate_finds_input_files_that_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "none.txt"
    assert exit_code("validate", QUICKSTART, f"data.prepare.input=[{CORPUS}, {path}]") == 2
    assert capsys.readouterr().err == (
        f"override data.prepare.input: names {path}, and there is no such file; name an existing file\n"
    )
    assert exit_code("plan", QUICKSTART, f"data.prepare.input=[{path}]", "--json") == 0, (
        "a plan needs no data"
    )


def test_validate_loads_the_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.model"
    path.write_bytes(b"no model")
    overrides = [f"data.tokenizer.model={path}", "data.tokenizer.vocab_size=null", "model.vocab_size=512"]
    assert exit_code("validate", QUICKSTART, *overrides) == 2
    assert capsys.readouterr().err.startswith(f"data.tokenizer.model: {path}: not a sentencepiece model")


def test_a_mistake_is_one_line_whatever_is_in_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["preprocess", "--tokenizer", "bytes", "--output", "out", "--input"]
    assert main([*argv, "no\nsuch\x1b.txt"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no\\nsuch\\x1b.txt: cannot read the input")


def test_a_full_disk_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RunError("out: cannot write the token files: No space left on device")

    monkeypatch.setattr(preprocess_command, "run", full)
    assert main(["preprocess", "--input", "x.txt", "--output", "out"]) == 1
    assert capsys.readouterr().err == "out: cannot write the token files: No space left on device\n"


@pytest.mark.parametrize("command", [["validate", QUICKSTART, "training.seed=1"], ["doctor"]])
def test_a_working_directory_that_was_removed_is_one_line(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert exit_code(*command) == 2
    assert capsys.readouterr() == (
        "",
        "The working directory was removed: change to a folder that is there.\n",
    )


def test_a_reader_that_goes_away_is_no_error_message() -> None:
    program = [sys.executable, "-m", "megatron_moe", "validate", QUICKSTART]
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_an_output_that_finds_no_room_is_one_line() -> None:
    program = [sys.executable, "-m", "megatron_moe", "validate", QUICKSTART]
    with open("/dev/full", "w") as full:
        done = subprocess.run(program, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "The output cannot be written: no space left on its device.\n",
    )
