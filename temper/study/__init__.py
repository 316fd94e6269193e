"""Studies: many stages, one table. Snakemake schedules, this package says what each stage is."""

from temper.study.settings import Route, Study

__all__ = ["Route", "Study"]
