"""The published checkpoints whose configs are shipped in recipes/configs, with hub id and number of parameters."""

from typing import NamedTuple


class Published(NamedTuple):
    """A published checkpoint.

    Attributes:
        place: the hub id. parameters: the number of parameters; tied embeddings count once.
        note: what distinguishes its attention within the family.
    """

    place: str
    parameters: int
    note: str = ""


PUBLISHED = {
    "aya-23-8b": Published("CohereLabs/aya-23-8B", 8_028_033_024),
    "c4ai-command-r-plus": Published("CohereLabs/c4ai-command-r-plus", 103_810_674_688, "norms on q and k"),
    "falcon-7b": Published("tiiuae/falcon-7b", 6_921_720_704, "one key head"),
    "falcon-11b": Published("tiiuae/falcon-11B", 11_102_822_400, "new decoder architecture"),
    "gemma-2-2b": Published("google/gemma-2-2b", 2_614_341_888),
    "gemma-3-270m": Published("google/gemma-3-270m", 268_098_176),
    "gpt2": Published("openai-community/gpt2", 124_439_808),
    "granite-3.1-2b-base": Published("ibm-granite/granite-3.1-2b-base", 2_533_525_504),
    "llama-3.2-1b": Published("meta-llama/Llama-3.2-1B", 1_235_814_400),
    "meta-llama-3-8b-instruct": Published("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
    "mistral-7b-v0.1": Published("mistralai/Mistral-7B-v0.1", 7_241_732_096),
    "mixtral-8x7b-v0.1": Published("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
    "olmo-2-0425-1b": Published("allenai/OLMo-2-0425-1B", 1_484_916_736),
    "phi-1_5": Published("microsoft/phi-1_5", 1_418_270_720),
    "phi-3-mini-4k-instruct": Published("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552),
    "pythia-160m": Published("EleutherAI/pythia-160m", 162_322_944),
    "qwen2.5-0.5b": Published("Qwen/Qwen2.5-0.5B", 494_032_768),
    "qwen3-0.6b": Published("Qwen/Qwen3-0.6B", 596_049_920),
    "qwen3-30b-a3b": Published("Qwen/Qwen3-30B-A3B", 30_532_122_624),
    "smollm2-135m-instruct": Published("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
    "smollm3-3b": Published("HuggingFaceTB/SmolLM3-3B", 3_075_098_624),
    "stablelm-2-1_6b": Published("stabilityai/stablelm-2-1_6b", 1_644_515_328, "biases on q, k and v"),
    "stablelm-2-12b": Published("stabilityai/stablelm-2-12b", 12_143_185_920, "norms on q and k"),
}
