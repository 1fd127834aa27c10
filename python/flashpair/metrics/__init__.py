"""Metrics of embeddings: retrieval, verification, identification and clustering, in bounded memory."""

from .clustering import Clustering, clustering, clustering_scores
from .identification import Identification, OpenSet, identification
from .intervals import Interval, confidence_interval
from .retrieval import QueryScores, Retrieval, knn_accuracy, knn_labels, query_scores, retrieval
from .verification import verification_rate

__all__ = [
    "Clustering",
    "Identification",
    "Interval",
    "OpenSet",
    "QueryScores",
    "Retrieval",
    "clustering",
    "clustering_scores",
    "confidence_interval",
    "identification",
    "knn_accuracy",
    "knn_labels",
    "query_scores",
    "retrieval",
    "verification_rate",
]
