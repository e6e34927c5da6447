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
"""

__version__ = "0.1.0"
