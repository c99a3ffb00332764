"""What a model that predicts several tokens at once gets beside a microbatch: the tokens after the next."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def with_further_tokens(batch: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The batch, and for each of `count` depths k = 1, 2, ... what stands k places further, as the last
    dimension of [b, s, count]:

    - `further_tokens`: the tokens, 0 where there is none;
    - `further_labels`: what follows them;
    - `further_mask`: 1 where that is a target, as `loss_mask` says at that place, and the token is there;
    - `further_padding`: true where the place itself or the further one is padding, or no token is there.

    There is no token behind the end of the sequence, nor, where documents must not see each other, behind
    that of the document.

    Args:
        batch: tokens, labels, loss_mask [b, s], whole sequences; also padding_mask and document_starts, where
            there are such.
    """
    tokens, starts = batch["tokens"], batch.get("document_starts")
    documents = None if starts is None else starts.long().cumsum(1)
    padding = batch.get("padding_mask", torch.zeros_like(tokens, dtype=torch.bool))
    found: dict[str, list[Tensor]] = {"tokens": [], "labels": [], "mask": [], "padding": []}
    for depth in range(1, count + 1):
        there = torch.ones_like(tokens, dtype=torch.bool)
        there[:, -depth:] = False
        if documents is not None:
            there &= documents == documents.roll(-depth, 1)
        found["tokens"].append(tokens.roll(-depth, 1).where(there, 0))
        found["labels"].append(batch["labels"].roll(-depth, 1).where(there, 0))
        found["mask"].append(batch["loss_mask"].roll(-depth, 1) * there)
        found["padding"].append(padding | padding.roll(-depth, 1) | ~there)
    return {**batch, **{f"further_{name}": torch.stack(parts, -1) for name, parts in found.items()}}
