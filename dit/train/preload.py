"""What the server imports from which `launch` forks."""

import lightning.pytorch  # noqa: F401
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor.parallel

import dit.train.callbacks
import dit.train.module
import dit.train.run  # noqa: F401

assert not torch.cuda.is_initialized(), "a process that has used a GPU cannot be forked"
