"""The generation settings that a student takes over from its teacher: those that it can honour and transformers saves."""

from copy import deepcopy

from transformers import GenerationConfig

from distill.errors import UserError

# What transformers (5.17, 5.24) loads without a word and refuses to save: settings of a search that is switched off, which
# say nothing, and numbers of tokens that are none.
SAMPLING = ("temperature", "top_p", "min_p", "top_h", "top_k", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty")
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
TOKENS = ("pad_token_id", "bos_token_id", "decoder_start_token_id")
DYNAMIC = (None, "dynamic")  # caches that have room for a student's states


def inherited(config: GenerationConfig, reference: str) -> GenerationConfig:
    """A copy of a teacher's settings without those that do nothing, and without a cache that holds no states.

    Raises:
        UserError: transformers would refuse to save what is left.
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
            f"generation_config.json of {reference} could not be saved with a student: {refusal}; mend it there, or take it "
            "away"
        )
    return config


def _refusal(config: GenerationConfig) -> str | None:
    """Why transformers would not save the settings."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return None
