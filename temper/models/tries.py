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
    """What a causal LM does to its logits beside the product with its output layer; None if nothing.

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
    hook = head.register_forward_hook(replace)
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

    * Another first sequence must not change the logits of the second in a single bit, since what is
      hidden is multiplied by zero in every precision; a few units in the last place are allowed if
      they are nothing beside the change where the second does attend (experts of a mixture get
      other batches). That change must be visible, or the try says nothing and packing is left out.
    * Packed, the logits must be far nearer to those of the sequence alone than to those of one long
      sequence: positions begin anew.
    """
    first, other, second = (_sequence(network, start) for start in (1, 21, 9))
    positions = torch.arange(LENGTH, device=second.device).repeat(2)[None]

    def logits(ids: Tensor, **inputs: Tensor) -> Tensor:
        out: Tensor = network(input_ids=ids, use_cache=False, **inputs).logits[0, -LENGTH:]
        return out

    try:
        with _evaluating(network):
            pairs = [torch.cat([before, second], dim=1) for before in (first, other)]
            packed, changed = (logits(pair, position_ids=positions) for pair in pairs)
            # With a mask that shows everything, networks do not look for sequences by position.
            attending, moved = (
                logits(pair, position_ids=positions, attention_mask=torch.ones_like(pair))
                for pair in pairs
            )
            alone = logits(second)
            joined = logits(pairs[0])
    except TypeError:  # it takes no position_ids
        return False
    eps = torch.finfo(packed.dtype).eps
    packed, changed, attending, moved, alone, joined = (
        value.float() for value in (packed, changed, attending, moved, alone, joined)
    )
    leak = (packed - changed).norm()
    visible = (attending - moved).norm()
    rounded = (leak <= NOISE * eps * packed.norm()) & (leak < 1e-2 * visible)
    apart = torch.where(leak == 0, visible > 0, rounded)
    error = (packed - alone).norm()
    precise = eps < 1e-5
    near = error < (1e-3 if precise else 0.1) * (joined - alone).norm()
    if precise:
        near = near | (error <= NOISE * eps * alone.norm())
    return bool(apart & near)
