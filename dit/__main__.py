"""The command line: `dit VERB key=value ...`."""

import importlib
import os
import signal
import sys
import time

os.environ["DIT_BEGAN"] = repr(time.time())  # before anything that takes time, see `dit.train.goodput`

VERBS = {
    "pack": "write images into shards:    dit pack source=imagenet/train out=data/imagenet size=256",
    "index": "check and index shards:      dit index path=shards",
    "encode": "shards of latents:           dit encode data.path=shards latent=sd_vae out=latents",
    "train": "train a model:               dit train experiment=digits",
    "submit": "have SLURM train it:         dit submit experiment=digits trainer=fsdp slurm.nodes=4 slurm.gpus=8",
    "sample": "draw images with a run:      dit sample run=digits labels=[0,1,2,3] guidance.scale=2",
    "evaluate": "judge a run:                 dit evaluate run=digits metric=likelihood",
    "export": "weights for others:          dit export run=digits path=digits_weights",
    "schedule": "draw a noise schedule:       dit schedule experiment=digits noise=cosine out=schedule.png",
    "report": "curves and samples of runs:  dit report run=digits,digits_v out=report.html",
    "sync": "send a run to W&B:           dit sync run=digits",
    "doctor": "what a recipe costs:         dit doctor model=dit_xl_2 data.image_size=512; dit doctor run=digits",
}

HELP = """dit trains diffusion transformers.

  dit VERB key=value ...

{verbs}

  dit VERB --help        the verb's groups and keys
  dit VERB --cfg job     print the composed configuration and do nothing
  dit VERB -m key=a,b    one run for each combination
  dit --version

Exit codes: 0 done, 2 a mistake in the configuration or input, 3 data that is broken, 4 no intact checkpoint, or the
last one could not be written, 5 numbers that are broken (NaN, and leaving steps out was no help) or a step that ends
every start, 75 stopped with a checkpoint by SIGTERM, SIGUSR1 or the job's time limit: start again to go on, 130 the
same by Ctrl-C, 128 + n one of several processes was ended by signal n, 1 anything else, also a process that hangs.
"""


def main() -> None:
    """Run one verb."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {verb:<8} {text}" for verb, text in VERBS.items())), end="")
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        from dit import __version__

        print(f"dit {__version__}")
        raise SystemExit(0)
    if arguments[0] not in VERBS:
        print(f"dit: there is no verb {arguments[0]}; choose one of {', '.join(VERBS)}", file=sys.stderr)
        raise SystemExit(2)
    if arguments[0] == "train":  # before imports that take seconds
        from dit.train.preemption import leave_at_once

        leave_at_once()
    from dit.command.compose import launch

    try:
        command = importlib.import_module(f"dit.command.{arguments[0]}")
        code = launch(arguments[0], command, arguments[1:])
    except KeyboardInterrupt:  # before there was anything to save
        print("\ndit: stopped", file=sys.stderr)
        code = 130
    if arguments[0] == "train":  # one that comes while Python ends would be heard by no handler, and change the code
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, signal.SIG_IGN)  # not blocked, which would hold for this thread alone
    raise SystemExit(code)


if __name__ == "__main__":
    main()
