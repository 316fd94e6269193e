"""Free-running answers at validation, test and prediction."""

import lightning.pytorch as L
from torch import Tensor, nn

from temper.data import Batch
from temper.models.generate import generate_greedy


class AnswersMixin(L.LightningModule):
    """Greedy generation for every objective; callbacks judge what the validation step returns."""

    network: nn.Module | None
    max_new_tokens: int | None

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Greedy free-running answers to the prompts of a batch: responses_BR, without the
        prompt.
        """
        return self.generate(batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """As `validation_step`."""
        return self.generate(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[str]:
        """Greedy answers as text."""
        return self.trainer.datamodule.answer_texts(self.generate(batch))

    def generate(self, batch: Batch) -> Tensor:
        """Greedy answers to prompts padded on the left: responses_BR (ids, padded on the right).

        They end where the datamodule says so (`stop_ids`), or else where the network's generation
        config does.
        """
        assert self.network is not None
        data = self.trainer.datamodule
        longest = self.max_new_tokens or data.max_new_tokens
        in_step = getattr(
            self.trainer.strategy, "shards_weights", False
        )  # a forward pass gathers weights: all ranks take part
        return generate_greedy(
            self.network,
            batch["input_ids"],
            batch["attention_mask"],
            longest,
            data.stop_ids,
            in_step,
        )
