"""How a function of torch is wrapped and given back, and which ones are. All patching is here."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import Any

import torch.nn.functional as F
import torch.utils.checkpoint
import wrapt

from lpln_autopatch import checkpointing
from lpln_autopatch.checkpointing import Block
from lpln_autopatch.dynamo import switch, trace_through
from lpln_autopatch.norms import NAMES, TARGETS, is_torchs_own

if not hasattr(wrapt, "wrapper_chain"):
    raise ImportError(
        f"lpln_autopatch needs wrapt 2.4 or later, and this is {wrapt.__version__}. "  # type: ignore[attr-defined]
        "Update it: pip install 'wrapt>=2.4'."
    )


@dataclasses.dataclass
class Patch:
    """A function of torch that is wrapped while a precision is, or may soon be, active.

    Attributes:
        module: Where its path begins.
        path: Its name there, dotted.
        factory: Makes the wrapper from the function.
        wrappers: Those of ours that are on. More than one only if another patcher hid ours.
        bottom: What was beneath everything when the first of them was put on.
    """

    module: ModuleType
    path: str
    factory: Callable[[Any], Any]
    wrappers: list[Any] = dataclasses.field(default_factory=list)
    bottom: Any = None

    def install(self) -> bool:
        """Put the wrapper on, and say whether that was necessary."""
        self._forget_what_is_gone()
        chain = self._chain()
        if any(_is_in(chain, wrapper) for wrapper in self.wrappers):
            return False
        # None of ours is in sight: never put on, or beneath somebody's closure. One above it.
        if not self.wrappers:
            self.bottom = chain[-1]
        # wrapt's annotation asks for a proxy; its documentation for "a new object".
        with switch():
            wrapper = wrapt.wrap_object(self.module, self.path, self.factory)  # type: ignore[arg-type]
        self.wrappers.append(wrapper)
        return True

    def remove(self) -> str | None:
        """Take the wrapper off, or leave it where somebody else has wrapped it, and say that."""
        for wrapper in reversed(self.wrappers[:]):
            not_there = wrapt.WrapperNotFoundError, wrapt.WrapperNotOutermostError
            with contextlib.suppress(*not_there), switch():
                wrapt.unwrap_object(self.module, self.path, wrapper)
                self.wrappers = [w for w in self.wrappers if w is not wrapper]
        self._forget_what_is_gone()
        if not self.wrappers:
            return None
        return (
            f"{self.module.__name__}.{self.path} was wrapped by {self._chain()[0]!r} after "
            "lpln_autopatch wrapped it. Our wrapper stays beneath that one, inert; remove that "
            "one first to have PyTorch's own function back."
        )

    def is_on(self) -> bool:
        self._forget_what_is_gone()
        return bool(self.wrappers)

    def _chain(self) -> list[Any]:
        return list(wrapt.wrapper_chain(wrapt.resolve_path(self.module, self.path)[2]))

    def _forget_what_is_gone(self) -> None:
        """Forget the wrappers that somebody removed by putting back what was there before us.

        That is so if torch's own function, or what was at the bottom, is in sight and the wrapper
        is not. If none is, somebody's closure hides them.
        """
        chain = self._chain()
        if _is_in(chain, self.bottom) or is_torchs_own(chain[-1], self.module, self.path):
            self.wrappers = [wrapper for wrapper in self.wrappers if _is_in(chain, wrapper)]


def _is_in(chain: list[Any], wanted: Any) -> bool:
    # By identity: a wrapt proxy is equal to what it wraps.
    return any(link is wanted for link in chain)


class Patches:
    """Everything that the package patches. It takes the arguments of `checkpointing.factories`."""

    def __init__(self, capture: Callable[[], Block], stock: Block) -> None:
        self._norms = [
            (target.norm, Patch(target.module, target.path, target.wrap)) for target in TARGETS
        ]
        self._checkpointing = [
            Patch(torch.utils.checkpoint, path, factory)
            for path, factory in checkpointing.factories(capture, stock).items()
        ]
        self._dynamo_knows = False

    def prepare(self) -> None:
        """What has to be done before `install`, and under no lock: Dynamo is told."""
        if not self._dynamo_knows:
            trace_through({t.full_name: t.wrapper for t in TARGETS if t.module is F})
            self._dynamo_knows = True

    def install(self, norms: Sequence[str] = NAMES) -> None:
        """Put the wrappers of `norms` on, where they are not. If one cannot be, no new one is."""
        wanted = [patch for norm, patch in self._norms if norm in norms]
        new: list[Patch] = []
        try:
            for patch in (*self._checkpointing, *wanted):
                if patch.install():
                    new.append(patch)
        except BaseException:
            for patch in new:
                patch.remove()
            raise

    def remove(self, keep: Collection[str] = ()) -> list[str]:
        """Take the wrappers off but those of the norms in `keep`, and say which cannot go."""
        unwanted = [patch for norm, patch in self._norms if norm not in keep]
        unwanted += [] if keep else self._checkpointing
        return [message for patch in unwanted if (message := patch.remove()) is not None]

    def on(self) -> set[str]:
        """The norms of which every wrapper is on."""
        off = {norm for norm, patch in self._norms if not patch.is_on()}
        return set(NAMES) - off
