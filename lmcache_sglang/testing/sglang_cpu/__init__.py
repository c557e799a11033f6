"""The real SGLang on a machine without a GPU: what stock SGLang 0.5.23 lacks there, and no more.

    python -m lmcache_sglang.testing.sglang_cpu install     # once, in a virtual environment
    SGLANG_USE_CPU_ENGINE=1 python -m sglang.launch_server --device cpu --model-path ...

`testing/make_venv.sh` makes such an environment from nothing. SGLANG_USE_CPU_ENGINE is
SGLang's own variable; where it is not 1, nothing here is imported and nothing is changed.

    what SGLang misses                  what stands in
    torchvision, sgl_kernel             `finder`: importable, not callable; for every process of the
                                        environment, through one .pth line written by `install`
    the copies of sgl_kernel.kvcacheio  `transfer`: by this project's kernels
    attention of new tokens only        `attention`: stock computes the cached ones again, and reads
                                        layers with a sliding window from other layers' slots
    latent attention (MLA)              `latent_attention`: stock fails on its head sizes
    kernels of recurrent layers         `convolution`, `state_space`: the same in torch, put in their
                                        places by `recurrence`
    pinned host memory                  `plugin`: plain memory
    memory for two pools in one machine `plugin`: a small device pool unless a size is given, and a
                                        reserve of one gigabyte instead of ten
    one NUMA node a rank                `plugin`: ranks share the cores

The scheduler, the radix tree, HiCache with its threads and storage backends, the model's forward
pass and the HTTP server are SGLang's. What runs here therefore says nothing of pinned memory, of
CUDA streams (every copy is finished when its call returns, so no race between streams can show) or
of GPU kernels. Models with Mamba-2 layers want `--mamba-radix-cache-strategy no_buffer
--disable-overlap-schedule --page-size 1`: SGLang takes no snapshots inside a prompt on CPU. Those with a
gated delta rule (Qwen3-Next, Kimi Linear) do not run, nor does anything on ARM
(distributed/bootstrap.py:285 calls sgl_kernel there).
"""
