"""Large effective batches on one device: a queue of earlier batches, and gradient caching."""
