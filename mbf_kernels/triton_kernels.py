"""The ops on tiles of blocks with n <= 20, in Triton: one lane is one block; and the step of rank one, one element.

A matrix or vector is a tuple of tensors, one per entry, each over the blocks of a program; tuples only grow, so
triangles are built row by row. One source serves both compilers: Triton interprets it (TRITON_INTERPRET=1), and Gluon
compiles it, because Triton's own search for a layout takes minutes on such tuples and Gluon is told the layout.

F must survive in a bad block, and F and L together do not fit in registers. So F is read twice: to factor it, and to
update it once the block is known to be good; likewise g, M and their addresses, for which views come in pairs. What
the compiler can see to be the same in the `SECOND` read it would otherwise keep in registers from the `FIRST`.

Rounding is fixed by explicit fma where an expression could be contracted in two ways: every kernel that computes a
value computes the same bits. Lanes past the last block repeat it, and store nothing.
"""

from functools import lru_cache

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

INTERPRETED = triton.knobs.runtime.interpret

# Arguments of which not every value deserves its own compilation.
_GENERIC = (
    "count", "columns", "numbers", "grad", "rhs", "momentum", "param", "out", "info", "skipped",
    "row", "column", "order",
)  # fmt: skip

# Which read: it picks the view of a pair, and a cache modifier that means the same and differs.
FIRST = tl.constexpr(0)
SECOND = tl.constexpr(1)
_CACHE = tl.constexpr(("", ".ca"))

constant = int if INTERPRETED else tl.constexpr  # an argument, or a part of one, that is compiled in


@lru_cache(maxsize=8)
def program(warps: int) -> tuple[int, gl.BlockedLayout]:
    """The blocks of a program of the current GPU, one to a lane, and their layout."""
    lanes = triton.runtime.driver.active.get_current_target().warp_size
    return lanes * warps, gl.BlockedLayout([1], [lanes], [warps], [0])


def _kernel(fn):
    if INTERPRETED:
        return triton.jit(fn)
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    return gluon.jit(fn, do_not_specialize=[name for name in _GENERIC if name in names])


def _part(fn):
    """A piece of a kernel. The interpreter needs no decorator, and is twice as fast without."""
    return fn if INTERPRETED else triton.jit(fn)


# ---- where things lie


@_part
def _blocks(count, BLOCK: tl.constexpr, LAYOUT: tl.constexpr):
    """The numbers of this program's blocks, as wide as the count."""
    if LAYOUT is None:
        lanes = tl.arange(0, BLOCK)
    else:
        lanes = gl.arange(0, BLOCK, layout=LAYOUT)
    return tl.program_id(0).to(count.dtype) * BLOCK + lanes


@_part
def _triangle_at(data, b, N: tl.constexpr):
    """Entry 0 of each block's triangle in data[tile, t, lane]; entry t follows at 32 t."""
    return data + (b >> 5).to(tl.int64) * (N * (N + 1) // 2 * 32) + (b & 31)


@_part
def _vector_at(view, b):
    """Element 0 of each block. A view is (base, inner count, outer and inner stride of blocks, inner count, outer
    and inner stride of elements); blocks of one stride have no inner count."""
    if view[1] is None:
        return view[0] + b.to(tl.int64) * view[3]
    else:
        return view[0] + (b // view[1]).to(tl.int64) * view[2] + (b % view[1]).to(tl.int64) * view[3]


@_part
def _element(view, k: tl.constexpr):
    return (k // view[4]) * tl.cast(view[5], tl.int64) + (k % view[4]) * tl.cast(view[6], tl.int64)


@_part
def _load_vector(views, b, N: tl.constexpr, READ: tl.constexpr):
    at = _vector_at(views[READ], b)
    v = ()
    for k in tl.static_range(N):
        v = v + (tl.load(at + _element(views[READ], k), cache_modifier=_CACHE[READ]),)
    return v


@_part
def _store_vector(views, b, v, mask, N: tl.constexpr):
    at = _vector_at(views[SECOND], b)
    for k in tl.static_range(N):
        tl.store(at + _element(views[SECOND], k), v[k], mask=mask)


@_part
def _number(x, S: tl.constexpr):
    """A scalar argument: a pointer to it, or its bits (Triton would round a Python float to float32)."""
    if x.dtype.is_ptr():
        return tl.load(x).to(S)
    elif S == tl.float32:
        return x.to(tl.int32).to(S, bitcast=True)
    else:
        return x.to(tl.int64).to(S, bitcast=True)


# ---- info: 0 is good; k > 0 says that the k-th pivot (from 1) is not positive and finite, or else the k-th element
# of g, d or x. On the way it is a code that is larger the more it matters, and a float that each test is formed with:
# of tests that do not depend on each other, the compiler would hold all operands in registers.

PIVOT = tl.constexpr(4)
GRADIENT = tl.constexpr(3)
DIRECTION = tl.constexpr(2)
SOLUTION = tl.constexpr(1)


@_part
def _flag(code, x, what: tl.constexpr, k: tl.constexpr):
    """The code of x_k (k from 0), or the larger one so far, where x is not finite."""
    kept = tl.fma(x, 0.0, code)
    return tl.where(kept == kept, kept, tl.maximum(code, what * 32.0 - k))


@_part
def _flag_vector(code, x, what: tl.constexpr, N: tl.constexpr):
    for k in tl.static_range(N):
        code = _flag(code, x[k], what, k)
    return code


@_part
def _info(code):
    """1 + k, or 0 where nothing was flagged."""
    flagged = code.to(tl.int32)
    return tl.where(flagged == 0, 0, 1 + (-flagged & 31))


# ---- the arithmetic of a block


@_part
def _updated(at, i: tl.constexpr, j: tl.constexpr, g, decay, weight, UPDATE: tl.constexpr, READ: tl.constexpr):
    """Entry (i, j) of decay F + weight g g^T, or of F."""
    f = tl.load(at + (i * (i + 1) // 2 + j) * 32, cache_modifier=_CACHE[READ])
    if UPDATE:
        f = tl.fma(weight * g[i], g[j], decay * f)
    return f


@_part
def _update(at, g, decay, weight, mask, N: tl.constexpr):
    """F <- decay F + weight g g^T where the mask holds."""
    for i in tl.static_range(N):
        for j in tl.static_range(i + 1):
            f = _updated(at, i, j, g, decay, weight, True, SECOND)
            tl.store(at + (i * (i + 1) // 2 + j) * 32, f, mask=mask)


@_part
def _lambda(at, g, decay, weight, damping, N: tl.constexpr, UPDATE: tl.constexpr, ZERO_BLOCK: tl.constexpr):
    """Relative damping: damping * trace / n, and ZERO_BLOCK where the trace is zero."""
    trace = _updated(at, 0, 0, g, decay, weight, UPDATE, FIRST)
    for k in tl.static_range(1, N):
        trace = trace + _updated(at, k, k, g, decay, weight, UPDATE, FIRST)
    return tl.where(trace > 0, damping * (trace / N), ZERO_BLOCK)


@_part
def _reduced(a, lower, i: tl.constexpr, j: tl.constexpr):
    """a - sum_{k<j} l_ik l_jk, in order."""
    for k in tl.static_range(j):
        a = a - lower[i * (i + 1) // 2 + k] * lower[j * (j + 1) // 2 + k]
    return a


@_part
def _factor(code, at, g, decay, weight, damping, N: tl.constexpr, UPDATE: tl.constexpr):
    """L with L L^T = F + lambda I, with 1 / l_kk in the place of l_kk."""
    lower = ()
    for i in tl.static_range(N):
        for j in tl.static_range(i):
            a = _updated(at, i, j, g, decay, weight, UPDATE, FIRST)
            lower = lower + (_reduced(a, lower, i, j) * lower[j * (j + 3) // 2],)
        a = _updated(at, i, i, g, decay, weight, UPDATE, FIRST) + damping
        pivot = tl.sqrt(_reduced(a, lower, i, i))
        lower = lower + (1 / pivot,)
        code = _flag(code, pivot * lower[i * (i + 3) // 2], PIVOT, i)
    return lower, code


@_part
def _store_factor(to, at, lower, g, decay, weight, damping, good, mask, N: tl.constexpr, UPDATE: tl.constexpr):
    """Stores L, zero where it is not good. The diagonal is computed again: it has no registers."""
    for i in tl.static_range(N):
        for j in tl.static_range(i):
            tl.store(to + (i * (i + 1) // 2 + j) * 32, tl.where(good, lower[i * (i + 1) // 2 + j], 0.0), mask=mask)
        a = _updated(at, i, i, g, decay, weight, UPDATE, SECOND) + damping
        tl.store(to + i * (i + 3) // 2 * 32, tl.where(good, tl.sqrt(_reduced(a, lower, i, i)), 0.0), mask=mask)


@_part
def _load_factor(code, at, N: tl.constexpr):
    lower = ()
    for i in tl.static_range(N):
        for j in tl.static_range(i):
            lower = lower + (tl.load(at + (i * (i + 1) // 2 + j) * 32),)
        pivot = tl.load(at + i * (i + 3) // 2 * 32)
        lower = lower + (1 / pivot,)
        code = _flag(code, pivot * lower[i * (i + 3) // 2], PIVOT, i)
    return lower, code


@_part
def _solve(code, lower, d, N: tl.constexpr):
    """(L L^T)^-1 d."""
    y = ()
    for i in tl.static_range(N):
        code = _flag(code, d[i], DIRECTION, i)
        s = d[i]
        for k in tl.static_range(i):
            s = s - lower[i * (i + 1) // 2 + k] * y[k]
        y = y + (s * lower[i * (i + 3) // 2],)
    z = ()  # the solution, last element first
    for i in tl.static_range(N - 1, -1, -1):
        s = y[i]
        for k in tl.static_range(N - 1, i, -1):
            s = s - lower[k * (k + 1) // 2 + i] * z[N - 1 - k]
        z = z + (s * lower[i * (i + 3) // 2],)
        code = _flag(code, z[N - 1 - i], SOLUTION, i)
    x = ()
    for k in tl.static_range(N):
        x = x + (z[N - 1 - k],)
    return x, code


# ---- the ops


@_kernel
def accumulate(fisher, grad, numbers, count, N: tl.constexpr, BLOCK: tl.constexpr, LAYOUT: tl.constexpr):
    """F <- decay F + (1-decay) g g^T; a block whose new diagonal is not finite keeps its old value."""
    S: tl.constexpr = fisher.dtype.element_ty
    decay, weight = _number(numbers[0], S), _number(numbers[1], S)
    b = _blocks(count, BLOCK, LAYOUT)
    mask = b < count
    b = tl.minimum(b, count - 1)
    at = _triangle_at(fisher, b, N)
    g = _load_vector(grad, b, N, FIRST)
    poison = b.to(S) * 0
    for k in tl.static_range(N):
        f = _updated(at, k, k, g, decay, weight, True, FIRST)
        poison = poison + (f - f)
    _update(at, g, decay, weight, mask & (poison == 0), N)


@_kernel
def factor(fisher, stored, info, numbers, count, N: tl.constexpr, RELATIVE: tl.constexpr, BLOCK: tl.constexpr,
           LAYOUT: tl.constexpr):  # fmt: skip
    """L with L L^T = F + lambda I, and info; L = 0 for a bad block."""
    S: tl.constexpr = fisher.dtype.element_ty
    damping = _number(numbers[0], S)
    b = _blocks(count, BLOCK, LAYOUT)
    mask = b < count
    b = tl.minimum(b, count - 1)
    at = _triangle_at(fisher, b, N)
    if RELATIVE:
        damping = _lambda(at, None, None, None, damping, N, False, 0.0)
    lower, code = _factor(b.to(S) * 0, at, None, None, None, damping, N, False)
    _store_factor(_triangle_at(stored, b, N), at, lower, None, None, None, damping, code == 0, mask, N, False)
    tl.store(info + b, _info(code), mask=mask)


@_kernel
def solve(stored, rhs, out, columns, count, N: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
          LAYOUT: tl.constexpr):  # fmt: skip
    """x = (L L^T)^-1 rhs, COLUMNS columns to a program; x = 0 for a block with a bad factor. Columns lie at distance 1;
    past the last one, a program repeats it."""
    b = _blocks(count, BLOCK, LAYOUT)
    mask = b < count
    b = tl.minimum(b, count - 1)
    lower, code = _load_factor(b.to(stored.dtype.element_ty) * 0, _triangle_at(stored, b, N), N)
    for c in range(COLUMNS):
        column = tl.minimum(tl.program_id(1) * COLUMNS + c, columns - 1)
        from_, to = _vector_at(rhs[FIRST], b) + column, _vector_at(out[FIRST], b) + column
        x = ()
        for k in tl.static_range(N):
            x = x + (tl.load(from_ + _element(rhs[FIRST], k)),)
        x, _ = _solve(code, lower, x, N)
        for k in tl.static_range(N):
            tl.store(to + _element(out[FIRST], k), tl.where(code == 0, x[k], 0.0), mask=mask)


@_kernel
def accumulate_factor_solve(fisher, info, grad, rhs, out, numbers, count, N: tl.constexpr, RELATIVE: tl.constexpr,
                            BLOCK: tl.constexpr, LAYOUT: tl.constexpr):  # fmt: skip
    """The three in a row. A bad block keeps its F, and its x is 0."""
    S: tl.constexpr = fisher.dtype.element_ty
    decay, weight, damping = _number(numbers[0], S), _number(numbers[1], S), _number(numbers[2], S)
    b = _blocks(count, BLOCK, LAYOUT)
    mask = b < count
    b = tl.minimum(b, count - 1)
    at = _triangle_at(fisher, b, N)

    g = _load_vector(grad, b, N, FIRST)
    code = _flag_vector(b.to(S) * 0, g, GRADIENT, N)
    if RELATIVE:
        damping = _lambda(at, g, decay, weight, damping, N, True, 0.0)
    lower, code = _factor(code, at, g, decay, weight, damping, N, True)
    x, code = _solve(code, lower, _load_vector(rhs, b, N, FIRST), N)

    cleared = ()
    for k in tl.static_range(N):
        cleared = cleared + (tl.where(code == 0, x[k], 0.0),)
    _store_vector(out, b, cleared, mask, N)
    tl.store(info + b, _info(code), mask=mask)
    _update(at, _load_vector(grad, b, N, SECOND), decay, weight, mask & (code == 0), N)


@_part
def _load_gradient(grad, b, N: tl.constexpr, MAXIMIZE: tl.constexpr, READ: tl.constexpr):
    g = _load_vector(grad, b, N, READ)
    if MAXIMIZE:
        negated = ()
        for k in tl.static_range(N):
            negated = negated + (-g[k],)
        g = negated
    return g


@_part
def _moved(momentum, g, mu, b, N: tl.constexpr, READ: tl.constexpr):
    """mu M + g"""
    m = _load_vector(momentum, b, N, READ)
    moved = ()
    for k in tl.static_range(N):
        moved = moved + (tl.fma(mu, m[k], g[k]),)
    return moved


@_part
def _direction(m, g, mu, N: tl.constexpr, NESTEROV: tl.constexpr):
    """mu M + g, or M"""
    d = m
    if NESTEROV:
        d = ()
        for k in tl.static_range(N):
            d = d + (tl.fma(mu, m[k], g[k]),)
    return d


@_part
def _graft_scale(x, adam, N: tl.constexpr):
    """sqrt(adam) / |x|, and 0 where x = 0. |x| is formed relative to its largest entry, whose square may leave the
    range of the dtype."""
    peak = tl.abs(x[0])
    for k in tl.static_range(1, N):
        peak = tl.maximum(peak, tl.abs(x[k]))
    unit = 1 / tl.maximum(peak, 1e-30)
    length = x[0] * 0
    for k in tl.static_range(N):
        length = tl.fma(unit * x[k], unit * x[k], length)
    return tl.where(peak > 0, unit * tl.sqrt(adam) / tl.sqrt(length), 0.0)


@_kernel
def mbf_step(fisher, stored, info, skipped, grad, momentum, param, numbers, count, N: tl.constexpr,
             RELATIVE: tl.constexpr, GRAFT: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
             UPDATE: tl.constexpr, REFACTOR: tl.constexpr, BLOCK: tl.constexpr, LAYOUT: tl.constexpr):  # fmt: skip
    """The whole step of `mbf_kernels.mbf_step_` for one tensor."""
    S: tl.constexpr = fisher.dtype.element_ty
    lr, damping = _number(numbers[0], S), _number(numbers[1], S)
    decay, weight = _number(numbers[2], S), _number(numbers[3], S)
    mu = _number(numbers[4], S)
    b = _blocks(count, BLOCK, LAYOUT)
    mask = b < count
    b = tl.minimum(b, count - 1)
    at = _triangle_at(fisher, b, N)

    g = _load_gradient(grad, b, N, MAXIMIZE, FIRST)
    code = _flag_vector(b.to(S) * 0, g, GRADIENT, N)
    if REFACTOR:
        if RELATIVE:
            damping = _lambda(at, g, decay, weight, damping, N, UPDATE, 1.0)
        lower, code = _factor(code, at, g, decay, weight, damping, N, UPDATE)
    else:
        lower, code = _load_factor(code, _triangle_at(stored, b, N), N)
    x, code = _solve(code, lower, _direction(_moved(momentum, g, mu, b, N, FIRST), g, mu, N, NESTEROV), N)
    good = mask & (code == 0)
    tl.store(info + b, _info(code), mask=mask)
    if skipped is not None:
        tl.atomic_add(skipped + b * 0, (code != 0).to(tl.int64), mask=mask & (code != 0), sem="relaxed")

    g = _load_gradient(grad, b, N, MAXIMIZE, SECOND)
    if REFACTOR and stored is not None:
        _store_factor(_triangle_at(stored, b, N), at, lower, g, decay, weight, damping, good, good, N, UPDATE)
    m = _moved(momentum, g, mu, b, N, SECOND)
    rate = lr
    if GRAFT:
        d = _direction(m, g, mu, N, NESTEROV)
        mean_scale = _number(numbers[5], S) / _number(numbers[6], S)
        fisher_weight, eps = _number(numbers[7], S), _number(numbers[8], S)
        adam = d[0] * 0
        for k in tl.static_range(N):
            f = _updated(at, k, k, g, decay, weight, UPDATE, SECOND)
            u = mean_scale * d[k] / (tl.sqrt(f / fisher_weight) + eps)
            adam = tl.fma(u, u, adam)
        rate = lr * _graft_scale(x, adam, N)
    keep = 1 - lr * _number(numbers[9], S)
    w = _load_vector(param, b, N, FIRST)
    moved = ()
    for k in tl.static_range(N):
        moved = moved + (tl.fma(-rate, x[k], keep * w[k]),)
    _store_vector(param, b, moved, good, N)
    _store_vector(momentum, b, m, good, N)
    if UPDATE:
        _update(at, g, decay, weight, good, N)


# ---- tensors without blocks


@_kernel
def rank_one_step(grad, momentum, param, row, column, order, columns, numbers, count, DECOUPLED: tl.constexpr,
                  BLOCK: tl.constexpr, LAYOUT: tl.constexpr):  # fmt: skip
    """The whole step of `mbf_kernels.rank_one_step_` for one tensor; F = lambda without s and h, here row and column.
    The order (inner count, outer and inner stride) of the entries of h as memory has them; None: their own."""
    S: tl.constexpr = param.dtype.element_ty
    lr, momentum_weight, f = _number(numbers[0], S), _number(numbers[1], S), _number(numbers[2], S)
    beta, rest, decay = _number(numbers[3], S), _number(numbers[4], S), _number(numbers[5], S)
    i = _blocks(count, BLOCK, LAYOUT)
    mask = i < count
    i = tl.minimum(i, count - 1)
    if row is not None:
        k = i % columns
        if order is not None:
            k = k // order[0] * order[1] + k % order[0] * order[2]
        f = tl.fma(tl.load(row + i // columns), tl.load(column + k), f)
    g, w = tl.load(grad + i), tl.load(param + i)
    if DECOUPLED:
        kept = (1 - lr * decay) * w
    else:
        kept = w
        g = tl.fma(decay, w, g)
    m = tl.fma(beta, tl.load(momentum + i), rest * g)
    tl.store(momentum + i, m, mask=mask)
    tl.store(param + i, tl.fma(-(lr / momentum_weight), m / f, kept), mask=mask)
