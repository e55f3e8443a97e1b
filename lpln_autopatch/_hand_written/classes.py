"""Exchange the forwards of all classes that may be hand-written norms, and give them back."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch

from lpln_autopatch import _lock
from lpln_autopatch._exchange import Exchange
from lpln_autopatch._hand_written import forwards, kinds


class Classes:
    """The classes of modules that are norms by their names, later ones included."""

    def __init__(self) -> None:
        self._exchanges: dict[types.FunctionType, Exchange] = {}
        self._is_on = False
        self._settled: bool | None = False  # `_is_on`, once all is done; None after an interruption
        self._hook: Any = None
        self._before: Any = None  # another patcher's hook

    def follow(self, wanted: bool, keep: bool) -> None:
        """Exchange the forwards if `wanted`; if not, give them back, unless `keep`.

        Dynamo does not guard on the code of a forward that it inlines. So an exchanged forward
        stays exchanged, and runs stock, until `disable()`.
        """
        on = wanted or (keep and self._is_on)
        if on is self._settled:
            return
        self._settled, self._is_on = None, on
        if on:
            self._watch()
            for cls in _subclasses(torch.nn.Module):
                self._see(cls)
        else:
            self._unwatch()
            for exchange in list(self._exchanges.values()):
                exchange.run(None)
        self._settled = on

    def _see(self, cls: type) -> None:
        function = kinds.candidate(cls)
        if function is None:
            return
        with _lock.lock:  # classes are made in several threads at once
            exchange = self._exchanges.get(function)
            if exchange is None:
                name = f"_lpln_autopatch_forward_{len(self._exchanges)}"
                replace = functools.partial(forwards.replacement, function)
                exchange = Exchange(lambda: function, name, replace)
                try:
                    exchange.prepare()
                except RuntimeError:  # exchanged by another copy of this package
                    return
                self._exchanges[function] = exchange
            if exchange.runs is not exchange.replacement:
                exchange.run(exchange.replacement)
            if not self._is_on:  # since another thread has switched it off
                exchange.run(None)

    def _watch(self) -> None:
        """Have Python call us for each new class of modules."""
        before = vars(torch.nn.Module).get("__init_subclass__")
        if self._hook is not None and before is self._hook:
            return

        def see(cls: type[torch.nn.Module], /, **kwargs: Any) -> None:
            if before is None:
                super(torch.nn.Module, cls).__init_subclass__(**kwargs)
            else:
                before.__get__(None, cls)(**kwargs)
            if self._is_on:
                self._see(cls)

        self._before, self._hook = before, classmethod(see)
        torch.nn.Module.__init_subclass__ = self._hook  # type: ignore[method-assign]

    def _unwatch(self) -> None:
        if vars(torch.nn.Module).get("__init_subclass__") is not self._hook:
            return  # another patcher's is above ours, which does nothing now
        if self._before is None:
            del torch.nn.Module.__init_subclass__
        else:
            torch.nn.Module.__init_subclass__ = self._before  # type: ignore[method-assign]
        self._hook = None


def _subclasses(cls: type) -> Iterator[type]:
    seen: set[type] = set()
    pending = [cls]
    while pending:
        found: list[type] = type.__subclasses__(pending.pop())
        for subclass in found:
            if subclass not in seen:
                seen.add(subclass)
                pending.append(subclass)
                yield subclass
