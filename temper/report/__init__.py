"""Study folders in; CSV, LaTeX, figures, HTML out."""
