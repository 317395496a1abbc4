"""The engines that an export is proved in, by name."""

ENGINES = ("transformers", "vllm", "llama.cpp", "mlx")
