"""NVIDIA apex's fused LayerNorm."""

from __future__ import annotations

import functools
import importlib
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from lpln_autopatch._torch_compat import (
    autocast_disabled,
    forward_mode_is_on,
    something_intercepts_operators,
)
from lpln_autopatch.backends import native
from lpln_autopatch.backends.gradients import can_be_saved
from lpln_autopatch.backends.protocol import Affine, Backend, Shape

_BUILD = (
    "Build it from source: git clone https://github.com/NVIDIA/apex, and in that folder "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ./"
)

# What a class has that lets PyTorch's operators run on its tensors as they are.
_NO_DISPATCH = getattr(Tensor, "__torch_dispatch__", None)


def load() -> Backend:
    """Return `normalise`. Without NVIDIA apex and its CUDA extension raise ImportError."""
    _find()
    return normalise


def load_lean() -> Backend:
    """Return `normalise_memory_efficient`. If apex is missing or too old raise ImportError."""
    # The source is read, not imported: torch and CUDA must be up before its extension loads.
    source = _find() / "normalization" / "fused_layer_norm.py"
    if "memory_efficient" not in source.read_text():
        raise ImportError(f"this NVIDIA apex has no memory_efficient: it is older. {_BUILD}")
    return normalise_memory_efficient


def _find() -> Path:
    """Return the folder of NVIDIA apex, and make sure that its CUDA extension is there."""
    apex = find_spec("apex")
    if apex is None or apex.origin is None:  # a clone's folder has no origin
        raise ImportError(f"NVIDIA apex is not installed. {_BUILD}")
    # It is found, not imported: the other project of this name needs packages of its own.
    normalization = PathFinder.find_spec("apex.normalization", apex.submodule_search_locations)
    if normalization is None or not apex.submodule_search_locations:
        raise ImportError(
            f"{apex.origin} is not NVIDIA's. The package index has an unrelated "
            f"project of the same name: pip uninstall apex. {_BUILD}"
        )
    if find_spec("fused_layer_norm_cuda") is None:
        raise ImportError(
            f"NVIDIA apex is installed without its CUDA extension (fused_layer_norm_cuda). {_BUILD}"
        )
    return Path(apex.submodule_search_locations[0])


def normalise(
    x: Tensor,
    normalized_shape: Shape,
    weight: Affine,
    bias: Affine,
    eps: float,
    dtype: torch.dtype,
    **options: bool,
) -> Tensor:
    """Normalise as a `Backend`: by apex's kernel where it can, natively elsewhere.

    x, weight and bias are rounded to `dtype` first. `options` are those of apex's functions.

    Source:
        NVIDIA apex, `fused_layer_norm_affine` and `fused_layer_norm`.
    """
    if not _takes(x, weight, bias, dtype):
        return native.normalise(x, normalized_shape, weight, bias, eps, dtype)
    # It is imported here, not at the top: torch and CUDA must be up before its extension loads.
    fused = importlib.import_module("apex.normalization.fused_layer_norm")
    shape = tuple(normalized_shape)
    y: Tensor
    # apex casts by itself, but only to what CUDA autocast says and only if it is on.
    with autocast_disabled():
        x = x.to(dtype=dtype)
        if weight is None or bias is None:
            y = fused.fused_layer_norm(x, shape, eps, **options)
        else:
            weight, bias = weight.to(dtype=dtype), bias.to(dtype=dtype)
            y = fused.fused_layer_norm_affine(x, weight, bias, shape, eps, **options)
    return y


normalise_memory_efficient = functools.partial(normalise, memory_efficient=True)
"""`normalise` with apex's option to keep the output for backward, and not x.

Source:
    NVIDIA apex, pull request 1715. A weight that is smaller than eps counts as eps in its
    backward: the gradient of such a weight is wrong.
"""


def _takes(x: Tensor, weight: Affine, bias: Affine, dtype: torch.dtype) -> bool:
    return (
        x.is_cuda
        # A kernel of one dtype would round an x of another low precision twice.
        and x.dtype in (torch.float32, dtype)
        # Its kernels have both parameters or none, and want a row.
        and (weight is None) == (bias is None)
        and x.numel() > 0
        # Its autograd function has no formula for functorch's transforms and for forward mode.
        # Its extension reads memory, and a fake tensor has none.
        and not something_intercepts_operators()
        and not forward_mode_is_on()
        and all(
            t is None
            or (getattr(type(t), "__torch_dispatch__", None) is _NO_DISPATCH and can_be_saved(t))
            for t in (x, weight, bias)
        )
    )
