#!/usr/bin/env python
"""How much of the tokens' way to their experts is hidden behind computation, over a slowed link.

    sudo python tools/benchmark_overlap.py            # Linux, as root: two network namespaces and tc
    python tools/benchmark_overlap.py --rate none     # over this machine's own loopback, by anybody

Two ranks, each in a network namespace of its own, are joined by a virtual cable whose rate `tc` limits (token
bucket filter). Each rank runs our MoE dispatcher and experts forward and backward, in 1, 2, .. parts. Before
that the computation alone is timed, with an exchange that hands every rank its own rows, and the exchange
alone, with experts that compute nothing. What could be hidden is the smaller of the two; what is hidden is
what one part takes longer than several, and, independent of how fast the processors are at the moment, what
the ranks wait less for transfers than with one part.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

SIDES = (("moe-a", "moe-va", "10.77.0.1"), ("moe-b", "moe-vb", "10.77.0.2"))
"""Namespace, its end of the cable, and its address."""
PORT = 29631


def main() -> int:
    options = _options()
    if options.rank is not None:
        _measure(options)
        return 0
    slowed = options.rate != "none"
    if slowed and (os.geteuid() != 0 or not shutil.which("tc") or not shutil.which("ip")):
        print(
            "needs root, ip and tc to slow a link; --rate none takes the loopback as it is", file=sys.stderr
        )
        return 2
    if slowed:
        _cable(options.rate)
    try:
        return _run(slowed)
    finally:
        if slowed:
            _cut()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", default="200mbit", help="of the link, as tc writes it, or none")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--topk", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024, help="inner width of an expert")
    parser.add_argument("--tokens", type=int, default=2048, help="of each rank")
    parser.add_argument("--degrees", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _cable(rate: str) -> None:
    """Two namespaces, joined by a cable of this rate."""
    _cut()
    for name, *_ in SIDES:
        _ip("netns", "add", name)
    _ip("link", "add", SIDES[0][1], "type", "veth", "peer", "name", SIDES[1][1])
    for name, end, address in SIDES:
        _ip("link", "set", end, "netns", name)
        inside = ["ip", "netns", "exec", name]
        for command in (
            ["ip", "addr", "add", f"{address}/24", "dev", end],
            ["ip", "link", "set", end, "up"],
            ["ip", "link", "set", "lo", "up"],
            f"tc qdisc add dev {end} root tbf rate {rate} burst 32kbit latency 50ms".split(),
        ):
            subprocess.run(inside + command, check=True)


def _cut() -> None:
    """Take them away, if they are there."""
    for name, *_ in SIDES:
        subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _run(slowed: bool) -> int:
    """Both ranks; rank 0 prints."""
    processes = []
    for rank, (name, end, _) in enumerate(SIDES):
        inside = ["ip", "netns", "exec", name] if slowed else []
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": SIDES[0][2] if slowed else "127.0.0.1",
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": end if slowed else "lo",
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        command = [*inside, sys.executable, *sys.argv, "--rank", str(rank)]
        processes.append(subprocess.Popen(command, env=os.environ | environment))
    try:
        return max(process.wait() for process in processes)
    finally:
        for process in processes:
            process.kill()


def _measure(options: argparse.Namespace) -> None:
    """One rank: everything in turns, and medians of it on rank 0."""
    import torch
    import torch.distributed as dist

    from megatron_moe.model.moe.dispatch.alltoall import AllToAll
    from megatron_moe.model.moe.dispatch.exchange import Pending, start
    from megatron_moe.model.moe.dispatch.transfer import TransferTimes
    from megatron_moe.model.moe.experts import Experts, ExpertSettings
    from megatron_moe.model.moe.groups import MoEGroups

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group, times = dist.group.WORLD, TransferTimes()
    times.on = True
    groups = MoEGroups(expert=group, expert_ranks=group)
    torch.manual_seed(0)
    experts = Experts(options.experts // 2, ExpertSettings(options.hidden, options.width), groups)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.randn(options.tokens, options.hidden, requires_grad=True)
    over_link = partial(start, group=group, times=times)
    step = partial(_step, tokens, _even_routing(options))

    def nothing(rows: Any, counts: Any, weights: Any) -> Any:
        return rows * weights.unsqueeze(-1), None

    def stays(rows: Any, send: Any, receive: Any) -> Any:
        return Pending(rows, None)

    whole = AllToAll(options.experts, groups, over_link)
    cases: dict[str, Callable[[], None]] = {
        "computation alone": partial(step, AllToAll(options.experts, groups, stays), experts),
        "exchange alone": partial(step, whole, nothing),
        "1 part": partial(step, whole, experts),
    }
    for degree in options.degrees:
        dispatch = AllToAll(options.experts, groups, over_link, degree)
        cases[f"{degree} parts"] = partial(step, dispatch, experts)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    waited: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(options.repeats + 1):
        for name, case in cases.items():
            dist.barrier()
            times.take()
            began = time.perf_counter()
            case()
            dist.barrier()
            if repeat:  # the first time warms up
                seconds[name].append(time.perf_counter() - began)
                waited[name].append(times.take()[1])
    if dist.get_rank() == 0:
        _print(options, seconds, waited)
    dist.destroy_process_group()


def _even_routing(options: argparse.Namespace) -> Any:
    """As many rows for every expert, so that an exchange can be left out."""
    import torch

    from megatron_moe.model.moe.routing import Routing

    count = options.tokens * options.topk
    experts = torch.arange(count).view(options.tokens, options.topk) % options.experts
    return Routing(experts, torch.full(experts.shape, 0.5, requires_grad=True))


def _step(tokens: Any, routing: Any, dispatch: Any, experts: Any) -> None:
    dispatch(tokens, routing, experts).sum().backward()


def _print(
    options: argparse.Namespace, seconds: dict[str, list[float]], waited: dict[str, list[float]]
) -> None:
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    hideable = min(middle["computation alone"], middle["exchange alone"])
    print(json.dumps({key: value for key, value in vars(options).items() if key != "rank"}))
    print("| forward + backward | ms, median (smallest to largest) | waited, ms | saved | waited less |")
    print("| --- | --- | --- | --- | --- |")
    wait_of_one = statistics.median(waited["1 part"])
    for name, values in seconds.items():
        of_them = [f"{1000 * number:,.0f}" for number in (middle[name], min(values), max(values))]
        wait = statistics.median(waited[name])
        shares = "- | -"
        if name.endswith("parts"):
            shares = f"{(middle['1 part'] - middle[name]) / hideable:.0%} | {1 - wait / wait_of_one:.0%}"
        print(f"| {name} | {of_them[0]} ({of_them[1]} to {of_them[2]}) | {1000 * wait:,.0f} | {shares} |")
    print("saved: of what could be hidden, the smaller of computation and exchange alone")


if __name__ == "__main__":
    sys.exit(main())
