"""Faults: each has a defined outcome, and leaves nothing behind.

Wrong environments are in test_zero_code.py and test_backends.py, one other patcher in
test_patch.py, exceptions in a recomputation in test_checkpoint.py.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import textwrap
import threading
import time
import warnings
from unittest import mock

import pytest
import torch
import wrapt
from support import A_ROUTE, autocast, needs_dynamo, output_dtype, run_python

import lpln_autopatch as lpln
from lpln_autopatch import backends, low_precision_layernorm, patch, state
from lpln_autopatch.torch_compat import CHECKPOINT_ENTRIES, TORCH_VERSION, autocast_dtype

BF16, FP32 = torch.bfloat16, torch.float32
LayerNorm = torch.nn.LayerNorm


# Other patchers: before, after, between. Each adds one to the output, and keeps what it found.


def plain(original):
    def theirs(self, input):
        return original(self, input) + 1

    return theirs


def with_wraps(original):
    return functools.wraps(original)(plain(original))


def with_wrapt(original):
    return wrapt.FunctionWrapper(original, lambda f, instance, args, kwargs: f(*args, **kwargs) + 1)


PATCHERS = pytest.mark.parametrize("second", [plain, with_wraps, with_wrapt])


@pytest.mark.parametrize("first", [plain, with_wraps, with_wrapt])
@PATCHERS
def test_between_two_patchers(first, second, layer_norm):
    """One before us and one after us: both are called, disable() leaves both, in their order.

    When they have left, in the reverse order, LayerNorm.forward is torch's own object again.
    """
    original = vars(LayerNorm)["forward"]
    x = torch.randn(4, 8)
    stock = layer_norm(x)
    LayerNorm.forward = beneath = first(original)
    lpln.enable()
    ours = vars(LayerNorm)["forward"]
    LayerNorm.forward = top = second(ours)
    try:
        with autocast():
            lowered = layer_norm(x)
        assert lowered.dtype is BF16
        assert torch.equal(lowered, (stock + 1).to(BF16) + 1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lpln.disable()
        assert vars(LayerNorm)["forward"] is top
        assert torch.equal(layer_norm(x), stock + 1 + 1)
        assert output_dtype(layer_norm) is FP32
        # Only wrapt's own wrapper lets go of what is beneath it.
        spliced_out = second is with_wrapt
        assert [w.category for w in caught] == [RuntimeWarning] * (not spliced_out)
        LayerNorm.forward = beneath if spliced_out else ours
        lpln.disable()
        assert vars(LayerNorm)["forward"] is beneath
        assert not lpln.status().installed
    finally:
        LayerNorm.forward = original


@PATCHERS
def test_patcher_between_two_of_our_activations(second, layer_norm):
    """enable(), theirs, enable(): lowered once, rounded once, and all of it comes off."""
    original = vars(LayerNorm)["forward"]
    x = torch.randn(4, 8)
    stock = layer_norm(x)
    lpln.enable()
    ours = vars(LayerNorm)["forward"]
    LayerNorm.forward = second(ours)
    try:
        lpln.enable("bf16")
        with autocast():
            # A closure hides ours, so that there is another one above it.
            expected = (stock + 1).to(BF16) if second is plain else stock.to(BF16) + 1
            assert torch.equal(layer_norm(x), expected)
        assert torch.equal(layer_norm(x), stock + 1)
    finally:
        LayerNorm.forward = ours
        lpln.disable()
    assert vars(LayerNorm)["forward"] is original


def test_patcher_of_checkpoint_is_left_in_place():
    """Somebody's wrapper on what checkpoint calls stays above ours, and disable() warns of it.

    A backward after that recomputes, and warns of nothing.
    """
    checkpoint = torch.utils.checkpoint
    path = list(CHECKPOINT_ENTRIES)[1]
    *owner, name = path.split(".")
    holder = functools.reduce(getattr, owner, checkpoint)
    original = vars(holder)[name]
    lpln.enable()
    ours = vars(holder)[name]
    calls = []

    def theirs(*args, **kwargs):
        calls.append(name)
        return ours(*args, **kwargs) if not owner else ours.__get__(args[0])(*args[1:], **kwargs)

    setattr(holder, name, theirs)
    try:
        with pytest.warns(RuntimeWarning, match=rf"checkpoint\.{path} was wrapped by"):
            lpln.disable()
        assert vars(holder)[name] is theirs
        x = torch.randn(4, 8, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y = checkpoint.checkpoint(torch.nn.LayerNorm(8), x, use_reentrant=False)
            y.sum().backward()
        assert x.grad is not None
        assert calls == [name]
    finally:
        setattr(holder, name, ours)
        lpln.disable()
    assert vars(holder)[name] is original


# Threads.


@pytest.mark.parametrize("how", ["enable and disable", "blocks"])
def test_activation_while_threads_run_forward(layer_norm, how):
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
    """Once both variants are compiled, blocks that open and close reach another thread's calls."""
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
    result = run_python("-c", SWITCHED_WHILE_COMPILED_CODE_RUNS, check=False, timeout=240)
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


@pytest.mark.parametrize("module", ["torch.nn.functional", "lpln_autopatch.patch"])
def test_disable_while_another_thread_imports_torch(module):
    """With LPLN_PRECISION set, neither waits for the other, and what is asked for last holds."""
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
    result = run_python("-c", code, where, timeout=150)
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


@needs_dynamo
def test_dynamo_is_told_once_by_threads_that_activate_first():
    """Two threads at once in the first activation: Dynamo refuses to be told twice."""
    code = """
        import threading, torch, torch._dynamo
        import lpln_autopatch as lpln
        from lpln_autopatch import norms, patch, state

        both, errors = threading.Barrier(2, timeout=60), []
        tell = patch.trace_through
        patch.trace_through = lambda wrappers: (both.wait(), tell(wrappers))

        def work():
            try:
                with lpln.low_precision_layernorm("bf16"):
                    pass
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(errors)
    """
    assert run_python("-c", textwrap.dedent(code)).stdout == "[]\n"


# What is asked for while something else is going on.


def test_disable_before_torch_is_imported_holds():
    """With LPLN_PRECISION set: it imports torch itself, and then undoes the variable."""
    code = "import lpln_autopatch; lpln_autopatch.disable(); import torch; print(dtype())"
    result = run_python("-c", DTYPE + code, LPLN_PRECISION="amp", **A_ROUTE)
    assert result.stdout == "torch.float32\n"


def test_enable_may_be_used_as_a_block(layer_norm):
    """`with enable():` lowers, and calls disable() at its end, whatever raises inside."""

    def run() -> None:
        with lpln.enable("bf16"):
            assert output_dtype(layer_norm) is BF16
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        run()
    assert lpln.status().precision is None
    assert not lpln.status().installed
    assert output_dtype(layer_norm) is FP32


def block_in_a_cycle() -> None:
    """Leave a block to the garbage collector: a generator that holds it, in a cycle."""

    def generator():
        with low_precision_layernorm("fp32"), low_precision_layernorm("bf16"):
            yield

    held = [generator()]
    next(held[0])
    held.append(held)


@pytest.mark.filterwarnings("ignore::lpln_autopatch.NoEffectWarning")
@pytest.mark.parametrize("what", ["enable", "disable", "block"])
def test_block_that_the_garbage_collector_closes_in_a_change(layer_norm, what):
    """Wherever in a change it happens, the change holds, and nothing is left of the block."""
    original = vars(LayerNorm)["forward"]

    def change() -> None:
        block.__enter__() if what == "block" else getattr(lpln, what)()

    def collect_at(frame, event, argument) -> None:
        if frame.f_globals is vars(state) or frame.f_globals is vars(patch):
            calls.append(event)
        if len(calls) == position:
            sys.setprofile(None)
            gc.collect()

    position, calls = 0, []
    gc.collect()
    gc.freeze()  # what is there already need not be looked at every time
    gc.disable()
    try:
        while len(calls) >= position:
            position, calls = position + 1, []
            block = low_precision_layernorm("amp")
            if what == "disable":
                lpln.enable()
            block_in_a_cycle()
            sys.setprofile(collect_at)
            change()
            sys.setprofile(None)
            gc.collect()
            expected = (None, FP32) if what == "disable" else ("amp", BF16)
            assert (lpln.status().precision, output_dtype(layer_norm)) == expected, position
            if what == "block":
                block.__exit__(None, None, None)
            lpln.disable()
            assert vars(LayerNorm)["forward"] is original, position
    finally:
        sys.setprofile(None)
        gc.enable()
        gc.unfreeze()
    assert position > 10


@pytest.mark.parametrize("name", ["forward", "layer_norm"])
def test_mock_around_an_activation_is_seen(layer_norm, name):
    """mock.patch puts the original back over our wrapper: status() says so, disable() is silent.

    The next enable() lowers again.
    """
    holder = LayerNorm if name == "forward" else torch.nn.functional
    original = vars(holder)[name]
    with mock.patch.object(holder, name, lambda *args, **kwargs: args[-1]):
        lpln.enable()
    assert vars(holder)[name] is original
    assert not lpln.status().installed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lpln.disable()
        lpln.enable()
        assert lpln.status().installed
        assert output_dtype(layer_norm) is BF16
        lpln.disable()
    assert vars(holder)[name] is original


EXPORTED_UNDER_CUDAS_LISTS = """
import sys
import torch, torch.nn.functional as F
import lpln_autopatch as lpln
from lpln_autopatch import backends

def in_float32(x, shape, weight=None, bias=None, eps=1e-5, enable=True):
    with torch._C._DisableAutocast():
        weight = weight if weight is None else weight.float()
        bias = bias if bias is None else bias.float()
        return torch.layer_norm(x.float(), shape, weight, bias, eps)

library = torch.library.Library("aten", "IMPL")
library.impl("layer_norm", in_float32, "AutocastCPU")

def recording(x, *arguments):
    seen.append(type(x).__name__)
    return backends.native.normalise(x, *arguments)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.norm(x), F.layer_norm(x, (8,)), self.norm(x.bfloat16())

seen, model, x = [], Model(), torch.randn(4, 8)
backends._BUILT_IN["recording"] = lambda: recording
print({y.dtype for y in model(x)})
with lpln.low_precision_layernorm(backend="recording"):
    eager = model(x)
    seen.clear()
    exported = torch.export.export(model, (x,), strict=sys.argv[1] == "strict")
print(seen)
for program in (exported, exported.run_decompositions()):
    got = program.module()(x)
    metadata = [node.meta["val"].dtype for node in program.graph.output_node().args[0]]
    print({y.dtype for y in eager}, metadata == [y.dtype for y in got])
    print([torch.equal(a, b) for a, b in zip(got, eager)])
"""


@pytest.mark.skipif(TORCH_VERSION < (2, 5), reason="torch.export of older versions differs")
@pytest.mark.parametrize("how", ["strict", "not strict"])
def test_exported_program_gives_what_the_eager_one_gave(how):
    """Where autocast has LayerNorm on its float32 list, as on CUDA: dtypes, values, metadata.

    A backend sees no tensor of the export. In a process of its own, for the list of the CPU's
    autocast is changed.
    """
    first, seen, *rest = run_python(
        "-W", "ignore", "-c", EXPORTED_UNDER_CUDAS_LISTS, how
    ).stdout.splitlines()
    assert (first, seen) == ("{torch.float32}", "[]")
    assert rest == ["{torch.bfloat16} True", "[True, True, True]"] * 2


# Forks.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork; Linux CI has it")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("how", ["enable", "block"])
def test_child_forked_after_activation(layer_norm, how):
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


# Exceptions inside a lowered forward.


def failing(*arguments: object) -> torch.Tensor:
    raise KeyError("from the backend")


@pytest.fixture
def failing_backend(monkeypatch):
    """A backend that raises when it is called."""
    monkeypatch.setitem(backends._BUILT_IN, "failing", lambda: failing)


def test_exception_in_a_backend_passes_unchanged(layer_norm, failing_backend):
    """It reaches the caller as it is; autocast and what is in force are as before the call."""
    lpln.enable("bf16", backend="failing")
    in_force = lpln.status()
    with autocast():
        with pytest.raises(KeyError, match="from the backend"):
            layer_norm(torch.randn(4, 8))
        assert autocast_dtype("cpu") is BF16
        assert lpln.status() == in_force
        with low_precision_layernorm("bf16", backend="native"):
            assert layer_norm(torch.randn(4, 8)).dtype is BF16
    assert output_dtype(lpln.exempt(torch.nn.LayerNorm(8))) is FP32


def test_exception_where_autocast_is_switched_off_switches_it_on_again(layer_norm):
    """The accelerators' path switches autocast off around the kernel: also if that raises."""
    from lpln_autopatch.backends import native

    x = torch.randn(4, 7, device="meta")
    with autocast():
        with pytest.raises(RuntimeError):
            native.normalise(x, (8,), layer_norm.weight, layer_norm.bias, 1e-5, BF16)
        assert autocast_dtype("cpu") is BF16


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_behind_a_lowered_call_leaves_nothing_on(layer_norm, error):
    """An error between forward and the end of a block, Ctrl-C included, closes the block."""

    def interrupt(*arguments: object) -> None:
        raise error

    handle = layer_norm.register_forward_hook(interrupt)
    with pytest.raises(error), low_precision_layernorm("bf16"), autocast():
        layer_norm(torch.randn(4, 8))
    handle.remove()
    assert lpln.status().precision is None
    assert output_dtype(layer_norm) is FP32


@needs_dynamo
def test_exception_in_a_compiled_lowered_forward(layer_norm):
    """A wrong shape fails in compiled code too, and the next call is lowered."""
    compiled = torch.compile(layer_norm, backend="eager")
    with low_precision_layernorm("bf16"), autocast():
        with pytest.raises(RuntimeError, match="normalized_shape"):
            compiled(torch.randn(4, 7))
        assert compiled(torch.randn(4, 8)).dtype is BF16
    assert output_dtype(compiled) is FP32


# A half-finished import of torch.

DTYPE = """
def dtype():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return str(torch.nn.LayerNorm(8)(torch.randn(4, 8)).dtype)
"""

ENABLED_DURING = """
import sys
import lpln_autopatch

class During:
    done = False
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1] and not During.done:
            During.done = True
            try:
                lpln_autopatch.enable("bf16")
            except (AttributeError, ImportError) as error:
                print("partially initialized module 'torch" in str(error))

sys.meta_path.insert(0, During())
import torch
from inspect import unwrap
print(lpln_autopatch.status().source, dtype())
lpln_autopatch.enable()
print(dtype())
lpln_autopatch.disable()
print(dtype(), vars(torch.nn.LayerNorm)["forward"] is unwrap(torch.nn.LayerNorm.forward))
"""


@pytest.mark.parametrize("precision", ["", "amp"])
@pytest.mark.parametrize("module", ["torch.version", "torch.nn.functional", "torch.optim"])
def test_enable_in_the_middle_of_torchs_import(module, precision):
    """It is refused, as Python refuses it, and once torch is there everything works."""
    code = DTYPE + ENABLED_DURING
    result = run_python("-c", code, module, LPLN_PRECISION=precision, **A_ROUTE)
    source = "environment torch.bfloat16" if precision else "None torch.float32"
    assert result.stdout.splitlines() == ["True", source, "torch.bfloat16", "torch.float32 True"]


FAILS_ONCE = """
import sys

class FailsOnce:
    done = False
    def find_spec(self, name, path=None, target=None):
        if name == "torch.version" and not FailsOnce.done:
            FailsOnce.done = True
            raise ImportError("not yet")

sys.meta_path.insert(0, FailsOnce())
try:
    import torch
except ImportError as error:
    print(error, "lpln_autopatch.activation" in sys.modules)
try:
    import torch
except ImportError as error:
    sys.exit("torch refuses" if "once per process" in str(error) else repr(error))
import lpln_autopatch
print(dtype(), lpln_autopatch.status().source)
"""


def test_import_of_torch_that_fails_and_is_repeated():
    """Nothing happens at the failure, whose error passes; an import that succeeds activates.

    torch 2.15 refuses the second by itself; 2.13 and 1.13 do not.
    """
    result = run_python("-c", DTYPE + FAILS_ONCE, check=False, LPLN_PRECISION="amp", **A_ROUTE)
    first, *second = result.stdout.splitlines()
    assert first == "not yet False"
    if TORCH_VERSION < (2, 14):
        assert second == ["torch.bfloat16 environment"]
    else:
        assert second == ["torch.bfloat16 environment"] or "torch refuses" in result.stderr


# A backend that fails to load.


@pytest.fixture
def third_party(tmp_path):
    """A folder with a distribution whose backends fail in different ways."""
    (tmp_path / "raises_at_import.py").write_text("raise RuntimeError('no driver')")
    (tmp_path / "not_a_function.py").write_text("normalise = 'a name'")
    info = tmp_path / "faulty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[lpln_autopatch.backends]\nraises = raises_at_import:normalise\n"
        "constant = not_a_function:normalise\nmissing = no_such_module:normalise\n"
    )
    return str(tmp_path)


FAULTS = {
    "raises": "raises_at_import:normalise does not load: RuntimeError('no driver')",
    "constant": "not_a_function:normalise is 'a name', not a function",
    "missing": "no_such_module:normalise does not load: ModuleNotFoundError",
}


def test_backend_that_does_not_load_is_refused(third_party):
    """enable() and a block say which and why, and what was in force before still is."""
    code = """
        import torch, lpln_autopatch
        print(lpln_autopatch.status().precision)
        lpln_autopatch.enable("bf16")
        for name in ("raises", "constant", "missing"):
            for ask in (lpln_autopatch.enable, lpln_autopatch.low_precision_layernorm):
                try:
                    ask("amp", backend=name)
                except ImportError as error:
                    print(error)
        print(lpln_autopatch.status().precision, lpln_autopatch.status().backend)
    """
    result = run_python("-c", textwrap.dedent(code), PYTHONPATH=third_party)
    first, *errors, last = result.stdout.splitlines()
    assert (first, last) == ("None", "amp_bf16 native")
    assert len(errors) == 6
    for name, error in zip([n for n in FAULTS for _ in range(2)], errors, strict=True):
        assert FAULTS[name] in error


@pytest.mark.parametrize("name", FAULTS)
def test_variable_with_a_backend_that_does_not_load_stops_the_process(third_party, name):
    """LPLN_BACKEND names it: no stock run, one message with the reason."""
    environment = {**A_ROUTE, "PYTHONPATH": f"{A_ROUTE['PYTHONPATH']}:{third_party}"}
    code = "import torch; print('ran')"
    result = run_python(
        "-c", code, check=False, LPLN_PRECISION="amp", LPLN_BACKEND=name, **environment
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert FAULTS[name] in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("lpln_autopatch: ")


@pytest.mark.parametrize("package", [False, True])
def test_backend_that_imports_torch_may_be_imported_first(tmp_path, package):
    """LPLN_BACKEND names a module whose first line is `import torch`: it is loaded when called.

    Imported before torch, it is only half there when the variable is read.
    """
    home = tmp_path / "half" if package else tmp_path
    home.mkdir(exist_ok=True)
    (tmp_path / "half" / "__init__.py" if package else tmp_path / "half.py").write_text(
        "import torch\ncalls = []\n"
        "def normalise(x, shape, weight, bias, eps, dtype):\n"
        "    calls.append(eps)\n"
        "    return torch.layer_norm(x, shape, weight, bias, eps).to(dtype)\n"
        "not_a_function = 0\n"
    )
    (tmp_path / "half-1.0.dist-info").mkdir()
    (tmp_path / "half-1.0.dist-info" / "METADATA").write_text("Name: half\nVersion: 1.0\n")
    (tmp_path / "half-1.0.dist-info" / "entry_points.txt").write_text(
        "[lpln_autopatch.backends]\nhalf = half:normalise\nwrong = half:not_a_function\n"
    )
    environment = {"PYTHONPATH": f"{A_ROUTE['PYTHONPATH']}:{tmp_path}"}
    code = "import half, torch, lpln_autopatch\n" + DTYPE + "print(dtype(), half.calls)\n"
    code += "print(lpln_autopatch.status().backend)"
    variables = {"LPLN_PRECISION": "amp", **A_ROUTE, **environment}
    result = run_python("-c", code, LPLN_BACKEND="half", **variables)
    assert result.stdout.splitlines() == ["torch.bfloat16 [1e-05]", "half"]
    result = run_python("-c", code, check=False, LPLN_BACKEND="wrong", **variables)
    assert "LPLN_BACKEND='wrong': the backend half:not_a_function is 0" in result.stderr
