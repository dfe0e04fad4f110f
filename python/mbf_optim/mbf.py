"""The Mini-Block Fisher optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from mbf_kernels import SymmetricBlocks, accumulate_

from .diagonal import diagonal_step_
from .layers import Layer, layers_of
from .options import check_options, keep_device_scalars, with_numbers
from .report import Report, Row
from .schedule import advance, capturing, intervals, on_host, refuse_capture, weights
from .shared import shared_step_
from .tasks import LayerTensors, Task
from .unshared import unshared_step_


class MBF(Optimizer):
    r"""Mini-Block Fisher: momentum times the inverse of many small damped Fisher blocks.

    For every mini-block b of a weight (one 3x3 kernel of a convolution, a run of 64 inputs of a linear layer)::

        M <- mu M + g
        F <- beta F + (1 - beta) g g^T                     averaged over the mini-blocks that share F
        P  = (F + lambda I)^-1 D                           D = mu M + g with Nesterov, else M
        W <- (1 - alpha gamma) W - alpha P                 graft=None: the paper's form
        W <- (1 - alpha gamma) W - alpha (|u| / |P|) P     graft="adam", the default: the length of Adam's step
        u  = mhat / (sqrt(vhat) + eps), mhat = (1-mu) D / (1 - mu^t), vhat = diag(F) / (1 - beta^t)

    In the grafted form Adam's learning rate carries over; where matrices are shared, vhat is an element-wise average
    of g^2 with ``diagonal_decay``. Tensors without blocks take Adam's step (grafted form) or the authors' (paper form).

    Args:
        params: parameters, ``model.named_parameters()`` (then the bias of a linear layer joins its weight as the last
            column) or param groups; every keyword below may be set per group.
        lr: alpha. Start from Adam's. A number or a tensor of one element.
        momentum: mu in [0, 1).
        decay: beta in [0, 1], of F.
        damping: lambda; a multiple of the block's mean diagonal when ``relative_damping``. A number or a tensor.
        relative_damping: see ``damping``.
        weight_decay: gamma, decoupled as in AdamW.
        graft: "adam" or None.
        nesterov: use mu M + g in place of M.
        update_interval: T1, steps between updates of F. None: 1, but 10 for shared matrices above 128.
        factor_interval: T2, steps between factorisations. None: 1, or 100 likewise. In the first T2 steps every update
            is followed by a factorisation.
        blocks: "filter" (one k*k block per kernel), "segment" (runs of ``segment`` inputs of one output), "row" (all
            inputs of an output), "column" (all outputs of an input), "grid" (``grid=(m1, m2)`` tiles), "diagonal", or
            "auto": filter for kernels of 2 to 128 taps, averaged segments for matrices, diagonal otherwise; in the
            paper form filter for every convolution and the averaged row for matrices. A tensor that the structure does
            not fit takes the diagonal step; ``report()`` shows it.
        segment: n of "segment"; the last run of a row may be shorter.
        grid: (m1, m2), the groups of inputs and of outputs of "grid"; they must divide the matrix.
        average: share one averaged matrix (per run for segments) instead of one per mini-block; not for "filter".
        diagonal_decay: beta_2 of the element-wise second moments.
        eps: of the element-wise second moments.
        maximize: ascend.
        capturable: ``step()`` may be captured in a CUDA graph. Counters live on the device and advance with every
            replay; ``lr`` and ``damping`` as tensors on the parameters' device are read there, so that
            ``group["lr"].fill_(x)`` between replays takes effect. Floats and all other options are fixed at capture.
            Both intervals are 1: a shared matrix above 128 needs them set. Otherwise tensors are read by ``float()``.

    A mini-block whose gradient is not finite, or whose matrix cannot be factored, is left as it was and counted in
    ``report()``.

    Source: Bahamou, Goldfarb, Ren, "A Mini-Block Fisher Method for Deep Neural Networks", AISTATS 2023. Ours: the
    grafted form, relative damping, segments, Nesterov. The authors' code starts F from a pass over the data: call
    ``observe()`` after each backward of such a pass.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.9,
        decay: float = 0.98,
        damping: float | Tensor = 0.3,
        relative_damping: bool = True,
        weight_decay: float = 0.0,
        graft: str | None = "adam",
        nesterov: bool = True,
        update_interval: int | None = None,
        factor_interval: int | None = None,
        blocks: str = "auto",
        segment: int = 64,
        grid: tuple[int, int] | None = None,
        average: bool = True,
        diagonal_decay: float = 0.999,
        eps: float = 1e-8,
        maximize: bool = False,
        capturable: bool = False,
    ):
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        check_options(defaults)
        self._plan: list[list[Layer]] | None = None
        super().__init__(params, defaults)

    @classmethod
    def paper(
        cls,
        params: ParamsT,
        lr: float | Tensor,
        damping: float | Tensor,
        *,
        momentum: float = 0.9,
        decay: float = 0.9,
        weight_decay: float = 0.0,
        **options,
    ) -> MBF:
        """The paper's form with the authors' defaults: no grafting, no Nesterov, absolute damping, decay 0.9.

        Where curvature is small lr / damping is SGD's rate with momentum; the authors' tuned ratios are 0.033 and 0.01.
        """
        paper_form = {"graft": None, "nesterov": False, "relative_damping": False}
        return cls(
            params, lr, momentum=momentum, decay=decay, damping=damping, weight_decay=weight_decay,
            **(paper_form | options),
        )  # fmt: skip

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        self._plan = None
        group = self.param_groups[-1]
        try:
            check_options(group)
            for param in group["params"]:
                if param.dtype not in (torch.float32, torch.float64):
                    raise TypeError(f"MBF: expected float32 or float64 parameters, got {param.dtype}")
            self._layers()
        except (TypeError, ValueError):
            self.param_groups.pop()
            self._plan = None
            raise

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._plan = None
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step for every parameter that has a gradient; returns the closure's loss.

        Raises RuntimeError inside the capture of a CUDA graph where a group is not capturable, or where no step has
        been taken before: the graph must not allocate the state.
        """
        if capturing() and not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError("MBF.step: expected capturable=True inside the capture of a CUDA graph, got False")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, layers in self._layers():
            self._step_group(group, [layer for layer in layers if _has_grad(layer)])
        return loss

    @torch.no_grad()
    def observe(self) -> None:
        """Averages the current gradients into F and moves nothing: the paper's warm start, one call per batch.

        The j-th call sets F <- ((j-1)/j) F + (1/j) g g^T. Raises RuntimeError once a step has been taken.
        """
        for _, layers in self._layers():
            for layer in layers:
                if not layer.blocks or not _has_grad(layer):
                    continue
                state = self._state(layer)
                if on_host(state)["step"]:
                    raise RuntimeError(f"MBF.observe: expected no step so far, but {layer.name} has been stepped")
                state["observed"] += 1
                grad = LayerTensors.of(layer, self.state, maximize=False).grad
                for blocks in layer.blocks:
                    decay = 1 - 1 / state["observed"]
                    accumulate_(state["fisher" + blocks.suffix], blocks.flat(grad), decay=decay)
                state["fisher_weight"] = 1.0

    def report(self) -> Report:
        """A row for every tensor (a joined bias in its weight's): structure, matrices, state bytes, skipped blocks."""
        return Report(self._row(group, layer) for group, layers in self._layers() for layer in layers)

    def state_dict(self) -> dict:
        """As in torch; F and L in canonical form, packed lower triangles [count, T]."""
        state_dict = super().state_dict()
        state_dict["state"] = {
            index: {name: _portable(value) for name, value in (state | on_host(state)).items() if name != "clock"}
            for index, state in state_dict["state"].items()
        }
        return state_dict

    def load_state_dict(self, state_dict: dict) -> None:
        """Raises ValueError, before anything changes, where the saved blocks do not fit the parameters.

        A group stays capturable, or not; the tensors ``lr`` and ``damping`` of a capturable one take the saved values.
        The state is replaced: a CUDA graph must be captured again.
        """
        self._check_saved(state_dict)
        own = [{name: group[name] for name in ("capturable", "lr", "damping")} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, options in zip(self.param_groups, own, strict=True):
            keep_device_scalars(group, options)
        self._plan = None
        for state in self.state.values():
            for name, value in state.items():
                if name.startswith(("fisher", "factor")) and isinstance(value, Tensor):
                    state[name] = SymmetricBlocks.from_packed(value)
            if "skipped" in state:
                device = state["momentum"].device
                state["skipped"] = torch.tensor(int(state["skipped"]), dtype=torch.int64, device=device)

    def _layers(self) -> Iterator[tuple[dict, list[Layer]]]:
        if self._plan is None:
            first, self._plan = 0, []
            for group in self.param_groups:
                self._plan.append(layers_of(group, first))
                first += len(group["params"])
        return zip(self.param_groups, self._plan, strict=True)

    def _state(self, layer: Layer) -> dict:
        """The state of a layer's weight; what the bias needs of its own is made with it."""
        state = self.state[layer.weight]
        if state:
            return state
        refuse_capture("the first step of a layer (it allocates state)")
        needs_square = not layer.blocks or any(blocks.shared for blocks in layer.blocks)
        for param in layer.params:
            self.state[param]["momentum"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            if needs_square:
                self.state[param]["second_moment"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        state["step"] = 0
        if layer.blocks:
            state["observed"], state["fisher_weight"] = 0, 0.0
            state["skipped"] = torch.zeros((), dtype=torch.int64, device=layer.weight.device)
        for blocks in layer.blocks:
            state["fisher" + blocks.suffix] = SymmetricBlocks.zeros(
                blocks.count, blocks.size, layer.weight.dtype, layer.weight.device
            )
        return state

    def _advance(self, group: dict, layers: list[Layer]) -> None:
        states = [self._state(layer) for layer in layers]
        advance(states, [layer.blocks[0] if layer.blocks else None for layer in layers], self.state.values(), group)

    def _step_group(self, group: dict, layers: list[Layer]) -> None:
        group = with_numbers(group)
        self._advance(group, layers)
        self._step_diagonal(group, [layer for layer in layers if not layer.blocks])
        blocked = [layer for layer in layers if layer.blocks]
        tensors = [LayerTensors.of(layer, self.state, group["maximize"]) for layer in blocked]
        tasks = [Task.of(blocks, t, self.state[t.layer.weight], group) for t in tensors for blocks in t.layer.blocks]
        unshared_step_([task for task in tasks if not task.blocks.shared], group)
        shared_step_([task for task in tasks if task.blocks.shared], group)
        for t in tensors:
            t.write_back(self.state)

    def _step_diagonal(self, group: dict, layers: list[Layer]) -> None:
        alike: dict[tuple, list[Tensor]] = {}
        for layer in layers:
            weight, state = layer.weight, self.state[layer.weight]
            time = id(state["clock"]) if "clock" in state else state["step"]
            alike.setdefault((weight.device, weight.dtype, time), []).append(weight)
        for params in alike.values():
            states = [self.state[param] for param in params]
            momentum_weight, square_weight, _ = weights(states[0], group)
            diagonal_step_(
                params,
                [-param.grad if group["maximize"] else param.grad for param in params],
                [state["momentum"] for state in states],
                [state["second_moment"] for state in states],
                lr=group["lr"],
                momentum=group["momentum"],
                momentum_weight=momentum_weight,
                decay=group["diagonal_decay"],
                square_weight=square_weight,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                adam=group["graft"] is not None,
            )

    def _row(self, group: dict, layer: Layer) -> Row:
        params = layer.params
        state = self.state[layer.weight] if layer.weight in self.state else {}
        vectors = 2 if not layer.blocks or any(blocks.shared for blocks in layer.blocks) else 1
        size = sum(vectors * param.numel() * param.element_size() for param in params)
        for blocks in layer.blocks:
            matrices = SymmetricBlocks.zeros(blocks.count, blocks.size, layer.weight.dtype, device="meta")
            size += matrices.nbytes * (1 + (intervals(blocks, group)[1] > 1))  # F, and its factor where it is kept
        return Row(
            name=layer.name + (" + bias" if layer.bias is not None else ""),
            shape=tuple(layer.weight.shape),
            structure=layer.blocks[0].structure if layer.blocks else "diagonal",
            count=sum(blocks.count for blocks in layer.blocks),
            size=max((blocks.size for blocks in layer.blocks), default=1),
            bytes=size,
            skipped=int(state.get("skipped", 0)),
        )

    def _check_saved(self, state_dict: dict) -> None:
        saved_groups, saved = state_dict["param_groups"], state_dict["state"]
        for (_, layers), group, saved_group in zip(self._layers(), self.param_groups, saved_groups, strict=False):
            index = dict(zip(map(id, group["params"]), saved_group["params"], strict=False))
            for layer in layers:
                state = saved.get(index.get(id(layer.weight)), {})
                for blocks in layer.blocks if state else ():
                    expected = [blocks.count, blocks.size * (blocks.size + 1) // 2]
                    found = state.get("fisher" + blocks.suffix)
                    if found is None or list(found.shape) != expected:
                        got = "none" if found is None else list(found.shape)
                        raise ValueError(
                            f"MBF.load_state_dict: expected blocks {expected} for {layer.name}, got {got}: "
                            "was it saved with another partition?"
                        )


def _has_grad(layer: Layer) -> bool:
    """Whether any parameter of the layer has a gradient. Raises TypeError for one that is sparse."""
    grads = [param.grad for param in layer.params if param.grad is not None]
    for grad in grads:
        if grad.layout != torch.strided:
            raise TypeError(f"MBF: expected dense gradients, got layout {grad.layout} for {layer.name}")
    return bool(grads)


def _portable(value: object) -> object:
    """What a checkpoint holds of a state entry: tensors and numbers."""
    if isinstance(value, SymmetricBlocks):
        return value.to_packed()
    return int(value) if isinstance(value, Tensor) and value.dtype == torch.int64 else value
