"""A differential fuzzer: random calls against the float64 reference and against loops over pairs (`make fuzz`)."""
