"""Training and validation samples through Megatron-Core's GPTDataset."""

from __future__ import annotations

import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import experiment, names, write_text
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Data, Experiment, Tokenizer
from megatron_moe.data.existing import check_token_files
from megatron_moe.data.parts import part_bounds
from megatron_moe.data.prepare import Prepared, PreparedSource, prepare
from megatron_moe.data.preprocess import preprocess
from megatron_moe.data.pretraining import Datasets, build_datasets
from megatron_moe.data.samples import Samples
from megatron_moe.data.tokenizers import BytesTokenizer

BYTES = Tokenizer(kind="bytes")


class Numbers(BytesTokenizer):
    """A vocabulary large enough to give each token of a small corpus an id of its own."""

    vocab_size = 10_000


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    """100 documents, which hold the numbers 0, 1, 2, ... in order: the token says where it stands."""
    lengths = np.random.default_rng(0).integers(1, 60, 100)
    builder = IndexedDatasetBuilder(str(tmp_path / "numbers.bin"), dtype=np.uint16)
    start = 0
    for length in lengths.tolist():
        builder.add_document(torch.arange(start, start + length), [length])
        start += length
    builder.finalize(str(tmp_path / "numbers.idx"))
    prefix, tokenizer = tmp_path / "numbers", Numbers()
    manifest = check_token_files(prefix, tokenizer, tmp_path)
    return Prepared((PreparedSource("", prefix, manifest, tmp_path / "index"),), tokenizer, 10_000)


def files_of(prepared: Prepared) -> PreparedSource:
    (source,) = prepared.sources
    return source


@pytest.fixture
def bounds(prepared: Prepared) -> np.ndarray[Any, Any]:
    """[101] where each document begins, and the end."""
    lengths = np.fromfile(f"{files_of(prepared).prefix}.idx", np.int32, 100, offset=34)
    return np.concatenate([[0], np.cumsum(lengths)])


def numbers(
    seq_length: int = 16, eval_interval: int | None = 1, split: Any = None, **options: Any
) -> Experiment:
    data = Data(path="numbers", tokenizer=BYTES, split=split or [80.0, 20.0])
    return experiment(data, seq_length=seq_length, eval_interval=eval_interval, **options)


def all_tokens(samples: Samples) -> np.ndarray[Any, Any]:
    return np.array([samples[index]["tokens"].tolist() for index in range(len(samples))])


def validation(datasets: Datasets) -> Samples:
    assert datasets.valid is not None
    return datasets.valid


def test_a_sample_has_all_that_the_model_needs(prepared: Prepared) -> None:
    sample = build_datasets(numbers(), prepared).train[0]
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in sample.items()} == {
        "tokens": ((16,), torch.int64),
        "labels": ((16,), torch.int64),
        "loss_mask": ((16,), torch.float32),
        "position_ids": ((16,), torch.int64),
    }
    assert sample["position_ids"].equal(torch.arange(16))
    assert sample["labels"][:-1].equal(sample["tokens"][1:])


def test_one_epoch_takes_each_token_of_a_part_once(prepared: Prepared, bounds: np.ndarray[Any, Any]) -> None:
    datasets = build_datasets(numbers(), prepared)
    for samples, begin, end in (
        (datasets.train, 0, bounds[80]),
        (validation(datasets), bounds[80], bounds[100]),
    ):
        tokens = all_tokens(samples)
        assert len(samples) == (end - begin - 1) // 16
        assert len(np.unique(tokens)) == tokens.size, "none twice"
        assert tokens.min() >= begin and tokens.max() < end, "the parts follow the order of the file"


def test_a_label_is_the_next_token_and_documents_follow_each_other_whole(
    prepared: Prepared, bounds: np.ndarray[Any, Any]
) -> None:
    samples = build_datasets(numbers(), prepared).train
    for index in range(len(samples)):
        sample = samples[index]
        for token, label in zip(sample["tokens"].tolist(), sample["labels"].tolist(), strict=True):
            ends_document = token + 1 in bounds
            assert label in bounds if ends_document else label == token + 1


def test_every_id_is_trained_on_padding_ids_of_tokenizers_included(prepared: Prepared) -> None:
    """Megatron-Core takes the loss from labels that equal its padding id: no id of the text may be one."""
    samples = build_datasets(numbers(), prepared).train
    assert all(samples[index]["loss_mask"].min() == 1 for index in range(len(samples)))
    assert {0, 1, 2, 256} <= set(all_tokens(samples).flatten().tolist())


def test_the_samples_do_not_depend_on_how_long_or_wide_the_run_is(prepared: Prepared) -> None:
    reference = all_tokens(build_datasets(numbers(), prepared).train)
    longer = numbers(train_iters=5000, global_batch_size=64, micro_batch_size=4)
    assert (all_tokens(build_datasets(longer, prepared).train) == reference).all()


def test_the_seed_changes_the_samples_up_to_the_largest(prepared: Prepared) -> None:
    reference = all_tokens(build_datasets(numbers(), prepared).train)
    other = all_tokens(build_datasets(numbers(seed=2**32 - 1), prepared).train)
    assert reference.shape == other.shape and (reference != other).any()


def test_validation_is_built_only_where_it_is_used(prepared: Prepared) -> None:
    only_training = numbers(eval_interval=None, split=[1.0, 0.0])
    datasets = build_datasets(only_training, prepared)
    assert datasets.valid is None
    assert len(datasets.train) > len(build_datasets(numbers(), prepared).train)


def test_tiny_weights_are_read_as_they_stand(prepared: Prepared) -> None:
    whole = build_datasets(numbers(eval_interval=None, split=[1.0, 0.0]), prepared).train
    assert len(build_datasets(numbers(eval_interval=None, split=[1.0, 1e-7]), prepared).train) == len(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"seq_length": 5000},
            r"training part of \[80\.0, 20\.0\] holds 80 of 100 documents with [\d,]+ tokens",
        ),
        (
            {"seq_length": 1000},
            r"validation part .* training\.seq_length 1000 \+ 1; take training\.seq_length below \d+",
        ),
        ({"split": [1.0, 0.0]}, r"validation part .* 0 tokens"),
        ({"split": [0.0, 1.0]}, r"training part .* 0 tokens"),
        ({"split": [0.0, 0.0]}, r"all weights are 0"),
    ],
)
def test_a_part_too_small_for_one_sample_is_an_input_error(
    prepared: Prepared, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=rf"^data\.split: .*{message}"):
        build_datasets(numbers(**options), prepared)


@given(
    weights=st.lists(st.floats(0, 100, allow_subnormal=False), min_size=3, max_size=3).filter(
        lambda w: sum(w) > 1e-6
    ),
    documents=st.integers(1, 5000),
)
def test_parts_are_megatron_cores(weights: list[float], documents: int) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import convert_split_vector_to_split_matrix

    matrix = convert_split_vector_to_split_matrix([weight / sum(weights) for weight in weights])
    for bounds, part in zip(matrix, part_bounds(weights, documents), strict=True):
        if bounds is not None:
            # Sums may round elsewhere: a document more or less at most.
            assert part == pytest.approx([round(bound * documents) for bound in bounds], abs=1)
        else:
            assert part[0] == part[1]


def test_the_length_that_the_error_names_works(prepared: Prepared) -> None:
    with pytest.raises(InputError) as raised:
        build_datasets(numbers(seq_length=5000), prepared)
    limit = int(str(raised.value).split("below ")[1].split(",")[0].split()[0])
    works = numbers(seq_length=limit - 1, eval_interval=None)
    assert len(build_datasets(works, prepared).train) == 1
    with pytest.raises(InputError):
        build_datasets(numbers(seq_length=limit, eval_interval=None), prepared)


def test_the_index_is_made_once_also_by_several_at_once(prepared: Prepared) -> None:
    with ThreadPoolExecutor(4) as pool:
        lengths = list(pool.map(lambda _: len(build_datasets(numbers(), prepared).train), range(4)))
    assert len(set(lengths)) == 1
    before = {path: path.stat().st_mtime_ns for path in files_of(prepared).index_cache.rglob("*")}
    assert len(names(files_of(prepared).index_cache)) == 2
    assert all_tokens(build_datasets(numbers(), prepared).train).size
    assert {path: path.stat().st_mtime_ns for path in files_of(prepared).index_cache.rglob("*")} == before


def test_replaced_token_files_get_an_index_of_their_own(prepared: Prepared) -> None:
    prefix = files_of(prepared).prefix
    build_datasets(numbers(), prepared)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(100):
        builder.add_document(torch.full((40,), 7), [40])
    builder.finalize(f"{prefix}.idx")
    samples = build_datasets(numbers(), prepared).train
    assert len(samples) == (80 * 40 - 1) // 16
    assert (all_tokens(samples) == 7).all()


@pytest.mark.parametrize("damage", ["truncated", "pickle", "objects"])
def test_a_damaged_index_is_refused_unread(prepared: Prepared, damage: str) -> None:
    build_datasets(numbers(), prepared)
    path = next(files_of(prepared).index_cache.glob("train-*/*shuffle_index.npy"))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "pickle":
        path.write_bytes(pickle.dumps([1, 2, 3]))
    else:
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(
        InputError, match=r"shuffle_index\.npy: a damaged sample index; remove the folder .*train-"
    ):
        build_datasets(numbers(), prepared)


def test_another_rank_than_0_does_not_build(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with pytest.raises(RuntimeError, match="rank 0 must build"):
        build_datasets(numbers(), prepared)


def test_nothing_is_said(
    prepared: Prepared,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_datasets(numbers(), prepared)
        build_datasets(numbers(), prepared)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


def test_from_text_to_samples(tmp_path: Path) -> None:
    text = "".join(f"Line number {number}.\n" for number in range(400))
    path = write_text(tmp_path / "x.txt", text)
    preprocess([path], tmp_path / "x", BytesTokenizer(), documents="line")
    data = Data(path=str(tmp_path / "x"), tokenizer=BYTES)
    described = experiment(data, seq_length=64, eval_interval=5)
    datasets = build_datasets(described, prepare(described, tmp_path / "runs"))
    read = BytesTokenizer().decode(datasets.train[0]["tokens"].tolist())
    middle = read.splitlines()[1:-1]
    assert middle and all(line + "\n" in text for line in middle)
    assert (
        BytesTokenizer().decode(all_tokens(validation(datasets)).flatten().tolist()).count("Line number 3")
        > 10
    )


def test_mock_samples_fit_the_model(tmp_path: Path) -> None:
    described = experiment(Data(kind="mock"), vocab_size=50, seq_length=8, eval_interval=1)
    datasets = build_datasets(described, prepare(described, tmp_path))
    tokens = torch.stack([datasets.train[index]["tokens"] for index in range(100)])
    assert tokens.shape == (100, 8) and tokens.unique().equal(torch.arange(50))
    assert not datasets.train[0]["tokens"].equal(validation(datasets)[0]["tokens"])
