"""The transforms phi and their slopes, as compile-time arguments of the kernels.

A transform is two jit functions of a block s = scale * z of float32 or float64 and the anchors' offsets: phi; and phi
with its derivatives in s and in the offset. Those of a transform given to `flashpair.register_transform` are generated
by backends/triton/codegen.py.
"""

import triton
import triton.language as tl


@triton.jit
def log1p_unit(u):
    """log(1 + u) for u in [0, 1], to the last bit of small u: Triton has no log1p."""
    w = 1.0 + u
    exact = w != 1.0
    return tl.where(exact, tl.log(w) * (u / tl.where(exact, w - 1.0, 1.0)), u)


@triton.jit
def log1p(u):
    return tl.where(u == float("inf"), u, log1p_unit(u))


@triton.jit
def expm1(t):
    """e^t - 1 to the last bit of small t."""
    u = tl.exp(t)
    usable = (u != 1.0) & (u > 0.0) & (u < float("inf"))
    exact = (u - 1.0) * (t / tl.where(usable, tl.log(tl.where(usable, u, 2.0)), 1.0))
    return tl.where(usable, exact, tl.where(u == 1.0, t, u - 1.0))


@triton.jit
def logistic(t):
    return 1.0 / (1.0 + tl.exp(-t))


@triton.jit
def identity(s, offset):
    return s + offset


@triton.jit
def identity_slope(s, offset):
    one = tl.full(s.shape, 1.0, s.dtype)
    return s + offset, one, one


@triton.jit
def softplus(s, offset):
    t = s + offset
    return tl.maximum(t, 0.0) + log1p_unit(tl.exp(-tl.abs(t)))


@triton.jit
def softplus_slope(s, offset):
    g = logistic(s + offset)
    return softplus(s, offset), g, g


@triton.jit
def hinge(s, offset):
    return tl.maximum(s + offset, 0.0)


@triton.jit
def hinge_slope(s, offset):
    g = tl.where(s + offset > 0.0, 1.0, 0.0).to(s.dtype)
    return hinge(s, offset), g, g


@triton.jit
def squared_hinge(s, offset):
    h = tl.maximum(s + offset, 0.0)
    return h * h


@triton.jit
def squared_hinge_slope(s, offset):
    g = 2.0 * tl.maximum(s + offset, 0.0)
    return squared_hinge(s, offset), g, g


@triton.jit
def triangle(s, offset):
    return tl.maximum(1.0 - tl.abs(s + offset), 0.0)


@triton.jit
def triangle_slope(s, offset):
    t = s + offset
    g = tl.where(t > 0.0, -1.0, tl.where(t < 0.0, 1.0, 0.0))
    g = tl.where(tl.abs(t) < 1.0, g, 0.0).to(s.dtype)
    return triangle(s, offset), g, g


table = {
    "identity": (identity, identity_slope),
    "softplus": (softplus, softplus_slope),
    "hinge": (hinge, hinge_slope),
    "squared_hinge": (squared_hinge, squared_hinge_slope),
    "triangle": (triangle, triangle_slope),
    "lifted": (
        squared_hinge,
        squared_hinge_slope,
    ),  # of scale * z and what state.py's `total_offset` makes of two offsets
}
