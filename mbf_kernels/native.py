"""The native kernels, of CPUs and of GPUs: hands the addresses and strides of checked tensors to ``_C``.

``CPU``, ``CUDA`` and ``EMULATED`` have the functions of ``reference``. Gradients, momenta and weights are read and
written where they are; only a layout with more than two levels of strides per block or per element goes through a copy.
Numbers that live on a GPU (learning rate, damping, bias corrections) are read there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial

import torch
from torch import Tensor

from . import diagonal, reference, shared
from .blocks import MAX_TILED_SIZE, TILE_BLOCKS, SymmetricBlocks, triangle_size
from .options import StepOptions
from .views import FlatView, RankOneView, SharedView, View, flat_strides

try:
    import mbf_kernels._C as _C
except ImportError as error:
    _C = None
    UNAVAILABLE = f"the native kernels are not built ({error})"
else:
    UNAVAILABLE = None

MAX_SIZE = _C.MAX_SIZE if _C else 0


@lru_cache(maxsize=1)
def cuda_unavailable() -> str | None:
    """Why the CUDA kernels cannot run here; None if they can."""
    if UNAVAILABLE:
        return UNAVAILABLE
    if torch.version.hip:
        return "this torch is for AMD GPUs: use the triton backend"
    if not hasattr(_C, "cuda_launch"):
        return "the native kernels were built without CUDA (no nvcc was found, or MBF_CUDA=OFF)"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def cuda_architectures() -> list[str]:
    """Compute capabilities that the CUDA kernels were compiled for; none without CUDA."""
    return getattr(_C, "CUDA_ARCHITECTURES", "").split()


def emulated_unavailable() -> str | None:
    """Why the CUDA kernels cannot be emulated here; None if they can."""
    if UNAVAILABLE:
        return UNAVAILABLE
    return (
        None
        if hasattr(_C, "emulated_launch")
        else "the native kernels were built without the emulator (MBF_EMULATOR=OFF)"
    )


def cpu_isas() -> list[str]:
    """CPU instruction sets compiled in and supported by this processor, best first."""
    return _C.cpu_isas()


def cpu_isa() -> str:
    """The instruction set in use: the best one, or what MBF_CPU_ISA or ``set_cpu_isa`` chose."""
    return _C.cpu_isa()


def set_cpu_isa(name: str) -> None:
    """Uses one of ``cpu_isas()`` from now on. Raises ValueError for any other name."""
    _C.set_cpu_isa(name)


def set_emulated_schedule(seed: int) -> None:
    """The order in which the emulator runs threads between barriers: 0 ascending, 1 descending, else shuffled."""
    _C.set_emulated_schedule(seed)


_mapping: ContextVar[str] = ContextVar("mbf_kernels_cuda_mapping", default="auto")


@contextmanager
def cuda_mapping(name: str | None) -> Iterator[None]:
    """Inside the ``with`` block, CUDA kernels (emulated ones too) map a block of any size to one ``"thread"``
    (n <= 20; float64: n <= 12), a ``"group"`` of lanes (n <= 64) or a thread ``"block"``; None: what is fastest for the
    size. An op on a size that the mapping does not serve raises ValueError. For tests and benchmarks."""
    if name not in (None, "thread", "group", "block"):
        raise ValueError(f'cuda_mapping: expected "thread", "group", "block" or None, got {name!r}')
    token = _mapping.set(name or "auto")
    try:
        yield
    finally:
        _mapping.reset(token)


def _launch_cpu(op: _C.Op, like: Tensor, size: int, problems: _C.Problems, parameters: _C.Parameters) -> None:
    _C.cpu_launch(op, _dtype(like.dtype), size, problems, parameters, torch.get_num_threads())


def _launch_cuda(op: _C.Op, like: Tensor, size: int, problems: _C.Problems, parameters: _C.Parameters) -> None:
    stream = torch.cuda.current_stream(like.device).cuda_stream
    mapping = getattr(_C.Mapping, _mapping.get())
    _C.cuda_launch(op, _dtype(like.dtype), size, problems, parameters, like.device.index, stream, mapping)


def _launch_emulated(op: _C.Op, like: Tensor, size: int, problems: _C.Problems, parameters: _C.Parameters) -> None:
    mapping = getattr(_C.Mapping, _mapping.get())
    _C.emulated_launch(op, _dtype(like.dtype), size, problems, parameters, 0, 0, mapping)


def _launch_rank_one_cpu(like: Tensor, problems: _C.RankOneProblems, parameters: _C.RankOneParameters) -> None:
    _C.cpu_launch_rank_one(_dtype(like.dtype), problems, parameters, torch.get_num_threads())


def _launch_rank_one_cuda(like: Tensor, problems: _C.RankOneProblems, parameters: _C.RankOneParameters) -> None:
    stream = torch.cuda.current_stream(like.device).cuda_stream
    _C.cuda_launch_rank_one(_dtype(like.dtype), problems, parameters, like.device.index, stream)


def _launch_rank_one_emulated(like: Tensor, problems: _C.RankOneProblems, parameters: _C.RankOneParameters) -> None:
    _C.emulated_launch_rank_one(_dtype(like.dtype), problems, parameters, 0, 0)


class Launch:
    """A step's launch, kept to be repeated over the same tensors with other gradients."""

    def __init__(
        self,
        native: Native,
        problems: _C.Problems | _C.SharedProblems | _C.DiagonalProblems,
        start: Callable[..., None],  # called with the problems, parameters and beta_2
        keep: object = None,  # memory that the problems point to
    ):
        self._native, self._problems, self._start, self._keep = native, problems, start, keep

    def set_gradients(self, addresses: _C.Addresses | list[int]) -> None:
        """Needed before every call that has others."""
        self._problems.set_gradients(addresses)

    def set_params(self, addresses: _C.Addresses | list[int]) -> None:
        """Needed where they have moved."""
        self._problems.set_params(addresses)

    def set_options(self, options: StepOptions) -> None:
        """Needed before the first call; what a call names itself counts."""
        self._parameters, self._diagonal_decay = self._native.parameters(options), options.diagonal_decay

    def __call__(
        self,
        momentum_weight: float | Tensor,
        second_weight: float | Tensor,  # of F, or of v
        lr: float | Tensor,
        damping: float | Tensor,
    ) -> None:
        number = self._native.number
        self._parameters.set_rates(number(lr), number(damping))
        self._problems.set_weights(number(momentum_weight), number(second_weight))
        self._start(self._problems, self._parameters, self._diagonal_decay)


class Native:
    """The ops over one kind of kernels."""

    def __init__(self, launch: Callable[..., None], launch_rank_one: Callable[..., None], reads_device_numbers: bool):
        self._start, self._start_rank_one = launch, launch_rank_one
        self._reads_device_numbers = reads_device_numbers

    def accumulate_(self, fisher: SymmetricBlocks, g: Tensor, decay: float) -> None:
        if len(g) > 1:  # a Gram matrix over many samples is a matrix product: torch's
            return reference.accumulate_(fisher, g, decay)
        grad = View(g[0], fisher.size)
        problem = _C.Problem(count=fisher.count, fisher=_address(fisher), grad=grad.native)
        self._launch(_C.Op.accumulate_, fisher, [problem], decay=decay)

    def factor(
        self, fisher: SymmetricBlocks, damping: float | Tensor, relative: bool
    ) -> tuple[SymmetricBlocks, Tensor]:
        lower = _new_factor(fisher)
        info = _new_info(fisher.data, fisher.count)
        problem = _C.Problem(count=fisher.count, fisher=_address(fisher), factor=_address(lower), info=info.data_ptr())
        self._launch(_C.Op.factor, fisher, [problem], damping=self.number(damping), relative=relative)
        return lower, info

    def solve(self, factor: SymmetricBlocks, rhs: Tensor) -> Tensor:
        rhs = rhs.contiguous()
        x = torch.empty_like(rhs)
        problem = _C.Problem(count=factor.count, factor=_address(factor), rhs=_columns(rhs), out=_columns(x))
        self._launch(_C.Op.solve, factor, [problem], rhs_count=rhs.shape[2])
        return x

    def accumulate_factor_solve_(
        self, fisher: SymmetricBlocks, g: Tensor, rhs: Tensor, decay: float, damping: float | Tensor, relative: bool
    ) -> tuple[Tensor, Tensor]:
        x = torch.empty(rhs.shape, dtype=rhs.dtype, device=rhs.device)
        info = _new_info(fisher.data, fisher.count)
        views = [View(tensor, fisher.size) for tensor in (g, rhs, x)]
        problem = _C.Problem(
            count=fisher.count, fisher=_address(fisher), info=info.data_ptr(),
            grad=views[0].native, rhs=views[1].native, out=views[2].native,
        )  # fmt: skip
        self._launch(
            _C.Op.accumulate_factor_solve_, fisher, [problem],
            decay=decay, damping=self.number(damping), relative=relative,
        )  # fmt: skip
        return x, info

    def mbf_step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        momenta: Sequence[Tensor],
        fishers: Sequence[SymmetricBlocks],
        factors: Sequence[SymmetricBlocks],
        skipped: Sequence[Tensor],
        momentum_weights: Sequence[float] | Sequence[Tensor],
        fisher_weights: Sequence[float] | Sequence[Tensor],
        options: StepOptions,
    ) -> Tensor:
        info = _new_info(fishers[0].data, sum(fisher.count for fisher in fishers))
        problems, views = self._step_problems(
            params, grads, momenta, fishers, factors, skipped, info, momentum_weights, fisher_weights
        )
        self._start_step(fishers[0], problems, self.parameters(options))
        for view in views:
            view.write_back()
        return info

    def prepare_step(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        momenta: Sequence[Tensor],
        fishers: Sequence[SymmetricBlocks],
        factors: Sequence[SymmetricBlocks],
        skipped: Sequence[Tensor],
    ) -> Launch | None:
        """``mbf_step_`` to be repeated, without info where that can be; None where a tensor needs a copy, or none has
        blocks."""
        if not any(fisher.count for fisher in fishers):
            return None
        info = None if self is CPU else _new_info(fishers[0].data, sum(fisher.count for fisher in fishers))
        ones = [1.0] * len(params)
        problems, views = self._step_problems(params, grads, momenta, fishers, factors, skipped, info, ones, ones)
        if not all(view.in_place for view in views):
            return None
        return Launch(self, problems, partial(self._start_step, fishers[0]), info)

    def _step_problems(
        self, params, grads, momenta, fishers, factors, skipped, info, momentum_weights, fisher_weights
    ) -> tuple[_C.Problems, list[View]]:
        size = fishers[0].size
        info_address = 0 if info is None else info.data_ptr()
        problems, views = [], []
        for i, fisher in enumerate(fishers):
            grad = View(grads[i], size, read_only=True)
            momentum, param = View(momenta[i], size), View(params[i], size)
            views += [grad, momentum, param]
            problem = _C.Problem(
                count=fisher.count,
                fisher=_address(fisher),
                factor=_address(factors[i]) if factors else 0,
                info=info_address,
                skipped=skipped[i].data_ptr() if skipped else 0,
                momentum_weight=self.number(momentum_weights[i]),
                fisher_weight=self.number(fisher_weights[i]),
                grad=grad.native,
                rhs=momentum.native,
                out=param.native,
            )
            problems.append(problem)
            info_address += fisher.count * 4 if info is not None else 0
        return _C.Problems(problems), views

    def _start_step(
        self, like: SymmetricBlocks, problems: _C.Problems, parameters: _C.Parameters, diagonal_decay: float = 0.0
    ) -> None:
        self._start(_C.Op.mbf_step_, like.data, like.size, problems, parameters)

    def mbf_shared_step_(self, *arguments) -> Tensor:
        return shared.mbf_shared_step_(self, *arguments)

    def mbf_diagonal_step_(self, *arguments) -> None:
        diagonal.mbf_diagonal_step_(*arguments)

    def rank_one_step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        momenta: Sequence[Tensor],
        rows: Sequence[Tensor | None],
        columns: Sequence[Tensor | None],
        momentum_weights: Sequence[float] | Sequence[Tensor],
        options: StepOptions,
    ) -> None:
        views = [RankOneView(*tensors) for tensors in zip(params, grads, momenta, rows, columns, strict=True)]
        problems = [
            _rank_one_problem(view, self.number(weight)) for view, weight in zip(views, momentum_weights, strict=True)
        ]
        parameters = _C.RankOneParameters(self.parameters(options), options.decoupled)
        self._start_rank_one(params[0], _C.RankOneProblems(problems), parameters)
        for view in views:
            view.write_back()

    def _launch(self, op: _C.Op, blocks: SymmetricBlocks, problems: list[_C.Problem], **parameters) -> None:
        self._start(op, blocks.data, blocks.size, _C.Problems(problems), _C.Parameters(**parameters))

    def parameters(self, o: StepOptions) -> _C.Parameters:
        return _C.Parameters(
            lr=self.number(o.lr), momentum=o.momentum, decay=o.decay, damping=self.number(o.damping),
            weight_decay=o.weight_decay, eps=o.eps, relative=o.relative, graft=o.graft, nesterov=o.nesterov,
            maximize=o.maximize, update=o.update, refactor=o.refactor,
        )  # fmt: skip

    def number(self, value: float | Tensor) -> float | tuple[int, _C.DType]:
        """A number as ``_C`` takes it: by value, or by its address on the device."""
        if isinstance(value, Tensor) and self._reads_device_numbers:
            return value.data_ptr(), _dtype(value.dtype)
        return float(value)


class Cpu(Native):
    """With kernels of its own for the steps of shared matrices and of tensors without blocks."""

    def __init__(self):
        super().__init__(_launch_cpu, _launch_rank_one_cpu, reads_device_numbers=False)

    def mbf_shared_step_(
        self,
        params: Sequence[Sequence[Tensor]],
        grads: Sequence[Sequence[Tensor]],
        momenta: Sequence[Sequence[Tensor]],
        squares: Sequence[Sequence[Tensor]],
        fishers: Sequence[SymmetricBlocks],
        factors: Sequence[SymmetricBlocks],
        skipped: Sequence[Tensor],
        momentum_weights: Sequence[float] | Sequence[Tensor],
        square_weights: Sequence[float] | Sequence[Tensor],
        options: StepOptions,
    ) -> Tensor:
        info = _new_info(fishers[0].data, sum(fisher.count for fisher in fishers))
        problems, views = self._shared_problems(
            params, grads, momenta, squares, fishers, factors, skipped, info, momentum_weights, square_weights
        )
        _start_shared(fishers[0], problems, self.parameters(options), options.diagonal_decay)
        for view in views:
            view.write_back()
        return info

    def prepare_shared(self, params, grads, momenta, squares, fishers, factors, skipped) -> Launch | None:
        ones = [1.0] * len(params)
        problems, views = self._shared_problems(
            params, grads, momenta, squares, fishers, factors, skipped, None, ones, ones
        )
        if not all(view.in_place for view in views):
            return None
        return Launch(self, problems, partial(_start_shared, fishers[0]))

    def _shared_problems(
        self, params, grads, momenta, squares, fishers, factors, skipped, info, momentum_weights, square_weights
    ) -> tuple[_C.SharedProblems, list[SharedView]]:
        info_address = 0 if info is None else info.data_ptr()
        problems, views = [], []
        for i, fisher in enumerate(fishers):
            count, size = fisher.count, fisher.size
            named = {
                "grad": grads[i],
                "momentum": momenta[i],
                "square": squares[i] if squares else None,
                "param": params[i],
            }
            views_here = {
                name: SharedView(parts, count, size, read_only=name == "grad") for name, parts in named.items() if parts
            }
            views += views_here.values()
            problem = _C.SharedProblem(
                count=count,
                samples=views_here["param"].samples,
                fisher=_address(fisher),
                factor=_address(factors[i]) if factors else 0,
                info=info_address,
                skipped=skipped[i].data_ptr() if skipped else 0,
                momentum_weight=float(momentum_weights[i]),
                square_weight=float(square_weights[i]),
                **{name: view.native for name, view in views_here.items()},
            )
            problems.append(problem)
            info_address += count * 4 if info is not None else 0
        return _C.SharedProblems(problems), views

    def mbf_diagonal_step_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        momenta: Sequence[Tensor],
        squares: Sequence[Tensor],
        momentum_weights: Sequence[float] | Sequence[Tensor],
        square_weights: Sequence[float] | Sequence[Tensor],
        options: StepOptions,
    ) -> None:
        problems, views = _diagonal_problems(params, grads, momenta, squares, momentum_weights, square_weights)
        _start_diagonal(params[0], problems, self.parameters(options), options.diagonal_decay)
        for view in views:
            view.write_back()

    def prepare_diagonal(self, params, grads, momenta, squares) -> Launch | None:
        ones = [1.0] * len(params)
        problems, views = _diagonal_problems(params, grads, momenta, squares, ones, ones)
        if not all(view.in_place for view in views):
            return None
        return Launch(self, problems, partial(_start_diagonal, params[0]))


def _start_shared(
    like: SymmetricBlocks, problems: _C.SharedProblems, parameters: _C.Parameters, diagonal_decay: float
) -> None:
    threads = torch.get_num_threads()
    _C.cpu_launch_shared(_dtype(like.dtype), like.size, problems, parameters, diagonal_decay, threads)


def _start_diagonal(
    like: Tensor, problems: _C.DiagonalProblems, parameters: _C.Parameters, diagonal_decay: float
) -> None:
    _C.cpu_launch_diagonal(_dtype(like.dtype), problems, parameters, diagonal_decay, torch.get_num_threads())


def _diagonal_problems(
    params, grads, momenta, squares, momentum_weights, square_weights
) -> tuple[_C.DiagonalProblems, list[FlatView]]:
    problems, views = [], []
    for i, tensors in enumerate(zip(grads, momenta, squares, params, strict=True)):
        names = ("grad", "momentum", "square", "param")
        strides = flat_strides(params[i].shape, params[i].stride())
        here = [
            FlatView(tensor, strides, read_only=name == "grad") for name, tensor in zip(names, tensors, strict=True)
        ]
        views += here
        problem = _C.DiagonalProblem(
            count=params[i].numel(),
            momentum_weight=float(momentum_weights[i]),
            square_weight=float(square_weights[i]),
            **{name: view.staged.data_ptr() for name, view in zip(names, here, strict=True)},
        )
        problems.append(problem)
    return _C.DiagonalProblems(problems), views


def _rank_one_problem(view: RankOneView, momentum_weight: float | tuple[int, _C.DType]) -> _C.RankOneProblem:
    return _C.RankOneProblem(
        count=view.param.tensor.numel(),
        columns=view.columns,
        momentum_weight=momentum_weight,
        grad=view.grad.staged.data_ptr(),
        momentum=view.momentum.staged.data_ptr(),
        param=view.param.staged.data_ptr(),
        row=0 if view.row is None else view.row.data_ptr(),
        column=0 if view.column is None else view.column.data_ptr(),
        order=view.order,
    )


CPU = Cpu()
CUDA = Native(_launch_cuda, _launch_rank_one_cuda, reads_device_numbers=True)
EMULATED = Native(_launch_emulated, _launch_rank_one_emulated, reads_device_numbers=True)


def _columns(x: Tensor) -> tuple[int, ...]:
    """The first column of contiguous [B, n, k], the others following at distance 1."""
    _, n, k = x.shape
    return (x.data_ptr(), x.shape[0], 0, n * k, n, 0, k)


def _new_info(like: Tensor, count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int32, device=like.device)


def _new_factor(fisher: SymmetricBlocks) -> SymmetricBlocks:
    """Storage for L: the kernels write its blocks, this its padding."""
    data = torch.empty_like(fisher.data)
    if fisher.size > MAX_TILED_SIZE:
        data[:, triangle_size(fisher.size) :].zero_()
    elif fisher.count % TILE_BLOCKS:
        data[-1].zero_()
    return SymmetricBlocks(data, fisher.count, fisher.size)


def _address(blocks: SymmetricBlocks) -> int:
    address = blocks.data.data_ptr()
    if address % 16:
        raise ValueError(
            f"mbf_kernels: expected the storage of SymmetricBlocks to start at a multiple of 16 bytes, got a view that "
            f"starts {address % 16} bytes after one: clone() it"
        )
    return address


def _dtype(dtype: torch.dtype) -> _C.DType:
    return _C.DType.float32 if dtype == torch.float32 else _C.DType.float64
