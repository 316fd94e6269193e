"""Memory of activations: bytes that a forward pass keeps for the backward pass.

The terms follow transformers' decoders as they compute today; a test compares them with what
torch's allocator hands out. Per token of a micro-batch: `D` width, `I` inner width of the MLP, `Q`
query heads times head width, `V` vocabulary, `T` tokens per sequence; an activation element has
``e`` bytes.
"""

from dataclasses import dataclass

from temper.plan.cost import FLOAT32_BYTES, Setup
from temper.plan.shapes import Linear, ModelShape, adapted_linears


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch.

    Attributes:
        saved: Saved for the backward pass over all layers, given the checkpointing setting.
        layer: Peak in the backward pass of one layer: its activations and temporary tensors.
        backward: What the backward pass of a layer adds to ``saved``: temporary tensors and, with
            checkpointing, recomputed activations.
        logits: Peak around the loss: saved and temporary tensors, as if every token were labelled.
        head_gradient: Gradient of the output layer, alive when the layers' backward pass begins.
    """

    saved: int
    layer: int
    backward: int
    logits: int
    head_gradient: int = 0

    @property
    def peak(self) -> dict[str, int]:
        """Bytes by component at the start of the backward pass: at the loss or in the last layer,
        whichever is larger.
        """
        if self.logits >= self.backward + self.head_gradient:
            return {"activations": self.saved, "logits": self.logits}
        return {
            "activations": self.saved + self.backward,
            "logits": 0,
            "gradients": self.head_gradient,
        }


def estimate_activations(
    shape: ModelShape, setup: Setup, sequences: int, trains: bool = True, lens: bool = False
) -> Activations:
    """Estimate the activations of a micro-batch.

    Args:
        shape: Shape of the network.
        setup: Precision, checkpointing, adapter and sequence length.
        sequences: Sequences in the micro-batch.
        trains: Whether gradients of weights are computed; otherwise linear layers save no inputs.
        lens: Whether logits are computed from the hidden states of every layer.
    """
    tokens = sequences * setup.sequence_length
    e = setup.activation_bytes
    trains_all = trains and setup.lora is None
    layer = tokens * _layer_bytes(shape, setup, trains)
    inner = _linear_at(shape, "mlp_out").inputs
    temporary = tokens * (inner * e + shape.width * (FLOAT32_BYTES + e))
    temporary += _dequantized_bytes(shape, setup)
    if setup.activation_checkpointing:  # only the input of each layer is saved
        mixed = setup.precision == "bf16-mixed" and setup.dtype == "float32"
        saved = shape.layers * tokens * shape.width * (FLOAT32_BYTES if mixed else e)
    else:
        saved = shape.layers * layer
    # Final norm and input of the output layer.
    saved += tokens * shape.width * (FLOAT32_BYTES + (2 * e if trains_all else 0))
    logits = tokens * _loss_bytes(shape, setup)
    if lens:
        logits += tokens * shape.layers * FLOAT32_BYTES * shape.vocabulary
    logits += _fused_loss_matrices(shape, setup, trains_all)
    return Activations(
        saved=saved,
        layer=layer + temporary,
        backward=temporary + (layer if setup.activation_checkpointing else 0),
        logits=logits,
        head_gradient=FLOAT32_BYTES * shape.vocabulary * shape.width if trains_all else 0,
    )


def _layer_bytes(shape: ModelShape, setup: Setup, trains: bool) -> int:
    """Saved activations of one decoder layer, per token."""
    e = setup.activation_bytes
    q = _linear_at(shape, "attention_out").inputs
    inner = _linear_at(shape, "mlp_out").inputs
    # Norms compute in float32; if their weights are trained, they save the normalised values too.
    trains_norms = trains and setup.lora is None
    per_norm = shape.width * (FLOAT32_BYTES + (e if trains_norms else 0)) + FLOAT32_BYTES
    gated = sum(x.layer == 0 and x.place == "mlp_in" for x in shape.linears) > 1
    # Gated: gate, up, act(gate). Others: GPT-2's activation is composed of several operations.
    mlp = (3 if gated else 6) * inner * e
    inputs = _linear_inputs(shape, setup) if trains else 0
    return shape.norms * per_norm + _attention_bytes(shape, setup, q) + mlp + inputs


def _attention_bytes(shape: ModelShape, setup: Setup, q: int) -> int:
    """Queries, keys, values (repeated for every head) and outputs; per token also its scores
    (eager) or its row of the mask.
    """
    e = setup.activation_bytes
    length = setup.sequence_length
    if setup.attention == "eager" or shape.capped:
        # Softmax in float32, its rounded copy, scores before the cap.
        score = FLOAT32_BYTES + (e if e < FLOAT32_BYTES else 0) + (e if shape.capped else 0)
        return 4 * q * e + shape.heads * length * score
    return 4 * q * e + shape.heads * FLOAT32_BYTES + length * e


def _linear_inputs(shape: ModelShape, setup: Setup) -> int:
    """Saved inputs of the linear layers that are trained, or that have an adapter."""
    first_layer = [linear for linear in shape.linears if linear.layer == 0]
    if setup.lora is None:
        return _shared_inputs(first_layer, setup)
    names = {linear.name for linear in adapted_linears(shape, setup.lora)}
    chosen = [linear for linear in first_layer if linear.name in names]
    element = 2 if setup.precision == "bf16-mixed" else FLOAT32_BYTES
    between_a_and_b = len(chosen) * setup.lora.rank * element
    if setup.precision == "32-true" and setup.activation_bytes == FLOAT32_BYTES:
        return between_a_and_b + _shared_inputs(chosen, setup)
    # Every adapter converts its input and saves its own copy.
    return between_a_and_b + sum(linear.inputs for linear in chosen) * element


def _shared_inputs(chosen: list[Linear], setup: Setup) -> int:
    """Saved inputs, where layers with the same input save it once.

    Autocast converts (and saves) it for each layer. The input of the attention's output layer is
    counted with the attention.
    """
    inputs: dict[object, int] = {}
    for linear in chosen:
        if linear.place != "attention_out":
            inputs[linear.name if setup.casts_weights else linear.place] = linear.inputs
    return sum(inputs.values()) * setup.activation_bytes


def _loss_bytes(shape: ModelShape, setup: Setup) -> int:
    """Logits, their float32 copy and log-probabilities per token; in the backward pass their
    gradients take the same room.
    """
    if setup.fused_loss:
        # Float32 hidden states, their gradient, and a chunk of logits of the same size.
        return 3 * FLOAT32_BYTES * shape.width
    capped = shape.vocabulary * setup.activation_bytes if shape.capped else 0
    return 3 * FLOAT32_BYTES * shape.vocabulary + capped


def _fused_loss_matrices(shape: ModelShape, setup: Setup, trains_all: bool) -> int:
    """A float32 copy of the output matrix, and its gradient, which the fused loss makes while all
    activations are alive.
    """
    if not setup.fused_loss:
        return 0
    matrices = (setup.weight_bytes < FLOAT32_BYTES) + trains_all
    return matrices * FLOAT32_BYTES * shape.vocabulary * shape.width


def _dequantized_bytes(shape: ModelShape, setup: Setup) -> int:
    """The largest quantized matrix, dequantized to 16 or 32 bits for its product."""
    if not setup.quantization:
        return 0
    return setup.activation_bytes * max(
        linear.inputs * linear.outputs for linear in shape.linears if linear.place != "head"
    )


def _linear_at(shape: ModelShape, place: str) -> Linear:
    return next(linear for linear in shape.linears if linear.place == place)
