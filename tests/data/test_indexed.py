"""Token files: the bytes of Megatron-Core's own builder, and no damage goes unnoticed."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_moe.config.errors import InputError
from megatron_moe.data import indexed
from megatron_moe.data.indexed import TokenWriter, open_token_files, token_dtype

Documents = list[list[int]]


def write(prefix: Path, documents: Documents, dtype: type = np.uint16) -> None:
    writer = TokenWriter(prefix, dtype)
    flat = np.array([token for document in documents for token in document])
    writer.add(flat, np.array([len(document) for document in documents], np.int64), ends_document=True)
    writer.finish()


def write_with_megatron(prefix: Path, documents: Documents, dtype: type = np.uint16) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


@given(
    documents=st.lists(st.lists(st.integers(0, 65000), min_size=1, max_size=9), min_size=1, max_size=20),
    dtype=st.sampled_from([np.uint16, np.int32]),
    cuts=st.sets(st.integers(1, 100)),
)
def test_files_equal_megatron_cores_however_the_documents_arrive(
    documents: Documents, dtype: type, cuts: set[int]
) -> None:
    flat = [
        (token, place == len(document) - 1) for document in documents for place, token in enumerate(document)
    ]
    stops = sorted({cut for cut in cuts if cut < len(flat)} | {len(flat)})
    with TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        writer = TokenWriter(ours, dtype)
        begin = 0
        for stop in stops:
            part = flat[begin:stop]
            ends = [place for place, (_, is_end) in enumerate(part) if is_end]
            bounds = [-1, *ends] + ([] if part[-1][1] else [len(part) - 1])
            writer.add(np.array([token for token, _ in part]), np.diff(bounds), ends_document=part[-1][1])
            begin = stop
        assert writer.finish() == (len(documents), len(flat))
        write_with_megatron(theirs, documents, dtype)
        for suffix in (".bin", ".idx"):
            assert Path(f"{ours}{suffix}").read_bytes() == Path(f"{theirs}{suffix}").read_bytes()


def test_megatron_core_reads_the_files(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [65000], [4, 5]]
    write(tmp_path / "x", documents)
    assert [document.tolist() for document in IndexedDataset(str(tmp_path / "x"))] == documents


@pytest.mark.parametrize("vocab_size", [257, 65499, 65500, 65536, 65537, 200_000])
def test_ids_are_stored_as_megatron_core_chooses(vocab_size: int) -> None:
    assert token_dtype(vocab_size) is DType.optimal_dtype(vocab_size)


def test_a_document_beyond_the_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "_LONGEST", 5)
    writer = TokenWriter(tmp_path / "x", np.uint16)
    writer.add(np.arange(3), np.array([3]), ends_document=False)
    with pytest.raises(InputError, match="more than 5 tokens"):
        writer.add(np.arange(3), np.array([3]), ends_document=True)


def test_sound_files_open(tmp_path: Path) -> None:
    write_with_megatron(tmp_path / "x", [[1, 2], [3], [4, 5, 6]], np.int32)
    files = open_token_files(tmp_path / "x")
    assert (files.documents, files.tokens, files.dtype) == (3, 6, np.int32)
    assert files.read().tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_every_truncation_is_noticed(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "x", [[1, 2], [3], [4, 5, 6]])
    path = tmp_path / f"x{suffix}"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=rf"x\{suffix}"):
            open_token_files(tmp_path / "x")
    path.write_bytes(whole + b"\0" * 9)
    with pytest.raises(InputError, match=rf"x\{suffix}"):
        open_token_files(tmp_path / "x")
    path.unlink()
    with pytest.raises(InputError, match=rf"x\{suffix}: cannot read"):
        open_token_files(tmp_path / "x")


def test_an_index_that_was_altered_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2], [3], [4, 5, 6]])
    path = tmp_path / "x.idx"
    whole = path.read_bytes()
    for place in range(len(whole)):
        altered = bytearray(whole)
        altered[place] ^= 0xFF
        path.write_bytes(altered)
        with pytest.raises(InputError, match="x"):
            open_token_files(tmp_path / "x")


def test_a_prefix_given_with_its_suffix_is_explained(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1]])
    with pytest.raises(InputError, match=rf"named without \.bin: {tmp_path / 'x'}"):
        open_token_files(tmp_path / "x.bin")
