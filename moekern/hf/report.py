"""What `patch` did, module by module."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One module that `patch` recognised.

    name: dotted path in the model; kind: "experts", "router", "mla" or "linear"; class_name: its class; reason: why it was
    left as it is, or None when it is patched.
    """

    name: str
    kind: str
    class_name: str
    reason: str | None = None


@dataclass(frozen=True)
class Report:
    """The result of `moekern.patch`: every recognised module, patched or skipped and why. `str(report)` is a table."""

    entries: tuple[Entry, ...] = ()

    @property
    def patched(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.reason is None)

    @property
    def skipped(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.reason is not None)

    def __str__(self) -> str:
        groups = Counter((entry.kind, entry.class_name, entry.reason) for entry in self.entries)
        rows = [
            (kind, class_name, str(count), "patched" if reason is None else f"skipped: {reason}")
            for (kind, class_name, reason), count in sorted(groups.items(), key=str)
        ]
        head = f"moekern: {len(self.patched)} modules patched, {len(self.skipped)} skipped"
        if not rows:
            return head
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            f"  {kind:<{widths[0]}}  {class_name:<{widths[1]}}  {count:>{widths[2]}}  {state}"
            for kind, class_name, count, state in rows
        ]
        return "\n".join([head, *lines])
