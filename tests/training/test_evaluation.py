"""The held-out loss: the right number in every layout, and nothing of it reaches the training."""

from __future__ import annotations

from pathlib import Path

import pytest
import train_on_ranks as on_ranks
from distributed import ranks
from experiments import experiment, layout
from training_runs import assert_same, checkpoint, records, tensors

MODEL = {"hidden_dropout": 0.3, "attention_dropout": 0.3}
TRAINING = {"train_iters": 3, "global_batch_size": 4}
EVALUATED = TRAINING | {"eval_interval": 2, "eval_iters": 2}


def test_the_loss_is_the_cross_entropy_of_the_logits_without_dropout():
    one, by_hand = ranks(1).run(
        on_ranks.evaluations, experiment(model=MODEL, training=EVALUATED), Path(), True
    )[0]
    assert one == pytest.approx(by_hand, rel=1e-6)
    for parallel in (layout(pp=2), layout(tp=2), layout(dp=2)):
        made = experiment(model=MODEL, training=EVALUATED, parallel=parallel)
        for loss, _ in ranks(2).run(on_ranks.evaluations, made, Path(), False):
            assert loss == pytest.approx(one, rel=1e-6)


def test_training_does_not_notice_it(tmp_path):
    def made(training: dict):
        return experiment(model=MODEL, training=training, parallel=layout(pp=2))

    ranks(2).run(
        on_ranks.train_all, [(made(EVALUATED), tmp_path / "with"), (made(TRAINING), tmp_path / "without")]
    )
    evaluated, plain = records(tmp_path / "with"), records(tmp_path / "without")
    # After every second step, and at the end.
    assert ["eval/loss" in record for record in evaluated] == [False, True, True]
    for record in evaluated:
        record.pop("eval/loss", None)
    assert evaluated == plain
    assert_same(tensors(checkpoint(tmp_path / "with", 3)), tensors(checkpoint(tmp_path / "without", 3)))
