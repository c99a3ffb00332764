"""The command `generate`, as a user runs it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_families import tiny

from megatron_moe.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of Hugging Face with a tokenizer that knows bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    tiny("qwen3_moe").model.save_pretrained(path)
    alphabet = ["\u0120", *sorted(pre_tokenizers.ByteLevel.alphabet())[:180]]  # first what stands for a blank
    vocabulary = {"<end>": 0, "<user>": 1, **{letter: 2 + n for n, letter in enumerate(alphabet)}}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>", "<user>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}<user>"
    tokenizer.save_pretrained(path)
    return path


def generate(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_moe", "generate", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, input=given, capture_output=True, text=True, env=environment, timeout=240)


def records(done: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_file_of_prompts_alone_and_over_ranks(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "To be"},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"text": "O Romeo, Romeo"},
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "out.jsonl"
    drawn = ["--temperature", "0.8", "--seed", "5", "--max-new-tokens", "6"]
    alone = records(generate(str(folder), "--file", str(prompts), "--json", *drawn))
    assert [record["prompt"] for record in alone] == ["To be", "Hi", "O Romeo, Romeo"]
    assert [record["prompt_tokens"] for record in alone] == [5, 4, 14]
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    done = generate(str(folder), "--file", str(prompts), "--output", str(output), *drawn, *layout)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in output.read_text().splitlines()] == alone
    assert done.stdout.startswith("[1/3] To be")


def test_standard_input_is_a_prompt(folder: Path) -> None:
    done = generate(str(folder), "--max-new-tokens", "3", given="What light\n")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("What light")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--prompt", "x" * 64], "prompt 1: has 64 tokens, and model.max_position_embeddings is 64"),
        ([], "there is no prompt: give --prompt TEXT, --file FILE, or text on standard input"),
        (["--file", "{empty}"], "has no prompts; write one a line"),
        (["--file", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--prompt", "x", "--top-k", "3"], "--temperature is 0, which draws nothing"),
        (["--prompt", "x", "parallel.context_parallel_size=2"], "is not for inference"),
        (["--prompt", "x", "--output", "no/such/file"], "there is no folder"),
        (["--prompt", "x", "--system", "y"], "--system goes with --chat only"),
        (["--prompt", "x", "--logit-error"], "--logit-error goes with --dtype fp8 only"),
    ],
)
def test_bad_input_is_told_in_a_line(
    folder: Path,
    tmp_path: Path,
    arguments: list[str],
    problem: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code = main(["generate", str(folder), *(argument.format(empty=empty) for argument in arguments)])
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "")
    assert problem in shown.err
    assert len(shown.err.splitlines()) == 1


def test_a_model_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama").model.save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_fp8_says_what_it_does_to_the_logits(folder: Path) -> None:
    done = generate(
        str(folder), "--prompt", "To be", "--dtype", "fp8", "--logit-error", "--max-new-tokens", "2"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("FP8: logits differ by ")
