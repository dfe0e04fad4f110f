"""Whole optimizer steps, one launch for all tensors of a kind, and their registration with ``torch.library``.

The rules of ``ops`` hold here too. Rates, dampings and weights may be numbers on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .backend import choose
from .blocks import SymmetricBlocks
from .options import StepOptions, step_options
from .registration import register

Weights = float | Tensor | Sequence[float] | Sequence[Tensor]  # one, or one per tensor
Joined = Tensor | tuple[Tensor, Tensor]  # mini-blocks; or all but their last element, and that one


def mbf_step_(
    params: Sequence[Tensor],  # W, each [..., *element dimensions of product n]
    grads: Sequence[Tensor],  # g, likewise
    momenta: Sequence[Tensor],  # M, likewise
    fishers: Sequence[SymmetricBlocks],  # F, all of one size n
    *,
    lr: float | Tensor,  # alpha
    momentum: float,  # mu in [0, 1)
    decay: float,  # beta in [0, 1]
    damping: float | Tensor,  # lambda >= 0
    weight_decay: float = 0.0,  # gamma, decoupled
    relative: bool = False,
    graft: str | None = None,  # None or "adam"
    nesterov: bool = False,
    eps: float = 1e-8,
    momentum_weight: Weights = 1.0,  # 1 - mu^t
    fisher_weight: Weights = 1.0,  # 1 - beta^t
    maximize: bool = False,
    update: bool = True,
    factors: Sequence[SymmetricBlocks] | None = None,
    refactor: bool = True,
    skipped: Sequence[Tensor] | None = None,  # int64 scalars
) -> list[Tensor]:
    """The whole Mini-Block Fisher step for tensors of one block size, in one launch. Per block::

        g <- -g                                    if maximize
        M <- mu M + g
        F <- beta F + (1 - beta) g g^T             if update
        D  = mu M + g if nesterov else M
        P  = (F + lambda I)^-1 D                   lambda = damping, or damping * trace(F)/n if relative
        W <- (1 - alpha gamma) W - alpha P                     graft=None: the paper's form
        W <- (1 - alpha gamma) W - alpha (|u| / |P|) P         graft="adam"; no step where P = 0
        u  = mhat / (sqrt(vhat) + eps), mhat = (1-mu) D / momentum_weight, vhat = diag(F) / fisher_weight

    The trailing dimensions of each tensor multiply to n, the leading ones enumerate its blocks; any strides work in
    place. The two weights undo the zero start of M and F (one number, or one per tensor). A zero block has no scale
    to be relative to: there lambda is 1. ``factors`` caches L: written if ``refactor``, used instead of factoring
    otherwise. ``skipped`` are counters, each incremented by its tensor's number of bad blocks. ``lr``, ``damping`` and
    the weights may be 0-d tensors on the device of the parameters; then their values are not checked.

    Returns info [B] of each tensor. Source: Bahamou, Goldfarb, Ren (AISTATS 2023); norm grafting per mini-block, from
    F's own diagonal, is ours.
    """
    op = "mbf_step_"
    checks.tensor_lists(op, params=params, grads=grads, momenta=momenta)
    options = step_options(
        op, lr=lr, momentum=momentum, decay=decay, damping=damping, weight_decay=weight_decay, relative=relative,
        graft=graft, nesterov=nesterov, eps=eps, maximize=maximize, update=update, refactor=refactor,
    )  # fmt: skip
    checks.block_lists(op, fishers=fishers)
    checks.same_length(op, params=params, grads=grads, momenta=momenta, fishers=fishers)
    weights = _weights(op, len(params), momentum_weight=momentum_weight, fisher_weight=fisher_weight)
    matrices = _matrices(op, fishers, factors, refactor, skipped)
    if not len(params):
        return []
    checks.no_grad(op, *params, *grads, *momenta, *_on_device(options))
    tensors = [list(params), list(grads), list(momenta)]
    info = torch.ops.mbf_kernels.mbf_step_(*tensors, *matrices, *weights, *_numbers(options))
    return list(info.split([fisher.count for fisher in fishers]))


def mbf_shared_step_(
    params: Sequence[Joined],  # W, each [*samples, R, *element dimensions of product n]
    grads: Sequence[Joined],  # g, likewise
    momenta: Sequence[Joined],  # M, likewise
    squares: Sequence[Joined] | None,  # v, likewise; needed where graft is "adam"
    fishers: Sequence[SymmetricBlocks],  # F, R blocks each, all of one size n
    *,
    lr: float | Tensor,  # alpha
    momentum: float,  # mu in [0, 1)
    decay: float,  # beta in [0, 1]
    damping: float | Tensor,  # lambda >= 0
    weight_decay: float = 0.0,  # gamma, decoupled
    diagonal_decay: float = 0.999,  # beta_2 in [0, 1)
    relative: bool = False,
    graft: str | None = None,  # None or "adam"
    nesterov: bool = False,
    eps: float = 1e-8,
    momentum_weight: Weights = 1.0,  # 1 - mu^t
    square_weight: Weights = 1.0,  # 1 - beta_2^t
    maximize: bool = False,
    update: bool = True,
    factors: Sequence[SymmetricBlocks] | None = None,
    refactor: bool = True,
    skipped: Sequence[Tensor] | None = None,  # int64 scalars
) -> list[Tensor]:
    """The whole step where S mini-blocks share each of R averaged matrices. Per matrix F and mini-block s::

        F   <- beta F + (1 - beta) mean_s g_s g_s^T           if update
        M_s <- mu M_s + g_s
        D_s  = mu M_s + g_s if nesterov else M_s
        P_s  = (F + lambda I)^-1 D_s                          lambda = damping, or damping * trace(F)/n if relative
        W_s <- (1 - alpha gamma) W_s - alpha P_s                         graft=None
        v_s <- beta_2 v_s + (1 - beta_2) g_s^2                           graft="adam", and
        W_s <- (1 - alpha gamma) W_s - alpha (|u_s| / |P_s|) P_s         no step where P_s = 0
        u_s  = mhat / (sqrt(vhat) + eps), mhat = (1-mu) D_s / momentum_weight, vhat = v_s / square_weight
                                                              an element is 0 where its denominator is

    The dimension of size R enumerates the matrices, those after it the elements, those before it the mini-blocks that
    share. Where a bias joins, an entry is a pair: all elements but the last, with R = 1, and the last ones
    [*samples]. A matrix whose new diagonal would not be finite keeps its value; where it cannot be factored, all its
    mini-blocks are bad. A bad mini-block, or one whose g, P or |u|^2 is not finite, keeps W, M and v and is counted in
    ``skipped``. The other options are those of ``mbf_step_``.

    Returns info [R] of each tensor, LAPACK's for its matrices. Any size: above 128 torch's products and solves serve.
    Source: as ``mbf_step_``; averaging over the rows of a layer is the paper's section 3.2, runs of a row and grafting
    are ours.
    """
    op = "mbf_shared_step_"
    lists = {"params": params, "grads": grads, "momenta": momenta}
    if graft is not None:
        lists["squares"] = squares if squares is not None else ()
    parts = {name: checks.parts(op, name, items) for name, items in lists.items()}
    options = step_options(
        op, lr=lr, momentum=momentum, decay=decay, damping=damping, weight_decay=weight_decay, relative=relative,
        graft=graft, nesterov=nesterov, eps=eps, maximize=maximize, update=update, refactor=refactor,
        diagonal_decay=diagonal_decay,
    )  # fmt: skip
    checks.block_lists(op, fishers=fishers)
    checks.same_length(op, **parts, fishers=fishers)
    weights = _weights(op, len(params), momentum_weight=momentum_weight, square_weight=square_weight)
    matrices = _matrices(op, fishers, factors, refactor, skipped)
    if not len(params):
        return []
    flat = {name: [part for entry in entries for part in entry] for name, entries in parts.items()}
    checks.no_grad(op, *(tensor for tensors in flat.values() for tensor in tensors), *_on_device(options))
    lengths = [len(entry) for entry in parts["params"]]
    for name, entries in parts.items():
        found = [len(entry) for entry in entries]
        if found != lengths:
            raise ValueError(f"{op}: expected {name} of as many parts as params, {lengths}, got {found}")
    tensors = [flat["params"], flat["grads"], flat["momenta"], flat.get("squares", [])]
    info = torch.ops.mbf_kernels.mbf_shared_step_(*tensors, lengths, *matrices, *weights, *_numbers(options))
    return list(info.split([fisher.count for fisher in fishers]))


def mbf_diagonal_step_(
    params: Sequence[Tensor],  # W
    grads: Sequence[Tensor],  # g
    momenta: Sequence[Tensor],  # M
    squares: Sequence[Tensor],  # v
    *,
    lr: float | Tensor,  # alpha
    momentum: float,  # mu in [0, 1)
    diagonal_decay: float,  # beta_2 in [0, 1)
    weight_decay: float = 0.0,  # gamma, decoupled
    graft: str | None = None,  # None or "adam"
    eps: float = 1e-8,
    momentum_weight: Weights = 1.0,  # 1 - mu^t
    square_weight: Weights = 1.0,  # 1 - beta_2^t
    maximize: bool = False,
) -> None:
    """The step of tensors without blocks, of any shape::

        M <- mu M + g
        v <- beta_2 v + (1 - beta_2) s^2
        W <- (1 - alpha gamma) W - alpha E / (sqrt(v / square_weight) + eps)

    with E = (1 - mu) M / momentum_weight and s = g for graft="adam": ``torch.optim.AdamW``; and s = E = (1 - mu) M
    for graft=None: the authors' code, which corrects the bias of the second moment only and squares the averaged
    gradient. Heavy-ball M, so that Adam's first moment is (1 - mu) M.
    """
    op = "mbf_diagonal_step_"
    lists = {"params": params, "grads": grads, "momenta": momenta, "squares": squares}
    checks.tensor_lists(op, **lists)
    checks.same_length(op, **lists)
    options = step_options(
        op, lr=lr, momentum=momentum, weight_decay=weight_decay, graft=graft, eps=eps, maximize=maximize,
        diagonal_decay=diagonal_decay,
    )  # fmt: skip
    weights = _weights(op, len(params), momentum_weight=momentum_weight, square_weight=square_weight)
    if len(params):
        checks.no_grad(op, *params, *grads, *momenta, *squares, *_on_device(options))
        torch.ops.mbf_kernels.mbf_diagonal_step_(*map(list, lists.values()), *weights, *_numbers(options))


def rank_one_step_(
    params: Sequence[Tensor],  # W, each [*rows, *columns]: dimensions of product m, and of product n
    grads: Sequence[Tensor],  # g, likewise
    momenta: Sequence[Tensor],  # M, likewise
    rows: Sequence[Tensor | None],  # s [m]
    columns: Sequence[Tensor | None],  # h [n]
    *,
    lr: float | Tensor,  # alpha
    momentum: float,  # beta in [0, 1)
    damping: float | Tensor,  # lambda >= 0
    weight_decay: float = 0.0,  # gamma
    decoupled: bool = True,
    momentum_weight: Weights = 1.0,  # 1 - beta^t
) -> None:
    """The step of tensors whose curvature is element-wise and of rank one, in one launch. Element i, j of each::

        M <- beta M + (1 - beta) g                                         unless decoupled: g + gamma W for g
        W <- W - alpha / momentum_weight M / (s_i h_j + lambda)            if decoupled: (1 - alpha gamma) W for W

    Rows and columns of W are its leading and its trailing dimensions, so that s_i h_j is ``torch.outer(s, h).view`` of
    its shape. None in both lists: lambda alone divides. In place where W, g and M lie alike, row after row
    (channels_last too), otherwise through copies. What is not finite reaches its own element of M and W alone. ``lr``,
    ``damping`` and the weights may be 0-d tensors on the device of the parameters; then their values are not checked.

    Source: D. Gomes and others, "AdaFisher", ICLR 2025, whose diagonal Kronecker factors S and H are s and h.
    """
    op = "rank_one_step_"
    lists = {"params": params, "grads": grads, "momenta": momenta}
    checks.tensor_lists(op, **lists)
    factors = {"rows": rows, "columns": columns}
    checks.optional_tensor_lists(op, **factors)
    checks.same_length(op, **lists, **factors)
    options = step_options(
        op, lr=lr, momentum=momentum, damping=damping, weight_decay=weight_decay, decoupled=decoupled
    )
    weights = _weights(op, len(params), momentum_weight=momentum_weight)
    if len(params):
        checks.no_grad(op, *params, *grads, *momenta, *rows, *columns, *_on_device(options))
        torch.ops.mbf_kernels.rank_one_step_(*map(list, (lists | factors).values()), *weights, *_numbers(options))


def _weights(op: str, count: int, **weights: Weights) -> tuple[list, ...]:
    """Numbers of both, one per tensor, and tensors of both; of each one list is empty."""
    numbers, tensors = [], []
    for name, weight in weights.items():
        per_tensor = list(weight) if isinstance(weight, list | tuple) else [weight] * count
        on_device = bool(per_tensor) and isinstance(per_tensor[0], Tensor)
        if on_device:
            checks.tensor_lists(op, **{name: per_tensor})
        numbers.append([] if on_device else [checks.number(op, name, w) for w in per_tensor])
        tensors.append(per_tensor if on_device else [])
    return (*numbers, *tensors)


def _matrices(
    op: str,
    fishers: Sequence[SymmetricBlocks],
    factors: Sequence[SymmetricBlocks] | None,
    refactor: bool,
    skipped: Sequence[Tensor] | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int], int]:
    """Storage of F and L, counters, counts and the size."""
    if factors is not None:
        checks.block_lists(op, factors=factors)
        checks.same_length(op, fishers=fishers, factors=factors)
        checks.same_blocks(op, fishers, factors)
    if not refactor and factors is None:
        raise ValueError(f"{op}: expected factors when refactor is False, got none")
    if skipped is not None:
        checks.tensor_lists(op, skipped=skipped)
        checks.same_length(op, fishers=fishers, skipped=skipped)
    checks.one_size(op, fishers)
    return (
        [fisher.data for fisher in fishers],
        [factor.data for factor in factors or ()],
        list(skipped or ()),
        [fisher.count for fisher in fishers],
        fishers[0].size if fishers else 1,
    )


# The options of a step as an op takes them: floats, flags, and the tensors that win over floats.
_NUMBERS = ("lr", "momentum", "decay", "damping", "weight_decay", "eps", "diagonal_decay")
_FLAGS = ("relative", "graft", "nesterov", "maximize", "update", "refactor", "decoupled")
_ON_DEVICE = ("lr", "damping")
_OPTIONS_SCHEMA = (
    ", ".join([*(f"float {name}" for name in _NUMBERS), *(f"bool {name}" for name in _FLAGS)])
    + ", "
    + ", ".join(f"Tensor? device_{name}" for name in _ON_DEVICE)
)


def _on_device(options: StepOptions) -> list[Tensor | None]:
    values = [getattr(options, name) for name in _ON_DEVICE]
    return [value if isinstance(value, Tensor) else None for value in values]


def _numbers(options: StepOptions) -> list:
    values = [getattr(options, name) for name in _NUMBERS]
    flags = [getattr(options, name) for name in _FLAGS]
    device = _on_device(options)
    return [*(0.0 if isinstance(value, Tensor) else value for value in values), *flags, *device]


def _options(numbers: Sequence) -> StepOptions:
    named = dict(zip((*_NUMBERS, *_FLAGS), numbers, strict=False))
    for name, value in zip(_ON_DEVICE, numbers[-len(_ON_DEVICE) :], strict=True):
        if value is not None:
            named[name] = value
    return StepOptions(**named)


def _check_numbers(op: str, params: Sequence[Tensor], weights: dict[str, tuple], numbers: Sequence) -> None:
    options = _options(numbers)
    options.check(op)
    device = {name: getattr(options, name) for name in _ON_DEVICE if isinstance(getattr(options, name), Tensor)}
    checks.device_scalars(op, params[0], **device)
    for name, (floats, tensors) in weights.items():
        checks.weights(op, name, floats, tensors, params)


# Of every op: its checks, what it returns (all a trace needs to know), and the call of the backend.


def _check_step(
    params, grads, momenta, fishers, factors, skipped, counts, size,
    momentum_weights, fisher_weights, device_momentum_weights, device_fisher_weights, *numbers,
):  # fmt: skip
    op = "mbf_step_"
    weights = {
        "momentum_weight": (momentum_weights, device_momentum_weights),
        "fisher_weight": (fisher_weights, device_fisher_weights),
    }
    _check_numbers(op, params, weights, numbers)
    checks.step_matrices(op, params, fishers, factors, skipped, counts, size)
    checks.blocks_of(op, params, counts, size)
    checks.step_tensors(op, params, skipped, grads=grads, momenta=momenta)


def _empty_step(params, grads, momenta, fishers, factors, skipped, counts, *rest):
    return fishers[0].new_empty(sum(counts), dtype=torch.int32)


def _step(
    params, grads, momenta, fishers, factors, skipped, counts, size,
    momentum_weights, fisher_weights, device_momentum_weights, device_fisher_weights, *numbers,
):  # fmt: skip
    written = {"params": params, "momenta": momenta, "fishers": fishers, "factors": factors}
    checks.memory("mbf_step_", written, {"grads": grads})
    pick, pick_blocks = _pickers(counts, size)
    info = choose("mbf_step_", params[0].device, size).mbf_step_(
        pick(params), pick(grads), pick(momenta), pick_blocks(fishers), pick_blocks(factors), pick(skipped),
        pick(device_momentum_weights or momentum_weights), pick(device_fisher_weights or fisher_weights),
        _options(numbers),
    )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *momenta, *fishers, *factors, *skipped])
    return info


def _pickers(counts, size):
    """Functions that leave out what belongs to tensors without blocks."""
    keep = [i for i, count in enumerate(counts) if count]

    def pick(items):
        return [items[i] for i in keep] if items else []

    def pick_blocks(data):
        return [SymmetricBlocks(data[i], counts[i], size) for i in keep] if data else []

    return pick, pick_blocks


def _check_shared(
    params, grads, momenta, squares, lengths, fishers, factors, skipped, counts, size,
    momentum_weights, square_weights, device_momentum_weights, device_square_weights, *numbers,
):  # fmt: skip
    op = "mbf_shared_step_"
    entries = _entries(params, lengths)
    mains = [entry[0] for entry in entries]
    weights = {
        "momentum_weight": (momentum_weights, device_momentum_weights),
        "square_weight": (square_weights, device_square_weights),
    }
    _check_numbers(op, mains, weights, numbers)
    checks.step_matrices(op, mains, fishers, factors, skipped, counts, size)
    checks.shared_blocks_of(op, entries, counts, size)
    like = {"grads": grads, "momenta": momenta} | ({"squares": squares} if squares else {})
    checks.step_tensors(op, params, skipped, **like)


def _entries(tensors, lengths):
    """The flat list as entries of one tensor or two."""
    rest = iter(tensors)
    return [tuple(next(rest) for _ in range(length)) for length in lengths]


def _empty_shared(params, grads, momenta, squares, lengths, fishers, factors, skipped, counts, *rest):
    return fishers[0].new_zeros(sum(counts), dtype=torch.int32)


def _shared(
    params, grads, momenta, squares, lengths, fishers, factors, skipped, counts, size,
    momentum_weights, square_weights, device_momentum_weights, device_square_weights, *numbers,
):  # fmt: skip
    written = {"params": params, "momenta": momenta, "squares": squares, "fishers": fishers, "factors": factors}
    checks.memory("mbf_shared_step_", written, {"grads": grads})
    pick, pick_blocks = _pickers(counts, size)
    tensors = [pick(_entries(t, lengths)) if t else [] for t in (params, grads, momenta, squares)]
    info = choose("mbf_shared_step_", params[0].device, size).mbf_shared_step_(
        *tensors, pick_blocks(fishers), pick_blocks(factors), pick(skipped),
        pick(device_momentum_weights or momentum_weights), pick(device_square_weights or square_weights),
        _options(numbers),
    )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *momenta, *squares, *fishers, *factors, *skipped])
    return info


def _check_diagonal(
    params, grads, momenta, squares,
    momentum_weights, square_weights, device_momentum_weights, device_square_weights, *numbers,
):  # fmt: skip
    op = "mbf_diagonal_step_"
    weights = {
        "momentum_weight": (momentum_weights, device_momentum_weights),
        "square_weight": (square_weights, device_square_weights),
    }
    _check_numbers(op, params, weights, numbers)
    checks.step_tensors(op, params, grads=grads, momenta=momenta, squares=squares)


def _empty_diagonal(*arguments):
    return None


def _diagonal(
    params, grads, momenta, squares,
    momentum_weights, square_weights, device_momentum_weights, device_square_weights, *numbers,
):  # fmt: skip
    checks.memory("mbf_diagonal_step_", {"params": params, "momenta": momenta, "squares": squares}, {"grads": grads})
    choose("mbf_diagonal_step_", params[0].device, 1).mbf_diagonal_step_(
        params, grads, momenta, squares,
        device_momentum_weights or momentum_weights, device_square_weights or square_weights, _options(numbers),
    )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *momenta, *squares])


def _check_rank_one(
    params, grads, momenta, rows, columns, momentum_weights, device_momentum_weights, *numbers
):  # fmt: skip
    op = "rank_one_step_"
    _check_numbers(op, params, {"momentum_weight": (momentum_weights, device_momentum_weights)}, numbers)
    checks.step_tensors(op, params, grads=grads, momenta=momenta)
    checks.rank_one(op, params, rows, columns)


def _empty_rank_one(*arguments):
    return None


def _rank_one(
    params, grads, momenta, rows, columns, momentum_weights, device_momentum_weights, *numbers
):  # fmt: skip
    read = {"grads": grads, "rows": rows, "columns": columns}
    checks.memory("rank_one_step_", {"params": params, "momenta": momenta}, read)
    keep = [i for i, param in enumerate(params) if param.numel()]
    lists = (params, grads, momenta, rows, columns, device_momentum_weights or momentum_weights)
    choose("rank_one_step_", params[0].device, 1).rank_one_step_(
        *([items[i] for i in keep] for items in lists), _options(numbers)
    )
    torch.autograd.graph.increment_version([*params, *momenta])


_WEIGHTS_SCHEMA = (
    "float[] momentum_weights, float[] {0}_weights, Tensor[] device_momentum_weights, Tensor[] device_{0}_weights, "
)
_MATRICES_SCHEMA = "int[] counts, int size, "

register(
    "mbf_step_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] fishers, Tensor(d!)[] factors,"
    f" Tensor(e!)[] skipped, {_MATRICES_SCHEMA}{_WEIGHTS_SCHEMA.format('fisher')}{_OPTIONS_SCHEMA}) -> Tensor",
    _check_step,
    _empty_step,
    _step,
    lambda params, grads, momenta, fishers, factors, skipped, counts, *rest: any(counts),
)
register(
    "mbf_shared_step_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] squares, int[] lengths,"
    " Tensor(d!)[] fishers, Tensor(e!)[] factors, Tensor(f!)[] skipped,"
    f" {_MATRICES_SCHEMA}{_WEIGHTS_SCHEMA.format('square')}{_OPTIONS_SCHEMA}) -> Tensor",
    _check_shared,
    _empty_shared,
    _shared,
    lambda params, *rest: any(param.numel() for param in params),
)
register(
    "mbf_diagonal_step_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] squares,"
    f" {_WEIGHTS_SCHEMA.format('square')}{_OPTIONS_SCHEMA}) -> ()",
    _check_diagonal,
    _empty_diagonal,
    _diagonal,
    lambda params, *rest: bool(params),
)
register(
    "rank_one_step_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor?[] rows, Tensor?[] columns,"
    f" float[] momentum_weights, Tensor[] device_momentum_weights, {_OPTIONS_SCHEMA}) -> ()",
    _check_rank_one,
    _empty_rank_one,
    _rank_one,
    lambda params, *rest: any(param.numel() for param in params),
)
