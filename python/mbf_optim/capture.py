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


@dataclass(frozen=True)
class Use:
    """One call of a module whose output got a gradient."""

    forward_pass: int  # of the model, counted
    inputs: Tensor  # as the module got them, detached
    gradients: Tensor  # of the loss, of the output's shape


class Capture:
    """The uses of some modules of a model, since they were last cleared.

    Recorded are calls in training mode with autograd on, once their output's gradient is known: under non-reentrant
    checkpointing that is the first call, not the one that recomputes. What follows in place does not matter.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]):
        self.active = True  # whether calls are looked at
        self.recording = True  # whether gradients are kept
        self._forward_pass = 0
        self._unanswered: set[int] = set()  # passes whose loss has not come back to the output yet
        self._uses: dict[nn.Module, list[Use]] = {module: [] for module in modules}
        hook(self, model.register_forward_pre_hook, self._begin_pass)
        for module in self._uses:
            hook(self, partial(module.register_forward_hook, with_kwargs=True), self._see)

    def uses(self, module: nn.Module) -> list[Use]:
        return self._uses[module]

    def clear(self) -> None:
        self._keep(lambda forward_pass: False)

    def restart(self) -> None:
        """Clears for another gradient, which may be that of the last pass: gradients are zeroed before the forward pass
        or after."""
        self._keep(lambda forward_pass: forward_pass == self._forward_pass and forward_pass in self._unanswered)

    def drop_unanswered(self) -> None:
        """Clears passes whose loss did not come back."""
        if self._unanswered:
            self._keep(lambda forward_pass: forward_pass not in self._unanswered)

    @contextmanager
    def before_loss(self, output: Tensor) -> Iterator[None]:
        """Inside, gradients are kept that are not those of the loss: it will come back to the model's output later."""
        before, self.recording = self.recording, True
        try:
            yield
        finally:
            self.recording = before
        forward_pass = self._forward_pass
        self._unanswered.add(forward_pass)
        _unviewed(output).register_hook(lambda gradients: self._unanswered.discard(forward_pass))

    def _keep(self, wanted: Callable[[int], bool]) -> None:
        for uses in self._uses.values():
            uses[:] = [use for use in uses if wanted(use.forward_pass)]
        self._unanswered = {forward_pass for forward_pass in self._unanswered if wanted(forward_pass)}

    def _begin_pass(self, module: nn.Module, args: tuple) -> None:
        self._forward_pass += 1

    def _see(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        trains = module.training and any(param.requires_grad for param in module.parameters(recurse=False))
        if not (self.active and trains and torch.is_grad_enabled()):
            return
        inputs, forward_pass = (args[0] if args else kwargs["input"]).detach(), self._forward_pass
        shape = output.shape

        def keep(gradients: Tensor) -> None:
            if self.recording:
                self._uses[module].append(Use(forward_pass, inputs, gradients.detach().reshape(shape)))

        _unviewed(output).register_hook(keep)


def _unviewed(output: Tensor) -> Tensor:
    """What to hook so that an in-place change of the output does not matter: that would drop the hooks of a view, which
    Linear gives for sequences."""
    base = output._base
    if base is None or base.is_leaf or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


def hook(owner: object, register: Callable, method: Callable) -> None:
    """Registers a method of the owner with a module, for as long as the owner lives."""
    weakref.finalize(owner, register(_Hook(method)).remove)


class _Hook:
    """A module's hook that keeps the object of its method from nothing: neither from being collected, nor the module
    from being copied and pickled. A copy does nothing."""

    def __init__(self, method: Callable | None = None):
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *args) -> None:
        method = self._method and self._method()
        if method is not None:
            method(*args)

    def __reduce__(self) -> tuple:
        return _Hook, ()
