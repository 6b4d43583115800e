"""Time alternative implementations in turn."""

import statistics
import subprocess
import sys
from collections.abc import Callable


def compare(title: str, unit: str, ways: dict[str, Callable[[], float]], rounds: int) -> None:
    """Print the median rate of each way, in `unit`, and the median and range
    of its ratio to the first way.

    Every way runs once per round, so that other load on the machine slows all of them.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            rates[name].append(way())
    print(f"{title}, {rounds} rounds")
    for name, values in rates.items():
        ratios = sorted(a / b for a, b in zip(values, next(iter(rates.values())), strict=True))
        print(f"  {name:<26} {statistics.median(values):12,.2f} {unit}   "
              f"ratio {statistics.median(ratios):.2f} "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


def python(*args: object) -> str:
    """Run `python -m …` with this interpreter and return its standard output;
    on failure print its errors and exit."""
    done = subprocess.run([sys.executable, "-m", *map(str, args)], text=True, capture_output=True)
    return sys.exit(done.stderr) if done.returncode else done.stdout


def rate(*args: object) -> float:
    """Return the tokens/s that `python -m …` prints as its last word, as benchmarks.bench does."""
    return float(python(*args).split()[-1])
