"""The loop as a whole: it learns, in the precision that the device computes fast."""

from __future__ import annotations

from pathlib import Path

import train_on_ranks as on_ranks
from distributed import REPOSITORY, ranks
from experiments import experiment, layout
from training_runs import records

from megatron_moe.data.prepare import prepare


def test_a_tiny_model_learns_more_than_frequencies(tmp_path):
    made = experiment(
        model={"hidden_size": 64, "num_layers": 2, "vocab_size": 257, "init_method_std": 0.02},
        moe={"num_moe_experts": 4, "moe_ffn_hidden_size": 64},
        parallel=layout(tp=2),
        data={
            "prepare": {"input": [str(REPOSITORY / "corpus/tinyshakespeare.txt")], "documents": "paragraph"},
            "tokenizer": {"kind": "bytes"},
        },
        optimizer={"lr": 1e-2, "lr_warmup_iters": 5},
        training={"train_iters": 80, "global_batch_size": 16, "micro_batch_size": 4, "seq_length": 64},
        logging={"root": str(tmp_path)},
    )
    ranks(2).run(on_ranks.train, made, tmp_path / "run")
    (source,) = prepare(made, tmp_path).sources
    losses = [record["loss"] for record in records(tmp_path / "run")]
    assert losses[0] > 5.3, "at first every byte is as likely as any other"
    assert sum(losses[-10:]) / 10 < source.manifest.unigram_entropy_nats - 0.3, losses


def test_precision_auto_is_what_is_fast_here():
    for asked, dtype in (("auto", "torch.float32"), ("fp32", "torch.float32"), ("bf16", "torch.bfloat16")):
        assert ranks(1).run(on_ranks.precision, experiment(training={"precision": asked}), Path()) == [dtype]


def test_bf16_trains_as_fp32_does_but_for_rounding():
    fp32, bf16 = (
        ranks(1).run(on_ranks.steps, experiment(training={"precision": precision}), Path(), 4)[0]
        for precision in ("fp32", "bf16")
    )
    for a, b in zip(fp32, bf16, strict=True):
        assert a["loss"] != b["loss"] and abs(a["loss"] - b["loss"]) < 0.02 * a["loss"]
