"""Every branch on a torch version. Each names the version that lets it be deleted."""

from __future__ import annotations

import contextlib
import linecache
import re
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint

TORCH_VERSION = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])

_F = TypeVar("_F", bound=Callable[..., Any])

if TORCH_VERSION >= (2, 4):

    def autocast_dtype(device_type: str) -> torch.dtype | None:
        """Return the autocast dtype of `device_type` now, or None where autocast is off."""
        # is_autocast_enabled raises for a type that autocast does not know, such as meta. Every
        # build knows cpu and cuda.
        if device_type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device_type):
            return None
        if not torch.is_autocast_enabled(device_type):
            return None
        return torch.get_autocast_dtype(device_type)

else:  # until torch 2.4: one pair of functions for each device type

    def autocast_dtype(device_type: str) -> torch.dtype | None:
        """Return the autocast dtype of `device_type` now, or None where autocast is off."""
        if device_type == "cuda" and torch.is_autocast_enabled():
            return torch.get_autocast_gpu_dtype()
        if device_type == "cpu" and torch.is_autocast_cpu_enabled():
            return torch.get_autocast_cpu_dtype()
        return None


if TORCH_VERSION >= (2, 0):
    # A context manager in C, in a sixth of the time of `torch.autocast(enabled=False)`, which
    # reads and restores five settings. The graphs that AOTAutograd compiles enter it too.
    autocast_disabled: Callable[[], AbstractContextManager[Any]] = torch._C._DisableAutocast
else:  # until torch 2.0: it is no context manager there

    def autocast_disabled() -> AbstractContextManager[Any]:
        return torch.autocast("cuda" if torch.is_autocast_enabled() else "cpu", enabled=False)


is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


def forward_mode_is_on() -> bool:
    """Return True in forward-mode differentiation, `torch.func.jvp` included."""
    return torch.autograd.forward_ad._current_level >= 0


def something_intercepts_operators() -> bool:
    """Return True if a functorch transform or a `TorchDispatchMode` is active."""
    if TORCH_VERSION < (2, 1):  # until torch 2.1: neither question can be asked
        return False
    return bool(torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack())


# until torch 2.1: a module's forward hook does not run if the forward raises.
HOOKS_RUN_ALWAYS = TORCH_VERSION >= (2, 1)
HAS_RMS_NORM = TORCH_VERSION >= (2, 4)

# until torch 2.5: Dynamo puts a call of torch's own modules into the graph without tracing it.
DYNAMO_TRACES_NORMS = TORCH_VERSION >= (2, 5)

# until torch 2.12: Dynamo does not always look at the code of a function that it has met.
GRAPHS_GUARD_ON_CODE = TORCH_VERSION >= (2, 12)

# until torch 2.15: code that was compiled under `caching_precompile` cannot be compiled without it.
PRECOMPILATION_CAN_BE_LEFT = TORCH_VERSION >= (2, 15)

# until torch 2.9: Dynamo does not tell the value of a float that it has made a symbol of.
DYNAMO_TELLS_FLOATS = TORCH_VERSION >= (2, 9)

# until torch 2.13: Inductor takes a cast to low precision and back out of the graph.
GRAPHS_KEEP_ROUNDED_INPUTS = TORCH_VERSION >= (2, 13)

# until torch 2.13: no device made in Python; the lists of autocast in other words
CAN_COUNT = TORCH_VERSION >= (2, 13)

# until torch 2.6: Triton is older than 3.2, which the kernels of `fused` need. Not for ROCm.
HAS_TRITON_KERNELS = TORCH_VERSION >= (2, 6) and torch.version.hip is None

# until torch 2.2: stock LayerNorm on CPU refuses a low-precision x with float32 parameters.
CPU_TAKES_MIXED_DTYPES = TORCH_VERSION >= (2, 2)

# until torch 1.13: LayerNorm on CUDA has no bfloat16 kernel.
CUDA_NORMALISES_BFLOAT16 = TORCH_VERSION >= (1, 13)

if TORCH_VERSION >= (2, 1):
    is_dynamo_compiling: Callable[[], bool] = torch.compiler.is_dynamo_compiling
    is_compiling: Callable[[], bool] = torch.compiler.is_compiling
    """Also true where torch.export traces without Dynamo, as it does by default."""
else:  # until torch 2.1: Dynamo had no public flag, and inlined no module of torch's own

    def is_dynamo_compiling() -> bool:
        return False

    is_compiling = is_dynamo_compiling

# until torch 2.7: it cannot be asked
is_exporting: Callable[[], bool] = getattr(getattr(torch, "compiler", 0), "is_exporting", bool)


def run_while_compiling(function: _F) -> _F:
    """Make Dynamo call `function` for real while it traces, and take its result as a constant.

    The same as `torch.compiler.assume_constant_result`, which would import Dynamo for seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def never_a_frame_of_its_own(function: _F, nor_what_it_calls: bool = False) -> _F:
    """Have Dynamo inline `function` in code that it traces, and never compile it by itself.

    It treats torch.nn's own functions in this way. Otherwise it would compile ours behind a graph
    break, once for every module. With `nor_what_it_calls` (of no effect until torch 2.6) it does
    not compile the functions beneath it either.
    """
    eval_frame: Any = torch._C._dynamo.eval_frame if TORCH_VERSION >= (2, 0) else None
    if hasattr(eval_frame, "skip_code"):  # until torch 2.6
        eval_frame.skip_code(function.__code__)
    elif hasattr(eval_frame, "set_code_exec_strategy"):
        action = eval_frame._FrameAction
        beneath = action.SKIP if nor_what_it_calls else action.DEFAULT
        strategy = eval_frame._FrameExecStrategy(action.SKIP, beneath)
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
    return function


def traced_like_torchs_own(function: _F, module: types.ModuleType) -> _F:
    """Have Dynamo treat `function` as if torch's `module` had it, at the top of a graph too.

    For `torch.compile(nn.LayerNorm(8))`: torch.compile adds a frame above a module whose forward
    Dynamo would skip. It judges by the name of the file, which becomes one of `module` here.
    Tracebacks show both files, and inspect and debuggers find the source under that name, too.
    """
    code = function.__code__
    name = f"{module.__file__} <- {code.co_filename}"
    function.__code__ = code.replace(co_filename=name)
    linecache.lazycache(name, function.__globals__)
    return function


def compiled_code_runs_eagerly() -> AbstractContextManager[Any]:
    """Run compiled code as Python, in every thread. until torch 2.6: it cannot."""
    can = TORCH_VERSION >= (2, 6) and "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if can else contextlib.nullcontext()


@contextlib.contextmanager
def every_module_hooked(enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    """Call `enter(module, args)` and `leave(module, args, kwargs, output)` around every forward.

    If it raises, `output` is None and kwargs are empty. until torch 2.6: no kwargs.
    until torch 2.1: no `leave` if it raises.
    """
    hooks = torch.nn.modules.module

    def after(module: torch.nn.Module, args: Any, *rest: Any) -> None:
        leave(module, args, rest[0] if len(rest) == 2 else {}, rest[-1])

    options = {"always_call": True} if HOOKS_RUN_ALWAYS else {}
    if hasattr(hooks, "_global_forward_hooks_with_kwargs"):
        options["with_kwargs"] = True
    before = hooks.register_module_forward_pre_hook(enter)
    behind = hooks.register_module_forward_hook(after, **options)
    try:
        with before, behind:
            yield
    finally:
        # The handle leaves it there (torch 2.14), and torch.compile warns of a hook.
        getattr(hooks, "_global_forward_hooks_with_kwargs", {}).pop(behind.id, None)


def remove_forward_hooks(module: torch.nn.Module, *unwanted: Callable[..., Any]) -> None:
    """Remove hooks without their handles: a copy of a module has hooks, and no handles."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if any(hook is one for one in unwanted):
                del hooks[key]
                getattr(module, "_forward_hooks_always_called", {}).pop(key, None)


def on_module_registration(hook: Callable[..., None]) -> Any:
    """Call `hook(parent, name, module)` when a module becomes part of another; return a handle.

    Raises:
        ImportError: until torch 2.0 modules do not tell.
    """
    register = getattr(torch.nn.modules.module, "register_module_module_registration_hook", None)
    if register is None:
        raise ImportError("LPLN_EXEMPT needs torch 2.0 or later. Use lpln_autopatch.exempt.")
    return register(hook)


def loads_entry_points() -> bool | None:
    """Return True if `import torch` loads entry points, and None if this torch cannot."""
    # until torch 2.5
    is_enabled: Any = getattr(torch, "_is_device_backend_autoload_enabled", None)
    return None if is_enabled is None else bool(is_enabled())


def devices() -> list[str]:
    """Return the devices here that autocast knows, with their names."""
    found = ["cpu"]
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind, None)  # until torch 2.3: no torch.xpu
        if module is not None and module.is_available():
            count = range(module.device_count())
            found += [f"{kind}:{index} {module.get_device_name(index)}" for index in count]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def drop_compiled_code_that_cannot_follow() -> None:
    """Drop compiled code on versions where it has no guard on our state."""
    if not DYNAMO_TRACES_NORMS and "torch._dynamo" in sys.modules:
        # Not the whole reset, which forgets what others have registered. until torch 2.4: only it
        getattr(torch._dynamo, "reset_code_caches", torch._dynamo.reset)()


# The functions of `torch.utils.checkpoint` that every route to a recomputation passes, and the
# position of the argument that will run again in backward.
CHECKPOINT_ENTRIES = {"CheckpointFunction.forward": 1, "_CheckpointFrame.__init__": 1}
if TORCH_VERSION < (2, 1):  # until torch 2.1: non-reentrant checkpointing keeps no frame
    CHECKPOINT_ENTRIES = {"CheckpointFunction.forward": 1, "_checkpoint_without_reentrant": 0}

# The functions that run first in a recomputation, and the attribute with the checkpointed one.
CHECKPOINT_RECOMPUTATIONS = {"CheckpointFunction.backward": "run_function"}
if hasattr(getattr(torch.utils.checkpoint, "_CheckpointFrame", None), "get_inputs"):
    # until torch 2.12: frames have no method that runs first
    CHECKPOINT_RECOMPUTATIONS["_CheckpointFrame.get_inputs"] = "recompute_fn"


never_a_frame_of_its_own(autocast_dtype)
