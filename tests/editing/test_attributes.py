"""editing/attributes.py: what a conditional checkpoint says of its condition, read and refused; targets as numbers."""

import pytest
import torch

from editing.attributes import Condition, ConditionError

GOOD = {
    "attributes": ["smile", "age"],
    "kinds": ["probability", "years"],
    "means": [0.4, 0.35],
    "units": [1.0, 60.0],
    "scorer": "face-scorer",
    "scorer_fingerprint": "0123456789abcdef",
    "gain": 8.0,
    "light": True,
}


def test_a_condition_survives_its_checkpoint():
    known = Condition.from_dict(GOOD | {"of a later version": 1}, "a.pt")
    assert known.to_dict() == GOOD and known.units == (1.0, 60.0) and known.index("age") == 1
    assert known.parse("age=60, smile=1") == {1: 1.0, 0: 1.0}
    earlier = Condition.from_dict({name: value for name, value in GOOD.items() if name != "units"}, "a.pt")
    assert earlier.units == (1.0, 100.0) and earlier.parse("age=60") == {1: 0.6}
    assert torch.equal(known.vector({0: 1.0}), torch.tensor([1.0, 0.35]))


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        {"attributes": "smile"},
        {"attributes": ["smile"]},
        {"means": [0.4, None]},
        {"kinds": ["probability", "value"]},
        {"scorer": 3},
        {"units": [1.0]},
        {"gain": "loud"},
        {"light": 1},
    ],
)
def test_a_condition_of_the_wrong_shape_is_refused(wrong):
    values = GOOD | wrong if isinstance(wrong, dict) else wrong
    with pytest.raises(ConditionError, match=r"^a\.pt: its condition is described in a way unknown here"):
        Condition.from_dict(values, "a.pt")
    with pytest.raises(ConditionError, match="unknown here"):
        Condition.from_dict({name: value for name, value in GOOD.items() if name != "means"}, "a.pt")
    with pytest.raises(ConditionError, match="has the gain 4"):
        Condition.from_dict(GOOD | {"gain": 4.0}, "a.pt")


@pytest.mark.parametrize(
    "text", ["hat=1", "smile", "smile=", "smile=nan", "smile=inf", "smile=2", "age=-1", "age=1e400"]
)
def test_targets_that_cannot_be(text):
    with pytest.raises(ValueError, match="attribute 'hat'|--set"):
        Condition.from_dict(GOOD, "a.pt").parse(text)
