"""Which files and directories a client may name, and where results go. Reads the file system and changes nothing."""

import re
from dataclasses import dataclass
from pathlib import Path

from quant.calibration_mix import PRESETS, SELF_CALIBRATION, rename_sources
from quant.recipe import AUTO, ROW, Recipe, said_group_size
from server.api.jobs.schema import QuantizeBody
from server.errors import Conflict, InvalidRequest
from server.jobs.record import JobRecipe

HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
# the directories themselves are the operator's to know, not a client's
ROOTS_IN_WORDS = "in the server's models directory or under one of its model roots"


@dataclass(frozen=True)
class JobPlaces:
    """models_dir: where jobs write their checkpoints. model_roots: what a client may read, models_dir aside."""

    models_dir: Path
    model_roots: tuple[Path, ...]

    def recipe_from_body(self, body: QuantizeBody) -> JobRecipe:
        """Raises InvalidRequest for a value out of range and for a name that leads nowhere allowed, Conflict for an
        output that exists.
        """
        recipe = body.checked_recipe()
        return JobRecipe(
            source=self._resolve_model(body.model),
            output=self._choose_output(body, recipe),
            bits=recipe.bits,
            group_size=said_group_size(recipe.group_size),
            method=recipe.method.value,
            calib=self._resolve_calib(body.calib),
            calib_samples=body.calib_samples,
            calib_seqlen=body.calib_seqlen,
            seed=recipe.seed,
            device=recipe.device.value,
            format=body.format,
            target_bpw=recipe.target_bpw,
            lm_head=recipe.lm_head,
            max_kl=recipe.max_kl,
            no_eval=body.no_eval,
        )

    def _resolve_model(self, name: str) -> str:
        path = self._find(name)
        if path is None:
            if _is_hub_name(name):
                return name
            raise InvalidRequest(
                f"model {name!r} is neither a model {ROOTS_IN_WORDS} nor a hub name like owner/model",
                param="model",
                code="model_not_found",
            )
        if not _is_model(path):
            raise InvalidRequest(
                f"model {name!r} is no model: give a directory with a config.json, or a .gguf file", param="model"
            )
        return str(path)

    def _resolve_calib(self, text: str) -> str:
        """The calibration with each of its files as a path that this client may name."""
        return rename_sources(text, self._resolve_text)

    def _resolve_text(self, name: str) -> str:
        if name == SELF_CALIBRATION or name in PRESETS:
            return name
        path = self._find(name)
        if path is not None and path.is_file():
            return str(path)
        if path is None and _is_hub_name(name):
            return name
        raise InvalidRequest(
            f"calib {name!r} is neither {SELF_CALIBRATION}, nor one of {', '.join(PRESETS)}, "
            f"nor a text file {ROOTS_IN_WORDS}, nor a hub data set like owner/name",
            param="calib",
        )

    def _choose_output(self, body: QuantizeBody, recipe: Recipe) -> Path:
        output = self.models_dir.resolve() / (body.output or _default_output_name(body.model, recipe))
        if output.exists() or output.is_symlink():
            raise Conflict(
                f"output {output.name!r} exists in the server's models directory; name another one, or delete it first",
                param="output",
                code="output_exists",
            )
        return output

    def _find(self, name: str) -> Path | None:
        """What a name leads to, links followed, if that lies under an allowed directory.

        What lies elsewhere is treated as if it were not there, so that nobody can ask what the machine holds.
        """
        roots = [root for given in (self.models_dir, *self.model_roots) if (root := _resolve(given)) is not None]
        for root in roots:
            # joining an absolute path gives that path
            path = _resolve(root / name)
            if path and any(path.is_relative_to(allowed) for allowed in roots) and _is_there(path):
                return path
        return None


def _resolve(path: Path) -> Path | None:
    """The path with its links followed; None where they lead in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        # a RuntimeError up to Python 3.12
        return None


def _is_hub_name(name: str) -> bool:
    # a path of that shape that exists is one that `_find` has refused, and the quantizer would open it
    return HUB_NAME.fullmatch(name) is not None and ".." not in name and not _is_there(Path(name))


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # a name that is too long, or a directory that this user may not enter
        return False


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or (path.suffix == ".gguf" and path.is_file())


def _default_output_name(model: str, recipe: Recipe) -> str:
    """Like SmolLM2-135M-awq-w4g64: what tells one recipe from another, without a group size left to the quantizer."""
    stem = Path(model).name.removesuffix(".gguf")
    group_size = said_group_size(recipe.group_size)
    group = {AUTO: "", ROW: ROW}.get(str(group_size), f"g{group_size}")
    target = "" if recipe.target_bpw is None else f"-{recipe.target_bpw:g}bpw"
    head = "" if recipe.lm_head is None else f"-head{recipe.lm_head}"
    name = f"{stem}-{recipe.method}-w{recipe.bits}{group}{target}{head}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")
