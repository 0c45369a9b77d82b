"""The influence of U's prompts on E's in words."""

from .schema import Results


def influence_lines(results: Results) -> list[str]:
    """A line for every prompt of U with its interval, and one for every pair; none without a section.

    Amounts are at the next learning rate or, where that is not known, per unit of it.
    """
    section = results.influence
    if section is None:
        return []
    eta, unit = results.next_lr.value, results.entropy.unit
    if not eta:
        eta, unit = 1.0, section.unit
    lines = []
    for prompt in section.prompts:
        interval = prompt.share.interval
        assert interval is not None  # with influence all of E is passed along the prompt's part
        mark = " (indistinguishable from 0)" if prompt.share.indistinguishable_from_0 else ""
        where = "" if prompt.region is None else f", at least half of it in {prompt.region}"
        made = f"{eta * prompt.share.share:+.1e} ± {eta * interval.half_width:.1e} {unit}"
        lines.append(f"Prompt {prompt.prompt_index} of U ({prompt.text}) makes {made}{mark}{where}")
    lines.append(f"The pairs of prompts that matter most, U on E, {unit}:")
    for pair in section.pairs:
        pair_of = f"{pair.U_prompt} ({pair.U_text}) on {pair.E_prompt} ({pair.E_text})"
        lines.append(f"  {pair_of}: {eta * pair.influence:+.1e}")
    return lines
