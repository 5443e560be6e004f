"""`python -m bench [NAME ...]`: all benchmarks, or those named; `dataplane.capture` is one table of many."""

import sys

from bench import control, counters, dataplane, log, scale
from bench.lab import under_way

ALL = {
    "control": (control.run, 20),
    "counters": (counters.run, 150),
    "dataplane": (dataplane.run, sum(about_s for _, about_s in dataplane.PARTS.values())),
    "log": (log.run, 120),
    "scale": (scale.run, 480),
}
"""Each, and about how many seconds it takes."""


def main() -> None:
    """Run the chosen ones, telling which is under way."""
    names = sys.argv[1:] or list(ALL)
    known = [*ALL, *(f"dataplane.{part}" for part in dataplane.PARTS)]
    if unknown := sorted(set(names) - set(known)):
        sys.exit(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(known)}")
    for name in names:
        print(f"# {name}", flush=True)
        bench, _, part = name.partition(".")
        if part:
            dataplane.run(part)
            continue
        run, about_s = ALL[bench]
        with under_way(name, about_s):
            run()


if __name__ == "__main__":
    main()
