"""Packed text, jsonl and parquet: the same documents whatever they come in, and damage that is noticed."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_samples import ODD_TEXTS, SHAKESPEARE, names, write_jsonl, write_text
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_moe.config.errors import InputError
from megatron_moe.data import inputs as input_files
from megatron_moe.data.preprocess import preprocess
from megatron_moe.data.tokenizer_training import train_sentencepiece
from megatron_moe.data.tokenizers import BytesTokenizer

BYTES = BytesTokenizer()
TEXTS = [text for text in SHAKESPEARE.read_text()[:60_000].split("\n\n") if text] + ODD_TEXTS


def documents_of(prefix: Path) -> list[str]:
    return [BYTES.decode(ids.tolist()) for ids in IndexedDataset(str(prefix))]


def made_of(path: Path | str, tmp_path: Path, **options: object) -> list[str]:
    preprocess([str(path)], tmp_path / "out", BYTES, **options)  # type: ignore[arg-type]
    return documents_of(tmp_path / "out")


def frames(content: bytes) -> bytes:
    """zstd as parallel packers write it: several frames, and one that is to be passed over."""
    third = len(content) // 3
    parts = [content[:third], content[third : 2 * third], b"", content[2 * third :]]
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    return skippable.join(zstandard.compress(part) for part in parts)


PACKED = {".gz": lambda content: gzip.compress(content[:99]) + gzip.compress(content[99:]), ".zst": frames}


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("chunk_bytes", [50, 1 << 20])
def test_packed_files_give_the_documents_of_plain_ones(
    tmp_path: Path, suffix: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_files, "CHUNK_BYTES", chunk_bytes)
    plain = Path(write_jsonl(tmp_path / "x.jsonl", TEXTS[:50] + ODD_TEXTS))
    packed = tmp_path / f"x.jsonl{suffix}"
    packed.write_bytes(PACKED[suffix](plain.read_bytes()))
    assert (
        made_of(packed, tmp_path)
        == made_of(plain, tmp_path)
        == TEXTS[:50] + [text for text in ODD_TEXTS if text]
    )


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("cut", [0.3, 0.7, 0.99])
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_packed_file_that_was_cut_short_is_an_error_under_any_policy(
    tmp_path: Path, suffix: str, cut: float, policy: str
) -> None:
    content = PACKED[suffix](SHAKESPEARE.read_bytes()[:50_000])
    path = tmp_path / f"short.txt{suffix}"
    path.write_bytes(content[: int(len(content) * cut)])
    with pytest.raises(InputError, match=r"short\.txt\.\w+: not a (zstd|gzip) file, or a damaged one"):
        made_of(path, tmp_path, bad_records=policy, documents="line")
    assert names(tmp_path) == {path.name}


@pytest.mark.parametrize("content", [b"plain text, not packed", frames(b"text" * 99) + b"rubbish behind it"])
def test_what_is_no_zstd_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.txt.zst").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.txt\.zst: not a zstd file, or a damaged one"):
        made_of(tmp_path / "x.txt.zst", tmp_path)


def write_parquet(
    path: Path, texts: pa.Array | list[str | None], name: str = "text", **options: object
) -> Path:
    column = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.string())
    table = pa.table({"id": list(range(len(column))), name: column, "meta": [{"text": "no"}] * len(column)})
    pq.write_table(table, path, **options)
    return path


@pytest.mark.parametrize(
    "column_type",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
@pytest.mark.parametrize("row_group_size", [7, 100_000])
def test_rows_of_parquet_are_documents(
    tmp_path: Path, column_type: pa.DataType, row_group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_files, "CHUNK_BYTES", 5_000)
    column = pa.array(TEXTS, pa.string()).cast(column_type)
    path = write_parquet(tmp_path / "x.parquet", column, row_group_size=row_group_size)
    assert made_of(path, tmp_path) == [text for text in TEXTS if text]


def test_parquet_gives_the_same_files_as_jsonl_for_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_files, "CHUNK_BYTES", 5_000)
    jsonl = write_jsonl(tmp_path / "x.jsonl", TEXTS, key="body")
    parquet = str(write_parquet(tmp_path / "x.parquet", TEXTS, "body", row_group_size=50))
    for path, name, workers in ((jsonl, "a", 1), (parquet, "b", 1), (parquet, "c", 2)):
        preprocess([path], tmp_path / name, BYTES, json_key="body", workers=workers)
    first, *others = [(tmp_path / f"{name}.bin").read_bytes() for name in "abc"]
    assert others == [first, first]


def test_empty_row_groups_are_passed_over(tmp_path: Path) -> None:
    with pq.ParquetWriter(tmp_path / "x.parquet", pa.schema([("text", pa.string())])) as writer:
        for texts in (["a", "b"], [], ["c"]):
            writer.write_table(pa.table({"text": pa.array(texts, pa.string())}))
    assert made_of(tmp_path / "x.parquet", tmp_path) == ["a", "b", "c"]


def test_a_large_row_group_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "x.parquet", ["x" * 1000] * 20_000, row_group_size=1 << 20, use_dictionary=False
    )
    file = input_files.open_input(str(path), "text")
    sizes = [len(chunk.payload) for chunk in file.chunks("file", "nowhere")]
    file.close()
    assert sum(sizes) == 20_000_000 and max(sizes) <= 2 * input_files.CHUNK_BYTES


def other_columns(path: Path) -> None:
    write_parquet(path, ["a"], "body")


def nested_column(path: Path) -> None:
    pq.write_table(pa.table({"text": [{"text": "a"}], "body": ["b"]}), path)


def column_of_numbers(path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), path)


def no_rows(path: Path) -> None:
    write_parquet(path, [])


def renamed_csv(path: Path) -> None:
    path.write_text("id,text\n1,some\n")


def cut_short(path: Path) -> None:
    write_parquet(path, TEXTS)
    path.write_bytes(path.read_bytes()[:-100])


def damaged_page(path: Path) -> None:
    write_parquet(path, TEXTS, row_group_size=40, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20] = bytes(20)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_columns, r"json_key 'text' is no column; there are id, body, meta$"),
        (nested_column, r"the column 'text' \(json_key\) holds struct<.*>, not text; columns of text: body$"),
        (column_of_numbers, r"the column 'text' \(json_key\) holds int64, not text; columns of text: none$"),
        (no_rows, r"the file has no rows"),
        (renamed_csv, r"not a parquet file, or a damaged one"),
        (cut_short, r"not a parquet file, or a damaged one"),
        (damaged_page, r"not a parquet file, or a damaged one \(row \d+ or behind it\): .*CRC"),
    ],
)
def test_parquet_that_cannot_be_read_is_an_error_under_any_policy(
    tmp_path: Path, make: object, message: str
) -> None:
    path = tmp_path / "x.parquet"
    make(path)  # type: ignore[operator]
    for policy in ("error", "skip"):
        with pytest.raises(InputError, match=rf"x\.parquet: {message}") as raised:
            made_of(path, tmp_path, bad_records=policy)
        assert "\n" not in str(raised.value)
    assert names(tmp_path) == {"x.parquet"}


@pytest.mark.parametrize(
    ("package", "name", "extra"),
    [("pyarrow.parquet", "x.parquet", "parquet"), ("zstandard", "x.jsonl.zst", "zstd")],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str, extra: str
) -> None:
    write_text(tmp_path / name, "something")
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"{name}: .* which is not installed; pip install 'megatron-moe\[{extra}\]'"
    with pytest.raises(InputError, match=message):
        made_of(tmp_path / name, tmp_path)


LINES = ['{"text": "good one"}'] * 30
BAD_LINES = {
    3: ("{", "not JSON"),
    8: ("[1]", "a JSON list"),
    9: ('{"text": null}', "json_key 'text' is null, not a text"),
    15: ('{"text": 5}', "is 5, not a text"),
    20: ('{"body": "x"}', "json_key 'text' is missing; texts of this record: body"),
    21: (json.dumps({f"key{i}": "x" for i in range(12)}), r"texts of this record: key0, .*, key9, \.\.\.$"),
    25: ('{"text": "\\ud800"}', "surrogate"),
    29: (b'{"text": "\xe9"}', "not UTF-8"),
}


def write_bad_lines(path: Path, bad: dict[int, tuple[str | bytes, str]]) -> str:
    lines: list[str | bytes] = list(LINES)
    for number, (line, _) in bad.items():
        lines[number - 1] = line
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return str(path)


@pytest.mark.parametrize("number", BAD_LINES)
def test_a_bad_record_is_an_error_with_its_line(tmp_path: Path, number: int) -> None:
    path = write_bad_lines(tmp_path / "x.jsonl", {number: BAD_LINES[number]})
    with pytest.raises(InputError, match=rf"x\.jsonl:{number}: .*{BAD_LINES[number][1]}"):
        made_of(path, tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_skipped_records_are_counted_and_the_first_named(
    tmp_path: Path, workers: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_files, "CHUNK_BYTES", 200)
    path = write_bad_lines(tmp_path / "x.jsonl", BAD_LINES)
    manifest = preprocess([path], tmp_path / "out", BYTES, bad_records="skip", workers=workers)
    assert documents_of(tmp_path / "out") == ["good one"] * (30 - len(BAD_LINES))
    assert (manifest.documents, manifest.skipped_records) == (30 - len(BAD_LINES), len(BAD_LINES))
    assert json.loads((tmp_path / "out.json").read_text())["skipped_records"] == len(BAD_LINES)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped")]
    assert [line.partition(": ")[0] for line in said[:3]] == [
        f"skipped {path}:{number}" for number in (3, 8, 9)
    ]
    assert said[3:] == ["skipped 5 more bad records, 8 in all"]


def test_skipped_rows_of_parquet_are_named_by_their_number(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = ["a", None, "b", None, "c"]
    path = write_parquet(tmp_path / "x.parquet", texts, row_group_size=2)
    with pytest.raises(InputError, match=r"x\.parquet: row 2: the column 'text' is null, not a text"):
        made_of(path, tmp_path)
    assert made_of(path, tmp_path, bad_records="skip") == ["a", "b", "c"]
    assert f"skipped {path}: row 4: the column 'text' is null" in capfd.readouterr().err
    offsets = np.array([0, 2, 4], np.int32)
    broken = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(offsets), pa.py_buffer(b"\xff\xfeok")])
    path = write_parquet(tmp_path / "y.parquet", broken)
    with pytest.raises(InputError, match=r"y\.parquet: row 1: not UTF-8 \(byte 0xff\)$"):
        made_of(path, tmp_path)
    assert made_of(path, tmp_path, bad_records="skip") == ["ok"]


@pytest.mark.parametrize(
    ("unit", "left"),
    [
        ("line", ["one\n", "\u00e9 two\n", "four\n", "five"]),
        ("paragraph", ["one\n\u00e9 two\n", "four\nfive"]),
    ],
)
def test_text_that_is_no_utf8_is_skipped_by_the_document(
    tmp_path: Path, unit: str, left: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.txt").write_bytes("one\n\u00e9 two\n\n".encode() + b"thr\xe9e\n\nfour\nfive")
    assert made_of(tmp_path / "x.txt", tmp_path, documents=unit, bad_records="skip") == left
    assert f"skipped {tmp_path}/x.txt:4: not UTF-8 (byte 0xe9)" in capfd.readouterr().err


def test_a_whole_file_is_skipped_and_nothing_of_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_files, "CHUNK_BYTES", 10)
    inputs = [
        write_text(tmp_path / "a.txt", "good\n" * 9),
        str(tmp_path / "b.txt"),
        write_text(tmp_path / "c.txt", "x"),
    ]
    (tmp_path / "b.txt").write_bytes(b"good\n" * 9 + b"\xff\n")
    preprocess(inputs, tmp_path / "out", BYTES, bad_records="skip")
    assert documents_of(tmp_path / "out") == ["good\n" * 9, "x"]


def test_nothing_but_bad_records_is_an_error(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x.jsonl", "{\n[]\n")
    with pytest.raises(
        InputError, match=r"x\.jsonl: all 2 records were skipped, the first because of .*:1: not JSON"
    ):
        made_of(path, tmp_path, bad_records="skip")
    assert names(tmp_path) == {"x.jsonl"}


def test_a_tokenizer_is_trained_on_the_good_records_only(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", TEXTS[:40])
    bad = write_text(tmp_path / "bad.jsonl", Path(good).read_text() + "{\n[]\n")
    from megatron_moe.data.tokenizer_training import Corpus, train_on

    train_sentencepiece([good], 320, tmp_path / "good.model")
    train_on([Corpus([bad], bad_records="skip")], 320, tmp_path / "bad.model")
    assert (tmp_path / "good.model").read_bytes() == (tmp_path / "bad.model").read_bytes()
