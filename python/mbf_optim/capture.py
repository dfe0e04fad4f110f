"""What layers see in a training step: their inputs, and the gradients that come back to their outputs.

Hooks on a model's modules keep both until they are read. A module that is used twice in a forward pass, and the passes
of an accumulated gradient, are kept apart.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Use:
    """One call of a module whose output got a gradient."""

    forward_pass: int  # counted
    inputs: Tensor  # as the module got them, detached
    version: int  # of the inputs then
    gradients: Tensor | None = None  # of the loss, of the output's shape; of several backward passes their sum
    arriving: Tensor | None = None  # the same of a backward pass that has not reached the weight
    backward_pass: int = -1  # its number

    @property
    def overwritten(self) -> bool:
        """Whether the inputs have been written to since then."""
        return self.inputs._version != self.version


class Capture:
    """The uses of some modules of a model, since they were last cleared.

    Recorded are calls in training mode with autograd on, once the gradients of their output and of their weight (or
    bias, where that is frozen) have come. They add to its ``grad``: what ``torch.autograd.grad`` asks for on the side
    leaves no trace, and a ``grad`` set to None takes what was recorded along. Under non-reentrant checkpointing it is
    the first call, not the one that recomputes. What follows in place does not matter.

    Args:
        model: what a forward pass is one of.
        modules: with a ``weight``.
        wanted: whether calls of a module are looked at. A method of an object that owns the capture.
    """

    def __init__(
        self, model: nn.Module, modules: Iterable[nn.Module], wanted: Callable[[nn.Module], bool] | None = None
    ):
        self.recording = True  # whether gradients of the loss are kept
        self._wanted = None if wanted is None else weakref.WeakMethod(wanted)
        self._drawing = False  # gradients are not those of the loss
        self._forward_pass, self._inside, self._answered = 0, False, False
        self._unanswered: set[int] = set()  # passes whose loss has not come back to the output yet
        self._uses: dict[nn.Module, list[Use]] = {module: [] for module in modules}
        self._weights = {module: module.weight for module in self._uses}
        self._watched: dict[nn.Module, Tensor] = {}  # the parameter that has a hook
        self._noticed = False  # whether the model, or a module, has been called
        self.unnoticed = False  # whether a gradient has come though none had been
        self.called: set[nn.Module] = set()  # in this pass, and looked at
        hook(self, model.register_forward_pre_hook, self._begin_pass)
        hook(self, partial(model.register_forward_hook, always_call=True), self._end_pass)
        for module in self._uses:
            hook(self, partial(module.register_forward_hook, with_kwargs=True, prepend=True), self._see)
            self._watch(module)

    def uses(self, module: nn.Module) -> list[Use]:
        """Where no backward pass reached the weight, as its ``grad`` was put there by hand, those of the last one."""
        uses = self._uses[module]
        recorded = [use for use in uses if use.gradients is not None]
        if not recorded:
            for use in uses:
                use.gradients, use.arriving = use.arriving, None
        return recorded or uses

    def clear(self) -> None:
        self._keep(lambda forward_pass: False)

    def forget(self, module: nn.Module) -> None:
        """What has been read."""
        self._uses[module] = []

    def restart(self) -> None:
        """Clears for another gradient, which may be that of the last pass: gradients are zeroed before the forward pass
        or after."""
        self._keep(lambda forward_pass: forward_pass == self._forward_pass and forward_pass in self._unanswered)

    def drop_unanswered(self) -> None:
        """Clears passes whose loss did not come back."""
        if self._unanswered:
            self._keep(lambda forward_pass: forward_pass not in self._unanswered)

    @contextmanager
    def before_loss(self, outputs: Iterable[Tensor]) -> Iterator[None]:
        """Inside, gradients are kept that are not those of the loss: it will come back to the model's outputs later."""
        before, self.recording, self._drawing = self.recording, True, True
        try:
            yield
        finally:
            self.recording, self._drawing = before, False
        forward_pass = self._forward_pass
        self._unanswered.add(forward_pass)
        for output in outputs:
            _unviewed(output).register_hook(lambda gradients: self._unanswered.discard(forward_pass))

    def _keep(self, wanted: Callable[[int], bool]) -> None:
        self._uses = {module: [use for use in uses if wanted(use.forward_pass)] for module, uses in self._uses.items()}
        self._unanswered = {forward_pass for forward_pass in self._unanswered if wanted(forward_pass)}

    def _begin_pass(self, module: nn.Module, args: tuple) -> None:
        self._noticed = True
        if torch.is_grad_enabled():
            self._next_pass()
            self._inside = True

    def _end_pass(self, module: nn.Module, args: tuple, output: object) -> None:
        self._inside = False

    def _next_pass(self) -> None:
        self._forward_pass += 1
        self._answered = False
        self.called.clear()

    def _see(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        self._noticed = True
        if not self._looks_at(module, output):
            return
        inputs = args[0] if args else kwargs.get("input")
        if not isinstance(inputs, Tensor) or not inputs.numel() or not output.numel():
            return
        if self._answered and not self._inside and _backward_pass() == NONE:
            self._next_pass()  # of a part of the model, called by itself
        self._watch(module)
        self.called.add(module)
        inputs = inputs.detach()
        if torch.is_autocast_enabled(inputs.device.type) or inputs.is_inference():
            inputs = inputs.clone()  # autocast saves a copy for the backward pass, so that they may be written to
        use, shape = Use(self._forward_pass, inputs, inputs._version), output.shape
        _unviewed(output).register_hook(lambda gradients: self._answer(module, use, gradients.detach().reshape(shape)))

    def _looks_at(self, module: nn.Module, output: object) -> bool:
        if not (isinstance(output, Tensor) and output.requires_grad and module.training and torch.is_grad_enabled()):
            return False
        wanted = self._wanted and self._wanted()
        if wanted is not None and not wanted(module):
            return False
        trains = any(param.requires_grad for param in module.parameters(recurse=False))
        return trains and module.weight is self._weights[module]  # another: torch.func.functional_call

    def _watch(self, module: nn.Module) -> None:
        param = next((param for param in module.parameters(recurse=False) if param.requires_grad), None)
        if param is not None and self._watched.get(module) is not param:
            self._watched[module] = param
            hook(self, param.register_post_accumulate_grad_hook, self._arrive, module)

    def _answer(self, module: nn.Module, use: Use, gradients: Tensor) -> None:
        """A gradient has come to an output."""
        if not self.recording:
            return
        uses = self._uses[module]
        if self._drawing:
            use.gradients = gradients
        else:
            adds, now = self._watched[module].grad is not None, _backward_pass()
            use.arriving, use.backward_pass, use.gradients = gradients, now, use.gradients if adds else None
            uses = [other for other in uses if other.backward_pass == now or (adds and other.gradients is not None)]
        self._uses[module] = uses if use in uses else [*uses, use]

    def _arrive(self, module: nn.Module, param: Tensor) -> None:
        """A gradient has been added to the parameter's."""
        self._answered = True
        self.unnoticed = not self._noticed
        for use in self._uses[module]:
            if use.arriving is not None and use.backward_pass == _backward_pass():
                use.gradients = use.arriving if use.gradients is None else use.gradients + use.arriving
            use.arriving = None
        self._uses[module] = [use for use in self._uses[module] if use.gradients is not None]


NONE = -1


def _backward_pass() -> int:
    """The number of the one that is going on, or NONE."""
    return torch._C._current_graph_task_id()


def _unviewed(output: Tensor) -> Tensor:
    """What to hook so that an in-place change of the output does not matter: that would drop the hooks of a view, which
    Linear gives for sequences."""
    base = output._base
    if base is None or base.is_leaf or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


def hook(owner: object, register: Callable, method: Callable, *first: object) -> None:
    """Registers a method of the owner with a module or a tensor, for as long as the owner lives."""
    weakref.finalize(owner, register(_Hook(method, *first)).remove)


class _Hook:
    """A hook that keeps the object of its method from nothing: neither from being collected, nor the module from being
    copied and pickled. A copy does nothing. Compiled graphs end where it is called."""

    def __init__(self, method: Callable | None = None, *first: object):
        self._method, self._first = None if method is None else weakref.WeakMethod(method), first
        self._uncompiled = torch.compiler.disable(_call_method_of_hook)

    def __call__(self, *args) -> None:
        self._uncompiled(self, *args)

    def __reduce__(self) -> tuple:
        return _Hook, ()


def _call_method_of_hook(hook: _Hook, *args) -> None:
    method = hook._method and hook._method()
    if method is not None:
        method(*hook._first, *args)
