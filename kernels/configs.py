"""Which tiles each chip gets: a plain table, so that every row of it can be compiled and inspected without a GPU.

Forward and backward use the same tile and the same order along D, so that they see the same bits of every similarity.
"""

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """The tiles of the kernels of all pairs, and how each pass is launched.

    Args:
        rows, cols: pairs of a tile: powers of two, cols at most rows.
        depth: columns of D that go through the tensor cores at a time.
        slab: columns of the gradient that a program accumulates. Where depth and slab hold all of D, a tile's
            embeddings are loaded once for both of its products.
        forward, backward: warps and pipeline stages.
        registers: the most that a thread may have in each pass, so that more blocks fit a multiprocessor; 0: no limit.
    """

    rows: int
    cols: int
    depth: int
    slab: int
    forward: tuple[int, int]
    backward: tuple[int, int]
    registers: tuple[int, int] = (0, 0)


class Screen(NamedTuple):
    """The tiles of the int8 screen.

    Args:
        block: rows of a tile. A block of block x block pairs, a multiple of every Config's tiles, is listed or dense.
        cols: columns of a tile; 64 at most where it tests for more than one bound.
        depth: columns of D that go through the tensor cores at a time.
        launch: warps and pipeline stages.
    """

    block: int
    cols: int
    depth: int
    launch: tuple[int, int]


AMPERE, HOPPER, BLACKWELL, SMALL, CDNA, INTERPRETER = "ampere", "hopper", "blackwell", "small", "cdna", "interpreter"
CAPABILITIES = {(8, 0): AMPERE, (8, 7): AMPERE, (9, 0): HOPPER, (10, 0): BLACKWELL, (10, 3): BLACKWELL}
SHARED_MEMORY = {AMPERE: 163, HOPPER: 227, BLACKWELL: 227, SMALL: 99, CDNA: 64}  # KB that a block can have


def family(device: torch.device) -> str:
    """SMALL: NVIDIA chips with 99 KB of shared memory (sm_86, 89, 120), and every one that is not known here."""
    if device.type == "cpu":
        return INTERPRETER
    return CDNA if torch.version.hip else CAPABILITIES.get(torch.cuda.get_device_capability(device), SMALL)


ANY = 2**31
_HALF, _SINGLE, _DOUBLE = torch.bfloat16, torch.float32, torch.float64
_TINY = Config(16, 16, 32, 32, (4, 1), (4, 1))
_SLIM = Config(32, 16, 32, 32, (4, 1), (4, 1))
_SMALLEST = Config(32, 32, 32, 64, (4, 1), (4, 1))
_WIDE = Config(128, 32, 32, 64, (8, 2), (8, 2))
_NARROW = Config(64, 32, 32, 64, (4, 1), (4, 1))
_DEEP = Config(64, 32, 32, 64, (8, 2), (8, 2))
_EIGHT = Config(32, 32, 32, 64, (8, 1), (8, 1))
_PLAIN = Config(64, 32, 32, 64, (8, 1), (8, 1))
_TESTED = Config(64, 32, 64, 64, (4, 1), (4, 1))

# (family, dtype): rows of (largest D, Config). These are the largest tiles that need no stack (test_aot.py);
# which of them, with which warps, stages and splits, are the fastest only a GPU can say.
TABLE: dict[tuple[str, torch.dtype], list[tuple[int, Config]]] = {
    (AMPERE, _HALF): [
        (64, Config(128, 32, 64, 64, (8, 3), (8, 3))),
        (128, Config(128, 32, 128, 128, (8, 3), (8, 2))),
        (256, Config(64, 32, 64, 256, (8, 2), (8, 2))),
        (ANY, _SMALLEST),
    ],
    (AMPERE, torch.float16): [
        (64, Config(128, 32, 64, 64, (8, 2), (8, 2))),
        (256, Config(128, 64, 64, 128, (8, 1), (8, 1))),
        (ANY, _SMALLEST),
    ],
    (AMPERE, _SINGLE): [(256, Config(128, 16, 32, 64, (8, 2), (8, 2))), (ANY, _EIGHT)],
    (AMPERE, _DOUBLE): [(256, _SLIM), (ANY, _TINY._replace(depth=64))],
    (HOPPER, _HALF): [
        (128, Config(128, 64, 128, 128, (8, 3), (8, 3))),
        (256, Config(128, 32, 128, 128, (8, 2), (8, 2))),
        (ANY, _DEEP),
    ],
    (HOPPER, torch.float16): [
        (128, Config(128, 32, 128, 128, (8, 1), (8, 1))),
        (256, Config(128, 32, 64, 128, (8, 1), (8, 1))),
        (ANY, _DEEP),
    ],
    (HOPPER, _SINGLE): [(256, _WIDE), (ANY, _EIGHT)],
    (HOPPER, _DOUBLE): [(ANY, _TINY._replace(depth=64, registers=(224, 0)))],
    (BLACKWELL, _HALF): [
        (128, Config(128, 32, 128, 128, (8, 3), (8, 1), (0, 224))),
        (256, Config(128, 32, 256, 256, (8, 2), (8, 2))),
        (ANY, _DEEP),
    ],
    (BLACKWELL, torch.float16): [
        (128, Config(128, 64, 128, 128, (8, 1), (8, 1))),
        (256, Config(128, 64, 64, 256, (8, 1), (8, 1))),
        (ANY, _NARROW),
    ],
    (BLACKWELL, _SINGLE): [(32, _NARROW), (256, _WIDE), (ANY, _EIGHT)],
    (BLACKWELL, _DOUBLE): [
        (64, _SLIM._replace(depth=64, slab=64)),
        (256, _SLIM._replace(backward=(8, 1))),
        (ANY, _TINY._replace(depth=64)),
    ],
    (SMALL, _HALF): [
        (128, Config(128, 32, 64, 128, (8, 3), (8, 3))),
        (256, Config(64, 32, 64, 128, (4, 2), (4, 2))),
        (ANY, _DEEP._replace(depth=64)),
    ],
    (SMALL, torch.float16): [(32, _SMALLEST), (256, Config(64, 32, 64, 64, (4, 1), (4, 1))), (ANY, _DEEP)],
    (SMALL, _SINGLE): [(32, _PLAIN), (256, _WIDE), (ANY, _EIGHT)],
    (SMALL, _DOUBLE): [(ANY, _TINY)],
    (CDNA, _HALF): [(ANY, Config(64, 32, 64, 64, (4, 1), (4, 1)))],
    (CDNA, torch.float16): [(ANY, Config(64, 32, 64, 64, (4, 1), (4, 1)))],
    (CDNA, _SINGLE): [(ANY, Config(32, 32, 32, 64, (4, 1), (4, 1)))],
    (CDNA, _DOUBLE): [(ANY, _TINY)],
    **{(INTERPRETER, dtype): [(ANY, _TESTED)] for dtype in (torch.float16, _SINGLE, _DOUBLE)},
}

SCREENS = {
    AMPERE: Screen(128, 128, 128, (8, 3)),
    HOPPER: Screen(128, 128, 128, (8, 3)),
    BLACKWELL: Screen(128, 64, 128, (8, 3)),
    SMALL: Screen(128, 128, 128, (8, 2)),
    CDNA: Screen(128, 128, 32, (8, 1)),
    INTERPRETER: Screen(64, 64, 64, (4, 1)),
}


def power_of_two(d: int) -> int:
    """The least one that is d or more, and at least 32: the tensor cores take 16, but with more registers."""
    return max(32, 1 << (d - 1).bit_length())


def choose(family: str, dtype: torch.dtype, d: int) -> Config:
    """The row for that D, its depth and slab no larger than D needs."""
    config = next(c for largest, c in TABLE[family, dtype] if d <= largest)
    return config._replace(depth=min(config.depth, power_of_two(d)), slab=min(config.slab, power_of_two(d)))


def for_distances(config: Config) -> Config:
    """The same for Euclidean distances, which take more registers a pair, for close ones are taken twice: no limit on
    registers, and no 8 warps that share 64 rows, which would need a stack."""
    spills = config.rows == 64 and config.forward[0] == 8
    config = config._replace(registers=(0, 0))
    return config._replace(forward=(4, 1), backward=(4, 1)) if spills else config


def choose_screen(family: str, d: int) -> Screen:
    config = SCREENS[family]
    return config._replace(depth=min(config.depth, power_of_two(d)))
