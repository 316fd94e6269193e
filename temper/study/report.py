"""``python -m temper.study.report STUDY.yaml RUNS_FOLDER``: the last step of a study."""

import sys
from pathlib import Path

import yaml

from temper.errors import TemperError
from temper.report.html import build_report
from temper.run_folder import write_text
from temper.study.settings import load_study


def main() -> None:
    """Keep the study's settings beside its results, and build the report."""
    study_file, folder = sys.argv[1], Path(sys.argv[2])
    try:
        study = load_study(study_file)
        write_text(folder / "study.yaml", yaml.safe_dump(study, sort_keys=False))
        print(build_report(folder, study))
    except TemperError as mistake:
        sys.exit(f"error: {mistake}")


if __name__ == "__main__":
    main()
