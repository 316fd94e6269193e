"""Entry point: ``python train.py {fit,validate,test,predict,preview,plan,export} --config ...``.

``temper VERB ...`` is the same from any folder.
"""

from temper.cli.main import main

if __name__ == "__main__":
    main()
