"""TRL's own losses of a small batch, with which `distill.stages.tune` and `distill.stages.prefer` are compared.

`python tests/trl_losses.py` (where trl is installed: make test-trl) writes them into `tests/trl_losses.json`, together with
their models and batch, which seeds make. The quick tests compare with that file; tests/ecosystem makes the losses anew and
compares with both.
"""

import json
import tempfile
from pathlib import Path

import torch

FILE = Path(__file__).with_suffix(".json")
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DPO = {
    "sigmoid": {"loss": "sigmoid", "beta": 0.1},
    "sigmoid, beta 0.9": {"loss": "sigmoid", "beta": 0.9},
    "ipo": {"loss": "ipo", "beta": 0.2},
    "smoothed": {"loss": "sigmoid", "beta": 0.5, "label_smoothing": 0.1},
}


def model(seed: int):
    """A small random Llama; every number of it is the seed's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0))
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data = (
            1.0 + 0.1 * torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1
            else (0.3 * torch.randn(parameter.shape, generator=generator))
        )
    return made.eval()


def batch() -> dict[str, torch.Tensor]:
    """Four sequences with their completions, chosen ones first, as TRL has them; of other lengths, padded behind."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(1, 97, (length,), generator=generator) for length in (5, 8)]
    rows = [
        (prompt, torch.randint(1, 97, (length,), generator=generator))
        for lengths in ((4, 9), (7, 3))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    time = max(len(a) + len(b) for a, b in rows)
    found = {name: torch.zeros(4, time, dtype=torch.long) for name in ("input_ids", "attention_mask", "completion_mask")}
    for row, (asked, said) in enumerate(rows):
        found["input_ids"][row, : len(asked) + len(said)] = torch.cat([asked, said])
        found["attention_mask"][row, : len(asked) + len(said)] = 1
        found["completion_mask"][row, len(asked) : len(asked) + len(said)] = 1
    return found


def tokenizer():
    """Of one number a token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({str(number): number for number in range(97)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="0", pad_token="0")


def losses() -> dict[str, float]:
    """What TRL's trainers make of the batch."""
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for name, options in DPO.items():
            found[name] = _dpo(Path(place), options)
        found["sft"] = _sft(Path(place))
    return found


def _dpo(place: Path, options: dict) -> float:
    """TRL smooths labels of `aot`, whose margins are sorted over a batch first: of one pair it is conservative DPO."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    smoothed = "label_smoothing" in options
    given = {"beta": options["beta"], "loss_type": ["aot" if smoothed else options["loss"]]}
    given |= {"label_smoothing": options["label_smoothing"]} if smoothed else {}
    rows = Dataset.from_list([{"prompt": "1 2", "chosen": " 3", "rejected": " 4"}] * 2)
    usual = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_dropout": True}
    trainer = DPOTrainer(
        model(1), model(2), args=DPOConfig(str(place), **usual, **given), train_dataset=rows, processing_class=tokenizer()
    )
    whole = batch()
    parts = [
        {name: tensor[[0, 2]] for name, tensor in whole.items()},
        {name: tensor[[1, 3]] for name, tensor in whole.items()},
    ]
    with torch.no_grad():
        return sum(trainer.compute_loss(trainer.model, part).item() for part in (parts if smoothed else [whole])) / (
            len(parts) if smoothed else 1
        )


def _sft(place: Path) -> float:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    whole = batch()
    rows = Dataset.from_list([{"prompt": "1 2", "completion": " 3"}] * 2)
    usual = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    trainer = SFTTrainer(model(1), args=SFTConfig(str(place), **usual), train_dataset=rows, processing_class=tokenizer())
    labels = whole["input_ids"].masked_fill(whole["completion_mask"] == 0, -100)
    given = {"input_ids": whole["input_ids"], "attention_mask": whole["attention_mask"], "labels": labels}
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, given).item()


if __name__ == "__main__":
    import trl

    FILE.write_text(json.dumps({"trl": trl.__version__, "losses": losses()}, indent=1) + "\n")
