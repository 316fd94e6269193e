"""The DeepSpeed that will do."""

from importlib.metadata import PackageNotFoundError, version

from temper.errors import TemperError

# Weight spaces read and write attributes of DeepSpeed's optimizers that are not public:
# strategies/zero.py and zero3.py list them.
WRITTEN_FOR = "0.19."


def check_deepspeed() -> None:
    """Refuse to go on without the DeepSpeed that the weight spaces were written for.

    Raises:
        TemperError: with the command that installs it.
    """
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise TemperError(
            "trainer.strategy: DeepSpeed is not installed: pip install -e '.[deepspeed]' -c"
            " constraints.txt, or use fsdp2"
        ) from None
    if not found.startswith(WRITTEN_FOR):
        raise TemperError(
            f"trainer.strategy: DeepSpeed {found} is installed, and ZeRO's weight spaces are"
            f" written for {WRITTEN_FOR}*, whose inner parts they use; pip install -e"
            " '.[deepspeed]' -c constraints.txt, or use fsdp2"
        )
