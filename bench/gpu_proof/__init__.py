"""Everything that a GPU can prove, in nine minutes: `python -m bench.gpu_proof OUT`.

Needs torch with Triton and a GPU, no network and no installed flashpair. How one run goes:

    driver.py    stages in order of worth, each a process of its own under a limit, one JSON line at a time
    machine      versions, clocks, what the chip is; the rest waits for it
    build        in the background: nvcc builds onchip alone
    compile      in the background: every kernel of the stages below, without a launch, into one Triton cache
    ceilings     what products and copies reach here
    truth        eight losses against float64, and onchip
    table        times of a step, eager and as a CUDA graph, beside plain PyTorch, and by kernel
    sweep        tiles, warps, stages and registers of the two main kernels; the best row for kernels/configs.py
    counters     ncu's pipes of four kernels
    sanitizer    memcheck and racecheck of one loss
    launches     CUDA graphs, streams, devices, torch.compile
    suite        the tests that need a GPU, on all cores

OUT holds proof.jsonl, which is whole at any moment, and what is made of it: summary.md, configs.txt. Whatever ends the
run, what was found until then stays. `--on-host` runs the same logic without a GPU (accelerator.py says what stands in
for it).
"""
