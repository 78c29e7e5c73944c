"""The fault suite of the log, with its counts written down.

python -m benchmarks.faults
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.record import RESULTS, machine, write_jsonl

SUITE = Path(__file__).parent.parent / "tests" / "log" / "faults"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "faults.jsonl")
    path = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.jsonl"
        ran = subprocess.run([sys.executable, "-m", "pytest", str(SUITE), "--fault-counts", str(counts)], check=False)
        if ran.returncode:
            raise SystemExit(f"the fault suite ended with code {ran.returncode}; nothing is written")
        rows = [json.loads(line) for line in counts.read_text(encoding="utf-8").splitlines()]
    print(write_jsonl(path, [machine("python -m benchmarks.faults"), *rows]))
    from benchmarks.log_report import faults_table

    print(faults_table({}, rows))


if __name__ == "__main__":
    main()
