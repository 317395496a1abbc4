"""The generation settings that a student inherits from its teacher: those that it supports and transformers can save."""

from copy import deepcopy

from transformers import GenerationConfig

from distill.errors import UserError

# Settings that transformers (5.17, 5.24) loads without a warning and refuses to save: those of a decoding method that is
# switched off, which have no effect, and invalid token ids.
SAMPLING = ("temperature", "top_p", "min_p", "top_h", "top_k", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty")
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
TOKENS = ("pad_token_id", "bos_token_id", "decoder_start_token_id")
DYNAMIC = (None, "dynamic")  # caches that can hold a student's states


def inherited(config: GenerationConfig, reference: str) -> GenerationConfig:
    """A copy of a teacher's settings without those that have no effect, and without a cache that cannot hold states.

    Raises:
        UserError: transformers would refuse to save the remaining settings.
    """
    config = deepcopy(config)
    if config.cache_implementation not in DYNAMIC:
        config.cache_implementation = None
    if _refusal(config) is None:
        return config
    for name in TOKENS:
        token = getattr(config, name, None)
        if isinstance(token, int) and token < 0:
            setattr(config, name, None)
    idle = [] if config.do_sample else [*SAMPLING]
    idle += BEAMS if config.num_beams in (None, 1) else ()
    idle += () if config.return_dict_in_generate else OUTPUTS
    for name in idle:
        if hasattr(config, name):
            setattr(config, name, None)
    if (refusal := _refusal(config)) is not None:
        raise UserError(
            f"generation_config.json of {reference} could not be saved with a student: {refusal}; correct it there, or "
            "remove it"
        )
    return config


def _refusal(config: GenerationConfig) -> str | None:
    """The reason why transformers would refuse to save the settings; None if it would save them."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return None
