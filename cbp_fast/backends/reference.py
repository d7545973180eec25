"""The specification: continual backpropagation in eager PyTorch, on any device, without reading anything back from it.

Every kernel is tested against this file. A step is `capture_` for every input that a reading layer saw, `select_`
(activation statistic x weight statistic, decayed average, choice) and `reinit_` for what was chosen. `select_` is
`sum_` and `choose_`; several processes add up what `sum_` left in `State.flat` between the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..groups.layers import out_axis
from ..state.layout import Layout, by_unit, columns_of, conv_groups_here
from ..state.regions import DRAW, TRANSFER, Region
from ..state.state import State
from ..tensors.parts import Extent

_MASK = 0xFFFFFFFF


def philox(element: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """The random 32-bit words of `element` (int64, any shape), as int64: Philox4x32-10 (Salmon et al., SC 2011).

    key = seed; counter = (element // 4 low, element // 4 high ^ step high << 16, step low, stream); word = element % 4.
    """
    block = element >> 2
    c0, c1 = block & _MASK, ((block >> 32) ^ (step >> 32 << 16)) & _MASK
    c2, c3 = (step & _MASK).expand_as(block), torch.full_like(block, stream)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # an int64 product wraps, but keeps all 64 bits of a product of two 32-bit words
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    word = element & 3
    return torch.where(word < 2, torch.where(word == 0, c0, c1), torch.where(word == 2, c2, c3))


def unit_uniform(element: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """U[0, 1) with 24 bits, float32 exactly."""
    return (philox(element, seed, step, stream) >> 8).float() * 2.0**-24


def draw(element: Tensor, seed: Tensor, step: Tensor, stream: int, distribution: str, bound: float) -> Tensor:
    """float32 draws at the row-major `element` numbers of a weight."""
    if distribution == "normal":
        # Box-Muller on the two words of a pair: the even element takes the cosine, the odd one the sine
        radius = unit_uniform(element & ~1, seed, step, stream).double()
        angle = 2 * math.pi * unit_uniform(element | 1, seed, step, stream).double()
        radius = torch.sqrt(-2 * torch.log1p(-radius))
        return (radius * torch.where(element & 1 == 0, angle.cos(), angle.sin()) * bound).float()
    r = unit_uniform(element, seed, step, stream)
    return r if distribution == "unit" else (2 * r - 1) * bound


def bias_correction(age: Tensor, decay_rate: Tensor) -> Tensor:
    """1 - decay_rate**age in float64; 1 where decay_rate is 0."""
    correction = -torch.expm1(age.double() * torch.log(decay_rate))
    return torch.where(decay_rate > 0, correction, torch.ones_like(correction))


@torch.no_grad()
def capture_(state: State, slot_index: int, h: Tensor) -> None:
    """Add one forward's activations to the sums of the layer that reads them.

    Args:
        h: the input of the reading layer: [..., columns] for Linear, [batch, channels, ...] for a convolution.
    """
    slot = state.slots[slot_index]
    x = columns_of(h, slot)
    wide = _wide(h)
    state.count[slot_index] += x.shape[0] * x.shape[1]
    columns, here = slot.columns, slot.here
    activation = state.activation[columns][here]
    if state.rule.keeps_mean:
        state.feature[columns][here] += x.sum((0, 1), dtype=wide)
    if state.rule.arithmetic.centred:
        layout, decay = state.layouts[slot.group], state.hyper[2]
        mean, age = state.running_mean[columns], state.age[layout.units]
        if state.previous_mean:
            # a unit that has none yet has a mean of 0
            correction = torch.where(age > 0, bias_correction(age, decay), 1.0)
        else:
            # the mean so far, this forward included, and the age as it will be after the step
            mean = decay * mean + (1 - decay) * (state.feature[columns] / state.count[slot_index])
            correction = bias_correction(age.long() + 1, decay)
        h_hat = torch.empty_like(mean)
        by_unit(h_hat, slot)[:] = (by_unit(mean, slot) / correction[:, None]).mean(1, keepdim=True)
        activation += (x.to(wide) - h_hat[here].to(wide)).abs().sum((0, 1))
    elif state.rule.arithmetic.activation == "magnitude":
        activation += x.abs().sum((0, 1), dtype=wide)


def _wide(x: Tensor) -> torch.dtype:
    """The type that sums over x run in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _output_sums(weight: Tensor, axis: int) -> Tensor:
    """sum of abs(weight) by output; `axis` is that of the outputs."""
    return weight.abs().transpose(0, axis).flatten(1).sum(1, dtype=_wide(weight)).double()


def _input_sums(weight: Tensor, axis: int, conv_groups: int) -> Tensor:
    """sum of abs(weight) by input; `axis` is that of the outputs."""
    magnitude = weight.abs().transpose(0, axis)
    magnitude = magnitude.reshape(conv_groups, -1, magnitude.shape[1], weight.shape[2:].numel())
    return magnitude.sum((1, 3), dtype=_wide(weight)).flatten().double()


def utility_now(state: State, layout: Layout) -> Tensor:
    """y: activation statistic x weight statistic of every unit, float64 [N]; sums of weights stand in `state.flat`."""
    arithmetic, n = state.rule.arithmetic, layout.num_units
    y = torch.zeros(n, dtype=torch.float64, device=state.buffer.device)
    elements = torch.zeros((), dtype=torch.float64, device=state.buffer.device)
    samples = torch.zeros((), dtype=torch.float64, device=state.buffer.device)
    for s in layout.slots:
        slot, count = state.slots[s], state.count[s]
        ran = count > 0
        term = torch.ones((), dtype=torch.float64, device=y.device).expand(n * layout.columns_per_unit)
        if arithmetic.activation:
            # one mean over all readers: sums first, one division at the end
            term = state.activation[slot.columns] / (1 if arithmetic.pools else count)
        per_column = 1
        if arithmetic.outgoing:
            term = term * state.flat[state.inputs[slot.weight]].narrow(0, slot.block.start, len(term))
            per_column = state.weights[slot.weight].shape.numel() // slot.features
        y = y + torch.where(ran, by_unit(term.contiguous(), slot).sum(1), 0.0)
        elements = elements + torch.where(ran, float(per_column * layout.columns_per_unit), 0.0)
        samples = samples + count
    if arithmetic.averages_weights:
        y = y / elements
    if arithmetic.incoming is None:
        return y
    w_in, fan_in = torch.zeros_like(y), 0
    for i, block in layout.incoming:
        sums = state.flat[state.outputs[i]]
        start, unit_stride, per_unit, position_stride = block
        w_in = w_in + sums[start:].as_strided((n, per_unit), (unit_stride, position_stride)).sum(1)
        fan_in += per_unit * (state.weights[i].shape.numel() // len(sums))
    return y / samples * w_in if arithmetic.pools else y / (w_in / fan_in)


def _added(count: Tensor, n: Tensor) -> Tensor:
    """Their sum, at most the greatest int64."""
    return torch.where(count > torch.iinfo(torch.int64).max - n, torch.iinfo(torch.int64).max, count + n)


def _choose(state: State, layout: Layout, g: int, y: Tensor, reached: Tensor) -> None:
    """Average y into the utility, age the units, and list the ones that are due for replacement."""
    arithmetic = state.rule.arithmetic
    rate, maturity, decay, _ = state.hyper.unbind()
    utility, age = state.utility[layout.units], state.age[layout.units]
    y = y.to(utility.dtype)
    finite = y.isfinite() & reached
    if arithmetic.normalisation == "min_max":
        low = torch.where(finite, y, torch.inf).amin()
        high = torch.where(finite, y, -torch.inf).amax()
        y = (y - low) / (high - low + 1e-8)
    if arithmetic.score == "random":
        y = torch.zeros_like(y)
    decayed = decay.to(y.dtype) * utility + (1 - decay).to(y.dtype) * y
    utility.copy_(torch.where(finite, decayed, utility))
    age += finite & (age < torch.iinfo(age.dtype).max)

    # compared with a float64 as one, not in float32
    eligible = age.double() > maturity
    n = eligible.sum()
    if arithmetic.score == "random":
        units = torch.arange(layout.num_units, dtype=torch.int64, device=age.device)
        score = unit_uniform(units, state.seed, state.step, layout.stream).to(utility.dtype)
    elif arithmetic.score == "per_step":
        score = (utility.double() / age).to(utility.dtype)
    else:
        score = (utility.double() / bias_correction(age, decay)).to(utility.dtype)
    candidate = eligible & score.isfinite()

    due = rate * (layout.num_units * (n > 0) if arithmetic.accrual == "all" else n)
    if arithmetic.accrual == "whole":
        due = due.trunc()
    pending = state.pending[g] + due
    if arithmetic.count == "one":
        k = (pending > 1).double()
    elif arithmetic.count == "floor":
        k = pending.floor()
    else:
        # the coin's element follows those of the random scores
        coin = unit_uniform(torch.full_like(state.step, layout.num_units), state.seed, state.step, layout.stream)[0]
        k = due.floor() + (coin < due - due.floor())
    k = torch.where(reached, torch.minimum(k, candidate.sum()), 0.0).clamp(max=_limit(state, layout))
    if arithmetic.count != "coin":
        state.pending[g] = torch.where(reached, pending - k, state.pending[g])
    # a float64 score beyond float32 stays a candidate, after all others
    score = torch.where(candidate, score.float().clamp(max=torch.finfo(torch.float32).max), torch.inf)
    state.chosen[layout.units] = torch.sort(score, stable=True).indices.int()
    state.num_chosen[g] = k.int()
    state.num_replaced[g] = _added(state.num_replaced[g], k.long())


@torch.no_grad()
def sum_(state: State, weights: Sequence[Tensor], held: Sequence[Tensor], slots: Sequence[int]) -> None:
    """Put into `state.flat` what this process adds to a step: samples, activations, magnitudes of weights.

    Args:
        weights: this process's parts of the tensors of `state.weights`, read only; none where all are whole in every
            process, and can be left to `choose_`.
        held: activations not captured yet, in the order of the forwards.
        slots: the slot of each.
    """
    for number, h in zip(slots, held, strict=True):
        capture_(state, number, h)
    count, *sums = totals(state)
    state.flat.zero_()
    for s, slot in enumerate(state.slots):
        if slot.counts:
            count[s] = state.count[s]
        for total, mine in zip(sums, (state.activation, state.feature), strict=False):
            if slot.adds:
                total[slot.columns] = mine[slot.columns]
    _sum_weights(state, weights)


def _sum_weights(state: State, weights: Sequence[Tensor]) -> None:
    """Magnitudes of weights into `state.flat`, if any are given."""
    refs = zip(weights, state.weights, state.modules, strict=True) if weights else ()
    for i, (w, ref, module) in enumerate(refs):
        axis, first = out_axis(module), ref.extent.first
        groups_here, group = conv_groups_here(ref, getattr(module, "groups", 1))
        if state.reads_outputs[i] and ref.extent.adds:
            state.flat[state.outputs[i]][first[axis] :][: w.shape[axis]] = _output_sums(w, axis)
        if state.reads_inputs[i] and ref.extent.adds:
            sums = _input_sums(w, axis, groups_here)
            state.flat[state.inputs[i]][first[1 - axis] + group * w.shape[1] :][: len(sums)] = sums


def totals(state: State) -> tuple[Tensor, Tensor, Tensor]:
    """What of `state.flat` is summed over samples: count, activation and feature."""
    sizes = [len(state.count), len(state.activation), len(state.feature)]
    return state.flat[: sum(sizes)].split(sizes)


@torch.no_grad()
def choose_(state: State, weights: Sequence[Tensor]) -> int:
    """Utility, age and choice, from `state.flat`; returns as `select_`.

    Args:
        weights: what `sum_` was not given; read only.
    """
    for mine, total in zip((state.count, state.activation, state.feature), totals(state), strict=True):
        mine.copy_(total)
    if state.buffer.is_cpu and not state.count.any():
        state.num_chosen.zero_()
        return 0
    _sum_weights(state, weights)
    choose_groups_(state)
    return int(state.num_chosen.sum()) if state.buffer.is_cpu else -1


def choose_groups_(state: State) -> None:
    """Utility, age and choice of every group that a forward reached."""
    state.step.copy_(_added(state.step, (state.count > 0).any().long()))
    decay = state.hyper[2]
    for g, layout in enumerate(state.layouts):
        reached = (state.count[layout.slots[0] : layout.slots[-1] + 1] > 0).any()
        y = utility_now(state, layout)
        _choose(state, layout, g, y, reached)
    if state.rule.keeps_mean:
        for s, slot in enumerate(state.slots):
            mean, m_h = state.feature[slot.columns] / state.count[s], state.running_mean[slot.columns]
            m_h.copy_(torch.where(mean.isfinite(), decay * m_h + (1 - decay) * mean, m_h))
        state.feature.zero_()
    state.activation.zero_()
    state.count.zero_()


@torch.no_grad()
def select_(state: State, weights: Sequence[Tensor], held: Sequence[Tensor], slots: Sequence[int]) -> int:
    """One step up to the choice: which units are replaced is in `state.chosen` afterwards.

    y = activation statistic x weight statistic; u = decay_rate * u + (1 - decay_rate) * y, age + 1 where y is finite;
    pending += replacement_rate * eligible units; the floor(pending) candidates of least score are chosen.

    Args:
        weights, held, slots: as of `sum_`.

    Returns:
        How many units were chosen; on an accelerator -1, since it is not read back.
    """
    sum_(state, [], held, slots)
    return choose_(state, weights)


def indices_of(region: Region, units: Tensor) -> Tensor:
    """Indices along the region's axis that belong to `units` [k]; int64 [k, P]."""
    start, unit_stride, per_unit, position_stride = region.block
    positions = torch.arange(per_unit, dtype=torch.int64, device=units.device)
    return start + units[:, None] * unit_stride + positions * position_stride


def elements_of(region: Region, extent: Extent, index: Tensor) -> tuple[Tensor, Tensor]:
    """Row-major numbers of the elements that lie here at `index` [k, P] along the region's axis.

    Returns:
        Their numbers in the whole tensor and in the part that is here; int64 [k, P, elements an index].
    """
    # as [rows, columns, inner], of which a part may lack rows and columns
    first, part, whole = (
        (*x, *(filler,) * 2) for x, filler in ((extent.first, 0), (extent.part, 1), (extent.whole, 1))
    )
    inner = math.prod(extent.whole[2:])
    if region.axis == 0:
        row, column = (index - first[0])[..., None], torch.arange(part[1], device=index.device)
    else:
        # a grouped convolution's column lies in the rows of its group
        rows = whole[0] // region.conv_groups if region.conv_groups > 1 else part[0]
        row = torch.arange(rows, device=index.device)
        if region.conv_groups > 1:
            row = (index // whole[1] * rows - first[0])[..., None] + row
        column = (index % whole[1] - first[1])[..., None]
    last = torch.arange(inner, device=index.device)
    numbers = []
    for r, c, width in ((row + first[0], column + first[1], whole[1]), (row, column, part[1])):
        numbers.append(((r * width + c)[..., None] * inner + last).flatten(2))
    return numbers[0], numbers[1]


def _clamped(region: Region, extent: Extent, index: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Replace indices that do not lie here by some that do; and say which are those of a valid unit, [k, P] each.

    Several may become the same one: all of them are then of a valid unit, or none.
    """
    whole, low, n = extent.whole[region.axis], extent.first[region.axis], extent.part[region.axis]
    if region.conv_groups > 1:
        # the columns of whole convolution groups
        groups_here, group = conv_groups_here(region.ref, region.conv_groups)
        whole, low, n = whole * region.conv_groups, group * whole, groups_here * whole
    chosen = torch.zeros(whole, dtype=torch.bool, device=index.device)
    chosen[index] = valid[:, None].expand_as(index)
    index = index.clamp(low, low + n - 1)
    return index, chosen[index]


def _moved(state: State, region: Region, units: Tensor, valid: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """bias + sum over the units' columns of weight * h_hat."""
    slot, layout = state.slots[region.slot], state.layouts[region.group]
    correction = bias_correction(state.age[layout.units], state.hyper[2])
    h_hat = by_unit(state.running_mean[slot.columns], slot) / correction[:, None]
    h_hat = torch.where(valid[:, None], h_hat[units], 0.0)  # [k, P]
    extent = Extent(weight.shape, weight.shape, (0,) * weight.dim())
    element, _ = elements_of(region, extent, indices_of(region, units))
    where = torch.unravel_index(element, weight.shape)
    # [k, P, elements a column]
    gain = weight[where].double() * h_hat[..., None]
    total = torch.zeros(len(bias), dtype=torch.float64, device=bias.device)
    total.index_put_((where[1 - region.axis].flatten(),), gain.flatten(), accumulate=True)
    moved = (bias + total).to(bias.dtype)
    return torch.where(moved.isfinite(), moved, bias)


@torch.no_grad()
def reinit_(state: State, regions: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """Set everything that belongs to the chosen units, region by region, then their utility, age and mean.

    Args:
        regions: numbers in `state.regions` times two, in that order, and 2 * i + 1 for an entry of the
            optimizer's state of region i's parameter, which is zeroed.
        tensors: one tensor for each, the part of it that is here; a transfer takes two, the bias and the reading
            weight.
    """
    rest = iter(tensors)
    for number in regions:
        region, is_entry = state.regions[number >> 1], number & 1
        tensor = next(rest)
        units, valid = _chosen(state, region.group)
        if region.kind == TRANSFER:
            weight, done = next(rest), {} if state.redo is None else state.redo
            # a second time the weight may have been filled already
            if number not in done:
                done[number] = _moved(state, region, units, valid, weight, tensor)
            tensor.copy_(done[number])
            continue
        extent, hit = region.ref.extent, valid[:, None]
        if tensor.numel() == 0:
            continue
        index = indices_of(region, units)
        if extent.split:
            index, hit = _clamped(region, extent, index, valid)
        element, position = elements_of(region, extent, index)
        where = torch.unravel_index(position, tensor.shape)
        if region.kind == DRAW and not is_entry:
            new = draw(element, state.seed, state.step, region.stream, region.distribution, region.value)
        else:
            new = torch.full_like(element, 0.0 if is_entry else region.value, dtype=torch.float32)
        tensor[where] = torch.where(hit[..., None], new.to(tensor.dtype), tensor[where])
    for g, layout in enumerate(state.layouts):
        units, valid = _chosen(state, g)
        for field in (state.utility, state.age):
            mine = field[layout.units]
            mine[units] = torch.where(valid, torch.zeros_like(mine[units]), mine[units])
        if state.rule.keeps_mean:
            for s in layout.slots:
                m_h = by_unit(state.running_mean[state.slots[s].columns], state.slots[s])
                m_h[units] = torch.where(valid[:, None], torch.zeros_like(m_h[units]), m_h[units])


def _limit(state: State, layout: Layout) -> int:
    """How many units of a group one step can replace, as far as the host knows.

    An accelerator's choice is not read back, so this many rows are written, with their old values where nothing was
    chosen. Less than one unit is pending before a step unless the accrual counts units that cannot be chosen yet.
    """
    n, arithmetic = layout.num_units, state.rule.arithmetic
    if arithmetic.count == "one":
        return 1
    return n if state.buffer.is_cpu or arithmetic.accrual == "all" else min(n, int(state.replacement_rate * n) + 1)


def _chosen(state: State, g: int) -> tuple[Tensor, Tensor]:
    """Units of group g that may have been chosen, and which of them were; [k] each."""
    layout = state.layouts[g]
    limit = int(state.num_chosen[g]) if state.buffer.is_cpu else _limit(state, layout)
    units = state.chosen[layout.units.start : layout.units.start + limit].long()
    return units, torch.arange(limit, device=units.device) < state.num_chosen[g]
