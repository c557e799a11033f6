"""The slab store: an LMDB index and fixed slots, in shared memory or in a file, for all processes of a node."""
