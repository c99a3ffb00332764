"""A run goes on with the tokenizer and the data that its checkpoint was trained on, wherever they lie now."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_moe.config.dump import to_yaml
from megatron_moe.config.errors import InputError
from megatron_moe.config.loading import load
from megatron_moe.data.prepare import prepare
from megatron_moe.data.tokenizer_training import train_sentencepiece
from megatron_moe.engine import checkpoint_folders
from megatron_moe.launch.beginning import begin
from megatron_moe.plan import plan
from megatron_moe.training import provenance

EXPERIMENT = """
name: small
model: {{num_layers: 1, hidden_size: 16, num_attention_heads: 2, vocab_size: 300}}
training: {{train_iters: 4, global_batch_size: 4, seq_length: 8}}
logging: {{root: {root}}}
data:
  prepare: {{input: [{text}], documents: line}}
  tokenizer: {{kind: {kind}, {more}}}
"""


def config(folder: Path, text: Path, tokenizer: Path | None = None) -> Path:
    path = folder / "small.yaml"
    kind, more = ("bytes", "") if tokenizer is None else ("sentencepiece", f"model: {tokenizer}")
    path.write_text(EXPERIMENT.format(root=folder / "runs", text=text, kind=kind, more=more))
    return path


def a_checkpoint(path: Path) -> None:
    """What the launcher reads of a checkpoint of the experiment, after two steps."""
    experiment = load(path).experiment
    prepared = prepare(experiment, Path(experiment.logging.root))
    run = Path(experiment.logging.root) / "small"
    aside = checkpoint_folders.begin(run, 2)
    (aside / "resolved.yaml").write_text(to_yaml(experiment))
    (aside / provenance.ABOUT).write_text(json.dumps(provenance.of(prepared)))
    hashes = {name.name: checkpoint_folders.sha256(name) for name in aside.iterdir()}
    checkpoint_folders.commit(aside, run, 2, hashes)


def start(path: Path) -> str:
    """The words with which `train` refuses to go on; empty where it would."""
    loaded = load(path)
    try:
        job = begin(loaded, plan.make(loaded.experiment), lambda line: None)
    except InputError as error:
        return str(error)
    job.locked.release()
    return ""


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"the {number}th line of a small text\n" for number in range(200)))
    return path


def test_files_may_move_but_not_change(tmp_path, text):
    a_checkpoint(config(tmp_path, text))
    assert start(config(tmp_path, text)) == ""

    moved = tmp_path / "elsewhere.txt"
    shutil.move(text, moved)
    assert start(config(tmp_path, moved)) == ""

    resolved = (tmp_path / "runs" / "small" / "resolved.yaml").read_text()
    moved.write_text(moved.read_text().replace("small", "short"))
    words = start(config(tmp_path, moved))
    assert words.startswith("data.prepare.input: other data than iter_0000002 was trained on (inputs sha256")
    assert words.count("\n") == 0
    assert (tmp_path / "runs" / "small" / "resolved.yaml").read_text() == resolved


def test_another_tokenizer_is_refused(tmp_path, text):
    models = []
    for size in (290, 300):
        models.append(tmp_path / f"{size}.model")
        train_sentencepiece([str(text)], size, models[-1], "text")
    a_checkpoint(config(tmp_path, text, models[0]))
    assert start(config(tmp_path, text, shutil.copy(models[0], tmp_path / "moved.model"))) == ""
    words = start(config(tmp_path, text, models[1]))
    assert words.startswith("data.tokenizer: its sha256 is") and words.count("\n") == 0


def test_token_files_of_other_tools_are_told_apart_by_their_tokens(tmp_path, text):
    """They have no manifest that names the text they were made of."""
    experiment = load(config(tmp_path, text)).experiment
    prepared = prepare(experiment, Path(experiment.logging.root))
    (source,) = prepared.sources
    tokens = {suffix: source.prefix.with_suffix(suffix).read_bytes() for suffix in (".bin", ".idx")}
    for suffix, content in tokens.items():
        (tmp_path / f"theirs{suffix}").write_bytes(content)
    path = config(tmp_path, text)
    path.write_text(
        path.read_text().replace(f"prepare: {{input: [{text}], documents: line}}", f"path: {tmp_path}/theirs")
    )
    a_checkpoint(path)
    assert start(path) == ""
    changed = bytearray(tokens[".bin"])
    changed[100] = changed[100] + 1
    (tmp_path / "theirs.bin").write_bytes(changed)
    assert start(path).startswith("data.path: other data than iter_0000002 was trained on (unigram entropy")


def test_every_source_of_a_blend_is_compared(tmp_path, text):
    path = config(tmp_path, text)
    plain, alone = path.read_text(), f"prepare: {{input: [{text}], documents: line}}"

    def blended(*sources: str) -> Path:
        path.write_text(plain.replace(alone, f"blend: {{{', '.join(sources)}}}"))
        return path

    def source(name: str, file: Path, weight: int = 1) -> str:
        return f"{name}: {{weight: {weight}, prepare: {{input: [{file}], documents: line}}}}"

    other = Path(shutil.copy(text, tmp_path / "other.txt"))
    a_checkpoint(blended(source("one", text), source("two", other)))
    assert start(blended(source("two", text), source("one", other))) == "", "the order does not matter"
    assert start(blended(source("one", text), source("two", other, weight=2))).startswith(
        "data.blend.two.weight: is 2.0, but was 1.0"
    )
    other.write_text(other.read_text().replace("small", "short"))
    words = start(blended(source("one", text), source("two", other)))
    assert words.startswith("data.blend.two.prepare.input: other data than iter_0000002")
    renamed = blended(source("one", text), source("three", other))
    assert start(renamed).startswith("data.blend: is [one, three], but was [one, two]")
    experiment = load(renamed).experiment
    newest = tmp_path / "runs" / "small" / "checkpoints" / "iter_0000002"
    with pytest.raises(InputError, match=r"^data\.blend: other sources .* \(one, three, but was one, two\)"):
        provenance.check(newest, prepare(experiment, Path(experiment.logging.root)))
