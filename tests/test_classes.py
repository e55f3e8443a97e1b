"""Classes of hand-written norms: which are exchanged, when, and given back."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
import textwrap

import hand_written_norms
import pytest
import torch
from hand_written_norms import (
    LlamaRMSNorm,
    Norm,
    by_hand,
    needs_hand_written,
    run,
)
from torch import nn

import lpln_autopatch as lpln
from lpln_autopatch import low_precision_layernorm

pytestmark = needs_hand_written
BF16, FP32 = torch.bfloat16, torch.float32


def test_classes_of_every_kind_are_made_and_run_as_stock():
    """A class that cannot be exchanged or tried raises nothing of ours, and runs stock."""
    norm = hand_written_norms.norm

    with by_hand():

        class PartialNorm(Norm):
            forward = functools.partialmethod(lambda self, x, k: norm(x), k=1)

        class KeywordNorm(Norm):
            def forward(self, x, *, gate=None):
                return norm(x) if gate is None else gate * norm(x)

        class LazyNorm(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.UninitializedParameter()

            def forward(self, x):
                return norm(x) if nn.parameter.is_lazy(self.weight) else self.weight * norm(x)

        class AttributeNorm(Norm):
            def __getattr__(self, name):
                if name not in ("weight", "bias"):
                    raise KeyError(name)
                return super().__getattr__(name)

            def forward(self, x):
                return norm(x) * self.weight

        class NoBackward(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return norm(x)

        class FunctionNorm(Norm):
            def forward(self, x):
                return NoBackward.apply(x)

        class MethodNorm(Norm):
            def scaled(self, x):
                return norm(x)

            def forward(self, x):
                return self.scaled(x)

        x = torch.randn(4, 8)
        with torch.no_grad():
            for cls in (PartialNorm, LazyNorm, AttributeNorm, FunctionNorm):
                assert run(cls(), x).dtype is FP32, cls
            module = MethodNorm()
            assert run(KeywordNorm(), x).dtype is run(module, x).dtype is BF16
            module.scaled = lambda x: 3 * norm(x)
            assert torch.equal(run(module, x), 3 * norm(x))


def test_forward_that_is_replaced_on_the_class_is_not_ours():
    """A forward that somebody puts in place of a class's, as Liger does, runs as it is."""
    ran = []

    class RMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states)

    def kernel(self, hidden_states):
        ran.append(self)
        return LlamaRMSNorm.forward(self, hidden_states)

    module, x = RMSNorm(), torch.randn(4, 8)
    with by_hand():
        assert run(module, x).dtype is BF16
        RMSNorm.forward = kernel
        assert run(module, x).dtype is FP32
        other = RMSNorm()
        other.forward = functools.partial(kernel, other)
        assert run(other, x).dtype is FP32
    assert ran == [module, other]


def test_way_in_reaches_every_instance_and_every_holder():
    """Instances and classes made before and after, copies, bound methods, subclasses."""
    before, x = LlamaRMSNorm(), torch.randn(4, 8)
    bound = before.forward
    lpln.enable("bf16", norms="hand_written")

    class LaterRMSNorm(Norm):
        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    class Subclass(LlamaRMSNorm):
        pass

    class SubclassNorm(LlamaRMSNorm):
        pass

    inner = nn.Sequential(nn.Linear(8, 8), LaterRMSNorm())
    everyone = [before, bound, copy.deepcopy(before), LaterRMSNorm(), inner, SubclassNorm()]
    everyone.append(pickle.loads(pickle.dumps(before)))
    for module in everyone:
        assert run(module, x).dtype is BF16
    assert run(Subclass(), x).dtype is FP32  # its name is not that of a norm
    lpln.disable()
    for module in everyone[:-1]:
        assert run(module, x).dtype is FP32


def test_disable_gives_everything_back():
    """Forwards have their own code, and nn.Module no hook; the function object stays."""
    function, code = LlamaRMSNorm.forward, LlamaRMSNorm.forward.__code__
    module, x = LlamaRMSNorm(), torch.randn(4, 8)
    expected = run(module, x)
    with low_precision_layernorm(norms="layer_norm,group_norm,rms_norm"):
        assert function.__code__ is code
        assert "__init_subclass__" not in vars(nn.Module)
    for _ in range(2):
        with by_hand():
            assert LlamaRMSNorm.forward is function
            assert function.__code__ is not code
        assert torch.equal(run(module, x), expected)
        lpln.disable()
        assert function.__code__ is code
        assert "__init_subclass__" not in vars(nn.Module)


def test_hook_of_somebody_else_on_new_classes_stays(monkeypatch):
    """A hook beneath ours is called, and a hook above ours is not taken off."""
    seen = []
    theirs = classmethod(lambda cls, **kwargs: seen.append(cls))
    monkeypatch.setattr(nn.Module, "__init_subclass__", theirs, raising=False)
    with by_hand():
        made = type("MadeNorm", (nn.Module,), {})
        assert seen == [made]
    lpln.disable()
    assert vars(nn.Module)["__init_subclass__"] is theirs
    lpln.enable("bf16", norms="hand_written")
    monkeypatch.setattr(nn.Module, "__init_subclass__", theirs)
    lpln.disable()
    assert vars(nn.Module)["__init_subclass__"] is theirs


def test_class_keywords_and_errors_of_classes_are_pythons():
    """Our hook takes no keyword of a class away, and a wrong one is Python's error."""
    with by_hand():

        class Base(nn.Module):
            def __init_subclass__(cls, tag=None, **kwargs):
                super().__init_subclass__(**kwargs)
                cls.tag = tag

        class TaggedRMSNorm(Base, tag="x"):
            pass

        assert TaggedRMSNorm.tag == "x"
        with pytest.raises(TypeError, match="__init_subclass__"):
            type("WrongNorm", (nn.Module,), {}, wrong=1)


def test_class_that_is_imported_by_unpickling_is_lowered(tmp_path):
    """A class is lowered that unpickling imports, in a process that has never seen it."""
    (tmp_path / "model.py").write_text(
        "import torch\n"
        "class RMSNorm(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)\n"
    )
    script = textwrap.dedent("""
        import pickle, sys, torch
        if sys.argv[1] == "dump":
            import model
            pickle.dump(model.RMSNorm(), open("norm.pkl", "wb"))
        module = pickle.load(open("norm.pkl", "rb"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            print(module(torch.randn(4, 8)).dtype)
    """)
    (tmp_path / "program.py").write_text(script)
    import os

    for mode, variables, dtype in (
        ("dump", {}, "torch.float32"),
        ("load", {"LPLN_PRECISION": "amp", "LPLN_NORMS": "all"}, "torch.bfloat16"),
    ):
        done = subprocess.run(
            [sys.executable, "program.py", mode],
            cwd=tmp_path,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == dtype, done.stderr
