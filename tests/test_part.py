"""Parts of the sweeps: together they are the whole, and none is run twice."""

import pytest

from tests import part

CASES = [f"lab: kill@kernel.CreateLink.before#{n}" for n in range(500)]


def test_the_parts_together_are_the_whole_and_each_case_is_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(part.VARIABLE, raising=False)
    assert (part.part_of(CASES), part.share(60)) == (CASES, 60)
    found = []
    for number in range(1, 9):
        monkeypatch.setenv(part.VARIABLE, f"{number}/8")
        found.append(part.part_of(CASES))
        assert part.part_of(CASES[::3]) == [case for case in CASES[::3] if case in found[-1]], "goes by the list"
        assert part.share(60) == 8
    assert sorted(case for each in found for case in each) == sorted(CASES)
    assert min(map(len, found)) > len(CASES) / 8 / 2, "a part is hardly anything"


@pytest.mark.parametrize("given", ["", "0/8", "9/8", "3", "3/0", "-1/2", "1/2/3", "a/b"])
def test_what_is_no_part_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(part.VARIABLE, given)
    with pytest.raises(ValueError, match=part.VARIABLE):
        part.wanted()
