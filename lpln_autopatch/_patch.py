"""Apply and undo every change to PyTorch, with _exchange.py."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch.nn.functional as F
import torch.utils.checkpoint
import wrapt
from torch.nn.modules import normalization

from lpln_autopatch import _dynamo, _exemption, _forward, _norms
from lpln_autopatch._exchange import Exchange, is_torchs_own
from lpln_autopatch._hand_written.classes import Classes
from lpln_autopatch._request import HAND_WRITTEN, Request
from lpln_autopatch._torch_compat import drop_compiled_code_that_cannot_follow

if not hasattr(wrapt, "wrapper_chain"):
    raise ImportError(
        f"lpln_autopatch needs wrapt 2.4 or later, and this is {wrapt.__version__}. "  # type: ignore[attr-defined]
        "Update it: pip install 'wrapt>=2.4'."
    )


# Not torch.nn.LayerNorm, which may be another class by now: the instances made before that still
# run this one's forward.
LayerNorm = normalization.LayerNorm


class ForwardWrapper:
    """The wrapper on `torch.nn.LayerNorm.forward`, put on and taken off through wrapt."""

    def __init__(self) -> None:
        # True if our wrapper may be on, in sight or not. The function that it was put on.
        self._is_there = False
        self._bottom: Any = None

    def follow(self, on: bool) -> str | None:
        """Put it on or take it off; return a message if it cannot be taken off."""
        found = vars(LayerNorm)["forward"]
        if (on and _norms.is_our_wrapper(found)) or not (on or self._is_there):
            return None
        chain = self._chain()
        ours = [link for link in chain if _norms.is_our_wrapper(link)]
        if on and not ours:
            if not self._is_there:
                self._is_there, self._bottom = True, chain[-1]
            # wrapt's annotation asks for a proxy; its documentation for "a new object".
            wrapt.wrap_object(LayerNorm, "forward", _norms.wrap_forward)  # type: ignore[arg-type]
        if on:
            return None
        for wrapper in ours:
            with contextlib.suppress(wrapt.WrapperNotOutermostError):
                wrapt.unwrap_object(LayerNorm, "forward", wrapper)
        if vars(LayerNorm)["forward"] is self._bottom:  # the usual case, in little time
            self._is_there = False
            return None
        chain = self._chain()
        # If neither ours nor the function beneath it is in sight, a closure hides both.
        bottom_is_in_sight = chain[-1] is self._bottom or _is_torchs_forward(chain[-1])
        self._is_there = not bottom_is_in_sight or any(map(_norms.is_our_wrapper, chain))
        if not self._is_there:
            return None
        return (
            f"torch.nn.LayerNorm.forward was wrapped by {chain[0]!r} after lpln_autopatch wrapped "
            "it. Our wrapper stays beneath that one, inert; remove that one first to have "
            "PyTorch's own function back."
        )

    def _chain(self) -> list[Any]:
        found = vars(LayerNorm)["forward"]
        if _is_torchs_forward(found):
            return [found]
        if _norms.is_our_wrapper(found) and _is_torchs_forward(found.__wrapped__):
            return [found, found.__wrapped__]
        return list(wrapt.wrapper_chain(found))  # three times slower


def _is_torchs_forward(function: object) -> bool:
    return is_torchs_own(function, normalization, "LayerNorm.forward")


class Patches:
    """The exchanged functions of PyTorch, and the wrapper on LayerNorm.forward.

    Args:
        carried: For each function of checkpointing, by its path, the maker of its replacement,
            which takes its stock copy.
    """

    def __init__(
        self, carried: Mapping[str, Callable[[Callable[..., Any]], Callable[..., Any]]]
    ) -> None:
        self._norms = {
            norm: Exchange.of_torch(F, norm, functools.partial(_norms.bind_function, norm))
            for norm in _norms.FUNCTIONS
        }
        self._forwards = {
            norm: Exchange.of_torch(
                normalization,
                f"{_norms.MODULES[norm]}.forward",
                functools.partial(_norms.bind_forward, norm),
            )
            for norm in _norms.FUNCTIONS
        }
        self._checkpointing = [
            Exchange.of_torch(torch.utils.checkpoint, *function) for function in carried.items()
        ]
        self._wrapper = ForwardWrapper()
        self._classes = Classes()

    def prepare(self, wanted: Iterable[str]) -> None:
        """Find the functions that `follow` needs for these norms.

        Raises:
            RuntimeError: one is hidden by something that is no Python function.
        """
        named = [(self._norms[n], self._forwards[n]) for n in wanted if n in self._norms]
        for exchange in (*itertools.chain(*named), *self._checkpointing):
            exchange.prepare()

    def follow(
        self,
        request: Request | None,
        carries: bool,
        recorders: Mapping[str, Callable[..., Any]] | None,
    ) -> tuple[bool, str | None]:
        """Make `request` active: exchange the functions of its norms, and give back the others.

        Args:
            request: The request to make active. `prepare` has had its norms before.
            carries: True if checkpointing is to remember the request of each forward.
            recorders: Functions that run in the place of each norm, wanted or not.

        Returns:
            True if the active request has changed, and a message if the wrapper cannot be taken
            off.
        """
        if request is None or not request.precision.ever_engages:
            request = _forward.INACTIVE
        wanted = request.norms.split(",")
        self._classes.follow(HAND_WRITTEN in wanted, keep=carries)
        changed = request != _forward.active
        next_ones = self._next(wanted, carries, recorders)
        changes = [(exchange, runs) for exchange, runs in next_ones if exchange.runs is not runs]
        if changed or changes:
            _dynamo.note_switch()
            if changed:
                _forward.active = request
            for exchange, runs in changes:
                exchange.run(runs)
            _dynamo.note_switch()
        return changed, self._wrapper.follow("layer_norm" in wanted)

    def _next(
        self,
        wanted: Collection[str],
        carries: bool,
        recorders: Mapping[str, Callable[..., Any]] | None,
    ) -> Iterator[tuple[Exchange, Callable[..., Any] | None]]:
        """Yield each exchange with the code that its function is to run, or None for its own."""
        for norm, exchange in self._norms.items():
            if recorders is not None and exchange.function is not None:
                yield exchange, recorders[norm]
            else:
                yield exchange, exchange.replacement if norm in wanted else None
        for exchange in self._checkpointing:
            yield exchange, exchange.replacement if carries else None
        for norm, exchange in self._forwards.items():
            yield exchange, exchange.replacement if norm in wanted else None

    def settle(self, stacklevel: int) -> None:
        """Have compiled code follow a change, or warn. Called under no lock."""
        drop_compiled_code_that_cannot_follow()
        _dynamo.settle(stacklevel + 1)

    def are_installed(self) -> bool:
        """Return True if a function or a class runs our code."""
        # The forwards of classes keep our code for longer, and do nothing then.
        is_by_hand = HAND_WRITTEN in _forward.active.norms
        return is_by_hand or any(each.runs is not None for each in self._norms.values())

    def tell_dynamo(self) -> None:
        """Tell Dynamo again which functions are exchanged."""
        for exchange in self._norms.values():
            exchange.tell_dynamo()

    def renew(self) -> None:
        """Outdate all compiled code that holds a norm."""
        for exchange in self._norms.values():
            exchange.renew()
        _exemption.outdate()  # the forwards of classes
        self.tell_dynamo()
