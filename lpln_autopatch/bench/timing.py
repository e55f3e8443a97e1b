"""How every suite measures: what is checked against float64, then timed in turn, in one process.

Nothing else in the benchmark reads a clock.
"""

from __future__ import annotations

import ctypes
import dataclasses
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch

TURN_SECONDS = 0.005
"""About what a turn takes: short against the machine's other business."""


class Progress(Protocol):
    """What the suites use of a tqdm bar."""

    def reset(self, total: float | None = None) -> None: ...
    def update(self, n: float | None = 1) -> bool | None: ...
    def set_description_str(self, desc: str | None = None) -> None: ...


class Quartiles(NamedTuple):
    """The median of several measurements, between the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Those of two values or more."""
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


class WrongResult(Exception):
    """A contender does not do what it is there for, or not as precisely: it is not timed."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A contender that has passed its check, and the times that are taken of it.

    Attributes:
        name: The contender's.
        context: What `call` runs in; entering it is not timed.
        call: What is timed.
        seconds: Of one call, a mean for each round.
    """

    name: str
    context: Callable[[], AbstractContextManager[object]]
    call: Callable[[], object]
    seconds: list[float] = dataclasses.field(default_factory=list)

    def over(self, other: Entry) -> Quartiles:
        """The rounds' own ratios to `other`: what slows a whole round falls out."""
        return Quartiles.of([a / b for a, b in zip(self.seconds, other.seconds, strict=True)])


Clock = Callable[[Callable[[], object], torch.device], float]


def device_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds from the start of `run` to the end of all that it launched.

    By CUDA events where there are any: the host's time is hidden as long as it is ahead.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - start
    cuda: Any = torch.cuda
    first, last = (cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    milliseconds: float = first.elapsed_time(last)
    return milliseconds / 1e3


def host_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that `run` keeps the host busy, whatever the device has still to do."""
    start = time.perf_counter()
    run()
    elapsed = time.perf_counter() - start
    synchronize(device)
    return elapsed


def synchronize(device: torch.device) -> None:
    """Wait until `device` has nothing left to do."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def interleave(
    entries: Sequence[Entry], clock: Clock, device: torch.device, rounds: int, progress: Progress
) -> None:
    """Time `entries` in turn, `rounds` times, into their `seconds`.

    Each round has an order of its own, the same in every run: what an entry leaves in caches and
    allocators meets every other. In each turn one call goes before the clock starts.
    """

    def turn(entry: Entry, calls: int) -> float:
        def run() -> None:
            for _ in range(calls):
                entry.call()

        with entry.context():
            entry.call()
            synchronize(device)
            return clock(run, device) / calls

    calls = max(1, int(TURN_SECONDS / max(turn(entry, 1) for entry in entries)))
    shuffled = random.Random(0)
    for _ in range(rounds):
        for entry in shuffled.sample(entries, len(entries)):
            entry.seconds.append(turn(entry, calls))
        progress.update()


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """`call`, captured in a CUDA graph: what is then timed is the device alone."""
    # Capture needs what the first calls allocate and load to be there, from a side stream.
    cuda: Any = torch.cuda
    stream = cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        for _ in range(3):
            call()
    cuda.current_stream().wait_stream(stream)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        call()
    replay: Callable[[], object] = graph.replay
    return replay


def kernels(call: Callable[[], object], device: torch.device) -> int:
    """Kernels, copies and fills that one `call` launches on an accelerator."""
    call()
    synchronize(device)
    with torch.profiler.profile() as profile:
        call()
        synchronize(device)
    return sum("CPU" not in str(event.device_type) for event in profile.events() or ())


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((value.detach().double() - exact).norm() / exact.norm())


def require(errors: dict[str, float], limits: dict[str, float]) -> None:
    """Refuse a contender one of whose relative errors is at its limit or above, or NaN.

    Raises:
        WrongResult: which error, and its limit.
    """
    for name, error in errors.items():
        if not error < limits[name]:
            raise WrongResult(f"error of {name} {error:.2g}, allowed {limits[name]:.2g}")


def keep_freed_memory() -> None:
    """Have glibc reuse large blocks: a page fault for every 4 KiB would hide the difference."""
    m_trim_threshold, m_mmap_max = -1, -4
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
