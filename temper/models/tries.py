"""What a network does, found by trying it: whether its logits are its output layer's, and whether
sequences that are packed into one row stay apart.

Names of classes and settings do not tell: models that scale, cap or mask something come out every
month. All tries are forward passes over a few tokens, without gradient.

Shapes: `B` rows, `T` time, `V` vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LENGTH = 6  # tokens of a sequence
WIDEST = 60.0  # largest of the logits that are put in the place of the output layer's
NOISE = 16  # units in the last place that two ways to compute the same may differ by


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(was_training)


def _sequence(network: nn.Module, start: int) -> Tensor:
    """Tokens of a short sequence, ``1 x LENGTH``."""
    size = min(int(getattr(network.config, "vocab_size", 64)), 64)
    device = next(network.parameters()).device
    return torch.arange(start, start + LENGTH, device=device).remainder(size)[None]


def changed_logits(lm: nn.Module, decoder: nn.Module, head: nn.Module) -> str | None:
    """What a causal LM does to its logits beside the product with its output layer, if anything.

    The output layer is made to give logits of a wide range, in which any cap, scale, bias or mask
    after it shows, however small the network's own logits are; and its input is compared with the
    decoder's last hidden states.

    Args:
        lm: The causal LM, without PEFT's wrapper.
        decoder: Gives the last hidden states.
        head: The output layer.
    """
    inputs: list[Tensor] = []
    given: list[Tensor] = []

    def replace(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        inputs.append(args[0])
        row_V = torch.linspace(-WIDEST, WIDEST, output.shape[-1], device=output.device)
        given.append(row_V.to(output.dtype).expand_as(output))
        return given[-1]

    ids = _sequence(lm, 1)
    hook = head.register_forward_hook(replace, prepend=True)  # other hooks change what it gives
    try:
        with _evaluating(lm):
            logits = lm(input_ids=ids, use_cache=False).logits
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        hook.remove()
    if not inputs or inputs[0].shape != hidden.shape or logits.shape != given[0].shape:
        return "computes its logits in a way of its own"
    for what, found, wanted in (
        ("scales or changes hidden states before its output layer", inputs[0], hidden),
        ("caps, scales or masks its logits after its output layer", logits, given[0]),
    ):
        room = NOISE * max(torch.finfo(value.dtype).eps for value in (found, wanted))
        if not (found - wanted).float().norm() <= room * wanted.float().norm():
            return what
    return None


def isolates_packed_sequences(network: nn.Module) -> bool:
    """Whether sequences that are packed into one row do not see each other, and are what they are
    alone.

    * Another first sequence must change no module's outputs for the second, down to the bits: what
      is hidden is multiplied by zero in every precision. (Rounding is allowed for: experts of a
      mixture get other batches.) Outputs of modules are compared, because a leak may be scaled down
      behind the module, and hidden by rounding in the logits. Where the second sequence is allowed
      to attend, the change must be visible, or the try says nothing and nothing is packed.
    * Packed, the logits must be far nearer to those of the sequence alone than to those of one long
      sequence: positions begin anew.
    """
    first, second = (_sequence(network, start) for start in (1, 9))
    pairs = [torch.cat([before, second], dim=1) for before in (first, first.flip(1))]
    positions = torch.arange(LENGTH, device=second.device).repeat(2)[None]
    # With a mask that shows everything, networks do not look for sequences by position.
    everything = {"position_ids": positions, "attention_mask": torch.ones_like(pairs[0])}
    try:
        with _evaluating(network):
            packed, hidden = (_outputs(network, pair, position_ids=positions) for pair in pairs)
            attending, moved = (_outputs(network, pair, **everything) for pair in pairs)
            joined = network(input_ids=pairs[0], use_cache=False).logits[0, -LENGTH:].float()
            alone = network(input_ids=second, use_cache=False).logits[0].float()
    except TypeError:  # it takes no position_ids
        return False
    if _differ(packed, hidden) or not _differ(attending, moved):
        return False
    logits = packed[-1]
    eps = torch.finfo(logits.dtype).eps
    error = (logits.float() - alone).norm()
    precise = eps < 1e-5
    near = error <= (1e-3 if precise else 0.1) * (joined - alone).norm()
    if precise:
        near = near | (error <= NOISE * eps * alone.norm())
    return bool(near)


def _outputs(network: nn.Module, ids: Tensor, **inputs: Tensor) -> list[Tensor]:
    """Outputs of the network's modules for the second sequence of a row, the logits last. Of
    compiled networks, which do not call their modules, the logits alone.
    """
    found: list[Tensor] = []

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        floats = isinstance(output, Tensor) and output.is_floating_point()
        if floats and output.shape[:2] == ids.shape:
            found.append(output[0, -LENGTH:])

    modules = list(network.modules())
    if any(getattr(module, "_compiled_call_impl", None) for module in modules):
        modules = []
    hooks = [module.register_forward_hook(record) for module in modules]
    try:
        logits = network(input_ids=ids, use_cache=False, **inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    return [*found, logits[0, -LENGTH:]]


def _differ(outputs: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two runs of a network differ in any module by more than rounding."""
    return len(outputs) != len(others) or any(
        bool((a.float() - b.float()).norm() > torch.finfo(a.dtype).eps * a.float().norm())
        for a, b in zip(outputs, others, strict=True)
    )
