"""The columns of rollouts on disk: type, meaning, and names that other programs give them."""

import pyarrow as pa

ABOUT = {
    "prompt_index": "int, required: index of the prompt and so of the group; equal for equal prompts",
    "prompt": "text, optional: the prompt as text; not used in computations",
    "response": "text, optional: the response as text; not used in computations",
    "prompt_ids": "ints, required: the prompt as given to the policy, without padding",
    "response_ids": "ints, required: the sampled tokens, up to and including the first EOS; in U also "
    "the output of tools between them, which loss_mask then excludes",
    "finish_reason": "text, optional: stop (ends in an EOS) or length (cut off); checked against "
    "response_ids; null for another reason, such as a stop string",
    "temperature": "float, required: of sampling from softmax(logits / temperature); equal in all rows",
    "reward": 'float: required for U unless objective.advantage = "rollouts", of E '
    "observed; null: not applicable",
    "advantage": 'float, optional: required for U with objective.advantage = "rollouts"',
    "sampler_logp": "floats, optional: log-probability of every response token under the program "
    "that sampled it (nats, at this temperature); in E it gives the importance ratios; in U, where NaN "
    "is unknown, a loss may correct for it",
    "step": "int, optional: the optimizer step that these responses make, so that the policy is that "
    "after one step less; equal in all rows, and checked against the checkpoint",
    "old_logp": "floats, optional: log-probability of every response token in the denominator of the "
    "loss's ratio (nats, at this temperature); without it the ratio is to the policy itself, and so 1",
    "ref_logp": "floats, optional: log-probability of every response token under the reference policy "
    "of a KL term (nats, at this temperature)",
    "loss_mask": "bools, optional: of every response token, whether it is in the loss; false for the "
    "output of a tool, and for responses left out as cut off; without it all are",
    "microbatch": "int, optional: which of the step's accumulated micro-batches, from 0; without it "
    "the step is one",
    "process": "int, optional: which of the training's processes, from 0; without it there is one",
    "generated_tokens": "float, optional: tokens in the loss of the row's whole generation batch, over "
    "all processes (TRL's num_items_in_batch); equal in all rows of a micro-batch; without it, of the "
    "file's rows",
    "entropy_coef": "float, optional: coefficient of the entropy bonus in effect at this step (per "
    "nat), 0 where there is none; equal in all rows",
}
_TYPES = {
    "prompt_index": pa.int64(),
    "prompt": pa.string(),
    "response": pa.string(),
    "prompt_ids": pa.list_(pa.int64()),
    "response_ids": pa.list_(pa.int64()),
    "finish_reason": pa.string(),
    "temperature": pa.float64(),
    "reward": pa.float64(),
    "advantage": pa.float64(),
    "sampler_logp": pa.list_(pa.float64()),
    "step": pa.int64(),
    "old_logp": pa.list_(pa.float64()),
    "ref_logp": pa.list_(pa.float64()),
    "loss_mask": pa.list_(pa.bool_()),
    "microbatch": pa.int64(),
    "process": pa.int64(),
    "generated_tokens": pa.float64(),
    "entropy_coef": pa.float64(),
}
SCHEMA = pa.schema([pa.field(n, t, metadata={"about": ABOUT[n]}) for n, t in _TYPES.items()])
"""One row per response, in Parquet (.parquet) or as JSON lines (.jsonl, .json); the metadata "about" of
a field states its meaning, and whether it is optional. In JSON lines null is the same as missing. Other
columns are allowed and ignored."""

OF_TOKENS = ("sampler_logp", "old_logp", "ref_logp", "loss_mask")  # optional; one value per token
COUNTED = ("microbatch", "process")  # optional; from 0
OF_STEP = (*COUNTED, "generated_tokens", "entropy_coef")  # optional; how the loss was called
OF_LOSS = ("ref_logp", "loss_mask", *OF_STEP)

# Names of these columns in other programs. Under such a name a column would be ignored silently.
ALIASES = {
    "prompt_index": ("group", "group_id", "group_index", "prompt_id", "uid"),
    "prompt_ids": ("prompt_token_ids", "input_ids"),
    "response_ids": ("completion_ids", "response_token_ids", "output_ids", "token_ids"),
    "reward": ("rewards", "score", "scores"),
    "advantage": ("advantages",),
    "finish_reason": ("finish_reasons", "stop_reason"),
    "sampler_logp": (
        "logprobs",
        "logps",
        "sampler_logps",
        "sampling_logps",
        "sampling_per_token_logps",
        "rollout_log_probs",
    ),
    "old_logp": ("old_logps", "old_per_token_logps", "old_log_prob", "old_log_probs", "old_logprobs"),
    "ref_logp": ("ref_logps", "ref_per_token_logps", "ref_log_prob", "ref_log_probs", "ref_logprobs"),
    "loss_mask": ("response_mask", "tool_mask", "env_mask"),
    "microbatch": ("micro_batch", "microbatch_index"),
    "process": ("process_index", "process_rank"),
    "generated_tokens": ("num_items_in_batch",),
    "entropy_coef": ("entropy_coeff",),
}
