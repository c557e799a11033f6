"""Nodes that share their pages: who holds what, and how a page comes from there."""
