"""What preference objectives share: no dropout."""

from typing import Any

from lightning_modules.reference import ReferenceModule
from temper.models import NetworkSpec
from temper.models.dropout import refuse_lora_dropout, switch_off_dropout


class PreferenceModule(ReferenceModule):
    """Base of objectives that compare log-probabilities of two models, or of two answers: dropout would be noise in it.

    Args:
        network: Where the network comes from.
        kwargs: See `ReferenceModule`.

    Raises:
        TemperError: a new adapter with dropout.
    """

    def __init__(self, network: NetworkSpec, **kwargs: Any) -> None:
        super().__init__(network, **kwargs)
        refuse_lora_dropout(network)

    def configure_model(self) -> None:
        """As always, and without dropout."""
        super().configure_model()
        assert self.network is not None
        switch_off_dropout(self.network)
