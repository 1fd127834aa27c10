"""The words for similarities in the losses' arguments, and the engine's words for them."""

DISTANCES = {"cosine": "dot", "euclidean": "euclidean", "squared_euclidean": "squared_euclidean"}


def similarity_of(distance: str) -> str:
    return {engine: word for word, engine in DISTANCES.items()}[distance]
