"""Activations of a decoder: recording them, and removing or adding a direction for a while.

All of it is done with hooks on the Hugging Face modules; no weight changes, and the hooks are gone
when a ``with`` block ends, also by an error.

The *residual stream* is what decoder layers pass on: the input of a layer, and the output of the
one before it.

Shapes: `B` prompts, `P` positions, `T` time, `D` width, `L` layers.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from temper.models.blocks import attention_blocks, decoder_layers, mlp_blocks, refuse_reentrant

# Where a layer norms what a block wrote before adding it to the residual stream: the norms after
# attention and after the MLP (Gemma 2 and 3, OLMo 2; GLM-4).
WRITE_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)

# -- recording


@contextmanager
def record_outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the outputs of modules, in the order of their calls, in the list that is yielded.

    Of a tuple the first member is collected.

    Raises:
        TemperError: when a module is called without gradient inside a pass that has it.
    """
    outputs: list[Tensor] = []
    has_gradient = torch.is_grad_enabled()

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if has_gradient:
            refuse_reentrant()
        outputs.append(_first(output))

    with ExitStack() as hooks:
        for module in modules:
            _until_end(hooks, module.register_forward_hook(record))
        yield outputs


@contextmanager
def record_inputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the hidden states that modules read, in the order of their calls."""
    inputs: list[Tensor] = []

    def record(_module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    with ExitStack() as hooks:
        for module in modules:
            _until_end(hooks, module.register_forward_pre_hook(record, with_kwargs=True))
        yield inputs


@torch.no_grad()
def last_residuals(network: nn.Module, ids_BT: Tensor, mask_BT: Tensor, n_positions: int) -> Tensor:
    """Residual stream at the input of every layer, at the last positions of prompts.

    Args:
        network: A causal LM, or PEFT's wrapper around one; its training mode is restored.
        ids_BT: Token ids, padded on the left.
        mask_BT: Attention mask.
        n_positions: How many positions, the last one of the prompt among them.

    Returns:
        ``B x L x P x D``, at least float32, positions in the order of the text.
    """
    with record_inputs(decoder_layers(network)) as inputs:
        run_prompts(network, ids_BT, mask_BT)
    return torch.stack([exact(x[:, -n_positions:]) for x in inputs], dim=1)


@torch.no_grad()
def run_prompts(network: Any, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Logits of the token after each prompt, ``B x V``, at least float32.

    Args:
        network: As in `last_residuals`.
        ids_BT: Token ids, padded on the left. Positions count from each prompt's first token, as
            in generation.
        mask_BT: Attention mask.
    """
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    base = network.get_base_model() if hasattr(network, "get_base_model") else network
    known = inspect.signature(base.forward).parameters
    if "position_ids" in known:
        inputs["position_ids"] = (mask_BT.long().cumsum(-1) - 1).clamp(min=0)
    fewer = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    was_training = network.training
    network.eval()
    try:
        return exact(network(**inputs, **fewer, use_cache=False).logits[:, -1])
    finally:
        network.train(was_training)


# -- changing the residual stream


@contextmanager
def ablated(network: nn.Module, direction_D: Tensor) -> Iterator[None]:
    """Remove a direction from the residual stream: ``x <- x - r (r . x)``, r of length 1, after
    the embedding and after every write of an attention or MLP block (Arditi et al. 2024,
    arXiv 2406.11717, section 2.4).

    Args:
        network: A causal LM, or PEFT's wrapper around one.
        direction_D: The direction, of any length but 0.
    """
    direction_D = exact(direction_D) / exact(direction_D).norm()

    def project(x: Tensor) -> Tensor:
        r = direction_D.to(x.device)
        x_exact = exact(x)
        return (x_exact - (x_exact @ r.to(x_exact)).unsqueeze(-1) * r.to(x_exact)).to(x.dtype)

    layers = decoder_layers(network)
    with ExitStack() as hooks:
        _until_end(hooks, change_input(layers[0], project))
        # The layers' outputs too: some layers add more than their two blocks write.
        for module in [*residual_writes(network), *layers]:
            _until_end(hooks, change_output(module, project))
        yield


@contextmanager
def added(network: nn.Module, layer: int, vector_D: Tensor) -> Iterator[None]:
    """Add a vector to the residual stream at the input of one layer, at every position.

    Args:
        network: A causal LM, or PEFT's wrapper around one.
        layer: Number of the layer, from 0.
        vector_D: The vector, added as it is.
    """

    def add(x: Tensor) -> Tensor:
        x_exact = exact(x)
        return (x_exact + vector_D.to(x_exact)).to(x.dtype)

    with ExitStack() as hooks:
        _until_end(hooks, change_input(decoder_layers(network)[layer], add))
        yield


def residual_writes(network: nn.Module) -> list[nn.Module]:
    """Return the modules whose outputs are added to the residual stream, two of each layer.

    The attention and the MLP block; or the norms behind them, where a layer has those.

    Raises:
        TemperError: as `temper.models.blocks.attention_blocks` and `mlp_blocks`.
    """
    blocks = zip(attention_blocks(network), mlp_blocks(network), strict=True)
    writes: list[nn.Module] = []
    for layer, pair in zip(decoder_layers(network), blocks, strict=True):
        norms = next(
            (
                [getattr(layer, name) for name in names]
                for names in WRITE_NORMS
                if all(hasattr(layer, name) for name in names)
            ),
            pair,
        )
        writes.extend(norms)
    return writes


def exact(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is if it has more precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def change_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Pass a module's output, or the first member of a tuple, through a function until the returned
    hook is removed.
    """

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        return (change(output[0]), *output[1:])

    return module.register_forward_hook(hook)


def change_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """The same for the hidden states that a module reads."""

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _until_end(hooks: ExitStack, handle: RemovableHandle) -> None:
    hooks.callback(handle.remove)


def _first(output: Any) -> Tensor:
    """Hidden states of a module's output, which some architectures return in a tuple."""
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor
