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
    "SoftTriple's exponents were relative to a rounded log-sum-exp": (
        '{"kind": "loss", "seed": 56005330, "name": "SoftTripleLoss", "options": {"centers_per_class": 1, '
        '"la": 20.0, "gamma": 1.0, "margin": 0.01, "tau": 0.2, "reduction": "mean_valid", "normalize": false, '
        '"classes": 33}, "n": 513, "d": 255, "changes": [["parallel", 0.3]], "layout": "sliced", "need": [false, '
        'true], "threads": 2}'
    ),
    "an exponent relative to another anchor's far larger phi: a log-sum-exp of softplus of one pair below 0": (
        '{"kind": "reduce", "seed": 20000696, "name": "row_reduce", '
        '"options": {"reductions": [{"op": "logsumexp", "side": "negatives", "transform": "softplus", '
        '"scale": -1.0, "offset": "number", "detach": false}, {"op": "sum", "side": "negatives", '
        '"transform": "squared_hinge", "scale": -1.0, "offset": "vector", "lower": "number", "upper": "none", '
        '"detach": false}], "distance": "squared_euclidean"}, "n": 511, "m": 3, "d": 15, "dtype": "bfloat16", '
        '"labels": "huge", "layout": "sliced", "need": [true, false], "threads": 2}'
    ),
    "an exponent relative to another anchor's far larger phi: a log-sum-exp of squared hinges of 1e-12": (
        '{"kind": "reduce", "seed": 50000242, "name": "row_reduce", '
        '"options": {"reductions": [{"op": "logsumexp", "side": "positives", "transform": "squared_hinge", '
        '"scale": 3.0, "offset": "none", "detach": false}, {"op": "sum", "side": "negatives", '
        '"transform": "hinge", "scale": -1.0, "offset": "number", "lower": "number", "upper": "none", '
        '"detach": false}], "distance": "euclidean"}, "n": 7, "m": 5, "d": 8, "dtype": "float64", '
        '"changes": [["collapse", 1e-07]], "layout": "transposed", "need": [false, true], "threads": 2}'
    ),
    "an exponent relative to another anchor's far larger phi: a row of zeros beside others": (
        '{"kind": "reduce", "seed": 50003043, "name": "row_reduce", '
        '"options": {"reductions": [{"op": "logsumexp", "side": "all", "transform": "softplus", "scale": -20.0, '
        '"offset": "none", "detach": false}, {"op": "max", "side": "negatives", "transform": "identity", '
        '"lower": "none", "upper": "vector", "detach": false}], "distance": "dot"}, "n": 256, "d": 15, '
        '"dtype": "float64", "labels": "one", "changes": [["zero", 1]], "layout": "strided"}'
    ),
    "the gradient of an offset as a sum of as many equal numbers as there are pairs": (
        '{"kind": "reduce", "seed": 10000626, "name": "row_reduce", "options": {"reductions": [{"op": "sum", '
        '"side": "negatives", "transform": "identity", "scale": -1.0, "offset": "vector", "lower": "number", '
        '"upper": "none", "detach": false}, {"op": "max", "side": "positives", "transform": "identity", '
        '"lower": "none", "upper": "none", "detach": true}], "distance": "euclidean"}, "n": 255, "d": 2, '
        '"dtype": "float16", "labels": "random", "layout": "transposed", "threads": 2}'
    ),
    "equal terms of an anchor added one by one, each rounding alike": (
        '{"kind": "loss", "seed": 51001266, "name": "MarginLoss", "options": {"margin": 0.5, "nu": 0.05, '
        '"beta": 0.7, "mode": "triplets", "learn_beta": true, "reduction": "none", "normalize": false, '
        '"refs": "none"}, "n": 256, "d": 15, "changes": [["scale", 1e-12]], "layout": "transposed", '
        '"need": [true, false], "impl": "auto", "threads": 2}'
    ),
    "equal losses of anchors added one by one, each rounding alike": (
        '{"kind": "loss", "seed": 51001226, "name": "MultiSimilarityLoss", "options": {"alpha": 0.5, '
        '"beta": 2.0, "base": 1.0, "epsilon": null, "reduction": "sum", "normalize": true, "refs": "none"}, '
        '"n": 512, "d": 1, "dtype": "float64", "labels": "imbalanced", "layout": "strided", "need": [false, '
        'true], "threads": 2}'
    ),
}
