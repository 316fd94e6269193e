"""Edits that remove or mask weights tied to harm: Safety Arithmetic, step 1 (Hazra et al. 2024,
arXiv 2406.11801), and the weight masks of Antidote and SOMF.
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
    check_output_folder,
    check_same_network,
    edit_card,
    write_edited_model,
    write_tensors,
)
from temper.errors import TemperError
from temper.models.weight_files import TensorInfo

# -- harm direction removal

# Suffixes of tensor names in ORIGINALS.
INDEX = "#index"
VALUES = "#values"


def remove_harm(
    model: str, harm: str, base: str, out: str, lam: float = 1.0, top: float = 10.0
) -> None:
    """Write theta - lam * topK(theta_harm - theta_base): Safety Arithmetic's harm direction
    removal.

    The top K % of |theta_harm - theta_base| over the whole model are removed, as in the official
    code, not K % of every tensor; ties with the last one count. removed.safetensors keeps the
    original values of the entries that change, so `undo` restores the model bit for bit. lam = 0
    changes no bit.

    Args:
        model: Folder of the model to edit: the base, or a model fine-tuned from it.
        harm: Folder of the base after fine-tuning on harmful rows.
        base: Folder of the model that ``harm`` was fine-tuned from.
        out: Folder to write: new, or one that an edit wrote.
        lam: Strength.
        top: Share of entries to remove, in percent (paper: 10).

    Raises:
        TemperError: numbers out of range; folders that are no models, or not the same network; a
            difference that is not finite.
    """
    if lam < 0:
        raise TemperError(f"--lam={lam}: give a number >= 0 (0 changes nothing)")
    if not 0 < top <= 100:
        raise TemperError(f"--top={top}: give a percentage in (0, 100] (the paper's is 10)")
    edited = ModelFolder("model", model)
    harmful = ModelFolder("harm", harm)
    start = ModelFolder("base", base)
    check_same_network(edited, harmful, start)
    target = check_output_folder(out, edited, harmful, start)
    vector = HarmVector(harmful, start, top)
    counts = {name: int(vector.mask(name).sum()) if lam else 0 for name in edited.file_of}
    settings = {
        "lam": lam,
        "top": top,
        "threshold": vector.threshold,
        "entries_changed": sum(counts.values()),
    }
    card = edit_card("remove-harm", settings, edited, harmful, start)

    def edited_tensor(name: str) -> Tensor:
        theta = edited.tensor(name)
        if not counts[name]:
            return theta
        return subtract_masked(theta, vector.difference(name), vector.mask(name), lam)

    def write_originals(folder: Path) -> None:
        changed = [name for name, n in counts.items() if n]
        infos = {}
        for name in changed:
            infos[name + INDEX] = TensorInfo("I64", (counts[name],))
            infos[name + VALUES] = TensorInfo(edited.info(name).dtype, (counts[name],))
        write_tensors(folder / ORIGINALS, infos, _original_entries(changed, edited, vector))

    write_edited_model(edited, target, edited_tensor, card, write_originals)


def undo(model: str, out: str) -> None:
    """Restore the model that remove-harm edited, bit for bit.

    Args:
        model: Folder that remove-harm wrote.
        out: Folder to write: new, or one that an edit wrote.

    Raises:
        TemperError: the folder holds no removed.safetensors.
    """
    edited = ModelFolder("model", model)
    path = edited.path / ORIGINALS
    if not path.exists():
        raise TemperError(
            f"--model={model}: no {ORIGINALS} in it; give a folder that remove-harm wrote,"
            " unchanged"
        )
    target = check_output_folder(out, edited)
    with safe_open(path, framework="pt") as originals:
        kept = set(originals.keys())

        def restored_tensor(name: str) -> Tensor:
            theta = edited.tensor(name)
            if name + INDEX in kept:
                index = originals.get_tensor(name + INDEX)
                theta.view(-1)[index] = originals.get_tensor(name + VALUES)
            return theta

        write_edited_model(edited, target, restored_tensor, edit_card("undo", {}, edited))


def subtract_masked(theta: Tensor, difference: Tensor, mask: Tensor, lam: float) -> Tensor:
    """``theta - lam * mask * difference``, computed in the dtype of the difference and rounded
    once; entries outside the mask keep their bits.
    """
    return torch.where(mask, (theta.to(difference.dtype) - lam * difference).to(theta.dtype), theta)


class HarmVector:
    """``topK(theta_harm - theta_base)`` over a whole model, computed tensor by tensor.

    Args:
        harm: The model fine-tuned on harmful rows.
        base: The model it was fine-tuned from.
        top: Percentage of entries to keep.

    Attributes:
        threshold: Smallest ``|theta_harm - theta_base|`` that is kept.
    """

    def __init__(self, harm: ModelFolder, base: ModelFolder, top: float) -> None:
        self.harm = harm
        self.base = base
        self.threshold = self._find_threshold(top)

    def difference(self, name: str) -> Tensor:
        """``theta_harm - theta_base`` of one tensor, in at least float32; 0 for integer tensors.

        Raises:
            TemperError: it is not finite.
        """
        harm = self.harm.tensor(name)
        if not harm.is_floating_point():
            return torch.zeros(harm.shape)
        exact = torch.promote_types(harm.dtype, torch.float32)
        difference = harm.to(exact) - self.base.tensor(name).to(exact)
        if not difference.isfinite().all():
            raise TemperError(
                f"--harm={self.harm.path}: {name} is not finite; its training diverged, so train it"
                " again, for example at a lower learning rate"
            )
        return difference

    def mask(self, name: str) -> Tensor:
        """Mask of the entries of one tensor that are among the top; never those that are equal."""
        size = self.difference(name).abs().float()
        return (size >= self.threshold) & (size > 0)

    def _find_threshold(self, top: float) -> float:
        """The k-th largest ``|difference|``, exactly, with one tensor in memory at a time.

        Read as integers, the bits of positive float32 numbers have the same order as the numbers.
        A histogram over the upper 16 bits gives the bin of the k-th largest; a second one, over the
        lower 16 bits of that bin's entries, gives its value.
        """
        n = sum(self._difference_bits(name).numel() for name in self.harm.file_of)
        k = int(n * top / 100)
        if k == 0:
            return float("inf")
        upper = torch.zeros(1 << 15, dtype=torch.int64)
        for name in self.harm.file_of:
            upper += torch.bincount(self._difference_bits(name) >> 16, minlength=1 << 15)
        upper_bits, n_larger = _bin_of_kth_largest(upper, k)
        lower = torch.zeros(1 << 16, dtype=torch.int64)
        for name in self.harm.file_of:
            bits = self._difference_bits(name)
            lower += torch.bincount(bits[bits >> 16 == upper_bits] & 0xFFFF, minlength=1 << 16)
        lower_bits, _ = _bin_of_kth_largest(lower, k - n_larger)
        bits = torch.tensor([(upper_bits << 16) + lower_bits], dtype=torch.int32)
        return bits.view(torch.float32).item()

    def _difference_bits(self, name: str) -> Tensor:
        """``|difference|`` in float32, its bits read as int32; flat."""
        return self.difference(name).abs().float().flatten().view(torch.int32)


def _bin_of_kth_largest(counts: Tensor, k: int) -> tuple[int, int]:
    """Bin of a histogram that holds the k-th largest value, and the number of values in larger
    bins.
    """
    from_largest = counts.double().flip(0).cumsum(0)
    place = int((from_largest >= k).nonzero()[0])
    n_larger = int(from_largest[place - 1]) if place else 0
    return len(counts) - 1 - place, n_larger


def _original_entries(names: list[str], model: ModelFolder, vector: HarmVector) -> Iterator[Tensor]:
    """For each tensor, the flat index of the entries that change, then their values."""
    for name in names:
        index = vector.mask(name).flatten().nonzero()[:, 0]
        yield index
        values = model.tensor(name).flatten()[index]
        assert NAMES[values.dtype] == model.info(name).dtype
        yield values


# -- masks over weights: pure functions of tensors; `O` outputs of a linear layer, `I` inputs


def wanda_top(weight_OI: Tensor, mean_square_I: Tensor, ratio: float) -> Tensor:
    """Mask of the entries with the highest Wanda scores ``|W| * sqrt(mean x^2)`` of their row (Sun
    et al. 2023, arXiv 2306.11695).

    Args:
        weight_OI: Weight of a linear layer; a row is one output.
        mean_square_I: Mean square of each input over tokens, up to a factor.
        ratio: Share of a row, rounded up to whole entries: ``I - floor(I * (1 - ratio))``, as in
            Antidote's code.

    Returns:
        ``O x I``, bool: the top of every row; among equal scores, the entries further right.
    """
    n_inputs = weight_OI.shape[1]
    n_top = n_inputs - int(n_inputs * (1 - ratio))
    score_OI = weight_OI.abs() * mean_square_I.sqrt()
    top_OI = score_OI.argsort(dim=1, stable=True)[:, n_inputs - n_top :]
    return torch.zeros_like(weight_OI, dtype=torch.bool).scatter_(1, top_OI, True)


def relaxed_bernoulli(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Sample of the relaxed Bernoulli distribution ``sigmoid((logits + logit(u)) / temperature)``
    (Maddison et al. 2016, arXiv 1611.00712).

    Args:
        logits: Log-odds of each entry.
        uniform: Uniform random numbers in [0, 1), of the same shape.
        temperature: As it approaches 0, samples approach 0 or 1.
    """
    tiny = torch.finfo(uniform.dtype).eps
    return torch.sigmoid((logits + uniform.clamp(tiny, 1 - tiny).logit()) / temperature)


def fuse(safe: Tensor, tau: Tensor, mask: Tensor, w: float) -> Tensor:
    """``safe + w * mask * tau / mean(mask)``: add a masked task vector to a safe model (SOMF).

    Args:
        safe: Weight of the safe model.
        tau: Task vector: fine-tuned weight minus safe weight.
        mask: Entries in [0, 1]; the mean is over this tensor.
        w: Strength.
    """
    return safe + w * mask * tau / mask.mean()
