"""The disk tier: pages as values in one LMDB file, shared by all processes of a node."""
