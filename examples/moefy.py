"""A small model of one's own, made a mixture of experts by one line, and trained on the shipped text.

    python examples/moefy.py                    # plain PyTorch
    python examples/moefy.py --hugging-face     # a Llama of transformers, which must be installed
    torchrun --nproc-per-node 2 examples/moefy.py --expert-parallel 2

Needs nothing else: a few minutes on a laptop's CPU, seconds with `--steps 20`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_moe

TEXT = Path(__file__).parents[1] / "corpus" / "tinyshakespeare.txt"
WIDTH, LAYERS, LENGTH, BATCH = 64, 2, 64, 16


class CharacterModel(nn.Module):
    """A causal transformer over bytes: [b, s] -> logits [b, s, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.output = nn.Linear(WIDTH, 256)

    def forward(self, text: Tensor) -> Tensor:
        """Logits of the next byte."""
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        hidden = self.characters(text) + self.places.weight
        logits: Tensor = self.output(self.layers(hidden, mask=mask, is_causal=True))
        return logits


class Llama(nn.Module):
    """The same with a Llama of Hugging Face's transformers, made here and not fetched."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
        ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        self.model: Any = LlamaForCausalLM(
            LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes, **ends)
        )

    def forward(self, text: Tensor) -> Tensor:
        """Logits of the next byte."""
        logits: Tensor = self.model(text).logits
        return logits


def main() -> None:
    """Train, and print what the loss and the routers do."""
    parser = argparse.ArgumentParser(description="Train a small model made a mixture of experts by one line.")
    parser.add_argument("--hugging-face", action="store_true", help="a Llama instead of plain PyTorch")
    parser.add_argument("--expert-parallel", type=int, default=1, help="ranks that experts are spread over")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    torch.manual_seed(0)  # the same weights on every rank
    model = Llama() if options.hugging_face else CharacterModel()
    if ranks == 1 and options.expert_parallel > 1:
        parser.error(
            "--expert-parallel needs as many ranks: torchrun --nproc-per-node 2 examples/moefy.py .."
        )
    groups = megatron_moe.expert_groups(options.expert_parallel) if ranks > 1 else {}
    # This is the line. The adaptive coefficient of the balancing loss follows the drop rate.
    megatron_moe.moefy(model, num_experts=8, topk=2, moe_aux_loss_coeff={"xi": 0.2}, **groups)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    random = torch.Generator().manual_seed(rank)
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH,), generator=random)
        sample = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()])
        loss = nn.functional.cross_entropy(model(sample[:, :-1]).flatten(0, 1), sample[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        if ranks > 1:
            megatron_moe.average_gradients(model)
        if rank == 0 and (step == 1 or step % 20 == 0):
            report(step, float(loss.detach()), model)
        megatron_moe.end_iteration(model)
        optimizer.step()
    if dist.is_initialized():
        dist.destroy_process_group()


def report(step: int, loss: float, model: nn.Module) -> None:
    """One line for the model, and one for each router."""
    print(f"step {step}: loss {loss:.3f}")
    for name, seen in megatron_moe.statistics(model).items():
        print(
            f"  {name}: load max/mean {seen.load_max_over_mean:.2f}, dead experts {seen.dead_experts}, "
            f"would drop {100 * seen.would_drop_rate:.1f} %"
        )


if __name__ == "__main__":
    main()
