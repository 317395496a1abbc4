"""TRL's own generalised divergence of two sets of logits, with which `students.kernels.linear_kl` is compared.

`python tests/trl_gkd.py` (where trl is installed) writes it into `tests/trl_gkd.json`, for logits that a seed makes.
"""

import json
from pathlib import Path

import torch

FILE = Path(__file__).with_suffix(".json")
BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A student's and a teacher's, [3, 11, 53], and labels of which some count for nothing."""
    generator = torch.Generator().manual_seed(7)
    ours, theirs = (3 * torch.randn(3, 11, 53, generator=generator) for _ in range(2))
    labels = torch.randint(0, 53, (3, 11), generator=generator)
    return ours, theirs, labels.masked_fill(torch.rand(3, 11, generator=generator) < 0.4, -100)


def losses() -> dict[str, float]:
    """What TRL makes of them at temperature 1."""
    from trl.experimental.gkd import GKDTrainer

    ours, theirs, labels = logits()
    loss = GKDTrainer.generalized_jsd_loss
    return {name: loss(ours, theirs, labels=labels, beta=beta, temperature=1.0).item() for name, beta in BETAS.items()}


if __name__ == "__main__":
    import trl

    FILE.write_text(json.dumps({"trl": trl.__version__, "losses": losses()}, indent=1) + "\n")
