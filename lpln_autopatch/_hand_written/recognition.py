"""Recognise a norm that a class computes by hand: run its forward, and compare with the norms.

The forward runs on small random float32 inputs on the CPU. It must give the values and gradients
of RMSNorm or LayerNorm to float32 rounding: at several scales and sizes, for rows of zeros, in
training and in evaluation mode, and NaN and inf where those give them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from lpln_autopatch._hand_written.form import (
    Form,
    Run,
    agrees,
    eps_of,
    every_form,
    is_near,
    scale_of,
    values_of,
)
from lpln_autopatch._hand_written.stand_in import NotANorm, Shape, StandIn, State, sizes_in
from lpln_autopatch._hand_written.trials import Failed, Trials

# Pairs of a number of dimensions and the normalised one, the likeliest first.
_RANKS = ((3, -1), (3, 1), (2, -1), (4, -1), (4, 1), (5, -1), (5, 1), (1, -1))


def recognise(
    cls: type, forward: Callable[..., Any], state: State, deadline: float
) -> dict[int, Form | NotANorm]:
    """Return the form of `forward`, or why it has none, for each number of input dimensions.

    To be called in a new thread, where neither autocast nor any mode is active.

    Args:
        cls: The class of the module.
        forward: Takes the module and one tensor.
        state: The attributes that it may read from the module.
        deadline: The time of `time.monotonic` at which nobody waits for the answer any more.

    Raises:
        NotANorm: it is neither RMSNorm nor LayerNorm, whatever its input.
    """
    shapes = {name: value for name, value in state.items() if isinstance(value, Shape)}
    if any(math.prod(shape[:-1]) > 1024 for shape in shapes.values()):
        raise NotANorm("its tensors have too many rows")
    if len(shapes) > 2:
        raise NotANorm(f"it reads more than two tensors: {', '.join(shapes)}")
    results: list[dict[int, Form | NotANorm]] = []
    for size in sizes_in(state):
        results.append(_recognise(Trials(cls, forward, state, size, deadline)))
        if any(isinstance(result, Form) for result in results[-1].values()):
            return results[-1]
    if not results:
        raise NotANorm("its tensors have different sizes")
    return results[0]


def _recognise(trials: Trials) -> dict[int, Form | NotANorm]:
    found: dict[int, Form | NotANorm] = {}
    for rank, dim in _RANKS:
        if isinstance(found.get(rank), Form):
            continue
        # A form that is known for another rank need only be confirmed for this one.
        forms = (each for each in found.values() if isinstance(each, Form))
        known = next((form for form in forms if form.dim == dim), None)
        try:
            found[rank] = _form(trials, rank, dim, known)
        except NotANorm as error:
            found.setdefault(rank, error)
    return found


def _form(trials: Trials, rank: int, dim: int, known: Form | None) -> Form:
    """Return the form over `dim`, -1 or 1, for inputs of `rank` dimensions.

    Args:
        trials: Runs the forward.
        rank: The number of dimensions.
        dim: The normalised dimension.
        known: The form for another rank, if there is one.

    Raises:
        NotANorm: no form agrees with each run.
    """
    if rank == 1 and known is None:
        raise NotANorm("one row does not tell")
    candidates, strides = [] if known is None else [known], ""
    for size, training, scale in _settings(trials.size, known):
        try:
            module, twin, tensors = trials.modules(size, training, scale)
            run = trials.run(module, tensors, rank, dim, size)
        except Failed:
            if size == trials.size or not trials.size:
                raise
            continue  # a class may know its size, and refuse any other
        if dim == 1 and any(t.numel() not in (1, size) for t in tensors.values()):
            raise NotANorm("its tensors are no scales of the normalised dimension")
        candidates = candidates or every_form(run, dim, trials.size)
        if rank > 1 and (trials.size or not strides):  # eps may depend on the size
            candidates = [form._replace(eps=eps_of(form, run)) for form in candidates]
        candidates = [form for form in candidates if agrees(form, run)]
        if not candidates:
            raise NotANorm("its values or gradients are not those of RMSNorm or LayerNorm")
        if known is None:
            _check_specials(trials, module, run, rank, candidates[0])
            if scale == 1.0:  # float16 holds the output
                _check_dtypes(trials, module, run, candidates[0])
        _check_modes(trials, (module, twin), run)
        strides = _strides(trials, module, rank, dim, size)
        if known is not None:
            return known._replace(strides=strides)
    return candidates[0]._replace(strides=strides)


def _settings(own: int, known: Form | None) -> list[tuple[int, bool, float]]:
    """Return sizes, modes, and scales of the tensors. The module's own size comes last."""
    if known is not None:
        settings = [(12, False, 3e4)]
    elif own:
        settings = [(8, True, 1.0), (12, False, 3e4)]
    else:  # in 4096 features a row with one large value has xhat = 64
        settings = [(8, True, 1.0), (12, False, 3e4), (4096, True, 1.0)]
    return [*settings, (own, True, 1.0)] if own else settings


@torch.no_grad()
def _check_modes(trials: Trials, modules: tuple[StandIn, StandIn], run: Run) -> None:
    """Check that both modes give the values of the run."""
    for module in modules:
        if not torch.allclose(trials.call(module, run.x), run.y, 1e-5, 0.0, True):
            raise NotANorm("its values depend on the mode, or on chance")


@torch.no_grad()
def _check_dtypes(trials: Trials, module: StandIn, run: Run, form: Form) -> None:
    """Check that a low-precision x gives the same values, if the forward takes one."""
    for dtype in (torch.bfloat16, torch.float16):
        x = trials.random(*run.x.shape).to(dtype)
        try:
            y = trials.call_as_it_is(module, x)
        except NotANorm:
            raise
        except Exception:  # stock has no kernel for it, or refuses it
            continue
        exact = values_of(form, run._replace(x=x))
        if not is_near(y.double().movedim(form.dim, -1), exact, exact, 0.05):
            raise NotANorm(f"it computes something else of {dtype}")


@torch.no_grad()
def _check_specials(trials: Trials, module: StandIn, run: Run, rank: int, form: Form) -> None:
    """Check that NaN and inf come out where PyTorch's norm gives them."""
    size = run.x.shape[form.dim]
    x = trials.input(rank, form.dim, size, specials=True)
    rows = x.movedim(form.dim, -1)
    if form.norm == "rms_norm":
        exact = torch.rms_norm(rows, (size,), None, form.eps)
    else:
        exact = torch.layer_norm(rows, (size,), None, None, form.eps)
    exact = exact * scale_of(form, run)
    y = trials.call(module, x).movedim(form.dim, -1)
    if not (torch.equal(y.isnan(), exact.isnan()) and torch.equal(y.isinf(), exact.isinf())):
        raise NotANorm("NaN or inf comes out of it elsewhere")


@torch.no_grad()
def _strides(trials: Trials, module: StandIn, rank: int, dim: int, size: int) -> str:
    """Return the `strides` of the form."""
    x = trials.input(rank, dim, size)
    if rank == 1:
        return "input"
    inputs = [x, x.transpose(0, dim).contiguous().transpose(0, dim)]
    outputs = [trials.call(module, each) for each in inputs]
    if all(x.stride() == y.stride() for x, y in zip(inputs, outputs, strict=True)):
        return "input"
    if all(y.movedim(dim, -1).is_contiguous() for y in outputs):
        return "last"
    if all(y.is_contiguous() for y in outputs):
        return "contiguous"
    raise NotANorm("its output has other strides")
