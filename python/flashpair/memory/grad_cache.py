"""GradCache (Gao et al., 2021): the exact gradient of a large batch with one micro-batch's activations in memory.

1. embed      every micro-batch, without a graph: (N, D) embeddings are kept, activations are not
2. loss       once, of all embeddings: its gradient by the embeddings, (N, D), and by the criterion's parameters
3. replay     each micro-batch again, now with its graph, and source it back from its slice of that gradient

The replay has to see what the first pass saw, so random states, buffers and autocast are as they were then, and what
it returns is compared: for that a step waits for a GPU once, at its end. Apart from that nothing
does, and all of a distributed criterion's communication is in its one call (2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from ..core import checks
from ..core.similarity import autocasts, no_autocast
from ..engine.cached_references import References
from .replay_state import ForwardState, Generators


class GradCache:
    """The exact gradient of a large batch with one micro-batch's activations in memory (Gao et al., 2021).

    ``loss = cache(inputs, labels)`` replaces ``loss = criterion(encoder(inputs), labels); loss.backward()``. It fills
    ``.grad`` of the encoder's and the criterion's parameters with the same numbers, up to rounding, adding to what is
    there. Zeroing the gradients and the optimizer's step remain the caller's. The price is one more forward pass.
    Stored are one micro-batch's activations, the embeddings and their gradient (N, D), and copies of the buffers.

    - *Inputs*: each pass gets a copy of its micro-batch, containers and tensors, which the encoder may change.
    - *Random numbers* (dropout): each replay draws what its first pass drew, on the CPU and on every device of inputs
      and parameters, from Python's and NumPy's global generators and from generators that are attributes of the
      encoder's modules. Afterwards the generators are where the first pass and the criterion left them.
    - *Autocast*: call it inside ``torch.autocast``. Forward passes run under it, backward passes outside of it.
    - *Buffers*: a replay starts from the buffers that its first pass started from, so one step changes them once, by
      each micro-batch in order. Batch normalisation uses a micro-batch's statistics, not the batch's: with it the
      gradients are those of micro-batches, and `micro_batch` matters. What a module changes that is not a buffer is
      changed twice.
    - *DistributedDataParallel* reduces once, in the last micro-batch; ranks may have different numbers of
      micro-batches. With *fully_shard* (FSDP2) gradients are kept whole until then, and all ranks need the same number
      of micro-batches, since every forward pass gathers parameters. The same holds for SyncBatchNorm.

    Args:
        encoder: a module called with one micro-batch of the inputs, in their nesting, as its only argument. It returns
            embeddings (n, D), float16 to float64, of one D and dtype for all; each row depends on its own input only
            (but for batch normalisation). An encoder without trainable parameters is not replayed.
        criterion: called once a step as ``criterion(embeddings, labels)``, with ``ref_emb=..., ref_labels=...`` if
            there are references; returns a loss (). A flashpair criterion, `distributed.gather` of one, or any
            callable.
        micro_batch: how many inputs have their activations in memory at a time, at least 1; the last micro-batch may be
            smaller.
        ref_encoder: the encoder of `ref_inputs`, for two towers; None: the encoder itself. The two may share modules.
        ref_micro_batch: micro-batch of `ref_inputs`; None: `micro_batch`.
        scale: a function of the loss whose result is differentiated instead: ``scaler.scale`` of a ``GradScaler``, or
            ``lambda loss: loss / 4`` for the mean of four accumulated steps.

    Raises:
        TypeError: an argument of a wrong type, named.
        ValueError: an argument out of its range, named; in a call, inputs, labels or embeddings of a wrong shape.
        RuntimeError: a call under ``torch.no_grad()``; a replay that differs from its first pass by more than rounding,
            detected at the end of the step.

    Examples:
        >>> encoder = torch.nn.Linear(3, 2)
        >>> cache = flashpair.GradCache(encoder, flashpair.MultiSimilarityLoss(), micro_batch=2)
        >>> loss = cache(torch.eye(3).repeat(2, 1), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> encoder.weight.grad.shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        encoder: nn.Module,
        criterion: Callable[..., Tensor],
        *,
        micro_batch: int,
        ref_encoder: nn.Module | None = None,
        ref_micro_batch: int | None = None,
        scale: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        for name, module in (("encoder", encoder), ("ref_encoder", ref_encoder)):
            if not (isinstance(module, nn.Module) or (module is None and name == "ref_encoder")):
                raise TypeError(f"{name} must be a torch.nn.Module, got {checks.what(module)}")
        for name, function in (("criterion", criterion), ("scale", scale)):
            if not (callable(function) or (function is None and name == "scale")):
                raise TypeError(f"{name} must be callable, got {checks.what(function)}")
        self.encoder = encoder
        self.criterion = criterion
        self.micro_batch = checks.integer(micro_batch, "micro_batch", at_least=1)
        self.ref_encoder = encoder if ref_encoder is None else ref_encoder
        self.ref_micro_batch = checks.most(ref_micro_batch, "ref_micro_batch") or self.micro_batch
        self.scale = scale

    def __call__(
        self,
        inputs: Any,
        labels: Tensor,
        *,
        ref_inputs: Any = None,
        ref_emb: Tensor | References | None = None,
        ref_labels: Tensor | None = None,
        sync: bool = True,
    ) -> Tensor:
        """One step: fills ``.grad`` as ``loss.backward()`` would.

        Args:
            inputs: a tensor (N, ...), or tensors of the same N in any nesting of tuples, lists and dicts. Those that
                require a gradient (leaves only) get it.
            labels: (N,), integers.
            ref_inputs: what `ref_encoder` embeds the M references from, as `inputs`.
            ref_emb: references that are embeddings already, (M, D) or `References`; then `ref_inputs` is None.
            ref_labels: (M,), with either (`References` bring their own).
            sync: False: do not reduce this call's gradients among ranks (DistributedDataParallel, fully_shard), as for
                all but the last of several accumulated calls.

        Returns:
            The loss (), detached and not scaled.

        Raises:
            TypeError: an argument of a wrong type, before any work if possible.
            ValueError: inputs, labels or embeddings whose shapes do not fit.
            RuntimeError: a call under ``torch.no_grad()``, or a replay that differs from its first pass.
        """
        checks.flag(sync, "sync")
        if not torch.is_grad_enabled():
            raise RuntimeError("GradCache must be called with gradients enabled, got a call under no_grad")
        towers = [_Tower(self.encoder, inputs, labels, self.micro_batch, "")]
        references: dict[str, Any] = {}
        if ref_inputs is not None:
            if ref_emb is not None:
                raise ValueError(f"ref_emb must be None with ref_inputs, got {checks.what(ref_emb)}")
            towers.append(_Tower(self.ref_encoder, ref_inputs, ref_labels, self.ref_micro_batch, "ref_"))
        elif ref_emb is not None or ref_labels is not None:
            references = {"ref_emb": ref_emb, "ref_labels": ref_labels}
        devices = _devices(towers, self.criterion)

        for tower in towers:
            tower.embed(devices)
        torch.clear_autocast_cache()  # older torches keep weights that were cast without a graph for the replay, too
        if ref_inputs is not None:
            references = {"ref_emb": towers[1].embeddings, "ref_labels": ref_labels}
        loss = self.criterion(towers[0].embeddings, labels, **references)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise ValueError(f"criterion must return a loss of shape (), got {checks.what(loss)}")
        _backward(loss if self.scale is None else self.scale(loss), None, devices)
        loss = loss.detach()

        end = ForwardState([tower.encoder for tower in towers], devices)
        towers = [tower for tower in towers if tower.embeddings.grad is not None]
        for tower, waiting in zip(towers, _waiting(towers, sync), strict=True):
            tower.replay(devices, waiting)
        end.restore_values()
        for tower in towers:
            tower.check_replay()
        return loss

    def __repr__(self) -> str:
        names = ("encoder", "criterion", "ref_encoder")
        kinds = ", ".join(f"{name}={type(getattr(self, name)).__name__}" for name in names)
        return f"GradCache({kinds}, micro_batch={self.micro_batch}, ref_micro_batch={self.ref_micro_batch})"


class _Tower:
    """An encoder with the micro-batches of one call, and what has become of them."""

    embeddings: Tensor  # (N, D), a leaf
    start: ForwardState

    def __init__(self, encoder: nn.Module, inputs: Any, labels: Any, size: int, prefix: str) -> None:
        name, self.name = f"{prefix}inputs", f"{prefix}encoder"
        if any(map(nn.parameter.is_lazy, encoder.parameters())):  # the first pass draws them, a replay would not
            raise ValueError(f"{self.name} must have no lazy parameters: call it once on some inputs before")
        leaves, nesting = _leaves(inputs, name)
        count = leaves[0].shape[0]
        if not isinstance(labels, Tensor) or labels.shape != (count,):
            raise ValueError(
                f"{prefix}labels must be a tensor of shape ({count},) like {name}, got {checks.what(labels)}"
                f"{checks.to_tensor(labels)}"
            )
        parts = zip(*(leaf.split(size) for leaf in leaves), strict=True)
        self.encoder, self.leaves = encoder, leaves
        self.apart: list[Tensor] = []  # () bool of each replay
        self.parts, self.nesting = list(parts), nesting
        self.counts = [part.shape[0] for part in leaves[0].split(size)]

    def micro_batches(self) -> Iterator[Any]:
        """Each pass has containers and tensors of its own, which an encoder may change."""
        for part in self.parts:
            own = {id(leaf): torch.clone(t) for leaf, t in zip(self.leaves, part, strict=True)}
            yield pytree.tree_unflatten([own[id(leaf)] for leaf in self.leaves], self.nesting)

    def embed(self, devices: list[torch.device]) -> None:
        self.start = ForwardState([self.encoder], devices)
        first = 0
        with torch.no_grad():
            for micro_batch, count in zip(self.micro_batches(), self.counts, strict=True):
                part = self._embedded(micro_batch, count)
                if first == 0:  # one chunk: small ones that are kept would leave holes where activations were
                    self.embeddings = part.new_empty(sum(self.counts), part.shape[1])
                whole = self.embeddings
                if part.shape[1] != whole.shape[1] or part.dtype != whole.dtype:
                    raise ValueError(
                        f"{self.name} must return one width and dtype for all inputs, got {checks.what(part)} after "
                        f"{whole.dtype} of width {whole.shape[1]}"
                    )
                whole[first : first + count] = part
                first += count
        self.embeddings.requires_grad_(any(t.requires_grad for t in (*self.encoder.parameters(), *self.leaves)))

    def _embedded(self, micro_batch: Any, count: int) -> Tensor:
        out = checks.embeddings(self.encoder(micro_batch), f"what {self.name} returns", "n, D")
        if out.shape[0] != count:
            raise ValueError(f"{self.name} must return a row for each of {count} inputs, got {checks.what(out)}")
        return out

    def replay(self, devices: list[torch.device], waiting: list[list[nn.Module]]) -> None:
        """Each micro-batch again, forward and backward; in each, the modules of `waiting` do not reduce gradients."""
        assert self.embeddings.grad is not None
        gradients = self.embeddings.grad.split(self.counts)
        self.start.restore()
        kept = self.embeddings.detach().split(self.counts)
        for micro_batch, count, gradient, first, modules in zip(
            self.micro_batches(), self.counts, gradients, kept, waiting, strict=True
        ):
            with _unreduced(modules):
                out = self._embedded(micro_batch, count)
                self.apart.append(_apart(out.detach(), first))
                after = Generators(devices, self.encoder.modules())
                if out.requires_grad:
                    _backward(out, gradient, devices)
                after.restore()  # a backward pass that draws (checkpointing may) is no part of the first pass

    def check_replay(self) -> None:
        """Read once a step: a GPU is not waited for in between."""
        if self.apart and torch.stack(self.apart).any():
            raise RuntimeError(
                f"{self.name} must return the same in the replay as in the first pass, and did not: it uses a random "
                "generator or changes a state that GradCache does not restore. The gradients that this call has added "
                "are wrong"
            )


def _apart(again: Tensor, first: Tensor) -> Tensor:
    """() bool: whether a row differs by more than other orders of summation or another kernel make it.

    Half of a dtype's digits are an encoder's rounding; of float32 on a GPU, which multiplies in tf32, those of tf32,
    and under autocast those of its dtype. Another dropout mask changes rows by a share like its rate.
    """
    kind = again.device.type
    digits = torch.finfo(again.dtype).eps
    if kind not in ("cpu", "meta") and again.dtype == torch.float32:
        digits = 2.0**-10
    if autocasts(kind):
        digits = max(digits, torch.finfo(torch.get_autocast_dtype(kind)).eps)
    again, first = again.double(), first.double()
    norms = torch.linalg.vector_norm(first, dim=1)
    off = torch.linalg.vector_norm(again - first, dim=1)
    finite = norms.isfinite()
    typical = torch.where(finite, norms, 0.0).sum() / finite.sum().clamp_min(1)
    return (finite & ~(off <= digits**0.5 * (norms + typical))).any()


def _leaves(inputs: Any, name: str) -> tuple[list[Tensor], pytree.TreeSpec]:
    """The tensors of some inputs, which all have N rows."""
    leaves, nesting = pytree.tree_flatten_with_path(inputs)
    takes = f"{name} must be a tensor (N, ...), or tensors of one N in a nesting of tuples, lists and dicts"
    if not leaves:
        raise ValueError(f"{takes}, got {inputs!r}")
    for path, leaf in leaves:
        at = f" at {pytree.keystr(path)}" if path else ""
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{takes}, got {checks.what(leaf)}{at}{checks.to_tensor(leaf)}")
        if leaf.dim() == 0 or leaf.shape[0] != leaves[0][1].shape[0]:
            first = f" beside {checks.what(leaves[0][1])}" if leaf is not leaves[0][1] else ""
            raise ValueError(f"{takes}, got {checks.what(leaf)}{at}{first}")
        if leaf.requires_grad and not leaf.is_leaf:
            raise ValueError(f"{name} must be leaf tensors or require no gradient, got the result of an operation{at}")
    return [leaf for _, leaf in leaves], nesting


def _devices(towers: list[_Tower], criterion: object) -> list[torch.device]:
    """Where anything of a step may be computed."""
    tensors = [leaf for tower in towers for leaf in tower.leaves]
    for module in (*(tower.encoder for tower in towers), criterion):
        if isinstance(module, nn.Module):
            tensors += [*module.parameters(), *module.buffers()]
    return list(dict.fromkeys(t.device for t in tensors))


def _backward(of: Tensor, gradient: Tensor | None, devices: list[torch.device]) -> None:
    """Backward as it runs after a ``with torch.autocast`` block."""
    with ExitStack() as stack:
        for kind in {device.type for device in devices}:
            stack.enter_context(no_autocast(kind))
        torch.autograd.backward(of, gradient)


def _waiting(towers: list[_Tower], sync: bool) -> Iterator[list[list[nn.Module]]]:
    """For each tower, for each micro-batch: the modules that do not reduce gradients yet, or not at all.

    A module that towers share waits for its last micro-batch in the last of them.
    """
    reducers = [[m for m in tower.encoder.modules() if _reduces(m)] for tower in towers]
    last = {module: k for k, modules in enumerate(reducers) for module in modules}
    for k, (tower, modules) in enumerate(zip(towers, reducers, strict=True)):
        early = [m for m in modules if not sync or last[m] != k]
        yield [modules] * (len(tower.counts) - 1) + [early]


def _reduces(module: nn.Module) -> bool:
    """DDP, or what fully_shard has made of a module (without an import of torch.distributed.fsdp)."""
    return isinstance(module, DistributedDataParallel) or hasattr(module, "set_requires_gradient_sync")


@contextmanager
def _unreduced(modules: list[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
            else:
                set_sync: Any = module.set_requires_gradient_sync
                set_sync(False, recurse=False)
                stack.callback(set_sync, True, recurse=False)
        yield
