"""`python -m lmcache_sglang.testing.sglang_cpu install|uninstall|status`."""

from lmcache_sglang.testing.sglang_cpu.install import main

main()
