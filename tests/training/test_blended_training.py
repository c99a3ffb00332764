"""Training on blends: the loss of each source, what is written and said, and going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import blends_on_ranks as on_ranks
import pytest
import torch
import train_on_ranks
from distributed import ranks
from experiments import experiment, layout
from training_runs import assert_same, checkpoint, copy_until, records, tensors

from megatron_moe.config.schema import Experiment

TRAINING = {
    "train_iters": 3,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "eval_interval": 3,
    "eval_iters": 2,
}


@pytest.fixture
def described(tmp_path: Path) -> Any:
    sources = {}
    for name, lines, weight in (("many", 300, 3.0), ("few", 70, 1.0)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} and {n * n}\n" for n in range(lines)))
        prepare = {"input": [str(tmp_path / f"{name}.txt")], "documents": "line"}
        sources[name] = {"prepare": prepare, "weight": weight, "split": [70.0, 30.0]}

    def make(parallel: dict[str, Any] | None = None, names: tuple[str, ...] = ("many", "few")) -> Experiment:
        return experiment(
            data={
                "blend": {name: sources[name] for name in names},
                "tokenizer": {"kind": "bytes"},
                "eod_mask_loss": True,
            },
            model={"vocab_size": 300},
            training=TRAINING,
            parallel=parallel or layout(),
            logging={"root": str(tmp_path / "runs"), "curves": False},
        )

    return make


def test_the_loss_of_each_source_is_that_of_its_samples(described: Any, tmp_path: Path) -> None:
    (by_hand,) = ranks(1).run(on_ranks.evaluated_by_hand, described(), tmp_path / "run")
    assert by_hand.keys() == {"eval/loss", "eval/loss/few", "eval/loss/many"}
    assert by_hand["eval/loss/few"] != pytest.approx(by_hand["eval/loss/many"], rel=1e-4)
    assert ranks(1).run(on_ranks.evaluated, described(), tmp_path / "run") == [pytest.approx(by_hand)]
    for parallel in (layout(dp=2), layout(pp=2), layout(cp=2)):
        for found in ranks(2).run(on_ranks.evaluated, described(parallel), tmp_path / "run"):
            assert found == pytest.approx(by_hand)


def test_one_source_alone_is_not_told_apart(described: Any, tmp_path: Path) -> None:
    (found,) = ranks(1).run(on_ranks.evaluated, described(names=("many",)), tmp_path / "run")
    assert found.keys() == {"eval/loss"}


def test_epochs_of_data_that_is_not_blended(described: Any, tmp_path: Path) -> None:
    made = described()
    assert made.data.blend is not None
    data = made.data.model_copy(update={"blend": None, "prepare": made.data.blend["few"].prepare})
    (found,) = ranks(1).run(on_ranks.epochs, made.model_copy(update={"data": data}), tmp_path / "run", 3)
    samples, epochs = found
    assert epochs == pytest.approx([4 / samples, 8 / samples, 12 / samples])


def test_a_run_goes_on_where_it_was_in_every_source(described: Any, tmp_path: Path) -> None:
    """Over the end of the smaller source's epoch; to the bit."""
    made = described()
    made = made.model_copy(update={"checkpoint": made.checkpoint.model_copy(update={"save_interval": 1})})
    ranks(1).run(train_on_ranks.train, made, tmp_path / "whole")
    resumed = copy_until(tmp_path / "whole", tmp_path / "resumed", 1)
    assert ranks(1).run(train_on_ranks.train, made, resumed) == [1]
    assert records(resumed) == records(tmp_path / "whole")
    assert "eval/loss/few" in records(resumed)[-1] and "epoch" not in records(resumed)[-1]
    assert_same(tensors(checkpoint(resumed, 3)), tensors(checkpoint(tmp_path / "whole", 3)))


def test_only_padding_is_padding_for_routers(described: Any, tmp_path: Path) -> None:
    """A token that has no loss, such as the end of a document, is routed and balanced as any other."""
    no, some = torch.zeros(1, 4), torch.tensor([[1.0, 1, 0, 1]])
    masks = [
        {"loss_mask": some},
        {"loss_mask": some, "padding_mask": no.bool()},
        {"loss_mask": some, "padding_mask": some == 0},
    ]
    ((without, empty, padded),) = ranks(1).run(on_ranks.shared, described(), tmp_path / "run", masks)
    assert without == empty == {"tokens", "loss_mask", "num_targets"}
    assert padded == {"tokens", "loss_mask", "num_targets", "padding_mask"}
