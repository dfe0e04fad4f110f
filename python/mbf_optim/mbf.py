"""The Mini-Block Fisher optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from inspect import Parameter, signature
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from mbf_kernels import SymmetricBlocks, accumulate_

from .averages import average_over_processes
from .copies import Copies
from .layers import PARTITION, Layer, layers_of, used
from .options import check_options, keep_device_scalars, with_numbers
from .plan import Plan
from .report import Report, Row
from .scaling import overflown, unscaled
from .schedule import capturing, intervals, on_host
from .sharding import check_whole, local
from .stand_ins import by_parameter, stand_ins_of
from .state import canonical, check_saved, complete, needs_masters, needs_squares, take_up

UNTRACED = (
    "MBF.step is traced with capturable=True, lr as a tensor, and after a first step outside with the same gradients; "
    "not with a closure, GradScaler, parameters of low precision or sharded ones"
)


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
            ``torch.compile`` traces steps where ``lr`` is a tensor, after a first one.
            Both intervals are 1: a shared matrix above 128 needs them set. Otherwise tensors are read by ``float()``.
        differentiable: refused; a step cannot be differentiated through.
        master_weights: keep float32 copies of bfloat16 and float16 parameters, which take the steps; the parameters are
            their rounded values. Without them small steps and decays are lost to rounding.
        stochastic_rounding: instead, round such parameters up or down at random, right on average. The random numbers
            follow from the step and the parameters that take it: they resume, and are the same on all processes.

    Parameters may be float32, float64, bfloat16 or float16, and DTensors (``fully_shard``, HSDP, tensor parallelism).
    The state of those of low precision is float32. All state is made with the optimizer.

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
        differentiable: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ):
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        check_options(defaults)
        self._forget()
        super().__init__(params, defaults)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves unscaling, and steps that overflow, to step(): with float16 gradients, which it
        refuses to unscale. Elsewhere it does both itself: engines clip what it unscaled and see what it skipped."""
        return any(param.dtype == torch.float16 for group in self.param_groups for param in group["params"])

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

    @torch.no_grad()
    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(copy(param_group))  # the caller's stays as it is
        group = self.param_groups[-1]
        try:
            check_options(group)
            self._make_state(group)
        except (TypeError, ValueError):
            for param in self.param_groups.pop()["params"]:
                self.state.pop(param, None)
            raise

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()
        for options in (self.defaults, *self.param_groups):  # pickles and checkpoints may lack newer ones
            for name, value in (_DEFAULTS | self.defaults).items():
                options.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step for every parameter that has a gradient; returns the closure's loss.

        Raises RuntimeError inside the capture of a CUDA graph where a group is not capturable, or where no step has
        been taken before: the graph must not allocate the state.
        """
        compiling = torch.compiler.is_compiling()
        if compiling and self._traceable and closure is None and self._fit():
            return self._step()
        return self._step_untraced(closure, compiling)

    def _step(self, closure: Callable[[], float] | None = None) -> float | None:
        if capturing() and not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError("MBF.step: expected capturable=True inside the capture of a CUDA graph, got False")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if overflown(self):
            return loss
        plans = [self._plan(index, group) for index, group in enumerate(self.param_groups)]  # raise before any moves
        unscale = unscaled(self)
        groups = [with_numbers(group) for group in self.param_groups]
        over_processes = [plan.start(group, unscale) for plan, group in zip(plans, groups, strict=True)]
        average_over_processes(list(chain.from_iterable(over_processes)))
        for plan, group in zip(plans, groups, strict=True):
            plan.finish(group)
        return loss

    @torch.compiler.disable(reason=UNTRACED)
    def _step_untraced(self, closure: Callable[[], float] | None, compiling: bool) -> float | None:
        """``compiling``: called by compiled code, which would be compiled again if the next step were traced."""
        self._check_changed()
        loss = self._step(closure)
        self._traceable = not compiling and all(plan.traceable for plan in self._plans.values())
        return loss

    def _check_changed(self) -> None:
        """Raises ValueError or TypeError for options that a user has set since the last step. Not for lr and damping:
        every step checks them, and reads none that is on a device."""
        options = [[value for name, value in group.items() if name in _CHECKED] for group in self.param_groups]
        if options != self._checked:
            for group in self.param_groups:
                check_options(group | {"lr": 0.0, "damping": 0.0})
            self._checked = options

    def _fit(self) -> bool:
        """Whether a step now is like the one before: then there is nothing to make, nor to ask the device."""
        fit = all(self._plans[index].fits(group, self.state) for index, group in enumerate(self.param_groups))
        return fit and not hasattr(self, "found_inf")

    @torch.no_grad()
    def observe(self) -> None:
        """Averages the current gradients into F and moves nothing: the paper's warm start, one call per batch.

        The j-th call sets F <- ((j-1)/j) F + (1/j) g g^T. Raises RuntimeError once a step has been taken.
        """
        observed = [(g, layer) for g, layers in self._layers() for layer in layers if layer.blocks and layer.has_grad()]
        for group, layer in observed:
            if on_host(complete(layer, self.state, group))["step"]:
                raise RuntimeError(f"MBF.observe: expected no step so far, but {layer.name} has been stepped")
        half = [param for _, layer in observed if layer.half for param in layer.params]
        stand_ins = stand_ins_of(half, self.state)
        for kind in stand_ins:
            kind.fill(None)
        in_stead = by_parameter(stand_ins)
        over_processes = []
        for _, layer in observed:
            state = self.state[layer.weight]
            state["observed"] += 1
            state["fisher_weight"] = 1.0
            decay = 1 - 1 / state["observed"]
            for task in Copies(layer, self.state, in_stead).tasks:
                if task.averaged_over:
                    over_processes.append((task, decay))
                else:
                    accumulate_(task.fisher, task.gradients(), decay=decay)
        average_over_processes(over_processes)

    @torch.no_grad()
    def report(self) -> Report:
        """A row for every tensor (a joined bias in its weight's): structure, matrices, state bytes, skipped blocks. Of
        a sharded tensor what is on this process."""
        return Report(self._row(group, layer) for group, layers in self._layers() for layer in layers)

    @torch.no_grad()
    def state_dict(self) -> dict:
        """As in torch; the state all tensors, matrices in canonical form: packed lower triangles [O, matrices of an
        output, T], or [R, T] where they are averaged. Of sharded parameters they are DTensors."""
        self._layers()  # drops what torch would not find
        with self.register_state_dict_post_hook(MBF._make_canonical, prepend=True):
            return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Raises ValueError, before anything changes, where the saved state does not fit the parameters' blocks.

        Tensors keep the dtypes they have here, float32 beside parameters of lower precision. A group stays capturable,
        or not; the tensors ``lr`` and ``damping`` of a capturable one take the saved values. The state is replaced: a
        CUDA graph must be captured again.
        """
        own = [{name: group[name] for name in ("capturable", "lr", "damping")} for group in self.param_groups]
        before = {"state": self.state, "param_groups": self.param_groups}
        saved: dict[Tensor, dict] = {}

        def check(_: MBF, final: dict) -> None:  # after the user's hooks, which may have changed it
            for param, number in self._numbered(final):
                state = final["state"].get(number) or {}
                # Where checkpoints are flattened, torch puts {} in place of what they lack.
                saved[param] = {name: value for name, value in state.items() if not isinstance(value, dict) or value}
            for (group, first), loaded in zip(self._with_first(), final["param_groups"], strict=False):
                for layer in layers_of(group | {"graft": loaded.get("graft", group["graft"])}, first, saved):
                    check_saved(layer, saved)

        def take(_: MBF) -> None:  # before the user's hooks
            try:
                for group, options in zip(self.param_groups, own, strict=True):
                    group["capturable"] = options["capturable"]
                self._take_up(saved)
            except Exception:  # what has been loaded are new dicts
                self.__setstate__(before)
                raise
            for group, options in zip(self.param_groups, own, strict=True):
                keep_device_scalars(group, options)

        with self.register_load_state_dict_pre_hook(check), self.register_load_state_dict_post_hook(take, prepend=True):
            super().load_state_dict(state_dict)

    def _take_up(self, saved: dict[Tensor, dict]) -> None:
        """In place of the state as ``Optimizer.load_state_dict`` has cast it."""
        for group, layers in self._layers():
            for layer in layers:
                take_up(layer, self.state, saved)
            self._make_state(group)

    def _make_canonical(self, state_dict: dict) -> None:
        numbers = dict(self._numbered(state_dict))
        for group, layers in self._layers():
            self._make_state(group)
            for layer in layers:
                of_params = canonical(layer, self.state)
                state_dict["state"] |= {numbers[param]: state for param, state in of_params.items()}

    def _numbered(self, state_dict: dict) -> Iterator[tuple[Tensor, int]]:
        """The parameters with their numbers in the state_dict; where it is of others, those of them that there are."""
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            yield from zip(own["params"], saved["params"], strict=False)

    def _make_state(self, group: dict) -> None:
        """Of all that is trained, or has been: a checkpoint must find it, whether a step has been taken or not."""
        for own, layers in self._layers():
            for layer in layers if own is group else ():
                if any(param.requires_grad or self.state.get(param) for param in layer.params):
                    complete(layer, self.state, group)

    def _forget(self) -> None:
        """What is derived from parameters and state: made again when it is needed."""
        self._known_layers: list[tuple[tuple, list[Layer]]] = []  # of each group, after what they were made of
        self._plans: dict[int, Plan] = {}
        self._checked: list[list] = []  # options of each group
        self._traceable = False  # an attribute: a guard on the groups would compile again with every lr

    def _layers(self) -> Iterator[tuple[dict, list[Layer]]]:
        made_of = [
            (list(map(id, group["params"])), *(group[name] for name in (*PARTITION, "graft")))
            for group in self.param_groups
        ]
        known = self._known_layers
        if [made for made, _ in known] != made_of:
            self._drop_unused()
            self._known_layers = [
                known[i] if i < len(known) and known[i][0] == made else (made, layers_of(group, first, self.state))
                for i, (made, (group, first)) in enumerate(zip(made_of, self._with_first(), strict=True))
            ]
            self._plans = {}
        return ((group, layers) for group, (_, layers) in zip(self.param_groups, self._known_layers, strict=True))

    def _drop_unused(self) -> None:
        """The state of parameters that others have taken the place of before a step, as under Accelerate's FSDP2."""
        kept = {param for group in self.param_groups for param in group["params"]}
        gone = [param for param in self.state if param not in kept]
        if not any(used(self.state[param]) for param in gone):
            for param in gone:
                del self.state[param]

    def _with_first(self) -> Iterator[tuple[dict, int]]:
        """The groups with the numbers of their first parameters."""
        sizes = [len(group["params"]) for group in self.param_groups]
        return zip(self.param_groups, accumulate([0, *sizes[:-1]]), strict=True)

    def _plan(self, index: int, group: dict) -> Plan:
        """How the group steps now."""
        plan = self._plans.get(index)
        if plan is None or not plan.fits(group, self.state):
            layers = list(self._layers())[index][1]
            for layer in layers:
                check_whole(layer.weight, layer.name)
                if layer.has_grad():
                    complete(layer, self.state, group)
            plan = self._plans[index] = Plan(group, layers, self.state)
        return plan

    def _row(self, group: dict, layer: Layer) -> Row:
        state = self.state[layer.weight] if layer.weight in self.state else {}
        vectors = 1 + needs_squares(layer, group) + needs_masters(layer, group)
        size = sum(vectors * local(param).numel() * layer.dtype.itemsize for param in layer.params)
        for blocks in layer.blocks:
            matrices = SymmetricBlocks.zeros(blocks.count, blocks.size, layer.dtype, device="meta")
            size += matrices.nbytes * (1 + (intervals(blocks, group)[1] > 1))  # F, and its factor where it is kept
        return Row(
            name=layer.name + (" + bias" if layer.bias is not None else ""),
            shape=tuple(layer.weight.shape),
            structure=layer.blocks[0].structure if layer.blocks else "diagonal",
            count=sum(blocks.count for blocks in layer.blocks),
            size=max((blocks.size for blocks in layer.blocks), default=1),
            bytes=size,
            skipped=int(state["skipped"].sum()) if "skipped" in state and not layer.weight.is_meta else 0,
        )


_PARAMETERS = signature(MBF).parameters.values()
_DEFAULTS = {option.name: option.default for option in _PARAMETERS if option.default is not Parameter.empty}
_CHECKED = _DEFAULTS.keys() - {"lr", "damping"}
