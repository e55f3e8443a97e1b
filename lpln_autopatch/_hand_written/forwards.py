"""Hand-written norms: the function that runs in the place of each forward."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lpln_autopatch import _exemption, _exporting, _forward
from lpln_autopatch._exemption import EXEMPT, is_exempt, run_stock
from lpln_autopatch._forward import NO_AUTOCAST, Decision, decide
from lpln_autopatch._hand_written import kinds
from lpln_autopatch._hand_written.form import Form
from lpln_autopatch._hand_written.normalise import normalise
from lpln_autopatch._request import HAND_WRITTEN, Request
from lpln_autopatch._torch_compat import (
    autocast_dtype,
    is_compiling,
    is_dynamo_compiling,
    is_tracing,
    never_a_frame_of_its_own,
    run_while_compiling,
)
from lpln_autopatch.backends.gradients import DTYPES

_forwards: list[kinds.Forward] = []  # by a number, which is a constant for Dynamo


def replacement(function: Any, stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return our function for `function`, the forward of a class."""
    number = _number_of(function)
    found = _forwards[number] = kinds.Forward(function, stock)

    def forward_of_a_class(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        request = _forward.active
        if is_dynamo_compiling() and _exemption.guard_on_changes():
            return None
        if HAND_WRITTEN in request.norms:
            if is_exempt(self):
                if _forward.counter is not None and args:
                    _count(number, self, args[0], (None, EXEMPT), None)
                return run_stock(EXEMPT, stock, self, *args, **kwargs)
            if args and found.are_defaults(args[1:], kwargs):
                x = args[0]
                decision, form = decide_form(number, request, self, x)
                if _forward.counter is not None:
                    _count(number, self, x, decision, form)
                dtype = decision[0]
                if form is not None and dtype is not None:
                    return normalise(request, self, x, form, dtype)
        return stock(self, *args, **kwargs)

    return never_a_frame_of_its_own(forward_of_a_class)


def decide_form(
    number: int, request: Request, module: torch.nn.Module, x: Any
) -> tuple[Decision, Form | None]:
    """Decide if `request` lowers a call of `module` for `x`, and in which form: None is stock."""
    decision = decide(request, HAND_WRITTEN, x, None)
    if decision[0] is None:
        return decision, None
    if is_compiling() and _exporting.is_running():
        return (None, "torch.export"), None
    if x.is_nested or x.layout is not torch.strided:
        return (None, "the input is not dense"), None
    form = _form_for(number, module, x)
    if isinstance(form, str):
        return (None, f"not recognised: {form}"), None
    if form.size and x.shape[form.dim] != form.size:
        return (None, "its input has another size"), None
    for name in (form.weight, form.bias):
        if name:
            tensor = getattr(module, name)
            if tensor.dtype not in DTYPES:
                return (None, f"{tensor.dtype} {name}".removeprefix("torch.")), None
            if form.dim == -1 and tensor.ndim > 1 and not _fits(tensor, x):
                return (None, f"its input is broadcast to its {name}"), None
    return decision, form


def _count(
    number: int, module: torch.nn.Module, x: Any, decision: Decision, form: Form | None
) -> None:
    if form is None and not is_dynamo_compiling():
        # The module may be no norm. While TorchScript traces, no trial tells.
        if not isinstance(x, Tensor) or is_tracing():
            return
        form_or_reason = _form_for(number, module, x)
        form = form_or_reason if isinstance(form_or_reason, Form) else None
    if form is not None and _forward.counter is not None:
        _forward.counter(decision)


def explain(module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[str, Decision]:
    """Return the norm that a call of `module` computes by hand, or "", and the decision.

    Args:
        module: Its class need not be exchanged.
        args: The arguments of the call.
        kwargs: Its named arguments.
    """
    function = kinds.candidate(type(module))
    if function is None:
        return "", (None, "calls no norm function of torch.nn.functional")
    number = _number_of(function)
    try:
        passed = inspect.signature(function).bind(module, *args, **kwargs)
    except TypeError:  # the module has a forward of its own
        return "", (None, "another patcher")
    passed.apply_defaults()
    x = passed.args[1]
    if not isinstance(x, Tensor):
        return "", (None, "the input is no tensor")
    form = _form_for(number, module, x)
    if isinstance(form, str):
        return "", (None, f"hand-written, and not recognised: {form}")
    request = _forward.active
    if not request.norms:
        return form.norm, (None, "no precision is active")
    if autocast_dtype(x.device.type) is None:
        return form.norm, (None, NO_AUTOCAST)
    if HAND_WRITTEN not in request.norms:
        return form.norm, (None, "hand-written: norms='hand_written' lowers it")
    if is_exempt(module):
        return form.norm, (None, EXEMPT)
    if not _forwards[number].are_defaults(passed.args[2:], passed.kwargs):
        return form.norm, (None, "it gets more than one tensor")
    return form.norm, decide_form(number, request, module, x)[0]


def _number_of(function: Any) -> int:
    numbers = (n for n, known in enumerate(_forwards) if known.function is function)
    number = next(numbers, len(_forwards))
    if number == len(_forwards):
        _forwards.append(kinds.Forward(function, function))
    return number


def _fits(tensor: Tensor, x: Tensor) -> bool:
    """Return True if `tensor` broadcasts to the shape of x."""
    for n, size in zip(reversed(tensor.shape), reversed(x.shape)):  # noqa: B905
        if n != 1 and n != size:  # `in` compares no symbols in Dynamo
            return False
    return tensor.ndim <= x.ndim


def _form_for(number: int, module: torch.nn.Module, x: Tensor) -> Form | str:
    for name in _methods(number, type(module)):
        if _is_own(module, name):
            return f"its module has a {name} of its own"
    names = _names(number, type(module))
    values = tuple([kinds.describe(getattr(module, name, ...)) for name in names])
    return _form(number, type(module), values, x.ndim)


def _is_own(module: torch.nn.Module, name: str) -> bool:
    """Return True if the attribute `name` of `module` hides a method of its class."""
    if is_dynamo_compiling():  # it does not guard on what is missing in a `__dict__`
        return type(getattr(module, name)) is not types.MethodType
    return name in vars(module)


@run_while_compiling
def _names(number: int, cls: type) -> tuple[str, ...]:
    return _forwards[number].names(cls)


@run_while_compiling
def _methods(number: int, cls: type) -> tuple[str, ...]:
    return _forwards[number].methods(cls)


@run_while_compiling
def _form(number: int, cls: type, values: kinds.Values, rank: int) -> Form | str:
    return _forwards[number].form(cls, values, rank)


for _function in (decide_form, _count, _form_for, _is_own, _fits):
    never_a_frame_of_its_own(_function)
