import math

import pytest

from gpt2.report.statistics import (
    holm,
    mean_and_error,
    quantile,
    seeds_needed,
    two_sided_p,
    welch,
)

SMALL, LARGE = [3.10, 3.12, 3.09], [3.15, 3.17, 3.13, 3.16]


@pytest.mark.parametrize(("t", "freedom", "p"), [
    (12.706, 1, 0.05), (4.303, 2, 0.05), (2.776, 4, 0.05), (2.571, 5, 0.05), (1.984, 100, 0.05),
    (31.599, 2, 0.001), (0, 3, 1), (1, 1, 0.5),
])  # fmt: skip
def test_p_is_that_of_the_tables_of_students_t(t, freedom, p):
    assert two_sided_p(t, freedom) == pytest.approx(p, rel=2e-3)
    assert two_sided_p(-t, freedom) == two_sided_p(t, freedom)
    if 0 < p < 1:
        assert quantile(p, freedom) == pytest.approx(t, rel=2e-3)


def test_welch_is_scipys():
    scipy = pytest.importorskip("scipy.stats")
    found = welch(SMALL, LARGE)
    theirs = scipy.ttest_ind(LARGE, SMALL, equal_var=False)
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-4)
    assert found.difference / found.error == pytest.approx(theirs.statistic)
    for t, freedom in ((0.3, 1.2), (2.5, 2.7), (12, 2.2), (3, 300)):
        assert two_sided_p(t, freedom) == pytest.approx(2 * scipy.t.sf(t, freedom), rel=1e-3)


def test_welch_by_hand():
    found = welch([1, 3], [4, 6])  # variances 2 and 2, so the error is √(2/2 + 2/2), freedom 2
    assert (found.difference, found.error) == (3, pytest.approx(math.sqrt(2)))
    assert found.p == pytest.approx(two_sided_p(3 / math.sqrt(2), 2))
    assert welch([1, 1], [2, 2]).p == 0
    assert welch([1, 1], [1, 1]).p == 1


def test_mean_and_error():
    assert mean_and_error([2.0, 4.0]) == (3.0, 1.0)
    assert mean_and_error([2.0]) == (2.0, None)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_seeds_needed_are_those_of_the_textbook():
    # One standard deviation apart, 5 % and 80 %: 17 of each.
    assert seeds_needed(1.0, 1.0) == seeds_needed(-0.01, 0.01) == 17
    assert seeds_needed(10.0, 0.1) == 2  # fewer have no spread
    assert seeds_needed(0.001, 0.1) is None
    assert seeds_needed(1.0, 1.0, level=0.01) > 17
