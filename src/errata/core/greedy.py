"""The most likely token: what greedy decoding says."""

from __future__ import annotations

from torch import Tensor

_RUN = 512  # neighbours of which first the largest is found


def argmax(logits: Tensor) -> Tensor:
    """[…]: the first place of the largest of logits […, V], as ``logits.argmax(-1)`` gives it, a NaN counting as the largest.

    torch's own kernel goes through numbers one by one: 273 ms of a CPU for 200 rows of 262,144 in bfloat16, where their maximum takes 24.
    So the maximum of each run of 512 numbers is found first, and the place within one run.
    """
    size = logits.shape[-1]
    whole = size - size % _RUN
    if whole < 2 * _RUN or logits.device.type != "cpu":
        return logits.argmax(-1)
    runs = logits[..., :whole].unflatten(-1, (-1, _RUN))
    number = runs.amax(-1).argmax(-1, keepdim=True)
    run = runs.gather(-2, number.unsqueeze(-1).expand(*number.shape, _RUN)).squeeze(-2)
    within = run.argmax(-1, keepdim=True)
    place = number * _RUN + within
    if whole < size:
        rest = logits[..., whole:]
        last = rest.argmax(-1, keepdim=True)
        best, other = run.gather(-1, within), rest.gather(-1, last)
        place = place.where((best >= other) | best.isnan(), last + whole)
    out: Tensor = place.squeeze(-1)
    return out
