"""Studies: many stages, one table. Snakemake schedules, this package says what each stage is."""

from temper.study.routes import Route
from temper.study.settings import Study

__all__ = ["Route", "Study"]
