"""verl 0.9.1's loss of a step, token by token in plain Python, with derivatives in closed form.

Where the loss has a kink, the derivative is the one that torch's operations have there: at a bound of
a clip that of the inside, at the bound of the dual clip half of it, of |x| at 0 none.
"""

import math
from collections import defaultdict
from typing import NamedTuple

from funcprobe import LossInputs
from funcprobe.losses.verl import VerlLoss

Tokens = dict[tuple[int, int], float]  # by sequence and position


class Found(NamedTuple):
    loss: float
    by_logp: Tokens  # derivative of the loss
    by_entropy: Tokens
    metrics: dict[str, float]


class AmbiguousError(Exception):
    """kl_cov's choice between covariances equal to rounding."""


def step(s: VerlLoss, l_NR, h_NR, inputs: LossInputs, lengths: list[int]) -> Found:
    logp, h = l_NR.tolist(), h_NR.tolist()
    N = len(logp)
    bypass = s.loss_mode == "bypass_mode"
    mask = {(i, k) for i in range(N) for k in range(lengths[i]) if bool(inputs.mask_NR[i, k])}
    sampler = None if inputs.sampler_logp_NR is None else inputs.sampler_logp_NR.tolist()
    old = sampler if bypass else logp if inputs.old_logp_NR is None else inputs.old_logp_NR.tolist()
    A, micro, process = (
        x.tolist() for x in (inputs.advantage_N, inputs.microbatch_N, inputs.process_N)
    )
    calls = sorted({(p, m) for p, m in zip(process, micro, strict=True)})
    processes = len({p for p, _ in calls})

    weight, kept = dict.fromkeys(mask, 1.0), mask
    if s.rollout_is or s.rollout_rs:
        r = {(i, k): (logp if bypass else old)[i][k] - sampler[i][k] for i, k in mask}
        kept = keep(s, r, mask)
        if s.rollout_is and not (bypass and s.loss_type == "ppo_clip"):
            weight = weights(s, r, mask, micro if bypass else [0] * N)
    seen = mask if bypass else kept

    # What one token counts for in an aggregate: `count` of its row's tokens are in the same mask.
    def share(mode: str, i: int, count: int) -> float:
        S = N if s.global_batch_size is None else s.global_batch_size
        if mode == "token-mean":
            return 1 / len(mask)
        if mode == "token-sum":
            return 1.0
        if mode == "seq-mean-token-sum":
            return 1 / S
        if mode == "seq-mean-token-mean":
            return 1 / (S * count)
        rows = [j for j in range(N) if (process[j], micro[j]) == (process[i], micro[i])]
        return 1 / (S * (s.loss_scale_factor or max(lengths[j] for j in rows)))

    policy, entropy, kl = 0.0, 0.0, 0.0
    by_logp, by_entropy = defaultdict(float), defaultdict(float)
    logged = defaultdict(list)
    for call in calls:
        rows = [i for i in range(N) if (process[i], micro[i]) == call]
        tokens = sorted(at for at in kept if at[0] in rows)
        if s.loss_mode == "geo_mean":
            value, slopes, log = geo_mean(s, rows, tokens, logp, old, A, weight)
            policy += value / processes
            for at, slope in slopes.items():
                by_logp[at] += slope / processes
        else:
            values, slopes, log = token_losses(s, rows, tokens, logp, old, A)
            mode = "seq-mean-token-mean" if s.loss_mode == "sapo" else s.loss_agg_mode
            for at in tokens:
                z = share(mode, at[0], sum(j == at[0] for j, _ in tokens)) * weight[at]
                policy += z * values[at]
                by_logp[at] += z * slopes[at]
        for name, x in log.items():
            logged[name].append(x)
    for i, k in sorted(seen):
        z = share(s.loss_agg_mode, i, sum(j == i for j, _ in seen))
        entropy += z * h[i][k]
        by_entropy[i, k] -= s.entropy_coeff * z
        if s.use_kl_loss:
            value, slope = kl_of_token(s.kl_loss_type, logp[i][k] - float(inputs.ref_logp_NR[i, k]))
            kl += z * value
            by_logp[i, k] += s.kl_loss_coef * z * slope
    loss = policy - s.entropy_coeff * entropy + (s.kl_loss_coef * kl if s.use_kl_loss else 0.0)
    metrics = {f"actor/{name}": sum(xs) / len(xs) for name, xs in logged.items()}
    metrics |= {"actor/loss": loss, "actor/pg_loss": policy, "actor/entropy_loss": entropy}
    if s.use_kl_loss:
        metrics |= {"actor/kl_loss": kl, "actor/kl_coef": s.kl_loss_coef}
    return Found(loss, by_logp, by_entropy, metrics)


def token_losses(s, rows, tokens, logp, old, A):
    """Values and derivatives by token, and the means that are logged."""
    mode, n = s.loss_mode, max(len(tokens), 1)
    if mode == "bypass_mode":
        mode = "vanilla" if s.loss_type == "ppo_clip" else "gpg"
    x = {(i, k): logp[i][k] - old[i][k] for i, k in tokens}
    bounded = {at: min(max(y, -20.0), 20.0) for at, y in x.items()}
    sequence = {i: [x[at] for at in tokens if at[0] == i] for i in rows}
    dropped, penalised = {}, set()
    if mode == "clip_cov":
        dropped = clip_cov_probabilities(s, tokens, x, logp, A)
    if mode == "kl_cov":
        penalised = kl_cov_tokens(s, tokens, logp, A)
    values, slopes, clipped, below = {}, {}, 0.0, 0.0
    for at in tokens:
        i, k = at
        a, now = A[i], logp[i][k]
        r, dr = math.exp(bounded[at]), math.exp(bounded[at]) if abs(x[at]) <= 20 else 0.0
        is_clipped = is_below = False
        if mode == "vanilla":
            value, slope, is_clipped = clip(s, a, r, dr)
            if a < 0 and value >= -a * s.clip_ratio_c:
                is_below = value > -a * s.clip_ratio_c
                slope = 0.0 if is_below else slope / 2
                value = -a * s.clip_ratio_c
        elif mode == "gspo":
            mean = sum(sequence[i]) / len(sequence[i])
            ratio = math.exp(min(mean, 10.0))
            value, slope, is_clipped = clip(s, a, ratio, ratio if mean <= 10 else 0.0)
        elif mode in {"dppo_tv", "dppo_kl"}:
            inside = in_trust_region(s, a, now, old[i][k])
            w = min(r, s.clip_ratio_c) if inside else 0.0
            value, slope, is_clipped = -a * w * now, -a * w, not inside
            is_below = inside and r > s.clip_ratio_c
        elif mode == "sapo":
            tau = s.tau_pos if a > 0 else s.tau_neg
            sigma = 1 / (1 + math.exp(-tau * (r - 1))) if tau * (r - 1) > -700 else 0.0
            value, slope = -a * 4 / tau * sigma, -a * 4 * sigma * (1 - sigma) * dr
        elif mode == "gpg":
            value, slope = -a * now, -a
        elif mode == "dro":
            value, slope = -a * now + s.dro_beta * x[at] ** 2 / 2, -a + s.dro_beta * x[at]
        elif mode == "cispo":
            low, high = ranges(s)
            w = min(max(r, 1 - low), 1 + high)
            value, slope, is_clipped = -a * w * now, -a * w, w != r
        elif mode == "clip_cov":
            r = math.exp(x[at])
            value, slope, _ = clip(s, a, r, r)
            value, slope = value * (1 - dropped[at]), slope * (1 - dropped[at])
            clipped += dropped[at] / n
        else:
            assert mode == "kl_cov"
            r = math.exp(x[at])
            value, slope = -a * r, -a * r
            if at in penalised:
                value += s.ppo_kl_coef * abs(x[at])
                slope += s.ppo_kl_coef * sign(x[at])
        values[at], slopes[at] = value, slope
        clipped += is_clipped / n
        below += is_below / n
    logged = {"ppo_kl": -sum(x.values()) / n}
    if mode in {"vanilla", "dppo_tv", "dppo_kl", "sapo", "cispo"}:
        logged["ppo_kl"] = -sum(bounded.values()) / n
    if mode == "kl_cov":
        logged["ppo_kl"] = sum(abs(y) for y in x.values()) / n
    if mode not in {"gpg", "dro", "kl_cov"}:
        logged["pg_clipfrac"] = clipped
        if mode != "clip_cov":
            logged["pg_clipfrac_lower"] = below
    if s.loss_mode == "gpg":
        logged = {}
    return values, slopes, logged


def clip(s, a, r, dr):
    """Value and derivative of max(-a r, -a clip(r)), and whether the clip is active."""
    low, high = ranges(s)
    if a > 0 and r > 1 + high:
        return -a * (1 + high), 0.0, True
    if a < 0 and r < 1 - low:
        return -a * (1 - low), 0.0, True
    return -a * r, -a * dr, False


def ranges(s):
    return tuple(s.clip_ratio if e is None else e for e in (s.clip_ratio_low, s.clip_ratio_high))


def sign(x):
    return (x > 0) - (x < 0)


def in_trust_region(s, a, logp, old):
    low, high = ranges(s)
    p, q = math.exp(logp), math.exp(old)
    if s.loss_mode == "dppo_tv":
        return p - q <= high if a > 0 else q - p <= low
    away = p > q if a > 0 else p < q
    kl = q * (old - logp) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
    return not away or kl <= (high if a > 0 else low)


def covariances(tokens, logp, A):
    mean_a = sum(A[i] for i, _ in tokens) / max(len(tokens), 1)
    mean_l = sum(logp[i][k] for i, k in tokens) / max(len(tokens), 1)
    return {(i, k): (A[i] - mean_a) * (logp[i][k] - mean_l) for i, k in tokens}


def clip_cov_candidates(s, tokens, x, logp, A):
    cov = covariances(tokens, logp, A)
    inside = {at for at in tokens if s.clip_cov_lb < cov[at] < s.clip_cov_ub}
    return {at for at in inside if not clip(s, A[at[0]], math.exp(x[at]), 0.0)[2]}


def clip_cov_probabilities(s, tokens, x, logp, A):
    """Of a token to be dropped."""
    candidates = clip_cov_candidates(s, tokens, x, logp, A)
    number = min(len(candidates), max(int(s.clip_cov_ratio * len(tokens)), 1))
    return {at: number / len(candidates) if at in candidates else 0.0 for at in tokens}


def kl_cov_tokens(s, tokens, logp, A):
    if not tokens:
        return set()
    cov = covariances(tokens, logp, A)
    largest = sorted(tokens, key=lambda at: -cov[at])
    number = max(1, int(len(tokens) * s.kl_cov_ratio))
    if number < len(tokens) and cov[largest[number - 1]] - cov[largest[number]] < 1e-9:
        raise AmbiguousError
    return set(largest[:number])


def geo_mean(s, rows, tokens, logp, old, A, weight):
    low, high = ranges(s)
    total, slopes, log = 0.0, {}, defaultdict(float)
    for name in ("ppo_kl", "pg_clipfrac", "pg_clipfrac_lower"):
        log[name] = 0.0
    for i in rows:
        mine = [at for at in tokens if at[0] == i]
        y, free = {}, {}
        for at in mine:
            x = logp[i][at[1]] - old[i][at[1]]
            free[at] = not ((A[i] > 0 and x > high) or (A[i] < 0 and x < -low))
            y[at] = x if free[at] else (high if A[i] > 0 else -low)
            log["ppo_kl"] -= x / len(tokens)
            beyond = x > high or x < -low
            log["pg_clipfrac"] += (beyond and A[i] > 0) / len(tokens)
            log["pg_clipfrac_lower"] += (beyond and A[i] < 0) / len(tokens)
        if not mine:
            continue
        w = math.exp(sum(math.log(weight[at] + 1e-10) for at in mine) / len(mine))
        value = -A[i] * math.exp(sum(y.values()) / len(mine)) * (1.0 if s.rollout_is is None else w)
        total += value / len(rows)
        for at in mine:
            slopes[at] = value / len(rows) / len(mine) if free[at] else 0.0
    return total, slopes, log


def kl_of_token(kind, x):
    """Value and derivative in l, x = l - l_ref."""
    name = kind.rstrip("+")
    if name in {"kl", "k1"}:
        value, slope = x, 1.0
    elif name == "abs":
        value, slope = abs(x), float(sign(x))
    elif name in {"mse", "k2"}:
        value, slope = x * x / 2, x
    else:
        y = min(max(-x, -20.0), 20.0)
        value = math.exp(y) - y - 1
        slope = 1 - math.exp(-x) if abs(x) <= 20 and value <= 10 else 0.0
        value = min(value, 10.0)
    return value, x if kind.endswith("+") else slope


def weights(s, r, mask, batch):
    """Importance weights of `rollout_is`."""
    raw = {}
    for i, k in mask:
        total = r[i, k] if s.rollout_is == "token" else sum(y for (j, _), y in r.items() if j == i)
        raw[i, k] = math.exp(min(max(total, -20.0), 20.0))
    *lower, upper = (float(y) for y in str(s.rollout_is_threshold).split("_"))
    if lower:
        found = {at: w if lower[0] <= w <= upper else 0.0 for at, w in raw.items()}
    else:
        found = {at: min(w, upper) for at, w in raw.items()}
    if not s.rollout_is_batch_normalize:
        return found
    means = {}
    for b in set(batch):
        at_b = {at: w for at, w in found.items() if batch[at[0]] == b}
        units = (
            list(at_b.values())
            if s.rollout_is == "token"
            else list({i: w for (i, _), w in at_b.items()}.values())
        )
        mean = sum(units) / max(len(units), 1)
        means[b] = mean if mean > 1e-8 else 1.0
    return {at: w / means[batch[at[0]]] for at, w in found.items()}


def keep(s, r, mask):
    """Tokens that every criterion of `rollout_rs` keeps."""
    if s.rollout_rs is None:
        return mask
    criteria = s.rollout_rs.split(",")
    thresholds = str(s.rollout_rs_threshold).split(",") * len(criteria)
    kept = set(mask)
    for criterion, threshold in zip(criteria, thresholds, strict=False):
        kind = criterion[-2:]
        divergence = {}
        for at, log_ratio in r.items():
            y = min(max(log_ratio, -20.0), 20.0)
            divergence[at] = {"k1": -y, "k2": y * y / 2, "k3": math.exp(y) - 1 - y}[kind]
        if kind == "k1":
            ends = [float(y) for y in threshold.split("_")]
            low, high = math.log(ends[0] if len(ends) == 2 else 1 / ends[0]), math.log(ends[-1])
        else:
            low, high = -math.inf, float(threshold)
        for i, k in mask:
            row = [y for (j, _), y in divergence.items() if j == i]
            statistic = divergence[i, k]
            if "sum" in criterion:
                statistic = sum(row)
            elif "mean" in criterion:
                statistic = sum(row) / len(row)
            elif "max" in criterion:
                statistic = max(row)
            if not low <= statistic <= high:
                kept.discard((i, k))
    return kept
