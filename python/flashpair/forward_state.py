"""What a forward pass changes besides its result: random generators, buffers, and what DDP knows of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Generators:
    """The states of the random generators: of the CPU, and of devices that have their own."""

    def __init__(self, devices: list[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.states = [
            (device, torch.get_device_module(device).get_rng_state(*_which(device)))
            for device in devices
            if device.type not in ("cpu", "meta")
        ]

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.states:
            torch.get_device_module(device).set_rng_state(state, *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)


class _Saved(NamedTuple):
    """A buffer, the tensor that it was and the values that this had."""

    module: nn.Module
    name: str
    tensor: Tensor
    values: Tensor


class ForwardState:
    """Generators and buffers, the tensors and their values, and whether DDP broadcasts these in its next forward."""

    def __init__(self, encoders: Iterable[nn.Module], devices: list[torch.device]) -> None:
        modules = dict.fromkeys(module for encoder in encoders for module in encoder.modules())
        self.generators = Generators(devices)
        self.broadcasts = [(m, m.require_forward_param_sync) for m in modules if isinstance(m, DistributedDataParallel)]
        self.buffers = [
            _Saved(module, name, buffer, buffer.clone())
            for module in modules
            for name, buffer in module.named_buffers(recurse=False)
            if not nn.parameter.is_lazy(buffer)
        ]

    def restore(self) -> None:
        """Everything: the next forward pass is the one that came after this state."""
        self.restore_values()
        for ddp, broadcasts in self.broadcasts:
            ddp.require_forward_param_sync = broadcasts

    @torch.no_grad()
    def restore_values(self) -> None:
        """All but what DDP knows, which its own last pass has left right."""
        self.generators.restore()
        for module, name, tensor, values in self.buffers:
            if getattr(module, name) is not tensor:
                setattr(module, name, tensor)
            tensor.data.copy_(values)  # counts no version, nor does BatchNorm: older graphs may hold its statistics
