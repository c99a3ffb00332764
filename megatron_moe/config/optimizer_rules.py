"""Rules about the learning rates, their schedule, and the growing batch."""

from __future__ import annotations

from megatron_moe.config.defaults import nearest_multiples
from megatron_moe.config.learning_rates import main_rates, own_rates
from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import DP, PP, VPP, Problems, set_value
from megatron_moe.config.schema import Experiment

_STYLE = "optimizer.lr_decay_style"
_RAMP = "training.rampup_batch_size"


def warmup_said_once(e: Experiment) -> Problems:
    """Iterations and fraction say the same thing; both may stand there only if they agree."""
    o, keys = e.optimizer, ("optimizer.lr_warmup_iters", "optimizer.lr_warmup_fraction")
    if o.lr_warmup_fraction is not None:
        by_fraction = round(o.lr_warmup_fraction * set_value(o.lr_decay_iters))
        if o.lr_warmup_iters != by_fraction:
            yield Problem(
                keys, f"disagrees with {keys[1]}, which means {by_fraction} iterations", "keep one of the two"
            )


def warmup_within_decay(e: Experiment) -> Problems:
    """The warm-up is a part of the decay."""
    keys = ("optimizer.lr_warmup_iters", "optimizer.lr_decay_iters")
    decay = set_value(e.optimizer.lr_decay_iters)
    # Of inverse-square-root another rule says how long it may be.
    if e.optimizer.lr_decay_style != "inverse-square-root" and set_value(e.optimizer.lr_warmup_iters) > decay:
        yield Problem(
            keys,
            "is more than optimizer.lr_decay_iters",
            f"use at most {decay}, or a lr_warmup_fraction of 0.1",
        )


def inverse_root_needs_warmup(e: Experiment) -> Problems:
    """lr x sqrt(warm-up / iteration) is 0 without a warm-up."""
    warmup, decay = set_value(e.optimizer.lr_warmup_iters), set_value(e.optimizer.lr_decay_iters)
    if e.optimizer.lr_decay_style == "inverse-square-root" and not 0 < warmup < decay:
        if decay == 1:
            yield Problem(
                (_STYLE,), "needs a warm-up and at least 2 iterations", "use cosine, or train longer"
            )
            return
        keys = ("optimizer.lr_warmup_iters", _STYLE, "optimizer.lr_decay_iters")
        text = f"leaves no decay: under {_STYLE} it must be above 0 and below optimizer.lr_decay_iters"
        yield Problem(keys, text, f"for example {max(1, decay // 10)}")


def wsd_keys_need_wsd(e: Experiment) -> Problems:
    """What shapes the final decay is for the style that has one."""
    o = e.optimizer
    if o.lr_decay_style == "WSD":
        return
    for key, is_set in (
        ("optimizer.lr_wsd_decay_iters", o.lr_wsd_decay_iters is not None),
        ("optimizer.lr_wsd_decay_style", o.lr_wsd_decay_style != "exponential"),
    ):
        if is_set:
            yield Problem(
                (key, _STYLE), f"has no effect under {_STYLE}", f"set {_STYLE} to WSD, or leave it out"
            )


def wsd_decay_after_warmup(e: Experiment) -> Problems:
    """The final decay begins when the warm-up is over."""
    o = e.optimizer
    if o.lr_decay_style != "WSD":
        return
    room = set_value(o.lr_decay_iters) - set_value(o.lr_warmup_iters)
    if set_value(o.lr_wsd_decay_iters) > room:
        keys = ("optimizer.lr_wsd_decay_iters", "optimizer.lr_decay_iters", "optimizer.lr_warmup_iters")
        text = f"is more than the {room} iterations of {keys[1]} that {keys[2]} leaves"
        yield Problem(keys, text, f"use at most {room}" if room else "use a shorter warm-up")


def min_lr_below_lr(e: Experiment) -> Problems:
    """The learning rates decay downwards."""
    names = {"embedding": ("decoupled_min_lr", "decoupled_lr"), "experts": ("expert_min_lr", "expert_lr")}
    main = main_rates(e.optimizer)
    if main.least > main.peak:
        keys = ("optimizer.min_lr", "optimizer.lr")
        yield Problem(keys, "is more than optimizer.lr", f"use at most {main.peak:g}")
        return
    for name, rates in own_rates(e.optimizer).items():
        if rates.least > rates.peak:
            given = [n if getattr(e.optimizer, n) is not None else n.split("_", 1)[1] for n in names[name]]
            least, peak = (f"optimizer.{key}" for key in given)
            advice = f"use at most {rates.peak:g}"
            if given[0] == "min_lr":
                advice = f"set optimizer.{names[name][0]} to at most {rates.peak:g}"
            yield Problem((least, peak), f"is more than {peak}", advice)


def expert_rates_need_experts(e: Experiment) -> Problems:
    """A dense model has no expert to train at another rate."""
    for name in ("expert_lr", "expert_min_lr"):
        if e.moe is None and getattr(e.optimizer, name) is not None:
            text = "is for experts, and there is no section moe"
            yield Problem((f"optimizer.{name}", "moe"), text, "leave it out, or add moe.num_moe_experts")


def ramp_reaches_batch(e: Experiment) -> Problems:
    """The batch grows in whole increments up to the global batch."""
    if e.training.rampup_batch_size is None:
        return
    start, increment, _ = e.training.rampup_batch_size
    whole, keys = e.training.global_batch_size, (_RAMP, "training.global_batch_size")
    if start >= whole:
        yield Problem(keys, f"starts with {start}, which is not below {keys[1]}", "leave it out")
    elif (whole - start) % increment:
        remainder = (whole - start) % increment
        starts = [value for value in (start + remainder, start + remainder - increment) if 0 < value < whole]
        advice = f"start with {' or '.join(map(str, starts))}" if starts else "use another increment"
        text = f"never comes to {keys[1]} by increments of {increment} from {start}"
        yield Problem(keys, text, advice)


def ramp_over_replicas(e: Experiment) -> Problems:
    """Each batch on the way is a whole number of microbatches on every replica; the interleaved schedule
    takes them PP at a time."""
    if e.training.rampup_batch_size is None:
        return
    start, increment, _ = e.training.rampup_batch_size
    unit = e.training.micro_batch_size * set_value(e.parallel.data_parallel_size)
    keys: tuple[str, ...] = (_RAMP, "training.micro_batch_size", DP)
    product = f"training.micro_batch_size times {DP}"
    if set_value(e.parallel.virtual_pipeline_model_parallel_size) > 1:
        unit *= e.parallel.pipeline_model_parallel_size
        keys, product = (*keys, PP, VPP), f"{product} times {PP} under {VPP}"
    for what, value in (("a start", start), ("an increment", increment)):
        if value % unit:
            text = f"has {what} that is not divisible by {product}, {unit}"
            yield Problem(keys, text, f"use {what} of {nearest_multiples(value, unit)}")
