"""What processors are tried with, and the few values that these tests share."""

from service.dataplane.contract import NO_OFFLOAD
from service.dataplane.fake import FakeBatch, FakeContext, FakeOutput, run

__all__ = ["FakeBatch", "FakeContext", "FakeOutput", "plain_headers", "run"]


def plain_headers(count: int) -> list[bytes]:
    """Headers that say nothing."""
    return [bytes(NO_OFFLOAD)] * count
