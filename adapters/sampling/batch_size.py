"""sampling.generation_batch = "auto": as many sequences at once as half of the free memory holds."""

from typing import Any

from funcprobe.policy.placement import devices_of

from ..checkpoint.model import Policy
from ..config.schema import SamplingConfig
from ..machine import memory

MOST = {"cpu": 64, "cuda": 512}  # larger batches are hardly faster
# Of a token's row over the vocabulary: logits as the model has them, generate()'s float32 copy, the
# weights, their sums in float64, and the scores of the drawn token.
BYTES_OF_A_LOGIT = 4 + 4 + 4 + 8 + 4


def batch_size(policy: Policy, config: SamplingConfig, longest: int) -> int:
    """`generation_batch`, or the number found for "auto"; at least 1.

    `longest`: tokens of the longest prompt. Every sequence is counted with the longest response.
    """
    if config.generation_batch != "auto":
        return config.generation_batch
    devices = devices_of(policy.model)
    vocabulary = len(policy.model.get_input_embeddings().weight)
    sequence = (longest + config.max_new_tokens) * bytes_of_a_token(policy.model)
    room = memory.free(*devices) / 2
    return max(
        1,
        min(
            MOST.get(devices[0].type, MOST["cuda"]),
            int(room / (sequence + vocabulary * BYTES_OF_A_LOGIT)),
        ),
    )


def bytes_of_a_token(model: Any) -> int:
    """Of a token in the cache: keys and values of every layer, in the model's dtype."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    pairs = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * pairs * width * model.dtype.itemsize)
