"""The kernels of `fused` and `lean` as operators that compute shapes alone, for `bench count`.

The operators have the arguments and results of the kernels, and an autograd function keeps the same
tensors as `FusedNorm` for the weights and rows of a new model, where every feature can be
recovered. They are backends like those of other packages, so that nothing of this package is
replaced.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from importlib_metadata import Distribution, DistributionFinder
from torch import Tensor

from lpln_autopatch.backends import GROUP
from lpln_autopatch.backends.fused import grid
from lpln_autopatch.backends.fused.recovery import can_count, slots_for
from lpln_autopatch.backends.protocol import Affine, Shape

NAMES = {"fused": "counted_fused", "lean": "counted_lean"}
"""The name of the backend that counts the kernels of each backend."""

_MULTIPROCESSORS = 108  # of an A100


class Counted:
    """A `Backend` that runs the operators."""

    def __init__(self, lean: bool) -> None:
        self._lean = lean

    def __call__(
        self,
        x: Tensor,
        normalized_shape: Shape,
        weight: Affine,
        bias: Affine,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Count a LayerNorm."""
        y: Tensor = _Counted.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, len(normalized_shape), dtype, True, self._lean
        )
        return y

    def rms_norm(
        self, x: Tensor, normalized_shape: Shape, weight: Affine, eps: float, dtype: torch.dtype
    ) -> Tensor:
        """Count an RMSNorm."""
        y: Tensor = _Counted.apply(  # type: ignore[no-untyped-call]
            x, weight, None, len(normalized_shape), dtype, False, self._lean
        )
        return y


fused, lean = Counted(lean=False), Counted(lean=True)


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Affine,
        bias: Affine,
        n_dims: int,
        dtype: torch.dtype,
        centred: bool,
        lean: bool,
    ) -> Tensor:
        rows, ctx.n_dims = x.shape[:-n_dims].numel(), n_dims
        is_xhat = weight is None and bias is None
        recovers = lean and not is_xhat and can_count(weight)
        keeps_y = recovers or (lean and is_xhat)
        keeps_xhat = not keeps_y and x.dtype is torch.float32
        of_a_row = 1 if keeps_y or keeps_xhat else 1 + centred
        y, statistics, *others = _operators().forward(
            x, weight, bias, rows, of_a_row, dtype, keeps_xhat, recovers
        )
        kept = y if keeps_y else others[0] if keeps_xhat else x
        if recovers:
            features = x.numel() // rows
            reserved = x.new_empty(rows, slots_for(features), dtype=dtype)
            ctx.save_for_backward(kept, statistics, weight, bias, others[0], reserved)
        else:
            ctx.save_for_backward(kept, statistics, weight)
        ctx.dtypes = [torch.float32 if t is None else t.dtype for t in (x, weight, bias)]
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, statistics, weight, *rest = ctx.saved_tensors
        bias, slots = rest[:2] if rest else (None, None)
        wanted, features = ctx.needs_input_grad[:3], kept.shape[-ctx.n_dims :]
        _, programs, _ = grid.backward(statistics.shape[1], features.numel(), _MULTIPROCESSORS)
        dx, *partials = _operators().backward(
            dy, kept, weight, bias, statistics, slots, ctx.dtypes[0], wanted[0],
            programs * any(wanted[1:]), features.numel(),
        )  # fmt: skip
        sums: list[Tensor | None] = [None, None]
        if partials:
            both = _operators().reduce(partials[0], features, ctx.dtypes[1], ctx.dtypes[2])
            sums = [s if wants else None for s, wants in zip(both, wanted[1:], strict=True)]
        return dx if wanted[0] else None, *sums, None, None, None, None


class _Operators:
    """The kernels as operators. The bytes of their arguments and of their results are counted."""

    def __init__(self) -> None:
        for kernel in (self.forward, self.backward, self.reduce):
            name = kernel.__name__
            operator = torch.library.custom_op(f"emulated::norm_{name}", kernel, mutates_args=())
            operator.register_fake(kernel)
            setattr(self, name, operator)

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rows: int,
        of_a_row: int,
        dtype: torch.dtype,
        keeps_xhat: bool,
        recovers: bool,
    ) -> list[Tensor]:
        statistics = x.new_empty((of_a_row, rows), dtype=torch.float32)
        y, *xhat = (x.new_empty(x.shape, dtype=dtype) for _ in range(1 + keeps_xhat))
        slots_and_counts = (x.numel() // rows, 2) if recovers else ()
        return [
            y,
            statistics,
            *xhat,
            *(x.new_empty(n, dtype=torch.int32) for n in slots_and_counts),
        ]

    @staticmethod
    def backward(
        dy: Tensor,
        kept: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Tensor,
        slots: Tensor | None,
        dtype: torch.dtype,
        wants_dx: bool,
        programs: int,
        features: int,
    ) -> list[Tensor]:
        dx = kept.new_empty(kept.shape if wants_dx else 0, dtype=dtype)
        partials = dy.new_empty((2, programs, features), dtype=torch.float32)
        return [dx, partials] if programs else [dx]

    @staticmethod
    def reduce(
        partials: Tensor, shape: list[int], of_weight: torch.dtype, of_bias: torch.dtype
    ) -> list[Tensor]:
        return [partials.new_empty(shape, dtype=dtype) for dtype in (of_weight, of_bias)]


@functools.cache
def _operators() -> Any:
    return _Operators()


class _Package(Distribution):
    """A package that is not installed, and brings the backends."""

    def read_text(self, filename: str) -> str | None:
        lines = (f"{name} = {__name__}:{backend}" for backend, name in NAMES.items())
        texts = {
            "METADATA": "Metadata-Version: 2.1\nName: lpln_autopatch_counted\nVersion: 0\n",
            "entry_points.txt": "\n".join([f"[{GROUP}]", *lines]),
        }
        return texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(path)


class _Finder(DistributionFinder):
    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        yield _Package()

    def find_spec(self, *arguments: object) -> None:
        return None


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Let the backends `NAMES` be found, like those of an installed package."""
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
