"""What one writes first: loops over tokens, and a loop over experts that indexes their weights. And a dense
feed-forward layer of as many products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_peers.contender import Contender, Problem

Indexed = Tensor | list[Tensor]
"""Weights of the experts, stacked or each by itself."""

TOKENS_OF_THE_LOOP = 64
"""It takes as long for each token, and is not given all of them."""

TOKENS_OF_THE_INDEXED_LOOP = 8
"""As above; for each token autograd adds up a gradient of the size of all experts, k times."""


def token_loop(problem: Problem) -> Contender:
    """One token after the other, through a module an expert."""
    router = problem.router.clone().requires_grad_()
    ins = [weight.clone().requires_grad_() for weight in problem.fc1]
    outs = [weight.clone().requires_grad_() for weight in problem.fc2]
    return Contender(
        "loop over tokens",
        lambda tokens: _token_by_token(tokens, router, ins, outs, problem),
        [router, *ins, *outs],
        tokens=min(TOKENS_OF_THE_LOOP, problem.tokens),
        rounds=2,
    )


def indexed_token_loop(problem: Problem) -> Contender:
    """One token after the other, the weights of its experts taken as weight[i] (FastMoE's brute-force
    baseline as published)."""
    router = problem.router.clone().requires_grad_()
    fc1, fc2 = problem.fc1.detach().requires_grad_(), problem.fc2.detach().requires_grad_()
    return Contender(
        "loop over tokens and weight[i]",
        lambda tokens: _token_by_token(tokens, router, fc1, fc2, problem),
        [router, fc1, fc2],
        tokens=min(TOKENS_OF_THE_INDEXED_LOOP, problem.tokens),
        rounds=2,
    )


def _token_by_token(tokens: Tensor, router: Tensor, ins: Indexed, outs: Indexed, problem: Problem) -> Tensor:
    experts, weights = _route(tokens, router, problem)
    result = []
    for token, numbers, gates in zip(tokens.unbind(), experts.tolist(), weights.unbind(), strict=True):
        parts = (p * _expert(token, ins[e], outs[e]) for e, p in zip(numbers, gates.unbind(), strict=True))
        result.append(sum(parts, start=torch.zeros_like(token)))
    return torch.stack(result)


def indexed_loop(problem: Problem) -> Contender:
    """One expert after the other, its weights taken as weight[i] (FastMoE's second baseline)."""
    router = problem.router.clone().requires_grad_()
    fc1, fc2 = problem.fc1.detach().requires_grad_(), problem.fc2.detach().requires_grad_()

    def forward(tokens: Tensor) -> Tensor:
        experts, weights = _route(tokens, router, problem)
        result = torch.zeros_like(tokens)
        for expert in range(problem.shape.experts):
            rows, choices = torch.where(experts == expert)
            output = _expert(tokens[rows], fc1[expert], fc2[expert])
            result = result.index_add(0, rows, output * weights[rows, choices, None])
        return result

    return Contender("loop over weight[i]", forward, [router, fc1, fc2], rounds=1)


def dense(problem: Problem) -> Contender:
    """A dense SwiGLU layer of the same active products."""
    shape, like = problem.shape, problem.fc1
    width = shape.topk * shape.width
    fc1 = (torch.randn(2 * width, shape.hidden).to(like) * shape.hidden**-0.5).requires_grad_()
    fc2 = (torch.randn(shape.hidden, width).to(like) * width**-0.5).requires_grad_()
    return Contender("dense layer", lambda tokens: _expert(tokens, fc1, fc2), [fc1, fc2], same=False)


def _route(tokens: Tensor, router: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Experts [t, k] and their weights, softmax over all experts; of several over their sum."""
    chosen = F.linear(tokens.float(), router.float()).softmax(-1).topk(problem.shape.topk)
    weights = chosen.values
    if problem.shape.topk > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen.indices, weights.to(tokens.dtype)


def _expert(tokens: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    gate, up = F.linear(tokens, fc1).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, fc2)
