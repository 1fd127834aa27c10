"""Large effective batches on one device: a memory of earlier batches, and gradient caching."""
