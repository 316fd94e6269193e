"""Entry point: ``python train.py {fit,validate,test,predict} --config ...``."""

from temper.cli import main

if __name__ == "__main__":
    main()
