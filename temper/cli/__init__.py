"""The command line. Nothing is imported here: `temper.cli.console` starts without torch."""
