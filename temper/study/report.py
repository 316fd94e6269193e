"""``python -m temper.study.report STUDY.yaml RUNS_FOLDER``: the last step of a study."""

import sys
from pathlib import Path

from temper.errors import TemperError
from temper.report.html import build_report
from temper.run_folder import write_text
from temper.study.settings import STUDY_FILE, Study


def main() -> None:
    """Keep the study's settings beside its results, and build the report."""
    study_file, folder = sys.argv[1], Path(sys.argv[2])
    try:
        study = Study.load(study_file)
        write_text(folder / STUDY_FILE, study.as_text())
        print(build_report(folder, study))
    except TemperError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
