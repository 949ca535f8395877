"""The documents tell the truth: links lead somewhere, commands and flags exist, every setting has its line."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from quant.scale_groups import FAMILIES
from server.model.architectures import ARCHITECTURE_OF_TYPE
from server.settings import Settings
from server.settings_flags import FLAGS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
AWQ_SERVE = Path(sys.executable).parent / "awq-serve"
SUBCOMMANDS = ("serve", "quantize", "eval", "convert", "inspect")


def commands(program: str) -> Iterator[tuple[Path, list[str]]]:
    """Every line of an indented or fenced block, in any document, that runs the program."""
    for document in DOCUMENTS:
        in_fence = False
        for line in document.read_text().replace("\\\n", " ").splitlines():
            if line.startswith("```"):
                in_fence = not in_fence
            elif (in_fence or line.startswith("    ")) and line.strip().removeprefix("$ ").startswith(f"{program} "):
                yield document, shlex.split(line.strip().removeprefix("$ "), comments=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_that_exist(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", document.read_text())
    assert not [target for target in targets if not (document.parent / target).exists()]


def test_make_targets_that_are_shown_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    shown = {
        word for _, words in commands("make") for word in words[1:] if "=" not in word and not word.startswith("-")
    }
    assert shown
    assert not shown - targets


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What each subcommand's --help says, wide enough that no flag is cut."""
    return {
        name: subprocess.run(
            [str(AWQ_SERVE), name, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={"COLUMNS": "240", "PATH": "/usr/bin:/bin", "TERM": "dumb"},
        ).stdout
        for name in SUBCOMMANDS
    }


def test_flags_that_are_shown_exist(helps: dict[str, str]) -> None:
    shown = list(commands("awq-serve"))
    assert {words[1] for _, words in shown} == set(SUBCOMMANDS)
    unknown = [
        (document.name, words[1], word)
        for document, words in shown
        for word in words[2:]
        if word.startswith("--") and word.partition("=")[0] not in helps[words[1]]
    ]
    assert not unknown


def test_every_setting_has_its_line_and_its_flag(helps: dict[str, str]) -> None:
    documented = set(re.findall(r"^\| `([a-z_]+)` \|", (ROOT / "docs" / "settings.md").read_text(), flags=re.MULTILINE))
    assert documented == set(Settings.model_fields)
    flags = {FLAGS.get(name, f"--{name.replace('_', '-')}") for name in documented - {"model"}}
    assert not [flag for flag in flags if flag not in helps["serve"]]


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_shows_an_example(helps: dict[str, str], name: str) -> None:
    assert f"awq-serve {name} " in helps[name].split("Usage:")[1].partition("\n")[2]


def types_in_table(text: str) -> list[str]:
    """The model types that open the rows of a table, sorted."""
    lines = re.findall(r"^\| (`.*)", text, flags=re.MULTILINE)
    return sorted(name for line in lines for name in re.findall(r"`([a-z0-9_]+)`", line.partition("|")[0]))


def test_every_family_has_its_line() -> None:
    quantized, _, served = (ROOT / "docs" / "families.md").read_text().partition("## Serving")
    assert types_in_table(quantized) == sorted(FAMILIES)
    # the others are told from the first one
    assert sorted(["llama", *types_in_table(served)]) == sorted(ARCHITECTURE_OF_TYPE)
