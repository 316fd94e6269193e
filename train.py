"""Entry point: ``python train.py {fit,validate,test,predict} --config ...``."""

# Imported so that their classes are known by their short names.
import callbacks  # noqa: F401
import datamodules  # noqa: F401
import lightning_modules  # noqa: F401
from temper.cli import main

if __name__ == "__main__":
    main()
