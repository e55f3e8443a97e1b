"""The private names of torch that this package uses, and what will replace each of them.

test_torch_compat.py fails by name where torch lacks one of them, and where the package uses one
that is not in this table. The benchmark is not covered.
"""

from __future__ import annotations

from typing import NamedTuple


class Name(NamedTuple):
    """A private or undocumented name of torch.

    Attributes:
        path: The full name. The attribute that a function sets stands behind that function.
        since: The first torch for which it is used.
        until: The first torch for which it is used no more.
    """

    path: str
    since: tuple[int, int] = (1, 12)
    until: tuple[int, int] | None = None


# The public way that will replace the names, or why there is none; and the names.
PRIVATE_NAMES = {
    "torch.autocast(device_type, enabled=False), once that is as fast.": [
        Name("torch._C._DisableAutocast", since=(2, 0)),
    ],
    "None: torch does not say whether a transform of torch.func or a dispatch mode is active.": [
        Name("torch._C._are_functorch_transforms_active", since=(2, 1)),
        Name("torch._C._len_torch_dispatch_stack", since=(2, 1)),
    ],
    "None: torch.autograd.forward_ad does not say whether a level is open.": [
        Name("torch.autograd.forward_ad._current_level"),
    ],
    "None: no public attribute tells every kind of tensor that a kernel cannot read.": [
        Name("torch._C._dispatch_keys", since=(2, 6)),
    ],
    "torch.overrides.has_torch_function, which takes a tuple, and more time.": [
        Name("torch.overrides.has_torch_function_variadic"),
    ],
    "None: TORCH_DEVICE_BACKEND_AUTOLOAD is public, and how torch reads it is not.": [
        Name("torch._is_device_backend_autoload_enabled", since=(2, 5)),
    ],
    "torch.nn.Module.named_children.": [
        Name("torch.nn.Module._modules"),
    ],
    "torch.nn.Module.parameters(recurse=False).": [
        Name("torch.nn.Module._parameters"),
    ],
    "None: a hook is removed by its handle, and a copy of a module has no handles.": [
        Name("torch.nn.Module._forward_pre_hooks"),
        Name("torch.nn.Module._forward_hooks"),
        Name("torch.nn.Module._forward_hooks_always_called", since=(2, 1)),
        Name("torch.nn.modules.module._global_forward_hooks_with_kwargs", since=(2, 6)),
    ],
    "None: nothing public runs before the recomputation of somebody else's checkpoint.": [
        Name("torch.utils.checkpoint.CheckpointFunction.forward"),
        Name("torch.utils.checkpoint.CheckpointFunction.forward.run_function"),
        Name("torch.utils.checkpoint.CheckpointFunction.backward"),
        Name("torch.utils.checkpoint._checkpoint_without_reentrant", until=(2, 1)),
        Name("torch.utils.checkpoint._CheckpointFrame.__init__", since=(2, 1)),
        Name("torch.utils.checkpoint._CheckpointFrame.__init__.recompute_fn", since=(2, 12)),
        Name("torch.utils.checkpoint._CheckpointFrame.get_inputs", since=(2, 12)),
    ],
    "torch.compiler.assume_constant_result, once it does not import Dynamo.": [
        Name("torch._dynamo.assume_constant_result._dynamo_marked_constant", since=(2, 0)),
    ],
    "None: torch.compile does not say which module it was given.": [
        Name("torch._dynamo.eval_frame.OptimizedModule.__init__._orig_mod", since=(2, 0)),
    ],
    "None: an export does not say which autocast it has entered.": [
        Name("torch._dynamo.symbolic_convert.InstructionTranslator.current_tx", since=(2, 7)),
        Name("torch.fx.experimental.proxy_tensor.get_proxy_mode", since=(2, 7)),
        Name("torch.amp._enter_autocast", since=(2, 7)),
        Name("torch.amp._exit_autocast", since=(2, 7)),
    ],
    "None: no wrapper says under which name it holds what it wraps.": [
        Name(
            "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper"
            ".__init__._checkpoint_wrapped_module",
            since=(2, 0),
        ),
        Name(
            "torch.distributed.fsdp.FullyShardedDataParallel.forward._fsdp_wrapped_module",
            since=(2, 0),
        ),
    ],
    "None: torch.compiler.substitute_in_graph replaces a function for good.": [
        Name("torch._dynamo.trace_rules.torch_name_rule_map", since=(2, 5)),
        Name("torch._dynamo.trace_rules.get_torch_obj_rule_map", since=(2, 5)),
        Name("torch._dynamo.trace_rules.UserFunctionVariable", since=(2, 5)),
        Name("torch._dynamo.trace_rules.UserFunctionVariable.create_with_source", since=(2, 5)),
    ],
    "None: torch.compiler tells nobody that a compilation runs, or ends.": [
        Name("torch._dynamo.convert_frame.compile_lock", since=(2, 5)),
        Name("torch._dynamo.callback_handler.end_callbacks", since=(2, 5)),
        Name("torch._dynamo.callback_handler.register_end_callback", since=(2, 5)),
    ],
    "torch.compiler.config, once it has these settings.": [
        Name("torch._dynamo.config.skip_nnmodule_hook_guards", since=(2, 5)),
    ],
    "torch.compiler.reset, which also forgets what others have registered.": [
        Name("torch._dynamo.reset", since=(2, 0), until=(2, 4)),
        Name("torch._dynamo.reset_code_caches", since=(2, 4), until=(2, 5)),
    ],
    "None: torch.compiler.disable also keeps a function out of the graph of its caller.": [
        Name("torch._C._dynamo.eval_frame.skip_code", since=(2, 0), until=(2, 7)),
        Name("torch._C._dynamo.eval_frame.set_code_exec_strategy", since=(2, 7)),
        Name("torch._C._dynamo.eval_frame._FrameExecStrategy", since=(2, 7)),
        Name("torch._C._dynamo.eval_frame._FrameAction", since=(2, 7)),
    ],
}
