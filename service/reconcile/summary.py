"""What one reconciliation did, by interface name."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

SHOWN_MAX = 10  # names in a line for people


@dataclass(slots=True)
class Summary:
    """Names, by what was done. `adopted` are those that were found as wanted."""

    recreated: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    adopted: list[str] = field(default_factory=list)
    orphans_removed: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    processing_resumed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, list[str]]:
        """The names by what was done."""
        return {each.name: list(getattr(self, each.name)) for each in fields(self)}

    def __str__(self) -> str:
        parts = (
            ("recreated", self.recreated),
            ("repaired", self.repaired),
            ("adopted", self.adopted),
            ("orphans removed", self.orphans_removed),
            ("commands finished", self.finished),
            ("processing resumed", self.processing_resumed),
            ("FAILED", self.failed),
        )
        return "; ".join(f"{label}: {few(names)}" for label, names in parts if names) or "nothing to do"


def few(names: Sequence[str]) -> str:
    """Names as a person reads them: the first ones, and how many more there are."""
    if len(names) <= SHOWN_MAX:
        return ", ".join(names)
    return f"{', '.join(names[:SHOWN_MAX])} and {len(names) - SHOWN_MAX} more"
