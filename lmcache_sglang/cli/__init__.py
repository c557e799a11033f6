"""The command ``lmcache-sglang``. Each command is a module with `add_parser`."""
