"""The private names of torch that this package uses, and what will replace each of them.

Nothing here runs in a program. `tests/test_torch_compat.py` fails by name where torch lacks one of
them, and where the package uses one that is not in this table. The benchmark is not covered.
"""

from __future__ import annotations

from typing import NamedTuple


class PrivateName(NamedTuple):
    """A private or undocumented name of torch.

    Attributes:
        name: Its full name. The attribute that a function sets stands behind that function.
        instead: The public way that will replace it, or why there is none.
        since: The first torch for which it is used.
        until: The first torch for which it is used no more.
    """

    name: str
    instead: str
    since: tuple[int, int] = (1, 12)
    until: tuple[int, int] | None = None


PRIVATE_NAMES = (
    PrivateName(
        "torch._C._DisableAutocast",
        "torch.autocast(device_type, enabled=False), once that is as fast.",
        since=(2, 0),
    ),
    PrivateName(
        "torch._C._are_functorch_transforms_active",
        "None: torch.func does not say whether one of its transforms is running.",
        since=(2, 1),
    ),
    PrivateName(
        "torch._C._len_torch_dispatch_stack",
        "None: torch.utils._python_dispatch is private, too.",
        since=(2, 1),
    ),
    PrivateName(
        "torch._C._dispatch_keys",
        "None: no public attribute names every kind of tensor that a kernel cannot read.",
        since=(2, 6),
    ),
    PrivateName(
        "torch.autograd.forward_ad._current_level",
        "None: torch.autograd.forward_ad does not say whether a level is open.",
    ),
    PrivateName(
        "torch.overrides.has_torch_function_variadic",
        "torch.overrides.has_torch_function, which takes a tuple and more time.",
    ),
    PrivateName(
        "torch.nn.functional._verify_batch_size",
        "None: TorchScript looks up what group_norm calls. TorchScript itself is deprecated.",
    ),
    PrivateName(
        "torch._is_device_backend_autoload_enabled",
        "None: TORCH_DEVICE_BACKEND_AUTOLOAD is documented, and how it is read is not.",
        since=(2, 5),
    ),
    PrivateName(
        "torch.utils._pytree.tree_flatten",
        "torch.utils.pytree, once every torch that is supported has it.",
    ),
    # A copy of a module has its hooks, but no handles that remove them.
    PrivateName("torch.nn.Module._forward_pre_hooks", "None: only a handle removes a hook."),
    PrivateName("torch.nn.Module._forward_hooks", "None: only a handle removes a hook."),
    PrivateName(
        "torch.nn.Module._forward_hooks_always_called",
        "None: only a handle removes a hook.",
        since=(2, 1),
    ),
    PrivateName(
        "torch.nn.Module._modules",
        "Module.named_children, which leaves out a module that is there twice.",
    ),
    # Of checkpointing, the lowest points that every route to a recomputation passes. There is no
    # public hook that runs before a recomputation of somebody else's checkpoint.
    PrivateName("torch.utils.checkpoint.CheckpointFunction.forward", "None: see above."),
    PrivateName("torch.utils.checkpoint.CheckpointFunction.forward.run_function", "None."),
    PrivateName("torch.utils.checkpoint.CheckpointFunction.backward", "None."),
    PrivateName("torch.utils.checkpoint._checkpoint_without_reentrant", "None.", until=(2, 1)),
    PrivateName("torch.utils.checkpoint._CheckpointFrame.__init__", "None.", since=(2, 1)),
    PrivateName(
        "torch.utils.checkpoint._CheckpointFrame.__init__.recompute_fn", "None.", since=(2, 9)
    ),
    PrivateName("torch.utils.checkpoint._CheckpointFrame.get_inputs", "None.", since=(2, 9)),
    PrivateName(
        "torch._dynamo.assume_constant_result._dynamo_marked_constant",
        "torch.compiler.assume_constant_result, once it does not import Dynamo.",
        since=(2, 0),
    ),
    PrivateName(
        "torch._dynamo.eval_frame.OptimizedModule.__init__._orig_mod",
        "None: torch.compile does not say which module it was given.",
        since=(2, 0),
    ),
    PrivateName("torch._dynamo.reset", "torch.compiler.reset.", since=(2, 0), until=(2, 4)),
    PrivateName(
        "torch._dynamo.reset_code_caches",
        "None: torch.compiler.reset forgets what others have registered.",
        since=(2, 4),
        until=(2, 5),
    ),
    PrivateName(
        "torch._dynamo.trace_rules.torch_name_rule_map",
        "None: torch.compiler.substitute_in_graph does not take a name out of this table.",
        since=(2, 5),
    ),
    PrivateName(
        "torch._dynamo.trace_rules.get_torch_obj_rule_map",
        "None: the cache of the table above is cleared.",
        since=(2, 5),
    ),
    PrivateName(
        "torch._dynamo.config.trace_autograd_ops",
        "torch.compiler.config, once it has this setting.",
        since=(2, 13),
    ),
    # torch.compiler.disable keeps Dynamo out of a function everywhere. These only keep it from
    # compiling a function by itself.
    PrivateName(
        "torch._C._dynamo.eval_frame.skip_code", "None: see above.", since=(2, 0), until=(2, 6)
    ),
    PrivateName("torch._C._dynamo.eval_frame.set_code_exec_strategy", "None.", since=(2, 6)),
    PrivateName("torch._C._dynamo.eval_frame._FrameExecStrategy", "None.", since=(2, 6)),
    PrivateName("torch._C._dynamo.eval_frame._FrameAction", "None.", since=(2, 6)),
)
