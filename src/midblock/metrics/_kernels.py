"""One pass over logits in a CPU's cache, compiled (numba): what `midblock.metrics._rows` calls.

PyTorch makes a pass over memory for each step (convert, maximum, subtract, exponential, product, sum). Here each row is
read from memory once; everything else happens in a core's own cache. Rows are given as integers of their
bits (int16 of bfloat16, int32 of float32), because the order of floats is an order of integers, which compilers turn
into vector instructions also where there may be NaN. Sums of 512 numbers are float32 and sums of those float64.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numba.extending
import numpy as np
from numba import types

from midblock.metrics._rows import GROUP, LOG2_E, LOWEST

__all__ = ["differences", "in_threads", "largest", "passes", "softmax_minus_one_hot"]

_BLOCK = 512
_LEAST_ROWS = 4
# no assumption that numbers are finite: a NaN has to stay one
_MATH = {"reassoc", "contract", "nsz", "arcp"}

_f4, _i4 = np.float32, np.int32
_LOG2_E, _LOWEST, _HALF = _f4(LOG2_E), _f4(LOWEST), _f4(0.5)
_BIAS, _MANTISSA = _i4(127), _i4(23)
# 2^f for |f| <= 1/2: the polynomial of degree 5 with 2^0 = 1 and least relative error, 9e-8; 1.9e-7 with float32's own
_ONE, _C1, _C2, _C3, _C4, _C5 = (_f4(c) for c in (
    1.0, 0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149))


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # no folder to keep compiled code in
        return numba.njit(function, **options)


# what these make is called from compiled code, with types of its own
_kernel: Any = functools.partial(_compiled, nogil=True, fastmath=_MATH, error_model="numpy")
# parts of kernels, always made into them: a call would go to other code in the process that compiles it than in those
# that load it from disk, and sums be rounded otherwise
_part: Any = functools.partial(numba.njit, forceinline=True, fastmath=_MATH, error_model="numpy")
_intrinsic: Any = numba.extending.intrinsic


@_intrinsic
def _as_float(context: Any, bits: Any) -> Any:
    """The float32 with these 32 bits, or with these upper 16 (a bfloat16)."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, word = args[0], context.get_value_type(types.int32)
        if bits.bitwidth == 16:
            value = builder.shl(builder.zext(value, word), word(16))
        return builder.bitcast(value, context.get_value_type(types.float32))
    return types.float32(bits), generate


@_intrinsic
def _in_order(context: Any, bits: Any) -> Any:
    """Integer that is larger where the float with these bits is; applied twice it gives the bits again."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = context.get_value_type(bits)
        sign = builder.ashr(args[0], word(bits.bitwidth - 1))
        return builder.xor(args[0], builder.and_(sign, word((1 << (bits.bitwidth - 1)) - 1)))
    return bits(bits), generate


@_intrinsic
def _zero_once(context: Any, key: Any) -> Any:
    """The ordered integer of -0.0, just below that of 0.0, becomes its equal; any other is left."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = context.get_value_type(key)
        return builder.select(builder.icmp_signed("==", args[0], word(-1)), word(0), args[0])
    return key(key), generate


@_intrinsic
def _as_bits(context: Any, value: Any, like: Any) -> Any:
    """The bits of a float32, rounded to nearest even where ``like`` has 16."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = context.get_value_type(types.int32)
        bits = builder.bitcast(args[0], word)
        if like.bitwidth == 16:
            odd = builder.and_(builder.lshr(bits, word(16)), word(1))
            bits = builder.trunc(builder.lshr(builder.add(bits, builder.add(odd, word(0x7FFF))), word(16)),
                                 context.get_value_type(like))
        return bits
    return like(value, like), generate


@_part
def _exp2(x):
    """2^x for -126 <= x <= 0, and NaN for NaN."""
    whole = np.int32(x - _HALF)
    f = x - np.float32(whole)
    power = ((((_C5 * f + _C4) * f + _C3) * f + _C2) * f + _C1) * f + _ONE
    return power * _as_float(_i4(_i4(whole + _BIAS) << _MANTISSA))


@_part
def _below(logit, top):
    """Logit less the largest; where it is too low to count, the lowest that 2^x takes."""
    x = logit - top
    return _LOWEST if x < _LOWEST else x


@_part
def _group(part, size, gold):
    """The largest of at most 64, as an ordered integer, and the number above ``gold``."""
    largest, above = _in_order(part[0]), np.int16(0)
    for j in range(size):
        key = _in_order(part[j])
        largest = max(largest, key)
        above += np.int16(key > gold)
    return largest, above


@_part
def _maxima(row, gold, maxima):
    """Maxima of the groups; the largest of all, as an ordered integer; number of logits above ``gold``."""
    best, above, size = _in_order(row[0]), 0, row.shape[0]
    for g in range(maxima.shape[0]):
        part = row[g * GROUP:min(g * GROUP + GROUP, size)]
        # a loop of known length becomes a few vector instructions
        largest, more = _group(part, GROUP, gold) if part.shape[0] == GROUP else _group(part, part.shape[0], gold)
        maxima[g] = _as_float(_in_order(largest))
        best = max(best, largest)
        above += more
    return best, above


@_part
def _sums(row, size, top):
    total, weighted = _f4(0), _f4(0)
    for j in range(size):
        x = _below(_as_float(row[j]), top)
        e = _exp2(x * _LOG2_E)
        total += e
        weighted += e * x
    return total, weighted


@_part
def _sums_apart(row, other, size, top):
    total, weighted, apart = _f4(0), _f4(0), _f4(0)
    for j in range(size):
        logit = _as_float(row[j])
        x = _below(logit, top)
        e = _exp2(x * _LOG2_E)
        total += e
        weighted += e * x
        # minus infinity in both models is no difference
        apart += e * (logit - _as_float(other[j])) if x > _LOWEST else _f4(0)
    return total, weighted, apart


@_kernel
def passes(logits, other, compare, targets, lo, hi, maxima, sums, above):
    """Everything that rows lo..hi are summed up in.

    Args:
        logits: Bits (n, V).
        other: Bits (n, V) of the model that ``apart`` is from.
        compare: Whether there is one.
        targets: (n) int64.
        lo: First row.
        hi: End of rows.
        maxima: Of each group, (n, groups) float32, written.
        sums: Gold logit, top, total, weighted and apart, (5, n) float32, written.
        above: Number of logits above the target's, (n) int64, written.
    """
    size = logits.shape[1]
    for r in range(lo, hi):
        row = logits[r]
        bits = row[targets[r]]
        best, more = _maxima(row, _zero_once(_in_order(bits)), maxima[r])
        top = _as_float(_in_order(best))
        total, weighted, apart = 0.0, 0.0, 0.0
        for b in range(0, size, _BLOCK):
            part = row[b:min(b + _BLOCK, size)]
            if compare:
                t, w, a = _sums_apart(part, other[r, b:min(b + _BLOCK, size)], part.shape[0], top)
                apart += a
            else:
                t, w = _sums(part, part.shape[0], top)
            total += t
            weighted += w
        sums[0, r], sums[1, r], sums[2, r], sums[3, r], sums[4, r] = _as_float(bits), top, total, weighted, apart
        above[r] = more


@_kernel
def differences(logits, other, tops, lo, hi, apart):
    """``apart`` of `passes` alone, from one more model, for rows lo..hi: (n) float32, written."""
    size = logits.shape[1]
    for r in range(lo, hi):
        found = 0.0
        for b in range(0, size, _BLOCK):
            part = logits[r, b:min(b + _BLOCK, size)]
            found += _sums_apart(part, other[r, b:min(b + _BLOCK, size)], part.shape[0], tops[r])[2]
        apart[r] = found


@_kernel
def largest(logits, maxima, count, lo, hi, found):
    """Columns of the largest logits of rows lo..hi, largest first, of equal ones the lower.

    Args:
        logits: Bits (n, V).
        maxima: Of each group, (n, groups) float32.
        count: How many, at most V.
        lo: First row.
        hi: End of rows.
        found: (n, count) int64, written.
    """
    size, groups = logits.shape[1], maxima.shape[1]
    kept = np.empty(count, np.int64)
    for r in range(lo, hi):
        row = logits[r]
        # the groups with the count largest maxima hold all that is wanted
        have, least = 0, np.int64(np.iinfo(np.int64).min)
        if groups > count:
            for g in range(groups):
                have = _put(kept, have, _zero_once(_in_order(_as_bits(maxima[r, g], _i4(0)))))[0]
            least = kept[count - 1]
        have = 0
        for g in range(groups):
            if _zero_once(_in_order(_as_bits(maxima[r, g], _i4(0)))) < least:
                continue
            for j in range(g * GROUP, min(g * GROUP + GROUP, size)):
                key = _zero_once(_in_order(row[j]))
                if have < count or key > kept[count - 1]:
                    before = have
                    have, at = _put(kept, have, key)
                    for i in range(min(before, count - 1), at, -1):
                        found[r, i] = found[r, i - 1]
                    found[r, at] = j


@_part
def _put(kept, have, key):
    """Put a key behind those that are not less, where it is among the first: (number kept, its place)."""
    count = kept.shape[0]
    if have == count and key <= kept[count - 1]:
        return have, count
    at = min(have, count - 1)
    while at > 0 and kept[at - 1] < key:
        kept[at] = kept[at - 1]
        at -= 1
    kept[at] = key
    return min(have + 1, count), at


@_kernel
def softmax_minus_one_hot(logits, targets, weights, lo, hi, gradient, loss):
    """Rows lo..hi: loss, and its gradient, which may be written over the logits.

    Args:
        logits: Bits (n, V).
        targets: (n) int64.
        weights: Memory for one row, (V) float32.
        lo: First row.
        hi: End of rows.
        gradient: Bits (n, V), written.
        loss: (n) float32, written.
    """
    size = logits.shape[1]
    unit = np.empty(1, dtype=gradient.dtype)
    for r in range(lo, hi):
        row = logits[r]
        best = _in_order(row[0])
        for j in range(size):
            best = max(best, _in_order(row[j]))
        top, gold = _as_float(_in_order(best)), _as_float(row[targets[r]])
        total = 0.0
        for b in range(0, size, _BLOCK):
            part, kept = row[b:min(b + _BLOCK, size)], weights[b:min(b + _BLOCK, size)]
            total += _weights(part, part.shape[0], top, kept)
        share = _f4(1.0 / total)
        out = gradient[r]
        for j in range(size):
            out[j] = _as_bits(weights[j] * share, unit[0])
        out[targets[r]] = _as_bits(weights[targets[r]] * share - _ONE, unit[0])
        loss[r] = np.log(total) + top - gold


@_part
def _weights(row, size, top, kept):
    total = _f4(0)
    for j in range(size):
        e = _exp2(_below(_as_float(row[j]), top) * _LOG2_E)
        kept[j] = e
        total += e
    return total


def in_threads(work: Callable[[int, int], Any], rows: int, threads: int) -> None:
    """Call ``work(lo, hi)`` for equal parts of the rows at once; kernels do not hold the interpreter's lock."""
    parts = max(1, min(threads, rows // _LEAST_ROWS))
    own, *rest = itertools.pairwise(rows * i // parts for i in range(parts + 1))
    others = [_pool(os.getpid(), parts).submit(work, *edges) for edges in rest]
    work(*own)
    for other in others:
        other.result()


@functools.lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork, hence one pool for each process."""
    return ThreadPoolExecutor(threads, thread_name_prefix="midblock")
