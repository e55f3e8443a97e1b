"""Contenders timed in turn, in one process; and the progress of a suite."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from lpln_autopatch.bench.results import Quartiles

TURN_SECONDS, TURN_SECONDS_OF_A_GPU = 0.005, 0.05
"""The length of a turn, about: short against the machine's other business.

It is longer on a GPU, which begins when the host has launched the first call.
"""


class Progress:
    """The progress of a suite: a bar where stderr is a terminal, elsewhere a line for each case."""

    def __init__(self, suite: str) -> None:
        from tqdm import tqdm

        self.suite, self.bar = suite, tqdm(unit="step", leave=False, disable=None)
        self.update, self.close = self.bar.update, self.bar.close

    def expect(self, cases: int, steps: int) -> None:
        """Expect so many cases, and so many calls of `update`."""
        self.cases, self.begun = cases, 0
        self.bar.reset(steps)

    def case(self, *aspects: object) -> None:
        """Begin the next case."""
        self.begun += 1
        name = ", ".join(map(str, [self.suite, *aspects]))
        self.bar.set_description_str(name)
        if self.bar.disable:
            print(f"{name} ({self.begun} of {self.cases})", file=sys.stderr)

    def step(self, name: str) -> None:
        """Begin a step of the case, which the bar names."""
        self.bar.set_postfix_str(name)
        self.bar.update()


@dataclasses.dataclass(frozen=True)
class Entry:
    """A contender that has passed its check, and the times that are taken of it."""

    name: str
    context: Callable[[], AbstractContextManager[object]]  # entering it is not timed
    call: Callable[[], object]  # what is timed
    seconds: list[float] = dataclasses.field(default_factory=list)  # of a call, for each round

    def over(self, other: Entry) -> Quartiles:
        """Return the quartiles of the rounds' own ratios: a slow round slows both."""
        ratios = [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]
        return Quartiles(*statistics.quantiles(ratios, n=4, method="inclusive"))


def synchronize(device: torch.device) -> None:
    """Wait until `device` has nothing left to do."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def interleave(
    entries: Sequence[Entry], device: torch.device, rounds: int, progress: Progress
) -> None:
    """Time `entries` in turn, `rounds` times, into their `seconds`.

    Each round has an order of its own, the same in every run: what an entry leaves in caches and
    allocators meets every other. In each turn one call goes before the clock starts, and the clock
    stops when `device` has done all that the turn launched. On one thread of a CPU the clock is
    the thread's own, which other processes do not make longer.
    """
    on_one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    is_fine = time.get_clock_info("thread_time").resolution < 1e-6  # on Windows 16 ms
    clock = time.thread_time if on_one_thread and is_fine else time.perf_counter

    def turn(entry: Entry, calls: int) -> float:
        with entry.context():
            entry.call()
            synchronize(device)
            start = clock()
            for _ in range(calls):
                entry.call()
            synchronize(device)
            return (clock() - start) / calls

    seconds = TURN_SECONDS if device.type == "cpu" else TURN_SECONDS_OF_A_GPU
    calls = max(1, int(seconds / max(turn(entry, 1) for entry in entries)))
    shuffled = random.Random(0)
    for _ in range(rounds):
        for entry in shuffled.sample(entries, len(entries)):
            entry.seconds.append(turn(entry, calls))
        progress.update()


@contextlib.contextmanager
def warns_where_it_is_busy(suite: str, device: torch.device) -> Iterator[None]:
    """Say on stderr if this thread had to wait for a core, where others filled its caches.

    It says nothing where the thread waits for another device.
    """
    wall, own = time.perf_counter(), time.thread_time()
    yield
    share = (time.thread_time() - own) / (time.perf_counter() - wall)
    if share < 0.8 and device.type == "cpu":
        print(
            f"{suite}: the machine is busy: this thread had {share:.0%} of a core. Its figures "
            "mean little.",
            file=sys.stderr,
        )


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks: a page fault for every 4 KiB would hide the differences."""
    m_trim_threshold, m_mmap_max = -1, -4
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
