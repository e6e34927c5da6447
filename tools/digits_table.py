"""Train the digits in several ways and print one table: python tools/digits_table.py [noise | models].

`noise` (the default) varies schedule and prediction, `models` networks and conditions. A few minutes a row on two CPU
cores. Runs that are already complete are only read.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

TABLES = {
    "noise": {
        "as it is": ["experiment=digits"],
        "noise=cosine prediction=v": ["experiment=digits", "noise=cosine", "prediction=v"],
        "noise=flow prediction=flow sampler=euler": [
            *("experiment=digits", "noise=flow", "prediction=flow", "sampler=euler"),
        ],
        "noise=edm prediction=edm": ["experiment=digits", "noise=edm", "prediction=edm"],
    },
    "models": {
        f"experiment={name}": [f"experiment={name}"]
        for name in ("digits_modern", "digits_unet", "digits_text", "digits_inpaint", "digits_superres")
    },
}
COLUMNS = ["accuracy", "diversity", "frechet", "frechet_floor", "nearest", "psnr", "psnr_told", "images_per_second"]


def main() -> None:
    """Train what is not trained yet; print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", nargs="?", choices=list(TABLES), default="noise")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("overrides", nargs="*", help="for every row, like seed=1")
    options = parser.parse_args()
    if options.table == "models" and not (encoder := options.data_dir / "tiny_clip").exists():
        subprocess.run([sys.executable, Path(__file__).with_name("tiny_encoder.py"), encoder], check=True)
    summaries = {name: trained(overrides, options) for name, overrides in TABLES[options.table].items()}
    columns = [column for column in [*COLUMNS, "cpu_minutes"] if any(column in s for s in summaries.values())]
    print("| overrides | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|", sep="\n")
    for name, summary in summaries.items():
        print(f"| `{name}` | " + " | ".join(_figure(summary, column) for column in columns) + " |")


def trained(overrides: list[str], options: argparse.Namespace, run: str | None = None) -> dict[str, float]:
    """The summary of a run, which is trained first if it is not yet; its name says what it is, unless given."""
    words = [override.removeprefix("experiment=") for override in [*overrides, *options.overrides]]
    run = run or re.sub(r"[^\w.-]", "_", "-".join(["table", *words]))
    folder = options.runs_dir / run
    command = [sys.executable, "-m", "dit", "train", f"run={run}", f"runs_dir={options.runs_dir}"]
    command += [f"data_dir={options.data_dir}", *overrides, *options.overrides]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if finished.returncode:
        sys.exit(f"{' '.join(command)}\n{finished.stdout}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    noted = folder / "cpu_minutes.json"  # of the whole command, the judging of samples included
    if "is complete" not in finished.stdout:
        noted.write_text(json.dumps({"cpu_minutes": seconds / 60}))
    print(f"{run}: {seconds / 60:.1f} CPU minutes", file=sys.stderr)
    return json.loads((folder / "summary.json").read_text()) | json.loads(noted.read_text() if noted.exists() else "{}")


def _figure(summary: dict[str, float], column: str) -> str:
    if column not in summary:
        return ""
    return f"{summary[column]:.0f}" if column == "images_per_second" else f"{summary[column]:.3g}"


if __name__ == "__main__":
    main()
