"""The tables of cases, whichever of their files were imported, and in whatever order."""

import itertools

import cases
import cases_dora
import cases_forms
import cases_weights


def test_each_file_has_a_list_of_its_own():
    lists = [module.CASES for module in (cases, cases_weights, cases_dora, cases_forms)]
    assert len(lists[0]) > 50
    for one, other in itertools.pairwise(lists):
        assert len(one) < len(other) and all(a is b for a, b in zip(one, other, strict=False))
    names = [case.name for case in lists[-1]]
    assert len(names) == len(set(names))
