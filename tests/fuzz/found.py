"""Cases that failed and are mended, as the fuzzer printed them, by what was wrong."""

FOUND: dict[str, str] = {
    "a stream's reference that is not finite made no NaN where no row has a loss": (
        '{"kind": "loss", "seed": 50001946, "name": "GeneralizedLiftedStructureLoss", "options": {"margin": 0.0, '
        '"distance": "euclidean", "reduction": "none", "normalize": true, "refs": "Streamed", "block": 16}, '
        '"m": 7, "d": 2, "dtype": "float64", "labels": "one", "changes": [["nan", 1]], "layout": "sliced", '
        '"threads": 2}'
    ),
    "one column whose square overflows was normalised by the reference alone": (
        '{"kind": "loss", "seed": 50002146, "name": "LiftedStructureStarLoss", "options": {"alpha": 10.0, '
        '"beta": 2.0, "epsilon": 0.1, "reduction": "nonzero", "normalize": true, "refs": "References"}, "n": 2, '
        '"m": 8, "d": 1, "labels": "different", "changes": [["scale", 1e+29]], "layout": "transposed", '
        '"need": [false, true]}'
    ),
}
