"""Measured times that block calls can't explain: by hand, and of a study's records."""

import pytest

from asesearch.study.timing import credited_time, is_unexplained


@pytest.mark.parametrize(
    ("measured", "spread", "blocks", "unexplained"),
    [
        (0.26, 0.02, 0.37, True),
        (0.26, 0.06, 0.37, False),  # two spreads reach the bound
        (0.36, 0.0, 0.37, True),
        (0.365, 0.0, 0.37, False),  # less than 2 % of the bound
        (0.40, 0.0, 0.37, False),
        (0.26, 0.02, None, False),
        # a quick study's confirmed points, on a machine that did other work beside it
        (0.25865492839796045, 0.004161402913349516, 0.2777777777777778, True),
        (0.3303256201756103, 0.002160005621405864, 0.32222222222222224, False),
        (0.20765464547029888, 0.002596910433704941, 0.2, False),
    ],
)
def test_a_time_is_unexplained_below_its_bound_by_more_than_its_spread(
    measured, spread, blocks, unexplained
):
    assert is_unexplained(measured, spread, blocks) is unexplained
    assert credited_time(measured, spread, blocks) == (blocks if unexplained else measured)
