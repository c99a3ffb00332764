"""Measure one MoE layer, forward and backward, against other people's, baselines and the floor.

All take turns in one process (with --ranks in one a rank), round by round, with the same weights on the same
tokens; before that, what they compute is compared. The floor is the larger of the time of a dense layer with
as many products and the time to move the bytes that must move, at the bandwidth of a copy measured in the
same rounds. Peers that are not installed are named and left out.

On a machine with a GPU it measures there, in bf16, unless --device says otherwise.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from moe_peers import baselines, hugging_face, megatron_core, ours, tutel_layer
from moe_peers.contender import ON_A_CPU, ON_A_GPU, Contender, Maker, Missing, Problem, Shape
from torch import Tensor

from megatron_moe.engine.device import Device, start
from megatron_moe.engine.groups import initialize_process_group, shutdown

COLUMNS = (
    "contender",
    "median, ms",
    "fastest, ms",
    "over ours",
    "of the floor's speed",
    "processor time, ms",
    "over ours",
    "of the floor's speed",
)
EXAMPLES = """examples:
  python tools/benchmark_moe.py --shape 64,8,512,256,4096 --rounds 5
  python tools/benchmark_moe.py --shape 64,8,512,256,4096 --precision bf16 --without-loops
  python tools/benchmark_moe.py --shape 64,1,512,1024,4096 --ranks 2
"""
COPIED_BYTES = 1 << 28
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shape",
        action="append",
        metavar="E,K,H,F,T",
        help="experts, top-k, hidden size, expert size, tokens; may be repeated (default: those of the docs)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default: 5)")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the experts (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where it is there")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32 on a CPU, else bf16")
    parser.add_argument("--without-loops", action="store_true", help="leave out the slow baselines")
    args = parser.parse_args(argv)
    if "RANK" not in os.environ:
        return _launch(args.ranks, list(argv if argv is not None else sys.argv[1:]), args.device)
    _measure(args)
    return 0


def _launch(ranks: int, argv: list[str], device: str | None) -> int:
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run([*command, str(Path(__file__)), *argv], env=environment).returncode


def _measure(args: argparse.Namespace) -> None:
    device = start(int(os.environ["LOCAL_RANK"]))
    initialize_process_group(device, timeout_s=600)
    on_gpu = not device.is_host
    dtype = torch.bfloat16 if (args.precision or ("bf16" if on_gpu else "fp32")) == "bf16" else torch.float32
    _say(
        f"{device.torch_device if device.is_host else torch.cuda.get_device_name()}, {args.ranks} rank(s), "
        f"{torch.get_num_threads()} thread(s) each, {str(dtype).removeprefix('torch.')}; "
        f"Python {platform.python_version()}, torch {torch.__version__}; {args.rounds} rounds; load average "
        f"{os.getloadavg()[0]:.1f} at the start"
    )
    for text in args.shape or (ON_A_GPU if on_gpu else ON_A_CPU):
        problem = Problem.draw(Shape.parse(text), dtype, device.torch_device, dist.get_rank(), args.ranks)
        _say(f"\n(experts, top-k, hidden, expert size, tokens) = {problem.shape}\n")
        table(problem, device, args.rounds, not args.without_loops)
    shutdown()


def table(problem: Problem, device: Device, rounds: int, with_loops: bool) -> list[list[str]]:
    """Print and return the rows of one shape."""
    contenders = _contenders(problem, device, with_loops)
    torch.manual_seed(1 + problem.rank)
    tokens = torch.randn(problem.tokens, problem.shape.hidden).to(problem.fc1)
    _compare(contenders, tokens, problem)
    clock, processor = _in_turns(contenders, tokens, problem, device, rounds)
    moved = problem.shape.moved_bytes(problem.fc1.element_size()) / problem.ranks
    first = contenders[0].name
    by_clock, by_processor = (_figures(seconds, first, moved) for seconds in (clock, processor))
    rows = []
    for name in by_clock:
        middle, fastest, *ratios = by_clock[name]
        rows.append([name, middle, fastest, *ratios, by_processor[name][0], *by_processor[name][2:]])
    for row in ([*COLUMNS], ["---"] * len(COLUMNS), *rows):
        _say("| " + " | ".join(row) + " |")
    tflops = problem.shape.flops / problem.ranks / min(clock[first]) / 1e12
    bandwidth = 2 * COPIED_BYTES / min(clock["copy"])
    _say(
        f"\nThe floor: the dense layer, or moving {moved / 1e6:.0f} MB in {moved / bandwidth * 1e3:.0f} ms "
        f"({bandwidth / 1e9:.1f} GB/s) where that is longer. Ours at its fastest: {tflops:.3f} TFLOP/s."
    )
    if not device.is_host:
        _say(_gpu_line(contenders[0], tokens, tflops))
    return rows


def _figures(seconds: dict[str, list[float]], first: str, moved_bytes: float) -> dict[str, list[str]]:
    """Name -> median and fastest in ms, and medians of ratios within a round: to the time of `first`, and the
    floor's time to its own."""
    copies, denses = seconds["copy"], seconds["dense layer"]
    floors = [
        max(dense, copy * moved_bytes / (2 * COPIED_BYTES))
        for dense, copy in zip(denses, copies, strict=True)
    ]
    figures = {}
    for name, own in seconds.items():
        if name == "copy":
            continue
        over = median(x / y for x, y in zip(own, seconds[first], strict=False))
        share = median(floor / x for floor, x in zip(floors, own, strict=False))
        figures[name] = [f"{median(own) * 1e3:.0f}", f"{min(own) * 1e3:.0f}", f"{over:.2f}", f"{share:.2f}"]
    return figures


def _contenders(problem: Problem, device: Device, with_loops: bool) -> list[Contender]:
    makers: list[Maker] = ours.spread(problem.ranks) if problem.ranks > 1 else [ours.alone, ours.into_buffer]
    if problem.ranks == 1 and not device.is_host:
        makers.append(ours.looped)
    makers += [megatron_core.layer, tutel_layer.layer]
    if problem.ranks == 1:
        makers += hugging_face.MAKERS
        if with_loops:
            makers += [baselines.token_loop, baselines.indexed_token_loop, baselines.indexed_loop]
    made = []
    for maker in [*makers, baselines.dense]:
        try:
            made.append(maker(problem))
        except Missing as reason:
            _say(f"Left out: {reason}.")
    return made


@torch.no_grad()
def _compare(contenders: list[Contender], tokens: Tensor, problem: Problem) -> None:
    """Stop where a contender computes something else than the formula."""
    few = tokens[: min(len(tokens), 32)]
    expected = baselines.token_loop(problem).forward(few).float()
    for contender in contenders:
        if not contender.same:
            continue
        found = contender.forward(few).float()
        contender.clean()
        error = float((found - expected).norm() / expected.norm())
        # Where a rounded logit chooses another expert, a bf16 token is another one.
        if error > TOLERANCE[tokens.dtype]:
            raise SystemExit(f"{contender.name} computes something else: relative error {error:.1e}")


Seconds = dict[str, list[float]]


def _in_turns(
    contenders: list[Contender], tokens: Tensor, problem: Problem, device: Device, rounds: int
) -> tuple[Seconds, Seconds]:
    """Seconds of each contender and of a copy in each round but the first, which warms up: by the clock, and
    of processor time of this rank."""
    upstream = torch.randn_like(tokens)
    clock: Seconds = {name: [] for name in (*(contender.name for contender in contenders), "copy")}
    processor: Seconds = {name: [] for name in clock}
    source = torch.ones(COPIED_BYTES // 4, device=tokens.device)
    target = torch.zeros_like(source)

    def note(name: str, took: tuple[float, float]) -> None:
        clock[name].append(took[0])
        processor[name].append(took[1])

    for number in range(rounds + 1):
        begin = number % len(contenders)
        for contender in contenders[begin:] + contenders[:begin]:
            limit = contender.rounds
            if limit is not None and not 0 < number <= limit:
                continue
            took = _turn(contender, tokens, upstream, device)
            if number:
                note(contender.name, took)
        took = _timed(lambda: target.copy_(source), device)
        if number:
            note("copy", took)
    return clock, processor


def _turn(contender: Contender, tokens: Tensor, upstream: Tensor, device: Device) -> tuple[float, float]:
    count = contender.tokens or len(tokens)
    given = tokens[:count].clone().requires_grad_()
    took = _timed(lambda: contender.forward(given).backward(upstream[:count]), device)
    for parameter in contender.parameters:
        parameter.grad = None
    contender.clean()
    return took[0] * len(tokens) / count, took[1] * len(tokens) / count


def _timed(work: Callable[[], object], device: Device) -> tuple[float, float]:
    """Seconds by the clock until all ranks are done, and of processor time of this rank."""
    dist.barrier()
    device.synchronize()
    started, processor_started = time.perf_counter(), time.process_time()
    work()
    device.synchronize()
    processor_s = time.process_time() - processor_started
    dist.barrier()
    return time.perf_counter() - started, processor_s


def _gpu_line(contender: Contender, tokens: Tensor, tflops: float) -> str:
    """The measured rate of one large product, and how often the host waited for the GPU."""
    size = 8192
    left = torch.randn(size, size, device=tokens.device, dtype=tokens.dtype)
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        left @ left
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    rate = 2 * size**3 / min(times) / 1e12
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        contender.forward(tokens.clone().requires_grad_()).sum().backward()
    torch.cuda.set_sync_debug_mode("default")
    contender.clean()
    waits = sum("synchroniz" in str(warning.message) for warning in caught)
    return (
        f"One product of {size} x {size}: {rate:.0f} TFLOP/s, of which ours reaches {tflops / rate:.2f}. "
        f"The host waited {waits} times for the GPU in a forward and backward pass."
    )


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
