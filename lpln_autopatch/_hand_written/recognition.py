"""Recognise a norm that a class computes by hand: run its forward, and compare with the norms.

The forward runs on small random float32 inputs on the CPU. It must give the values and gradients
of RMSNorm or LayerNorm to float32 rounding: at several scales and sizes, for rows of zeros, in
training and in evaluation mode, and NaN and inf where those give them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lpln_autopatch._hand_written import form as forms
from lpln_autopatch._hand_written.form import Form, Run, agrees, every_form, is_near, scale_of
from lpln_autopatch._hand_written.stand_in import (
    NotANorm,
    Shape,
    StandIn,
    State,
    generators_kept,
    resized,
    sizes_in,
)


class Failed(NotANorm):
    """The forward raised in every trial, perhaps for a reason of the moment."""


def recognise(cls: type, forward: Callable[..., Any], state: State) -> dict[int, Form | NotANorm]:
    """Return the form of `forward`, or why it has none, for each number of input dimensions.

    To be called in a new thread, where neither autocast nor any mode is active.

    Args:
        cls: The class of the module.
        forward: Takes the module and one tensor.
        state: The attributes that it may read from the module.

    Raises:
        NotANorm: it is neither RMSNorm nor LayerNorm, whatever its input.
    """
    shapes = {name: value for name, value in state.items() if isinstance(value, Shape)}
    if any(math.prod(shape[:-1]) > 1024 for shape in shapes.values()):
        raise NotANorm("its tensors have too many rows")
    if len(shapes) > 2:
        raise NotANorm(f"it reads more than two tensors: {', '.join(shapes)}")
    results: list[dict[int, Form | NotANorm]] = []
    with generators_kept():
        for size in sizes_in(state):
            results.append(_recognise(_Trials(cls, forward, state, size)))
            if any(isinstance(result, Form) for result in results[-1].values()):
                return results[-1]
    if not results:
        raise NotANorm("its tensors have different sizes")
    return results[0]


def _recognise(trials: _Trials) -> dict[int, Form | NotANorm]:
    found: dict[int, Form | NotANorm] = {}
    for rank, dim in _RANKS:
        if isinstance(found.get(rank), Form):
            continue
        # A form that is known for another rank need only be confirmed for this one.
        known = [f for f in found.values() if isinstance(f, Form) and f.dim == dim][:1]
        try:
            found[rank] = trials.form(rank, dim, known)
        except NotANorm as error:
            found.setdefault(rank, error)
    return found


# Pairs of a number of dimensions and the normalised one, the likeliest first.
_RANKS = ((3, -1), (3, 1), (2, -1), (4, -1), (4, 1), (5, -1), (5, 1), (1, -1))
_BATCHES = {1: (), 2: (9,), 3: (5, 2), 4: (3, 2, 2), 5: (3, 2, 1, 2)}
_SCALES = (1.0, 0.0, 1e-4, 1e-2, 1e2, 1e6)  # of the first rows


class _Trials:
    """Runs of a forward for modules of `size` features, or of any if that is 0."""

    def __init__(self, cls: type, forward: Callable[..., Any], state: State, size: int) -> None:
        self._cls, self._forward, self._state, self._size = cls, forward, state, size
        self._generator = torch.Generator().manual_seed(0)

    def form(self, rank: int, dim: int, known: Sequence[Form]) -> Form:
        """Return the form over `dim`, -1 or 1, for inputs of `rank` dimensions.

        Args:
            rank: The number of dimensions.
            dim: The normalised dimension.
            known: The form for another rank, if there is one.

        Raises:
            NotANorm: no form agrees with each run.
        """
        if rank == 1 and not known:
            raise Failed("one row does not tell")
        candidates, strides = known, ""
        for size, training, scale in self._trials(known):
            try:
                module, twin, tensors = self._modules(size, training, scale)
                run = self._run(module, tensors, rank, dim, size)
            except Failed:
                if size == self._size or not self._size:
                    raise
                continue  # a class may know its size, and refuse any other
            if dim == 1 and any(t.numel() not in (1, size) for t in tensors.values()):
                raise NotANorm("its tensors are no scales of the normalised dimension")
            candidates = candidates or every_form(run, dim, self._size)
            if rank > 1 and (self._size or not strides):  # eps may depend on the size
                candidates = [form._replace(eps=forms.eps_of(form, run)) for form in candidates]
            candidates = [form for form in candidates if agrees(form, run)]
            if not candidates:
                raise NotANorm("its values or gradients are not those of RMSNorm or LayerNorm")
            if not known:
                self._check_specials(module, run, rank, candidates[0])
            if scale == 1.0 and not known:  # float16 holds the output
                self._check_dtypes(module, run, candidates[0])
            with torch.no_grad():
                for each in (module, twin):
                    if not torch.allclose(self._call(each, run.x), run.y, 1e-5, 0.0, True):
                        raise NotANorm("its values depend on the mode, or on chance")
            strides = self._strides(module, rank, dim, size)
            if known:
                return known[0]._replace(strides=strides)
        return candidates[0]._replace(strides=strides)

    def _trials(self, known: Sequence[Form]) -> list[tuple[int, bool, float]]:
        """Return sizes, modes, and scales of the tensors. Its own size comes last."""
        trials = [(8, True, 1.0), (12, False, 3e4)]
        if not self._size and not known:
            trials.append((4096, True, 1.0))  # where a row with one large value has xhat = 64
        return [*trials[len(known) :], *[(self._size, True, 1.0)] * bool(self._size)]

    def _modules(
        self, size: int, training: bool, scale: float
    ) -> tuple[StandIn, StandIn, dict[str, Tensor]]:
        """Return a module, one in the other mode, and the tensors that both have."""
        state = self._state
        if self._size:
            state = resized(state, self._size, size)
        tensors: dict[str, Tensor] = {
            name: torch.nn.Parameter(scale * self._random(*value))
            for name, value in state.items()
            if isinstance(value, Shape)
        }
        modules = [StandIn(self._cls, state, tensors, mode) for mode in (training, not training)]
        return modules[0], modules[1], tensors

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")

    def _input(
        self, rank: int, dim: int, size: int, zeros: bool = True, specials: bool = False
    ) -> Tensor:
        """Return an input whose rows have several scales."""
        batch = list(_BATCHES[rank])
        for shape in self._state.values():
            if isinstance(shape, Shape) and dim == -1:  # such as (heads, 1, size)
                for at, n in enumerate(reversed(shape[:-1])):
                    if n != 1 and at < len(batch):
                        batch[-1 - at] = n
        rows = self._random(math.prod(batch), size)
        for row, scale in zip(rows, _SCALES, strict=False):
            row *= scale if zeros or scale else 1.0
        rows[6:7, 0] *= 1e3 * size  # one value that is larger than the rest of its row
        if specials:
            for row, value in zip(rows, (math.nan, 0.0, math.inf, -math.inf), strict=False):
                row[0] = value
        return rows.reshape(*batch, size).movedim(-1, dim).contiguous()

    def _call(self, module: StandIn, x: Tensor) -> Tensor:
        try:
            y = module.run(self._forward, x)
        except NotANorm:
            raise
        except Exception as error:
            message = str(error).strip().partition("\n")[0]
            raise Failed(f"its forward raises {type(error).__name__}: {message}") from None
        if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype is not torch.float32:
            raise NotANorm("its output has not the shape and dtype of its input")
        return y

    def _run(
        self, module: StandIn, tensors: Mapping[str, Tensor], rank: int, dim: int, size: int
    ) -> Run:
        x = self._input(rank, dim, size).requires_grad_()
        y = self._call(module, x)
        if y.isnan().any():  # a row of zeros gives NaN if there is no eps, and so do its gradients
            x = self._input(rank, dim, size, zeros=False).requires_grad_()
            y = self._call(module, x)
        if not y.requires_grad:
            raise NotANorm("its output has no gradient")
        dy = self._random(*x.shape)
        gradients = forms.gradients_of(y, dy, [x, *tensors.values()])
        if any(gradient is None for gradient in gradients):
            raise NotANorm("a tensor that it reads gets no gradient")
        return Run(x, y, tensors, dy, gradients)

    @torch.no_grad()
    def _check_dtypes(self, module: StandIn, run: Run, form: Form) -> None:
        """Check that a low-precision x gives the same values, if the forward takes one."""
        for dtype in (torch.bfloat16, torch.float16):
            x = self._random(*run.x.shape).to(dtype)
            try:
                y = module.run(self._forward, x)
            except NotANorm:
                raise
            except Exception:  # stock has no kernel for it, or refuses it
                continue
            exact = forms.values_of(form, run._replace(x=x))
            if not is_near(y.double().movedim(form.dim, -1), exact, exact, 0.05):
                raise NotANorm(f"it computes something else of {dtype}")

    @torch.no_grad()
    def _check_specials(self, module: StandIn, run: Run, rank: int, form: Form) -> None:
        """Check that NaN and inf come out where PyTorch's norm gives them."""
        size = run.x.shape[form.dim]
        x = self._input(rank, form.dim, size, specials=True)
        rows = x.movedim(form.dim, -1)
        if form.norm == "rms_norm":
            exact = torch.rms_norm(rows, (size,), None, form.eps)
        else:
            exact = torch.layer_norm(rows, (size,), None, None, form.eps)
        exact = exact * scale_of(form, run)
        y = self._call(module, x).movedim(form.dim, -1)
        if not (torch.equal(y.isnan(), exact.isnan()) and torch.equal(y.isinf(), exact.isinf())):
            raise NotANorm("NaN or inf comes out of it elsewhere")

    @torch.no_grad()
    def _strides(self, module: StandIn, rank: int, dim: int, size: int) -> str:
        """Return the `strides` of the form."""
        x = self._input(rank, dim, size)
        if rank == 1:
            return "input"
        inputs = [x, x.transpose(0, dim).contiguous().transpose(0, dim)]
        outputs = [self._call(module, each) for each in inputs]
        if all(x.stride() == y.stride() for x, y in zip(inputs, outputs, strict=True)):
            return "input"
        if all(y.movedim(dim, -1).is_contiguous() for y in outputs):
            return "last"
        if all(y.is_contiguous() for y in outputs):
            return "contiguous"
        raise NotANorm("its output has other strides")
