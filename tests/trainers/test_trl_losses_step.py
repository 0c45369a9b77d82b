"""Whatever the loss of TRL: the next step from its checkpoint and recorded rollouts is TRL's own.

GRPOTrainer takes step 6 while its rollouts are recorded; from checkpoint-5 and these rollouts v must be
(theta_6 - theta_5) / lr, tensor by tensor, and the loss and its metrics what the trainer logged. A few
of the combinations; all are in test_trl_losses_grid.py.
"""

import pytest

from support.trl_cases import CASES, GENERAL, LAYOUTS
from support.trl_comparison import require_the_step
from support.trl_training import train


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        ("dapo", "half of a generation"),
        ("bnpo", GENERAL),
        ("luspo", "second"),
        ("cispo", GENERAL),
        ("dapo", "several generations"),
        ("vespo", "several generations"),
        ("sapo", "second"),
        ("vespo", "second"),
        ("kl", "first"),
        ("adaptive entropy", "second"),
        ("quantile of grpo, entropy and kl", GENERAL),
        ("truncated", "first, accumulated"),
        ("vllm, token_mask, off-policy mask", "half of a generation, accumulated"),
        ("rollout_func, off-policy mask", "second"),
    ],
)
def test_next_step_is_the_one_trl_takes(case, layout, checkpoint, tmp_path):
    settings, seen, prepare = CASES[case]
    step = train(checkpoint, tmp_path, prepare, **(settings | LAYOUTS[layout]))
    require_the_step(step, seen if layout == GENERAL else [])
