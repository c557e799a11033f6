"""Tiers that keep pages. They know nothing of engines.

base.py says what a tier owes its callers; memory.py is the smallest one and the how-to for a new one.
"""
