"""What should be said of a spec that stands: it names interfaces that are not there, or what nobody has judged yet.

Pure. Interfaces are declared in any order, so that a target which is not there (yet) is no reason to refuse one; nor is
it one to be silent. What is refused is `decide`'s business.
"""

from collections.abc import Mapping

from service.domain.chain import custom, target_fields
from service.domain.spec import InterfaceSpec
from service.domain.state import State
from service.domain.values import Mode


def declared_modes(state: State) -> dict[str, Mode]:
    """What each declared interface is, pending ones as they are to become."""
    return {interface.name: spec.mode for interface in state.interfaces.values() if (spec := interface.wanted)}


def remarks(spec: InterfaceSpec, modes: Mapping[str, Mode]) -> list[str]:
    """What to say of a spec beside interfaces of these modes, for people; each begins with the field it is about."""
    found = []
    for path, name in target_fields(spec.processing.chain):
        field, mode = f"processing.chain.{path}", modes.get(name)
        if mode is None:
            found.append(f"{field}: {name} is not declared; what is sent there is dropped (no_output)")
        elif mode is not spec.mode:
            found.append(f"{field}: {name} is a {mode}, not a {spec.mode}; what is sent there is dropped (mode)")
    if not spec.processing.running:
        theirs = custom(spec.processing.chain)
        for place, stage in enumerate(spec.processing.chain):
            if stage["processor"] in theirs:
                found.append(
                    f"processing.chain.{place}: {stage['processor']} looks at its options when processing starts"
                )
    return found
