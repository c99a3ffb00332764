"""The command `eval`, as a user runs it."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from letter_models import write_model

from megatron_moe.cli import main
from megatron_moe.config.errors import InputError
from megatron_moe.convert.models import open_model
from megatron_moe.inference.evaluation.questions import Answers, Encoder
from megatron_moe.inference.evaluation.reading import Choices, asked_of, read_tasks
from megatron_moe.inference.prompts import tokenizer_of

ROOT = Path(__file__).parents[2]
TP2 = "parallel.tensor_model_parallel_size=2"
TEXT = "First Citizen: Before we proceed any further, hear me speak. " * 4
CHOICES = {"kind": "multiple_choice", "prompt": "q", "choices": "c", "answer": "a"}
GOOD = {"q": "1", "c": ["a", "b"], "a": 0}
PROBLEM = {
    "prompt": 'def half(x):\n    """Half of x."""\n',
    "test": "def check(f):\n    assert f(4) == 2",
    "entry_point": "half",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def task_in(path: Path, records: list[Any], **keys: Any) -> Path:
    path.mkdir(exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (path / "records.jsonl").write_text("".join(f"{line}\n" for line in lines))
    keys = {"file": "records.jsonl", **keys}
    (path / "task.yaml").write_text("".join(f"{key}: {json.dumps(keys[key])}\n" for key in keys))
    return path / "task.yaml"


def evaluated(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "megatron_moe", "eval", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout) if "--json" in arguments else {"shown": done.stdout}
    return found


def test_text_task_and_parity_alone_and_over_ranks(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "held_out.txt").write_text(TEXT)
    records = [{"q": "To be", "c": [" or", " not"], "a": 1}, {"q": "O", "c": [" Romeo", " light"], "a": "A"}]
    task = task_in(tmp_path / "one", records, **CHOICES, name="best", separator="")
    given = ["--text", str(tmp_path / "held_out.txt"), "--task", str(task), "--against", str(folder)]
    alone = evaluated(str(folder), *given, "--json", "--records")
    output = tmp_path / "found.json"
    shown = evaluated(str(folder), *given, TP2, "--records", "--output", str(output))["shown"]
    split = json.loads(output.read_text())
    for one, other in zip(alone["results"], split["results"], strict=True):
        for name, metric in one["metrics"].items():
            assert other["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-5, abs=1e-5)
            assert f"{other['metrics'][name]['value']:.4f}" in shown
    assert [result["name"] for result in split["results"]] == [str(tmp_path / "held_out.txt"), "best"]
    assert len(split["results"][1]["records"]) == 2
    for found in (alone["against"], split["against"]):
        assert found["largest_logit_difference"] < 1e-4
        assert found["same_most_likely_token"] == found["same_greedy_tokens"] == 1
        assert found["loss"] == pytest.approx(found["loss_of_transformers"], abs=1e-5)
    assert f"{folder}: float32, 2 ranks" in shown


def test_programs_pass_or_fail_by_their_tests(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(PROBLEM).encode()))
    (tmp_path / "half.yaml").write_text(f"kind: programs\nfile: {path}\nprompt: prompt\nseparator: ''\n")
    given = Choices(samples=4, k=[1, 2], temperature=0.8)
    (task,) = read_tasks([tmp_path / "half.yaml"], given)
    tokenizer = tokenizer_of(open_model(folder))
    asked = asked_of(task, Encoder(tokenizer, None, 64), given)
    continued = asked.questions.continuations
    assert continued is not None
    assert len(continued.prompts) == 4
    assert (continued.temperature, continued.stops[:2]) == (0.8, ["\nclass", "\ndef"])
    texts = ["    return x / 2\n", "    return x * 2\n", "    return x >> 1", "    import socket\n    retur"]
    result = asked.score(Answers([], texts))
    assert [record["passed"] for record in result.records] == [True, False, True, False]
    assert result.metrics["pass@1"].value == pytest.approx(2 / 4)
    assert result.metrics["pass@2"].value == pytest.approx(1 - 1 / 6)


def test_a_program_is_found_in_a_chat(folder: Path, tmp_path: Path) -> None:
    from megatron_moe.data.instruction.chat import open_chat

    task_path = task_in(tmp_path, [PROBLEM], kind="programs", prompt="prompt")
    tokenizer = tokenizer_of(open_model(folder))
    (task,) = read_tasks([task_path], Choices())
    asked = asked_of(task, Encoder(tokenizer, open_chat(tokenizer, folder / "tokenizer.json"), 64), Choices())
    answer = "Sure! Here it is:\n```python\ndef half(x):\n    return x / 2\n```\nI hope that helps."
    assert asked.score(Answers([], [answer])).metrics["pass@1"].value == 1
    assert asked.score(Answers([], ["    return x / 2"])).metrics["pass@1"].value == 1
    begun = "def half(x):\n    return x / 2\n```\nThat is half of it."
    assert asked.score(Answers([], [begun])).metrics["pass@1"].value == 1
    assert asked.score(Answers([], ["I cannot."])).metrics["pass@1"].value == 0


@pytest.mark.parametrize(
    ("records", "keys", "problem"),
    [
        ([{"q": "1"}], {}, "records.jsonl:1: has no key 'c', which task.choices names; its keys: q"),
        ([{"q": "1", "c": ["a"], "a": 0}], {}, "records.jsonl:1: has 1 choices; at least 2 are needed"),
        ([{"q": "1", "c": ["a", ""], "a": 0}], {}, "records.jsonl:1: has a choice without text"),
        (
            [{"q": "1", "c": ["a", "b"], "a": 2}],
            {},
            "a number from 0 to 1, a letter, or the text of a choice",
        ),
        ([{"q": "1", "c": ["a", "b"], "a": -1}], {}, "the answer -1 (task.answer) is none of its 2 choices"),
        ([{"q": "1", "c": "ab", "a": 0}], {}, "something else than a list of texts"),
        ([{"q": 1, "c": ["a", "b"], "a": 0}, {"q": None}], {}, "records.jsonl:2: has no key 'c'"),
        (["[1]"], {}, "records.jsonl:1: a JSON list"),
        (['{"q": '], {}, "records.jsonl:1: not JSON"),
        ([], {}, "records.jsonl: the file is empty"),
        ([""], {}, "records.jsonl: has no records"),
        ([GOOD], {"few_shot": 1}, "none is left to ask"),
        ([GOOD], {"few_shot": 2}, "2 examples, but"),
        ([GOOD], {"prompt": "{{ question }}"}, "records.jsonl:1: task.prompt: 'question' is undefined"),
        ([{"q": "1"}], {"prompt": "{{ question"}, "task.yaml:3: prompt: is no jinja template"),
        ([GOOD], {"answer": "{% if %}"}, "task.yaml:5: answer: is no jinja template"),
        ([GOOD], {"prompt": "{{ ''.__class__.__mro__ }}"}, "unsafe"),
        ([{"q": "1"}], {"file": "gone.jsonl"}, "gone.jsonl"),
        ([{"q": "1"}], {"kind": "multiple_choise"}, "did you mean multiple_choice?"),
        ([{"q": "1"}], {"kind": "exact_match", "stopp": ["x"]}, "stopp: unknown key; did you mean stop?"),
        ([{"q": "1"}], {"kind": "multiple_choice", "extract": "("}, "extract: unknown key"),
        ([{"q": "1"}], {"few_shot": -1}, "few_shot: must be a whole number of at least 0 (-1)"),
    ],
)
def test_what_is_wrong_with_a_task_is_said_in_a_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    records: list[Any],
    keys: dict[str, Any],
    problem: str,
) -> None:
    task = task_in(tmp_path, records, **{**CHOICES, **keys})
    assert main(["eval", str(folder), "--task", str(task)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert any(problem in line for line in said), said
    assert all(line.startswith((str(tmp_path), "task.")) for line in said), said


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "there is nothing to evaluate: give --task FILE.yaml or --text FILE"),
        (["--text", "a.txt", "--length", "65"], "--length 65: must be from 2 to"),
        (
            ["--text", "a.txt", "--length", "8", "--stride", "8"],
            "--stride 8: must be less than the windows' 8",
        ),
        (["--text", "a.txt", "--samples", "3"], "--samples: is of tasks of the kind programs only"),
        (["--text", "gone.txt"], "gone.txt"),
        (["--text", "a.txt", "--against", "nowhere"], "nowhere: there is no such folder"),
        (["--against", "nowhere"], "there is nothing to evaluate"),
        (["--text", "a.txt", "--records"], "give --output FILE.json or --json"),
        (["--text", "a.txt", "--output", "no/where.json"], "there is no folder no"),
        (["--text", "one.txt"], "has no document of at least 2 tokens"),
        (["--text", "a.txt", "parallel.context_parallel_size=2"], "is not for inference"),
        (["--task", "p.yaml", "--k", "2"], "1 are too few for pass@2"),
        (["--task", "p.yaml", "--top-p", "0.5"], "at temperature 0 nothing is"),
        (["--task", "p.yaml", "--samples", "2"], "would all be the same at temperature 0"),
    ],
)
def test_what_is_wrong_with_the_command_is_said_in_a_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    problem: str,
) -> None:
    (tmp_path / "a.txt").write_text("To be")
    (tmp_path / "one.txt").write_text("T")
    task_in(tmp_path, [PROBLEM], kind="programs", prompt="prompt").rename(tmp_path / "p.yaml")
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(folder), *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_a_wrong_expression_is_said_with_its_line(tmp_path: Path) -> None:
    task = task_in(tmp_path, [], kind="exact_match", prompt="q", answer="a", extract="(")
    with pytest.raises(InputError, match=r'task.yaml:5: extract: "\(" is no regular expression'):
        read_tasks([task], Choices())


def test_a_model_needs_its_own_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "model", "llama")
    (tmp_path / "a.txt").write_text("To be")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"w{number}": 200 + number for number in range(4)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["eval", str(folder), "--text", str(tmp_path / "a.txt")]) == 2
    assert "its ids go up to 203, and model.vocab_size is 200" in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    assert main(["eval", str(folder), "--text", str(tmp_path / "a.txt")]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "tasks").glob("*.yaml")), ids=lambda path: path.stem
)
def test_tasks_that_are_shipped_can_be_read(path: Path) -> None:
    (task,) = read_tasks([path], Choices())
    assert Path(task.file).parent == path.parent


def test_gsm8k_takes_the_last_number(folder: Path, tmp_path: Path) -> None:
    for name in ("gsm8k_test", "gsm8k_train"):
        (tmp_path / f"{name}.jsonl").write_text(
            '{"question": "Half of 2,468?", "answer": "It is <<2468/2=1234>>1,234.\\n#### 1,234"}\n' * 5
        )
    (tmp_path / "gsm8k.yaml").write_text((ROOT / "configs/tasks/gsm8k.yaml").read_text())
    (task,) = read_tasks([tmp_path / "gsm8k.yaml"], Choices())
    asked = asked_of(task, Encoder(tokenizer_of(open_model(folder)), None, 4096), Choices())
    for text, right in (("So $1234.", 1), ("2468/2 = 1,234 dollars", 1), ("It is 1235", 0), ("No idea", 0)):
        assert asked.score(Answers([], [text] * 5)).metrics["exact_match"].value == right, text
