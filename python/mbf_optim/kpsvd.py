"""The KPSVD family: one or two Kronecker products nearest to each layer's Fisher matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .affine import Affine, Rows
from .kronecker import mean_diagonal, split_damping, update_inverses, whitened
from .layerwise import LayerwiseOptimizer
from .model_optimizer import check_range, number, one_of, positive
from .rearranged import Pair, Rearranged, norm, unit
from .replicas import Seen, Share
from .sampling import Residual
from .singular_pairs import top_pair, two_pairs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

METHODS = {"kpsvd": 2, "deflation": 4, "lanczos": 8, "kfac_corrected": 2}  # iterations, at least
FORMS = ("signed", "absolute")
FIRST, SECOND = ("R", "S"), ("R2", "S2")
ITERATIONS, RESTARTS, KRYLOV = 1000, 100, 8
NEW = 1e-2  # of a start is random: what a warm one is orthogonal to would never be found


class KPSVD(LayerwiseOptimizer):
    """F of a layer [pq, pq] as R (x) S + R2 (x) S2, with R [p, p] and S [q, q] from the SVD of its rearrangement Z:

    - ``"kpsvd"``: the nearest single product, by power iteration;
    - ``"deflation"``: the two nearest, one after the other;
    - ``"lanczos"``: the two nearest at once;
    - ``"kfac_corrected"``: K-FAC's A (x) G, and the product nearest to what is left.

    One product steps as K-FAC does, (R + sqrt(lambda) I)^-1 and (S + sqrt(lambda) I)^-1. Of two the first gets lambda I
    on either factor (so lambda acts as the square root of K-FAC's does), and with R^-1/2 R2 R^-1/2 = E1 diag(s1) E1^T,
    S^-1/2 S2 S^-1/2 = E2 diag(s2) E2^T, K1 = R^-1/2 E1, K2 = S^-1/2 E2::

        U = K2 ((K2^T grad K1) / max(1 + s2 s1^T, floor)) K1^T

    Averages, KL clip, momentum and weight decay are K-FAC's. All pairs of locations of a sample count; R, S, R2 and
    S2 are symmetric.

    Args:
        model, lr, momentum, weight_decay, decay, kl_clip: as in KFAC.
        method: see above.
        damping: lambda; None: 1e-2 for one product, 1e-1 for two, where it acts as its square does for one.
        inverse: "signed" as above, exact where the floor is not reached; "absolute": 1 + |s2| |s1|^T, the authors'
            code, which is not the inverse of an indefinite second product.
        floor: of 1 + s2 s1; > 0.
        update_interval, factor_interval: the authors' are 100 and 100.
        tolerance: of the singular pairs, relative to the largest singular value (at least 100 eps).
        groups, distribution, mean_loss, grad_scaler, process_group: see LayerwiseOptimizer.

    Source: A. Koroko, A. Anciaux-Sedrakian, I. Ben Gharbia, V. Gares, M. Haddou, Q. H. Tran, "Efficient approximations
    of the Fisher matrix in neural networks using Kronecker product singular value decomposition", ESAIM: ProcS 73
    (2023). Departures: "lanczos" spans 8 dimensions and goes on from both vectors (theirs, 2 from their sum, does not
    reach the second pair); "kfac_corrected" corrects the batch's own A and G; signs are fixed before factors are
    averaged. Raises as KFAC does.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        method: str = "kpsvd",
        damping: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decay: float = 0.95,
        update_interval: int = 10,
        factor_interval: int = 100,
        kl_clip: float | None = 1e-3,
        inverse: str = "signed",
        floor: float = 0.1,
        tolerance: float = 1e-4,
        groups: Iterable[dict] | None = None,
        distribution: str | Residual | None = None,
        mean_loss: bool = True,
        grad_scaler: torch.amp.GradScaler | None = None,
        process_group: ProcessGroup | None = None,
    ):
        defaults = {
            "lr": lr, "method": method, "damping": damping, "momentum": momentum, "weight_decay": weight_decay,
            "decay": decay, "update_interval": update_interval, "factor_interval": factor_interval,
            "kl_clip": kl_clip, "inverse": inverse, "floor": floor, "tolerance": tolerance,
        }  # fmt: skip
        super().__init__(model, defaults, groups, distribution, mean_loss, grad_scaler, process_group)

    def _check(self, options: dict) -> None:
        if options["damping"] is None:
            options["damping"] = 1e-2 if options["method"] == "kpsvd" else 1e-1
        check_range(self._title, options)
        positive(self._title, "damping", options["damping"])
        number(self._title, "decay", options["decay"], 0, 1)
        positive(self._title, "floor", options["floor"])
        number(self._title, "tolerance", options["tolerance"], 0, math.inf)
        one_of(self._title, "method", options["method"], METHODS)
        one_of(self._title, "inverse", options["inverse"], FORMS)

    def _shapes(self, layer: Affine) -> dict[str, tuple[int, ...]]:
        groups, outputs, inputs = layer.shape
        of_r, of_s = (groups, inputs, inputs), (groups, outputs, outputs)
        if self._group(layer)["method"] == "kpsvd":
            return {"R": of_r, "S": of_s, "R_inverse": of_r, "S_inverse": of_s}
        pairs = dict(zip(FIRST + SECOND, (of_r, of_s) * 2, strict=True))
        return pairs | {"K1": of_r, "K2": of_s, "spectrum": (groups, outputs, inputs)}

    def _numbers(self, layer: Affine | None) -> dict[str, int]:
        numbers = super()._numbers(layer)
        return numbers | {"method": list(METHODS).index(self._group(layer)["method"])} if layer else numbers

    def _measured(self, layer: Affine, rows: Rows, share: Share, group: dict) -> Seen:
        """Singular pairs are no means of those of parts: all rows, then, in every process."""
        rows = rows.weighted(share.root_weight)
        samples = {
            name: self._replicas.concatenated(part, share.lengths)
            for name, part in zip(("inputs", "gradients"), rows, strict=False)
        }
        return Seen(share.locations, samples=samples)

    def _observe(self, layer: Affine, seen: Seen, state: dict, group: dict) -> None:
        rows = Rows(**seen.samples, locations=seen.locations)
        lengths = [torch.linalg.vector_norm(part, dim=(1, 3)) for part in (rows.inputs, rows.gradients)]
        if not bool((lengths[0] * lengths[1]).pow(4).sum().isfinite()):  # bounds |Z|^2
            self._skip(state)
            return
        method = list(METHODS).index(group["method"])
        if state.setdefault("method", method) != method:  # averages of another's pairs
            for name in state.keys() - {self._momentum, "skipped"}:
                del state[name]
            state["method"] = method
        pairs = self._pairs(rows, state, group)
        state["updates"] = state.get("updates", 0) + 1
        keep = min(1 - 1 / state["updates"], group["decay"])
        for names, pair in zip((FIRST, SECOND), pairs, strict=False):
            for name, new in zip(names, _aligned(pair, state, names), strict=True):
                state[name] = state[name].lerp_(new, 1 - keep) if name in state else new

    def _pairs(self, rows: Rows, state: dict, group: dict) -> list[Pair]:
        """Of the batch; iterations start from the averages so far."""
        method = group["method"]
        z = Rearranged(rows, METHODS[method], seed=state.get("updates", 0))
        tolerance = max(group["tolerance"], 100 * torch.finfo(rows.inputs.dtype).eps)

        def start(*names: str) -> Tensor:
            new, known = unit(z.right.random()), [state[name] for name in names if name in state]
            return unit(z.right.vector(sum(known))) + NEW * new if known else new

        if method == "lanczos":
            return [z.matrices(pair) for pair in two_pairs(z, start("S", "S2"), tolerance, RESTARTS, KRYLOV)]
        if method == "kfac_corrected":
            first = z.means()
            scale = norm(first.left) * norm(first.right)
        else:
            first, scale = top_pair(z, start("S"), tolerance, ITERATIONS)
        if method == "kpsvd":
            return [z.matrices(first)]
        second, _ = top_pair(z.less(first), start("S2"), tolerance, ITERATIONS, scale)
        return [z.matrices(first), z.matrices(second)]

    def _refresh(self, layers: list[Affine], groups: dict[int, dict]) -> None:
        single, dampings = [], []
        for layer in layers:
            state, damping = self.state[layer.weight], groups[id(layer)]["damping"]
            pair, second = ([state[name] for name in names if name in state] for names in (FIRST, SECOND))
            if second:
                k1, k2, s1, s2 = whitened(pair, second, damping)
                state |= {"K1": k1, "K2": k2, "spectrum": s2[:, :, None] * s1[:, None]}
            elif pair:
                single.append(state)
                both = split_damping(*map(mean_diagonal, pair), damping, balanced=False)
                dampings.append(dict(zip(FIRST, both, strict=True)))
        for state in update_inverses(single, dampings):
            self._skip(state)

    def _direction(self, layer: Affine, gradient: Tensor, group: dict) -> Tensor | None:
        state = self.state.get(layer.weight, {})
        if "K1" in state:
            spectrum, k1, k2 = state["spectrum"], state["K1"], state["K2"]
            signed = group["inverse"] == "signed"
            denominator = (1 + spectrum).clamp_min(group["floor"]) if signed else 1 + spectrum.abs()
            return k2 @ ((k2.mT @ gradient @ k1) / denominator) @ k1.mT
        if "R_inverse" in state:
            return state["S_inverse"] @ gradient @ state["R_inverse"]
        return None

    def _structure(self, layer: Affine) -> tuple[str, int, int]:
        groups, outputs, inputs = layer.shape
        terms = 1 if self._group(layer)["method"] == "kpsvd" else 2
        return f"{terms} x ({inputs}x{inputs}, {outputs}x{outputs})", 2 * terms * groups, max(outputs, inputs)


def _aligned(pair: Pair, state: dict, names: tuple[str, str]) -> Pair:
    """R (x) S = (-R) (x) (-S): with the sign of the average so far, or at first of a positive trace."""
    old = state.get(names[0])
    agreement = pair.left.diagonal(dim1=1, dim2=2).sum(1) if old is None else (pair.left * old).sum((1, 2))
    sign = torch.where(agreement < 0, -1.0, 1.0).to(pair.left.dtype)[:, None, None]
    return Pair(sign * pair.left, sign * pair.right)
