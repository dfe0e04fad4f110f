"""The Mini-Block Fisher method as its text says: numpy float64, index lists, dense blocks, explicit loops.

Slow, obvious, and sharing nothing with the package: the tests compare the two.
"""

from math import prod

import numpy as np


def partition(shape, blocks="auto", *, graft="adam", segment=64, grid=None, average=True):
    """Mini-blocks of a tensor, a list of (key, positions in its row-major order), and whether they share.

    Blocks with the same key share one matrix. An empty list: the tensor takes the diagonal step.
    """
    taps = prod(shape[2:])
    if blocks == "auto":
        if len(shape) > 2 and (taps > 1 or graft is None):
            blocks = "filter"
        else:
            blocks, average = ("row" if graft is None else "segment"), True
    if blocks == "filter" and len(shape) > 2:
        return [(b, list(range(b * taps, (b + 1) * taps))) for b in range(shape[0] * shape[1])], False
    if blocks in ("filter", "diagonal") or len(shape) < 2 or taps > 1:
        return [], False

    outputs, inputs = shape[:2]
    tiles = []  # (what identifies the matrix when averaging, rows, columns)
    if blocks == "row":
        tiles = [("all", [o], range(inputs)) for o in range(outputs)]
    elif blocks == "column":
        tiles = [("all", range(outputs), [d]) for d in range(inputs)]
    elif blocks == "segment":
        for o in range(outputs):
            for start in range(0, inputs, segment):
                tiles.append((start, [o], range(start, min(start + segment, inputs))))
    elif blocks == "grid":
        m1, m2 = grid
        assert inputs % m1 == outputs % m2 == 0
        width, height = inputs // m1, outputs // m2
        for i in range(m2):
            for j in range(m1):
                tiles.append(("all", range(i * height, (i + 1) * height), range(j * width, (j + 1) * width)))
    mini_blocks = [
        (shared if average else number, [o * inputs + d for o in rows for d in columns])
        for number, (shared, rows, columns) in enumerate(tiles)
    ]
    return mini_blocks, average


def norm(x):
    return np.sqrt(np.sum(x * x))


class Layer:
    """One tensor, or a matrix with its bias as the last column, flattened: `w`."""

    def __init__(self, arrays, options):
        self.o = o = dict(options)
        w = self.join(arrays)
        self.shape, self.w = w.shape, w.ravel().copy()
        self.m, self.v = np.zeros_like(self.w), np.zeros_like(self.w)
        choice = {name: o[name] for name in ("blocks", "graft", "segment", "grid", "average")}
        self.blocks, self.shared = partition(w.shape, **choice)
        self.t = self.updates = self.observed = 0
        self.sharing = {}  # key -> its blocks
        for key, positions in self.blocks:
            self.sharing.setdefault(key, []).append(positions)
        self.fisher = {key: np.zeros((len(b[0]), len(b[0]))) for key, b in self.sharing.items()}
        self.damped = {}
        largest = max((len(positions) for _, positions in self.blocks), default=0)
        self.t1 = o["update_interval"] or (1 if largest <= 128 else 10)
        self.t2 = o["factor_interval"] or (1 if largest <= 128 else 100)

    @staticmethod
    def join(arrays):
        arrays = [np.asarray(a, dtype=np.float64) for a in arrays]
        return arrays[0] if len(arrays) == 1 else np.concatenate([arrays[0], arrays[1][:, None]], axis=1)

    def statistic(self, key, g):
        return sum(np.outer(g[p], g[p]) for p in self.sharing[key]) / len(self.sharing[key])

    def observe(self, arrays):
        g = self.join(arrays).ravel()
        self.observed += 1
        j = self.observed
        for key in self.fisher:
            self.fisher[key] = (j - 1) / j * self.fisher[key] + 1 / j * self.statistic(key, g)

    def step(self, arrays):
        o, t = self.o, self.t
        g = self.join(arrays).ravel() * (-1 if o["maximize"] else 1)
        self.m = o["momentum"] * self.m + g
        p = self.blockwise(g) if self.blocks else self.diagonal(g)
        self.w = self.w * (1 - o["lr"] * o["weight_decay"]) - o["lr"] * p
        self.t = t + 1

    def diagonal(self, g):
        o, t = self.o, self.t
        mean = (1 - o["momentum"]) * self.m
        square = mean if o["graft"] is None else g  # the paper squares the averaged gradient, Adam the gradient
        self.v = o["diagonal_decay"] * self.v + (1 - o["diagonal_decay"]) * square**2
        if o["graft"] is not None:
            mean = mean / (1 - o["momentum"] ** (t + 1))
        return mean / (o["eps"] + np.sqrt(self.v / (1 - o["diagonal_decay"] ** (t + 1))))

    def blockwise(self, g):
        o, t = self.o, self.t
        if t % self.t1 == 0:
            self.updates += 1
            for key in self.fisher:
                self.fisher[key] = o["decay"] * self.fisher[key] + (1 - o["decay"]) * self.statistic(key, g)
        if (t <= self.t2 and t % self.t1 == 0) or t % self.t2 == 0:
            for key, f in self.fisher.items():
                damping = o["damping"]
                if o["relative_damping"]:
                    damping *= np.trace(f) / len(f)
                    if np.trace(f) == 0:
                        damping = 1.0
                self.damped[key] = f + damping * np.eye(len(f))
        d = o["momentum"] * self.m + g if o["nesterov"] else self.m
        self.v = o["diagonal_decay"] * self.v + (1 - o["diagonal_decay"]) * g**2
        p = np.zeros_like(d)
        for key, at in self.blocks:
            p[at] = np.linalg.solve(self.damped[key], d[at])
            if o["graft"] is None:
                continue
            if self.shared:
                square = self.v[at] / (1 - o["diagonal_decay"] ** (t + 1))
            else:
                square = np.diag(self.fisher[key]) / (1 if self.observed else 1 - o["decay"] ** self.updates)
            u = (1 - o["momentum"]) / (1 - o["momentum"] ** (t + 1)) * d[at] / (np.sqrt(square) + o["eps"])
            p[at] *= norm(u) / norm(p[at]) if norm(p[at]) > 0 else 0
        return p


GRAFTED = dict(
    lr=1e-3, momentum=0.9, decay=0.98, damping=0.3, relative_damping=True, weight_decay=0.0, graft="adam",
    nesterov=True, update_interval=None, factor_interval=None,
    blocks="auto", segment=64, grid=None, average=True,
    diagonal_decay=0.999, eps=1e-8, maximize=False,
)  # fmt: skip
PAPER = GRAFTED | dict(graft=None, nesterov=False, relative_damping=False, decay=0.9)


class BruteForce:
    """layers: lists of one tensor, or of a matrix and its bias; options: GRAFTED or PAPER, changed."""

    def __init__(self, layers, options):
        self.layers = [Layer(arrays, options) for arrays in layers]

    def step(self, gradients):
        for layer, arrays in zip(self.layers, gradients, strict=True):
            if arrays[0] is not None:
                layer.step(arrays)

    def observe(self, gradients):
        for layer, arrays in zip(self.layers, gradients, strict=True):
            layer.observe(arrays)


def block_step(w, g, m, f, *, lr, momentum, decay, damping, weight_decay=0.0, relative=False, graft=None,
               nesterov=False, eps=1e-8, momentum_weight=1.0, fisher_weight=1.0, maximize=False,
               update=True):  # fmt: skip
    """One block of mbf_step_: w, g, m [n] and f [n, n] in float64 -> the new w, m, f."""
    g = -g if maximize else g
    m = momentum * m + g
    f = decay * f + (1 - decay) * np.outer(g, g) if update else f
    d = momentum * m + g if nesterov else m
    if relative:
        damping = damping * np.trace(f) / len(f) if np.trace(f) != 0 else 1.0
    p = np.linalg.solve(f + damping * np.eye(len(f)), d)
    if graft == "adam":
        u = (1 - momentum) / momentum_weight * d / (np.sqrt(np.diag(f) / fisher_weight) + eps)
        p = norm(u) / norm(p) * p if norm(p) > 0 else 0 * p
    return (1 - lr * weight_decay) * w - lr * p, m, f


def shared_step(w, g, m, v, f, *, lr, momentum, decay, damping, weight_decay=0.0, diagonal_decay=0.999,
                relative=False, graft=None, nesterov=False, eps=1e-8, momentum_weight=1.0, square_weight=1.0,
                maximize=False, update=True, damped=None):  # fmt: skip
    """One tensor of mbf_shared_step_: w, g, m, v [S, R, n] and f [R, n, n] in float64 -> the new w, m, v, f.

    ``damped`` [R, n, n]: solve with these matrices, as with factors that are cached.
    """
    g = -g if maximize else g
    new_w, new_m, new_v, new_f = w.copy(), momentum * m + g, v.copy(), f.copy()
    if graft == "adam":
        new_v = diagonal_decay * v + (1 - diagonal_decay) * g**2
    for r in range(len(f)):
        if update:
            statistic = sum(np.outer(row, row) for row in g[:, r]) / len(g)
            new_f[r] = decay * f[r] + (1 - decay) * statistic
        a = damped[r] if damped is not None else damped_matrix(new_f[r], damping, relative)
        d = momentum * new_m[:, r] + g[:, r] if nesterov else new_m[:, r]
        p = np.linalg.solve(a, d.T).T
        for s in range(len(g)):
            length = 1.0
            if graft == "adam":
                mean = (1 - momentum) / momentum_weight * d[s]
                u = mean / (np.sqrt(new_v[s, r] / square_weight) + eps)
                length = norm(u) / norm(p[s]) if norm(p[s]) > 0 else 0.0
            new_w[s, r] = (1 - lr * weight_decay) * w[s, r] - lr * length * p[s]
    return new_w, new_m, new_v, new_f


def damped_matrix(f, damping, relative):
    if relative:
        damping = damping * np.trace(f) / len(f) if np.trace(f) != 0 else 1.0
    return f + damping * np.eye(len(f))


def diagonal_step(w, g, m, v, *, lr, momentum, diagonal_decay, weight_decay=0.0, graft=None, eps=1e-8,
                  momentum_weight=1.0, square_weight=1.0, maximize=False):  # fmt: skip
    """mbf_diagonal_step_ in float64 -> the new w, m, v."""
    g = -g if maximize else g
    m = momentum * m + g
    mean = (1 - momentum) * m
    v = diagonal_decay * v + (1 - diagonal_decay) * (g if graft == "adam" else mean) ** 2
    mean = mean / momentum_weight if graft == "adam" else mean
    return (1 - lr * weight_decay) * w - lr * mean / (np.sqrt(v / square_weight) + eps), m, v


def rank_one_step(w, g, m, s, h, *, lr, momentum, damping, weight_decay=0.0, decoupled=True, momentum_weight=1.0):
    """rank_one_step_ in float64, row by row -> the new w, m and the F that divides. s, h: None without curvature."""
    f = np.full(w.shape, float(damping))
    if s is not None:
        by_rows = f.reshape(len(s), len(h))
        for i, j in np.ndindex(by_rows.shape):
            by_rows[i, j] += s[i] * h[j]
    coupled, shrink = (0.0, 1 - lr * weight_decay) if decoupled else (weight_decay, 1.0)
    m = momentum * m + (1 - momentum) * (g + coupled * w)
    return shrink * w - lr / momentum_weight * m / f, m, f
