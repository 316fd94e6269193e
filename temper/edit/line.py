"""Weights on the line through two models."""

import torch
from torch import Tensor

from temper.edit.folders import ModelFolder, check_alike, check_target, record, write_edited
from temper.errors import TemperError


def interpolate(base: str, aligned: str, out: str, a: float = 1.5, a_max: float = 2.5) -> None:
    """Write theta_base + a * (theta_aligned - theta_base): a < 1 interpolates, a > 1 extrapolates alignment.

    a = 0 is the base and a = 1 the aligned model, bit for bit. Config and tokenizer are the aligned model's.

    Args:
        base: Folder of the model before alignment.
        aligned: Folder of the same network after it.
        out: Folder to write; an earlier model there is replaced.
        a: Place on the line.
        a_max: Largest a that is accepted.

    Raises:
        TemperError: a outside [0, a_max]; folders that are no models, or not the same network.
    """
    if not 0 <= a <= a_max:
        raise TemperError(f"--a={a}: give a number in [0, {a_max:g}] (0 is the base, 1 the aligned model); --a_max moves the upper end")
    start, end = ModelFolder("base", base), ModelFolder("aligned", aligned)
    check_alike(start, end)
    target = check_target(out, start, end)
    card = record("interpolate", {"a": a}, start, end)
    write_edited(end, target, lambda name: on_the_line(start.tensor(name), end.tensor(name), a), card)


def on_the_line(base: Tensor, aligned: Tensor, a: float) -> Tensor:
    """``base + a * (aligned - base)``, computed in at least float32 and rounded once. Integers are not mixed: the aligned model's.

    Args:
        base: A tensor of the base model.
        aligned: The same tensor of the aligned one.
        a: Place on the line; 0 and 1 give the tensors themselves.
    """
    if a == 0:
        return base
    if a == 1 or not base.is_floating_point():
        return aligned
    exact = torch.promote_types(base.dtype, torch.float32)
    start = base.to(exact)
    return (start + a * (aligned.to(exact) - start)).to(base.dtype)
