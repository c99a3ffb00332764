"""The command `upcycle`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_moe.cli.arguments import PROGRAM, Commands, command, positive_float, positive_int


def add_upcycle(commands: Commands) -> None:
    parser = command(
        commands,
        "upcycle",
        _upcycle,
        "make a mixture of experts of a dense model",
        "Make every expert a copy of the dense feed-forward layer, or with --granularity G\n"
        "a G-th of it, so that the mixture computes at first what the dense model does.\n"
        "DENSE is a Hugging Face folder, a checkpoint or a run. Keys of the mixture can be\n"
        "set behind, such as moe.moe_layer_freq=2 or moe.moe_aux_loss_coeff=0.001.\n\n"
        "--advise says whether to, by the compute of both trainings, and writes nothing.",
        f"{PROGRAM} upcycle my-dense-model checkpoints/mixture --experts 8 --top-k 2",
    )
    add = parser.add_argument
    add("source", metavar="DENSE", type=Path, help="the dense model")
    add("out", metavar="OUT", type=Path, nargs="?", help="the checkpoint folder to make")
    add("overrides", metavar="moe.key=value", nargs="*", default=[], help="set a key of the mixture")
    add("--experts", metavar="N", type=positive_int, required=True, help="experts in each layer")
    add(
        "--granularity",
        metavar="G",
        type=positive_int,
        default=1,
        help="parts that a dense layer is cut into; N counts parts (default: %(default)s)",
    )
    add(
        "--top-k",
        metavar="K",
        type=positive_int,
        help="experts that each token passes, a multiple of G (default: 2 G)",
    )
    add(
        "--router-std",
        metavar="X",
        type=_fraction,
        help="deviation of the router's first weights (default: 0.02; 0 with moe_router_pre_softmax)",
    )
    add(
        "--noise",
        metavar="X",
        type=_fraction,
        default=0.0,
        help="noise on each expert, as a part of the size of its weights (default: none)",
    )
    add(
        "--reinitialize",
        metavar="R",
        type=_fraction,
        default=0.0,
        help="part of each expert's inner neurons to draw anew, from 0 to 1 (default: none)",
    )
    add("--seed", metavar="N", type=int, default=1234, help="of what is drawn (default: %(default)s)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="precision of the weights (default: as they are)")
    add("--workers", metavar="N", type=positive_int, help="processes to use (default: by the model's size)")
    add("--advise", action="store_true", help="say whether to upcycle or to train from scratch, only")
    add("--dense-tokens", metavar="T", type=positive_float, help="tokens DENSE was trained on, such as 2e12")
    add("--moe-tokens", metavar="T", type=positive_float, help="tokens the mixture can be trained on")


def _upcycle(args: argparse.Namespace) -> int:
    from megatron_moe.config.errors import InputError
    from megatron_moe.convert.upcycle import advise, upcycle_model
    from megatron_moe.convert.upcycling_rules import Changes

    if args.out is not None and "=" in args.out.name:  # an override in its place
        args.overrides, args.out = [str(args.out), *args.overrides], None
    sizes = {"experts": args.experts, "granularity": args.granularity, "top_k": args.top_k}
    if args.advise:
        if args.dense_tokens is None or args.moe_tokens is None:
            raise InputError("--advise: needs --dense-tokens and --moe-tokens, such as 2e12 and 1e11")
        advise(
            args.source,
            **sizes,
            dense_tokens=args.dense_tokens,
            moe_tokens=args.moe_tokens,
            overrides=args.overrides,
        )
        return 0
    if args.out is None:
        raise InputError("OUT: name the checkpoint folder to make, or ask with --advise")
    is_even = "moe.moe_router_pre_softmax=true" in args.overrides
    router_std = args.router_std if args.router_std is not None else 0.0 if is_even else 0.02
    changes = Changes(router_std, args.noise, args.reinitialize, args.seed)
    upcycle_model(
        args.source,
        args.out,
        **sizes,
        changes=changes,
        overrides=args.overrides,
        dtype=args.dtype,
        workers=args.workers,
    )
    return 0


def _fraction(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, not {text}")
    return number
