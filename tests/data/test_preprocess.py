"""Preprocessing: the right tokens whatever the workers; whole files or none; mistakes by file and line."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from data_samples import ODD_TEXTS, SHAKESPEARE, DyingTokenizer, names, write_jsonl, write_text
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_moe.config.errors import InputError, RunError
from megatron_moe.data import documents
from megatron_moe.data import inputs as inputs_module
from megatron_moe.data import staging as staging_module
from megatron_moe.data.indexed import TokenWriter, open_token_files
from megatron_moe.data.inputs import file_sha256
from megatron_moe.data.manifest import manifest_path, read_manifest
from megatron_moe.data.preprocess import preprocess
from megatron_moe.data.staging import staging
from megatron_moe.data.tokenizer_training import train_sentencepiece
from megatron_moe.data.tokenizers import BytesTokenizer, SentencePieceTokenizer

BYTES = BytesTokenizer()


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "x.model"
    train_sentencepiece([str(SHAKESPEARE)], 600, path)
    return SentencePieceTokenizer(path)


def read_back(prefix: Path) -> list[list[int]]:
    return [document.tolist() for document in IndexedDataset(str(prefix))]


def file_bytes(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


def test_files_equal_megatron_cores_builder(tmp_path: Path, pieces: SentencePieceTokenizer) -> None:
    text = SHAKESPEARE.read_text()[:200_000]
    manifest = preprocess(
        [write_text(tmp_path / "x.txt", text)], tmp_path / "ours", pieces, documents="paragraph"
    )
    paragraphs = [paragraph + "\n" for paragraph in text.split("\n\n")]
    paragraphs[-1] = paragraphs[-1].removesuffix("\n")
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for paragraph in paragraphs:
        ids = [*pieces.encode(paragraph), pieces.eod]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert file_bytes(tmp_path / "ours") == file_bytes(tmp_path / "theirs")
    assert manifest.documents == len(paragraphs) > 1000


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_jsonl_records_come_back_as_documents(
    tmp_path: Path, pieces: SentencePieceTokenizer, suffix: str
) -> None:
    path = write_jsonl(tmp_path / f"x.jsonl{suffix}", ODD_TEXTS, key="body")
    manifest = preprocess([path], tmp_path / "out", pieces, json_key="body")
    found = read_back(tmp_path / "out")
    assert [pieces.decode(ids) for ids in found] == [text for text in ODD_TEXTS if text]
    assert all(ids[-1] == pieces.eod and pieces.eod not in ids[:-1] for ids in found)
    assert (manifest.documents, manifest.empty_documents) == (len(ODD_TEXTS) - 1, 1)


TEXT = "one\n\n\ntwo\r\nstill two \n \t\n\u2028three"


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("file", [TEXT]),
        ("line", ["one\n", "two\r\n", "still two \n", "\u2028three"]),
        ("paragraph", ["one\n", "two\r\nstill two \n", "\u2028three"]),
    ],
)
@pytest.mark.parametrize("append_eod", [True, False])
def test_what_a_document_is(
    tmp_path: Path, unit: documents.Unit, expected: list[str], append_eod: bool
) -> None:
    path = write_text(tmp_path / "x.txt", "\ufeff" + TEXT)
    preprocess([path], tmp_path / "out", BYTES, documents=unit, append_eod=append_eod)
    end = [BYTES.eod] if append_eod else []
    assert read_back(tmp_path / "out") == [[*text.encode(), *end] for text in expected]


@given(
    text=st.text(alphabet="ab \n\r\té", min_size=1),
    chunk_bytes=st.integers(1, 12),
    unit=st.sampled_from(["file", "line", "paragraph"]),
)
def test_documents_do_not_depend_on_how_a_file_is_cut(
    text: str, chunk_bytes: int, unit: documents.Unit, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    inputs = [write_text(folder / "x.txt", "head\n\n" + text), write_text(folder / "y.txt.gz", text + "tail")]
    preprocess(inputs, folder / "whole", BYTES, documents=unit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs_module, "CHUNK_BYTES", chunk_bytes)
        preprocess(inputs, folder / "cut", BYTES, documents=unit)
    assert file_bytes(folder / "cut") == file_bytes(folder / "whole")


def test_the_result_does_not_depend_on_the_workers(
    tmp_path: Path, pieces: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "CHUNK_BYTES", 3000)
    text = SHAKESPEARE.read_text()[:60_000]
    inputs = [write_text(tmp_path / "x.txt.gz", text), write_jsonl(tmp_path / "y.jsonl", text.split("\n\n"))]
    manifests = [
        preprocess(inputs, tmp_path / f"out{workers}", pieces, workers=workers) for workers in (1, 2, 3)
    ]
    assert file_bytes(tmp_path / "out1") == file_bytes(tmp_path / "out2") == file_bytes(tmp_path / "out3")
    assert manifests[0] == manifests[1] == manifests[2]


def test_the_manifest_describes_the_files(tmp_path: Path, pieces: SentencePieceTokenizer) -> None:
    inputs = [str(SHAKESPEARE), write_text(tmp_path / "y.txt.gz", "a second file")]
    manifest = preprocess(inputs, tmp_path / "out", pieces)
    tokens = np.fromfile(tmp_path / "out.bin", np.uint16)
    shares = np.unique(tokens, return_counts=True)[1] / tokens.size
    assert manifest.unigram_entropy_nats == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-12)
    assert (manifest.documents, manifest.tokens, manifest.vocab_size) == (2, tokens.size, 600)
    assert manifest.text_bytes == SHAKESPEARE.stat().st_size + 13
    assert (manifest.tokenizer_kind, manifest.tokenizer_sha256) == ("sentencepiece", pieces.sha256)
    assert manifest.bin_bytes == (tmp_path / "out.bin").stat().st_size
    assert manifest.idx_bytes == (tmp_path / "out.idx").stat().st_size
    for path, source in zip(inputs, manifest.inputs, strict=True):
        assert source.path == path
        assert source.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert read_manifest(manifest_path(tmp_path / "out")) == manifest


GOOD = '{"text": "good"}\n'
BAD_INPUTS = {
    "broken.jsonl": (GOOD * 2 + '{"text": "x"\n', r"broken\.jsonl:3: not JSON: Expecting ',' delimiter"),
    "list.jsonl": (GOOD + "[1]\n", r"list\.jsonl:2: a JSON list"),
    "nokey.jsonl": (GOOD + '{"body": "x", "n": 1}\n', r"nokey\.jsonl:2: json_key 'text' is missing.*: body$"),
    "number.jsonl": ('\n{"text": 7}\n', r"number\.jsonl:2: json_key 'text' is 7, not a text"),
    "half.jsonl": ('{"text": "\\ud800"}\n', r"half\.jsonl:1: .*surrogate"),
    "deep.jsonl": (GOOD + "[" * 100_000 + "\n", r"deep\.jsonl:2: not JSON"),
    "latin1.jsonl": (GOOD.encode() + b'{"text": "\xe9"}\n', r"latin1\.jsonl:2: not UTF-8 \(byte 0xe9\)"),
    "latin1.txt": (b"one\ntwo\nthr\xe9e\n", r"latin1\.txt:3: not UTF-8 \(byte 0xe9\)"),
    "empty.txt": ("", r"empty\.txt: the file is empty"),
    "empty.txt.gz": (gzip.compress(b""), r"empty\.txt\.gz: the file is empty"),
    "mark.txt": (b"\xef\xbb\xbf", r"mark\.txt: the file is empty"),
    "blank.jsonl": ("\n \n", r"blank\.jsonl: no documents"),
    "plain.txt.gz": ("not packed", r"plain\.txt\.gz: not a gzip file"),
    "short.txt.gz": (
        gzip.compress(os.urandom(5000))[:-900],
        r"short\.txt\.gz: not a gzip file, or a damaged",
    ),
    "data.csv": ("a,b\n", r"data\.csv: unknown type.*\.jsonl"),
    "missing.txt": (None, r"missing\.txt: cannot read the input: No such file"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_bad_input_is_named_and_leaves_nothing(tmp_path: Path, name: str, place: str) -> None:
    content, message = BAD_INPUTS[name]
    bad = tmp_path / name
    if content is not None:
        bad.write_bytes(content.encode() if isinstance(content, str) else content)
    inputs = [str(bad)]
    if place == "last" and not name.startswith("blank"):
        inputs.insert(0, write_text(tmp_path / "good.txt", "text\n"))
    before = names(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        preprocess(inputs, tmp_path / "new" / "folder" / "out", BYTES)
    assert len(raised.value.problems) == 1 and "\n" not in str(raised.value)
    assert names(tmp_path) == before


def test_a_bad_line_is_named_by_a_worker_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "CHUNK_BYTES", 100)
    lines = [GOOD] * 500
    lines[250] = '{"text": 1}\n'
    lines[400] = '{"text": 2}\n'
    path = write_text(tmp_path / "x.jsonl", "".join(lines))
    with pytest.raises(InputError, match=r"x\.jsonl:251: .* is 1"):
        preprocess([path], tmp_path / "out", BYTES, workers=2)
    assert names(tmp_path) == {"x.jsonl"}


def test_a_folder_as_input_or_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        preprocess([str(tmp_path / "folder.txt")], tmp_path / "out", BYTES)
    path = write_text(tmp_path / "x.txt", "text")
    with pytest.raises(InputError, match="cannot write"):
        preprocess([path], Path(path) / "out", BYTES)
    (tmp_path / "out.bin").mkdir()
    with pytest.raises(InputError, match=r"out: cannot write the token files"):
        preprocess([path], tmp_path / "out", BYTES)
    assert names(tmp_path) == {"folder.txt", "x.txt", "out.bin"}


def test_a_worker_that_dies_is_noticed(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x.txt", "text")
    with pytest.raises(RunError, match="a worker process died"):
        preprocess([path], tmp_path / "out", DyingTokenizer(), workers=2)
    assert names(tmp_path) == {"x.txt"}


def test_a_full_disk_is_no_mistake_of_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text(tmp_path / "x.txt", "text")

    def full(writer: TokenWriter, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TokenWriter, "add", full)
    with pytest.raises(RunError, match=r"out: cannot write the token files: No space left on device"):
        preprocess([path], tmp_path / "new" / "out", BYTES)
    with (
        pytest.raises(RunError, match="note: cannot be written: No space left"),
        staging(tmp_path / "note", True),
    ):
        full(None)  # type: ignore[arg-type]
    monkeypatch.setattr(staging_module.os, "open", full)
    with pytest.raises(RunError, match=r"new: cannot write there: No space left on device"):
        preprocess([path], tmp_path / "new" / "out", BYTES)
    assert names(tmp_path) == {"x.txt"}


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.txt")
    for read in (file_sha256, lambda path: preprocess([path], tmp_path / "out", BYTES)):
        with pytest.raises(InputError, match=r"x\.txt: is a pipe or a device; give a file"):
            read(str(tmp_path / "x.txt"))


def test_names_that_are_no_utf8_stand_in_the_manifest(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")
    Path(path).write_text("text")
    preprocess([path], tmp_path / "out", BYTES)
    assert json.loads((tmp_path / "out.json").read_text())["inputs"][0]["path"] == f"{tmp_path}/\\xff.txt"


def test_two_at_once_on_one_target_are_refused(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x.txt", "text")
    with staging(tmp_path / "out", wait=False), pytest.raises(InputError, match="out: another process"):
        preprocess([path], tmp_path / "out", BYTES)
    preprocess([path], tmp_path / "out", BYTES)
    assert names(tmp_path) == {"x.txt", "out.bin", "out.idx", "out.json"}


HANG_WHILE_WRITING = """
import sys, time
from pathlib import Path
from megatron_moe.data import indexed, preprocess, tokenizers

def hang(writer):
    writer._bin.flush()
    print("writing", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    indexed.TokenWriter.finish = hang
    preprocess.preprocess(sys.argv[1:2], Path(sys.argv[2]), tokenizers.BytesTokenizer(), workers=2)
"""


def test_kill_9_leaves_neither_files_nor_workers(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x.txt", "some text\n" * 1000)
    script = tmp_path / "script.py"
    script.write_text(HANG_WHILE_WRITING)
    process = subprocess.Popen(
        [sys.executable, script, path, tmp_path / "out"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert names(tmp_path) - {"x.txt", "script.py"} == {".out.partial"}
    preprocess([path], tmp_path / "out", BYTES)
    assert names(tmp_path) == {"x.txt", "script.py", "out.bin", "out.idx", "out.json"}
    psutil.wait_procs(children, timeout=30)
    assert not any(child.is_running() for child in children)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_an_interrupted_replacement_never_mixes_old_and_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    path = write_text(tmp_path / "x.txt", "old text")
    preprocess([path], tmp_path / "out", BYTES)
    rename = Path.rename
    left = [renames]

    def interrupted(source: Path, target: Path) -> Path:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return rename(source, target)

    write_text(tmp_path / "x.txt", "the new")
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preprocess([path], tmp_path / "out", BYTES)
    assert not manifest_path(tmp_path / "out").exists()
    if renames < 2:
        with pytest.raises(InputError, match=r"out\.idx: cannot read"):
            open_token_files(tmp_path / "out")
    else:
        assert bytes(read_back(tmp_path / "out")[0][:-1]) == b"the new"


def test_preprocessing_needs_no_torch() -> None:
    code = (
        "import sys, megatron_moe.data.command, megatron_moe.data.prepare, megatron_moe.data.encode;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_progress_is_one_line_where_there_is_no_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    preprocess([write_text(tmp_path / "x.txt", "text" * 100_000)], tmp_path / "out", BYTES, workers=2)
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"tokenized: 400\.0 kB in \d+\.\d s\n", err)


def test_waiting_for_a_folder_ends_when_its_owner_is_done(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from megatron_moe.data.staging import staging\n"
        "with staging(Path(sys.argv[1]), wait=True) as folder:\n"
        "    print('in', flush=True); (folder / 'file').touch(); sys.stdin.read()\n"
    )
    target = tmp_path / "target"
    owner = subprocess.Popen(
        [sys.executable, "-c", code, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None and owner.stdin is not None
    assert owner.stdout.readline() == "in\n"
    with pytest.raises(InputError, match="another process"), staging(target, wait=False):
        pass
    waiting = subprocess.Popen(
        [sys.executable, "-c", code, target], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    time.sleep(0.1)
    assert waiting.poll() is None
    owner.communicate()
    assert waiting.communicate()[0] == b"in\n"
    assert names(tmp_path) == set()
