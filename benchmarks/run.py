"""Run benchmarks, each in a process of its own with one thread, and print one table.

    python benchmarks/run.py [--json FILE] [NAME ...]

``NAME`` is that of a file here, such as ``data``; by default all are run. The exit code is 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

from measure import Result, report

HERE = Path(__file__).parent
TOOLS = ("measure", "photographs", "run", "gpu", "profile_step")  # the last two print tables of their own
NAMES = sorted(file.stem for file in HERE.glob("*.py") if file.stem not in TOOLS)


def results_of(name: str) -> list[Result]:
    """The results of the benchmark ``name``, measured in this process."""
    with redirect_stdout(sys.stderr):
        return importlib.import_module(name).measure()


def main() -> int:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*NAMES, []], help=", ".join(NAMES))
    parser.add_argument("--json", type=Path, help="where to save the table as JSON")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    results: list[Result] = []
    for name in args.names or NAMES:
        print(f"measuring {name} …", file=sys.stderr)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            try:
                results += process.submit(results_of, name).result()
            except Exception:  # the others are measured all the same
                traceback.print_exc()
                error = Result(
                    work=name, baseline="see its error above", value=0, unit="finished", at_least=1
                )
                results.append(error)
    return report(results, args.json)


if __name__ == "__main__":
    sys.exit(main())
