"""The Mini-Block Fisher optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from mbf_kernels import SymmetricBlocks, accumulate_

from .layers import PARTITION, Layer, layers_of
from .options import check_options, keep_device_scalars, with_numbers
from .plan import Plan
from .report import Report, Row
from .schedule import capturing, intervals, on_host, refuse_capture


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
            column, unless it would be a run of its own) or param groups; every keyword below may be set per group.
        lr: alpha. Start from Adam's. A number or a tensor of one element.
        momentum: mu in [0, 1).
        decay: beta in [0, 1], of F.
        damping: lambda; a multiple of the block's mean diagonal when ``relative_damping``. A number or a tensor.
        relative_damping: see ``damping``.
        weight_decay: gamma, decoupled as in AdamW.
        graft: "adam" or None. Where it changes between steps, tensors with state keep their mini-blocks.
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
        self._forget()
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
        self._forget()
        group = self.param_groups[-1]
        try:
            check_options(group)
            for param in group["params"]:
                if param.dtype not in (torch.float32, torch.float64):
                    raise TypeError(f"MBF: expected float32 or float64 parameters, got {param.dtype}")
            self._layers()
        except (TypeError, ValueError):
            self.param_groups.pop()
            self._forget()
            raise

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()
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
        for index, group in enumerate(self.param_groups):
            self._plan(index, group).step(with_numbers(group))
        return loss

    @torch.no_grad()
    def observe(self) -> None:
        """Averages the current gradients into F and moves nothing: the paper's warm start, one call per batch.

        The j-th call sets F <- ((j-1)/j) F + (1/j) g g^T. Raises RuntimeError once a step has been taken.
        """
        for group, layers in self._layers():
            for layer in layers:
                if not layer.blocks or not layer.has_grad():
                    continue
                state = self._state(layer, group)
                if on_host(state)["step"]:
                    raise RuntimeError(f"MBF.observe: expected no step so far, but {layer.name} has been stepped")
                state["observed"] += 1
                grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in layer.params]
                for blocks in layer.blocks:
                    g = layer.sharing(blocks, grads[0], grads[-1])
                    accumulate_(state["fisher" + blocks.suffix], g, decay=1 - 1 / state["observed"])
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
        self._forget()
        for state in self.state.values():
            for name, value in state.items():
                if name.startswith(("fisher", "factor")) and isinstance(value, Tensor):
                    state[name] = SymmetricBlocks.from_packed(value)
            if "skipped" in state:
                device = state["momentum"].device
                state["skipped"] = torch.tensor(int(state["skipped"]), dtype=torch.int64, device=device)

    def _forget(self) -> None:
        """What is derived from parameters and state: made again when it is needed."""
        self._made_of: list[tuple] | None = None
        self._known_layers: list[list[Layer]] = []
        self._plans: dict[int, Plan] = {}

    def _layers(self) -> Iterator[tuple[dict, list[Layer]]]:
        made_of = [
            (list(map(id, group["params"])), *(group[name] for name in PARTITION)) for group in self.param_groups
        ]
        if self._made_of != made_of:
            self._forget()
            first = 0
            for group in self.param_groups:
                self._known_layers.append(layers_of(group, first, self.state))
                first += len(group["params"])
            self._made_of = made_of
        return zip(self.param_groups, self._known_layers, strict=True)

    def _plan(self, index: int, group: dict) -> Plan:
        """How the group steps now."""
        plan = self._plans.get(index)
        if plan is None or not plan.fits(group, self.state):
            layers = list(self._layers())[index][1]
            for layer in layers:
                if layer.has_grad():
                    self._state(layer, group)
            plan = self._plans[index] = Plan(group, layers, self.state)
        return plan

    def _state(self, layer: Layer, group: dict) -> dict:
        """The state of a layer's weight; what the bias needs of its own is made with it."""
        state = self.state[layer.weight]
        if not state:
            refuse_capture("the first step of a layer (it allocates state)")
            for param in layer.params:
                self.state[param]["momentum"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["step"] = 0
            if layer.blocks:
                state["observed"], state["fisher_weight"] = 0, 0.0
                state["skipped"] = torch.zeros((), dtype=torch.int64, device=layer.weight.device)
            for blocks in layer.blocks:
                state["fisher" + blocks.suffix] = SymmetricBlocks.zeros(
                    blocks.count, blocks.size, layer.weight.dtype, layer.weight.device
                )
        if _needs_squares(layer, group) and "second_moment" not in state:
            refuse_capture("the first grafted step of a layer (it allocates state)")
            for param, square in zip(layer.params, _second_moments(layer, state, group), strict=True):
                self.state[param]["second_moment"] = square
        return state

    def _row(self, group: dict, layer: Layer) -> Row:
        params = layer.params
        state = self.state[layer.weight] if layer.weight in self.state else {}
        vectors = 2 if _needs_squares(layer, group) else 1
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
                            "was it saved with another partition (blocks, segment, grid, average, or graft with "
                            'blocks="auto")?'
                        )


def _needs_squares(layer: Layer, group: dict) -> bool:
    """Whether the layer keeps element-wise second moments."""
    return not layer.blocks or (layer.shared and group["graft"] is not None)


def _second_moments(layer: Layer, state: dict, group: dict) -> list[Tensor]:
    """Zeros, or where matrices have been averaged without them what F knows: as if they had been averaged as well."""
    numbers = on_host(state)
    if not (layer.blocks and numbers["step"]):
        return [torch.zeros_like(param, memory_format=torch.preserve_format) for param in layer.params]
    weight = (1 - group["diagonal_decay"] ** numbers["step"]) / (numbers["fisher_weight"] or 1.0)
    return layer.spread([weight * state["fisher" + blocks.suffix].diagonal() for blocks in layer.blocks])


def _portable(value: object) -> object:
    """What a checkpoint holds of a state entry: tensors and numbers."""
    if isinstance(value, SymmetricBlocks):
        return value.to_packed()
    return int(value) if isinstance(value, Tensor) and value.dtype == torch.int64 else value
