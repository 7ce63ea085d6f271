"""Following a forward as it runs: which module and which torch function is called, and from where in the user's code.

A position names a call in a way that holds from run to run, even if a run skips parts of the forward (a layer
dropped at random, a branch that only training takes): by the calls around it and its place in the source, not by how
many calls came before it.
"""

from __future__ import annotations

import copy
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lq.graph.capture.registry import registered_forward
from lq.graph.parts import PartsForward

#: The position of the whole forward, and that of a call which no earlier run has made.
WHOLE, UNKNOWN = 0, -1

#: A place in the source: file, first line of the function, and the instruction within.
_Place = tuple[str, int, int]

#: Position of the call around it, what is called, from which place, after which submodule, and how many such calls
#: came before.
_Key = tuple[int, str, "_Place | None", str, int]

_following = threading.local()

#: The code that followed modules' calls pass through.
_FOLLOWERS = ("lq.graph.",)


def _opened(function: Any) -> Callable[..., Any]:
    """A function of torch that is written in Python, as one that lets a mode see the functions that it calls."""
    names = {**function.__globals__, "has_torch_function": lambda *_: False}
    opened = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


#: Functions that compute linear layers inside, by what runs instead of them.
_OPENED: dict[Any, Callable[..., Any]] = {
    functional.multi_head_attention_forward: _opened(functional.multi_head_attention_forward)
}


class Positions:
    """The positions of a forward's calls, and the paths of the modules they are made in."""

    def __init__(self) -> None:
        self._numbers: dict[_Key, int] = {}
        self._modules: dict[tuple[int, str, int], int] = {}
        self.paths: list[str] = [""]  # by position: of a module call the module's own, of a function call the caller's

    def find(self, key: _Key) -> int:
        return self._numbers.get(key, UNKNOWN)

    def find_or_add(self, key: _Key, path: str) -> int:
        number = self._numbers.setdefault(key, len(self.paths))
        if number == len(self.paths):
            self.paths.append(path)
        return number

    def find_module(self, key: _Key, count: int, *, adds: bool) -> int:
        """The call of a module, wherever in the source it is made: training and evaluation may differ in that.

        Args:
            key: of the call.
            count: how many calls of the module came before it, within the call around it.
            adds: whether to add a position if there is none.
        """
        anywhere = (key[0], key[1], count)
        number = self._numbers.get(key, self._modules.get(anywhere, UNKNOWN))
        if number == UNKNOWN and adds:
            number = self.find_or_add(key, key[1].removesuffix("()"))
            self._modules[anywhere] = number
        return number

    def name(self, position: int) -> str:
        """What is called at a position: a function's name, or a module's path with parentheses."""
        return next(name for (_, name, *_), number in self._numbers.items() if number == position)

    def of_module(self, path: str) -> int:
        """The first call of a module, used where the module is called on its own."""
        return next((number for (_, name, *_), number in self._numbers.items() if name == f"{path}()"), UNKNOWN)


@dataclass
class _Activation:
    """A module's forward that is running."""

    position: int
    path: str
    after: str = ""
    counts: dict[tuple[Any, ...], int] = field(default_factory=dict)


class CallTracker(TorchFunctionMode):
    """Knows the position of each call made while it is active, in its own thread.

    Subclasses decide what happens at a call. Entered once.

    Args:
        root: the module whose forward is followed; its submodules' forwards are :class:`FollowedForward`.
        positions: of earlier runs.
        adds: whether positions that no earlier run has are added, or are all :data:`UNKNOWN`.
        start: position and path of the call that is running when the tracker is entered.
    """

    def __init__(self, root: nn.Module, positions: Positions, *, adds: bool, start: tuple[int, str]) -> None:
        super().__init__()
        self.root = root
        self.positions = positions
        self._adds = adds
        self._stack = [_Activation(*start)]

    def __enter__(self) -> CallTracker:
        self._outer = getattr(_following, "tracker", None)
        _following.tracker = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _following.tracker = self._outer
        super().__exit__(*error)

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Inside the context the mode, which torch leaves while a function is handled, sees calls again."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    @property
    def path(self) -> str:
        """Path of the module whose forward is running."""
        return self._stack[-1].path

    @property
    def module_position(self) -> int:
        """Position of the call of that module."""
        return self._stack[-1].position

    def on_module(self, followed: FollowedForward, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a module's forward; for subclasses."""
        return followed.run(*args, **kwargs)

    def on_function(
        self, function: Callable[..., Any], position: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs a torch function; for subclasses."""
        return function(*args, **kwargs)

    def watches(self, name: str) -> bool:
        """Whether a function of that name is of interest; the others are ignored."""
        return name != "__get__"

    def call_module(self, followed: FollowedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        caller = self._stack[-1]
        # Calls around the root's forward come from its hooks and outer code: they are not its own.
        name = f"{followed.path}()"
        position = self._module_position(name, sys._getframe(2)) if followed.path else WHOLE
        self._stack.append(_Activation(position, followed.path))
        try:
            return self.on_module(followed, position, args, kwargs)
        finally:
            self._stack.pop()
            caller.after = followed.path

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _OPENED:
            with self._again():
                return _OPENED[func](*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if not self.watches(name):
            return func(*args, **(kwargs or {}))
        position = self._position(name, self.path, sys._getframe(1))
        return self.on_function(func, position, args, kwargs or {})

    def _module_position(self, name: str, frame: FrameType) -> int:
        caller = self._stack[-1]
        if caller.position == UNKNOWN:
            return UNKNOWN
        everywhere = (name, None, "")
        before = caller.counts.get(everywhere, 0)
        caller.counts[everywhere] = before + 1
        local = (name, _place(frame), caller.after)
        count = caller.counts.get(local, 0)
        caller.counts[local] = count + 1
        key = (caller.position, *local, count)
        return self.positions.find_module(key, before, adds=self._adds)

    def _position(self, name: str, path: str, frame: FrameType) -> int:
        caller = self._stack[-1]
        if caller.position == UNKNOWN:
            return UNKNOWN
        local = (name, _place(frame), caller.after)
        count = caller.counts.get(local, 0)
        caller.counts[local] = count + 1
        key = (caller.position, *local, count)
        return self.positions.find_or_add(key, path) if self._adds else self.positions.find(key)


def _place(frame: FrameType | None) -> _Place | None:
    """The place in the user's source that a call comes from, or None where one of torch's layers makes it."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith(_FOLLOWERS):
            return None
        if name != "torch" and not name.startswith("torch."):
            return frame.f_code.co_filename, frame.f_code.co_firstlineno, _expression(frame.f_code, frame.f_lasti)
        frame = frame.f_back
    return None


@cache
def _expressions(code: CodeType) -> list[int]:
    """For each instruction the first one of the same expression, as far as Python tells."""
    if not hasattr(code, "co_positions"):  # before Python 3.11
        return []
    first: dict[tuple[int | None, ...], int] = {}
    return [
        first.setdefault(position, index) if position[0] is not None else index
        for index, position in enumerate(code.co_positions())
    ]


def _expression(code: CodeType, offset: int) -> int:
    # Python calls the same function from one or the other instruction of a call, once it has specialized them.
    expressions = _expressions(code)
    return expressions[offset // 2] if expressions else offset


class FollowedForward:
    """Replaces a submodule's forward: runs it, and tells the root's tracker of the call.

    Two roots may have a submodule in common, as a ReLU that is a default argument or an attribute of a class: then it
    has one of these for each.

    Args:
        root: the module whose forward is followed.
        module: the submodule.
        path: its path in ``root``.
    """

    def __init__(self, root: nn.Module, module: nn.Module, path: str) -> None:
        # A submodule without tensors may be one of many networks', and would keep all of them in memory.
        self._root: nn.Module | weakref.ref[nn.Module] | None = root if _has_tensors(module) else weakref.ref(root)
        self.module = module
        self.path = path
        replaced = module.__dict__.get("forward")
        #: Of the next root that has the submodule.
        self.other: FollowedForward | None = replaced if isinstance(replaced, FollowedForward) else None
        #: A forward that the user set on the object, which runs in place of the class's.
        self.own: Callable[..., Any] | None = replaced if self.other is None else self.other.own

    @property
    def root(self) -> nn.Module | None:
        """The module whose forward is followed; None where it is gone, and what it has in common with others is not."""
        return self._root() if isinstance(self._root, weakref.ref) else self._root

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracker: CallTracker | None = getattr(_following, "tracker", None)
        if tracker is not None:
            for followed in self.all():
                if followed.root is tracker.root:
                    return tracker.call_module(followed, args, kwargs)
        # Called on its own: by the user, or by `torch.utils.checkpoint` in the backward.
        whole = self._whole()
        run_part = getattr(whole, "run_part", None)
        return self.run(*args, **kwargs) if run_part is None or self._may_be_anyones() else run_part(self, args, kwargs)

    def all(self) -> Iterator[FollowedForward]:
        """This one and those of the other roots, as far as these are there still."""
        followed: FollowedForward | None = self
        while followed is not None:
            if followed.root is not None:
                yield followed
            followed = followed.other

    def _whole(self) -> Any:
        """The root's own forward, where it was replaced."""
        return None if self.root is None else self.root.__dict__.get("forward")

    def _may_be_anyones(self) -> bool:
        """Whether a call from elsewhere need not be one of the root's: networks that are not followed may have the
        submodule, too, where it has nothing of its own. The steps' parts are called from there by their nature."""
        if self.other is not None:
            return True
        whole = self._whole()
        in_backward = torch._C._current_graph_task_id() != -1
        return not (_has_tensors(self.module) or in_backward or isinstance(getattr(whole, "own", None), PartsForward))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The forward itself, or the function that was registered for the layer."""
        return original_forward(self.module, self.own)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        module = memo.get(id(self.module))
        copied = [followed for followed in self.all() if id(followed.root) in memo]
        if not copied:  # a copy of this submodule alone is the plain layer
            return MethodType(type(self.module).forward, module) if self.own is None else copy.deepcopy(self.own, memo)
        twins = [object.__new__(FollowedForward) for _ in copied]
        memo[id(self)] = twins[0]
        for followed, twin, other in zip(copied, twins, [*twins[1:], None], strict=True):
            root = memo[id(followed.root)]
            attributes = {name: copy.deepcopy(value, memo) for name, value in followed._attributes().items()}
            twin.__dict__.update(
                attributes, other=other, _root=root if followed._root is followed.root else weakref.ref(root)
            )
        return twins[0]

    def _attributes(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("other", "_root")}

    def __getstate__(self) -> dict[str, Any]:
        others = [followed for followed in self.all() if followed is not self]
        is_kept = self._root is self.root
        return {**self._attributes(), "root": self.root, "is_kept": is_kept, "other": next(iter(others), None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        root, is_kept = state.pop("root"), state.pop("is_kept")
        self.__dict__.update(state, _root=root if is_kept or root is None else weakref.ref(root))


def _has_tensors(module: nn.Module) -> bool:
    return next(itertools.chain(module.parameters(), module.buffers()), None) is not None


def original_forward(module: nn.Module, own: Callable[..., Any] | None) -> Callable[..., Any]:
    """What a module computes: the function registered for its class, the user's own on the object, or the class's."""
    registered = registered_forward(module)
    if registered is not None:
        return lambda *args, **kwargs: registered(module, *args, **kwargs)
    return own if own is not None else MethodType(type(module).forward, module)


def follow(root: nn.Module) -> None:
    """Put a :class:`FollowedForward` on each submodule of ``root`` that has none yet."""
    for path, module in root.named_modules():
        if path and _can_be_followed(module) and _followed_in(root, module) is None:
            module.forward = FollowedForward(root, module, path)


def _all_of(module: nn.Module) -> list[FollowedForward]:
    forward = module.__dict__.get("forward")
    return list(forward.all()) if isinstance(forward, FollowedForward) else []


def _followed_in(root: nn.Module, module: nn.Module) -> FollowedForward | None:
    return next((followed for followed in _all_of(module) if followed.root is root), None)


def _can_be_followed(module: nn.Module) -> bool:
    # Compiled TorchScript takes no attributes, and containers without a forward are not called.
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return type(module).forward is not nn.Module.forward or "forward" in module.__dict__


def unfollow(root: nn.Module) -> dict[nn.Module, FollowedForward]:
    """Remove what :func:`follow` put on, and return it."""
    removed = {}
    for module in root.modules():
        followed = _followed_in(root, module)
        if followed is not None:
            removed[module] = followed
            _put(module, [other for other in _all_of(module) if other is not followed], followed.own)
    return removed


def follow_again(removed: Mapping[nn.Module, FollowedForward]) -> None:
    """Put back what :func:`unfollow` removed."""
    for module, followed in removed.items():
        _put(module, [followed, *_all_of(module)], followed.own)


def _put(module: nn.Module, followed: Sequence[FollowedForward], own: Callable[..., Any] | None) -> None:
    """Have a submodule followed for these roots alone."""
    for index, one in enumerate(followed):
        one.other = followed[index + 1] if index + 1 < len(followed) else None
    forward = followed[0] if followed else own
    if forward is not None:
        module.forward = forward
    else:
        module.__dict__.pop("forward", None)


@contextmanager
def followed(root: nn.Module) -> Iterator[None]:
    """Inside the context, a :class:`CallTracker` sees the calls of ``root``'s submodules."""
    already = any(_followed_in(root, module) is not None for module in root.modules() if module is not root)
    follow(root)
    try:
        yield
    finally:
        if not already:
            unfollow(root)
