"""Trainings to copy from, each for one process or for several, on CPUs or GPUs.

    python -m flashpair.examples.ddp
    torchrun --nproc-per-node 2 -m flashpair.examples.ddp

`ddp`: DistributedDataParallel. `fsdp`: fully_shard. `two_towers`: a retrieval model with GradCache. They need
scikit-learn (``pip install flashpair[demo]``), but for `two_towers`.
"""
