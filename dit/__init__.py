"""dit trains diffusion transformers and distils them into few-step samplers.

The rooms, in the order in which data flows; an import may only go down a floor:

    command     one file a verb                                                     floor 3
    train       the module, the run, checkpoints, callbacks                               2
    objective   what should the network have said?                                        1
    sampler     from noise to images: steps, guidance, editing                            1
    weights     averaged, converted and exported weights                                  1
    condition   what the network is told besides the noise                                0
    data        shards of images: packed, indexed, read in order                          0
    latent      images <-> what the network sees                                          0
    metric      how good, how varied and how likely images are                            0
    model       the networks                                                              0
    noise       schedules, predictions, weights, times, grids, the denoiser               0

`dit.load` draws with what `dit export` has written.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from dit.train.inference import Model

__version__ = "0.1.0"


def load(
    path: "str | Path", *, compile: bool = False, cuda_graphs: bool = False, precision: str = "float32"
) -> "Model":
    """An export, or a run, ready to draw: `load("weights/digits").sample(label=[0, 1, 2], seed=0)`.

    Args:
        path: its folder.
        compile: the network by torch.compile: slow at the first batch, and at each of another size, then faster; the
            same images up to rounding. On an AMD CPU weights are then in memory twice, and what is written to them
            through `.data` is not seen. Without a GPU the process keeps up to 2 GiB of freed memory.
        cuda_graphs: on a GPU, replay the network's forwards, which spares launches where batches are small. On a CPU it
            does nothing. Not yet run.
        precision: `float32`, or `bfloat16`: the network's matrix products, with weights that are rounded once, all else
            in float32. On what multiplies bfloat16 faster: GPUs, and CPUs with AVX-512 BF16 or AMX.

    Returns:
        See `dit.train.inference.Model`.

    Raises:
        ValueError: if there is none, it is an autoencoder, it holds a program and no weights, or it cannot be compiled.
        DamagedError: if a file of it is missing, or not what was written.
    """
    from dit.train.inference import Model  # torch takes its time, and most of the command line needs none

    return Model(path, compile=compile, cuda_graphs=cuda_graphs, precision=precision)
