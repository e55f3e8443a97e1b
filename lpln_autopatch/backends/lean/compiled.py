"""What lean keeps in compiled code: y in place of x, where there is neither weight nor bias.

With a weight, whether xhat can be recovered from y changes from step to step, and a graph cannot
follow: native's graph it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lpln_autopatch.backends import native
from lpln_autopatch.torch_compat import never_a_frame_of_its_own, run_while_compiling

if TYPE_CHECKING:
    from collections.abc import Sequence


def normalise(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Normalise `x` in float32 and round once, and keep no x for backward where y is xhat.

    Arguments and result are those of `lpln_autopatch.backends.Backend`.
    """
    if weight is None and bias is None and x.requires_grad and _only_a_first_derivative():
        y: torch.Tensor = _YIsXhat.apply(x, tuple(normalized_shape), eps, dtype)  # type: ignore[no-untyped-call]
        return y
    return native.lower(torch.layer_norm, x, normalized_shape, weight, bias, eps, dtype)


@run_while_compiling
def _only_a_first_derivative() -> bool:
    """Whether Dynamo traces for a plain backward, outside of the graph.

    It gives wrong second derivatives of any autograd function inside of one (2.13, with
    `trace_autograd_ops`), has no formula for functorch's, and an export shows the function.
    """
    import torch._dynamo.config as config

    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return not (
        getattr(config, "trace_autograd_ops", False)
        or torch._C._are_functorch_transforms_active()
        or exporting()
    )


class _YIsXhat(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, shape: tuple[int, ...], eps: float, dtype: torch.dtype
    ) -> torch.Tensor:
        y, _, rstd = torch.native_layer_norm(x.float(), shape, None, None, eps)
        y = y.to(dtype=dtype)
        ctx.save_for_backward(y, rstd)
        ctx.shape, ctx.dtype = shape, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, rstd = ctx.saved_tensors
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            dy.float(),
            y.float() / rstd,
            ctx.shape,
            torch.zeros_like(rstd),
            rstd,
            None,
            None,
            [True, False, False],
        )
        return dx.to(dtype=ctx.dtype), None, None, None


never_a_frame_of_its_own(normalise)
