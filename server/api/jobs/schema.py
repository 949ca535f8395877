"""The bodies of the quantization routes, in and out. What a value must look like is said here and nowhere else."""

import json
import re
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, field_validator

from quant.device_name import DeviceName
from quant.errors import RecipeError
from quant.method import Method
from quant.recipe import AUTO, ROW, Recipe, parse_format, parse_group_size
from server.api.errors import describe
from server.errors import InvalidRequest
from server.jobs.record import JobRecord, JobState
from server.jobs.store import JobPage

MAX_NAME_CHARS = 512
# one plain directory name: no separator, no leading dot, nothing a shell or a URL would trip over
OUTPUT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

# fields of a recipe that a body calls by the names of the command line
FIELD_NAMES = {
    "calibration": "calib",
    "num_samples": "calib_samples",
    "sample_tokens": "calib_seqlen",
    "num_windows": "no_eval",
}
# how the command line writes what a recipe's messages advise
_OPTION = re.compile(r"--([a-z][a-z-]*)")


class QuantizeBody(BaseModel):
    """POST /quantize: the options of `awq-serve quantize`, whose ranges and combinations the recipe checks.

    An unknown field is an error: a misspelt option would cost hours before anyone saw it.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(min_length=1, max_length=MAX_NAME_CHARS)
    output: str | None = None
    bits: int = Recipe.bits
    group_size: int | str = AUTO
    format: str = AUTO
    target_bpw: float | None = Recipe.target_bpw
    lm_head: int | None = Recipe.lm_head
    # JSON has no enumerations
    method: Method = Field(default=Recipe.method, strict=False)
    calib: str = Field(default=Recipe.calibration, min_length=1, max_length=MAX_NAME_CHARS)
    calib_samples: int | None = Recipe.num_samples
    calib_seqlen: int | None = Recipe.sample_tokens
    seed: int = Recipe.seed
    device: DeviceName = Field(default=Recipe.device, strict=False)
    max_kl: float | None = Recipe.max_kl
    no_eval: bool = False

    def checked_recipe(self) -> Recipe:
        """Raises InvalidRequest, naming the field, for what no recipe may be. Reads no file."""
        try:
            return Recipe(
                method=self.method,
                bits=self.bits,
                group_size=parse_group_size(self.group_size) if isinstance(self.group_size, str) else self.group_size,
                calibration=self.calib,
                num_samples=self.calib_samples,
                sample_tokens=self.calib_seqlen,
                num_windows=0 if self.no_eval else Recipe.num_windows,
                seed=self.seed,
                max_kl=self.max_kl,
                format=parse_format(self.format),
                target_bpw=self.target_bpw,
                lm_head=self.lm_head,
                device=self.device,
            )
        except RecipeError as error:
            sentence = _OPTION.sub(lambda option: option[1].replace("-", "_"), str(error))
            field = error.field or ""
            raise InvalidRequest(sentence, param=FIELD_NAMES.get(field, field) or None) from error

    @field_validator("group_size", mode="before")
    @classmethod
    def check_group_size(cls, value: object) -> object:
        # true is no 1
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError(f'group_size must be a number, "{AUTO}" or "{ROW}", and it is {describe(value)}')
        return value

    @field_validator("model", "calib")
    @classmethod
    def check_printable(cls, value: str, info: ValidationInfo[None]) -> str:
        if not value.isprintable():
            raise ValueError(f"{info.field_name} must be printable text, and it is {describe(value)}")
        return value

    @field_validator("output")
    @classmethod
    def check_output(cls, value: str | None) -> str | None:
        if value is not None and OUTPUT_NAME.fullmatch(value) is None:
            raise ValueError(
                "output must be one plain directory name of letters, digits, '.', '_' and '-', at most 128 long, made "
                f"in the server's models directory, and it is {describe(value)}"
            )
        return value


class ProgressObject(BaseModel):
    phase: str
    done: int
    total: int
    seconds_left: float | None


class JobErrorObject(BaseModel):
    message: str


class JobSummary(BaseModel):
    """A job as the list shows it. Times are in seconds since the epoch; a state never entered has null."""

    id: str
    object: Literal["quantization.job"] = "quantization.job"
    status: str
    model: str
    output: str
    output_path: str
    bits: int
    group_size: int | str
    format: str
    target_bpw: float | None
    lm_head: int | None
    method: str
    calib: str
    calib_samples: int | None
    calib_seqlen: int | None
    seed: int
    device: str
    max_kl: float | None
    no_eval: bool
    progress: ProgressObject | None
    error: JobErrorObject | None
    created_at: int
    queued_at: int | None
    running_at: int | None
    succeeded_at: int | None
    failed_at: int | None
    cancelled_at: int | None
    cancel_requested_at: int | None

    @classmethod
    def from_record(cls, job: JobRecord) -> Self:
        recipe, progress = job.recipe, job.progress
        return cls(
            id=job.id,
            status=job.state.value,
            model=recipe.source,
            output=recipe.output.name,
            output_path=str(recipe.output),
            bits=recipe.bits,
            group_size=recipe.group_size,
            format=recipe.format,
            target_bpw=recipe.target_bpw,
            lm_head=recipe.lm_head,
            method=recipe.method,
            calib=recipe.calib,
            calib_samples=recipe.calib_samples,
            calib_seqlen=recipe.calib_seqlen,
            seed=recipe.seed,
            device=recipe.device,
            max_kl=recipe.max_kl,
            no_eval=recipe.no_eval,
            progress=ProgressObject(**vars(progress)) if progress else None,
            error=JobErrorObject(message=job.error) if job.error is not None else None,
            created_at=job.created_at,
            queued_at=job.entered_at.get(JobState.QUEUED),
            running_at=job.entered_at.get(JobState.RUNNING),
            succeeded_at=job.entered_at.get(JobState.SUCCEEDED),
            failed_at=job.entered_at.get(JobState.FAILED),
            cancelled_at=job.entered_at.get(JobState.CANCELLED),
            cancel_requested_at=job.cancel_requested_at,
        )


class JobObject(JobSummary):
    """One job with the quantizer's report, which is long and therefore not in the list."""

    report: JsonValue = None

    @classmethod
    def from_record(cls, job: JobRecord) -> Self:
        summary = super().from_record(job)
        summary.report = json.loads(job.report_json) if job.report_json is not None else None
        return summary


class JobList(BaseModel):
    """One page, newest job first. The next one starts `after` last_id."""

    object: Literal["list"] = "list"
    data: list[JobSummary]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def from_page(cls, page: JobPage) -> Self:
        jobs = page.jobs
        return cls(
            data=[JobSummary.from_record(job) for job in jobs],
            first_id=jobs[0].id if jobs else None,
            last_id=jobs[-1].id if jobs else None,
            has_more=page.has_more,
        )
