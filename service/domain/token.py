"""The mark every interface of ours carries in its ifalias, and the only proof that it is ours.

`tunledger:<node id>:<interface id>`; readable in `ip link`. A link without it belongs to somebody else.
"""

import re
from dataclasses import dataclass

from service.domain.values import InterfaceId, NodeId

_TOKEN = re.compile(r"tunledger:([0-9a-f]{12}):([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")


@dataclass(frozen=True, slots=True)
class Token:
    """Which node made a link, and for which declared interface."""

    node: NodeId
    interface_id: InterfaceId

    def __str__(self) -> str:
        return f"tunledger:{self.node}:{self.interface_id}"


def parse_token(alias: str) -> Token | None:
    """The token in an ifalias, or None if the alias is anything else (a stranger's, or empty)."""
    match = _TOKEN.fullmatch(alias)
    return Token(NodeId(match[1]), InterfaceId(match[2])) if match else None
