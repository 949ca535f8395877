"""The sizes that keep the sources readable: files, functions, kernels. One that outgrows them has two owners in it."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
MAX_KERNEL_LINES = 110
DRAWERS_WITHOUT_A_NAME = {"utils", "helpers", "common", "misc", "base"}
PACKAGES = ("kernels", "quant", "server", "benchmarks")


def python_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).exists()]


def package_files() -> list[Path]:
    return [path for path in python_files() if path.relative_to(ROOT).parts[0] in PACKAGES]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_triton_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_no_file_outgrows_one_owner() -> None:
    too_long = {
        str(path.relative_to(ROOT)): lines
        for path in python_files()
        if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert not too_long


def test_no_function_outgrows_one_task() -> None:
    too_long = {}
    for path in package_files():
        for function in functions(path):
            lines = (function.end_lineno or function.lineno) - function.lineno + 1
            if lines > (MAX_KERNEL_LINES if is_triton_kernel(function) else MAX_FUNCTION_LINES):
                too_long[f"{path.relative_to(ROOT)}:{function.name}"] = lines
    assert not too_long


def test_no_module_is_a_drawer_without_a_name() -> None:
    drawers = [path for path in package_files() if DRAWERS_WITHOUT_A_NAME & {*path.relative_to(ROOT).parts, path.stem}]
    assert not drawers


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_owns(package: str) -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in package_files()
        if path.relative_to(ROOT).parts[0] == package and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent
