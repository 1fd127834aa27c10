"""The words for similarities that criteria take, and the engine's."""

DISTANCES = {"cosine": "dot", "euclidean": "euclidean", "squared_euclidean": "squared_euclidean"}


def similarity_of(distance: str) -> str:
    return {engine: word for word, engine in DISTANCES.items()}[distance]
