"""The bodies of the quantization routes, in and out. What a value must look like is said here and nowhere else."""

import json
import re
from collections.abc import Mapping
from typing import Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, field_validator

from quant.calibration_mix import SELF_CALIBRATION
from server.api.errors import describe
from server.jobs.record import JobRecord, JobState, Method
from server.jobs.store import JobPage

MAX_NAME_CHARS = 512
# one plain directory name: no separator, no leading dot, nothing a shell or a URL would trip over
OUTPUT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

CHOICES: Mapping[str | None, tuple[int | str, ...]] = {
    "bits": (3, 4, 8),
    "group_size": ("auto", 32, 64, 128),
    "method": get_args(Method),
}


class QuantizeBody(BaseModel):
    """POST /quantize. An unknown field is an error: a misspelt option would cost hours before anyone saw it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(min_length=1, max_length=MAX_NAME_CHARS)
    output: str | None = None
    bits: int = 4
    group_size: int | Literal["auto"] = "auto"
    method: Method = "awq+gptq"
    calib: str = Field(default=SELF_CALIBRATION, min_length=1, max_length=MAX_NAME_CHARS)
    calib_samples: int | None = Field(default=None, ge=1, le=4096)
    calib_seqlen: int | None = Field(default=None, ge=1, le=8192)

    @field_validator(*(name for name in CHOICES if name), mode="before")
    @classmethod
    def check_choice(cls, value: object, info: ValidationInfo[None]) -> object:
        choices = CHOICES[info.field_name]
        # 4.0 and true are no 4
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            allowed = " or ".join(json.dumps(choice) for choice in choices)
            raise ValueError(f"{info.field_name} must be {allowed}, and it is {describe(value)}")
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
    group_size: int | Literal["auto"]
    method: Method
    calib: str
    calib_samples: int | None
    calib_seqlen: int | None
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
            group_size=recipe.group_size if recipe.group_size is not None else "auto",
            method=recipe.method,
            calib=recipe.calib,
            calib_samples=recipe.calib_samples,
            calib_seqlen=recipe.calib_seqlen,
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
