"""Processors as another package would write them, to see what one costs. Their entry points are `dataplane.CUSTOM`."""

from service.dataplane.contract import Batch, Processor


class Nothing(Processor):
    """Takes batches and does nothing with them."""

    def process(self, batch: Batch) -> None:
        """Let all of it go on."""


class Iterate(Processor):
    """Looks at every packet the way the contract suggests, and counts octets."""

    figures = ("octets",)

    def process(self, batch: Batch) -> None:
        """Let all of it go on."""
        octets = 0
        for packet in batch:
            octets += len(packet)
        self.context.count("octets", octets)
