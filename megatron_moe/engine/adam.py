"""Adam with decoupled weight decay on torch's fused kernel, with the state that Megatron-Core's checkpoints
expect.

Megatron-Core's optimizers are written against apex's and Transformer Engine's FusedAdam: state `exp_avg` and
`exp_avg_sq` a parameter, `step` in the parameter group. torch.optim.AdamW keeps `step` a parameter, so that
loading a sharded optimizer state fails with KeyError 'step' (0.16.1 and 0.19.2). This class has the expected
shape, on any device, without apex.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) over `torch._fused_adamw_`, the kernel of
    torch.optim.AdamW(fused=True).

    Args as torch.optim.AdamW; `adam_w_mode` must be true (decoupled decay) and `capturable` false. The
    parameters of a group lie on one device. The moments have the parameters' dtype.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and not capturable, "only decoupled weight decay, outside CUDA graphs, is offered"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            # The count after this update; the kernel reads it once a parameter.
            step = torch.tensor(float(group["step"]), device=params[0].device)
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [step] * len(params),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
