"""`forward`: everything goes to one other interface, whole batches at a time, segments and all.

What the other side does not take is counted by its `Output`; nothing is judged or changed here. Nothing is looked at
either: cost is one call a batch, the rest is the write itself.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from service.dataplane.contract import Batch, Context, Processor


class Forward(Processor):
    """Options: `to`, the name of the interface. While it is not there, all is dropped (`no_output`)."""

    takes_segments: ClassVar[bool] = True

    def __init__(self, options: Mapping[str, Any], context: Context) -> None:
        """Raises ValueError without `to`, or if that is the interface itself: its packets would go round for good."""
        super().__init__(options, context)
        to = options.get("to")
        if not isinstance(to, str):
            raise ValueError("to: missing; it is the name of an interface")  # noqa: TRY004 - the contract's error
        if to == context.interface:
            raise ValueError(f"to: {to} is the interface itself")
        self._output = context.output(to)

    def process(self, batch: Batch) -> None:
        """Send them all; none is left."""
        if batch.packets:
            self._output.send(batch)
            batch.take(())
