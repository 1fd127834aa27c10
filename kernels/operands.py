"""What kernels are passed, in groups. Triton takes a named tuple apart into one argument for each tensor or number.

Fields in capitals are known at compile time: a `tl.constexpr`, a jit function, or None. A tensor that is None is not
there for the compiler, and neither is the code that would read it.
"""

from typing import Any, NamedTuple

from .tile import NOTHING


class Rows(NamedTuple):
    """The embeddings whose rows a launch's programs own, sorted by label."""

    x: Any  # (rows, D)
    squares: Any  # (rows,) squared norms, of Euclidean distances
    pos_begin: Any  # (rows,) int64: columns [pos_begin, pos_end) are a row's positives
    pos_end: Any
    num_valid: Any  # () int64: rows from there on take no part


class Cols(NamedTuple):
    """The embeddings that every row is paired with, sorted by label."""

    y: Any  # (cols, D)
    squares: Any  # (cols,)
    num_valid: Any  # () int64: columns from there on take no part


class Matrix(NamedTuple):
    """A block of pairs in memory, from (row0, col0) of a launch on."""

    data: Any = None
    row_stride: Any = 0
    col_stride: Any = 0


class ListedTiles(NamedTuple):
    """The clean tiles that each row block is to visit, as `list_tiles` leaves them; without, all of them."""

    index: Any = None  # (row blocks, tiles) int32
    counts: Any = None  # (row blocks,) int32


class Form(NamedTuple):
    """The compile-time constants of a launch over tiles of pairs."""

    SQUARE: Any  # rows and columns are the same embeddings
    SQUARED: Any  # distances are squared Euclidean ones
    PRECISION: Any  # of products: "ieee", "tf32", or "split" for float32 in three tf32 products
    ONE_CHUNK: Any  # BLOCK_K and BLOCK_D hold all of D: embeddings are loaded once
    EVEN_D: Any  # D is a multiple of BLOCK_K
    BLOCK_ROWS: Any
    BLOCK_COLS: Any
    BLOCK_K: Any  # columns of D in a product
    ACC: Any  # dtype of sums: tl.float32 or tl.float64
    BLOCK_D: Any = None  # backward: columns of the gradient that a program accumulates, a slab
    EVEN_SLAB: Any = None  # backward: D is a multiple of BLOCK_D


class ForwardOperands(NamedTuple):
    """One reduction of a forward launch: what it reads, then where its state is kept."""

    OP: Any = NOTHING  # an op of tile.py
    SIDE: Any = None  # a side of tile.py
    PHI: Any = None  # its transform, see transforms.py
    scale: Any = None  # (1,) if learned
    offset: Any = None  # (N,)
    ref_offset: Any = None  # (M,)
    lower: Any = None  # (N,) pairs count where lower < z < upper
    upper: Any = None  # (N,)
    row_max: Any = None  # (splits, N) the state, see state.py; None for sum and count
    row_sum: Any = None  # (splits, N) None for min and max
    rank: Any = None  # (splits, N) int32, of a min or max whose index is wanted
    live: Any = None  # (row blocks, column tiles) int8: 1 where the window lets a pair of the tile through


class BackwardOperands(NamedTuple):
    """One reduction of a backward launch: what it reads, then what it leaves."""

    OP: Any = NOTHING
    SIDE: Any = None
    SLOPE: Any = None  # its transform with both derivatives, see transforms.py
    scale: Any = None  # (1,) if learned
    offset: Any = None  # (N,)
    ref_offset: Any = None  # (M,)
    lower: Any = None  # (N,)
    upper: Any = None  # (N,)
    top: Any = None  # (N,) of a logsumexp: the z (of a transform: phi) that its sum is relative to
    rest: Any = None  # (N,) of a logsumexp: the log of that sum, inf of an empty set
    grad: Any = None  # (N,) dL/dr; with shared_top, dL/dr e^((shared_top - top) scale - rest)
    shared_top: Any = None  # () the z of the largest term of all rows: one exponential serves both ends of a pair
    d_scale: Any = None  # (splits, N) each row's part
    d_offset: Any = None  # (splits, N)
    d_ref_offset: Any = None  # (splits, M)
