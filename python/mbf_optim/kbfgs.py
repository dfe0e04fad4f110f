"""K-BFGS and K-BFGS(L): Goldfarb, Ren & Bahamou, NeurIPS 2020."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .affine import Affine, affine_layers
from .bfgs import accepts, action_update, double_damping, gated_update, limited_product
from .capture import Use
from .kronecker import damped, gram, inverses
from .model_optimizer import ModelOptimizer, count, flag, number
from .replicas import Seen, Share

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MU1 = 0.2  # of the first of the two dampings


class Means(NamedTuple):
    """Of a layer over samples and locations."""

    inputs: Tensor  # abar, [groups, p]
    outputs: Tensor  # h = W abar, [groups, q]
    gradients: Tensor  # g, [groups, q]
    bound: Tensor  # of m tr A


class Pair(NamedTuple):
    """For H_g of a layer."""

    s: Tensor  # [groups, q]
    y: Tensor
    v: Tensor  # mean g at W
    state: dict
    group: dict


class QuasiNewton(ModelOptimizer):
    """What both have in common: all but how H_g is kept. See KBFGS for the method and the arguments."""

    def __init__(
        self,
        model: nn.Module,
        defaults: dict[str, Any],
        groups: Iterable[dict] | None,
        mean_loss: bool,
        process_group: ProcessGroup | None,
    ):
        super().__init__(model, defaults, groups, process_group)
        flag(self._title, "mean_loss", mean_loss)
        self._mean_loss = mean_loss

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float:
        """One step for every parameter that has a gradient.

        Args:
            closure: zeroes gradients, computes the loss of a batch, its gradients, and returns it. Called at W and
                again at W+: then with the same random numbers (of the CPU and the parameters' CUDA devices), and
                buffers, such as BatchNorm's, and gradients are put back after.

        Returns the loss at W.
        """
        if closure is None:
            raise TypeError(f"{self._title}: expected step(closure), it evaluates the loss twice")
        groups = {layer: self._group(layer) for layer in self._layers}
        random = _RandomState(param.device for group in self.param_groups for param in group["params"])
        loss = self._evaluated(closure)
        first = self._observe(groups)
        self._move()
        with random.again(), _untouched(self._model, self.param_groups):
            self._evaluated(closure)
        self._learn(first, groups)
        self._capture.clear()
        for group in self.param_groups:
            group["step"] += 1
        return loss

    # ------------------------------------------------------------------ what makes a method

    @abstractmethod
    def _start(self, layer: Affine, state: dict) -> None:
        """H_g = I."""

    @abstractmethod
    def _product(self, state: dict, x: Tensor) -> Tensor:
        """H_g X for X [groups, q, c]."""

    @abstractmethod
    def _take(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """Updates H_g of layers where their pairs are accepted; where those were, [groups] each."""

    # ------------------------------------------------------------------ the step

    def _evaluated(self, closure: Callable[[], float]) -> float:
        self._capture.clear()
        return super()._evaluated(closure)

    def _known_layers(self, trained: Container[int] | None) -> list[Affine]:
        return affine_layers(self._model, trained)

    def _wants(self, module: nn.Module) -> bool:
        return module in self._layer_of

    def _shapes(self, layer: Affine) -> dict[str, tuple[int, ...]]:
        groups, outputs, inputs = layer.shape
        of_a, of_s = (groups, inputs, inputs), (groups, outputs)
        return {"A": of_a, "A_inverse": of_a, "s": of_s, "y": of_s}

    def _means(self) -> tuple[dict[Affine, Share], dict[Affine, Means]]:
        """Of all processes, at the weights as they are; and the layers' shares. A frozen bias is in no mean of h, and
        drops out of s."""
        shares = self._shares(self._layers)
        parts = ((layer, self._own_means(layer, share)) for layer, share in shares.items())
        means = {
            layer: Means(outputs=layer.outputs(seen.sums["inputs"]), **seen.sums)
            for layer, seen in self._replicas.totals(parts)
        }
        return shares, means

    def _own_means(self, layer: Affine, share: Share) -> Seen:
        """This process's part of them."""
        inputs, gradients = layer.means(share.uses, self._mean_loss)
        weight = share.own.locations / (share.divisor * share.locations)
        sums = {"inputs": weight * inputs, "gradients": weight * gradients, "bound": _trace_bound(layer, share.uses)}
        return Seen(share.locations, sums=sums)

    def _observe(self, groups: dict[Affine, dict]) -> dict[Affine, Means]:
        """Updates A; of the layers where something can be learned the means."""
        shares, means = self._means()
        bounds = _on_host([mean.bound for mean in means.values()])
        finite = [layer for layer, bound in zip(means, bounds, strict=True) if math.isfinite(bound)]
        parts = ((layer, Seen(0, {"A": self._own_inputs(layer, shares[layer])})) for layer in finite)
        averaged = [
            layer
            for layer, seen in self._replicas.totals(parts)
            if self._average_inputs(layer, seen.matrices["A"], groups[layer])
        ]
        for layer in means.keys() - averaged:
            self._skip(self.state[layer.weight], layer.groups)
        return {layer: means[layer] for layer in averaged}

    def _own_inputs(self, layer: Affine, share: Share) -> Tensor:
        """This process's part of the mean of sum_t abar abar^T."""
        rows = [layer.patches(use.inputs) for use in share.uses] or [layer.rows([], False).inputs]
        return sum(map(gram, rows)) / share.divisor

    def _average_inputs(self, layer: Affine, new: Tensor, group: dict) -> bool:
        """Updates A; whether that could be done."""
        state = self.state[layer.weight]
        if "A" in state:
            state["A"].lerp_(new, 1 - group["decay"])
        else:
            inverse, good = inverses([damped(new, new.new_full((len(new),), group["damping"] ** 0.5))])[0]
            if not bool(good.all()):  # without damping
                return False
            state["A"], state["A_inverse"] = new, inverse
            self._start(layer, state)
            state["s"] = state["y"] = new.new_zeros(layer.shape[:2])
        state["updates"] = state.get("updates", 0) + 1
        return True

    def _move(self) -> None:
        for group in self.param_groups:
            self._average(group)
        directions: dict[int, Tensor] = {}
        for layer in self._layers:
            state = self.state.get(layer.weight, {})
            if "A_inverse" in state and all(param.grad is not None for param in layer.params):
                average = layer.joined(*map(self._momentum_of, layer.params))
                direction = self._product(state, average @ state["A_inverse"])
                directions |= dict(zip(map(id, layer.params), layer.split(direction), strict=True))
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            moves = [directions.get(id(param), self._momentum_of(param)) for param in params]
            if params:
                torch._foreach_add_(params, moves, alpha=-group["lr"])

    def _average(self, group: dict) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        buffers, gradients = [self._momentum_of(p) for p in params], [p.grad for p in params]
        if group["weight_decay"]:
            gradients = torch._foreach_add(gradients, params, alpha=group["weight_decay"])
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])

    def _learn(self, first: dict[Affine, Means], groups: dict[Affine, dict]) -> None:
        """Updates H_a and H_g, from the means at W and at W+."""
        pairs, good = [], []
        _, second = self._means()
        for layer, means in first.items():
            if layer in second:
                state, group = self.state[layer.weight], groups[layer]
                good.append(self._act(state, means.inputs, group))
                pairs.append(self._pair(state, means, second[layer], group))
        refused = [(~a).sum() + (~g).sum() for a, g in zip(good, self._take(pairs), strict=True)]
        for pair, skipped in zip(pairs, _on_host(refused), strict=True):
            self._skip(pair.state, skipped)

    def _act(self, state: dict, v: Tensor, group: dict) -> Tensor:
        """Updates H_a by the action of A + sqrt(lambda) I; where it is accepted, [groups]."""
        state["A_inverse"], good = action_update(state["A_inverse"], state["A"], group["damping"] ** 0.5, v)
        return good

    def _pair(self, state: dict, first: Means, second: Means, group: dict) -> Pair:
        """Updates s and y, if what is new is finite; otherwise the pair is NaN, and refused."""
        s, y = second.outputs - first.outputs, second.gradients - first.gradients
        finite = (s.sum() + y.sum()).isfinite()
        for name, new in (("s", s), ("y", y)):
            state[name] = torch.where(finite, torch.lerp(state[name], new, 1 - group["decay"]), state[name])
        product = self._product(state, state["y"][..., None])[..., 0]
        s, y = double_damping(state["s"], state["y"], product, MU1, group["damping"] ** 0.5)
        return Pair(torch.where(finite, s, math.nan), y, first.gradients, state, group)

    def _check(self, options: dict) -> None:
        for name in ("lr", "weight_decay"):
            number(self._title, name, options[name], 0, math.inf)
        for name in ("damping", "decay", "momentum"):
            number(self._title, name, options[name], 0, 1)


class KBFGS(QuasiNewton):
    """Kronecker-factored quasi-Newton steps, layer by layer, from two gradients of every batch. For W [q, p] with the
    bias as last column, abar the input with a 1 appended, h = W abar, g the gradient of a sample's own loss by h::

        M    <- momentum M + (1 - momentum) (grad + weight_decay W)
        A    <- decay A + (1 - decay) (1/m) sum_n sum_t abar abar^T           the first batch's at first
        W+   <- W - lr H_g M H_a
        s    <- decay s + (1 - decay) (mean h at W+ - mean h at W)            on the same batch
        y    <- decay y + (1 - decay) (mean g at W+ - mean g at W)
        H_g  <- BFGS(H_g, s', y')                s', y' = DD(s, y; H_g, 0.2, sqrt(damping)); I at first
        H_a  <- BFGS(H_a, H_a v, (A + sqrt(damping) I) H_a v)  with v = mean abar at W; at first the inverse of
                                                                              A + sqrt(damping) I

    where BFGS(H, s, y) is the update of an inverse by a pair, and DD, double damping, makes s'^T y' large enough::

        s' = theta s + (1 - theta) H y     theta <= 1 the largest with s'^T y >= 0.2 y^T H y
        y' = theta y + (1 - theta) s'      theta <= 1 the largest with s'^T y' >= sqrt(damping) s'^T s'

    A pair with s^T y <= 1e-4 s^T s |v|, v the mean of g or abar at W, or whose update is not finite, is skipped and
    counted. Linear, Conv1d and Conv2d layers have such curvature, means of theirs go over locations too (grouped
    convolutions have one for each group); all else steps along M. ``report()`` tells which.

    Args:
        model: its parameters are stepped.
        lr: alpha.
        damping: lambda; < 1, or the second damping would divide by zero.
        decay: of the averages of A, s and y.
        momentum: of the average of gradients.
        weight_decay: added to gradients as that of weight_decay / 2 |W|^2; s and y are of the loss alone.
        groups: see ModelOptimizer. A bias that joins a weight may be in another group: curvature goes by the weight's.
        mean_loss: whether the loss is a mean over the samples, or their sum.
        process_group: see ModelOptimizer.

    Raises ValueError or TypeError for an option out of its range, for sparse gradients and for a step without closure.

    Source: D. Goldfarb, Y. Ren, A. Bahamou, "Practical Quasi-Newton Methods for Training Deep Neural Networks",
    NeurIPS 2020. There A starts as an average over an epoch, and all layers are linear.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.3,
        damping: float = 0.3,
        decay: float = 0.9,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        groups: Iterable[dict] | None = None,
        mean_loss: bool = True,
        process_group: ProcessGroup | None = None,
    ):
        options = {"lr": lr, "damping": damping, "decay": decay, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(model, options, groups, mean_loss, process_group)

    def _shapes(self, layer: Affine) -> dict[str, tuple[int, ...]]:
        groups, outputs, _ = layer.shape
        return super()._shapes(layer) | {"G_inverse": (groups, outputs, outputs)}

    def _start(self, layer: Affine, state: dict) -> None:
        groups, outputs, _ = layer.shape
        state["G_inverse"] = torch.diag_embed(state["A"].new_ones(groups, outputs))

    def _product(self, state: dict, x: Tensor) -> Tensor:
        return state["G_inverse"] @ x

    def _take(self, pairs: Sequence[Pair]) -> list[Tensor]:
        found = [gated_update(pair.state["G_inverse"], pair.s, pair.y, pair.v) for pair in pairs]
        for pair, (new, _) in zip(pairs, found, strict=True):
            pair.state["G_inverse"] = new
        return [good for _, good in found]

    def _structure(self, layer: Affine) -> tuple[str, int, int]:
        groups, outputs, inputs = layer.shape
        return f"H_a {inputs}x{inputs}, H_g {outputs}x{outputs}", 2 * groups, max(outputs, inputs)


class KBFGSL(QuasiNewton):
    """K-BFGS with H_g of limited memory: what the last pairs make of I, never formed. For large outputs: 2 memory q
    numbers in place of q^2.

    A pair of zeros is none: so are those that are still to come, and that of a group of a grouped convolution which did
    not accept what others did.

    Args:
        memory: pairs, at most; the oldest one goes. With as many as steps, the iterates are those of KBFGS.
        all others: see KBFGS. Errors and source as there; there too is the closure that a step needs.
    """

    _of_any_length = ("S", "Y")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.3,
        damping: float = 0.3,
        decay: float = 0.9,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        groups: Iterable[dict] | None = None,
        mean_loss: bool = True,
        memory: int = 100,
        process_group: ProcessGroup | None = None,
    ):
        options = {"lr": lr, "damping": damping, "decay": decay, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(model, options | {"memory": memory}, groups, mean_loss, process_group)

    def _shapes(self, layer: Affine) -> dict[str, tuple[int, ...]]:
        groups, outputs, _ = layer.shape
        of_s = groups, self._group(layer)["memory"], outputs
        return super()._shapes(layer) | {"S": of_s, "Y": of_s}

    def _start(self, layer: Affine, state: dict) -> None:
        state["S"] = state["Y"] = state["A"].new_zeros(self._shapes(layer)["S"])

    def _product(self, state: dict, x: Tensor) -> Tensor:
        return limited_product(state["S"], state["Y"], x)

    def _take(self, pairs: Sequence[Pair]) -> list[Tensor]:
        found = [accepts(pair.s, pair.y, pair.v) for pair in pairs]
        for pair, good, some in zip(pairs, found, _on_host([good.any() for good in found]), strict=True):
            if some:
                for name, vector in (("S", pair.s), ("Y", pair.y)):
                    row, old = torch.where(good[:, None], vector, 0)[:, None], pair.state[name]
                    surplus = max(0, old.shape[1] + 1 - pair.group["memory"])
                    pair.state[name] = torch.cat([old[:, surplus:], row], 1)
        return found

    def _structure(self, layer: Affine) -> tuple[str, int, int]:
        groups, _, inputs = layer.shape
        memory = self._group(layer)["memory"]
        return f"H_a {inputs}x{inputs}, H_g of {memory} pairs", groups, inputs

    def _check(self, options: dict) -> None:
        super()._check(options)
        count(self._title, "memory", options["memory"])


def _trace_bound(layer: Affine, uses: Sequence[Use]) -> Tensor:
    """Of m tr A: no input is in more than p patches' places."""
    squares = [torch.linalg.vector_norm(use.inputs, dtype=layer.dtype).square() for use in uses]
    return layer.shape[2] * sum(squares, layer.weight.new_zeros((), dtype=layer.dtype))


def _on_host(scalars: Sequence[Tensor]) -> list:
    """Numbers, waited for once."""
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).tolist() if scalars else []


class _RandomState:
    """Of the CPU and of CUDA devices, when it was made."""

    def __init__(self, devices: Iterable[torch.device]):
        self._devices = sorted({device for device in devices if device.type == "cuda"}, key=str)
        self._states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, random numbers are drawn from then on; afterwards, as if none had been."""
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._states[0])
            for device, state in zip(self._devices, self._states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


@contextmanager
def _untouched(model: nn.Module, groups: list[dict]) -> Iterator[None]:
    """Afterwards buffers and gradients are what they were, though a pass writes to them or puts others in their place.
    Inside there are no gradients at first."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    params = [*model.parameters(), *(param for group in groups for param in group["params"])]
    gradients = [param.grad for param in params]
    values = [_value_in_a_bucket(gradient) for gradient in gradients]
    for param in params:
        param.grad = None
    try:
        yield
    finally:
        for module, name, buffer, value in buffers:
            setattr(module, name, buffer.copy_(value))
        for param, gradient, value in zip(params, gradients, values, strict=True):
            param.grad = gradient if value is None else gradient.copy_(value)


def _value_in_a_bucket(gradient: Tensor | None) -> Tensor | None:
    """Of a gradient in memory that the next pass writes to: DistributedDataParallel's with gradient_as_bucket_view."""
    return None if gradient is None or gradient._base is None else gradient.clone()
