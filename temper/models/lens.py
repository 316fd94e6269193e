"""The logit lens: predictions from hidden states, by the network's final norm and output layer.

Shapes: `...` any leading dimensions, `T` time, `D` width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from temper.errors import TemperError
from temper.losses import MeanTerms, hidden_logps, token_logps
from temper.models.blocks import decoder_layers, refuse_reentrant
from temper.models.score import output_layer

FINAL_NORMS = (
    "norm",  # Llama, Mistral, Gemma, Qwen
    "ln_f",  # GPT-2
    "final_layer_norm",  # GPT-NeoX, OPT
    "final_layernorm",  # Phi
    "norm_f",  # MPT
)


def final_norm_and_head(network: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """Return the final norm and the output layer of a causal LM.

    Args:
        network: A transformers causal LM, or PEFT's wrapper around one.

    Raises:
        TemperError: the logits are not simply the output layer of the normed hidden state; or the
            final norm has a name that is not in `FINAL_NORMS`.
    """
    lm: Any = network
    if hasattr(lm, "get_base_model"):
        lm = lm.get_base_model()
    name = type(lm).__name__
    try:
        _, head = output_layer(network)
    except TemperError:
        raise TemperError(
            "model.init_args.network: the logit lens reads hidden states through the output layer,"
            f" and that of {name} is not a plain Linear whose outputs are the logits (it is"
            " adapted, capped or scaled); use another model, or switch the lens off (alpha=0)"
        ) from None
    layers = decoder_layers(network)
    decoders = [
        module
        for module in lm.modules()
        if any(
            isinstance(child, nn.ModuleList) and len(child) and child[0] is layers[0]
            for child in module.children()
        )
    ]
    norms = [
        getattr(decoder, norm)
        for decoder in decoders
        for norm in FINAL_NORMS
        if isinstance(getattr(decoder, norm, None), nn.Module)
    ]
    if len(norms) != 1:
        raise TemperError(
            f"model.init_args.network: {name} has no final norm under a known name"
            f" ({', '.join(FINAL_NORMS)}), which the logit lens needs; use a model such as Llama,"
            " Gemma, Qwen or GPT-2, or switch the lens off (alpha=0)"
        )
    return norms[0], head


def lens_nll(
    hidden: Sequence[Tensor], labels: Tensor, norm: nn.Module, head: nn.Linear, fused: bool = False
) -> MeanTerms:
    """Logit-lens NLL of the labels: mean over labelled tokens and over hidden states, in nats.

    ``-mean_l mean_t log softmax(head(norm(h_l)))[label]``

    Args:
        hidden: Hidden states ``... x T x D`` in Hugging Face's order; the last one is already
            normed.
        labels: Token ids, ``... x T``, `IGNORE_INDEX` where the token does not count.
        norm: The network's final norm.
        head: Its output layer.
        fused: Compute in chunks, without all logits of a hidden state at once (`hidden_logps`).
    """
    total: Any = 0.0
    for state in [*(norm(h) for h in hidden[:-1]), hidden[-1]]:
        if fused:
            logps, mask = hidden_logps(state, head.weight, labels, head.bias)
        else:
            logps, mask = token_logps(head(state), labels)
        total = total - logps.sum()
    return MeanTerms(total, mask.sum() * len(hidden))


@contextmanager
def record_outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the outputs of modules, in the order of their calls, in the list that is yielded.

    Raises:
        TemperError: when a module is called without gradient inside a pass that has it.
    """
    outputs: list[Tensor] = []
    has_gradient = torch.is_grad_enabled()

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if has_gradient:
            refuse_reentrant()
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_hook(record) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
