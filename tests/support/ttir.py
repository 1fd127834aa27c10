"""Triton's own intermediate code, read for what a test of small tensors cannot show."""

from __future__ import annotations

import re

PRODUCT = re.compile(r"(%\w+) = arith\.muli (%\w+), (%\w+)(?: overflow<\w+>)? : (?:tensor<\S*x)?i32>?")
CONSTANT = re.compile(r"(%\w+) = arith\.constant ")
COPY = re.compile(r"(%\w+) = tt\.(?:splat|broadcast|expand_dims) (%\w+)")
ARGUMENT = re.compile(r"(%\w+): i32\b")


def narrow_products(code: str) -> list[str]:
    """Products in 32 bits of a kernel's own integer (a size, a stride) and something that is no constant: an offset
    that ends at 2^31. What is multiplied by a constant is a place among rows or tiles, of which there are fewer."""
    head = next(line for line in code.splitlines() if "tt.func public" in line)
    arguments, constants = set(ARGUMENT.findall(head)), set(CONSTANT.findall(code))
    for copy, of in COPY.findall(code):
        for known in (arguments, constants):
            if of in known:
                known.add(copy)
    found = []
    for line in code.splitlines():
        product = PRODUCT.search(line)
        if product and arguments & {product[2], product[3]} and not constants & {product[2], product[3]}:
            found.append(line.strip())
    return found
