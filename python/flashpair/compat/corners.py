"""Corner cases of pytorch-metric-learning 2.9: a test on a call's batch for each of `divergence.REASONS`.

A test has two steps. `suspect` is cheap, runs on every call, and waits for no GPU. Where it finds something, `certain`
computes what the library computes there, a block of anchors at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.reduction import Reduction
from ..core.similarity import l2_normalize, softplus
from ..losses.contrastive import SNRContrastiveLoss
from ..losses.softmax import NCALoss
from ..miners import MultiSimilarityMiner
from .calls import Answer, Block, Call, blocks, of_any

FEW = 4096  # labels that Python counts sooner than torch


def some_loss(call: Call) -> Answer:
    return call.loss.ne(0).any()


def one_label(labels: Tensor) -> Answer:
    if labels.shape[0] == 0 or (labels.device.type == "cpu" and labels[0].item() != labels[-1].item()):
        return False
    return (labels == labels[0]).all()


def alone(call: Call) -> Tensor:
    """Which anchors have no positive (N,); sorted by label if the batch is compared with itself."""
    if not call.square:
        return ~torch.isin(call.labels, call.others)
    ordered = call.labels.sort().values
    same = torch.nn.functional.pad(ordered[1:] == ordered[:-1], (1, 1))
    return ~(same[1:] | same[:-1])


def both(one: Answer, other: Callable[[], Answer]) -> Answer:
    if isinstance(one, bool):
        return other() if one else False
    return one & other()


def few_pairs(call: Call) -> Answer:
    criterion = call.criterion
    if getattr(criterion, "epsilon", None) is None:
        return not call.square and 0 < call.x.shape[0] * call.others.shape[0] <= 2
    if criterion.reduction == "nonzero":  # an average that hides how many rows have a loss
        return True
    # of one mined positive and one negative, the loss of their row at most
    alpha, beta, base = criterion.alpha, criterion.beta, criterion.base
    if criterion.normalize and criterion.reduction == "mean" and call.loss.device.type == "cpu":
        highest = _softplus(alpha * (1 + base)) / alpha + _softplus(beta * (1 - base)) / beta
        return 0 < call.loss.item() * call.x.shape[0] <= highest * 1.001
    reach = call.loss.new_zeros(()) + call.reach()
    most = softplus(alpha * (reach + base)) / alpha + softplus(beta * (reach - base)) / beta
    total = call.loss * call.x.shape[0] if criterion.reduction == "mean" else call.loss.sum()
    return (total > 0) & (total <= most * 1.001)


def one_pair(call: Call) -> Answer:
    epsilon, found = getattr(call.criterion, "epsilon", None), [0, 0]
    if epsilon is None:
        for block in blocks(call):
            found = [n + int(mask.sum()) for n, mask in zip(found, block[1:], strict=True)]
    else:
        miner = MultiSimilarityMiner(epsilon, normalize=call.criterion.normalize)
        for mined in miner.blocks(call.x, call.labels, call.y, call.ref_labels):
            found = [found[0] + mined.p.shape[0], found[1] + mined.n.shape[0]]
            if max(found) > 1:
                break
    return both(max(found) == 1, lambda: some_loss(call))


def very_same(call: Call) -> Answer:
    return call.x.shape[0] > 0 and call.same[0 if isinstance(call.criterion, NCALoss) else 1]


def keys(rows: Tensor) -> Tensor:
    """A hash (N,) of each row, the sum of its bits: equal for equal rows, hardly ever for others."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.itemsize]
    return (rows + 0.0).contiguous().view(whole).sum(1)  # 0 and -0 are equal


def maybe_equal(call: Call) -> Answer:
    """Whether torch.cdist multiplies matrices: from 26 rows on. The library computes float16 pair by pair."""
    few = max(call.x.shape[0], call.others.shape[0]) <= 25
    if few or call.criterion.distance != "euclidean" or call.dtype == torch.float16:
        return False
    found = keys(call.own)
    if not call.square:
        return torch.isin(found, keys(call.refs)).any()
    found = found.sort().values
    return (found[1:] == found[:-1]).any()


def equal(call: Call) -> Answer:
    found, order = keys(call.refs).sort()
    if call.square:
        one, other = call.refs[order[1:]], call.refs[order[:-1]]
    else:
        at = torch.searchsorted(found, keys(call.own)).clamp_max(found.shape[0] - 1)
        one, other = call.own, call.refs[order[at]]
    return (one == other).all(1).any()


def maybe_no_side(call: Call) -> Answer:
    if 0 in (call.x.shape[0], call.others.shape[0]):
        return False
    if call.square and call.x.shape[0] <= FEW and call.labels.device.type == "cpu":
        counts = Counter(call.labels.tolist())
        return len(counts) == 1 or min(counts.values()) == 1
    one = one_label(call.others)
    return one if one is True else alone(call).any() | one


def no_side(call: Call) -> Answer:
    """Whether the sum of the one side that exists is above 0."""
    neg, pos, distance = call.numbers["neg_margin"], call.numbers["pos_margin"], call.criterion.distance
    sign = -1.0 if distance == "dot" else 1.0

    def found(block: Block) -> Tensor:
        z = block.z
        far = torch.logsumexp((sign * (z - pos)).masked_fill(~block.positive, -torch.inf), 1)
        near = torch.logsumexp((sign * (neg - z)).masked_fill(~block.negative, -torch.inf), 1)
        return torch.where(block.positive.any(1), far, near).gt(0) & (block.positive.any(1) ^ block.negative.any(1))

    return of_any(call, found, distance)


def no_negatives(call: Call) -> Answer:
    found = one_label(call.labels)
    if not call.square:
        found = both(found, lambda: both(one_label(call.others), lambda: call.others[0] == call.labels[0]))
    return both(found, lambda: some_loss(call))


def maybe_clipped(call: Call) -> Answer:
    info, m = torch.finfo(call.dtype), max(call.others.shape[0], 1)
    reach = call.reach() * (2 / call.criterion.temperature)
    return reach > -math.log(info.tiny) - math.log(m) - 7


def clipped(call: Call) -> Answer:
    """Whether a pair's loss is within 7 of the clip, where its gradient is off by a thousandth or more."""
    most = -math.log(torch.finfo(call.dtype).tiny) - 7

    def found(block: Block) -> Tensor:
        z = block.z.to(torch.promote_types(block.z.dtype, torch.float32)) / call.criterion.temperature
        near = torch.logsumexp(z.masked_fill(~block.negative, -torch.inf), 1)
        far = z.masked_fill(~block.positive, torch.inf).amin(1)
        return near - far > most

    return of_any(call, found)


def maybe_dropped(call: Call) -> Answer:
    if call.x.shape[0] == 0 or call.others.shape[0] == 0:
        return False
    criterion, proxies = call.criterion, hasattr(call.criterion, "weight")
    longest = 1.0 if proxies else call.reach()
    count = criterion.weight.shape[0] if proxies else call.others.shape[0]
    span = longest * (2.0 if criterion.distance == "dot" and not proxies else 4.0) * criterion.softmax_scale
    loss = call.loss.eq(0).all() if not proxies and criterion.reduction == "mean_valid" else False
    far = span > 80 - math.log(count)  # exp may flush subnormal numbers to 0
    return (far or loss) if isinstance(far, bool) else far | loss


def dropped(call: Call) -> Answer:
    criterion, distance = call.criterion, call.criterion.distance
    if hasattr(criterion, "weight"):
        weights = criterion.weight.detach()
        count = torch.arange(weights.shape[0], device=weights.device)
        call = Call(criterion, call.x, call.labels, weights, count, call.loss, call.dtype, call.numbers)
        distance = "squared_euclidean"
    scale = criterion.softmax_scale * (1.0 if distance == "dot" else -1.0)
    none, total = True, 0
    for block in blocks(call, distance):
        taken = block.positive | block.negative
        p = (block.z * scale).masked_fill(~taken, torch.finfo(block.z.dtype).min).softmax(1)
        lost = (p * block.positive).sum(1) == 0
        if bool((lost & block.positive.any(1)).any()):
            return True
        none, total = none and bool(lost.all()), total + block.z.shape[0]
    return none and total > 1 and criterion.reduction in ("mean", "mean_valid")


def extremes(call: Call, *reductions: Reduction) -> list[Tensor]:
    """Row values of the fused criterion's own pairs, whose rounding differs from the library's."""
    criterion = call.criterion
    pairs = criterion.pairs_of(call.x, call.labels, call.y, call.ref_labels, criterion.impl)
    found = zip(pairs.reduce(*reductions), reductions, strict=True)
    return [rows.amax() if r.op == "max" else rows.amin() for rows, r in found]


def maybe_same_direction(call: Call) -> Answer:
    if 0 in (call.x.shape[0], call.others.shape[0]):
        return False
    (most,) = extremes(call, Reduction("max", "positives", detach=True))
    return most >= 1 - 8 * torch.finfo(call.dtype).eps


def maybe_past_the_end(call: Call) -> Answer:
    if call.x.shape[0] == 0:
        return False
    most, least = extremes(call, Reduction("max", "all", detach=True), Reduction("min", "all", detach=True))
    edge = 1 - 8 * max(torch.finfo(call.dtype).eps, torch.finfo(torch.float32).eps)  # in which it finds the node
    return (most >= edge) | (least <= -edge)


def same_direction(call: Call) -> Answer:
    return of_any(call, lambda block: block.positive & (block.z >= 1) & block.negative.any())


def maybe_aligned(call: Call) -> Answer:
    u, w = call.own, l2_normalize(call.criterion.weight.detach()[call.labels].to(call.dtype))
    return ((u * w).sum(1).abs() >= 1 - 2 * torch.finfo(u.dtype).eps).any()


def aligned(call: Call) -> Answer:
    w = call.criterion.weight.detach()
    w = l2_normalize(w[call.labels].to(call.dtype))
    return any(
        bool((u @ v.T).diagonal().abs().ge(1).any()) for u, v in zip(call.own.split(256), w.split(256), strict=True)
    )


def past_the_end(call: Call) -> Answer:
    """Whether the library looks up a node before the first or after the last one, for a pair of a triplet."""
    delta = call.numbers["delta"]
    last = round(2 / delta)

    def found(block: Block) -> Tensor:
        node = ((block.z.float() + 1) / delta).floor()
        some = block.positive.any(1, keepdim=True) & block.negative.any(1, keepdim=True)
        return ((node < 0) | (node >= last)) & some & (block.positive | block.negative)

    return of_any(call, found)


def alone_pairs(call: Call) -> Answer:
    found = alone(call)
    return (found.sum() > 1) & ~found.all()


def not_unit(call: Call) -> Answer:
    apart = torch.linalg.vector_norm(call.x.to(torch.promote_types(call.dtype, torch.float32)), dim=1) - 1
    return (apart.abs() > max(1e-4, 4 * torch.finfo(call.x.dtype).eps)).any() & some_loss(call)


def constant(call: Call) -> Answer:
    """Whether an anchor has no variance, so that the fused criterion leaves it out."""
    if not isinstance(call.criterion, SNRContrastiveLoss) or call.others.shape[0] < 1 + int(call.square):
        return False
    return call.criterion._centred(call.x).eq(0).all(1).any()


def _softplus(t: float) -> float:
    return max(t, 0.0) + math.log1p(math.exp(-abs(t)))


class Corner(NamedTuple):
    suspect: Callable[[Call], Answer]
    certain: Callable[[Call], Answer] | None = None


CORNERS = {
    "one pair": Corner(few_pairs, one_pair),
    "same references": Corner(very_same),
    "euclidean duplicates": Corner(maybe_equal, equal),
    "lifted structure without a side": Corner(maybe_no_side, no_side),
    "nt-xent clip": Corner(maybe_clipped, clipped),
    "supcon without negatives": Corner(no_negatives),
    "nca underflow": Corner(maybe_dropped, dropped),
    "tuplet duplicates": Corner(maybe_same_direction, same_direction),
    "angular negatives": Corner(not_unit),
    "arcface aligned": Corner(maybe_aligned, aligned),
    "snr without variance": Corner(constant),
    "histogram pairs": Corner(alone_pairs),
    "histogram end": Corner(maybe_past_the_end, past_the_end),
}
