"""The words for what pairs are compared by: those of losses' and miners' arguments, and the engine's."""

ENGINE_WORDS = {"cosine": "dot", "euclidean": "euclidean", "squared_euclidean": "squared_euclidean"}


def argument_word(distance: str) -> str:
    """The argument's word for the engine's word."""
    return {engine: word for word, engine in ENGINE_WORDS.items()}[distance]
