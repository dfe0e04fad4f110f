"""An optimizer that looks at a model's layers: what it needs beside its steps."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Container, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .affine import ModuleLayer
from .capture import Capture, Use
from .replicas import Extent, Replicas, Share
from .report import Report, Row
from .sharding import is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ModelOptimizer(Optimizer):
    """Statistics of a layer are in ``self.state[layer.weight]``, with the number of their "updates" and of those
    "skipped", as soon as there are any. ``state_dict()`` holds them from the beginning, NaN where there are none yet,
    as torch.distributed.checkpoint loads what an optimizer has already. Every group counts its steps in "step", and in
    a state its tensors in "state_tensors".

    Args:
        model: its parameters are stepped. What DistributedDataParallel made of it stands for it.
        defaults: the options of every param group.
        groups: param groups of parameters of the model; None: one of all.
        process_group: of the processes that train the model together, whose statistics are averaged: those that have
            seen a layer count alike, whatever their number of samples, as they do in the gradient that
            DistributedDataParallel makes. None: its group, if it is such a model, or else torch.distributed's default
            one, if it is initialized by the time of a step.

    Raises TypeError for sharded parameters, at the first step if they became so, and RuntimeError there for processes
    that train other layers, and for a compiled model that takes no notice of the optimizer.
    """

    _layers: list[ModuleLayer]  # of the parameters that are stepped
    _momentum = "momentum_buffer"  # its name in the state; all other tensors there are statistics
    _of_any_length: tuple[str, ...] = ()  # those that a state may hold less or more of

    def __init__(
        self,
        model: nn.Module,
        defaults: dict[str, Any],
        groups: Iterable[dict] | None,
        process_group: ProcessGroup | None,
    ):
        self._title = type(self).__name__
        if isinstance(model, DistributedDataParallel):
            model, process_group = model.module, process_group or model.process_group
        if not isinstance(model, nn.Module):
            raise TypeError(f"{self._title}: expected model to be a torch.nn.Module, got {type(model).__name__}")
        params = list(model.parameters())
        if not params:
            raise ValueError(f"{self._title}: expected a model with parameters")
        self._model, self._replicas = model, Replicas(self._title, process_group, params[0].device)
        self._left_out: set[ModuleLayer] = set()  # in this step, in this process
        self._conforms = False  # the state, to parameters that may have been cast or moved since it was made
        self._seen_whole = False  # the parameters, at a step
        super().__init__([{"params": params}] if groups is None else groups, defaults | {"step": 0, "state_tensors": 0})
        self._capture = Capture(model, [layer.module for layer in self._known_layers(None)], self._wants)

    @abstractmethod
    def _check(self, options: dict) -> None:
        """Raises ValueError or TypeError for an option out of its range."""

    @abstractmethod
    def _known_layers(self, trained: Container[int] | None) -> list[ModuleLayer]:
        """Of the model, those that the method looks at. ``trained``: the ids of the parameters that count; None: all,
        frozen or not."""

    @abstractmethod
    def _structure(self, layer: ModuleLayer) -> tuple[str, int, int]:
        """For the report: in words, the number of matrices and the size of the largest."""

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
            self._refuse_sharded(self.param_groups[-1]["params"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        for param in self.param_groups[-1]["params"]:
            state = self.state[param]  # there even if empty: checkpoints would take a step to have one
            if param.requires_grad and self._has_momentum(self.param_groups[-1]):
                state[self._momentum] = torch.zeros_like(param)
        self._place_of = {id(p): place for place, group in enumerate(self.param_groups) for p in group["params"]}
        self._layers = self._known_layers(self._place_of.keys())
        self._layer_of = {layer.module: layer for layer in self._layers}
        self._description = self._title + str([(layer.name, *layer.shape) for layer in self._layers])

    def _has_momentum(self, group: dict) -> bool:
        return True

    def _numbers(self, layer: ModuleLayer | None) -> dict[str, int]:
        """What the state of a layer's weight, or None: of any other tensor, counts as it begins."""
        return {"updates": 0, "skipped": 0} if layer else {}

    def _momentum_of(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if self._momentum not in state:  # its parameter was frozen, or its group had none
            state[self._momentum] = torch.zeros_like(param)
        return state[self._momentum]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._capture.restart()

    def report(self) -> Report:
        """A row for every tensor (a bias that joins its weight in the weight's): its structure and bytes of state.
        "gradient": no layer that is known; or one that has been stepped without having been seen in training."""
        names = {id(param): name for name, param in self._model.named_parameters()}
        layers = {id(layer.weight): layer for layer in self._layers}
        joined = {id(layer.bias) for layer in self._layers if layer.bias is not None}
        return Report(
            self._row(group, param, names.get(id(param), "not in the model"), layers.get(id(param)))
            for group in self.param_groups
            for param in group["params"]
            if id(param) not in joined
        )

    def state_dict(self) -> dict:
        for group in self.param_groups:
            group["state_tensors"] = self._tensors(self.state.get(param, {}) for param in group["params"])
        saved = super().state_dict()
        layers = {id(layer.weight): layer for layer in self._layers if _trains(layer)}
        for index, param in self._saved_params(saved):
            layer = layers.get(id(param))
            saved["state"][index] = self._expected(param, layer) | saved["state"].get(index, {})
        return saved

    def _expected(self, param: Tensor, layer: ModuleLayer | None) -> dict[str, Tensor | int]:
        """Statistics that are not there yet."""
        shapes = self._shapes(layer) if layer else {}
        return self._numbers(layer) | {
            name: param.new_full(shape, math.nan, dtype=layer.dtype, requires_grad=False)
            for name, shape in shapes.items()
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch, but statistics keep their own dtypes; the next step computes in that of the layer. Raises
        ValueError for a state of another method or of tensors of other shapes, and changes nothing then."""
        self._check_state(state_dict)
        super().load_state_dict(state_dict)
        self._capture.clear()
        for index, param in self._saved_params(state_dict):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and name != self._momentum:
                    self.state[param][name] = value.to(param.device, copy=True)
        for layer in self._layers:
            state = self.state[layer.weight]
            for name in ("updates", "skipped", *self._shapes(layer)):
                if name in state and _is_absent(state[name]):
                    del state[name]
        self._conforms = False

    def _conform(self) -> None:
        """To where the parameters are now, and to the dtypes that their statistics are computed in."""
        dtypes = {id(layer.weight): layer.dtype for layer in self._layers}
        for param in (param for group in self.param_groups for param in group["params"]):
            state = self.state[param]
            for name, value in state.items():
                if isinstance(value, Tensor):
                    dtype = param.dtype if name == self._momentum else dtypes.get(id(param), value.dtype)
                    state[name] = value.to(param.device, dtype)
        self._conforms = True

    def _tensors(self, states: Iterable[dict]) -> int:
        """How many there are, without those that ``state_dict()`` adds."""
        entries = [entry for state in states for entry in state.items() if isinstance(entry[1], Tensor)]
        return sum(name == self._momentum or not _is_absent(value) for name, value in entries)

    def _saved_params(self, state_dict: dict) -> list[tuple[int, Tensor]]:
        """The parameters with their numbers in a state."""
        numbers = [index for group in state_dict["param_groups"] for index in group["params"]]
        return list(zip(numbers, (p for group in self.param_groups for p in group["params"]), strict=False))

    def _check_state(self, state_dict: dict) -> None:
        for group in state_dict["param_groups"]:
            if absent := self.defaults.keys() - group.keys() - {"state_tensors"}:
                raise ValueError(f"{self._title}: expected a state with {', '.join(sorted(absent))} in every group")
            found = self._tensors(state_dict["state"].get(index, {}) for index in group["params"])
            expected = group.get("state_tensors", 0)
            if found < expected:
                raise ValueError(
                    f"{self._title}: expected a state of {expected} tensors in a group, got {found}; "
                    "torch.distributed.checkpoint fills in what an optimizer has already, so take a step before"
                )
        layers = {id(layer.weight): layer for layer in self._layers}
        for index, param in self._saved_params(state_dict):
            expected = {self._momentum: tuple(param.shape)}
            if id(param) in layers:
                expected |= self._shapes(layers[id(param)])
            for name, value in state_dict["state"].get(index, {}).items():
                if name in self._of_any_length or name not in expected:
                    continue
                if tuple(value.shape) != expected[name]:
                    raise ValueError(
                        f"{self._title}: expected {name} of parameter {index} in the state to have shape "
                        f"{expected[name]}, got {tuple(value.shape)}"
                    )

    @abstractmethod
    def _shapes(self, layer: ModuleLayer) -> dict[str, tuple[int, ...]]:
        """Of the statistics, by name, but for those whose shapes are not known before."""

    def __getstate__(self) -> dict:
        raise TypeError(f"{self._title}: cannot be copied or pickled, it hangs on a model's modules; save state_dict()")

    def _group(self, layer: ModuleLayer) -> dict:
        """By whose options its curvature goes: the weight's."""
        return self.param_groups[self._place_of[id(layer.weight)]]

    @staticmethod
    def _due(group: dict, interval: str) -> bool:
        return group["step"] % group[interval] == 0

    def _wants(self, module: nn.Module) -> bool:
        """Whether statistics of a module's layer are due in this step: also where there are none yet."""
        layer = self._layer_of.get(module)
        if layer is None:
            return False
        return self._due(self._group(layer), "update_interval") or self._awaited(self.state.get(layer.weight, {}))

    def _awaited(self, state: dict) -> bool:
        return "updates" not in state

    def _shares(self, layers: Collection[ModuleLayer]) -> dict[Any, Share]:
        """Of the layers that were seen in this step, in any process; in this one only ``layers`` are. Where a process
        had to leave out a layer, that is counted. A collective in the steps in which statistics of any layer are due,
        whatever got a gradient here."""
        alone = self._replicas.count == 1
        if not (alone or any(self._wants(layer.module) for layer in self._layers if _trains(layer))):
            return {}
        uses = {layer: self._uses(layer) if layer in layers else [] for layer in self._layers}
        if alone and not (self._left_out or any(uses.values())):
            return {}
        rows = [[*layer.extent(uses[layer]), int(layer in self._left_out)] for layer in self._layers]
        self._left_out.clear()
        shares = {}
        for layer, columns in zip(self._layers, self._replicas.table(rows, self._description), strict=True):
            everywhere = [Extent(*extent) for *extent, _ in columns]
            if any(left_out for *_, left_out in columns):
                self._skip(self.state[layer.weight])
            if any(extent.samples for extent in everywhere):
                shares[layer] = Share(uses[layer], layer.extent(uses[layer]), everywhere)
        return shares

    def _uses(self, layer: ModuleLayer) -> list[Use]:
        """Of the layer in this step; none if its inputs have been overwritten since or are not what its class
        expects."""
        uses = self._capture.uses(layer.module)
        if all(layer.fits(use) and not use.overwritten for use in uses):
            return uses
        self._left_out.add(layer)
        return []

    @staticmethod
    def _skip(state: dict, times: int = 1) -> None:
        state["skipped"] = state.get("skipped", 0) + times

    def _evaluated(self, closure: Callable[[], float] | None) -> float | None:
        """The closure's loss, if there is one, with gradients that are dense from here on."""
        if not self._seen_whole:  # sharding may have put others in the places of parameters since
            self._refuse_sharded(self._model.parameters())
            self._seen_whole = True
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_unnoticed()
        self._refuse_sparse()
        if not self._conforms:
            self._conform()
        return loss

    def _refuse_sharded(self, params: Iterable[Tensor]) -> None:
        for param in params:
            how = _sharding(param)
            if how is not None:
                raise TypeError(
                    f"{self._title}: expected parameters that are whole in every process, got one that is {how}; "
                    "DistributedDataParallel keeps them so"
                )

    def _refuse_unnoticed(self) -> None:
        if self._capture.unnoticed:
            raise RuntimeError(
                f"{self._title}: expected to notice the model's forward passes, got gradients alone; a model that has "
                "been compiled and called takes no notice of an optimizer: make that first, or torch.compiler.reset()"
            )

    def _refuse_sparse(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.grad.layout != torch.strided:
                    raise TypeError(f"{self._title}: expected dense gradients, got layout {param.grad.layout}")

    def _row(self, group: dict, param: Tensor, name: str, layer: ModuleLayer | None) -> Row:
        state = self.state.get(param, {})
        seen = layer is not None and ("updates" in state or group["step"] == 0)
        params = layer.params if layer else [param]
        states = [self.state[p] for p in params if p in self.state]
        structure, count, size = self._structure(layer) if seen else ("gradient", 0, 0)
        return Row(
            name=name + (" + bias" if len(params) > 1 else ""),
            shape=tuple(param.shape),
            structure=structure,
            count=count,
            size=size,
            bytes=sum(value.nbytes for s in states for value in s.values() if isinstance(value, Tensor)),
            skipped=state.get("skipped", 0),
        )


def _trains(layer: ModuleLayer) -> bool:
    return any(param.requires_grad for param in layer.module.parameters(recurse=False))


def _sharding(param: Tensor) -> str | None:
    if getattr(param, "_fsdp_flattened", False):
        return "flattened by FullyShardedDataParallel"
    return "a DTensor (fully_shard, tensor parallelism)" if is_sharded(param) else None


def _is_absent(value: Tensor | int) -> bool:
    """Of what ``state_dict()`` adds, for there are no statistics yet."""
    return bool(value.isnan().all()) if isinstance(value, Tensor) else value == 0


def check_range(title: str, options: dict) -> None:
    """What all methods share. Raises ValueError or TypeError naming the option."""
    for name in ("lr", "weight_decay"):
        number(title, name, options[name], 0, math.inf)
    number(title, "momentum", options["momentum"], 0, 1)
    if options["kl_clip"] is not None:
        positive(title, "kl_clip", options["kl_clip"])
    for name in ("update_interval", "factor_interval"):
        count(title, name, options[name])


def number(title: str, name: str, value: object, least: float, below: float) -> None:
    """Raises for what is not in [least, below)."""
    wrong = TypeError(f"{title}: expected {name} to be a number, got {value!r}")
    if isinstance(value, str):
        raise wrong
    try:
        good = least <= float(value) < below
    except (TypeError, ValueError):
        raise wrong from None
    if not good:
        raise ValueError(f"{title}: expected {name} in [{least}, {below}), got {value!r}")


def positive(title: str, name: str, value: object) -> None:
    """Raises for what is not in (0, inf)."""
    number(title, name, value, 0, math.inf)
    if value == 0:
        raise ValueError(f"{title}: expected {name} > 0, got {value!r}")


def one_of(title: str, name: str, value: object, known: Iterable[str]) -> None:
    """Raises for what is not among the known."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{title}: expected {name} to be one of {', '.join(known)}, got {value!r}")


def flag(title: str, name: str, value: object) -> None:
    """Raises for what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{title}: expected {name} to be True or False, got {value!r}")


def scaler(title: str, value: object) -> None:
    """Raises for what is neither a GradScaler nor None."""
    if value is not None and not isinstance(value, torch.amp.GradScaler):
        raise TypeError(f"{title}: expected grad_scaler to be a torch.amp.GradScaler or None, got {value!r}")


def count(title: str, name: str, value: object) -> None:
    """Raises for what is not an integer >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{title}: expected {name} to be an integer >= 1, got {value!r}")
