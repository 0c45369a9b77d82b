"""The run folders that tests of the report share are what they say they are."""


def test_a_run_has_everything_that_a_report_shows(saved_run):
    results = saved_run.results
    assert results.attribution is not None
    assert results.influence is not None
    assert results.second_order is not None
    assert {one.name for one in results.observables} == {"reward", "length"}
    assert saved_run.whatif is not None
    for name in ("modules", "sequences", "tokens"):
        assert saved_run.table(name).num_rows > 0


def test_a_large_run_is_as_large_as_it_says(large_run):
    tokens, sequences = large_run.table("tokens"), large_run.table("sequences")
    assert (tokens.num_rows, sequences.num_rows) == (2 * 64 * 8 * 300, 2 * 64 * 8)
    assert large_run.results.counts.U_tokens == 64 * 8 * 300
