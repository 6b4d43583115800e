"""Comparisons with reference implementations and other programs: see README.md in this folder."""
