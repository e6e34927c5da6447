"""Train the digits with several schedules and predictions and print one table: python tools/digits_table.py.

About four minutes a row on two CPU cores. Runs that are already complete are only read.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROWS = {
    "linear_eps": [],
    "cosine_v": ["noise=cosine", "prediction=v"],
    "flow_flow": ["noise=flow", "prediction=flow", "sampler=euler"],
    "edm_edm": ["noise=edm", "prediction=edm"],
}
COLUMNS = ["accuracy", "diversity", "frechet", "frechet_floor", "nearest", "images_per_second"]


def main() -> None:
    """Train what is not trained yet; print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("overrides", nargs="*", help="for every row, like seed=1")
    options = parser.parse_args()
    print("| overrides | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|", sep="\n", flush=True)
    for name, overrides in ROWS.items():
        run = "-".join([f"digits_table_{name}", *(override.replace("/", "_") for override in options.overrides)])
        command = [sys.executable, "-m", "dit", "train", "experiment=digits", f"run={run}"]
        command += [f"runs_dir={options.runs_dir}", *overrides, *options.overrides]
        finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if finished.returncode:
            sys.exit(f"{' '.join(command)}\n{finished.stdout}")
        summary = json.loads((options.runs_dir / run / "summary.json").read_text())
        figures = [
            f"{summary[column]:.3g}" if column != "images_per_second" else f"{summary[column]:.0f}"
            for column in COLUMNS
        ]
        print(f"| `{' '.join(overrides) or 'as it is'}` | " + " | ".join(figures) + " |", flush=True)


if __name__ == "__main__":
    main()
