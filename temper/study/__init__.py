"""Studies: many stages, one table. Snakemake schedules, this package says what each stage is."""

from temper.study.settings import load_study
from temper.study.stages import code_hash, fit_command, report_inputs, stage_folder

__all__ = ["code_hash", "fit_command", "load_study", "report_inputs", "stage_folder"]
