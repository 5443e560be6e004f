"""Which processors there are: ours by name, those of other packages by entry point.

The service finds names (`discover`) and imports none of other people's code; each worker imports all of them before it
gives up its rights (`Registry`), since afterwards it can open no file. A package that cannot be imported stops nobody:
the stage that names it is refused with the reason.
"""

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Final

from service.dataplane.contract import FIGURES_MAX, Processor

GROUP: Final = "tunledger.processors"

BUILT_IN: Final[Mapping[str, str]] = {
    "inspect": "service.dataplane.processors.inspect:Inspect",
    "filter": "service.dataplane.processors.filter:Filter",
    "capture": "service.dataplane.processors.capture:Capture",
    "reply": "service.dataplane.processors.reply:Reply",
    "forward": "service.dataplane.processors.forward:Forward",
    "balance": "service.dataplane.processors.balance:Balance",
}


class UnknownProcessorError(Exception):
    """There is no such processor, or it cannot be used; the message says which and why."""


def discover() -> dict[str, str]:
    """Processors of installed packages: name to "module:Class". Names of ours are not theirs to take.

    Source: importlib.metadata, the packaging guide's entry points.
    """
    if not _mentioned():
        return {}
    import importlib.metadata

    found = importlib.metadata.entry_points(group=GROUP)
    return {point.name: point.value for point in found if point.name not in BUILT_IN}


def _mentioned() -> bool:
    """Whether any package may have processors: the group stands in its entry_points.txt, or it is not a plain folder.

    importlib.metadata reads all there is of all packages; that and its import take a start 20 ms.
    """
    for folder in dict.fromkeys(sys.path):
        try:
            names = os.listdir(folder or ".")  # noqa: PTH208  # pathlib makes an object of each
        except FileNotFoundError:
            continue
        except OSError:
            return True  # an archive, or what only importlib knows how to read
        for name in names:
            if name.endswith(".egg"):
                return True
            if name.endswith((".dist-info", ".egg-info")):
                try:
                    with open(os.path.join(folder, name, "entry_points.txt"), "rb") as file:  # noqa: PTH118, PTH123
                        if GROUP.encode() in file.read():
                            return True
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except OSError:
                    return True
    return False


class Registry:
    """Processors as classes, imported when the registry is made."""

    def __init__(self, custom: Mapping[str, str]) -> None:
        """Import ours and these. Never raises because of one."""
        self._found: dict[str, type[Processor] | str] = {
            name: _load(where) for name, where in {**custom, **BUILT_IN}.items()
        }

    def find(self, name: str) -> type[Processor]:
        """The class of that name. Raises UnknownProcessorError."""
        found = self._found.get(name)
        if found is None:
            raise UnknownProcessorError(f"no processor is called {name}; known: {', '.join(sorted(self._found))}")
        if isinstance(found, str):
            raise UnknownProcessorError(f"{name} cannot be used: {found}")
        return found


def _load(where: str) -> type[Processor] | str:
    """The class at "module:Class", or why not."""
    module, _, path = where.partition(":")
    try:
        found: object = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except Exception as error:  # noqa: BLE001  # whatever another package's import raises is that package's
        return f"{where}: {type(error).__name__}: {error}"
    if not (isinstance(found, type) and callable(getattr(found, "process", None))):
        return f"{where} is not a class with a method process"
    if len(getattr(found, "figures", ())) > FIGURES_MAX:
        return f"{where} has more than {FIGURES_MAX} figures"
    return found
