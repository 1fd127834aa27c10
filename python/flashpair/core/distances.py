"""The names of distances: those that losses and miners take as arguments, and those of the engine."""

ENGINE_WORDS = {"cosine": "dot", "euclidean": "euclidean", "squared_euclidean": "squared_euclidean"}


def argument_word(distance: str) -> str:
    """The argument's name of the distance that the engine calls `distance`."""
    return {engine: word for word, engine in ENGINE_WORDS.items()}[distance]
