"""Exchange: a function of PyTorch runs other code for a while, and stays the same object."""

from __future__ import annotations

import functools
import inspect
import pickle
import textwrap
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support import autocast, exchanged_functions, output_dtype, run_forked

import lpln_autopatch as lpln
from lpln_autopatch import _norms, low_precision_layernorm

BF16, FP32 = torch.bfloat16, torch.float32


LayerNorm = torch.nn.LayerNorm


@pytest.mark.parametrize("how", ["enable", "block"])
def test_functions_are_the_same_objects_at_all_times(how):
    """The functions' code alone is ours while a request is active, and PyTorch's own otherwise."""
    before, forward = exchanged_functions(), vars(LayerNorm)["forward"]
    codes = [function.__code__ for function in before]
    for _ in range(2):
        with {"enable": lpln.enable, "block": low_precision_layernorm}[how](norms="all"):
            assert all(a is b for a, b in zip(before, exchanged_functions(), strict=True))
            assert not any(f.__code__ is c for f, c in zip(before, codes, strict=True))
        # Checkpointing remembers what its forwards run under, until disable().
        ours = len(_norms.FUNCTIONS) + 1
        assert all(f.__code__ is c for f, c in zip(before[:ours], codes, strict=False))
        assert vars(LayerNorm)["forward"] is forward
        lpln.disable()
        assert all(f.__code__ is c for f, c in zip(before, codes, strict=True))
        assert all(a is b for a, b in zip(before, exchanged_functions(), strict=True))


@pytest.mark.parametrize("bound", ["before", "while active"])
def test_function_that_was_bound_early_is_lowered(bound):
    """A function is lowered that an import, a partial or an attribute bound, however early."""
    x = torch.randn(4, 8)
    if bound == "while active":
        lpln.enable()
    by_name, partial = F.layer_norm, functools.partial(F.layer_norm, normalized_shape=(8,))
    lpln.enable()
    with autocast():
        assert by_name(x, (8,)).dtype is partial(x).dtype is BF16
    lpln.disable()
    with autocast():
        assert by_name(x, (8,)).dtype is partial(x).dtype is FP32


@pytest.mark.parametrize("when", ["before", "active", "after a block", "after disable"])
def test_what_holds_a_function_can_be_pickled(when):
    """A pickle made in any order of activation holds PyTorch's own function."""
    held = functools.partial(F.layer_norm, normalized_shape=(8,))
    if when == "active":
        lpln.enable()
    if when != "before":
        with low_precision_layernorm():
            held = functools.partial(F.layer_norm, normalized_shape=(8,))
    if when == "after disable":
        lpln.enable()
        lpln.disable()
    assert pickle.loads(pickle.dumps(held)).func is F.layer_norm
    lpln.disable()
    assert pickle.loads(pickle.dumps(held)).func is F.layer_norm


def test_signature_and_source_are_pytorchs():
    """Names, defaults, keywords, annotations and docstring, while active as otherwise."""

    def seen() -> list[object]:
        exchanged = [getattr(F, name) for name in _norms.FUNCTIONS]
        return [
            (inspect.signature(f), inspect.getsource(f), f.__doc__, f.__name__)
            for f in (*exchanged, LayerNorm.forward)
        ]

    stock = seen()
    lpln.enable(norms="all")
    assert seen() == stock


@pytest.mark.parametrize("name", ["forward", "layer_norm"])
def test_mock_around_an_activation_hides_nothing(layer_norm, name):
    """mock.patch puts the original back over what we did meanwhile: lowered, until disable()."""
    holder = LayerNorm if name == "forward" else F
    original = vars(holder)[name]
    with mock.patch.object(holder, name, lambda *args, **kwargs: args[-1]):
        lpln.enable()
    assert vars(holder)[name] is original
    assert lpln.status().installed
    assert output_dtype(layer_norm) is BF16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lpln.disable()
    assert output_dtype(layer_norm) is FP32
    assert vars(holder)[name] is original


FIRST = """
import sys, torch
import torch.nn.functional as F
original = F.layer_norm
F.layer_norm = torch.layer_norm if sys.argv[1] == "builtin" else lambda *args: original(*args) + 1
import lpln_autopatch
try:
    lpln_autopatch.enable()
except RuntimeError as error:
    print(error)
    lpln_autopatch.enable(norms="group_norm")
    lpln_autopatch.disable()
    F.layer_norm = original
    lpln_autopatch.enable()
with torch.autocast("cpu", torch.bfloat16):
    print(F.layer_norm(torch.randn(2, 8), (8,)).dtype, original(torch.randn(2, 8), (8,)).dtype)
"""


def test_first_activation_looks_through_no_objects():
    """The collector's search takes 100 ms in all, and is for what a closure hides."""
    code = """
        import gc, torch
        gc.get_referrers = None
        import lpln_autopatch
        lpln_autopatch.enable(norms="all")
        print(lpln_autopatch.status().installed)
    """
    assert run_forked("-c", textwrap.dedent(code)).stdout == "True\n"


def test_function_that_a_closure_hides_is_found():
    """Somebody was there before the first activation: what they call is lowered."""
    assert run_forked("-c", FIRST, "closure").stdout == "torch.bfloat16 torch.bfloat16\n"


def test_function_that_is_no_python_function_is_named():
    """A builtin in its place has no code to exchange: a RuntimeError, and nothing has changed."""
    error, after = run_forked("-c", FIRST, "builtin").stdout.splitlines()
    assert error.startswith("torch.nn.functional.layer_norm is <built-in method layer_norm")
    assert after == "torch.bfloat16 torch.bfloat16"
