"""Entry point: ``python train.py {fit,validate,test,predict,preview,plan,export} --config ...``."""

import functools

# Imported so that their classes are known by their short names.
import callbacks
import datamodules  # noqa: F401
import lightning_modules  # noqa: F401
import temper.cli

# Without a signal, preemption does nothing; without preemption, a signal ends a fit with exit
# status 0 and nothing saved.
main = functools.partial(
    temper.cli.main,
    in_every_fit=(callbacks.Preemption,),
    in_every_predict=(callbacks.SaveAnswers,),
)

if __name__ == "__main__":
    main()
