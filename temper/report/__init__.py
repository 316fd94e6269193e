"""The report of a finished study: CSV, LaTeX, charts and HTML from its run folders."""
