"""The state that a forward pass changes: random generators, buffers, and whether DDP will broadcast buffers."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Generators:
    """The states of the random generators: Python's, NumPy's, those that modules hold, the CPU's and the devices'."""

    def __init__(self, devices: list[torch.device], modules: Iterable[nn.Module] = ()) -> None:
        self.cpu = torch.get_rng_state()
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy = None if numpy is None else (numpy.random.set_state, numpy.random.get_state())
        held = {id(value): value for module in modules for value in vars(module).values()}
        self.held = [setter for value in held.values() if (setter := _generator(value)) is not None]
        self.states = [
            (device, torch.get_device_module(device).get_rng_state(*_device_argument(device)))
            for device in devices
            if device.type not in ("cpu", "meta")
        ]

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        random.setstate(self.python)
        for put, state in (*self.held, *([] if self.numpy is None else [self.numpy])):
            put(state)
        for device, state in self.states:
            torch.get_device_module(device).set_rng_state(state, *_device_argument(device))


def _generator(value: Any) -> tuple[Callable[[Any], object], Any] | None:
    """The setter and the state of a random generator; None for anything else."""
    if isinstance(value, torch.Generator):
        return value.set_state, value.get_state()
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):  # that one has no state
        return value.setstate, value.getstate()
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return value.set_state, value.get_state()
    if numpy is not None and isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        return lambda state: setattr(bits, "state", state), bits.state
    return None


def _device_argument(device: torch.device) -> tuple[torch.device, ...]:
    """The arguments of get_rng_state for a device; mps takes none."""
    return () if device.type == "mps" else (device,)


class _Saved(NamedTuple):
    """A buffer: its place, the tensor there, and a copy of the tensor's values."""

    module: nn.Module
    name: str
    tensor: Tensor
    values: Tensor


class ForwardState:
    """The states of generators, the buffers and their values, and whether DDP will broadcast buffers."""

    def __init__(self, encoders: Iterable[nn.Module], devices: list[torch.device]) -> None:
        modules = dict.fromkeys(module for encoder in encoders for module in encoder.modules())
        self.generators = Generators(devices, modules)
        self.broadcasts = [(m, m.require_forward_param_sync) for m in modules if isinstance(m, DistributedDataParallel)]
        self.buffers = [
            _Saved(module, name, buffer, buffer.clone())
            for module in modules
            for name, buffer in module.named_buffers(recurse=False)
            if not nn.parameter.is_lazy(buffer)
        ]
        self.names = {module: set(module._buffers) for module in modules}
        self.empty = [(module, k) for module in modules for k, b in module._buffers.items() if b is None]

    def restore(self) -> None:
        """Restores everything, so that the next forward pass is the one that came after this state."""
        self.restore_values()
        for (
            module,
            names,
        ) in self.names.items():  # buffers that a forward pass made, and that the next one will make again
            for name in module._buffers.keys() - names:
                delattr(module, name)
        for module, name in self.empty:
            setattr(module, name, None)
        for ddp, broadcasts in self.broadcasts:
            ddp.require_forward_param_sync = broadcasts

    @torch.no_grad()
    def restore_values(self) -> None:
        """Restores generators and buffers. What DDP knows stays as its last pass left it."""
        self.generators.restore()
        for module, name, tensor, values in self.buffers:
            if getattr(module, name) is not tensor:
                setattr(module, name, tensor)
            tensor.data.copy_(values)  # not a counted change in place, as older graphs may hold the buffer
