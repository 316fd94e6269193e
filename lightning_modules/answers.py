"""Free-running answers at validation, test and prediction."""

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from temper.data import Batch


class AnswersMixin(L.LightningModule):
    """Greedy generation for every objective; callbacks judge what the validation step returns."""

    network: nn.Module | None
    max_new_tokens: int | None

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Greedy free-running answers to the prompts of a batch: responses_BR, without the prompt."""
        return self.generate(batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """As `validation_step`."""
        return self.generate(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[str]:
        """Greedy answers as text."""
        return self.trainer.datamodule.tokenizer.batch_decode(self.generate(batch), skip_special_tokens=False)

    @torch.no_grad()
    def generate(self, batch: Batch) -> Tensor:
        """Greedy answers to prompts padded on the left: responses_BR (ids, padded on the right)."""
        assert self.network is not None
        answers = self.network.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=self.max_new_tokens or self.trainer.datamodule.max_new_tokens,
            do_sample=False,
        )
        return answers[:, batch["input_ids"].shape[1] :]
