"""The transforms phi(t), t = scale * z + offset, and their slopes phi'(t), as compile-time arguments of the kernels.

A transform is two jit functions of a block `t` of float32 or float64; a user's own, given to
`flashpair.register_transform`, is compiled in the same way.
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
def identity(t):
    return t


@triton.jit
def identity_slope(t):
    return tl.full(t.shape, 1.0, t.dtype)


@triton.jit
def softplus(t):
    return tl.maximum(t, 0.0) + log1p_unit(tl.exp(-tl.abs(t)))


@triton.jit
def sigmoid(t):
    return 1.0 / (1.0 + tl.exp(-t))


@triton.jit
def hinge(t):
    return tl.maximum(t, 0.0)


@triton.jit
def hinge_slope(t):
    return tl.where(t > 0.0, 1.0, 0.0).to(t.dtype)


@triton.jit
def squared_hinge(t):
    h = tl.maximum(t, 0.0)
    return h * h


@triton.jit
def squared_hinge_slope(t):
    return 2.0 * tl.maximum(t, 0.0)


table = {
    "identity": (identity, identity_slope),
    "softplus": (softplus, sigmoid),
    "hinge": (hinge, hinge_slope),
    "lifted": (squared_hinge, squared_hinge_slope),
}
