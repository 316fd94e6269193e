"""The supported version of DeepSpeed."""

from importlib.metadata import PackageNotFoundError, version

from temper.errors import TemperError

# Weight spaces read and write attributes of DeepSpeed's optimizers that are not public:
# strategies/zero.py lists them.
SUPPORTED = "0.19."


def check_deepspeed() -> None:
    """Require the version of DeepSpeed that the weight spaces support.

    Raises:
        TemperError: it is missing, or another version is installed.
    """
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise TemperError(
            "trainer.strategy: DeepSpeed is not installed: pip install -e '.[deepspeed]' -c"
            " constraints.txt, or use fsdp2"
        ) from None
    if not found.startswith(SUPPORTED):
        raise TemperError(
            f"trainer.strategy: DeepSpeed {found} is installed, and ZeRO's weight spaces use"
            f" attributes that only {SUPPORTED}* has; pip install -e '.[deepspeed]' -c"
            " constraints.txt, or use fsdp2"
        )
