"""Our MoE layer where Megatron-Core's layer specs have theirs."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from torch import Tensor

from megatron_moe.config.schema.moe import MoE
from megatron_moe.config.schema.training import Lora
from megatron_moe.engine.versions import build
from megatron_moe.model.moe.attached import megatron_scale
from megatron_moe.model.moe.dispatch import dispatcher
from megatron_moe.model.moe.dispatch.transfer import TransferTimes
from megatron_moe.model.moe.experts import Experts, ExpertSettings
from megatron_moe.model.moe.filled import filled
from megatron_moe.model.moe.groups import of_megatron
from megatron_moe.model.moe.router import Router


def router_class(moe: MoE, seed: int) -> type[Router]:
    """A router that Megatron-Core's own MoE layer can build, and that gives it dense maps."""

    class DenseRouter(Router):
        def __init__(self, config: Any, pg_collection: Any, **kwargs: Any) -> None:
            super().__init__(moe, config.hidden_size, **_router_arguments(config, pg_collection, seed))
            _mark(self, config)

        def forward(self, hidden: Tensor, marks: Tensor | None = None) -> Any:
            return super().forward(hidden, marks).dense(moe.num_moe_experts)

    return DenseRouter


def experts_class(moe: MoE, lora: Lora | None = None) -> type[Experts]:
    """Our experts, as Megatron-Core's specs build them; with adapters where `lora` says so."""
    adapters = lora if lora is not None and "experts" in lora.targets else None

    class MegatronExperts(Experts):
        def __init__(self, num_local_experts: int, config: Any, pg_collection: Any, **kwargs: Any) -> None:
            modules = config.recompute_modules if config.recompute_granularity == "selective" else ()
            assert moe.moe_expert_activation is not None
            settings = ExpertSettings(
                hidden_size=config.hidden_size,
                ffn_hidden_size=config.moe_ffn_hidden_size,
                activation=moe.moe_expert_activation,
                dropout=moe.moe_expert_dropout,
                has_bias=config.add_bias_linear,
                recompute_activation="moe_act" in modules,
                lora_rank=adapters.rank if adapters else 0,
                lora_scale=(adapters.alpha or 0.0) / adapters.rank if adapters else 1.0,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
            super().__init__(
                num_local_experts, settings, of_megatron(pg_collection, config.sequence_parallel)
            )

        def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
            if moe.overlap_moe_expert_parallel_comm and self.num_local_experts == 1:
                # Its schedule frees what it hands to experts; of several they sort a copy.
                tokens = tokens.clone()
            return super().forward(tokens, tokens_per_expert, probs)

        def _survivors(self, inner: Tensor) -> Tensor | None:
            """Drawn from the state of the experts: the ranks of a tensor-parallel group share the default
            one, and their experts would drop alike."""
            from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name

            if not self.training or not self.settings.dropout:
                return None
            with tensor_parallel.get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                return super()._survivors(inner)

    return MegatronExperts


def layer_class(moe: MoE, seed: int, submodules: Any) -> type[moe_layer.MoELayer]:
    """The class of MoE layers with these settings; Megatron-Core builds it from its specs.

    Args:
        submodules: MoESubmodules, of which `experts` and `shared_experts` are built.
    """

    class MoELayer(moe_layer.MoELayer):
        """Router, experts and shared experts under the names of Megatron-Core's layer, which stand in
        checkpoints; the rest is ours."""

        parts = submodules

        def __init__(self, config: Any, pg_collection: Any = None, **kwargs: Any) -> None:
            groups = pg_collection or get_default_pg_collection()
            moe_layer.BaseMoELayer.__init__(self, config, pg_collection=groups)
            self.router = Router(moe, config.hidden_size, **_router_arguments(config, groups, seed))
            _mark(self.router, config)
            self.transfer_times = TransferTimes()
            self.token_dispatcher: Any = dispatcher(
                moe, self.router.groups, config.hidden_size, config.params_dtype, self.transfer_times
            )
            self.experts = build(submodules.experts, self.num_local_experts, config, pg_collection=groups)
            if self.use_shared_expert:
                self.shared_experts = build(
                    submodules.shared_experts,
                    config=config,
                    pg_collection=groups,
                    gate=moe.moe_shared_expert_gate,
                )
            modules = config.recompute_modules if config.recompute_granularity == "selective" else ()
            self.moe_layer_recompute = "moe" in modules
            self.shared_experts_recompute = "shared_experts" in modules

        def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, None]:
            """Args:
                hidden_states: [s, b, h].
                padding_mask: [b, s], marks of the tokens (see `marks`).

            Returns:
                [s, b, h], and no bias.
            """
            marks = None if padding_mask is None else padding_mask.transpose(0, 1)
            if self.moe_layer_recompute and self.training:
                return tensor_parallel.checkpoint(self._forward, False, hidden_states, marks), None
            return self._forward(hidden_states, marks), None

        def _forward(self, hidden: Tensor, marks: Tensor | None) -> Tensor:
            routing = self.router(hidden, marks)
            tokens, shared = hidden.reshape(-1, hidden.size(-1)), lambda: self._shared(hidden)
            meanwhile = shared if self.use_shared_expert and moe.moe_shared_expert_overlap else None
            experts = filled(self.experts, routing.capacity)
            output = self.token_dispatcher(tokens, routing, experts, meanwhile)
            if self.use_shared_expert and meanwhile is None:
                output = output + shared()
            return output.view_as(hidden)

        def _shared(self, hidden: Tensor) -> Tensor:
            if self.shared_experts_recompute and self.training:
                output = tensor_parallel.checkpoint(self.shared_experts, False, hidden)
            else:
                output = self.shared_experts(hidden)
            return output.reshape(-1, hidden.size(-1))

    return MoELayer


def _router_arguments(config: Any, pg_collection: Any, seed: int) -> dict[str, Any]:
    return {
        "groups": of_megatron(pg_collection, config.sequence_parallel),
        "seed": seed,
        "dtype": config.params_dtype,
    }


def _mark(router: Router, config: Any) -> None:
    """Each tensor-parallel rank routes other tokens, so that gradients are summed over them. Losses are
    scaled as the schedule scales the main one."""
    router.loss_scale = megatron_scale
    for parameter in router.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
