"""Records of every form and file as token files: what is read, what is refused, what is kept."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from chat_cases import ONE, SMOLLM2, TWO, tokenizer_folder
from experiments import experiment

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Instruction
from megatron_moe.data import workers
from megatron_moe.data.documents import BadRecord
from megatron_moe.data.instruction.messages import messages_of
from megatron_moe.data.instruction.token_records import TokenRecords
from megatron_moe.data.prepare import Prepared, prepare

SECTION = Instruction(train=["x"])
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be short."},
        *(
            {"from": name, "value": text["content"]}
            for name, text in zip(["human", "gpt"] * 2, TWO[1:], strict=True)
        ),
    ]
}


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": TWO}, TWO),
        (SHAREGPT, TWO),
        ({"question": ONE[0]["content"], "answer": ONE[1]["content"], "id": 3}, ONE),
        ({"instruction": ONE[0]["content"], "input": "", "output": ONE[1]["content"]}, ONE),
        ({"prompt": ONE[0]["content"], "completion": ONE[1]["content"]}, ONE),
    ],
    ids=["chat", "ShareGPT", "GSM8K", "Alpaca", "completion"],
)
def test_known_forms_are_one(record: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert messages_of(record, SECTION) == messages


def test_keys_that_are_named() -> None:
    record = {"messages": TWO, "chat": ONE, "q": "Add", "given": "2 and 2", "a": "4"}
    assert messages_of(record, Instruction(train=["x"], messages_key="chat")) == ONE
    named = Instruction(train=["x"], prompt_key="q", input_key="given", answer_key="a")
    assert [message["content"] for message in messages_of(record, named)] == ["Add\n\n2 and 2", "4"]


BAD = {
    "no answer": ({"messages": ONE[:1]}, "has no answer"),
    "an unknown role": ({"messages": [{"role": "robot", "content": "x"}]}, 'message 1 has the role "robot"'),
    "an empty answer": (
        {"messages": [ONE[0], {"role": "assistant", "content": " "}]},
        r"message 2 \(assistant\) is empty",
    ),
    "an empty prompt": ({"question": "", "answer": "4"}, "the text under 'question' is empty"),
    "a number": ({"question": "2 + 2", "answer": 4}, "'answer' is 4, not a text"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "not a text"),
    "no messages": ({"messages": []}, "not a list of messages"),
    "no form": ({"text": "hello"}, r"none of messages, or .*its keys: text\)"),
    "two forms": ({"messages": ONE, "question": "a", "answer": "b"}, "several of messages"),
    "no object": ({"messages": ["hello"]}, 'message 1 is "hello"'),
}


@pytest.mark.parametrize(("record", "words"), BAD.values(), ids=BAD)
def test_what_is_no_conversation_is_said(record: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRecord, match=words):
        messages_of(record, SECTION)


def jsonl(path: Path, records: list[Any]) -> str:
    path.write_text(
        "".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records)
    )
    return str(path)


def prepared(
    folder: Path, train: list[str], seq_length: int = 128, split: Any = (100, 0), **section: Any
) -> Prepared:
    tokenizer = tokenizer_folder(folder / "tokenizer", SMOLLM2)
    made = experiment(
        model={"vocab_size": 500},
        training={"seq_length": seq_length},
        data={
            "kind": "instruction",
            "instruction": {"train": train, **section},
            "tokenizer": {"kind": "huggingface", "model": str(tokenizer)},
            "split": list(split),
        },
        logging={"root": str(folder / "runs")},
    )
    return prepare(made, folder / "runs")


def records_of(found: Prepared) -> TokenRecords:
    assert found.instruction is not None
    return found.instruction.train


MANY = [{"messages": [*TWO[1:-1], {"role": "assistant", "content": f"It is {n}."}]} for n in range(40)]


def test_every_type_of_file_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = jsonl(tmp_path / "plain.jsonl", MANY)
    content = Path(plain).read_bytes()
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "packed.jsonl.zst").write_bytes(zstandard.compress(content))
    table = pyarrow.Table.from_pylist([{**record, "score": 1.5} for record in MANY])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    expected = records_of(prepared(tmp_path, [plain]))
    assert expected.manifest.records == 40 and expected.manifest.targets == int(expected.targets.sum())
    monkeypatch.setattr(workers, "_BYTES_A_WORKER", 1 << 10)  # several processes
    for name in ("packed.jsonl.gz", "packed.jsonl.zst", "rows.parquet"):
        found = records_of(prepared(tmp_path, [str(tmp_path / name)]))
        assert found.manifest.content_sha256 == expected.manifest.content_sha256, name
    assert found.place(12).endswith("rows.parquet: row 13")
    assert expected.place(12).endswith("plain.jsonl:13")


def test_bytes_of_parquet_are_no_text(tmp_path: Path) -> None:
    rows = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": [b"2 + 2"], "answer": ["4"]}), rows)
    with pytest.raises(InputError, match=r"rows\.parquet: row 1: the key 'question' is .*bytes.*not a text"):
        prepared(tmp_path, [str(rows)])


def test_records_are_tokenized_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = jsonl(tmp_path / "a.jsonl", MANY)
    first = records_of(prepared(tmp_path, [train])).folder
    assert "tokenized" in capsys.readouterr().err
    moved = Path(train).rename(tmp_path / "b.jsonl")
    # Neither another name nor another length of sequences makes them anew.
    (moved.parent / "a.jsonl").hardlink_to(moved)
    assert records_of(prepared(tmp_path, [train], seq_length=120)).folder == first
    assert "tokenized" not in capsys.readouterr().err
    assert records_of(prepared(tmp_path, [train], answers="last")).folder != first
    jsonl(tmp_path / "a.jsonl", MANY[:-1])
    assert records_of(prepared(tmp_path, [train])).folder != first
    (first / "targets.bin").write_bytes(b"")
    jsonl(tmp_path / "a.jsonl", MANY)
    with pytest.raises(InputError, match=r"targets\.bin: is not the .* remove the folder"):
        prepared(tmp_path, [train])


def test_bad_records_stop_or_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = '{"question": "\\ud800", "answer": "x"}'
    bad = ["{nonsense", {"messages": ONE[:1]}, half]
    train = jsonl(tmp_path / "a.jsonl", [*MANY[:3], *bad, *MANY[3:5]])
    with pytest.raises(InputError, match=r"^data\.instruction\.train: .*a\.jsonl:4: not JSON"):
        prepared(tmp_path, [train])
    assert not (tmp_path / "runs").exists()
    found = records_of(prepared(tmp_path, [train], bad_records="skip"))
    assert (found.manifest.records, found.manifest.skipped_records) == (5, 3)
    said = capsys.readouterr().err
    assert "a.jsonl:4: not JSON" in said and "a.jsonl:5: the conversation has no answer" in said
    nothing = jsonl(tmp_path / "b.jsonl", [{"messages": ONE[:1]}])
    with pytest.raises(InputError, match="all 1 records were skipped"):
        prepared(tmp_path, [nothing], bad_records="skip")


def test_files_without_records_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n")
    with pytest.raises(InputError, match=r"a\.txt: is text without records"):
        prepared(tmp_path, [str(tmp_path / "a.txt")])
    blank = tmp_path / "a.jsonl"
    blank.write_text("\n\n")
    with pytest.raises(InputError, match="no records; give files that hold conversations"):
        prepared(tmp_path, [str(blank)])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"has none of the columns .*; there are text"):
        prepared(tmp_path, [str(tmp_path / "a.parquet")])
    with pytest.raises(InputError, match=r"data\.split: the training part .* holds no record"):
        prepared(tmp_path, [jsonl(tmp_path / "b.jsonl", MANY[:1])], split=(1, 99))


def test_a_model_with_too_small_a_vocabulary_is_one_mistake(tmp_path: Path) -> None:
    tokenizer = tokenizer_folder(tmp_path / "tokenizer", SMOLLM2)
    made = experiment(
        model={"vocab_size": 400},
        data={
            "kind": "instruction",
            "instruction": {"train": [jsonl(tmp_path / "a.jsonl", MANY)]},
            "tokenizer": {"kind": "huggingface", "model": str(tokenizer)},
        },
    )
    with pytest.raises(InputError, match=r"^model\.vocab_size: 400 is smaller than the \d+ ids"):
        prepare(made, tmp_path / "runs")
