"""The mixers of Hymba, whose windows keep the meta tokens as sinks."""

COUNT = 5
HYMBA = {
    "P": {"mixer": "parallel_heads", "window": 4, "sinks": COUNT},
    "F": {"mixer": "parallel_heads", "ssm": {"mixer": "mamba2"}},
    "S": {"mixer": "parallel_heads", "window": 4, "sinks": COUNT, "share_kv": True},
}
