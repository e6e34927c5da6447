"""What the server imports from which `launch` forks; it leaves the signals of a terminal to those it forks."""

import signal

for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, signal.SIG_IGN)

import lightning.pytorch  # noqa: E402, F401
import torch  # noqa: E402
import torch.distributed.checkpoint  # noqa: E402
import torch.distributed.fsdp  # noqa: E402
import torch.distributed.tensor.parallel  # noqa: E402

import dit.train.callbacks  # noqa: E402
import dit.train.module  # noqa: E402
import dit.train.run  # noqa: E402, F401

assert not torch.cuda.is_initialized(), "a process that has used a GPU cannot be forked"
