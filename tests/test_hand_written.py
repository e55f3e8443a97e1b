"""Norms that classes write out: recognised by what they compute, and lowered."""

from __future__ import annotations

import copy
import functools
import pickle
import random
import subprocess
import sys
import textwrap
import threading
import time
import types

import hand_written_norms
import pytest
import torch
from hand_written_norms import (
    NEAR_MISSES,
    NORMS,
    CastingLayerNorm,
    CountingNorm,
    GatedRMSNorm,
    GemmaRMSNorm,
    HeadsRMSNorm,
    LayerNorm2d,
    LlamaRMSNorm,
    LoggingNorm,
    Norm,
    PermutingLayerNorm2d,
    SumNorm,
)
from support import needs_dynamo, needs_library
from torch import nn
from torch.utils.checkpoint import checkpoint

import lpln_autopatch as lpln
from lpln_autopatch import exempt, low_precision_layernorm, report
from lpln_autopatch._hand_written import kinds, recognition
from lpln_autopatch._torch_compat import DYNAMO_TELLS_FLOATS, HAS_RMS_NORM, TORCH_VERSION

pytestmark = pytest.mark.skipif(
    not HAS_RMS_NORM, reason="hand-written norms are lowered from torch 2.4 on; CI runs later ones"
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
autocast = functools.partial(torch.autocast, "cpu", dtype=BF16)
by_hand = functools.partial(low_precision_layernorm, norms="hand_written")


def run(module, x, **options):
    with autocast(**options):
        return module(x)


def gradients(module, x, dtype, lowered):
    """y, and the gradients of x and the parameters, lowered or in float64."""
    module = copy.deepcopy(module)
    x = x.detach().clone().requires_grad_()
    if lowered:
        with by_hand(), torch.autocast("cpu", dtype=dtype):
            y = module(x)
    else:
        module, x = module.double(), x.detach().double().requires_grad_()
        y = module(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    (y * dy).sum().backward()
    return y, [x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("make", NORMS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_norm_is_lowered_with_the_values_and_gradients_of_float64(make, dtype):
    """A norm is lowered in training and evaluation mode, for float32 and autocast inputs."""
    torch.manual_seed(0)
    module = make()
    x = torch.randn(NORMS[make])
    eps = torch.finfo(dtype).eps
    for given in (x, x.to(dtype)):
        for mode in (True, False):
            y, got = gradients(module.train(mode), given, dtype, lowered=True)
            exact, expected = gradients(module, given, dtype, lowered=False)
            assert y.dtype is dtype
            torch.testing.assert_close(y.double(), exact, rtol=2 * eps, atol=2 * eps)
            for ours, theirs in zip(got, expected, strict=True):
                assert (ours.double() - theirs).norm() <= 4 * eps * theirs.norm().clamp(min=1)
    assert y.stride() == run(module, x).stride()


@pytest.mark.parametrize("make", NORMS)
def test_norm_is_lowered_among_all(make):
    """A norm is lowered while the functions and methods that it calls are exchanged as well."""
    with low_precision_layernorm(norms="all"):
        assert run(make(), torch.randn(NORMS[make])).dtype is BF16


@pytest.mark.parametrize("make", NEAR_MISSES)
def test_near_miss_stays_stock_bit_for_bit(make):
    """A class that is nearly a norm, or does more, gives the output that it gives without us."""
    for training in (True, False):
        module = make().train(training)
        stock = copy.deepcopy(module)
        size = 256 if "Outlier" in make.__name__ else 8
        x = torch.cat([torch.randn(2, 3, size), 1e-4 * torch.randn(2, 3, size)])
        x[0, 0, 0] = 1e4
        inputs = [x, x.bfloat16() if make is not hand_written_norms.SequenceNorm else x]
        torch.manual_seed(0)
        with torch.no_grad():
            expected = [run(stock, x) for x in inputs for _ in range(3)]
        torch.manual_seed(0)
        with by_hand(), torch.no_grad():
            got = [run(module, x) for x in inputs for _ in range(3)]
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.dtype is theirs.dtype
            assert torch.equal(ours, theirs)


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


def test_vmap_over_parameters_keeps_strides_without_writing():
    """An image that is not batched, under weights that are."""
    module, x = LayerNorm2d(), torch.randn(2, 8, 3, 4)

    def call(weight):
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    weights = torch.randn(3, 8)
    with by_hand(), autocast():
        y = torch.vmap(call)(weights)
        assert y.dtype is BF16
        torch.testing.assert_close(y[1], call(weights[1]))


def test_forward_that_stores_something_runs_as_often_as_stock():
    """A counter and a log of its own hold what they hold without us."""
    counting, logging = CountingNorm(), LoggingNorm()
    x = torch.randn(2, 8)
    with by_hand():
        for _ in range(3):
            run(counting, x)
            run(logging, x)
    assert counting.calls == 3
    assert logging.log == [x.shape] * 3


def test_second_tensor_is_no_norm_and_a_gate_is_stock():
    """Two tensors are no norm's input; what has an optional one is a norm without it."""
    x, gated = torch.randn(2, 8), GatedRMSNorm()
    with by_hand(), autocast():
        assert SumNorm()(x, x).dtype is FP32
        assert gated(x).dtype is BF16
        assert gated(hidden_states=x).dtype is BF16
        assert gated(x, None).dtype is BF16
        assert gated(x, x).dtype is FP32
        assert gated(x, gate=x).dtype is FP32


@pytest.mark.parametrize(
    ("make", "shape"),
    [(LlamaRMSNorm, (2, 8)), (HeadsRMSNorm, (2, 3, 4, 8)), (LayerNorm2d, (2, 8, 3, 4))],
)
def test_shapes_are_taken_and_refused_as_by_stock(make, shape):
    """Broadcasts, empty inputs, and errors, with PyTorch's own message."""
    module = make()
    for dims in ((0, *shape[1:]), (*shape[:-1], 1), (1, *shape), shape[1:], (7,), shape):
        x = torch.randn(dims)
        outcomes = [_outcome(module, x)]
        with by_hand():
            outcomes.append(_outcome(module, x))
        assert outcomes[0] == outcomes[1]


def _outcome(module, x):
    try:
        return run(module, x).shape
    except (IndexError, RuntimeError) as error:
        return str(error)


@pytest.mark.parametrize(
    ("make", "shape", "memory"),
    [
        (LlamaRMSNorm, (2, 3, 4, 8), lambda x: x.transpose(1, 2)),
        (LlamaRMSNorm, (2, 3, 16), lambda x: x[..., :8]),
        (LlamaRMSNorm, (8, 3), lambda x: x.t()),
        (LayerNorm2d, (2, 8, 3, 4), lambda x: x.to(memory_format=torch.channels_last)),
        (lambda: PermutingLayerNorm2d(8), (2, 8, 3, 4), lambda x: x.clone()),
        (lambda: CastingLayerNorm(8), (2, 3, 4, 8), lambda x: x.transpose(1, 2)),
    ],
)
def test_output_has_the_strides_of_stocks(make, shape, memory):
    """The output of an input that is not contiguous has stock's strides, too."""
    module, x = make(), memory(torch.randn(shape))
    expected = run(module, x)
    with by_hand():
        y = run(module, x)
    assert y.dtype is BF16
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y.float(), expected, rtol=0.01, atol=0.01)


def test_float16_never_overflows():
    """x is not rounded first: 1e5, which float16 does not hold, is normalised in float32."""
    x = torch.randn(4, 8) * 1e5
    module = LlamaRMSNorm()
    with by_hand(), torch.autocast("cpu", dtype=FP16):
        y = module(x)
    assert y.dtype is FP16
    torch.testing.assert_close(y.float(), module(x), rtol=1e-3, atol=1e-3)


def test_nan_and_inf_come_out_where_stocks_do():
    """Rows with NaN, inf, -inf, and zeros."""
    x = torch.randn(5, 8)
    x[0, 1], x[1, 2], x[2, 3], x[3] = float("nan"), float("inf"), -float("inf"), 0
    for module in (LlamaRMSNorm(), CastingLayerNorm(8), HeadsRMSNorm(heads=1)):
        given = x if module.__class__ is not HeadsRMSNorm else x[None, None]
        expected = run(module, given)
        with by_hand():
            y = run(module, given)
        assert y.dtype is BF16
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())


def test_what_changes_later_is_followed_or_stock():
    """eps and weights are read at each call; a new option of the class decides anew."""

    class OptionRMSNorm(Norm):
        def __init__(self):
            super().__init__()
            self.cap = None

        def forward(self, x):
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
            return y if self.cap is None else y.clamp(-self.cap, self.cap)

    module, x = OptionRMSNorm(), torch.randn(4, 8)
    with by_hand():
        assert run(module, x).dtype is BF16
        module.eps = 10.0
        torch.testing.assert_close(run(module, x).float(), module(x), rtol=0.01, atol=0.01)
        assert run(module, x).dtype is BF16
        module.weight = nn.Parameter(torch.full((8,), 7.0))
        torch.testing.assert_close(run(module, x).float(), module(x), rtol=0.01, atol=0.01)
        module.cap = 0.5
        assert torch.equal(run(module, x), module(x))
        module.cap = None
        assert run(module, x).dtype is BF16


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


def test_parameters_are_read_through_attributes():
    """functional_call, a parametrization, and a weight that is a plain tensor, as in FSDP 1."""
    x = torch.randn(4, 8)

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    plain, parametrized, module = LlamaRMSNorm(), LlamaRMSNorm(), LlamaRMSNorm()
    expected = 2 * parametrized(x)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", Double())
    weight = plain.weight.detach().clone()
    del plain.weight
    plain.weight = 3 * weight
    with by_hand(), autocast():
        y = torch.func.functional_call(module, {"weight": torch.zeros(8)}, x)
        assert y.dtype is BF16
        assert not y.any()
        torch.testing.assert_close(parametrized(x).float(), expected, rtol=0.01, atol=0.01)
        assert parametrized(x).dtype is BF16
        assert plain(x).dtype is BF16
        torch.testing.assert_close(
            plain(x).float(), plain(x.double()).float(), rtol=0.01, atol=0.01
        )


def test_modes_of_the_caller_change_nothing():
    """A device block, inference mode, vmap, jvp-free transforms, a default dtype of bfloat16."""
    x = torch.randn(4, 8)

    def fresh():
        class FreshRMSNorm(Norm):  # that nobody has tried
            def forward(self, x):
                x = x.float()
                return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt())

        return FreshRMSNorm()

    with by_hand(), autocast():
        with torch.device("meta"):
            module = LlamaRMSNorm()
        module.to_empty(device="cpu").weight.data.fill_(1)
        with torch.device("meta"):
            assert module(x).dtype is BF16
            assert not module(x).is_meta
        with torch.inference_mode():
            assert fresh()(x).dtype is BF16
        assert torch.vmap(fresh())(x).dtype is BF16
        module = fresh()
        grad = torch.func.grad(lambda weight: _sum(module, weight, x))(module.weight.detach())
        assert grad.shape == (8,)
        torch.set_default_dtype(BF16)
        try:
            assert fresh()(x).dtype is BF16
        finally:
            torch.set_default_dtype(FP32)
        from torch._subclasses.fake_tensor import FakeTensorMode

        module = fresh()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert module(mode.from_tensor(x)).dtype is BF16
        assert fresh()(x).dtype is BF16


def _sum(module, weight, x):
    return torch.func.functional_call(module, {"weight": weight}, x).float().sum()


def test_trial_leaves_nothing_behind():
    """A trial changes no generator, parameter, gradient, hook or attribute of the module."""
    module, x = LlamaRMSNorm(), torch.randn(4, 8)
    dropping = hand_written_norms.DroppingNorm().eval()
    before = {**vars(module)}, module.weight.detach().clone()
    torch.manual_seed(1)
    states = torch.get_rng_state(), random.getstate()
    with by_hand(), torch.no_grad():
        for each in (module, dropping):
            run(each, x)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert vars(module) == before[0]
    assert torch.equal(module.weight, before[1])
    assert module.weight.grad is None


def test_trial_takes_little_and_is_made_once():
    """Less than 150 ms of a core, and once for all layers of a kind."""
    tried = []
    recognise = recognition.recognise

    def timed(*args):
        start = time.thread_time()
        result = recognise(*args)
        tried.append(time.thread_time() - start)
        return result

    class WideRMSNorm(Norm):
        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    x = torch.randn(2, 3, 4096)
    with pytest.MonkeyPatch.context() as patch, by_hand():
        patch.setattr(kinds, "recognise", timed)
        for _ in range(3):
            assert run(WideRMSNorm(4096), x).dtype is BF16
            assert run(WideRMSNorm(4096), x[0]).dtype is BF16
    assert len(tried) == 1
    assert tried[0] < 0.15


def test_number_that_changes_all_the_time_ends_the_trials(monkeypatch):
    """A forward with too many kinds is stock from then on; what is known stays known."""
    monkeypatch.setattr(kinds, "_MOST_KINDS", 3)

    class AnnealedRMSNorm(Norm):
        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    module, x = AnnealedRMSNorm(), torch.randn(4, 8)
    with by_hand():
        dtypes = []
        for eps in (1e-3, 1e-4, 1e-5, 1e-6, 1e-3):
            module.eps = eps
            dtypes.append(run(module, x).dtype)
    assert dtypes == [BF16, BF16, BF16, FP32, BF16]


def test_verdict_of_a_trial_that_failed_is_not_kept():
    """A trial that raised for a reason of the moment runs again at the next call."""
    moment = [MemoryError("of the moment")]

    class MomentaryRMSNorm(Norm):
        def forward(self, x):
            if moment and threading.current_thread() is not threading.main_thread():
                raise moment[0]
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    module, x = MomentaryRMSNorm(), torch.randn(4, 8)
    with by_hand():
        assert run(module, x).dtype is FP32
        assert "MemoryError: of the moment" in report_of(module, x).rows[0].reason
        moment.clear()
        assert [run(module, x).dtype for _ in range(8)][-1] is BF16


def report_of(module, x):
    with autocast():
        return report(module, x)


def test_exempt_norm_is_stock():
    """An exempt norm is stock by itself, in an exempt parent, and without the hooks of a call."""
    model = nn.Sequential(LlamaRMSNorm(), nn.Sequential(LlamaRMSNorm()))
    x = torch.randn(4, 8)
    exempt(model[1])
    with by_hand(), autocast():
        assert model[0](x).dtype is BF16
        assert model[1](x).dtype is FP32
        assert model[1][0].forward(x).dtype is FP32


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_recomputes_as_its_forward_ran(reentrant):
    """Backward after the block has closed recomputes in the dtype of the forward."""
    dtypes = []

    class Model(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            dtypes.append(y.dtype)
            return torch.sin(y)  # whose saved y is recomputed

    model = Model(LlamaRMSNorm())
    x = torch.randn(4, 8, requires_grad=True)
    with by_hand(), autocast():
        y = checkpoint(model, x, use_reentrant=reentrant)
    y.float().sum().backward()
    assert dtypes == [BF16, BF16]


@needs_dynamo
@pytest.mark.parametrize("make", [LlamaRMSNorm, GemmaRMSNorm, lambda: CastingLayerNorm(8)])
def test_compiled_code_follows_each_switch(make):
    """Compiled code follows switches and eps from the first activation on, in two graphs."""
    with by_hand():
        pass  # from now on
    graphs = []
    model = nn.Sequential(nn.Linear(8, 8), make(), nn.Linear(8, 8), make())

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def outputs(x):
        return [x := layer(x) for layer in model]

    compiled = torch.compile(outputs, backend=count, fullgraph=True)
    x = torch.randn(4, 8)
    for _ in range(2):
        with autocast():
            compiled(x)

        with by_hand(), autocast():
            assert [y.dtype for y in compiled(x)] == [BF16] * 4
    assert len(graphs) == 2
    model[1].eps = 2.0
    if not DYNAMO_TELLS_FLOATS:
        return
    with by_hand(), autocast():
        torch.testing.assert_close(compiled(x)[1], model[1](model[0](x)), rtol=0.02, atol=0.02)


@needs_dynamo
@pytest.mark.skipif(not DYNAMO_TELLS_FLOATS, reason="dynamic floats; CI runs this on later ones")
@pytest.mark.parametrize("make", NORMS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_compiled_norm_has_the_values_and_gradients_of_eager(make, dtype):
    """A compiled norm has fullgraph and dynamic shapes; 1e5 does not overflow under float16."""
    module = make()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    scale = 1e5 if dtype is FP16 else 1.0
    results = []
    with by_hand(), torch.autocast("cpu", dtype=dtype):
        for f in (module, compiled):
            x = scale * torch.randn(NORMS[make], generator=torch.Generator().manual_seed(0))
            y = f(x.requires_grad_())
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
            (y.float() * dy).sum().backward()
            results.append([y, scale * x.grad, *(p.grad for p in module.parameters())])
            module.zero_grad()
    assert results[0][0].dtype is results[1][0].dtype is dtype
    assert results[0][0].stride() == results[1][0].stride()
    for eager, graph in zip(*results, strict=True):
        assert graph.isfinite().all()
        assert (graph - eager).norm() <= 0.02 * eager.norm()


@needs_dynamo
def test_compiled_code_follows_a_method_of_the_modules_own():
    """A method that is replaced on the instance, before and after compilation, is what runs."""
    module, x = GemmaRMSNorm(), torch.randn(4, 8)
    with by_hand():
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert run(compiled, x).dtype is BF16
        module._norm = lambda x: 3 * x
        assert torch.equal(run(compiled, x), 3 * x * (1 + module.weight))
        del module._norm
        assert run(compiled, x).dtype is BF16


@needs_dynamo
@pytest.mark.parametrize("first", ["stock", "lowered"])
def test_code_compiled_during_a_switch_follows_from_then_on(first):
    """Code traced before the switch of another thread, and guarded after it, follows."""
    from compiled import norm_with_pauses

    with by_hand():
        pass  # from now on

    def enable():
        lpln.enable("bf16", norms="hand_written")

    def clear():  # the forwards stay exchanged
        lpln.enable("bf16", norms="group_norm")

    before, meanwhile = (clear, enable) if first == "stock" else (enable, clear)
    before()
    compiled, x = norm_with_pauses(meanwhile, norm=LlamaRMSNorm()), torch.randn(4, 8)
    run(compiled, x)
    assert run(compiled, x).dtype is (BF16 if first == "stock" else FP32)
    before()
    assert run(compiled, x).dtype is (FP32 if first == "stock" else BF16)


@needs_dynamo
def test_layers_of_a_kind_share_a_graph():
    """Compiled one by one, as many layers as there are need two graphs."""
    with by_hand():
        pass
    graphs = []
    layers = [LlamaRMSNorm() for _ in range(4)]

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    for layer in layers:
        layer.compile(backend=count, fullgraph=True)
    x = torch.randn(4, 8)
    for layer in layers:
        assert run(layer, x).dtype is FP32
        with by_hand():
            assert run(layer, x).dtype is BF16
    assert len(graphs) == 2


def test_torchscript_and_tracing_are_stock():
    """A module that is scripted or traced while a request is active runs stock."""
    module, x = LlamaRMSNorm(), torch.randn(4, 8)
    with by_hand(), autocast():
        scripted = torch.jit.script(module)
        traced = torch.jit.trace(module, x)
        assert scripted(x).dtype is FP32
        assert traced(x).dtype is FP32
        assert module(x).dtype is BF16


@needs_dynamo
@pytest.mark.parametrize("strict", [True, False])
def test_exported_program_is_stock(strict):
    """torch.export takes the forward as it is written."""
    if strict and TORCH_VERSION < (2, 7):
        pytest.skip("nothing tells there that Dynamo exports; CI runs this on later ones")
    module, x = LlamaRMSNorm(), torch.randn(4, 8)
    with by_hand(), autocast():
        program = torch.export.export(nn.Sequential(module), (x,), strict=strict)
        assert program.module()(x).dtype is FP32
    names = {str(node.target) for node in program.graph.nodes}
    assert not any("rms_norm" in name for name in names)


def test_report_says_what_is_computed_and_why_not():
    """Rows of norms by hand: lowered, not asked for, not recognised, cast back."""
    casting = CastingLayerNorm(8)
    model = nn.Sequential(LlamaRMSNorm(), hand_written_norms.UnbiasedNorm(), casting)
    x = torch.randn(4, 8)
    with by_hand():
        rows = report_of(model, x).rows
    assert [(r.norm, r.input_dtype, r.output_dtype, r.lowered) for r in rows] == [
        ("rms_norm", FP32, BF16, True),
        ("UnbiasedNorm", BF16, FP32, False),
        ("layer_norm", FP32, BF16, True),
    ]
    assert rows[1].reason.startswith("hand-written, and not recognised: its values")
    with low_precision_layernorm():
        rows = report_of(model, x).rows
    assert rows[0].reason == "hand-written: norms='hand_written' lowers it"
    assert (rows[2].lowered, rows[2].output_dtype) == (False, FP32)
    assert rows[2].reason == "the module casts it back to float32"


@needs_library("transformers")
@pytest.mark.parametrize(
    "name", ["Llama", "Mistral", "Qwen3", "Gemma3Text", "Olmo2", "DeepseekV3", "T5", "Mamba"]
)
def test_norms_of_transformers_models_are_lowered(name):
    """Each one, with their own classes; a training step runs and has finite gradients."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}
    if name == "T5":
        sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
        sizes |= {"vocab_size": 99, "decoder_start_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**sizes)
    auto = transformers.AutoModelForSeq2SeqLM if name == "T5" else transformers.AutoModelForCausalLM
    model, tokens = auto.from_config(config), torch.randint(99, (2, 8))
    batch = {"input_ids": tokens, "labels": tokens}
    with low_precision_layernorm(norms="all"), autocast():
        rows = report(model, **batch).rows
        model(**batch).loss.backward()
    assert len(rows) >= 3
    assert all(row.lowered for row in rows), [row for row in rows if not row.lowered]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@needs_library("transformers")
def test_kernel_of_the_hub_is_not_ours():
    """A forward that is bound to a module, as `kernels` binds one, runs; without it, ours does."""
    from transformers.integrations import use_kernel_forward_from_hub

    ran = []

    @use_kernel_forward_from_hub("RMSNorm")
    class HubRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states)

    class Kernel(nn.Module):
        def forward(self, hidden_states):
            ran.append(self)
            return hidden_states * self.weight

    module, x = HubRMSNorm(), torch.randn(4, 8)
    with low_precision_layernorm(norms="all"):
        assert run(module, x).dtype is BF16
        module.forward = types.MethodType(Kernel.forward, module)
        assert torch.equal(run(module, x), x * module.weight)
    assert ran == [module]


def test_names_and_errors_know_hand_written(monkeypatch):
    """status names it, "all" includes it, and the default does not."""
    lpln.enable("bf16", norms="all")
    assert lpln.status().norms[-1] == "hand_written"
    lpln.enable("bf16")
    assert lpln.status().norms == ("layer_norm",)
    monkeypatch.setenv("LPLN_NORMS", "hand_written")
    lpln.enable("bf16")
    assert lpln.status().norms == ("hand_written",)
    assert lpln.status().installed
    with pytest.raises(ValueError, match="hand_written"):
        lpln.enable("bf16", norms="by_hand")


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
