"""Comparisons with the plain formula and with other programs: see README.md in this folder."""
