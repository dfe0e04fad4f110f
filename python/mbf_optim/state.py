"""The state of a layer: made with the optimizer, and as checkpoints hold it.

Beside each parameter: ``momentum`` M, ``second_moment`` v where there is one, ``master`` the weights in float32 where
they are kept. Beside a weight, or a bias that joins none: ``step`` and ``fisher_weight``, the sums of the weights in M
and F, or the ``clock`` that counts them; and where there are blocks ``fisher`` F, ``factor`` L if it is kept (with the
suffixes of the blocks), ``observed`` and ``skipped``.

At work matrices are ``SymmetricBlocks`` and counters numbers. In checkpoints all are tensors: matrices packed
triangles, [O, matrices of an output, T] or [R, T] where they are averaged, and ``skipped`` the sum of [O] numbers, so
that whatever has a row for every output can be sharded, and sharded anew, as the parameter is.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor

from mbf_kernels import SymmetricBlocks

from .layers import Layer, fishers, has_matrices, used
from .partition import Blocks
from .schedule import intervals, on_host, refuse_capture
from .sharding import by_rows, local, own_part, placed_like, replicated, whole

States = MutableMapping[Tensor, dict]

_NAMES_LIKE_PARAMS = ("momentum", "second_moment", "master")


def needs_squares(layer: Layer, group: dict) -> bool:
    """Whether the layer keeps element-wise second moments."""
    return not layer.blocks or (layer.shared and group["graft"] is not None)


def needs_masters(layer: Layer, group: dict) -> bool:
    return layer.half and group["master_weights"]


def complete(layer: Layer, states: States, group: dict) -> dict:
    """The state of the layer's weight, with all that a step needs: made, or completed where options have changed."""
    if isinstance(states[layer.weight].get("step"), Tensor):  # as checkpoints hold it: ZeRO puts it there like that
        take_up(layer, states, {param: states[param] for param in layer.params})
    if not _is_made(layer, states):
        refuse_capture("the first step of a layer (it allocates state)")
        _make(layer, states, group)
    # Of a frozen bias all may be missing: checkpoints of several processes leave it out.
    for param in _without("momentum", layer, states):
        states[param]["momentum"] = _zeros_like(param, layer)
    state = states[layer.weight]
    if needs_squares(layer, group) and _without("second_moment", layer, states):
        refuse_capture("the first grafted step of a layer (it allocates state)")
        for param, square in zip(layer.params, _second_moments(layer, state, group), strict=True):
            states[param].setdefault("second_moment", square)
    if needs_masters(layer, group) and _without("master", layer, states):
        refuse_capture("the first step with master weights (it allocates them)")
        for param in _without("master", layer, states):
            states[param]["master"] = param.detach().to(layer.dtype)
    for blocks in layer.blocks:
        if intervals(blocks, group)[1] == 1:  # an old factor must not come back when one is kept again
            state.pop("factor" + blocks.suffix, None)
    return state


def _without(name: str, layer: Layer, states: States) -> list[Tensor]:
    return [param for param in layer.params if name not in states[param]]


def canonical(layer: Layer, states: States) -> dict[Tensor, dict]:
    """By parameter, as checkpoints hold it. Waits for the device where counters are on it."""
    of_params = {param: dict(states[param]) for param in layer.params if param in states}
    state = of_params.get(layer.weight, {})
    if isinstance(state.get("step"), Tensor) or "momentum" not in state:
        return of_params
    numbers = on_host(state)
    state.pop("clock", None)
    state["step"] = torch.tensor(numbers["step"], dtype=torch.float32, device="cpu")
    if layer.blocks:
        state["fisher_weight"] = torch.tensor(numbers["fisher_weight"], dtype=torch.float64, device="cpu")
        state["observed"] = torch.tensor(state["observed"], device="cpu")
        by_output = torch.zeros(_outputs_here(layer), dtype=torch.int64, device=state["skipped"].device)
        by_output[:1] = state["skipped"]
        state["skipped"] = _outward(layer, False, by_output)
    for name, blocks in _matrices(layer, state):
        state[name] = _outward(layer, blocks.shared, state[name].to_packed().view(blocks.packed_shape))
    return of_params


def take_up(layer: Layer, states: States, saved: dict[Tensor, dict]) -> None:
    """Puts a copy of what a checkpoint holds into the states; what it does not hold is left to ``complete``."""
    for param in layer.params:
        entries = saved.get(param, {})
        states[param] = _others(states[param])
        for name in _NAMES_LIKE_PARAMS:
            if name in entries:
                value = placed_like(entries[name].detach(), param)
                states[param][name] = value.to(device=param.device, dtype=layer.dtype, copy=True)
    state, entries = states[layer.weight], saved.get(layer.weight, {})
    if "step" not in entries:
        return
    device = local(layer.weight).device
    state["step"] = int(entries["step"])
    if layer.blocks:
        state["fisher_weight"] = float(entries["fisher_weight"])
        state["observed"] = int(entries["observed"])
        skipped = entries["skipped"]
        if isinstance(skipped, Tensor) and skipped.ndim:
            skipped = _inward(layer, False, skipped).sum()
        state["skipped"] = torch.tensor(int(skipped), dtype=torch.int64, device=device)
    for name, blocks in _matrices(layer, entries):
        packed = entries[name].reshape(layer.saved_shapes(blocks)[0])
        packed = _inward(layer, blocks.shared, packed).to(device=device, dtype=layer.dtype)
        state[name] = SymmetricBlocks.from_packed(packed.reshape(blocks.count, blocks.packed_shape[-1]))


def check_saved(layer: Layer, saved: dict[Tensor, dict]) -> None:
    """Raises ValueError where the layer could not take it up."""
    if not any(saved.get(param) for param in layer.params):
        return
    for param in layer.params:
        for name in _NAMES_LIKE_PARAMS:
            found = saved.get(param, {}).get(name)
            needed_here = name == "momentum" and (param.requires_grad or param is layer.weight)
            if not _is_shaped(found, param.shape) and (found is not None or needed_here):
                raise ValueError(_unexpected(layer, name, param.shape, found))
    of_weight = saved.get(layer.weight, {})
    for name in ("step", "fisher_weight", "observed", "skipped") if layer.blocks else ("step",):
        found = of_weight.get(name)
        by_output = name == "skipped" and _is_shaped(found, layer.weight.shape[:1])
        if not (by_output or isinstance(found, int | float) or _is_shaped(found, ())):
            raise ValueError(_unexpected(layer, name, (), found))
    shapes = {"fisher" + blocks.suffix: layer.saved_shapes(blocks) for blocks in layer.blocks}
    found = fishers(of_weight) | {name: value for name, value in of_weight.items() if name.startswith("factor")}
    for name in sorted(shapes.keys() | found.keys()):
        expected = shapes.get(name.replace("factor", "fisher"), ())
        if not _is_shaped(found.get(name), *expected):
            raise ValueError(_unexpected(layer, name, expected[0] if expected else None, found.get(name)))


def _is_shaped(found: object, *shapes: tuple[int, ...]) -> bool:
    return isinstance(found, Tensor) and tuple(found.shape) in shapes


def _unexpected(layer: Layer, name: str, shape: tuple[int, ...] | None, found: object) -> str:
    expected = "no" if shape is None else f"a tensor {list(shape)} as"
    got = list(found.shape) if isinstance(found, Tensor) else "none" if found is None else type(found).__name__
    return (
        f"MBF.load_state_dict: expected {expected} {name} for {layer.name}, got {got}: was it saved with other blocks, "
        'segment, grid, average (or graft with blocks="auto"), with the other of model.parameters() and '
        "model.named_parameters(), or by another optimizer?"
    )


def _is_made(layer: Layer, states: States) -> bool:
    state = states[layer.weight]
    momentum = state.get("momentum")
    if momentum is None or used(state):
        return momentum is not None
    found, expected = (
        (momentum.shape, momentum.dtype, momentum.device),
        (layer.weight.shape, layer.dtype, layer.weight.device),
    )
    alone = layer.bias is not None and "step" in states[layer.bias]
    return found == expected and has_matrices(layer, state) and not alone


def _make(layer: Layer, states: States, group: dict) -> None:
    for param in layer.params:
        states[param] = _others(states[param])
    state = states[layer.weight]
    state["step"] = 0
    if layer.blocks:
        state["fisher_weight"], state["observed"] = 0.0, 0
        state["skipped"] = torch.zeros((), dtype=torch.int64, device=layer.weight.device)
    for blocks in layer.blocks:
        kept = ("fisher", "factor") if intervals(blocks, group)[1] > 1 else ("fisher",)
        for name in kept:
            state[name + blocks.suffix] = SymmetricBlocks.zeros(
                blocks.count, blocks.size, layer.dtype, layer.weight.device
            )


def _others(state: dict) -> dict:
    """The entries of somebody else."""
    own = ("momentum", "second_moment", "master", "step", "clock", "fisher", "factor", "observed", "skipped")
    return {name: value for name, value in state.items() if not name.startswith(own)}


def _zeros_like(param: Tensor, layer: Layer) -> Tensor:
    return torch.zeros_like(param, dtype=layer.dtype, memory_format=torch.preserve_format, requires_grad=False)


def _second_moments(layer: Layer, state: dict, group: dict) -> list[Tensor]:
    """Zeros, or where matrices have been averaged without them what F knows: as if they had been averaged as well."""
    squares = [_zeros_like(param, layer) for param in layer.params]
    numbers = on_host(state)
    if layer.blocks and numbers["step"]:
        weight = (1 - group["diagonal_decay"] ** numbers["step"]) / (numbers["fisher_weight"] or 1.0)
        diagonals = [weight * state["fisher" + blocks.suffix].diagonal() for blocks in layer.blocks]
        here = [whole(square) if layer.exchanged else local(square) for square in squares]
        for square, values in zip(squares, layer.spread(diagonals, here), strict=True):
            local(square).copy_(own_part(values, square) if layer.exchanged else values)
    return squares


def _matrices(layer: Layer, state: dict) -> list[tuple[str, Blocks]]:
    """The names of those that the state holds, with their blocks."""
    names = [(name + blocks.suffix, blocks) for blocks in layer.blocks for name in ("fisher", "factor")]
    return [(name, blocks) for name, blocks in names if name in state]


def _outputs_here(layer: Layer) -> int:
    return (layer.weight if layer.exchanged else local(layer.weight)).shape[0]


def _outward(layer: Layer, shared: bool, here: Tensor) -> Tensor:
    """What is here as a part of what is everywhere."""
    return (replicated if layer.everywhere(shared) else by_rows)(here, layer.weight)


def _inward(layer: Layer, shared: bool, tensor: Tensor) -> Tensor:
    """The inverse; the tensor may be whole, too."""
    return whole(tensor) if layer.everywhere(shared) else local(placed_like(tensor, layer.weight))
