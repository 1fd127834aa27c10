"""What the executor raises: a fault of the kernel, or an instruction that it does not know."""

from __future__ import annotations

from typing import Any


class Fault(Exception):
    """What a kernel may not do; the machine adds which kernel, instruction and source line did it."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail, self.place = kind, detail, ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail} {self.place}".strip()


class Unsupported(Exception):
    """An instruction, or a form of one, that this executor does not know."""


class InFlight:
    """What a register holds while a wgmma may still write it: any use is a fault."""

    def __getattr__(self, name: str) -> Any:
        raise Fault("wgmma accumulator read before its wait")
