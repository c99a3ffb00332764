"""What `plan` says of speed: what an iteration is made of, how fast the run is, how long it takes, why."""

from __future__ import annotations

from textwrap import wrap

from rich.console import Console
from rich.markup import escape

from megatron_moe.config.schema import Experiment
from megatron_moe.plan import batch_ramp, devices
from megatron_moe.plan.costs.parameters import FORMULA
from megatron_moe.plan.plan import Plan
from megatron_moe.plan.profile import not_taken
from megatron_moe.plan.schedules.long_iterations import SIMULATED_WHOLE
from megatron_moe.plan.show.tables import print_table
from megatron_moe.plan.wording import SECONDS, count, duration, flops, in_one_unit, number, percent, plural

_ALWAYS_SHOWN = ("pipeline", "iteration")


def print_forecast(console: Console, experiment: Experiment, plan: Plan) -> None:
    """The prediction for the run."""
    console.print(f"[bold]Forecast[/], times from {escape(plan.forecast.source)}")
    if passed_over := not_taken(experiment):
        console.print(passed_over, markup=False)
    _print_iteration(console, plan)
    _print_speed(console, experiment, plan)
    console.print("[bold]What limits it[/]")
    for sentence in plan.forecast.limits:
        lines = wrap(sentence, console.width - 1, initial_indent="- ", subsequent_indent="  ")
        console.print("\n".join(lines), markup=False)


def _print_iteration(console: Console, plan: Plan) -> None:
    """Where the time of an iteration goes; parts of the pipeline's time are set in."""
    forecast = plan.forecast
    hidden = f"; {duration(forecast.hidden_all_to_all_s)} more hidden" if forecast.hidden_all_to_all_s else ""
    parts = {
        "pipeline": (forecast.pipeline_s, "first forward to last backward pass"),
        "  idle": (forecast.bubble * forecast.pipeline_s, "of a rank, the mean (bubble)"),
        "  exposed all-to-all": (forecast.exposed_all_to_all_s, f"of the rank with most{hidden}"),
        "gradients": (forecast.gradient_s, "reduce and gather, not hidden"),
        "optimizer": (forecast.optimizer_s, ""),
        "iteration": (forecast.iteration_s, ""),
    }
    shown = {name: part for name, part in parts.items() if part[0] > 0 or name in _ALWAYS_SHOWN}
    unit, seconds = in_one_unit([forecast.iteration_s], SECONDS, digits=4)
    columns = {
        "an iteration": list(shown),
        unit: [seconds(time) for time, _ in shown.values()],
        "share": [percent(time / forecast.iteration_s) for time, _ in shown.values()],
        "": [words for _, words in shown.values()],
    }
    print_table(console, columns, left=["an iteration", ""])
    if plan.num_microbatches > SIMULATED_WHOLE:
        console.print(
            f"Of {plan.num_microbatches:,} microbatches the first and the last ones are simulated; those "
            "between repeat them at a steady pace.\n"
        )


def _print_speed(console: Console, experiment: Experiment, plan: Plan) -> None:
    forecast, training = plan.forecast, experiment.training
    ranks = plan.layout.world_size
    sequences, length, iterations = training.global_batch_size, training.seq_length, training.train_iters
    speed = forecast.tokens_per_second_per_gpu
    device = devices.noun(experiment)
    together = f", {count(speed * ranks)} on all {ranks:,}" if ranks > 1 else ""
    console.print(f"Speed   {number(speed)} tokens/s/{device}{together}")
    tflops = f"{number(forecast.tflops_per_gpu)} TFLOP/s/{device}"
    if forecast.mfu is None:
        console.print(f"MFU     not known without launch.cluster.peak_tflops; {tflops}")
    else:
        peak = number(forecast.tflops_per_gpu / forecast.mfu)
        console.print(f"MFU     {percent(forecast.mfu)}: {tflops} of {peak}")
    samples = batch_ramp.samples(training)
    factors = f"{plural(iterations, 'iteration')} x {sequences:,} x {length:,}"
    if training.rampup_batch_size is not None:
        factors = f"{plural(iterations, 'iteration')} of at most {sequences:,} x {length:,}"
    console.print(
        f"Budget  {count(float(samples) * length)} tokens = {factors}: {duration(forecast.days * 86400)}\n"
    )
    operations = flops(forecast.model_flops_per_token)
    console.print(f"MFU = tokens/s/{device} x FLOPs a token / peak. A token takes {operations}: {FORMULA}.\n")
