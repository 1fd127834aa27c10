"""Cases that failed and are mended, as the fuzzer printed them, by what was wrong."""

FOUND: dict[str, str] = {}
