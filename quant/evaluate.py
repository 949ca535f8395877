"""How far a checkpoint is from its original: perplexity, KL divergence and top-1 agreement on the same tokens.

The checkpoint is read back from its files; beside it stand the original and its plain rounding.
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from quant.checkpoint.location import resolve_model
from quant.checkpoint.reader import CheckpointReader
from quant.dense_checkpoint import load_dense
from quant.errors import CheckpointError, QuantizationError, RecipeError, SourceError
from quant.model_structure import stored_modules, untie
from quant.overflow import first_not_finite
from quant.progress import ProgressListener, ProgressMeter, ignore_progress
from quant.report import REPORT_FILE
from quant.rounding import round_plainly
from quant.source import context_tokens, open_source

# prose and code written for this program and used nowhere else, so no calibration has seen it
HELD_OUT_TEXT = Path(__file__).parent / "held_out.txt"
# rows of logits compared at once: a window times the vocabulary in float32 several times over would not stay small
ROWS_AT_ONCE = 128
MAX_MEAN_NLL = 700.0
ORIGINAL = "original"
QUALITY_COLUMNS = ("perplexity", "mean KL (nats)", "same first choice")


@dataclass(frozen=True)
class TextWindows:
    """The tokens that models are measured on: the first num_windows windows of window_tokens each.

    text: a UTF-8 file; None takes the text that ships with this program. Raises RecipeError for sizes that measure
    nothing.
    """

    text: Path | None = None
    num_windows: int = 24
    window_tokens: int = 512

    def __post_init__(self) -> None:
        if self.num_windows < 1:
            raise RecipeError(f"the number of windows is {self.num_windows}; it must be at least 1")
        if self.window_tokens < 2:
            raise RecipeError(f"a window of {self.window_tokens} tokens predicts nothing; it must have at least 2")

    def read(self) -> str:
        """Raises SourceError when the file cannot be read as UTF-8 text."""
        path = self.text or HELD_OUT_TEXT
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{path} cannot be read as UTF-8 text: {error}") from error

    def check_context(self, context_tokens: int | None) -> None:
        """Raises RecipeError when a window is longer than what the model reads at once (None: any number of tokens)."""
        if context_tokens is not None and self.window_tokens > context_tokens:
            raise RecipeError(
                f"windows have {self.window_tokens} tokens, and this model reads at most {context_tokens} at once "
                f"(max_position_embeddings); use --window-tokens {context_tokens} or less"
            )

    @property
    def origin(self) -> str:
        """What people call the text."""
        return str(self.text or f"the text that ships with this program ({HELD_OUT_TEXT.name})")


@dataclass(frozen=True)
class EvalOptions:
    """against: the original, as a path or hub name; None takes what the checkpoint's report names."""

    checkpoint: Path
    against: str | None = None
    windows: TextWindows = TextWindows()


@dataclass(frozen=True)
class Quality:
    """One model on the text. mean_kl in nats; both comparisons are None for the original itself."""

    name: str
    perplexity: float
    mean_kl: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class EvalTable:
    rows: tuple[Quality, ...]
    text: str
    num_windows: int
    window_tokens: int

    def to_json(self) -> dict[str, object]:
        """The fields as plain JSON values."""
        return asdict(self)


@dataclass
class QualitySums:
    """Running sums over the tokens measured so far, of one model beside the original."""

    nll: float = 0.0
    kl: float = 0.0
    num_agreeing: int = 0
    num_tokens: int = 0

    def add(self, logits: Tensor, original: Tensor, targets: Tensor) -> None:
        """Negative log likelihood, and KL(original || model), in nats, at each of n tokens.

        logits, original: float32 [n, vocab] of this model and of the original; targets int64 [n].
        """
        for start in range(0, len(targets), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            log_q, log_p = logits[rows].log_softmax(-1), original[rows].log_softmax(-1)
            self.nll -= float(log_q.gather(1, targets[rows, None]).double().sum())
            self.kl += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
            self.num_agreeing += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
        self.num_tokens += len(targets)

    @property
    def perplexity(self) -> float:
        # beyond this the number says nothing, and exp overflows
        return math.exp(min(self.nll / self.num_tokens, MAX_MEAN_NLL))

    @property
    def mean_kl(self) -> float:
        return self.kl / self.num_tokens

    @property
    def top1_agreement(self) -> float:
        return self.num_agreeing / self.num_tokens


@torch.inference_mode()
def evaluate_checkpoint(options: EvalOptions, listener: ProgressListener = ignore_progress) -> EvalTable:
    """Measure the original, its plain rounding and the checkpoint on the same windows, in float32 on the CPU.

    Holds the three models at once, 12 bytes a parameter. Raises CheckpointError, SourceError or RecipeError for bad
    input, QuantizationError when a model gives logits that are not finite.
    """
    meter = ProgressMeter(listener)
    meter.report("load", 0, 3)
    reader = CheckpointReader.open(options.checkpoint)
    if reader.meta is None:
        raise CheckpointError(f"{options.checkpoint} is not quantized; there is nothing to compare")
    source = open_source(resolve_model(options.against or _recorded_source(options.checkpoint)))
    options.windows.check_context(context_tokens(source.config))
    windows = cut_windows(source.tokenizer, options.windows.read(), options.windows)
    meter.report("load", 1, 3)
    quantized = load_dense(options.checkpoint)
    meter.report("load", 2, 3)
    models = {
        ORIGINAL: source.model,
        "plain rounding": _round_copy(source.model, reader),
        "checkpoint": quantized,
    }
    meter.report("load", 3, 3)
    return EvalTable(
        rows=compare(models, windows, meter),
        text=options.windows.origin,
        num_windows=windows.shape[0],
        window_tokens=windows.shape[1],
    )


def compare(models: Mapping[str, PreTrainedModel], windows: Tensor, meter: ProgressMeter) -> tuple[Quality, ...]:
    """Each model on token windows int64 [W, T], in lockstep; the first one is what the others are compared with."""
    sums = {name: QualitySums() for name in models}
    meter.report("evaluate", 0, len(windows))
    for index, window in enumerate(windows):
        logits = {name: predict(name, model, window) for name, model in models.items()}
        original = next(iter(logits.values()))
        for name, model_logits in logits.items():
            sums[name].add(model_logits, original, window[1:])
        meter.report("evaluate", index + 1, len(windows))
    first = next(iter(models))
    return tuple(
        Quality(
            name=name,
            perplexity=total.perplexity,
            mean_kl=None if name == first else total.mean_kl,
            top1_agreement=None if name == first else total.top1_agreement,
        )
        for name, total in sums.items()
    )


def predict(name: str, model: PreTrainedModel, window: Tensor) -> Tensor:
    """float32 [T - 1, vocab]: what the model expects after each token of int64 [T] but the last.

    Raises QuantizationError when a logit is not finite.
    """
    logits: Tensor = model(window[None], use_cache=False).logits[0, :-1].float()
    if not bool(torch.isfinite(logits).all()):
        culprit = first_not_finite(model, lambda: model(window[None], use_cache=False)) or "the model"
        raise QuantizationError(f"the {name} cannot be measured: the output of {culprit} is not finite")
    return logits


def cut_windows(tokenizer: PreTrainedTokenizerBase, text: str, options: TextWindows) -> Tensor:
    """The first windows of the text, int64 [W, T] without overlap: one tokenization, special tokens as it adds them.

    Raises RecipeError when the text does not fill one window; a text that fills some gives those.
    """
    token_ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    num_windows = min(options.num_windows, len(token_ids) // options.window_tokens)
    if num_windows == 0:
        raise RecipeError(
            f"the text has {len(token_ids)} tokens, fewer than one window of {options.window_tokens}: "
            "give a longer text, or smaller windows"
        )
    return token_ids[: num_windows * options.window_tokens].view(num_windows, options.window_tokens)


def render(table: EvalTable) -> Table:
    """The measurements side by side, for people."""
    rendered = Table(
        title=f"{table.num_windows} windows of {table.window_tokens} tokens of {table.text}", title_justify="left"
    )
    rendered.add_column("model")
    for column in QUALITY_COLUMNS:
        rendered.add_column(column, justify="right")
    for row in table.rows:
        rendered.add_row(row.name, *quality_cells(row))
    return rendered


def quality_cells(quality: Quality) -> tuple[str, ...]:
    """The numbers as people read them, one for each of QUALITY_COLUMNS."""
    kl = "" if quality.mean_kl is None else f"{quality.mean_kl:.5f}"
    agreement = "" if quality.top1_agreement is None else f"{100 * quality.top1_agreement:.2f} %"
    return f"{quality.perplexity:.3f}", kl, agreement


def _round_copy(original: PreTrainedModel, reader: CheckpointReader) -> PreTrainedModel:
    """The original with the modules that the checkpoint quantizes rounded plainly, at their bits and group sizes."""
    rounded = copy.deepcopy(original)
    linears = [name for name, module in rounded.named_modules() if isinstance(module, nn.Linear)]
    names = {stored: name for name, stored in stored_modules(original, linears).items()}
    for name in reader.quantized_module_names:
        if name not in names:
            raise SourceError(f"the original has no module {name}: it is another model than the checkpoint's")
        spec = reader.packed_spec(name)
        # a head that was tied has a weight of its own when it is quantized
        untie(rounded, names[name])
        weight = rounded.get_parameter(f"{names[name]}.weight")
        weight.copy_(round_plainly(weight, spec.group_size, spec.bits))
    return rounded


def _recorded_source(checkpoint: Path) -> str:
    try:
        source = json.loads((checkpoint / REPORT_FILE).read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RecipeError(
            f"{checkpoint} has no {REPORT_FILE} that names its original; give it with --against"
        ) from error
    return str(source)
