"""Studies: many stages, one table. Snakemake schedules, this package says what each stage is."""

from temper.study.settings import Route, load_study, route
from temper.study.stages import (
    code_hash,
    edit_command,
    fit_command,
    prepare_command,
    report_hash,
    report_inputs,
    stage_folder,
)

__all__ = [
    "Route",
    "code_hash",
    "edit_command",
    "fit_command",
    "load_study",
    "prepare_command",
    "report_hash",
    "report_inputs",
    "route",
    "stage_folder",
]
