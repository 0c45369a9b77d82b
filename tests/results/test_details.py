"""What -v adds: the derivative along v and its parts."""

from funcprobe.adapters.results import load
from funcprobe.adapters.results.details import about_v


def test_the_parts_are_those_of_the_derivative(run_one):
    results = load(run_one)
    first = results.first_order
    assert about_v(results)[-1] == (
        f"Its parts: update {first.from_update.value:+.3e} ± {first.interval_over_U.half_width:.1e} "
        f"over U, momentum {first.from_momentum.value:+.3e}, "
        f"weight decay {first.from_weight_decay.value:+.3e}"
    )
    entropy, half = results.entropy, results.entropy_interval.half_width
    assert about_v(results)[0] == (
        f"Entropy at theta: {entropy.value:.4f} ± {half:.1e} nats per token (95 %, over E)"
    )
