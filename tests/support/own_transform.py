"""A transform of one's own, log cosh t, with Triton functions beside it."""

import math

import torch
import triton
import triton.language as tl


def dense(t):
    return t.abs() + torch.nn.functional.softplus(-2 * t.abs(), threshold=40) - math.log(2)


@triton.jit
def value(t):
    a = tl.abs(t)
    return a + tl.log(1.0 + tl.exp(-2.0 * a)) - 0.6931471805599453


@triton.jit
def slope(t):
    e = tl.exp(-2.0 * tl.abs(t))
    return tl.where(t < 0.0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)


@triton.jit
def grow(t):
    return tl.exp(t)
