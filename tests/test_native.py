"""The native backend: which way each input takes, and what that way runs.

On meta tensors as far as dtypes and operations go: to the backend they are an accelerator's. Values
and kernels on a GPU are in test_cuda.py.
"""

from __future__ import annotations

import pytest
import torch
from support import AUTOCAST_DTYPES, autocast

from lpln_autopatch._torch_compat import TORCH_VERSION, autocast_dtype
from lpln_autopatch.backends import native
from lpln_autopatch.bench.recipe import ComposerRecipe

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

needs_dispatch_mode = pytest.mark.skipif(
    TORCH_VERSION < (2, 0), reason="TorchDispatchMode and meta kernels of torch >= 2.0; CI has it"
)


class OnAnAccelerator(torch.Tensor):
    """A CPU tensor that says it is elsewhere."""

    is_cpu = False


def arguments(device: str, input_dtype: torch.dtype, parameter_dtype: torch.dtype = FP32):
    """x (4, 8), normalized_shape, weight, bias and eps of a call."""
    x = torch.randn(4, 8, device=device).to(input_dtype).requires_grad_()
    weight, bias = torch.randn(2, 8, device=device).to(parameter_dtype).unbind()
    return x, (8,), weight.detach().requires_grad_(), bias.detach().requires_grad_(), 1e-5


def operations(call: tuple, dtype: torch.dtype) -> list[str]:
    """What `native.normalise` runs on the device; its output has to be in `dtype`."""
    from torch.utils._python_dispatch import TorchDispatchMode

    names: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.__name__.split(".")[0])
            return function(*args, **(kwargs or {}))

    with Record():
        y = native.normalise(*call, dtype)
    assert y.dtype is dtype
    return names


@needs_dispatch_mode
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_accelerator_casts_the_parameters_only(dtype):
    """x in the autocast dtype: two small casts and one norm; x is not touched."""
    assert operations(arguments("meta", dtype), dtype) == [
        "_to_copy",
        "_to_copy",
        "native_layer_norm",
    ]
    assert operations(arguments("meta", dtype, dtype), dtype) == ["native_layer_norm"]
    x, shape, _, _, eps = arguments("meta", dtype)
    assert operations((x, shape, None, None, eps), dtype) == ["native_layer_norm"]


@needs_dispatch_mode
@pytest.mark.parametrize(("dtype", "other"), [(BF16, FP16), (FP16, BF16)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_input_of_the_other_dtype_is_rounded_once(device, dtype, other):
    """bfloat16 under float16 autocast, and the reverse: normalised in float32."""
    assert operations(arguments(device, other), dtype) == [
        "_to_copy",
        "native_layer_norm",
        "_to_copy",
    ]


@needs_dispatch_mode
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_cpu_casts_the_output_only(dtype):
    """A float32 x on CPU: one norm and one cast."""
    assert operations(arguments("cpu", FP32), dtype) == ["native_layer_norm", "_to_copy"]


@needs_dispatch_mode
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_gradients_keep_their_dtypes(device, dtype):
    """Gradients come back in the dtypes of x and of the parameters."""
    for input_dtype in (FP32, BF16, FP16):
        call = arguments(device, input_dtype)
        y = native.normalise(*call, dtype)
        gradients = torch.autograd.grad(y.sum(), [call[0], call[2], call[3]])
        assert [g.dtype for g in gradients] == [input_dtype, FP32, FP32]


@needs_dispatch_mode
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_inference_tensor_in_low_precision_can_be_trained_on(device):
    """Autograd cannot save an inference tensor; its float32 copy, as stock makes one, it can."""
    with torch.inference_mode():
        x = torch.randn(4, 8, device=device, dtype=BF16)
    _, shape, weight, bias, eps = arguments(device, BF16)
    y = native.normalise(x, shape, weight, bias, eps, BF16)
    gradients = torch.autograd.grad(y.sum(), [weight, bias])
    assert [g.dtype for g in gradients] == [FP32, FP32]


@pytest.mark.skipif(TORCH_VERSION < (2, 2), reason="the recipe's CPU kernels are in torch >= 2.2")
@pytest.mark.parametrize("dtype", AUTOCAST_DTYPES)
@pytest.mark.parametrize("in_low_precision", [False, True])
def test_low_precision_path_is_composers_recipe(dtype, in_low_precision):
    """Output and gradients of the accelerators' path are the recipe's, bit for bit."""
    x, shape, weight, bias, eps = arguments("cpu", dtype if in_low_precision else FP32)
    recipe = ComposerRecipe(shape, eps)
    recipe.load_state_dict({"weight": weight, "bias": bias})
    upstream = torch.randn(4, 8).to(dtype)
    with autocast(dtype):
        ours = native.normalise(x.as_subclass(OnAnAccelerator), shape, weight, bias, eps, dtype)
        assert autocast_dtype("cpu") is dtype  # on again behind the norm
        theirs = recipe(x)
    assert torch.equal(ours, theirs)
    got = torch.autograd.grad(ours, [x, weight, bias], upstream)
    expected = torch.autograd.grad(theirs, [x, recipe.weight, recipe.bias], upstream)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype is e.dtype
        assert torch.equal(g, e)


def test_exception_where_autocast_is_switched_off_switches_it_on_again(layer_norm):
    """The accelerators' path switches autocast off around the kernel: also if that raises."""
    x = torch.randn(4, 7, device="meta")
    with autocast():
        with pytest.raises(RuntimeError):
            native.normalise(x, (8,), layer_norm.weight, layer_norm.bias, 1e-5, BF16)
        assert autocast_dtype("cpu") is BF16
