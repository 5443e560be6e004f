"""Forwarding is one call a batch; what matters is that nothing is left, and nothing goes round."""

import pytest

from service.dataplane.processors.forward import Forward
from tests.dataplane.chains import FakeContext, run


def test_everything_goes_to_the_output_and_nothing_is_left() -> None:
    context = FakeContext()
    stage = Forward({"to": "tun1"}, context)
    batch = run(stage, [b"one", b"two"])
    assert context.outputs["tun1"].sent == [b"one", b"two"]
    assert batch.left() == []
    assert batch.dropped == {}, "what an output does not take is counted by the output"
    run(stage, [])
    assert Forward.takes_segments


@pytest.mark.parametrize("options", [{}, {"to": "tun0"}, {"to": 7}])
def test_nothing_is_forwarded_to_nowhere_or_round(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="to:"):
        Forward(options, FakeContext())
