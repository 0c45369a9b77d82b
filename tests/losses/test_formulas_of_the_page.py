"""The coefficients in the tables of docs/losses.md, as they stand there, against the losses."""

import pytest
import torch

import funcprobe
from funcprobe import Loss, LossInputs, TokenStats
from funcprobe.losses.trl import TrlLoss, trl_loss
from funcprobe.losses.verl import VerlLoss, verl_loss
from funcprobe.policy.layout import collate, response_mask

GENERATOR = torch.Generator().manual_seed(1)
U = collate([[1]] * 8, [[2] * T for T in (4, 1, 3, 5, 2, 5, 3, 2)], [0, 0, 1, 1, 2, 2, 3, 3])
REAL = response_mask(U)
CALL = torch.tensor([0, 0, 2, 2, 1, 1, 3, 3])  # two micro-batches of two processes
P = K = 2
S, L = 3, 9
T_gen = torch.where(CALL // P == 0, 30.0, 41.0)[:, None].double()  # of two generations


def table(low, high):
    return (low + (high - low) * torch.rand(REAL.shape, generator=GENERATOR).double()) * REAL


logp, entropy = table(-3, -0.1), table(0.1, 2)
m = (REAL & (table(0, 1) > 0.1)).double()
m[:, 0] = 1
l_old, l_ref = logp + 0.6 * table(-1, 1), logp + 0.5 * table(-1, 1)
A = torch.randn(8, 1, generator=GENERATOR).double()
INPUTS = LossInputs(
    A[:, 0], m > 0, U.prompt_N, CALL // P, CALL % P, l_old, l_ref, generated_tokens_N=T_gen[:, 0]
)

T_i = m.sum(1, keepdim=True)
n_b = torch.stack([(call == CALL).sum() for call in CALL])[:, None].double()
T_b = torch.stack([m[call == CALL].sum() for call in CALL])[:, None]
N, TOKENS = len(m), m.sum()
log_r = logp - l_old
r, x = log_r.exp(), l_ref - logp
s = ((log_r * m).sum(1, keepdim=True) / T_i).exp()
Z = {
    **dict.fromkeys(("dapo", "cispo", "vespo"), K * T_gen / S),
    **dict.fromkeys(("grpo", "sapo"), P * K * n_b * T_i),
    "bnpo": P * K * T_b,
    "dr_grpo": P * K * n_b * L,
    "luspo": P * K * n_b,
}


def g(ratio, low=0.8, high=1.2, largest=torch.inf):
    """0 where the clip is active, or the bound of the ratio where A < 0."""
    active = ((ratio > high) & (A > 0)) | ((ratio < low) & (A < 0)) | ((ratio > largest) & (A < 0))
    return (~active).double()


def sapo(negative):
    tau = torch.where(A > 0, 1.0, torch.tensor(negative, dtype=torch.float64))
    gate = (tau * (r - 1)).sigmoid()
    return 4 * gate * (1 - gate) * r * A


def phi():
    log_w = (log_r * m).sum(1, keepdim=True)
    k, rate = (torch.where(A >= 0, *both) for both in ((2.0, 3.0), (3.0, 2.0)))
    return (rate * (1 - log_w.exp()) + k * log_w).exp()


def of_sequences(kind):
    return m / T_i * s * A * g(s) * (m / Z[kind]).sum(1, keepdim=True)


def geo_mean():
    pessimistic = torch.where(g(log_r, -0.2, 0.2) > 0, log_r, log_r.clamp(-0.2, 0.2))
    G = ((pessimistic * m).sum(1, keepdim=True) / T_i).exp()
    return m * G * A * g(log_r, -0.2, 0.2) / T_i / (P * n_b)


def trl(**settings):
    asked = TrlLoss(**settings, gradient_accumulation_steps=K, steps_per_generation=S)
    return trl_loss(asked._replace(max_completion_length=L))


def verl(**settings):
    return verl_loss(VerlLoss(**settings))


PLAIN = m * r * A * g(r)
SEQUENCE = {"importance_sampling_level": "sequence"}
COEFFICIENTS = {
    **{kind: (trl(loss_type=kind), PLAIN / Z[kind]) for kind in ("dapo", "grpo", "bnpo", "dr_grpo")},
    "luspo": (trl(loss_type="luspo", **SEQUENCE), m * s * A * g(s) / Z["luspo"]),
    "cispo": (
        trl(loss_type="cispo", epsilon_high=1.2),
        m * r.clamp(max=1.2) * A / Z["cispo"],
    ),
    "sapo": (trl(loss_type="sapo"), m * sapo(float(torch.tensor(1.05))) / Z["sapo"]),
    "vespo": (trl(loss_type="vespo"), m * phi() * A / Z["vespo"]),
    "epsilon_high": (trl(epsilon_high=0.05), m * r * A * g(r, high=1.05) / Z["dapo"]),
    **{f"{k} by sequence": (trl(loss_type=k, **SEQUENCE), of_sequences(k)) for k in ("dapo", "grpo")},
    "delta": (trl(delta=1.3), m * r * A * g(r, largest=1.3) / Z["dapo"]),
    "beta": (
        trl(beta=0.5, use_bias_correction_kl=False),
        (PLAIN - m * 0.5 * (1 - x.exp())) / Z["dapo"],
    ),
    "beta, corrected": (trl(beta=0.5), (PLAIN + m * 0.5 * r * x) / Z["dapo"]),
    "vanilla": (verl(clip_ratio_c=1.3), m * r * A * g(r, largest=1.3) / TOKENS),
    "gspo": (verl(loss_mode="gspo"), m * s * A * g(s) / TOKENS),
    "sapo of verl": (verl(loss_mode="sapo"), m * sapo(1.05) / (N * T_i)),
    "gpg": (verl(loss_mode="gpg", loss_agg_mode="seq-mean-token-sum"), m * A / N),
    "dro": (verl(loss_mode="dro", dro_beta=0.5), m * (A - 0.5 * log_r) / TOKENS),
    "cispo of verl": (verl(loss_mode="cispo"), m * r.clamp(0.8, 1.2) * A / TOKENS),
    "geo_mean": (verl(loss_mode="geo_mean"), geo_mean()),
    "token-sum": (verl(loss_agg_mode="token-sum", clip_ratio_c=1e9), PLAIN),
    "by length": (
        verl(loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=9.0, clip_ratio_c=1e9),
        PLAIN / (N * 9),
    ),
    "KL of verl": (
        verl(use_kl_loss=True, kl_loss_coef=0.5, kl_loss_type="k2", clip_ratio_c=1e9),
        (PLAIN - m * 0.5 * (logp - l_ref)) / TOKENS,
    ),
}


def update(loss: Loss):
    return funcprobe.loss_update(U, TokenStats(logp, entropy), INPUTS, loss)[0]


def largest(x_NR):
    return float(x_NR.abs().max())


@pytest.mark.parametrize(("loss", "expected"), COEFFICIENTS.values(), ids=COEFFICIENTS.keys())
def test_coefficients_of_l(loss, expected):
    """To rounding, relative to the largest. TRL's SAPO has 1.05 in float32."""
    found = update(loss).coef_NR
    assert largest(found - expected) < 1e-14 * largest(expected)
    assert not torch.equal(g(r), torch.ones_like(r))
    assert not torch.equal(g(s), torch.ones_like(s))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(trl(entropy_coef=0.5), 0.5 * m / (P * K * T_b)), (verl(entropy_coeff=0.5), 0.5 * m / TOKENS)],
)
def test_coefficients_of_h(loss, expected):
    assert largest(update(loss).entropy_coef_NR - expected) < 1e-14 * largest(expected)
