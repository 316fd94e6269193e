"""What a forward pass keeps for the backward pass, in bytes, as transformers' decoders compute today.

Counted per token of a micro-batch: `D` width, `I` width inside the MLP, `Q` heads times their width, `V` vocabulary,
`T` tokens in a row, `e` bytes of an activation. A test holds the terms against what autograd saves.
"""

from dataclasses import dataclass

from temper.plan.setup import Setup
from temper.plan.shapes import Linear, ModelShape, adapted

FLOAT = 4


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch.

    Attributes:
        kept: For the backward pass, over all layers, with the setup's choice about checkpointing.
        layer: One layer's, with the short-lived tensors of its backward pass.
        working: Of a layer, what its backward pass adds to what is kept: those tensors, and what checkpointing computes again.
        logits: Around the loss, at its peak: what it keeps and its short-lived tensors; as if every token were labelled.
        head: Gradient of the output layer's weights, which is there when the backward pass of the layers begins.
    """

    kept: int
    layer: int
    working: int
    logits: int
    head: int = 0

    @property
    def peak(self) -> dict[str, int]:
        """The beginning of the backward pass: either at the loss, or in the last layer."""
        if self.logits >= self.working + self.head:
            return {"activations": self.kept, "logits": self.logits}
        return {"activations": self.kept + self.working, "logits": 0, "gradients": self.head}


def activations(shape: ModelShape, setup: Setup, rows: int, learns: bool = True, lens: bool = False) -> Activations:
    """Activations of a micro-batch.

    Args:
        shape: The network.
        setup: Precision, checkpointing, adapter, length of rows.
        rows: Sequences in the micro-batch.
        learns: Gradients of weights are taken; if not, linear layers keep nothing.
        lens: Logits are computed from every hidden state.
    """
    tokens, e, full = rows * setup.sequence_length, setup.activation_bytes, learns and setup.lora is None
    layer = tokens * _layer(shape, setup, learns)
    inner = _first(shape, "mlp_out").inputs
    short_lived = tokens * (inner * e + shape.width * (FLOAT + e)) + _dequantised(shape, setup)
    residual = FLOAT if setup.precision == "bf16-mixed" and setup.dtype == "float32" else e
    kept = shape.layers * (tokens * shape.width * residual if setup.activation_checkpointing else layer)
    kept += tokens * shape.width * (FLOAT + (2 * e if full else 0))  # final norm and output layer
    working = short_lived + (layer if setup.activation_checkpointing else 0)
    states = shape.layers + 1 if lens else 1
    logits = tokens * (_loss(shape, setup) + (states - 1) * FLOAT * shape.vocabulary) + _fused_weights(shape, setup, full)
    return Activations(kept, layer + short_lived, working, logits, FLOAT * shape.vocabulary * shape.width * full)


def _layer(shape: ModelShape, setup: Setup, learns: bool) -> int:
    """Of one decoder layer, per token."""
    e, full = setup.activation_bytes, learns and setup.lora is None
    q, inner = _first(shape, "attention_out").inputs, _first(shape, "mlp_out").inputs
    # In float32; where their weights learn, the normalised values too.
    norms = shape.norms * (shape.width * (FLOAT + (e if full else 0)) + FLOAT)
    gated = sum(x.layer == 0 and x.place == "mlp_in" for x in shape.linears) > 1
    mlp = (3 if gated else 6) * inner * e  # gate, up, act(gate); an activation written in steps keeps more
    return norms + _attention(shape, setup, q) + mlp + (_inputs(shape, setup) if learns else 0)


def _attention(shape: ModelShape, setup: Setup, q: int) -> int:
    """Queries, keys and values (repeated for every head), outputs; the row of scores, or of its mask."""
    e, length = setup.activation_bytes, setup.sequence_length
    if setup.attention == "eager" or shape.capped:
        scores = FLOAT + (e if e < FLOAT else 0) + (e if shape.capped else 0)  # softmax in float32, rounded, before the cap
        return 4 * q * e + shape.heads * length * scores
    return 4 * q * e + shape.heads * FLOAT + length * e


def _inputs(shape: ModelShape, setup: Setup) -> int:
    """Inputs of linear layers that learn, or whose adapter does."""
    first = [linear for linear in shape.linears if linear.layer == 0]
    if setup.lora is None:
        return _shared(first, setup)
    names = {linear.name for linear in adapted(shape, setup.lora)}
    chosen = [linear for linear in first if linear.name in names]
    width = 2 if setup.precision == "bf16-mixed" else FLOAT
    ranks = len(chosen) * setup.lora.rank * width
    if setup.precision == "32-true" and setup.activation_bytes == FLOAT:
        return ranks + _shared(chosen, setup)
    return ranks + sum(linear.inputs for linear in chosen) * width  # every adapter converts its input for itself


def _shared(chosen: list[Linear], setup: Setup) -> int:
    """Layers with the same input keep it once; that of the attention's output is kept anyway. Autocast converts for each."""
    found: dict[object, int] = {}
    for linear in chosen:
        if linear.place != "attention_out":
            found[linear.name if setup.casts_weights else linear.place] = linear.inputs
    return sum(found.values()) * setup.activation_bytes


def _loss(shape: ModelShape, setup: Setup) -> int:
    """Per token: logits, their float32 copy, log-probabilities; in the backward pass the gradients of both."""
    if setup.fused_loss:
        return 3 * FLOAT * shape.width  # float32 hidden states, their gradient, and a chunk of logits of the same size
    capped = shape.vocabulary * setup.activation_bytes if shape.capped else 0
    return 3 * FLOAT * shape.vocabulary + capped


def _fused_weights(shape: ModelShape, setup: Setup, full: bool) -> int:
    """The fused loss reads a float32 output matrix, and makes its gradient while all activations are there."""
    matrices = (setup.weight_bytes < FLOAT) + full
    return matrices * FLOAT * shape.vocabulary * shape.width if setup.fused_loss else 0


def _dequantised(shape: ModelShape, setup: Setup) -> int:
    """A layer of few bits is multiplied as a whole matrix of 16 or 32."""
    if not setup.quantization:
        return 0
    return setup.activation_bytes * max(linear.inputs * linear.outputs for linear in shape.linears if linear.place != "head")


def _first(shape: ModelShape, place: str) -> Linear:
    return next(linear for linear in shape.linears if linear.place == place)
