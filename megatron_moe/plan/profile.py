"""What `megatron-moe profile` measured of the pieces of a model on a device: the file, and whether it is
about an experiment.

Times and bytes are those of one microbatch on one rank. They hold for every split into pipeline stages, and
for every number of replicas: what a piece computes depends on neither.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from megatron_moe.config.errors import InputError, not_written
from megatron_moe.config.keys import leaves
from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.origin import shown
from megatron_moe.config.schema import Experiment
from megatron_moe.plan import devices
from megatron_moe.plan.units import Activations, Kind, Times

FILE = "profile.json"
"""Its name in the run folder."""
_FORMAT = 1
_NAMED = 3

_OF_PIECES = ("model.", "moe.")
_BESIDE = (
    "parallel.tensor_model_parallel_size",
    "parallel.context_parallel_size",
    "parallel.expert_model_parallel_size",
    "parallel.expert_tensor_parallel_size",
    "parallel.sequence_parallel",
    "parallel.grad_reduce_in_fp32",
    "recompute.modules",
    "training.micro_batch_size",
    "training.seq_length",
    "training.precision",
    "training.fp8",
    "training.gradient_accumulation_fusion",
)
"""What else the costs of a piece follow from, beside the sections `model` and `moe`."""
_WITHOUT_COST = (
    "model.num_layers",
    "model.max_position_embeddings",
    "model.init_method_std",
    "model.layernorm_epsilon",
    "model.rotary_base",
    "model.mtp_loss_scaling_factor",
    "moe.moe_layer_freq",
    "moe.moe_first_k_dense_layers",
    "moe.moe_expert_init_scale",
    "moe.moe_router_init_scale",
    "moe.moe_router_bias_update_rate",
    "moe.moe_router_logit_normalization_epsilon",
    "moe.moe_aux_loss_coeff",
    "moe.moe_z_loss_coeff",
    "moe.moe_eval_capacity_factor",
    "moe.moe_would_drop_capacity_factor",
)
"""Keys of those two sections that change neither time nor memory of a piece."""


@dataclass(frozen=True)
class Piece:
    """One kind of piece, as measured: see `units.Times` and `units.Activations`."""

    forward_s: float
    backward_s: float
    recompute_s: float
    weight_gradient_s: float
    exposed_s: float
    hidden_s: float
    kept_bytes: float
    kept_if_recomputed_bytes: float
    working_bytes: float


@dataclass(frozen=True)
class Profile:
    """A measurement.

    Attributes:
        settings: dotted key -> value of what the costs of a piece follow from.
        device: name of the GPU or processor.
        on_host: whether that is a processor, which its ranks share.
        ranks: how many computed at once on the machine.
        threads: of each rank, on a processor.
        versions: of Python, torch and Megatron-Core.
        pieces: kind -> measurement.
        optimizer_s: clipping and update of `optimizer_parameters` parameters on one rank.
        optimizer_parameters: what a rank's share of the optimizer holds in the measurement.
    """

    settings: Mapping[str, Any]
    device: str
    on_host: bool
    ranks: int
    threads: int
    versions: Mapping[str, str]
    pieces: Mapping[Kind, Piece]
    optimizer_s: float
    optimizer_parameters: int

    @property
    def kinds(self) -> frozenset[Kind]:
        """What was measured."""
        return frozenset(self.pieces)

    @property
    def source(self) -> str:
        """Where its times come from, for the user to read."""
        ranks = f", {self.ranks} ranks at once" if self.on_host and self.ranks > 1 else ""
        return f"measurements on {self.device}{ranks}"

    @property
    def optimizer_s_per_parameter(self) -> float:
        """Clipping and update, for each parameter of a rank's share of the optimizer."""
        return self.optimizer_s / self.optimizer_parameters

    def times(self, kind: Kind) -> Times:
        piece = self.pieces[kind]
        return Times(**{field.name: getattr(piece, field.name) for field in fields(Times)})

    def activations(self, kind: Kind) -> Activations:
        piece = self.pieces[kind]
        return Activations(piece.kept_bytes, piece.kept_if_recomputed_bytes, piece.working_bytes)

    def write(self, path: Path) -> None:
        """Write the file whole or not at all, and its folder where it is missing.

        Raises InputError, or RunError on a full disk.
        """
        aside = path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n")
            os.replace(aside, path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise not_written(f"{path}: the profile cannot be written", error) from error


def read(path: Path) -> Profile:
    """The profile that `Profile.write` wrote. Raises InputError where it is none."""
    try:
        record = json.loads(path.read_text())
        if record.pop("format") != _FORMAT:
            raise InputError(
                f"{path}: this profile has the format of another version; run `megatron-moe profile` again"
            )
        pieces = {kind: Piece(**piece) for kind, piece in record.pop("pieces").items()}
        if set(pieces) - set(get_args(Kind)):
            raise ValueError
        return Profile(pieces=pieces, **record)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); write it by `megatron-moe profile`"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path}: is no profile, or a torn one; write it again by `megatron-moe profile`"
        ) from error


def profile_of(experiment: Experiment) -> Profile | None:
    """The profile that the planner takes for a filled experiment: `launch.profile`, else the one in its run
    folder, if there is one and it holds for the experiment: the same name may be tried in another layout.

    Raises InputError where `launch.profile` is about another model or device.
    """
    given = experiment.launch.profile
    if given is not None:
        found = read(Path(given))
        check(found, Path(given), experiment)
        return found
    path = path_of(experiment)
    if not path.exists():
        return None
    found = read(path)
    return None if differences(found, experiment) else found


def not_taken(experiment: Experiment) -> str | None:
    """Why the profile in the run folder is not taken, in a sentence; None where none is passed over."""
    path = path_of(experiment)
    if experiment.launch.profile is not None or not path.exists():
        return None
    unlike = differences(read(path), experiment)
    if not unlike:
        return None
    return (
        f"{path} is not taken, it was measured with {', '.join(unlike)}: run `megatron-moe profile` for this "
        "experiment."
    )


def path_of(experiment: Experiment) -> Path:
    """Where `megatron-moe profile` writes unless it is told otherwise."""
    return Path(experiment.logging.root) / experiment.name / FILE


def check(profile: Profile, path: Path, experiment: Experiment) -> None:
    """Raise InputError, one line, where the profile is about another model, layout or device."""
    unlike = differences(profile, experiment)
    if unlike:
        raise InputError(
            f"{path}: this profile was measured with {', '.join(unlike)}: run `megatron-moe profile` for "
            "this experiment, or leave out launch.profile"
        )


def differences(profile: Profile, experiment: Experiment) -> list[str]:
    """In what the profile is about another model, layout or device, in words: `training.seq_length 32
    (here 64)`; none where it holds for the experiment."""
    mine = settings_of(experiment)
    keys = [key for key in {**profile.settings, **mine} if profile.settings.get(key) != mine.get(key)]
    differing = [
        f"{key} {shown(profile.settings.get(key))} (here {shown(mine.get(key))})" for key in keys[:_NAMED]
    ]
    if len(keys) > _NAMED:
        differing.append(f"{len(keys) - _NAMED} more")
    if not keys:
        missing = [kind for kind in _kinds_of(experiment) if kind not in profile.pieces]
        differing += [f"no piece of the kind `{kind}`" for kind in missing]
    if unlike := devices.difference(experiment, profile.device):
        differing.append(f"the device {profile.device} (here {unlike})")
    if profile.on_host and not unlike and (ranks := ranks_at_once(experiment, on_host=True)) != profile.ranks:
        differing.append(f"{profile.ranks} ranks at once (here {ranks})")
    return differing


def settings_of(experiment: Experiment) -> dict[str, Any]:
    """Dotted key -> value of everything that time and memory of a piece on a rank follow from."""
    return {
        key: value
        for key, value in leaves(experiment)
        if key in _BESIDE
        or (
            key.startswith(_OF_PIECES) and not any(f"{key}.".startswith(f"{name}.") for name in _WITHOUT_COST)
        )
    }


def ranks_at_once(experiment: Experiment, on_host: bool) -> int:
    """The ranks that a profile is measured with: those of one pipeline stage of as few replicas as the
    experts need; on a processor, which they share, all that training would start."""
    parallel = experiment.parallel
    stage = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    if on_host:
        return stage * parallel.pipeline_model_parallel_size * (parallel.data_parallel_size or 1)
    expert = (parallel.expert_model_parallel_size or 1) * (parallel.expert_tensor_parallel_size or 1)
    ranks = stage
    while ranks % expert:
        ranks += stage
    return ranks


def _kinds_of(experiment: Experiment) -> list[Kind]:
    layers: list[Kind] = ["moe" if has_experts else "dense" for has_experts in moe_layers(experiment)]
    mtp: list[Kind] = ["mtp"] if experiment.model.mtp_num_layers else []
    return ["embedding", *dict.fromkeys(layers), *mtp, "head"]
