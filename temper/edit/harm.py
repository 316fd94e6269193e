"""Safety Arithmetic, step 1: take the harm direction out of the weights, and put it back.

Hazra et al. 2024, arXiv 2406.11801.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from temper.edit.folders import (
    NAMES,
    ORIGINALS,
    ModelFolder,
    Place,
    check_alike,
    check_target,
    record,
    write_edited,
    write_tensors,
)
from temper.errors import TemperError

# MERGED from temper.edit.harm: Masks over weights: what Antidote zeroes and what SOMF fuses. Pure
# functions of tensors. |  | Shapes: `O` outputs of a linear layer, `I` inputs; `...` any.


def wanda_top(weight_OI: Tensor, mean_square_I: Tensor, ratio: float) -> Tensor:
    """Entries with the highest Wanda scores of their row: ``|W| * sqrt(mean x^2)`` (Sun et al.
    2023, arXiv 2306.11695).

    Args:
        weight_OI: Weight of a linear layer; a row is one output.
        mean_square_I: Mean square of each input, over tokens. Its scale does not matter.
        ratio: Share of a row, rounded up to whole entries: ``I - floor(I * (1 - ratio))``, as in
            Antidote's code.

    Returns:
        ``O x I``, bool: the top of every row; of equal scores the one further right.
    """
    n_inputs = weight_OI.shape[1]
    n_top = n_inputs - int(n_inputs * (1 - ratio))
    score_OI = weight_OI.abs() * mean_square_I.sqrt()
    order = score_OI.argsort(dim=1, stable=True)
    return torch.zeros_like(weight_OI, dtype=torch.bool).scatter_(
        1, order[:, n_inputs - n_top :], True
    )


def relaxed_bernoulli(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """A sample of the relaxed Bernoulli distribution (Maddison et al. 2016):
    ``sigmoid((logits + logit(u)) / temperature)``.

    Args:
        logits: Log-odds of each entry.
        uniform: Numbers in [0, 1) of the same shape.
        temperature: Towards 0, samples are 0 or 1.
    """
    tiny = torch.finfo(uniform.dtype).eps
    return torch.sigmoid((logits + uniform.clamp(tiny, 1 - tiny).logit()) / temperature)


def fuse(safe: Tensor, tau: Tensor, mask: Tensor, w: float) -> Tensor:
    """``safe + w * mask * tau / mean(mask)``: a task vector through a mask, on a safe model (SOMF).

    Args:
        safe: Weight of the safe model.
        tau: Task vector: fine-tuned weight minus safe weight.
        mask: Entries in [0, 1]; its mean is over this one tensor.
        w: Strength.
    """
    return safe + w * mask * tau / mask.mean()


INDEX, VALUES = "#index", "#values"  # suffixes of names in ORIGINALS


def remove_harm(
    model: str, harm: str, base: str, out: str, lam: float = 1.0, top: float = 10.0
) -> None:
    """Write theta - lam * topK(theta_harm - theta_base): Safety Arithmetic's harm direction
    removal.

    The K % of the whole model's entries with the largest |theta_harm - theta_base| are kept, as in
    the official code, not K % of every tensor; ties with the last one count. The original values of
    the entries that change are kept in removed.safetensors, so `undo` restores the model bit for
    bit. lam = 0 changes no bit.

    Args:
        model: Folder of the model to edit: the base, or a model fine-tuned from it.
        harm: Folder of the base after fine-tuning on harmful rows.
        base: Folder of the model that ``harm`` was fine-tuned from.
        out: Folder to write; an earlier model there is replaced.
        lam: Strength.
        top: Share of entries to remove, in percent (paper: 10).

    Raises:
        TemperError: numbers out of range; folders that are no models, or not the same network.
    """
    if lam < 0:
        raise TemperError(f"--lam={lam}: give a number >= 0 (0 changes nothing)")
    if not 0 < top <= 100:
        raise TemperError(f"--top={top}: give a percentage in (0, 100] (the paper's is 10)")
    edited, harmful, start = (
        ModelFolder("model", model),
        ModelFolder("harm", harm),
        ModelFolder("base", base),
    )
    check_alike(edited, harmful, start)
    target = check_target(out, edited, harmful, start)
    vector = HarmVector(harmful, start, top)
    counts = {name: int(vector.mask(name).sum()) if lam else 0 for name in edited.file_of}
    settings = {
        "lam": lam,
        "top": top,
        "threshold": vector.threshold,
        "entries_changed": sum(counts.values()),
    }

    def changed(name: str) -> Tensor:
        theta = edited.tensor(name)
        return (
            remove(theta, vector.difference(name), vector.mask(name), lam)
            if counts[name]
            else theta
        )

    def keep_originals(folder: Path) -> None:
        touched = [name for name, n in counts.items() if n]
        places = {}
        for name in touched:
            places[name + INDEX] = Place("I64", (counts[name],))
            places[name + VALUES] = Place(edited.place(name).dtype, (counts[name],))
        write_tensors(folder / ORIGINALS, places, _originals(touched, edited, vector))

    write_edited(
        edited,
        target,
        changed,
        record("remove-harm", settings, edited, harmful, start),
        keep_originals,
    )


def undo(model: str, out: str) -> None:
    """Put back what remove-harm took out: the model as it was, bit for bit.

    Args:
        model: Folder that remove-harm wrote.
        out: Folder to write; an earlier model there is replaced.

    Raises:
        TemperError: the folder holds no removed.safetensors.
    """
    edited = ModelFolder("model", model)
    path = edited.path / ORIGINALS
    if not path.exists():
        raise TemperError(
            f"--model={model}: no {ORIGINALS} in it; give a folder that remove-harm wrote, as it"
            " wrote it"
        )
    target = check_target(out, edited)
    with safe_open(path, framework="pt") as originals:
        kept = set(originals.keys())

        def restored(name: str) -> Tensor:
            theta = edited.tensor(name)
            if name + INDEX in kept:
                theta.view(-1)[originals.get_tensor(name + INDEX)] = originals.get_tensor(
                    name + VALUES
                )
            return theta

        write_edited(edited, target, restored, record("undo", {}, edited))


def remove(theta: Tensor, difference: Tensor, mask: Tensor, lam: float) -> Tensor:
    """``theta - lam * mask * difference``, in the precision of the difference, rounded once; other
    entries keep their bits.
    """
    return torch.where(mask, (theta.to(difference.dtype) - lam * difference).to(theta.dtype), theta)


class HarmVector:
    """``topK(theta_harm - theta_base)`` over a whole model, tensor by tensor.

    Args:
        harm: The model fine-tuned on harmful rows.
        base: The model it was fine-tuned from.
        top: Percentage of entries that count.
    """

    def __init__(self, harm: ModelFolder, base: ModelFolder, top: float) -> None:
        self.harm, self.base = harm, base
        self.threshold = self._threshold(top)

    def difference(self, name: str) -> Tensor:
        """``theta_harm - theta_base`` of one tensor, in at least float32.

        Raises:
            TemperError: it is not finite.
        """
        harm, base = self.harm.tensor(name), self.base.tensor(name)
        if not harm.is_floating_point():
            return torch.zeros(harm.shape)
        exact = torch.promote_types(harm.dtype, torch.float32)
        difference = harm.to(exact) - base.to(exact)
        if not difference.isfinite().all():
            raise TemperError(
                f"--harm={self.harm.path}: {name} is not finite; its training diverged"
            )
        return difference

    def mask(self, name: str) -> Tensor:
        """Entries of one tensor that are among the top; entries that do not differ never are."""
        size = self.difference(name).abs().float()
        return (size >= self.threshold) & (size > 0)

    def _threshold(self, top: float) -> float:
        """The k-th largest ``|difference|``, exactly, without ever holding more than one tensor.

        The bits of a positive float32, read as an integer, are in the order of the numbers:
        counting by their upper 16 bits finds the bin of the k-th, counting by the lower ones finds
        it within its bin.
        """
        n = sum(self._bits(name).numel() for name in self.harm.file_of)
        rank = int(n * top / 100)  # among the largest; 1 is the largest itself
        if rank == 0:
            return float("inf")
        upper = sum(
            (
                torch.bincount(self._bits(name) >> 16, minlength=1 << 15)
                for name in self.harm.file_of
            ),
            torch.zeros(1 << 15, dtype=torch.int64),
        )
        bin_, above = _bin_of(upper, rank)
        lower = torch.zeros(1 << 16, dtype=torch.int64)
        for name in self.harm.file_of:
            bits = self._bits(name)
            lower += torch.bincount(bits[bits >> 16 == bin_] & 0xFFFF, minlength=1 << 16)
        rest, _ = _bin_of(lower, rank - above)
        return torch.tensor([(bin_ << 16) + rest], dtype=torch.int32).view(torch.float32).item()

    def _bits(self, name: str) -> Tensor:
        return self.difference(name).abs().float().flatten().view(torch.int32)


def _bin_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """Bin that holds the value of a rank counted from the largest, and how many are in larger
    bins.
    """
    from_largest = counts.double().flip(0).cumsum(0)
    place = int((from_largest >= rank).nonzero()[0])
    return len(counts) - 1 - place, int(from_largest[place - 1]) if place else 0


def _originals(names: list[str], model: ModelFolder, vector: HarmVector) -> Iterator[Tensor]:
    for name in names:
        index = vector.mask(name).flatten().nonzero()[:, 0]
        yield index
        values = model.tensor(name).flatten()[index]
        assert NAMES[values.dtype] == model.place(name).dtype
        yield values
