"""Blends: what a run reads of several sources, and what is said where they don't fit."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from data_samples import experiment, write_text
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema import Data, Experiment, Prepare, Source, Tokenizer
from megatron_moe.data.batches import Microbatches
from megatron_moe.data.blend import Blend, Part
from megatron_moe.data.prepare import prepare
from megatron_moe.data.preprocess import preprocess
from megatron_moe.data.pretraining import Datasets, build_datasets
from megatron_moe.data.tokenizers import BytesTokenizer

BYTES = Tokenizer(kind="bytes")


class Numbered:
    """Samples that hold a source's letter and their own number."""

    def __init__(self, letter: str, length: int) -> None:
        self.letter, self.length = letter, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        assert 0 <= index < self.length
        return {"tokens": torch.tensor([ord(self.letter), index])}


def blend(**of: tuple[int, float]) -> Blend:
    """Sources by name: their samples and their weight."""
    return Blend([Part(name, Numbered(name, length), weight) for name, (length, weight) in of.items()])


def run(
    dataset: Blend, steps: int, gbs: int, mbs: int = 1, dp: int = 1, begin: int = 0, shuffle: bool = True
) -> list[set[tuple[str, int]]]:
    """Each global batch's samples, over all replicas."""
    replicas = [
        Microbatches(
            dataset,
            seed=5,
            consumed_samples=begin * gbs,
            data_parallel_rank=rank,
            data_parallel_size=dp,
            micro_batch_size=mbs,
            global_batch_size=gbs,
            shuffle=shuffle,
        )
        for rank in range(dp)
    ]
    batches = []
    for _ in range(steps):
        micro = [batch for replica in replicas for batch in islice(replica, gbs // mbs // dp)]
        batches.append([(chr(a), b) for batch in micro for a, b in batch["tokens"].tolist()])
    assert all(len(batch) == gbs for batch in batches)
    return [set(batch) for batch in batches]


@given(
    mbs=st.sampled_from([1, 2, 4]),
    dp=st.sampled_from([1, 2, 3]),
    begin=st.integers(0, 9),
    weights=st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)),
)
def test_a_step_trains_on_the_same_samples_in_every_layout_and_after_every_resume(
    mbs: int, dp: int, begin: int, weights: tuple[float, float]
) -> None:
    """Within an epoch of both sources and across its end."""
    whole = run(blend(a=(30, weights[0]), b=(7, weights[1])), 12, gbs=24)
    part = run(blend(a=(30, weights[0]), b=(7, weights[1])), 12 - begin, gbs=24, mbs=mbs, dp=dp, begin=begin)
    assert part == whole[begin:]


def test_the_order_of_the_sources_in_the_file_does_not_matter() -> None:
    assert run(blend(a=(30, 2), b=(30, 1)), 3, 10) == run(blend(b=(30, 1), a=(30, 2)), 3, 10)


def test_each_source_goes_through_its_own_epochs() -> None:
    """Three samples of the one for each of the other, and none twice before all have come."""
    dataset = blend(a=(30, 3), b=(10, 1))
    first, second = run(dataset, 2, gbs=40)
    assert first == second == {("a", i) for i in range(30)} | {("b", i) for i in range(10)}
    order = dataset.order(5, shuffle=True)
    of_a = [order[index] for index in range(80) if order[index] < 30]
    assert of_a[:30] != of_a[30:], "each epoch has an order of its own"
    equal = blend(a=(30, 1), b=(30, 1)).order(5, shuffle=True)
    places = [equal[index] for index in range(60)]
    assert [p for p in places if p < 30] != [p - 30 for p in places if p >= 30], "and so has each source"
    assert dataset.epochs(40) == {"a": 1.0, "b": 1.0}
    assert dataset.epochs(100) == {"a": 2.5, "b": 2.5}


def test_validation_has_one_order_and_says_where_samples_come_from() -> None:
    dataset = Blend([Part("a", Numbered("a", 4), 1), Part("b", Numbered("b", 3), 1)], tell_source=True)
    order = dataset.order(5, shuffle=False)
    found = [dataset[order[index]] for index in range(8)]
    assert [(chr(x["tokens"][0]), int(x["tokens"][1])) for x in found] == [
        (letter, number) for number in (0, 1, 2) for letter in "ab"
    ] + [("a", 3), ("b", 0)]
    assert [x["by_source"].tolist() for x in found[:2]] == [[1, 0], [0, 1]]


def corpus(folder: Path, name: str, lines: int) -> str:
    return write_text(folder / f"{name}.txt", "".join(f"{name} {n}\n" for n in range(lines)))


@pytest.fixture
def described(tmp_path: Path) -> Any:
    """An experiment over two texts, of 900 and 300 lines; the second is token files already."""
    preprocess([corpus(tmp_path, "short", 300)], tmp_path / "short", BytesTokenizer(), documents="line")
    long = Prepare(input=[corpus(tmp_path, "long", 900)], documents="line")

    def make(
        long_options: dict[str, Any], short_options: dict[str, Any], options: Any = None, **training: Any
    ) -> Experiment:
        sources = {
            "short": Source(path=str(tmp_path / "short"), **short_options),
            "long": Source(prepare=long, **long_options),
        }
        data = Data(blend=sources, tokenizer=BYTES, **(options or {}))
        return experiment(data, seq_length=16, **{"eval_interval": 5, **training})

    return make


def built(described: Experiment, tmp_path: Path) -> Datasets:
    return build_datasets(described, prepare(described, tmp_path / "runs"))


def shares(dataset: Any, count: int = 2000) -> dict[str, float]:
    taken = dataset.interleaving().taken(count)
    return {part.name: n / count for part, n in zip(dataset.parts, taken, strict=True)}


def test_without_weights_every_sample_is_seen_as_often(described: Any, tmp_path: Path) -> None:
    train = built(described({}, {}), tmp_path).train
    sizes = {part.name: len(part.samples) for part in train.parts}
    assert shares(train) == pytest.approx({name: n / len(train) for name, n in sizes.items()}, abs=1e-3)
    assert 2.5 < sizes["long"] / sizes["short"] < 3.5


def test_epochs_multiply(described: Any, tmp_path: Path) -> None:
    train = built(described({}, {"epochs": 2.0}), tmp_path).train
    seen = train.epochs(10 * len(train))
    assert seen["short"] / seen["long"] == pytest.approx(2, rel=0.01)


def test_weights_are_shares_part_by_part(described: Any, tmp_path: Path) -> None:
    datasets = built(described({"weight": 1.0}, {"weight": [3.0, 0.0]}), tmp_path)
    assert shares(datasets.train) == pytest.approx({"long": 0.25, "short": 0.75})
    assert [part.name for part in datasets.valid.parts] == ["long"]


def test_a_source_may_be_for_validation_only(described: Any, tmp_path: Path) -> None:
    datasets = built(described({"weight": 1.0}, {"weight": 0.5, "split": [0.0, 100.0]}), tmp_path)
    assert [part.name for part in datasets.train.parts] == ["long"]
    assert shares(datasets.valid) == pytest.approx({"long": 2 / 3, "short": 1 / 3}, abs=1e-3)
    text = BytesTokenizer().decode(datasets.train[0]["tokens"].tolist())
    assert "long" in text and "short" not in text


@pytest.mark.parametrize("split", [[99.9, 0.1], [0.1, 99.9]])
def test_a_source_too_small_for_its_weight_is_named(
    described: Any, tmp_path: Path, split: list[float]
) -> None:
    part = "validation" if split[1] < 1 else "training"
    words = (
        rf"^data\.blend\.short: the {part} part of data\.blend\.short\.split .* holds 0 of 300 documents .* "
        r"training\.seq_length 16 \+ 1; take .*data\.blend\.short\.weight"
    )
    with pytest.raises(InputError, match=words):
        built(described({"weight": 1.0}, {"weight": 1.0, "split": split}), tmp_path)
    weight = [1.0, 0.0] if part == "validation" else [0.0, 1.0]
    assert built(described({"weight": 1.0}, {"weight": weight, "split": split}), tmp_path)


def test_every_source_with_a_mistake_is_named(described: Any, tmp_path: Path) -> None:
    """Foreign files without a manifest: their ids are looked at."""
    wrong = described({"split": [1.0, 0.0], "weight": [1.0, 1.0]}, {"weight": 1.0})
    (tmp_path / "short.json").unlink()
    tokens = bytearray((tmp_path / "short.bin").read_bytes())
    tokens[:2] = (300).to_bytes(2, "little")
    (tmp_path / "short.bin").write_bytes(tokens)
    with pytest.raises(InputError) as raised:
        built(wrong, tmp_path)
    long, short = raised.value.problems
    assert long.startswith("data.blend.long: the validation part")
    assert short.startswith(f"data.blend.short.path: {tmp_path}/short holds the token id 300")
    assert "has 301 ids or more, but data.tokenizer has 257" in short


def test_an_index_of_another_tokenizer_is_refused(described: Any, tmp_path: Path) -> None:
    manifest = tmp_path / "short.json"
    sha = BytesTokenizer().sha256
    manifest.write_text(manifest.read_text().replace(sha, sha[::-1]))
    with pytest.raises(InputError, match=r"^data\.blend\.short\.path: .*made with another tokenizer"):
        built(described({}, {}), tmp_path)


def test_options_about_documents_need_their_ends(described: Any, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    preprocess([str(text)], tmp_path / "short", BytesTokenizer(), documents="line", append_eod=False)
    with pytest.raises(InputError, match=r"^data\.blend\.short\.path: .*which data\.eod_mask_loss goes by"):
        built(described({}, {}, {"eod_mask_loss": True}), tmp_path)
