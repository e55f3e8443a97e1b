"""Threads and forks, across activation, the patch and Dynamo: none crashes, or waits for good."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
from support import A_ROUTE, autocast, needs_dynamo, output_dtype, run_forked, run_python

import lpln_autopatch as lpln
from lpln_autopatch import low_precision_layernorm

BF16, FP32 = torch.bfloat16, torch.float32
LayerNorm = torch.nn.LayerNorm


@pytest.mark.parametrize("how", ["enable and disable", "blocks"])
def test_activation_while_threads_run_forward_keeps_calls_whole(layer_norm, how):
    """Every call of every thread is either stock or lowered, whole, with its gradient."""
    original = vars(LayerNorm)["forward"]
    x = torch.randn(4, 8)
    stock = layer_norm(x).detach()
    expected = {FP32: stock, BF16: stock.to(BF16)}
    stop, errors, seen = threading.Event(), [], set()

    def work() -> None:
        try:
            while not stop.is_set():
                leaf = x.clone().requires_grad_()
                with autocast():
                    y = torch.utils.checkpoint.checkpoint(layer_norm, leaf, use_reentrant=False)
                assert torch.equal(y, expected[y.dtype])
                seen.add(y.dtype)
                (gradient,) = torch.autograd.grad(y.float().square().sum(), leaf)
                assert gradient.dtype is FP32
                assert gradient.isfinite().all()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    turns = 0
    while (turns < 50 or seen != {FP32, BF16}) and not errors and time.monotonic() < deadline:
        if how == "blocks":
            with low_precision_layernorm("bf16"):
                time.sleep(0.002)
        else:
            lpln.enable("bf16")
            time.sleep(0.002)
            lpln.disable()
        time.sleep(0.002)
        turns += 1
    stop.set()
    for thread in threads:
        thread.join()
    lpln.disable()
    assert errors == []
    assert seen == {FP32, BF16}
    assert vars(LayerNorm)["forward"] is original
    assert not lpln.status().installed


@needs_dynamo
def test_blocks_while_a_thread_runs_compiled_code(layer_norm):
    """Blocks that open and close reach another thread's calls, once both variants are compiled."""
    compiled = torch.compile(layer_norm, backend="eager")
    x = torch.randn(4, 8)
    for _ in range(2):
        with low_precision_layernorm("bf16"):
            assert output_dtype(compiled, x) is BF16
        assert output_dtype(compiled, x) is FP32
    stop, errors, seen = threading.Event(), [], set()

    def work() -> None:
        try:
            while not stop.is_set():
                seen.add(output_dtype(compiled, x))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 60
    while seen != {FP32, BF16} and not errors and time.monotonic() < deadline:
        with low_precision_layernorm("bf16"):
            time.sleep(0.01)
        time.sleep(0.01)
    stop.set()
    thread.join()
    assert errors == []
    assert seen == {FP32, BF16}


# What compiles has no nn.Linear, and each thread enters autocast once: several threads that enter
# autocast while another one compiles wait for each other in PyTorch itself.
SWITCHED_WHILE_COMPILED_CODE_RUNS = """
import collections, os, threading, time
import torch, lpln_autopatch as lpln

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(16) for _ in range(2))
    def forward(self, x):
        return self.norms[1](self.norms[0](x) * 2)

def work(ran, calls):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        while len(ran) < calls:
            try:
                ran.append(model(x).dtype)
            except Exception:  # Dynamo's own, where what it traces changes meanwhile
                ran.append(None)

def switch(how):
    if how == "blocks":
        with lpln.low_precision_layernorm("bf16"):
            time.sleep(0.001)
    else:
        lpln.enable("bf16")
        time.sleep(0.001)
        lpln.disable()

def switch_beside_two_threads(how, seconds, wanted):
    ran = [], []
    for results in ran:
        threading.Thread(target=work, args=(results, 10**9), daemon=True).start()
    while min(map(len, ran)) < 5:
        time.sleep(0.001)
    end = time.monotonic() + seconds
    while time.monotonic() < end or not all(wanted <= {*results} for results in ran):
        switch(how)

def in_a_child(how):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            switch_beside_two_threads(how, 0.02, set())
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
model, x = torch.compile(Model(), backend="eager"), torch.randn(4, 16)
work([], 1)
lpln.status()  # imports what every child would import anew
for how in ("blocks", "enable and disable"):
    print(how, dict(collections.Counter(in_a_child(how) for _ in range(50))))
for how in ("blocks", "enable and disable"):
    switch_beside_two_threads(how, 1, {torch.bfloat16, torch.float32})
print("both dtypes", flush=True)
os._exit(0)
"""


@needs_dynamo
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork; Linux CI has it")
def test_switching_while_threads_run_compiled_code_never_crashes():
    """A hundred processes activate for the first time beside two threads that run compiled code.

    None crashes. Then one process switches for two seconds, and both threads run both variants.
    """
    result = run_forked("-c", SWITCHED_WHILE_COMPILED_CODE_RUNS, check=False, timeout=240)
    lines = result.stdout.splitlines()
    assert lines[:2] == ["blocks {0: 50}", "enable and disable {0: 50}"], result.stderr[-2000:]
    assert (result.returncode, lines[2:]) == (0, ["both dtypes"]), result.stderr[-2000:]


DISABLED_DURING_IMPORT = """
import sys, threading
import lpln_autopatch as lpln

class Pause:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1] and not importing.is_set():
            importing.set()
            disabling.wait(60)
            disabler.join(0.5)

importing, disabling = threading.Event(), threading.Event()

def disable():
    disabling.set()
    lpln.disable()

sys.meta_path.insert(0, Pause())
importer = threading.Thread(target=lambda: __import__("torch"), daemon=True)
disabler = threading.Thread(target=disable, daemon=True)
importer.start()
importing.wait(60)
disabler.start()
importer.join(60)
disabler.join(60)
print(importer.is_alive(), disabler.is_alive(), lpln.status().precision)
"""


@pytest.mark.parametrize("module", ["torch.nn.functional", "lpln_autopatch._patch"])
def test_disable_while_another_thread_imports_torch(module):
    """Neither thread waits for the other, and the last request holds, with LPLN_PRECISION set."""
    result = run_python(
        "-c", DISABLED_DURING_IMPORT, module, LPLN_PRECISION="amp", timeout=150, **A_ROUTE
    )
    assert result.stdout.split() == ["False", "False", "None"]


FIRST_ACTIVATION_DURING_COMPILATION = """
import sys, threading
import torch, lpln_autopatch as lpln

compiling, activated = threading.Event(), threading.Event()

def use_us(*arguments):
    compiling.set()
    lpln.status()
    with lpln.low_precision_layernorm("bf16"):
        pass
    print("in time", activated.wait(60))

def backend(graph, inputs):
    use_us()
    return graph.forward

if sys.argv[1] == "callback":
    import torch._dynamo.callback
    torch._dynamo.callback.on_compile_start(use_us)
    backend = "eager"
compiled = torch.compile(torch.nn.LayerNorm(8), backend=backend)

def compile_it():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        print(compiled(torch.randn(4, 8)).dtype)

def activate():
    with lpln.low_precision_layernorm("bf16"):
        lpln.status()
    activated.set()

threads = [threading.Thread(target=f, daemon=True) for f in (compile_it, activate)]
threads[0].start()
compiling.wait(60)
threads[1].start()
for thread in threads:
    thread.join(60)
print("alive", any(thread.is_alive() for thread in threads))
"""


@needs_dynamo
@pytest.mark.parametrize("where", ["callback", "backend"])
def test_first_activation_while_another_thread_compiles(where):
    """A compile callback, or a compile backend, may ask us meanwhile, and nobody waits for good."""
    code = FIRST_ACTIVATION_DURING_COMPILATION
    result = run_forked("-c", code, where, timeout=150)
    assert result.stdout.splitlines() == ["in time True", "torch.float32", "alive False"]


def norm_behind_a_pause(meanwhile):
    """A compiled norm. While it is first traced, another thread runs `meanwhile`."""
    norm = torch.nn.LayerNorm(8)
    calls = [meanwhile]

    @torch._dynamo.assume_constant_result
    def pause() -> None:
        if calls:
            thread = threading.Thread(target=calls.pop())
            thread.start()
            thread.join(60)

    def function(x):
        pause()
        return norm(x)

    return torch.compile(function, backend="aot_eager")


@needs_dynamo
@pytest.mark.parametrize("what", ["enable", "disable"])
def test_code_compiled_during_a_switch_follows_from_then_on(what):
    """Another thread calls enable() or disable() after tracing began, before it meets the norm."""
    if what == "disable":
        lpln.enable("bf16")
    switch = {"enable": lambda: lpln.enable("bf16"), "disable": lpln.disable}
    dtype = {"enable": BF16, "disable": FP32}
    compiled = norm_behind_a_pause(switch[what])
    assert output_dtype(compiled) is dtype[what]
    for then in ("enable", "disable", "enable"):
        switch[then]()
        assert output_dtype(compiled) is dtype[then]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork; Linux CI has it")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("how", ["enable", "block"])
def test_child_forked_after_activation_is_lowered(layer_norm, how):
    """The child is lowered; what it undoes, it undoes for itself, and completely."""
    original = vars(LayerNorm)["forward"]

    def child() -> bool:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        lowered = output_dtype(layer_norm) is BF16
        if how == "block":
            block.__exit__(None, None, None)
        lpln.disable()
        restored = vars(LayerNorm)["forward"] is original
        return lowered and restored and output_dtype(layer_norm) is FP32

    block = low_precision_layernorm("bf16")
    lpln.enable("bf16") if how == "enable" else block.__enter__()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if child() else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert output_dtype(layer_norm) is BF16
    if how == "block":
        block.__exit__(None, None, None)
