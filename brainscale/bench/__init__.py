"""Measurements, kept with machine, versions and commit; ratios in one run against what a user would pick instead."""
