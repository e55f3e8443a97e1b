"""An accelerator that computes shapes and dtypes alone, with CUDA's autocast policy.

It is a device made in Python. A model of any size runs forward and backward on it in
seconds. Because the device is not the CPU, the model and our code take their branches for a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lpln_autopatch.bench.policy import Policy, policy

NAME = "emulated"


# torch calls these functions of a module of devices; ours becomes `torch.emulated`.
_DEVICE = SimpleNamespace(
    is_available=lambda: True,
    is_initialized=lambda: True,
    device_count=lambda: 1,
    current_device=lambda: 0,
    _is_in_bad_fork=lambda: False,
    manual_seed_all=lambda seed: None,
    get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
)


@functools.cache
def add_device() -> None:
    """Give this process the accelerator, for good.

    Call it before the first backward, in which autograd makes a queue for each existing device.
    """
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, _DEVICE)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Run the kernel that a GPU would: flash, or with a mask or in float32 the efficient kernel."""
    aten: Any = torch.ops.aten
    if enable_gqa and key.shape[1] != query.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    if attn_mask is None and query.dtype is not torch.float32:
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    efficient = aten._scaled_dot_product_efficient_attention
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -1e9)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2]).to(query.dtype)
    wants_gradient = torch.is_grad_enabled() and query.requires_grad
    return efficient(
        query, key, value, attn_mask, wants_gradient, dropout_p, is_causal, scale=scale
    )[0]


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: Any = None) -> Tensor:
    """Run RMSNorm as one kernel, as CUDA does since torch 2.9. Without it torch would run ten."""
    y: Tensor = _rms_norm_kernel()(x, weight)[0]
    return y


@functools.cache
def _rms_norm_kernel() -> Any:
    """Return a differentiable RMSNorm, which keeps x, weight, and 1 / rms of each row."""

    @torch.library.custom_op(f"{NAME}::rms_norm", mutates_args=())
    def forward(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)

    @torch.library.custom_op(f"{NAME}::rms_norm_backward", mutates_args=())
    def backward(
        dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(x[0] if weight is None else weight)

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)  # rstd has no gradient
        x, weight = inputs
        ctx.save_for_backward(x, output[1], weight)

    def differentiate(ctx: Any, dy: Tensor, _: Tensor) -> Any:
        dx, dweight = backward(dy, *ctx.saved_tensors)
        return dx, None if ctx.saved_tensors[2] is None else dweight

    for kernel in (forward, backward):
        kernel.register_fake(kernel._init_fn)
    forward.register_autograd(differentiate, setup_context=keep)
    return forward


@contextlib.contextmanager
def accelerator() -> Iterator[Policy]:
    """Provide the device "emulated", with CUDA's policy and with tensors that hold no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    add_device()
    new: Any = torch.library.Library
    library = new("aten", "IMPL", "AutogradPrivateUse1")
    library.impl("scaled_dot_product_attention", _attention)
    library.impl("rms_norm", _rms_norm)
    try:
        with policy(NAME) as chosen, FakeTensorMode(allow_non_fake_inputs=True):
            yield chosen
    finally:
        library._destroy()


def move(model: torch.nn.Module, device: str = NAME) -> None:
    """Give a model new parameters and buffers on `device`, which hold no data."""
    moved: dict[int, Tensor] = {}

    def to_device(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            new = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
            )
            if isinstance(tensor, torch.nn.Parameter):
                new = torch.nn.Parameter(new, tensor.requires_grad)
            moved[id(tensor)] = new
        return moved[id(tensor)]

    for module in model.modules():
        each: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in each:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = to_device(tensor)
