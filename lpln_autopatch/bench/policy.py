"""CUDA's autocast policy on another device, from the lists of the installed torch.

torch ships the lists as macros of a C++ header. Each operator of a list gets a kernel that casts
as CUDA's kernel does: on the CPU with real numbers, or on the emulated accelerator.
"""

from __future__ import annotations

import contextlib
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
LISTS = {
    "AT_FORALL_LOWER_PRECISION_FP": "lower",
    "AT_FORALL_FP32": "float32",
    "AT_FORALL_FP32_SET_OPT_DTYPE": "float32 by argument",
    "AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE": "float32 by overload",
    "AT_FORALL_PROMOTE": "widest",
}
"""The header's macros, and the dtype in which the operators of each run."""
OVERLOADS_WITH_DTYPE = {"Scalar": "ScalarOpt_dtype", "ScalarOpt_dim": "ScalarOpt_dim_dtype"}


def lists() -> dict[str, str]:
    """Return the rule of every operator on CUDA's lists, by `name` or `name.overload`."""
    text = HEADER.read_text() if HEADER.exists() else ""
    rules: dict[str, str] = {}
    for macro, rule in LISTS.items():
        found = re.search(rf"#define {macro}\(_\)((?:.*\\\n)*.*\n)", text)
        if found is None:
            raise RuntimeError(f"torch {torch.__version__} has no list {macro}; 2.13 has.")
        pattern = r'"(\w+\.\w+)"' if rule == "float32 by overload" else r"_\((\w+(?:, \w+)?)\)"
        for name in re.findall(pattern, found[1]):
            rules[name.replace(", ", ".")] = rule
    return rules


class Policy:
    """CUDA's lists, registered for the autocast key of one type of device; see `policy`."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.key = "AutocastCPU" if device_type == "cpu" else "AutocastPrivateUse1"
        self._keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, self.key))
        self._casts: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}

    def register(self, library: Any) -> None:
        """Give each operator on CUDA's lists its kernel; no other operator casts."""
        rules = lists()
        for name in torch._C._dispatch_get_all_op_names():
            namespace, _, short = name.partition("::")
            if namespace != "aten":
                continue
            if short in rules:
                library.impl(short, self._kernel(short, rules[short]))
            elif torch._C._dispatch_has_kernel_for_dispatch_key(name, self.key):
                library.impl(short, torch.library.fallthrough_kernel)

    def is_cast_of_weight(self, tensor: torch.Tensor) -> bool:
        """Return True if `tensor` lies in a cast that autocast's cache of weights holds."""
        storage = tensor.untyped_storage()._cdata
        return any(cast.untyped_storage()._cdata == storage for _, cast in self._casts.values())

    def _kernel(self, name: str, rule: str) -> Callable[..., Any]:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        with_dtype = operator
        if rule == "float32 by overload":
            with_dtype = getattr(torch.ops.aten.norm, OVERLOADS_WITH_DTYPE[overload])

        def kernel(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(self._keys):
                if "float32 by" in rule and self._eligible(args[0]):
                    return _in_float32(operator, with_dtype, args, kwargs)
                if "float32 by" in rule:
                    return operator(*args, **kwargs)
                dtype = torch.get_autocast_dtype(self.device_type)
                if rule == "float32" or (rule == "widest" and self._has_float32((args, kwargs))):
                    dtype = torch.float32
                cast = {name: self._cast(value, dtype) for name, value in kwargs.items()}
                return operator(*(self._cast(value, dtype) for value in args), **cast)

        return kernel

    def _has_float32(self, values: Any) -> bool:
        return any(self._eligible(v) and v.dtype is torch.float32 for v in tree_flatten(values)[0])

    def _eligible(self, value: object) -> bool:
        return (
            isinstance(value, torch.Tensor)
            and value.device.type == self.device_type
            and value.is_floating_point()
            and value.dtype is not torch.float64
        )

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._cast(each, dtype) for each in value]
        if not self._eligible(value) or value.dtype is dtype:
            return value
        # As cached_cast in autocast_mode.cpp does for leaves that want a gradient.
        cacheable = (
            value.dtype is torch.float32
            and dtype is torch.get_autocast_dtype(self.device_type)
            and value.requires_grad
            and value.is_leaf
            and not value._is_view()
            and torch.is_autocast_cache_enabled()
        )
        if not cacheable:
            return value.to(dtype=dtype)
        known = self._casts.get(id(value))
        if known is None or known[0]() is not value:
            known = self._casts[id(value)] = (weakref.ref(value), value.to(dtype=dtype))
        return known[1]


def _in_float32(operator: Any, target: Any, args: Any, kwargs: Any) -> Any:
    """Call `target` in place of `operator`, with float32 as its dtype if the caller names none."""
    position = [argument.name for argument in target._schema.arguments].index("dtype")
    given = args[position] if len(args) > position else kwargs.get("dtype")
    defaults = [a.default_value for a in operator._schema.arguments[len(args) : position]]
    return target(*args[:position], *defaults, **{**kwargs, "dtype": given or torch.float32})


@contextlib.contextmanager
def policy(device_type: str = "cpu") -> Iterator[Policy]:
    """Give autocast on `device_type` the policy that it has on CUDA, with the cache of weights.

    Eager code, and code that is compiled inside the block, casts by CUDA's lists. Do not run code
    inside that was compiled outside, nor the reverse.

    Raises:
        RuntimeError: this torch has no such lists.
    """
    chosen = Policy(device_type)
    new: Any = torch.library.Library
    library, others = new("aten", "IMPL", chosen.key), new("_", "IMPL", chosen.key)
    clear = torch.clear_autocast_cache

    def clear_both() -> None:  # at the end of an autocast region
        clear()
        chosen._casts.clear()

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(O|o)verrid.*")
            chosen.register(library)
            if device_type != "cpu":  # a new device has no kernel for operators on no list
                others.fallback(torch.library.fallthrough_kernel)
        torch.clear_autocast_cache = clear_both
        yield chosen
    finally:
        torch.clear_autocast_cache = clear
        library._destroy()
        others._destroy()
