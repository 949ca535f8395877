"""Recipes for jobs that no real quantizer ever sees."""

from pathlib import Path

from server.jobs.record import JobRecipe


def make_recipe(output: Path, source: str = "succeed") -> JobRecipe:
    return JobRecipe(source, output, bits=4, group_size=64, method="awq", calib="self")
