"""`python -m bench [NAME ...]`: all benchmarks, or those named."""

import sys

from bench import control, counters, dataplane, log, scale

ALL = {
    "control": control.run,
    "counters": counters.run,
    "dataplane": dataplane.run,
    "log": log.run,
    "scale": scale.run,
}


def main() -> None:
    """Run the chosen ones, telling which is under way."""
    for name in sys.argv[1:] or ALL:
        print(f"# {name}", flush=True)
        ALL[name]()


if __name__ == "__main__":
    main()
